"""The type of columns whose values have no common one: JSON, with every version of `datasets`.

Since 4.7 `datasets` has it. For older versions a type of the same name is made here, so that rows are the same values
with each.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import pyarrow as pa
from datasets import Features, List
from datasets.features.features import register_feature

HAS_JSON = hasattr(datasets, "Json")


@dataclass
class _Json:
    """Values kept as JSON text, and read back as what they were."""

    pa_type: ClassVar[pa.DataType] = pa.large_string()
    id: str | None = field(default=None, repr=False)
    _type: str = field(default="Json", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    def decode_example(self, value: str | None, token_per_repo_id: object = None) -> Any:
        return None if value is None else json.loads(value)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        return storage.cast(self.pa_type)


if not HAS_JSON:
    with warnings.catch_warnings():  # that registering is an experimental part of `datasets`
        warnings.simplefilter("ignore", UserWarning)
        register_feature(_Json, "Json")

JSON: pa.DataType = pa.json_(pa.utf8()) if HAS_JSON else _Json.pa_type
JSON_LIST: pa.DataType = pa.list_(JSON)


def array_of_texts(texts: Iterable[str | None]) -> pa.Array:
    """JSON texts as an array of the type."""
    if HAS_JSON:
        return pa.ExtensionArray.from_storage(JSON, pa.array(texts, pa.utf8()))
    return pa.array(texts, JSON)


def schema_of(types: Mapping[str, pa.DataType]) -> pa.Schema:
    """The schema of columns, from which `datasets` knows which are JSON."""
    schema = pa.schema(list(types.items()))
    marked = {name: _Json() if kind == JSON else List(_Json()) for name, kind in types.items() if is_json(kind)}
    return schema if HAS_JSON or not marked else schema.with_metadata(Features(marked).arrow_schema.metadata)


def is_json(kind: pa.DataType) -> bool:
    return bool(kind == JSON or kind == JSON_LIST)


__all__ = ["JSON", "JSON_LIST", "array_of_texts", "is_json", "schema_of"]
