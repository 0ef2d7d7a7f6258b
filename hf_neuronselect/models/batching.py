"""Batches of similar row lengths under a token budget.

Rows are padded on the RIGHT and no attention mask is passed: in a causal model a token never attends to tokens on its
right, so padding has no effect, and attention kernels are fastest without a mask. Pooled tokens are given by explicit
positions, never by a mask over padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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


def auto_budget(device: torch.device, inner: int) -> int:
    """Padded tokens a batch; on a CPU as many as keep an MLP's activations in the caches (1-2 M elements, measured).

    Args:
        inner: neurons of an MLP.
    """
    return 32768 if device.type != "cpu" else max(512, min(4096, (1 << 20) // inner))


def logits_budget(model: Any, asked: int | str) -> int:
    """Padded tokens a batch of a model that computes logits, too: what was asked for; ``auto``: at most 4,096, on a CPU fewer.

    On a CPU a small batch is also one whose rows are alike in length: SmolLM2's losses took 0.67 times as long by 682 tokens.
    """
    if asked != "auto":
        return int(asked)
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return min(4096, auto_budget(next(model.parameters()).device, inner))


@dataclass(frozen=True)
class MarkedTokens:
    """Some tokens of each row of a batch.

    Attributes:
        token: int64 ``[T]``, positions in the flattened ``[B * L]``, row by row. row: int64 ``[T]``, each one's row.
        count: float32 ``[B]``, tokens of each row. first, last: int64 ``[B]``, positions of a row's first and last one; 0
            in rows without any.
    """

    token: torch.Tensor
    row: torch.Tensor
    count: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    @classmethod
    def of(cls, marks: Sequence[np.ndarray], width: int, device: torch.device) -> MarkedTokens:
        """Args: marks: bool ``[n]`` of each row, n <= width."""
        mask = np.zeros((len(marks), width), dtype=bool)
        for i, mark in enumerate(marks):
            mask[i, : len(mark)] = mark
        token, some = np.flatnonzero(mask), mask.any(axis=1)
        last = np.where(some, width - 1 - mask[:, ::-1].argmax(axis=1), 0)
        parts = (token, token // width, mask.sum(axis=1).astype(np.float32), mask.argmax(axis=1), last)
        return cls(*(torch.from_numpy(part).to(device) for part in parts))

    def vectors(self, hidden: torch.Tensor) -> torch.Tensor:
        """These tokens' vectors: ``[B, L, d]`` -> ``[T, d]``."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if len(self.token) == len(flat) else flat.index_select(0, self.token)

    def mean(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mean over these tokens: ``[B, L, d]`` -> float32 ``[B, d]``, summed in token order; 0 in rows without any."""
        vectors = self.vectors(hidden).float()
        total = torch.zeros(len(self.count), vectors.shape[-1], device=vectors.device)
        return total.index_add_(0, self.row, vectors) / self.count.clamp_min(1)[:, None]


@dataclass(frozen=True)
class TokenBatch:
    """A padded batch, with the token positions that reductions need.

    Attributes:
        input_ids: int64 ``[B, L]``, padded on the right.
        last: int64 ``[B]``, position of each row's last token.
        pooled: the tokens that are averaged, at least one a row. marks: other tokens, by :attr:`Sample.marks`' names.
    """

    input_ids: torch.Tensor
    last: torch.Tensor
    pooled: MarkedTokens
    marks: Mapping[str, MarkedTokens]

    @property
    def size(self) -> int:
        return self.input_ids.shape[0]

    @cached_property
    def whole(self) -> MarkedTokens:
        """All tokens but the padding."""
        lengths = (self.last + 1).tolist()
        marks = [np.ones(length, dtype=bool) for length in lengths]
        return MarkedTokens.of(marks, self.input_ids.shape[1], self.input_ids.device)

    @classmethod
    def of(cls, samples: Sequence[Sample], pad_id: int, device: torch.device) -> TokenBatch:
        width = max(len(sample.input_ids) for sample in samples)
        ids = np.full((len(samples), width), pad_id, dtype=np.int64)
        for i, sample in enumerate(samples):
            ids[i, : len(sample.input_ids)] = sample.input_ids
        return cls(
            input_ids=torch.from_numpy(ids).to(device),
            last=torch.from_numpy(np.asarray([len(sample.input_ids) - 1 for sample in samples])).to(device),
            pooled=MarkedTokens.of([sample.pooled for sample in samples], width, device),
            marks={
                name: MarkedTokens.of([sample.marks[name] for sample in samples], width, device)
                for name in samples[0].marks
            },
        )

    def at(self, hidden: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Each row's vector at one position: ``[B, L, d]``, ``[B]`` -> float32 ``[B, d]``."""
        rows = torch.arange(self.size, device=hidden.device)
        return hidden[rows, position].float()
