"""Some rows of a pool with their signals, from its store in one sweep or computed: what a report's pictures are drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core.errors import NeuronSelectError
from ..explain.pool_map import PoolMap, map_of
from ..explain.profile import SAMPLES, Profile, panel_of
from ..signals.activations import Hidden, Mona, Polysemantic
from ..signals.base import SIGNALS
from ..signals.columns import RowBatch, SparseRows
from ..store.store import FeatureStore, columns_of, skips_of

MOST_ROWS, LEAST_ROWS = 2000, 250
"""Rows of a sample at most; and where their signals are large, at least. A quarter of them, at most, are picks."""
MOST_BYTES = 96_000_000
"""Memory that a sample takes, while it has more than :data:`LEAST_ROWS` rows."""
COMPUTED_ROWS, LEAST_COMPUTED = 400, 100
"""Rows of a sample whose signals no store has, at most, and at least: the model runs over them. Between, a quarter of the pool."""
_STEP = 500  # rows read at once
RAW = (Hidden.name, Polysemantic.name)
"""Signals of the model's own neurons, the first that a store has."""
FEATURES = Mona.name
"""The signal of an SAE's features."""


@dataclass(frozen=True)
class Fires:
    """Where the units of a sparse signal fire in a whole pool.

    Attributes:
        rows: int64 ``[units]``, rows in which each fires. total: float64 ``[units]``, sum of its values. pool: rows that were read.
    """

    rows: np.ndarray
    total: np.ndarray
    pool: int

    def share(self, unit: int) -> float:
        """Share of the rows in which a unit fires."""
        return float(self.rows[unit]) / max(1, self.pool) if unit < len(self.rows) else 0.0


@dataclass(frozen=True)
class PoolSample:
    """Some rows of a pool.

    Attributes:
        rows: their signals, by ascending numbers. drawn: bool ``[n]``, rows that chance chose from the whole pool.
        picked: bool ``[n]``, rows that were picked. signal: the method's own that has vectors, or another; "" if there is none.
        signals: those that rows have. fires: sparse signal -> where its units fire. whole: whether in the whole pool; else in the
            rows drawn.
    """

    rows: RowBatch
    drawn: np.ndarray
    picked: np.ndarray
    signal: str
    signals: tuple[str, ...]
    fires: Mapping[str, Fires] = field(default_factory=dict)
    whole: bool = True

    @property
    def estimated(self) -> int:
        """Random rows that stand for the whole pool in :attr:`fires`; 0 where it was read."""
        return 0 if self.whole or not self.fires else int(self.drawn.sum())


