"""Columns of images, audio and other media: never decoded, and saved with their bytes instead of local paths."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetInfo, Features, IterableDataset, LargeList, List, Value
from datasets.features.features import require_storage_embed
from datasets.table import embed_table_storage, table_cast

from .formats import Row

_BATCH = 100  # rows; media are large


def undecoded(data: IterableDataset) -> IterableDataset:
    """A stream without a format, whose media stay as they are stored."""
    data = data.with_format(None)
    features = data.features
    if features is None or not any(require_storage_embed(feature) for feature in features.values()):
        return data
    kept = Features({name: _media(feature, _stored) for name, feature in features.items()})
    return data.decode(False).cast(kept)


def as_stored(rows: list[Row], features: Features) -> Dataset:
    """Rows of a stream that is :func:`undecoded` as a dataset with these features."""
    plain = Features({name: _media(feature, _parts) for name, feature in features.items()})
    table = Dataset.from_list(rows, features=plain).data.table
    return Dataset(table_cast(table, features.arrow_schema), info=DatasetInfo(features=features))


def _media(feature: Any, change: Callable[[Any], Any]) -> Any:
    """A feature whose media, at any depth, are changed."""
    if isinstance(feature, dict):
        return {name: _media(one, change) for name, one in feature.items()}
    if isinstance(feature, List):
        return List(_media(feature.feature, change), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_media(feature.feature, change))
    return change(feature) if require_storage_embed(feature) else feature


def _stored(feature: Any) -> Any:
    feature = copy.copy(feature)
    feature.decode = False
    return feature


def _parts(feature: Any) -> Any:
    """What a medium is stored as: encoding it would need its decoder."""
    return {"bytes": Value("binary"), "path": Value("string")}


def with_bytes(data: Dataset) -> Dataset:
    """Rows whose media hold their bytes; of their paths only the files' names stay."""
    if not any(require_storage_embed(feature) for feature in data.features.values()):
        return data
    return data.with_format("arrow").map(embed_table_storage, batched=True, batch_size=_BATCH).with_format(None)
