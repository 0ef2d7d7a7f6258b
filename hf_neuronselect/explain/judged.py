"""What a judge says of picks: its questions, its marks, the check of the judge itself, and how all that is told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.intervals import Interval, auc_of, difference_of, mean_of
from ..models.judge import Rating
from ..models.marks import Marked, read_marks
from .report import text_table

ASPECTS = ("similarity", "format", "generalisation")
LOWEST, BEST = 1, 10
BEGIN = "Similarity:"
"""What a local judge's answers are made to begin with."""
LONGEST = 6000
"""Characters of a text that are shown to the judge."""
FEW, CLEAR = 3, 0.8
"""Pairs of a kind from which on the judge is checked; the AUC from which on it tells rows apart well."""
RANDOM = "random rows of the pool"
_PATTERNS = ("similarity", "format", "generali[sz]ation")
_PROMPT = Path(__file__).parent / "templates" / "judge.txt"
_HOLES = re.compile(r"\{(exemplar|row)\}")


def read_prompt(file: Path | None) -> str:
    """A text that asks, by default the package's own.

    Raises:
        NeuronSelectError: it cannot be read, or has not both ``{exemplar}`` and ``{row}``.
    """
    try:
        text = (file or _PROMPT).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        why = "is no text in UTF-8" if isinstance(cause, UnicodeDecodeError) else f"cannot be read: {cause.strerror}"
        raise NeuronSelectError(why, option="prompt", value=file and file.name) from cause
    if missing := [f"{{{hole}}}" for hole in ("exemplar", "row") if f"{{{hole}}}" not in text]:
        raise NeuronSelectError(
            f"has no {' and no '.join(missing)}, where the texts go", option="prompt", value=file and file.name
        )
    return text


def asked(prompt: str, exemplar: str, row: str) -> list[dict[str, str]]:
    """What the judge is asked about a pair. Braces in the texts stay as they are; long texts lose their middle."""
    texts = {"exemplar": _cut(exemplar), "row": _cut(row)}
    return [{"role": "user", "content": _HOLES.sub(lambda hole: texts[hole[1]], prompt)}]


def _cut(text: str) -> str:
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}\n[...]\n{text[-half:]}"


def read_aspects(answer: str) -> tuple[Marked, ...] | None:
    """The three marks of an answer, with reasons; None where they cannot be read."""
    return read_marks(answer, _PATTERNS, LOWEST, BEST)


@dataclass(frozen=True)
class Group:
    """Rated rows of one kind.

    Attributes:
        name: a selection's, or what the rows are. rows: their numbers where they came from. ratings: in the same order.
    """

    name: str
    rows: tuple[int, ...]
    ratings: tuple[Rating[tuple[Marked, ...]], ...]

    @property
    def marks(self) -> np.ndarray:
        """The marks that could be read: float64 ``[n, 3]``."""
        found = [[one.mark for one in rating.value] for rating in self.ratings if rating.value is not None]
        return np.asarray(found, np.float64).reshape(-1, len(ASPECTS))

    @property
    def overall(self) -> np.ndarray:
        """The mean of each row's three marks: float64 ``[n]``."""
        return self.marks.mean(axis=1)

    def means(self) -> dict[str, Interval]:
        """Of each aspect, and of all three as ``overall``."""
        found = {name: mean_of(self.marks[:, i]) for i, name in enumerate(ASPECTS)}
        return {**found, "overall": mean_of(self.overall)}