def numbers_of(
    able: np.ndarray, picks: Sequence[int], shown: Sequence[int], most: int = MOST_ROWS
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows that a sample has, int64 ascending, and which of them chance chose.

    Args:
        able: numbers of the rows that could be picked. picks: best first. shown: rows that must be among them.
        most: how many rows.
    """
    wanted = np.unique(np.asarray([*picks[: most // 4], *shown], np.int64))
    count = min(len(able), most - len(wanted))
    drawn = np.sort(np.random.default_rng(0).choice(able, max(0, count), replace=False))
    every = np.union1d(wanted, drawn)
    return every, np.isin(every, drawn)


def sample_pool(
    store: FeatureStore, own: Mapping[str, str], able: np.ndarray, picks: Sequence[int], shown: Sequence[int] = ()
) -> PoolSample:
    """Read a sample of a pool's rows.

    Args:
        own: the method's signals that the store has, with their identities. Others are taken where the store has one of them.
        able, picks, shown: as of :func:`numbers_of`.

    Raises:
        NeuronSelectError: no signal with vectors; a shard is damaged or missing.
    """
    wanted = {name: identity for name, identity in own.items() if name in SIGNALS.names() and SIGNALS[name].has_vector}
    first = next(iter(wanted), "")
    for kind in ((FEATURES,), RAW):
        if not any(name in wanted for name in kind):
            wanted |= next(
                ({name: store.identities[name][0]} for name in kind if len(store.identities.get(name, ())) == 1), {}
            )
    if not wanted:
        raise NeuronSelectError("the store has no signal with vectors", option="features", value=store.folder.name)
    numbers = drawn = np.zeros(0, np.int64)
    counts: dict[str, Fires] = {}
    parts: list[RowBatch] = []
    for batch in _batches(store, wanted):
        if not parts:
            size = sum(column.nbytes for column in batch.columns.values()) / max(1, len(batch.index))
            most = int(np.clip(MOST_BYTES / max(1.0, size), min(LEAST_ROWS, MOST_ROWS), MOST_ROWS))
            numbers, drawn = numbers_of(able, picks, shown, most)
        for name in wanted:
            if f"{name}_indices" in batch.columns:
                counts[name] = _counted(counts.get(name), batch.sparse(name))
        parts.append(_among(batch, numbers))
    rows = RowBatch.join(parts)
    kept = np.isin(numbers, rows.index)
    return PoolSample(
        rows,
        drawn[kept],
        np.isin(rows.index, np.asarray(picks, np.int64)),
        first or next(iter(wanted)),
        tuple(wanted),
        counts,
    )


def computed_sample(
    rows: RowBatch, drawn: np.ndarray, picks: Sequence[int], own: Sequence[str], *, whole: bool
) -> PoolSample:
    """A sample of rows whose signals were computed for it.

    Args:
        rows: by ascending numbers, all usable. drawn: numbers of those that chance chose.
        own: signals with vectors that the rows have, the method's own first. whole: whether the rows drawn are the whole pool.
    """
    by_chance = np.isin(rows.index, drawn)
    of_pool = rows.take(np.flatnonzero(by_chance))
    sparse = [name for name in own if f"{name}_indices" in rows.columns and len(of_pool)]
    fires = {name: _counted(None, of_pool.sparse(name)) for name in sparse}
    return PoolSample(
        rows, by_chance, np.isin(rows.index, np.asarray(picks, np.int64)), own[0], tuple(own), fires, whole
    )


def profile_of(sample: PoolSample) -> Profile | None:
    """100 picks against 100 random rows, by the model's own neurons and by an SAE's features, as far as the sample has them."""
    rng = np.random.default_rng(0)
    picks, pool = (
        np.sort(rng.permutation(np.flatnonzero(rows))[:SAMPLES])
        for rows in (sample.picked, sample.drawn & ~sample.picked)
    )
    names = sorted(
        (name for name in sample.signals if name in (*RAW, FEATURES)), key=lambda name: SIGNALS[name].needs_sae
    )
    panels = (
        panel_of(name, SIGNALS[name].needs_sae, sample.rows.take(picks), sample.rows.take(pool)) for name in names
    )
    found = tuple(panel for panel in panels if panel is not None)
    return Profile(found) if found else None


def pool_map(sample: PoolSample, exemplars: Mapping[str, RowBatch]) -> PoolMap | None:
    """The sample's rows, and the exemplars of each target that have its signal, in a plane."""
    column = sample.signal if sample.signal not in sample.fires else f"{sample.signal}_indices"
    there = {name: rows for name, rows in exemplars.items() if column in rows}
    return map_of(sample.signal, sample.rows, sample.drawn, sample.picked, there)


def random_rows(store: FeatureStore, wanted: Mapping[str, str], count: int) -> RowBatch:
    """At most ``count`` usable rows of a store, drawn at random.

    Args:
        wanted: signal -> identity.
    """
    numbers = np.random.default_rng(0).permutation(len(store))[:count]
    return RowBatch.join([_among(batch, numbers) for batch in _batches(store, wanted)])


def _batches(store: FeatureStore, wanted: Mapping[str, str]) -> Iterator[RowBatch]:
    """All rows of a store, in order."""
    start = 0
    for tables in store.batches(wanted, step=_STEP):
        usable = np.asarray([not skip for skip in skips_of(tables)], dtype=bool)
        yield RowBatch(np.arange(start, start + len(usable)), usable, columns_of(tables))
        start += len(usable)


def _among(batch: RowBatch, numbers: np.ndarray) -> RowBatch:
    """The usable rows of a batch that have one of these numbers."""
    return batch.take(np.flatnonzero(batch.usable & np.isin(batch.index, numbers)))


def _counted(before: Fires | None, rows: SparseRows) -> Fires:
    """Counts with those of more rows."""
    fires = rows.values > 0
    width = max(int(rows.indices.max(initial=-1)) + 1, 0 if before is None else len(before.rows))
    found = np.bincount(rows.indices[fires], minlength=width)
    total = np.bincount(rows.indices, weights=rows.values.astype(np.float64), minlength=width)
    if before is None:
        return Fires(found, total, len(rows))
    found[: len(before.rows)] += before.rows
    total[: len(before.total)] += before.total
    return Fires(found, total, before.pool + len(rows))
