"""Rows as methods see them: columns of Arrow or numpy, read without copies.

Sparse signals are two list columns, ``<name>_indices`` (int32, ascending) and ``<name>_values``; dense ones a list
column ``<name>`` (float32; ``blocks x width`` where there is a vector per block).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..core.errors import NeuronSelectError


@dataclass(frozen=True)
class SparseRows:
    """Rows of nonzeros (CSR): row i has ``indices`` and ``values`` at ``indptr[i]:indptr[i + 1]``."""

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.indptr[i], self.indptr[i + 1])
        return self.indices[span], self.values[span]


@dataclass(frozen=True)
class RowBatch:
    """Rows of a pool or of exemplars, as a method sees them.

    ``rows["n_tokens"]`` is a plain column, ``rows.sparse("mona")`` and ``rows.dense("hidden")`` are a signal's vectors.

    Attributes:
        index: int64 ``[n]``, each row's number in the whole data.
        usable: bool ``[n]``, rows that have every signal asked for.
        columns: the signals' columns by name.
    """

    index: np.ndarray
    usable: np.ndarray
    columns: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def __getitem__(self, column: str) -> np.ndarray:
        """A column with one value a row: ``[n]``, numbers or (dtype object) texts."""
        values = self.columns[column]
        if isinstance(values, (pa.Array, pa.ChunkedArray)):
            return np.asarray(
                values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy()
            )
        if isinstance(values, np.ndarray):
            return values
        return np.asarray(values, dtype=object if any(isinstance(value, str) for value in values[:1]) else None)

    def sparse(self, name: str) -> SparseRows:
        """A sparse signal of every row; rows without it are empty.

        Raises:
            NeuronSelectError: a row does not have as many indices as values.
        """
        indptr, indices = _flat(self.columns[f"{name}_indices"])
        of_values, values = _flat(self.columns[f"{name}_values"])
        if len(indices) != len(values) or not np.array_equal(indptr, of_values):
            raise NeuronSelectError(
                f"{name}_indices and {name}_values have rows of different sizes; they are damaged: extract them again"
            )
        return SparseRows(indptr, indices, values)

    def dense(self, name: str) -> np.ndarray:
        """A dense signal: float32 ``[n, width]`` or ``[n, blocks, width]``; NaN in rows without it."""
        column = self.columns[name]
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if isinstance(column, pa.Array):
            values, lengths = column.flatten(), np.diff(column.offsets.to_numpy())
            shape: tuple[int, ...] = (int(lengths.max(initial=0)),)
            while pa.types.is_list(values.type):
                inner = np.diff(values.offsets.to_numpy())
                shape, values = (*shape, int(inner.max(initial=0))), values.flatten()
            given = values.to_numpy(zero_copy_only=False)
        else:
            lengths = np.asarray([len(row) for row in column])
            shape = next((row.shape for row in column if len(row)), (0,))
            given = np.concatenate([np.ravel(row) for row in column]) if len(column) else np.zeros(0, np.float32)
        filled = lengths > 0
        if given.size != int(filled.sum()) * int(np.prod(shape)):
            raise NeuronSelectError(f"column {name!r} has rows of different sizes; it is damaged: extract it again")
        if filled.all():
            return given.reshape(len(self), *shape)
        out = np.full((len(self), *shape), np.nan, dtype=np.float32)
        out[filled] = given.reshape(-1, *shape)
        return out

    def only_usable(self) -> RowBatch:
        """The rows that have every signal."""
        return self if self.usable.all() else self.take(np.flatnonzero(self.usable))

    def take(self, rows: np.ndarray) -> RowBatch:
        """Some of the rows, by their places ``[k]``."""
        columns = {name: _taken(column, rows) for name, column in self.columns.items()}
        return RowBatch(self.index[rows], self.usable[rows], columns)

    @classmethod
    def join(cls, parts: Sequence[RowBatch]) -> RowBatch:
        """Batches of the same columns as one."""
        columns: dict[str, Any] = {}
        for name, first in parts[0].columns.items():
            found = [part.columns[name] for part in parts]
            if isinstance(first, (pa.Array, pa.ChunkedArray)):
                columns[name] = pa.chunked_array([chunk for column in found for chunk in _chunks_of(column)])
            elif isinstance(first, np.ndarray):
                columns[name] = np.concatenate(found)
            else:
                columns[name] = [row for column in found for row in column]
        index, usable = (np.concatenate([getattr(part, name) for part in parts]) for name in ("index", "usable"))
        return cls(index, usable, columns)


def _taken(column: Any, rows: np.ndarray) -> Any:
    if isinstance(column, (pa.Array, pa.ChunkedArray)):
        return column.take(pa.array(rows))
    return column[rows] if isinstance(column, np.ndarray) else [column[i] for i in rows.tolist()]


def _chunks_of(column: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (indptr, values): Arrow (zero copy) or a list of numpy rows."""
    if isinstance(column, pa.ChunkedArray):
        # combine_chunks copies even a single chunk
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(column, pa.Array):
        offsets = column.offsets.to_numpy().astype(np.int64)
        return offsets - offsets[0], column.flatten().to_numpy(zero_copy_only=False)
    lengths = [len(row) for row in column]
    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return indptr, np.concatenate([np.asarray(row) for row in column]) if lengths else np.zeros(0, np.float32)
