"""The Arrow columns features are kept in, and how methods read them back without copies.

Sparse features are two list columns, ``<name>_indices`` (int32, ascending) and ``<name>_values``;
dense ones a list column ``<name>``
(float32; ``blocks x width`` where there is a vector per block). Bookkeeping: ``n_tokens`` (int32, tokens
fed), ``truncated`` (bool), ``neuron_skip`` (string, why a row has no features, else empty) and
``neuron_extractor`` (16 hex digits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ..core.errors import NeuronSelectError

BOOKKEEPING = ("n_tokens", "truncated", "neuron_skip", "neuron_extractor")


@dataclass(frozen=True)
class SparseRows:
    """Rows of nonzeros (CSR): ``indices`` and ``values`` of row i stand at ``indptr[i]:indptr[i + 1]``."""

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.indptr[i], self.indptr[i + 1])
        return self.indices[span], self.values[span]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Per-row float64 sums of ``values [nonzeros]``, each row added up by itself."""
        sums = np.zeros(len(self), dtype=np.float64)
        filled = np.flatnonzero(np.diff(self.indptr))
        if len(filled):
            sums[filled] = np.add.reduceat(values.astype(np.float64), self.indptr[filled])
        return sums


@dataclass(frozen=True)
class FeatureBatch:
    """Rows of a pool or of exemplars, as a method sees them.

    Attributes:
        index: int64 ``[n]``, each row's number in the whole data.
        n_tokens: int64 ``[n]``. usable: bool ``[n]``, rows that have features.
        columns: feature columns by name. texts: rendered content, where the method asks for it.
    """

    index: np.ndarray
    n_tokens: np.ndarray
    usable: np.ndarray
    columns: Mapping[str, Any]
    texts: Sequence[str] = field(default_factory=tuple)

    def __len__(self) -> int:
        return len(self.index)

    def sparse(self, name: str) -> SparseRows:
        """A sparse feature of every row; rows without features are empty.

        Raises:
            NeuronSelectError: a row has not as many indices as values.
        """
        indptr, indices = _flat(self.columns[f"{name}_indices"])
        of_values, values = _flat(self.columns[f"{name}_values"])
        if len(indices) != len(values) or not np.array_equal(indptr, of_values):
            raise NeuronSelectError(
                f"{name}_indices and {name}_values have rows of different sizes; they are damaged: extract them again"
            )
        return SparseRows(indptr, indices, values)

    def dense(self, name: str) -> np.ndarray:
        """A dense feature: float32 ``[n, width]`` or ``[n, blocks, width]``; NaN in rows without features."""
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

    def only_usable(self) -> FeatureBatch:
        """The rows that have features."""
        if self.usable.all():
            return self
        keep = np.flatnonzero(self.usable)
        columns = {
            name: [column[i] for i in keep.tolist()] if isinstance(column, list) else column.take(pa.array(keep))
            for name, column in self.columns.items()
        }
        texts = [self.texts[i] for i in keep.tolist()] if len(self.texts) else ()
        return FeatureBatch(self.index[keep], self.n_tokens[keep], self.usable[keep], columns, texts)


def _flat(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (indptr, values): Arrow (zero copy) or a list of numpy rows."""
    if isinstance(column, pa.ChunkedArray):
        # Chunks are put together by copying, even a single one.
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(column, pa.Array):
        offsets = column.offsets.to_numpy().astype(np.int64)
        return offsets - offsets[0], column.flatten().to_numpy(zero_copy_only=False)
    lengths = [len(row) for row in column]
    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return indptr, np.concatenate([np.asarray(row) for row in column]) if lengths else np.zeros(0, np.float32)
