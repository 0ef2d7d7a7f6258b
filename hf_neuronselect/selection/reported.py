"""What a selection's page shows: its scores, its rows and those just below the cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..core.spread import Spread
from ..explain.page_data import MOST_ROWS, PoolTable, Report, ReportRow
from ..rows.formats import RowFormat, read_row, rows_of
from .reasons import PICKS, Told, told_of
from .sample import pool_map, profile_of

if TYPE_CHECKING:
    from .selection import Selection

NEAR = 20
"""Rows shown of those that were not picked."""
UNEXPLAINED = "Why these rows have their scores is not shown: it was left out; neuronselect report FOLDER adds it."
_BEGINNING = 1000  # characters
_BLOCK = 256  # rows read at once
MOST_SOURCES = 200
"""A column with more different values than that names no sources."""


def reported(selection: Selection, examples: bool, reasons: bool | None = None) -> Report:
    """What a page about a selection is made from; the picks are read while it is made.

    Args:
        examples: whether texts of the data are shown; sources are such texts, too, and so are reasons.
        reasons: as of :meth:`Selection.report`.
    """
    table = pool_table(pa.concat_tables(list(selection.score_batches())))
    place = _Places(table.index)
    table.score[place.of(selection.indices)] = selection.dataset["neuron_score"]  # of a stream the table may lack them
    pool, fmt = selection.pool if examples else None, selection.row_format
    column = (selection.provenance.spread or Spread()).source_column
    own = selection.dataset.column_names[: selection.dataset.column_names.index("source_index")]
    sources = _sources(selection.dataset, column) if examples and column in own else None
    by_source = column if sources else None
    near = near_misses(table)
    beside = _rows(pool, table.index[near], fmt, None) if pool is not None else (ReportRow(0) for _ in near)
    told = Told(unexplained=UNEXPLAINED if examples else "")
    if examples and reasons is not False:
        picks = place.of(selection.indices[:PICKS]).tolist()
        told = told_of(selection, table, picks, near.tolist() if pool is not None else [], bool(reasons))
    found = None if told.sample is None else pool_map(told.sample, told.exemplars)
    return Report(
        made=selection.provenance,
        table=table,
        picks=_picks(selection, place, fmt, by_source, examples),
        near=[ReportRow(int(row), one.said) for row, one in zip(near, beside, strict=True)],
        sources=sources,
        pool_sources=_sources(pool, column, most=None) if sources and pool is not None else None,
        examples=examples,
        pool_at_hand=pool is not None,
        reasons=told.reasons,
        unexplained=told.unexplained,
        features=told.features,
        profile=None if told.sample is None else profile_of(told.sample),
        map=found,
        map_texts={} if found is None else _beginnings(selection, pool, found.rows, fmt),
        exemplar_texts=told.examples,
        unsampled=told.unsampled,
        estimated=0 if told.sample is None else told.sample.estimated,
    )


def pool_table(scores: pa.Table) -> PoolTable:
    """The columns of a score table that a page needs."""
    names = [name.removeprefix("score_") for name in scores.column_names if name.startswith("score_")]

    def numbers(name: str) -> np.ndarray:
        found: np.ndarray = scores.column(name).cast(pa.float64()).to_numpy()  # null becomes NaN
        return found

    return PoolTable(
        index=scores.column("source_index").to_numpy(),
        score=numbers("score").copy(),
        n_tokens=scores.column("n_tokens").fill_null(-1).to_numpy().astype(np.int64),
        picked=scores.column("selected").to_numpy(),
        able=scores.column("excluded").is_null().to_numpy(),
        targets={name: numbers(f"score_{name}") for name in names},
    )


def near_misses(table: PoolTable) -> np.ndarray:
    """int64, places of the rows with the highest scores that were not picked, the smaller index first among equals."""
    rest = np.flatnonzero(table.able & ~table.picked & np.isfinite(table.score))
    if len(rest) > NEAR:  # a large pool is not sorted for them
        rest = rest[table.score[rest] >= np.partition(table.score[rest], -NEAR)[-NEAR]]
    return rest[np.lexsort((table.index[rest], -table.score[rest]))[:NEAR]]


class _Places:
    """Places in the pool table by numbers of rows."""

    def __init__(self, index: np.ndarray) -> None:
        self.order = np.argsort(index, kind="stable")
        self.sorted = index[self.order]

    def of(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.order[np.searchsorted(self.sorted, rows)]
        return found


def _picks(
    selection: Selection, place: _Places, fmt: RowFormat, source: str | None, examples: bool
) -> Iterator[ReportRow]:
    indices = selection.indices[:MOST_ROWS]
    places = place.of(indices).tolist()
    if not examples:
        yield from map(ReportRow, places)
        return
    for row, one in zip(places, _rows(selection.dataset, np.arange(len(indices)), fmt, source), strict=True):
        yield ReportRow(row, one.said, one.source)


def _rows(data: Dataset, rows: np.ndarray, fmt: RowFormat, source: str | None) -> Iterator[ReportRow]:
    """These rows of a dataset, read."""
    used = list(dict.fromkeys([*fmt.used, *([source] if source else [])]))
    plain = data.with_format(None).select_columns(used)
    for start in range(0, len(rows), _BLOCK):
        for row in rows_of(plain[rows[start : start + _BLOCK].tolist()]):
            yield ReportRow(0, read_row(row, fmt), None if source is None else str(row[source]))


def _beginnings(selection: Selection, pool: Dataset | None, rows: np.ndarray, fmt: RowFormat) -> dict[int, str]:
    """Number in the pool -> beginning of the row, of those whose text is at hand."""
    data, places = pool, rows
    if data is None:
        data, places = selection.dataset, np.flatnonzero(np.isin(selection.indices, rows))
        rows = selection.indices[places]
    read = _rows(data, places, fmt, None)
    return {
        int(row): one.said.content()[:_BEGINNING] for row, one in zip(rows, read, strict=True) if one.said is not None
    }


def _sources(data: Dataset, column: str, most: int | None = MOST_SOURCES) -> Mapping[str, int] | None:
    """How many rows each source has; None where the column's values are no names of sources."""
    if getattr(data.features[column], "dtype", "") not in ("string", "large_string"):
        return None
    found: Counter[str] = Counter()
    for batch in data.with_format("arrow").select_columns([column]).iter(batch_size=10_000):
        for one in batch.column(column).value_counts().to_pylist():
            found[str(one["values"])] += one["counts"]
        if most is not None and len(found) > most:
            return None
    return found
