"""The identity of rows: a hash of their content as read, whatever file, order of chunks or type width it came in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute  # noqa: F401 (pa.compute)
import xxhash
from datasets import Dataset

from .formats import RowFormat

BLOCK = 4096  # rows hashed at once: memory does not grow with the data


def pool_digest(data: Dataset) -> str:
    """32 hex digits of all rows with all their columns: the identity of a pool or of exemplars.

    Rows in another order are another pool. The order of columns, the files' names and their compression do not matter.
    """
    hashed = xxhash.xxh3_128(f"{len(data)}\0".encode())
    columns = tuple((name, name) for name in sorted(data.column_names))
    for start in range(0, len(data), BLOCK):
        rows = range(start, min(start + BLOCK, len(data)))
        hashed.update(rows_digest(data, RowFormat("", columns), rows).encode())
    return hashed.hexdigest()


def rows_digest(data: Dataset, fmt: RowFormat, rows: range) -> str:
    """32 hex digits of some rows: of the columns that their format reads, under the format's own names.

    Keys that no row has (Arrow fills them with nulls where other rows have them) count as absent.

    Args:
        data: any dataset. rows: consecutive row numbers.
    """
    hashed = xxhash.xxh3_128(f"{len(rows)}\0".encode())
    table = data.with_format("arrow").select_columns(fmt.used)[rows.start : rows.stop]
    for ours, theirs in sorted(fmt.columns):
        column = table.column(theirs)
        _add(hashed, ours, column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column)
    return hashed.hexdigest()


def _add(hashed: Any, name: str, values: pa.Array) -> None:
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if values.null_count == len(values):
        return
    kind = values.type
    hashed.update(f"{name}\0{len(values)}\0{values.null_count}\0".encode())
    if values.null_count:
        hashed.update(values.is_valid().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_struct(kind):
        for field in sorted(kind, key=lambda field: field.name):
            _add(hashed, f"{name}.{field.name}", pa.compute.struct_field(values, field.name))
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pa.compute.fill_null(pa.compute.list_value_length(values), 0)
        hashed.update(lengths.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        _add(hashed, f"{name}[]", values.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        if pa.types.is_string_view(kind):  # pyarrow casts it from version 18 on
            values = pa.array(values.to_pylist(), pa.large_string())
        texts = pa.compute.fill_null(values.cast(pa.large_string()), "")
        offsets = np.frombuffer(texts.buffers()[1], dtype="<i8")[texts.offset : texts.offset + len(texts) + 1]
        hashed.update(np.diff(offsets).tobytes())
        if texts.buffers()[2] is not None:
            hashed.update(memoryview(texts.buffers()[2])[int(offsets[0]) : int(offsets[-1])])
    else:  # numbers, booleans, dates: by value
        for value in values.to_pylist():
            hashed.update(repr(value).encode() + b"\0")
