"""Batches of similar row lengths under a token budget.

Rows are padded on the RIGHT and no attention mask is passed: in a causal model a token never attends to tokens on its
right, so padding has no effect, and attention kernels are fastest without a mask. Pooled tokens are given by explicit
positions, never by a mask over padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..rows.encode import Sample


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[np.ndarray]:
    """Group rows of similar length into batches of at most ``batch_tokens`` padded tokens.

    Args:
        lengths: tokens of each row, all >= 1.
        batch_tokens: the budget; a longer row gets a batch of its own.

    Returns:
        An int64 array of row numbers per batch. The longest rows come first, so memory peaks in the first batch.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        rows = max(1, batch_tokens // int(lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


@dataclass(frozen=True)
class TokenBatch:
    """A padded batch, with the token positions that reductions need.

    Attributes:
        input_ids: int64 ``[B, L]``, padded on the right.
        last: int64 ``[B]``, position of each row's last token.
        content: int64 ``[B, 2]``, positions of the first and last content token.
        token: int64 ``[T]``, pooled tokens as positions in the flattened ``[B * L]``, row by row.
        row: int64 ``[T]``, the row of each pooled token.
        n_pooled: float32 ``[B]``, pooled tokens of each row (>= 1).
    """

    input_ids: torch.Tensor
    last: torch.Tensor
    content: torch.Tensor
    token: torch.Tensor
    row: torch.Tensor
    n_pooled: torch.Tensor

    @property
    def size(self) -> int:
        return self.input_ids.shape[0]

    @classmethod
    def of(cls, samples: Sequence[Sample], pad_id: int, device: torch.device) -> TokenBatch:
        width = max(len(sample.input_ids) for sample in samples)
        ids = np.full((len(samples), width), pad_id, dtype=np.int64)
        pooled = np.zeros((len(samples), width), dtype=bool)
        for i, sample in enumerate(samples):
            ids[i, : len(sample.input_ids)] = sample.input_ids
            pooled[i, : len(sample.pooled)] = sample.pooled
        token = np.flatnonzero(pooled)

        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            input_ids=put(ids),
            last=put(np.asarray([len(sample.input_ids) - 1 for sample in samples])),
            content=put(np.asarray([sample.content for sample in samples])),
            token=put(token),
            row=put(token // width),
            n_pooled=put(pooled.sum(axis=1).astype(np.float32)),
        )

    def pooled(self, hidden: torch.Tensor) -> torch.Tensor:
        """The pooled tokens' vectors: ``[B, L, d]`` -> ``[T, d]``."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if len(self.token) == len(flat) else flat.index_select(0, self.token)

    def mean(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mean over pooled tokens: ``[B, L, d]`` -> float32 ``[B, d]``, summed in token order."""
        vectors = self.pooled(hidden).float()
        total = torch.zeros(self.size, vectors.shape[-1], device=vectors.device)
        return total.index_add_(0, self.row, vectors) / self.n_pooled[:, None]

    def at(self, hidden: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Each row's vector at one position: ``[B, L, d]``, ``[B]`` -> float32 ``[B, d]``."""
        rows = torch.arange(self.size, device=hidden.device)
        return hidden[rows, position].float()
