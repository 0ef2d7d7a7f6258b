"""Rows as Arrow columns without loss: a column whose values have no common type is kept as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import pyarrow as pa
from datasets import Dataset

from .formats import Row
from .json_type import JSON, JSON_LIST, array_of_texts, is_json, schema_of

CHUNK_ROWS = 4000
_SORTS_KEYS = pa.array([{"b": 0, "a": 0}]).type.field(0).name == "a"  # an older Arrow does
_ODD = re.compile(r"\d{19}|0\.0\d{9}")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d[\d.]*(?:e[-+]?\d+)?')  # texts and numbers of JSON
_MIXED = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)


class Columns:
    """Names and types of columns, each as narrow as the values seen so far allow.

    Attributes:
        types: by name, in the order of their first row. widened: whether batches made before have narrower types.
    """

    def __init__(self) -> None:
        self.types: dict[str, pa.DataType] = {}
        self.widened = False
        self._rows = 0

    @property
    def schema(self) -> pa.Schema:
        return schema_of(self.types)

    def batch(self, rows: Sequence[Row]) -> pa.RecordBatch:
        """Rows as columns; a key that a row lacks is null."""
        before = dict(self.types)
        arrays: dict[str, pa.Array] = {}
        for name in dict.fromkeys(chain(self.types, *rows)):
            values = [row.get(name) for row in rows]
            found, array = _infer(values)
            kind = _merge(self.types[name], found) if name in self.types else found
            self.types[name] = kind
            arrays[name] = array if array is not None and array.type == kind else _array(values, kind)
        self.widened |= self._rows > 0 and before != self.types
        self._rows += len(rows)
        return pa.RecordBatch.from_arrays([arrays[name] for name in self.types], schema=self.schema)


def chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in lists."""
    rows = iter(rows)
    while part := list(islice(rows, CHUNK_ROWS)):
        yield part


def as_dataset(rows: Sequence[Row]) -> Dataset:
    """A dataset of rows that may have different keys and values of several types."""
    columns = Columns()
    try:
        batches = [columns.batch(part) for part in chunks(rows)]
        if columns.widened:
            batches = [columns.batch(part) for part in chunks(rows)]
    except TypeError:  # values that are no JSON, as images: `datasets` knows their types
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in dict.fromkeys(chain(*rows))})
    return Dataset(pa.Table.from_batches(batches, columns.schema))


def _infer(values: list[Any]) -> tuple[pa.DataType, pa.Array | None]:
    """The type of some values, and the array if they are in it."""
    try:
        array = pa.array(values)
    except _MIXED:
        return (JSON_LIST if all(value is None or isinstance(value, list) for value in values) else JSON), None
    if pa.types.is_nested(array.type) and (_is_empty_struct(array.type) or _ragged(array, values)):
        return (JSON_LIST if pa.types.is_list(array.type) else JSON), None
    if _SORTS_KEYS and (kind := _in_order(array.type, values)) != array.type:
        return kind, pa.array(values, kind)
    return array.type, array


def _in_order(kind: pa.DataType, values: Iterable[Any]) -> pa.DataType:
    """A type with the keys of mappings in the order of the values."""
    known = [value for value in values if value is not None]
    if pa.types.is_struct(kind):
        types = {field.name: field.type for field in kind}
        names = dict.fromkeys(chain.from_iterable(known))
        return pa.struct([(name, _in_order(types[name], [value.get(name) for value in known])) for name in names])
    return pa.list_(_in_order(kind.value_type, chain.from_iterable(known))) if pa.types.is_list(kind) else kind


def _is_empty_struct(kind: pa.DataType) -> bool:
    """Whether a type has a mapping without keys in it, which a Parquet file cannot hold."""
    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_is_empty_struct(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_list(kind) and _is_empty_struct(kind.value_type)


def _ragged(array: pa.Array, values: Iterable[Any]) -> bool:
    """Whether Arrow filled keys that a mapping lacks with nulls."""
    return _has_nulls(array) and not all(_fits(value, array.type) for value in values)


def _has_nulls(array: pa.Array) -> bool:
    if pa.types.is_struct(array.type):
        fields = [array.field(i) for i in range(array.type.num_fields)]
        return any(field.null_count or _has_nulls(field) for field in fields)
    return pa.types.is_list(array.type) and _has_nulls(array.values)


def _fits(value: Any, kind: pa.DataType) -> bool:
    if value is None:
        return True
    if pa.types.is_struct(kind):
        return len(value) == kind.num_fields and all(_fits(value[field.name], field.type) for field in kind)
    return not pa.types.is_list(kind) or all(_fits(one, kind.value_type) for one in value)


def _merge(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The narrowest type that holds the values of both."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {one, other} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = _merge(one.value_type, other.value_type)
        return JSON_LIST if is_json(inner) or _holds_json(inner) else pa.list_(inner)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields, more = ({field.name: field.type for field in kind} for kind in (one, other))
        if fields.keys() == more.keys():
            merged = {
                name: _merge(fields.get(name, pa.null()), more.get(name, pa.null())) for name in {**fields, **more}
            }
            if not any(is_json(kind) or _holds_json(kind) for kind in merged.values()):
                return pa.struct(list(merged.items()))
    return JSON


def _holds_json(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(is_json(field.type) or _holds_json(field.type) for field in kind)
    return pa.types.is_list(kind) and (is_json(kind.value_type) or _holds_json(kind.value_type))


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind == JSON:
        return _json(values)
    if kind == JSON_LIST:
        offsets: list[int | None] = []
        flat: list[Any] = []
        for value in values:
            offsets.append(None if value is None else len(flat))
            flat += value or ()
        return pa.ListArray.from_arrays(pa.array([*offsets, len(flat)], pa.int32()), _json(flat))
    return pa.array(values, kind)


def _json(values: Iterable[Any]) -> pa.Array:
    return array_of_texts(None if value is None else _dumps(value) for value in values)


def _dumps(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return _TOKEN.sub(_number, text) if _ODD.search(text) else text


def _number(found: re.Match[str]) -> str:
    """A number as `datasets` reads it whole: more than 64 bits as a text, many digits after ``0.0`` with an exponent."""
    text = found[0]
    if text.startswith('"'):
        return text
    if "." in text or "e" in text:
        return f"{float(text):.17e}"
    return text if -(2**63) <= int(text) < 2**63 else f'"{text}"'


__all__ = ["CHUNK_ROWS", "Columns", "as_dataset", "chunks"]
