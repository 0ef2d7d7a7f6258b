"""Signs that a selection should not be believed: of the target, found while the pool is scored."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeAlias, TypeVar

import numpy as np

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.provenance import CapabilityRecord, TargetRecord
from ..core.ranks import spearman
from ..methods.base import Method, Scorer, Target
from ..pickers.base import row_scores
from ..signals.columns import RowBatch

Columns: TypeAlias = dict[str, np.ndarray]
TOP = 0.05
"""The share of the pool above whose score a held-out exemplar counts as found."""
POOR_HIT = 0.05
"""At most this share of exemplars found is no more than chance."""
LENGTH = 0.8
MOST_SCORES = 50_000
MOST_ROWS = 128
MOST_HELD = 200
"""Scores of held-out exemplars that are recorded."""
MIN_EXEMPLARS = 8
MIN_ROWS = 200  # below it a share of 5 % and a rank correlation say little


def fit_watched(method: Method, exemplars: RowBatch) -> tuple[Target, tuple[str, ...]]:
    """A fitted target, and what the method warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", NeuronSelectWarning)
        fitted = {key: np.asarray(value) for key, value in method.fit(exemplars).items()}
    return fitted, tuple(dict.fromkeys(str(one.message) for one in said))


@dataclass(frozen=True)
class Halves:
    """A target fitted on either half of its exemplars, and the half that each was not fitted on."""

    targets: tuple[Target, Target]
    held_out: tuple[RowBatch, RowBatch]

    @classmethod
    def of(cls, name: str, method: Method, exemplars: RowBatch) -> dict[str, Halves]:
        """By name; nothing of fewer than 8 exemplars, or where a half cannot be fitted."""
        if len(exemplars) < MIN_EXEMPLARS:
            return {}
        every = np.arange(len(exemplars))
        halves = exemplars.take(every[::2]), exemplars.take(every[1::2])
        try:
            return {name: cls((fit_watched(method, halves[0])[0], fit_watched(method, halves[1])[0]), halves[::-1])}
        except NeuronSelectError:
            return {}


