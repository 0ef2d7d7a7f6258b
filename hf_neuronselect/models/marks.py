"""Read the marks in a judge's answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_RANGE = re.compile(r"\d+\s*(?:-|–|to|\.\.)\s*\d+|(?:/|out\s+of)\s*5(?![\d.,])", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.,-])-?\d+(?:[.,]\d+)?(?!\w|[.,]\d)")
_LINES = re.IGNORECASE | re.MULTILINE
# A number at the beginning, out of 10 or of nothing, no range; then the reason.
_FIRST = re.compile(
    r"[\s*_]*(\d+(?:[.,]\d+)?)(?![\d.,]*\d)(?:\s*(?:/|out\s+of)\s*10(?!\d))?(?!\s*(?:-|–|—|to|\.\.|/|out\s+of)\s*\d)"
    r"[\s*_.,;:–—-]*(.*)", re.IGNORECASE,
)  # fmt: skip


def read_mark(answer: str, most: float = 5.0) -> float | None:
    """The one number on an answer's first line; None where there is none, several, or one out of range."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    if not lines:
        return None
    found = _NUMBER.findall(_RANGE.sub(" ", lines[0].replace("*", " ").replace("_", " ")))
    if len(found) != 1:
        return None
    mark = float(found[0].replace(",", "."))
    return mark if 0 <= mark <= most else None


@dataclass(frozen=True)
class Marked:
    """A mark with its reason, which may be empty."""

    mark: float
    reason: str


def read_marks(answer: str, names: Sequence[str], lowest: float, best: float) -> tuple[Marked, ...] | None:
    """The marks that an answer gives by name, each on a line of its own: ``Format: 7. Both are lists.``

    Args:
        names: patterns of the names, in any case.

    Returns:
        One for each name; None where one is missing, is given twice, is a range, or is out of bounds.
    """
    found = []
    for name in names:
        given = re.findall(rf"^[\s*_#>-]*(?:{name})[*_]*(?:\s*\([^)\n]*\))?[*_]*[ \t]*[:=](.*)$", answer, _LINES)
        mark = _FIRST.fullmatch(given[0]) if len(given) == 1 else None
        if mark is None or not lowest <= (number := float(mark[1].replace(",", "."))) <= best:
            return None
        found.append(Marked(number, mark[2].strip()))
    return tuple(found)
