"""What a selection's page shows of the pool and of the picks, and how their texts lie in it: as JSON, cut to fit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.provenance import Provenance
from ..core.text import replaced
from ..rows.formats import Conversation
from .charts import cut_of
from .features import TargetFeature, features_data
from .pool_map import PoolMap, map_data
from .profile import Profile
from .reasons import Reasons, reasons_data, turns_of

MOST_ROWS = 20_000
"""Picks listed on a page; a larger selection's first ones."""
_CARDS, _CARD_BYTES = 100, 6_000  # of the first rows so much is in the page, of the others as much as fits
_TEXT_BYTES = 3_000_000
_TURNS = 12
_OPENING = 260  # bytes of a row on the map


@dataclass(frozen=True)
class PoolTable:
    """Every row of the pool, in the order of its numbers.

    Attributes:
        index: int64 ``[N]``, numbers in the pool. score: float64 ``[N]``. n_tokens: int64 ``[N]``, -1 where not known.
            A stream of several targets keeps only those of its picks: the others are NaN.
        picked, able: bool ``[N]``, rows that were picked, and that could be. targets: name -> score float64 ``[N]``.
    """

    index: np.ndarray
    score: np.ndarray
    n_tokens: np.ndarray
    picked: np.ndarray
    able: np.ndarray
    targets: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def compared(self) -> np.ndarray:
        """Rows that could be picked and have a score; of several targets, for the first."""
        return self.able & np.isfinite(next(iter(self.targets.values()), self.score))


@dataclass(frozen=True)
class ReportRow:
    """A row as a page shows it; ``row`` is its place in the pool table; ``said`` is None where its text is not shown."""

    row: int
    said: Conversation | None = None
    source: str | None = None


@dataclass(frozen=True)
class Report:
    """What a page is made from.

    Attributes:
        picks: best first, read while the page is made. near: rows just not picked, best first.
        sources: source -> picks, of pool_sources -> rows; None where the rows have no such column, or are not at hand.
        examples: whether texts of the data are shown. pool_at_hand: whether rows that were not picked could be read.
        reasons: place in the pool table -> why the row has its score. unexplained: why there are none, a sentence.
        features: target -> those that carry it. profile, map: None where no signals are at hand that they need.
        map_texts: row of the map -> its beginning. exemplar_texts: target -> beginnings of its exemplars.
        unsampled: why nothing is told of the pool's signals, words; "" where it is. estimated: random rows from which shares of the
            pool are estimated; 0 where they are of the whole pool.
    """

    made: Provenance
    table: PoolTable
    picks: Iterable[ReportRow]
    near: Sequence[ReportRow] = ()
    sources: Mapping[str, int] | None = None
    pool_sources: Mapping[str, int] | None = None
    examples: bool = True
    pool_at_hand: bool = False
    reasons: Mapping[int, Reasons] = field(default_factory=dict)
    unexplained: str = ""
    features: Mapping[str, Sequence[TargetFeature]] = field(default_factory=dict)
    profile: Profile | None = None
    map: PoolMap | None = None
    map_texts: Mapping[int, str] = field(default_factory=dict)
    exemplar_texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unsampled: str = ""
    estimated: int = 0


def spread_of(scores: np.ndarray) -> float:
    """Standard deviation; 0 where it is nothing but rounding."""
    found = float(scores.std()) if len(scores) else 0.0
    return found if found > 1e-12 * max(1.0, float(np.abs(scores).max(initial=0.0))) else 0.0


def held_out_scores(made: Provenance, name: str) -> np.ndarray:
    """What a target's exemplars score when they are not fitted on, float64; none where rows are scored on another scale."""
    record = made.targets.get(name or next(iter(made.targets), ""))
    return np.asarray(record.held_out if record is not None and made.avoided is None else (), np.float64)


def best_target(table: PoolTable) -> np.ndarray:
    """int64 ``[N]``: the target for which a row stands highest among the pool's rows; the first of equals."""
    able = table.compared
    places = []
    for scores in table.targets.values():
        known = np.sort(scores[able & np.isfinite(scores)])
        places.append(np.searchsorted(known, np.nan_to_num(scores, nan=-np.inf), side="right"))
    return np.argmax(np.stack(places), axis=0)


