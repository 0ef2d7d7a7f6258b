"""Overlap between selections of one pool."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import datasets
import evaluate

_DESCRIPTION = """\
The Jaccard similarity and the overlap coefficient of every pair of selections of one pool, given as lists of row
numbers, and the core: the rows that at least m selections share.
"""

_KWARGS_DESCRIPTION = """
Args:
    data: list of lists of int, one list per selection: its row numbers in the pool, 0-based, each once.
    m: int, the number of selections that must have a row for it to belong to the core. Default: all.
Returns:
    jaccard: list of lists of float [n, n], rows in both / rows in either; 0 if both are empty.
    overlap: list of lists of float [n, n], rows in both / rows in the smaller one; 0 if one is empty.
    sizes: list of int [n], rows of each selection.
    core: int, rows in at least m selections.
    m: int, as used.
"""

_CITATION = """\
@misc{hf_neuronselect,
  title={hf_neuronselect: instruction data selection by a model's own neurons},
  author={{The hf\\_neuronselect developers}}
}
"""


def selection_overlap(selections: Sequence[Sequence[float]], m: int | None = None) -> dict[str, Any]:
    """Compute the overlap between selections.

    Args:
        selections: at least two lists of row numbers. m: selections that must have a core row; None is all.

    Returns:
        ``jaccard`` and ``overlap`` ``[n, n]``, ``sizes`` ``[n]``, ``core`` and ``m``.

    Raises:
        ValueError: fewer than two selections, an invalid or repeated row number, or m out of range.
    """
    count = len(selections)
    if count < 2:
        raise ValueError(f"data: got {count} selection(s); give at least two, each a list of row numbers")
    m = count if m is None else m
    if isinstance(m, bool) or not isinstance(m, Integral) or not 1 <= m <= count:
        raise ValueError(f"m={m!r}: must be a whole number from 1 to {count}, the number of selections")
    sets = [_rows(rows, i) for i, rows in enumerate(selections)]

    def table(sizes: str) -> list[list[float]]:
        return [[_share(a & b, a | b if sizes == "union" else min(a, b, key=len)) for b in sets] for a in sets]

    held_by = Counter(row for rows in sets for row in rows)
    return {
        "jaccard": table("union"),
        "overlap": table("smaller"),
        "sizes": [len(rows) for rows in sets],
        "core": sum(times >= m for times in held_by.values()),
        "m": int(m),
    }


def _rows(rows: Sequence[float], i: int) -> set[int]:
    for row in rows:
        if row is None or not math.isfinite(row) or row < 0 or row != int(row):
            raise ValueError(f"data: selection {i} has {row!r}, which is not a row number (0, 1, 2, ...)")
    found = {int(row) for row in rows}
    if len(found) < len(rows):
        raise ValueError(f"data: selection {i} has a row twice; give each row number once")
    return found


def _share(part: set[int], whole: set[int]) -> float:
    return len(part) / len(whole) if whole else 0.0


class SelectionOverlap(evaluate.Measurement):
    """Overlap of selections as an ``evaluate`` measurement."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # Floats, so that 1.5 is refused: an int64 column would silently truncate it to 1.
            features=datasets.Features({"data": datasets.List(datasets.Value("float64"))}),
        )

    def _compute(self, data: Sequence[Sequence[float]], m: int | None = None) -> dict[str, Any]:
        return selection_overlap(data, m)
