"""Single rows of a store."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import pyarrow as pa

from .shards import shard_ranges
from .store import FeatureStore


def row_of(store: FeatureStore, wanted: Mapping[str, str], row: int) -> dict[str, pa.Table]:
    """The signals of one row: signal -> a table of one row, as :meth:`FeatureStore.batches` gives it.

    Args:
        wanted: signal -> identity.

    Raises:
        NeuronSelectError: shards are missing, or the row's is damaged.
    """
    store.check(wanted)
    number, place = divmod(row, store.manifest["shard_rows"])
    rows, found = shard_ranges(len(store), store.manifest["shard_rows"])[number], {}
    for name, identity in wanted.items():
        with contextlib.ExitStack() as files:
            file = store.checked(files, name, identity, number, rows, None)
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if place < end:
                    found[name] = file.read_row_group(group).slice(place - start, 1)
                    break
                start = end
    return found