@dataclass
class Doubts:
    """Watches a pool being scored, and then says what speaks against the scores.

    Args:
        method: the one that scores. halves: target -> its halves, of targets that were fitted here.
        watched: targets that are watched; None: all.

    Attributes:
        hits: target -> share of held-out exemplars that score above the pool's top 5 %.
        finished: the targets as rows were scored by them, once the pool was observed.
    """

    method: Method
    halves: Mapping[str, Halves] = field(default_factory=dict)
    watched: Collection[str] | None = None
    hits: dict[str, float] = field(default_factory=dict)
    finished: Mapping[str, Target] = field(default_factory=dict)
    _held: dict[str, np.ndarray] = field(default_factory=dict)
    _scores: _Thinned[Columns] = field(default_factory=lambda: _Thinned(MOST_SCORES, _take_columns, _join_columns))
    _rows: _Thinned[RowBatch] = field(default_factory=lambda: _Thinned(MOST_ROWS, RowBatch.take, RowBatch.join))

    @property
    def targets(self) -> dict[str, Target]:
        """The halves as targets, by names that no target can have; scored beside the targets themselves."""
        return {_half(name, i): one for name, halves in self.halves.items() for i, one in enumerate(halves.targets)}

    def start(self, score: Scorer) -> None:
        """Score the held-out exemplars, once the pool was observed."""
        for name, halves in self.halves.items():
            for i, rows in enumerate(halves.held_out):
                self._held[_half(name, i)] = row_scores(score(rows)[_half(name, i)])

    def watch(self, rows: RowBatch, scores: Mapping[str, np.ndarray], n_tokens: np.ndarray) -> None:
        """Take note of usable rows of the pool, and of their scores for targets and halves."""
        if not self.method.needs_target:
            return
        kept = scores if self.watched is None else [*self.watched, *self.targets]
        values = {name: row_scores(np.asarray(scores[name], dtype=np.float64)) for name in kept}
        self._scores.add({**values, "": np.asarray(n_tokens, dtype=np.float64)}, len(rows))
        if type(self.method).doubts is not Method.doubts:
            self._rows.add(rows, len(rows))

    def noted(self, about: CapabilityRecord, targets: Mapping[str, Target]) -> CapabilityRecord:
        """What is recorded of the targets, with what speaks against their scores on this pool; it is said, too."""
        found = self._found(targets)

        def records(before: Mapping[str, TargetRecord]) -> dict[str, TargetRecord]:
            return {
                name: replace(
                    one,
                    doubts=(*one.doubts, *found.get(name, ())),
                    hit=self.hits.get(name),
                    held_out=self._held_out(name),
                )
                for name, one in before.items()
            }

        for name, sentences in found.items():
            for sentence in sentences:
                warnings.warn(f"target {name}: {sentence}", NeuronSelectWarning, stacklevel=3)
        avoided = about.avoided and replace(about.avoided, targets=records(about.avoided.targets))
        return replace(about, targets=records(about.targets), avoided=avoided)

    def _held_out(self, name: str) -> tuple[float, ...]:
        """What a target's exemplars score for the half that they are not in, largest first."""
        if name not in self.halves:
            return ()
        scores = np.concatenate([self._held.get(_half(name, i), np.zeros(0)) for i in range(2)])
        scores = np.sort(scores[np.isfinite(scores)])[::-1]
        if len(scores) > MOST_HELD:
            scores = np.quantile(scores, np.linspace(1, 0, MOST_HELD))
        return tuple(float(f"{score:.6g}") for score in scores.tolist())

    def _found(self, targets: Mapping[str, Target]) -> dict[str, list[str]]:
        """By target, one plain sentence for each sign."""
        found: dict[str, list[str]] = {name: [] for name in targets}
        for name, target in targets.items():
            for columns in self._scores.all() if self._scores.seen >= MIN_ROWS else ():
                found[name] += self._hit(name, columns) + self._length(columns[name], columns[""])
            for rows in self._rows.all():
                found[name] += self.method.doubts(rows, target)
        return found

    def _hit(self, name: str, columns: Mapping[str, np.ndarray]) -> list[str]:
        if name not in self.halves:
            return []
        above = []
        for half in (_half(name, 0), _half(name, 1)):
            pool = columns[half][np.isfinite(columns[half])]
            if not len(pool):
                return []
            above += (self._held[half] > np.quantile(pool, 1 - TOP)).tolist()
        self.hits[name] = round(float(np.mean(above)), 4)
        if self.hits[name] > POOR_HIT:
            return []
        return [
            f"only {self.hits[name]:.0%} of the exemplars score among the pool's best {TOP:.0%} when they are not fitted on, "
            f"no more than chance: {self.method.name} does not recognise this target; try another method"
        ]

    def _length(self, scores: np.ndarray, n_tokens: np.ndarray) -> list[str]:
        known = np.isfinite(scores) & (n_tokens >= 0)
        correlation = spearman(scores[known], n_tokens[known])
        if abs(correlation) <= LENGTH:
            return []
        control = "longest" if correlation > 0 else "shortest"
        return [
            f"the scores of {self.method.name} follow the rows' length (rank correlation {correlation:.2f}): compare with "
            f"{control} before you believe them"
        ]


def _half(name: str, i: int) -> str:
    return f"{name}/{i}"


Kept = TypeVar("Kept")


class _Thinned(Generic[Kept]):
    """Every row of a pool at first, then every 2nd, 4th, ... once they are too many: evenly spread, memory bounded.

    Args:
        most: rows kept. take: some rows of a part, by their places. join: parts as one.
    """

    def __init__(self, most: int, take: Callable[[Kept, np.ndarray], Kept], join: Callable[[list[Kept]], Kept]) -> None:
        self.most, self.take, self.join = most, take, join
        self.step, self.seen, self.kept = 1, 0, 0
        self.parts: list[Kept] = []

    def add(self, part: Kept, rows: int) -> None:
        while self.kept + len(self._places(rows)) > self.most:
            self.step *= 2
            self.kept = (self.kept + 1) // 2
            self.parts = [self.take(one, np.arange(0, 2 * self.kept, 2)) for one in self.all()]
        if len(places := self._places(rows)):
            self.parts.append(self.take(part, places))
        self.kept += len(places)
        self.seen += rows

    def _places(self, rows: int) -> np.ndarray:
        return np.arange(-self.seen % self.step, rows, self.step)

    def all(self) -> list[Kept]:
        """The rows kept, as one part; none of a pool without rows."""
        return [self.join(self.parts)] if self.parts else []


def _take_columns(columns: Columns, places: np.ndarray) -> Columns:
    return {name: values[places] for name, values in columns.items()}


def _join_columns(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
