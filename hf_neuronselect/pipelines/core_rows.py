"""Rows that a method picks for many targets: how many, from where, how long, and a few of their texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ..core.options import RowOptions
from ..core.text import replaced
from ..explain.shared_picks import SharedPicks
from ..rows.formats import read_row, row_format
from ..selection.reader import own_columns
from ..selection.record import mean_length
from ..selection.selection import Selection
from .measures import shares_of

CORE = ("method", "picked for at least", "rows", "share", "by chance", "tokens", "sources")
TEXTS, CHARACTERS = 3, 300
"""Texts shown of a method's most shared rows, and how much of each."""


@dataclass(frozen=True)
class CoreLine:
    """The rows that a method picks for at least ``least`` targets; see :class:`~hf_neuronselect.explain.shared_picks.Core`.

    Attributes:
        rows: how many. tokens: mean of a row. sources: share of each among them, the largest first; none where the pool has no such column.
    """

    method: str
    least: int
    rows: int
    share: float
    by_chance: float
    tokens: float | None
    sources: Mapping[str, float]


@dataclass(frozen=True)
class CoreText:
    """The beginning of a row, and the number of targets it is picked for."""

    row: int
    targets: int
    text: str


def core_lines(method: str, shared: SharedPicks, tokens: np.ndarray, sources: np.ndarray | None) -> list[CoreLine]:
    """A line for every number of targets from 2.

    Args:
        tokens: ``[N]`` of the pool's rows, NaN or negative where not known. sources: ``[N]`` text, if the pool has them.
    """
    found = []
    for core in shared.cores:
        lengths = tokens[core.rows]
        known = lengths[lengths >= 0]
        mix = shares_of(sources, core.rows) if sources is not None and len(core.rows) else {}
        found.append(CoreLine(method, core.least, len(core.rows), core.share, core.by_chance, mean_length(known), mix))
    return found


def core_cells(line: CoreLine, most: int = 3) -> tuple[str, ...]:
    """A core's line of a table."""
    mix = ", ".join(f"{source} {share:.0%}" for source, share in list(line.sources.items())[:most])
    return (line.method, str(line.least), str(line.rows), f"{line.share:.2%}", f"{line.by_chance:.2%}",
            "" if line.tokens is None else f"{line.tokens:.0f}", mix)  # fmt: skip


def core_texts(shared: SharedPicks, pool: Dataset, options: RowOptions) -> list[CoreText]:
    """Beginnings of the rows picked for most targets, at least two; of equals the first in the pool."""
    served = shared.served
    order = np.lexsort((shared.rows, -served))
    first = [at for at in order[:TEXTS].tolist() if served[at] > 1]
    fmt = row_format(own_columns(pool.column_names), options.row_format, options.columns)
    texts = pool.with_format(None).select_columns(fmt.used)
    found = []
    for at in first:
        row = int(shared.rows[at])
        text = replaced(read_row(texts[row], fmt).content())
        found.append(
            CoreText(row, int(served[at]), text if len(text) <= CHARACTERS else text[:CHARACTERS].rstrip() + " …")
        )
    return found


def shared_picks(selections: Mapping[tuple[str, str], Selection], total: int) -> dict[str, SharedPicks]:
    """What each method's picks for its targets have in common; methods with fewer than two targets are left out.

    Args:
        selections: (method, target) -> selection, from a pool of ``total`` rows.
    """
    picks: dict[str, dict[str, np.ndarray]] = {}
    for (method, target), one in selections.items():
        picks.setdefault(method, {})[target] = one.indices
    return {method: SharedPicks.of(of, total) for method, of in picks.items() if len(of) > 1}
