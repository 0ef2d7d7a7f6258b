"""What ``Dataset.map`` hands over, in any format, as plain columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from datasets.formatting.formatting import LazyBatch, LazyRow


def plain_batch(given: Any) -> tuple[Mapping[str, Any], bool | None]:
    """Columns of plain values, and whether they are one row; None where only the values can tell.

    Args:
        given: a dict, or what a dataset with the format numpy, torch, pandas or arrow gives.
    """
    single = True if isinstance(given, LazyRow) else False if isinstance(given, LazyBatch) else None
    if isinstance(given, pa.Table):
        return given.to_pydict(), False
    if hasattr(given, "to_dict") and hasattr(given, "columns"):  # a pandas.DataFrame
        given, single = given.to_dict("list"), False
    return {name: _plain(given[name]) for name in given}, single


def _plain(value: Any) -> Any:
    """Arrays and tensors, at any depth, as lists."""
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


__all__ = ["plain_batch"]