def page_data(report: Report) -> str:
    """The rows as JSON, which no text in it can end."""
    table = report.table
    able = table.compared
    roles: dict[str, int] = {}
    sources: dict[str, int] = {}
    best = best_target(table) if len(table.targets) > 1 else None
    total = min(MOST_ROWS, report.made.counts.selected)
    left, picks = _TEXT_BYTES, []
    for place, row in enumerate(report.picks):
        if place >= MOST_ROWS:
            break
        share = _CARD_BYTES if place < _CARDS else max(0, left) // max(1, total - place)
        turns, more, taken = _cut(row.said, min(share, _CARD_BYTES), roles)
        left -= taken
        i = row.row
        source = None if row.source is None else sources.setdefault(replaced(row.source)[:80], len(sources))
        picks.append([
            int(table.index[i]), _rounded(table.score[i]), int(table.n_tokens[i]) if table.n_tokens[i] >= 0 else None,
            source, None if best is None else int(best[i]),
            [] if best is None else [_rounded(scores[i]) for scores in table.targets.values()], turns, more,
        ])  # fmt: skip
    near = [
        [int(table.index[one.row]), _rounded(table.score[one.row]),
         int(table.n_tokens[one.row]) if table.n_tokens[one.row] >= 0 else None, _cut(one.said, 2_000, roles)[0]]
        for one in report.near
    ]  # fmt: skip
    cut = cut_of(table.score[able], table.picked[able])
    spread = spread_of(table.score[able]) if best is None else 0.0  # scores of several targets are of ranks
    why = {int(table.index[place]): reasons_data(one, roles) for place, one in report.reasons.items()}
    return embedded({
        "targets": list(table.targets) if best is not None else [],
        "mean": _rounded(table.score[able].mean()) if able.any() else None,
        "spread": _rounded(spread),
        "cut": None if cut is None else _rounded(cut),
        "roles": list(roles),
        "sources": list(sources),
        "picks": picks,
        "near": near,
        "why": why,
        "map": map_data(report.map, *_openings(report)) if report.map is not None else [],
        "features": {name: features_data(found) for name, found in report.features.items()},
    })  # fmt: skip


def _openings(report: Report) -> tuple[dict[int, str], dict[str, list[str]]]:
    """Texts of a map, cut to a line or two."""

    def opening(text: str) -> str:
        return _fitting(" ".join(text[: 4 * _OPENING].split()), _OPENING)

    return (
        {row: opening(text) for row, text in report.map_texts.items()},
        {name: [opening(text) for text in texts] for name, texts in report.exemplar_texts.items()},
    )


def embedded(value: Any) -> str:
    """JSON that stands in a script element of a page: no text in it ends the element, or is a line end of scripts."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _cut(said: Conversation | None, most: int, roles: dict[str, int]) -> tuple[list[list[Any]], int, int]:
    """A row's turns as they fit into so many bytes, how many characters were left out, and the bytes taken."""
    turns, left, taken = [], 0, 0
    parts = turns_of(said) if said is not None else []
    for i, (role, text) in enumerate(parts):
        kept = _fitting(text, (most - taken) // max(1, min(len(parts), _TURNS) - i)) if i < _TURNS else ""
        left += len(text) - text.count("\r\n") - len(kept)
        if kept or i < _TURNS:
            turns.append([roles.setdefault(replaced(role)[:40], len(roles)), kept])
            taken += _size(kept)
    return turns, left, taken


def _fitting(text: str, most: int) -> str:
    """The beginning of a text, safe to show, that takes at most so many bytes in the page."""
    kept = replaced(text[: max(0, most)])
    while kept and (size := _size(kept)) > most:
        kept = kept[: min(len(kept) - 1, len(kept) * most // size)]
    return kept


def _size(text: str) -> int:
    return len(embedded(text).encode()) - 2


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
