"""compare.html of a comparison: one page that needs nothing else, like a selection's report.

Its style and its script are allowed by their hashes, everything else is forbidden to it. Every text is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .pages import rendered


@dataclass(frozen=True)
class Table:
    """Cells as text. texts: numbers of the columns, besides the first, that are not numbers. note: said above."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A finished picture, what it shows, and a sentence on it. tab: its name among others in its place."""

    title: str
    said: str
    svg: str
    tab: str = ""


@dataclass(frozen=True)
class Part:
    """A heading with tables and pictures; of several pictures with a tab one is seen at a time.

    Attributes:
        said: a sentence below the heading. texts: rows of the pool as (what they are, text).
    """

    title: str
    said: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    texts: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page that its navigation names."""

    name: str
    title: str
    said: str = ""
    parts: Sequence[Part] = ()


@dataclass(frozen=True)
class ComparePage:
    """What a page is made from.

    Attributes:
        first: the first method, or "" where nothing ranks them. headline: goes on after it. warnings: sentences.
        numbers: (what, value, beside what). command: as typed, files without their folders.
    """

    first: str
    headline: str
    lead: str
    chips: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    figures: Sequence[Figure]
    numbers: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]
    command: str = ""
    key: Sequence[tuple[str, str]] = field(
        default=(("picks", "a method"), ("chance", "a control, which needs no model"))
    )


def compare_page(page: ComparePage) -> str:
    """The page, as HTML."""
    return rendered("compare.html.jinja", ["selection.css", "compare.css"], "compare.js", {"page": page})
