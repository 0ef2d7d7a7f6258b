"""Why a row was selected, was not, or beat another: what is found out, and how it is told in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.text import shown
from .labels import Label
from .report import percent, text_table
from .spots import Spot, one_line


@dataclass(frozen=True)
class Part:
    """A part of a row's score.

    Attributes:
        name: in words, e.g. ``feature 312``. unit, id: what it is; the id is None of a word.
        amount: what it adds to the sum that the score is made from. share: of that sum.
        facts: more numbers, by name. label: of a feature; made by a machine.
        rarity: share of the pool's rows that have it. exemplars: those that have it, with its value, largest first.
        tokens: where in the row it is strongest. elsewhere: where it is strongest in the pool's other rows.
        link: a page about it. usual: its share of the sum of an average row of the pool.
    """

    name: str
    unit: str
    id: int | None
    amount: float
    share: float
    facts: Mapping[str, float]
    label: Label | None = None
    rarity: float | None = None
    exemplars: tuple[tuple[int, float], ...] | None = None
    tokens: tuple[Spot, ...] = ()
    elsewhere: tuple[Spot, ...] = ()
    link: str = ""
    usual: float | None = None

    def cells(self) -> list[str]:
        """For a table: name, share, what is usual, facts and rarity."""
        usual, rare = ([] if share is None else [percent(share)] for share in (self.usual, self.rarity))
        return [self.name, percent(self.share), *usual, *(f"{value:.4g}" for value in self.facts.values()), *rare]

    def lines(self) -> list[str]:
        """What there is to read about it, a line each."""
        found = [f"label ({self.label.made}): {self.label}"] if self.label else []
        if self.tokens:
            found.append("here:      " + "   ".join(f"{spot} {spot.value:.3g}" for spot in self.tokens))
        found += [f"row {spot.row}: ".ljust(11) + f"{spot} {spot.value:.3g}" for spot in self.elsewhere]
        if self.exemplars is not None:
            named = ", ".join(str(number) for number, _ in self.exemplars[:5])
            more = f" and {len(self.exemplars) - 5} more" if len(self.exemplars) > 5 else ""
            found.append(f"exemplars: {named}{more}" if self.exemplars else "exemplars: none")
        return [*found, *([self.link] if self.link else [])]


@dataclass(frozen=True)
class Explanation:
    """Why a row has its score.

    Attributes:
        row: its number in the pool. place: in the selection, 0 is the best; None of a row that was not selected.
        score: as recorded. text: the row's beginning. says: the score in words and numbers.
        parts: the largest first, or where the pool's store is given those that add most beyond what is usual; as many as were
            asked for. of: how many there are.
        moved: tokens that moved the score, up and down; of methods that follow a row through the model.
        notes: what could not be said, and how it can.
    """

    method: str
    target: str
    row: int
    place: int | None
    score: float
    text: str
    says: str
    parts: tuple[Part, ...]
    of: int
    moved: tuple[Spot, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def heads(self) -> list[str]:
        """Names of the columns that :meth:`Part.cells` fills."""
        usual = ["usual"] if self.parts[0].usual is not None else []
        rare = ["pool rows with it"] if self.parts[0].rarity is not None else []
        return [self.parts[0].unit, "share", *usual, *self.parts[0].facts, *rare]

    def __str__(self) -> str:
        place = "" if self.place is None else f", place {self.place} of the selection"
        lines = [
            f"Row {self.row} of the pool{place}: score {self.score:.4g} for {self.target} by {self.method}",
            f"  {one_line(self.text)}",
            f"Its score: {self.says}.",
        ]
        if self.parts:
            lines += ["", text_table(self.heads, [part.cells() for part in self.parts])]
            left = self.of - len(self.parts)
            if left:
                lines.append(f"and {left} more, {percent(1 - sum(part.share for part in self.parts))} of the sum")
            for part in self.parts:
                if found := part.lines():
                    lines += ["", part.name, *(f"  {line}" for line in found)]
        if self.moved:
            lines += ["", "Tokens that moved the score:", *(f"  {spot.value:+.4g}  {spot}" for spot in self.moved)]
        lines += [*([""] if self.notes else []), *(f"Note: {note}." for note in self.notes)]
        return shown("\n".join(lines), lines=True)

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:
        printer.text(str(self))  # type: ignore[attr-defined]

    def _repr_html_(self) -> str:
        from .fragments import explanation_fragment

        return explanation_fragment(self)


@dataclass(frozen=True)
class Contrast:
    """Why one row scores higher than another.

    Attributes:
        one, other: the rows' explanations. parts: name, and what it adds to the score of each; the largest difference first.
        labels: of features, by name.
    """

    one: Explanation
    other: Explanation
    parts: tuple[tuple[str, float, float], ...]
    labels: Mapping[str, Label]

    def __str__(self) -> str:
        lines = []
        for letter, found in (("A", self.one), ("B", self.other)):
            lines += [
                f"{letter}: row {found.row}, score {found.score:.4g}. {one_line(found.text)}",
                f"   {found.says}.",
            ]
        if self.parts:
            rows = [[name, f"{a:.4g}", f"{b:.4g}", f"{a - b:+.4g}"] for name, a, b in self.parts]
            lines += ["", "What parts add to the score:", text_table(["", "A", "B", "A - B"], rows)]
            lines += [f"{name} ({one.made}): {one}" for name, one in self.labels.items()]
        return shown("\n".join([*lines, *(f"Note: {note}." for note in self.notes)]), lines=True)

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of both rows, each once."""
        return tuple(dict.fromkeys((*self.one.notes, *self.other.notes)))

    def _repr_html_(self) -> str:
        from .fragments import contrast_fragment

        return contrast_fragment(self)


@dataclass(frozen=True)
class WhyNot:
    """Why a row of the pool was not selected.

    Attributes:
        stage: ``selected``, what left it out (``duplicate``, ``leak``, ``empty``, ``error``, ``null``), ``below`` the cut, or
            ``passed over`` although its score is above it.
        score, rank: None where it has none. cut: the lowest score selected. ahead: rows above it that were not selected either.
        says: a sentence each. contrast: with the last row selected.
    """

    row: int
    stage: str
    score: float | None
    rank: int | None
    cut: float
    ahead: int
    says: tuple[str, ...]
    contrast: Contrast | None = None

    def __str__(self) -> str:
        lines = [f"Row {self.row} of the pool: {self.says[0]}.", *(f"{one}." for one in self.says[1:])]
        return shown("\n".join([*lines, *(["", str(self.contrast)] if self.contrast else [])]), lines=True)

    def _repr_html_(self) -> str:
        from .fragments import why_not_fragment

        return why_not_fragment(self)
