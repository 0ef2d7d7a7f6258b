"""Rows of token ids in one flat array, and the activations of a model on them, shuffled in blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..core.errors import NeuronSelectError
from ..models.backbone import Backbone
from ..models.batching import TokenBatch, plan_batches
from ..models.sae import Site
from ..rows.encode import Sample

SHORTEST = 4  # tokens of the shortest row that is used
SINK = 10.0  # a token whose norm is this many times the median is an attention sink


@dataclass(frozen=True)
class TokenRows:
    """Rows of different lengths.

    Attributes:
        ids: integer ``[tokens]``, all rows one after another. starts: int64 ``[rows + 1]``.
        first: int64 ``[rows]``, the first token of each row whose activation is used; those before it are context.
    """

    ids: np.ndarray
    starts: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[Sequence[int] | np.ndarray], context: int) -> TokenRows:
        """Cut rows into pieces of at most ``context`` tokens. The first token of each is never used: it is a sink."""
        pieces = [
            np.asarray(row[at : at + context])
            for row in rows
            for at in range(0, max(len(row) - SHORTEST + 1, 0), context)
        ]
        starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces], dtype=np.int64)])
        return cls(np.concatenate([np.zeros(0, np.int64), *pieces]), starts, np.ones(len(pieces), np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @property
    def usable(self) -> int:
        """Tokens whose activations are used."""
        return int(np.maximum(self.lengths - self.first, 0).sum())

    def take(self, numbers: np.ndarray) -> TokenRows:
        numbers = np.asarray(numbers)
        parts = [self.ids[self.starts[i] : self.starts[i + 1]] for i in numbers]
        starts = np.concatenate([[0], np.cumsum(self.lengths[numbers], dtype=np.int64)])
        return TokenRows(np.concatenate([self.ids[:0], *parts]), starts, self.first[numbers])

    def batches(self, tokens: int, device: torch.device) -> Iterator[tuple[np.ndarray, TokenBatch]]:
        """Batches of similar lengths with their row numbers; ``pooled`` marks the tokens that are used."""
        for numbers in plan_batches(self.lengths.tolist(), tokens):
            samples = []
            for i in numbers:
                ids = self.ids[self.starts[i] : self.starts[i + 1]]
                samples.append(Sample(ids, np.arange(len(ids)) >= self.first[i], {}, len(ids)))
            yield numbers, TokenBatch.of(samples, 0, device)


def read_sites(
    backbone: Backbone, batch: TokenBatch, sites: Sequence[Site], *, float32: bool = True
) -> list[torch.Tensor]:
    """Activations ``[used tokens, width]`` of each site, in the order of ``sites`` (blocks run in theirs)."""
    seen: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Callable[[torch.Tensor], None]:
        def observe(hidden: torch.Tensor) -> None:
            pooled = batch.pooled.vectors(hidden)
            seen[number] = pooled.float() if float32 else pooled

        return observe

    backbone.run(batch, [(site, keep(number)) for number, site in enumerate(sites)])
    return [seen[number] for number in range(len(sites))]


@dataclass
class Counts:
    """Tokens left out so far."""

    sinks: int = 0
    broken: int = 0


@dataclass(frozen=True)
class Block:
    """Activations of all sites on the same tokens, and the order in which they are taken.

    Attributes:
        held: a ``[tokens, width]`` tensor of each site, in memory or on disk. order: of the tokens, on the CPU.
    """

    held: Sequence[torch.Tensor]
    order: torch.Tensor

    def __len__(self) -> int:
        return len(self.order)

    def parts(self, site: int, size: int) -> Iterator[torch.Tensor]:
        """All tokens in order, ``size`` at a time; only these are read from disk."""
        held = self.held[site]
        return (held[part.to(held.device)] for part in self.order.split(size))


class Activations:
    """Activations of some blocks on shuffled rows, in blocks of about ``block`` tokens that are shuffled as a whole.

    A block depends on its number and the seed alone, so training can go on at any block.

    Args:
        block: tokens held (and shuffled) at once. batch: tokens of a forward pass.
        folder: where the block is kept on disk; None keeps it in memory.

    Attributes:
        on_read: told how many more tokens were read.
    """

    def __init__(
        self, backbone: Backbone, sites: Sequence[Site], rows: TokenRows, *, block: int, batch: int, seed: int = 0,
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.backbone, self.sites, self.rows = backbone, list(sites), rows
        self.batch, self.seed, self.counts = batch, seed, Counts()
        self.limits: list[float] | None = None  # the largest norm of a token that is no sink, of each site
        self.on_read: Callable[[int], None] = lambda tokens: None
        self._usable = np.maximum(rows.lengths - rows.first, 0)
        if not self._usable.sum():
            raise NeuronSelectError("no row has a token to train on", option="pool")
        self.block = max(1, min(block, int(self._usable.sum())))
        shape = (self.block + int(rows.lengths.max()), backbone.hidden_size)
        dtype = next(backbone.decoder.parameters()).dtype
        self._held = [
            _buffer(shape, dtype, backbone.device, folder and folder / f"block-{i}") for i in range(len(self.sites))
        ]

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """The blocks from number ``start`` on, without end. A block is valid until the next one is asked for."""
        for number, rows in enumerate(self._order()):
            if number >= start:
                yield self._fill(number, self.rows.take(rows))

    def _order(self) -> Iterator[np.ndarray]:
        """Row numbers of each block: pass after pass over the rows, each in its own order."""
        epoch = 0
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            ends = np.cumsum(self._usable[order])
            cut = np.searchsorted(ends, np.arange(self.block, ends[-1], self.block)) + 1
            yield from (part for part in np.split(order, cut) if len(part))
            epoch += 1

    def _fill(self, number: int, rows: TokenRows) -> Block:
        filled = 0
        for _, batch in rows.batches(self.batch, self.backbone.device):
            seen = read_sites(self.backbone, batch, self.sites, float32=False)
            keep = self._kept(seen)
            count = int(keep.sum())
            for held, part in zip(self._held, seen, strict=True):
                held[filled : filled + count] = part[keep]
            filled += count
            self.on_read(count)
        if not filled:
            raise NeuronSelectError("no activation is finite: check the model, or load it in float32", option="dtype")
        # On the CPU, so that the order is the same on every device.
        order = torch.randperm(filled, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + number))
        return Block([held[:filled] for held in self._held], order)

    def _kept(self, seen: list[torch.Tensor]) -> torch.Tensor:
        """Bool ``[tokens]``: finite, and no attention sink at any site."""
        norms = [part.float().norm(dim=-1) for part in seen]
        finite = torch.stack([norm.isfinite() for norm in norms]).all(dim=0)
        self.counts.broken += int((~finite).sum())
        if self.limits is None:
            if not finite.any():
                return finite
            self.limits = [SINK * float(norm[finite].median()) for norm in norms]
        keep = finite.clone()
        for norm, limit in zip(norms, self.limits, strict=True):
            keep &= norm <= limit
        self.counts.sinks += int((finite & ~keep).sum())
        return keep


def _buffer(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, path: Path | None) -> torch.Tensor:
    """Memory for a block, or a file of that size that is claimed before anything is written."""
    if path is None:
        return torch.empty(shape, dtype=dtype, device=device)
    count = shape[0] * shape[1]
    size = count * dtype.itemsize
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                _write_zeros(file, size)
    except OSError as cause:
        path.unlink(missing_ok=True)
        raise NeuronSelectError(
            f"{size / 1e9:.2g} GB for shuffled activations cannot be written ({cause.strerror}): make room, or ask for less",
            option="buffer_gb", value=f"{shape[0] * shape[1] * dtype.itemsize / 1e9:.2g}",
        ) from cause  # fmt: skip
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)


def _write_zeros(file: BinaryIO, size: int) -> None:
    """Claim space where the system has no call for it."""
    zeros = bytes(1 << 20)
    for at in range(0, size, len(zeros)):
        file.write(zeros[: size - at])
