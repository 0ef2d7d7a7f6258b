"""Rows' vectors of one signal, for pickers that compare rows with each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..core.errors import NeuronSelectError
from ..signals.columns import RowBatch, SparseRows


@dataclass(frozen=True)
class Vectors:
    """Dense or sparse vectors of a pool's rows.

    Attributes:
        place: int64 ``[N]``, each row's place among the vectors; -1: it has none.
        dense: float32 ``[n, width]`` of length 1 (or 0), or None. sparse: the same of a sparse signal.
    """

    place: np.ndarray
    dense: np.ndarray | None = None
    sparse: SparseRows | None = None

    @classmethod
    def of(cls, batches: Iterable[RowBatch], signal: str) -> Vectors:
        """Vectors of every usable row, from the pool's batches in their order.

        Raises:
            NeuronSelectError: the signal has no vectors.
        """
        parts, usable = [], []
        for batch in batches:
            usable.append(batch.usable)
            kept = batch.only_usable()
            if len(kept):
                parts.append(kept)
        mask = np.concatenate(usable)
        place = np.where(mask, np.cumsum(mask) - 1, -1)
        if not parts:
            return cls(place, dense=np.zeros((0, 1), np.float32))
        if f"{signal}_indices" in parts[0]:
            return cls(place, sparse=_joined([part.sparse(signal) for part in parts]))
        if signal not in parts[0]:
            raise NeuronSelectError("is no signal with a vector a row; name another, e.g. by=hidden", option="by",
                                    value=signal)  # fmt: skip
        return cls(place, dense=np.concatenate([_unit(part.dense(signal)) for part in parts]))

    def cosines(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Cosine of each row to each other one: ``[rows], [others]`` -> float64 ``[rows, others]``; 0 where one is zero."""
        if self.dense is not None:
            return np.asarray(self.dense[self.place[rows]] @ self.dense[self.place[others]].T, dtype=np.float64)
        from ..signals.kernels import products  # numba is loaded only where it is needed

        left, right = self.row(rows), self.row(others)
        table = np.zeros((int(right.indices.max(initial=0)) + 1, len(right)))
        table[right.indices, np.repeat(np.arange(len(right)), np.diff(right.indptr))] = right.values
        dots, squares = products(left, table)
        scale = np.sqrt(squares[:, None] * (table * table).sum(axis=0)[None, :])
        return np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)

    def row(self, rows: np.ndarray) -> SparseRows:
        """Sparse vectors of some rows."""
        assert self.sparse is not None
        places = self.place[rows]
        starts, ends = self.sparse.indptr[places], self.sparse.indptr[places + 1]
        lengths = ends - starts
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        at = np.repeat(starts - indptr[:-1], lengths) + np.arange(indptr[-1])
        return SparseRows(indptr, self.sparse.indices[at], self.sparse.values[at])


def _unit(vectors: np.ndarray) -> np.ndarray:
    flat = vectors.reshape(len(vectors), -1).astype(np.float32)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.divide(flat, length, out=np.zeros_like(flat), where=length > 0)


def _joined(parts: list[SparseRows]) -> SparseRows:
    starts = np.cumsum([0, *(int(part.indptr[-1]) for part in parts)])
    indptr = np.concatenate([[0], *(part.indptr[1:] + start for part, start in zip(parts, starts, strict=False))])
    return SparseRows(
        indptr, np.concatenate([part.indices for part in parts]), np.concatenate([part.values for part in parts])
    )