@dataclass(frozen=True)
class Check:
    """Whether the judge tells rows of the task from others.

    Attributes:
        alike: other exemplars of the same target. unlike: rows of another task, and exemplars with their words shuffled.
    """

    judge: str
    alike: Group
    unlike: tuple[Group, ...]

    @property
    def auc(self) -> Interval:
        """The chance that an exemplar of the task is rated above a row that does not belong to it."""
        return auc_of(self.alike.overall, np.concatenate([group.overall for group in self.unlike]))

    @property
    def passed(self) -> bool:
        """Whether the judge tells them apart at all."""
        auc = self.auc
        return self._enough and auc.low is not None and auc.low > 0.5

    @property
    def _enough(self) -> bool:
        return len(self.alike.overall) >= FEW and sum(len(one.overall) for one in self.unlike) >= FEW

    @property
    def verdict(self) -> str:
        if not self._enough:
            read, of = (sum(map(len, parts)) for parts in self._counts())
            return (
                f"{self.judge} could not be checked: {read} of {of} pairs with a known answer have marks that can be read; ask a "
                "larger model"
            )
        if not self.passed:
            return (
                f"{self.judge} cannot tell exemplars of the task from other rows (AUC {self.auc.told()}; 0.5 is chance): its "
                "marks say nothing about the picks; ask a larger model"
            )
        how = "tells" if (self.auc.value or 0) >= CLEAR else "tells, but not well,"
        return f"{self.judge} {how} exemplars of the task from other rows: AUC {self.auc.told()}"

    def _counts(self) -> tuple[list[np.ndarray], list[tuple[int, ...]]]:
        groups = (self.alike, *self.unlike)
        return [one.overall for one in groups], [one.rows for one in groups]


@dataclass(frozen=True)
class Judgement:
    """What a judge says of the picks of selections, side by side.

    Attributes:
        judge: its name. exemplar: the number of the one that rows were compared with.
        picks: a group for each selection. random: as many rows of the pool; None where it is not at hand. check: None if not asked for.
        notes: what could not be done, and how it can.
    """

    judge: str
    target: str
    exemplar: int
    picks: tuple[Group, ...]
    random: Group | None
    check: Check | None
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """All that was rated."""
        known = (self.check.alike, *self.check.unlike) if self.check else ()
        return (*self.picks, *([self.random] if self.random else []), *known)

    def above_random(self) -> dict[str, Interval]:
        """How far each selection's overall mean is above that of the random rows."""
        if self.random is None:
            return {}
        return {group.name: difference_of(group.overall, self.random.overall) for group in self.picks}

    def record(self) -> Mapping[str, object]:
        """For JSON, without the reasons."""

        def told(one: Interval) -> dict[str, float | None]:
            return {"value": one.value, "low": one.low, "high": one.high}

        def means(group: Group) -> dict[str, object]:
            read = len(group.overall)
            return {"rows": len(group.rows), "read": read} | {name: told(one) for name, one in group.means().items()}

        check = self.check and {
            "auc": told(self.check.auc), "passed": self.check.passed, "verdict": self.check.verdict,
            "alike": {self.check.alike.name: means(self.check.alike)},
            "unlike": {group.name: means(group) for group in self.check.unlike},
        }  # fmt: skip
        return {
            "judge": self.judge, "target": self.target, "exemplar": self.exemplar,
            "picks": {group.name: means(group) for group in self.picks},
            "random_rows": self.random and means(self.random),
            "above_random": {name: told(one) for name, one in self.above_random().items()},
            "check": check, "notes": list(self.notes),
        }  # fmt: skip

    def __str__(self) -> str:
        above = self.above_random()
        lines = [
            f"Marks from {LOWEST} to {BEST} by {self.judge}, against exemplar {self.exemplar} of {self.target}; means with 95 % "
            "intervals over rows:",
            _table([*self.picks, *([self.random] if self.random else [])], above),
        ]
        if self.check is not None:
            lines += ["", "The judge itself, by pairs whose answer is known:", _table([self.check.alike, *self.check.unlike], {}),
                      f"{'' if self.check.passed else 'Warning: '}{self.check.verdict}."]  # fmt: skip
        return "\n".join([*lines, *(f"Note: {note}." for note in self.notes)])


def _table(groups: Sequence[Group], above: Mapping[str, Interval]) -> str:
    more = ["above random"] if above else []
    rows = []
    for group in groups:
        read = f"{len(group.overall)}" + ("" if len(group.overall) == len(group.rows) else f" of {len(group.rows)}")
        extra = [above[group.name].told("+.2f") if group.name in above else ""] if above else []
        rows.append([group.name, read, *(one.told() for one in group.means().values()), *extra])
    return text_table(["", "rows", *ASPECTS, "all three", *more], rows)
