"""A comparison's lines, and what follows from them: tables, ranks, warnings, overlaps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset

from ..core.configs import CompareConfig
from ..explain.report import text_table
from ..selection.selection import Selection
from ..signals.extractor import NeuronFeatureExtractor
from ..store.store import FeatureStore
from .job import Job
from .trained import TRAINED, RowLosses, Trained, Transfer, training_cells, training_warnings

LOW, HIGH, BOOTSTRAP = 5, 95, 1000


@dataclass(frozen=True)
class Line:
    """A method on a target; of several draws, the mean.

    Attributes:
        precision: share of picked rows from related sources. low, high: its 5th and 95th percentiles over draws, or over
            resampled exemplars. recall: share of the pool's related rows that are picked.
        base_rate: share of the pool's rows from related sources. overlap: Jaccard index with the first method's rows.
        answers: share of the picks' characters that are answers. mtld: lexical diversity of the answers.
        near_copies: share of the picks that are nearly equal to another. pool_*: of the pool.
        seconds: fitting, scoring and picking, without the shared pass over the pool. pass_seconds: of the passes whose
            signals it reads, shared with others. peak_bytes: most memory during these.
        stand_in: the model that ran in the place of the method's own; such a line is left out of ranks and advice.
        reason: why the method did not run; "" if it did.
    """

    method: str
    target: str
    rows: int = 0
    precision: float | None = None
    low: float | None = None
    high: float | None = None
    recall: float | None = None
    base_rate: float | None = None
    overlap: float | None = None
    picked_tokens: float | None = None
    pool_tokens: float | None = None
    answers: float | None = None
    pool_answers: float | None = None
    mtld: float | None = None
    pool_mtld: float | None = None
    near_copies: float | None = None
    seconds: float | None = None
    fit_seconds: float | None = None
    score_seconds: float | None = None
    pass_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    requests: int | None = None
    money: float | None = None
    draws: int = 1
    stand_in: str = ""
    reason: str = ""

    @property
    def name(self) -> str:
        """The method, with its stand-in or its number of draws."""
        if self.stand_in:
            return f"{self.method} (stand-in: {self.stand_in})"
        return self.method if self.draws == 1 else f"{self.method} (mean of {self.draws} draws)"

    def cells(self) -> tuple[str, ...]:
        if self.reason:
            return (self.name, self.target, "did not run", *[""] * (len(HEADER) - 3))
        return (
            self.name,
            self.target,
            str(self.rows),
            number(self.precision, 2),
            "" if self.low is None else f"{self.low:.2f}–{self.high:.2f}",
            number(self.recall, 2),
            number(self.overlap, 2),
            number(self.picked_tokens, 0),
            number(self.answers, 2),
            number(self.mtld, 0),
            number(self.near_copies, 2),
            number(self.seconds, 2),
        )

    def of_pool(self) -> tuple[str, ...]:
        """The same cells of the whole pool."""
        return ("(the pool)", self.target, "", number(self.base_rate, 3), "", "", "", number(self.pool_tokens, 0),
                number(self.pool_answers, 2), number(self.pool_mtld, 0), "", "")  # fmt: skip

    def short(self) -> str:
        """One line as soon as a method is done."""
        if self.reason:
            return f"{self.method} on {self.target} did not run: {self.reason}"
        precision = "" if self.precision is None else f", precision {self.precision:.2f}"
        return f"{self.method} on {self.target}: {self.rows} rows{precision}, {self.seconds:.1f} s"


HEADER = ("method", "target", "rows", "precision", "5–95 %", "recall", "overlap", "tokens", "answers", "MTLD",
          "near copies", "seconds")  # fmt: skip
LEGEND = (
    "precision, recall: rows from sources that count as right; 5–95 %: over draws, or resampled exemplars; overlap: with the "
    "first method's rows; tokens: mean of a row; answers: share of the characters; MTLD: diversity of the answers' words; "
    "near copies: rows nearly equal to another pick; seconds: without the pass that methods share"
)


@dataclass(frozen=True)
class Rank:
    """A method's place by precision, 1 is best: the mean over targets, with its 5th and 95th percentiles."""

    method: str
    mean: float
    low: float
    high: float


@dataclass
class Comparison:
    """Selections of every method and target, and their table.

    Attributes:
        selections: (method, target) -> the selection, of several draws the first.
        samples: (method, target) -> precision of each draw, or with each resample of the exemplars.
        sources: (method, target) -> share of each source among the picks; ``("", "")``: of the pool.
        jobs: (method, target) -> what selects. trained: models trained on the picks, if that was asked for. transfers: their losses at every target.
        by_row: (arm, target of the picks, measured target, seed) -> losses of the held-out rows.
        exemplars: target -> the signals of its rows. store: the pool's signals, if several methods read some.
        config: what was asked for. row_sources: text ``[N]``, source of each row of the pool, if it has that column.
    """

    extractor: NeuronFeatureExtractor
    pool: Dataset
    exemplars: dict[str, FeatureStore] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    selections: dict[tuple[str, str], Selection] = field(default_factory=dict)
    samples: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    sources: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    jobs: dict[tuple[str, str], Job] = field(default_factory=dict)
    trained: list[Trained] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    by_row: dict[tuple[str, str, str, int], RowLosses] = field(default_factory=dict)
    store: FeatureStore | None = None
    pass_seconds: float = 0.0
    config: CompareConfig | None = None
    row_sources: np.ndarray | None = None

    def add(self, line: Line, targets: Sequence[str]) -> None:
        """Add a line; lines are in the order of targets, then of methods."""
        self.lines = sorted([*self.lines, line], key=lambda one: targets.index(one.target))

    @property
    def failed(self) -> list[Line]:
        """Methods that did not run."""
        return [line for line in self.lines if line.reason]

    @property
    def targets(self) -> list[str]:
        return list(dict.fromkeys(line.target for line in self.lines))

    def of(self, target: str) -> list[Line]:
        """The lines of one target."""
        return [line for line in self.lines if line.target == target]

    def cells(self, target: str) -> list[tuple[str, ...]]:
        """The table of one target: the pool, then every method."""
        lines = self.of(target)
        ran = next((line for line in lines if not line.reason), None)
        return [*([] if ran is None else [ran.of_pool()]), *(line.cells() for line in lines)]

    def shown(self, *targets: str) -> tuple[Sequence[str], list[tuple[str, ...]]]:
        """Header and cells of some targets, without the columns that say nothing."""
        rows = [cells for name in targets for cells in self.cells(name)]
        kept = [i for i, name in enumerate(HEADER) if name == "method" or any(row[i] for row in rows)]
        return [HEADER[i] for i in kept], [tuple(row[i] for i in kept) for row in rows]

    def table(self, target: str | None = None) -> str:
        """The lines, or those of one target, as text; below them ranks, warnings, and why methods did not run."""
        targets = self.targets if target is None else [target]
        parts = [text_table(*self.shown(*targets))]
        if target is None:
            parts.append(LEGEND)
            if ranks := self.ranks():
                parts += ["", text_table(RANKS, [rank_cells(one) for one in ranks])]
            if trained := [cells for name in targets for cells in self.of_training(name)]:
                parts += ["", text_table(TRAINED, trained)]
        warned = self.warnings(targets)
        failed = [line.short() for line in self.failed if line.target in targets]
        return "\n".join([*parts, *(["", *warned] if warned else []), *failed])

    def warnings(self, targets: Sequence[str]) -> list[str]:
        """Methods whose selections are no better than random rows, and for which targets, a sentence each."""
        poor: dict[str, list[str]] = {}
        for target in targets:
            lines = [line for line in self.of(target) if line.precision is not None]
            bar = next((line.high for line in lines if line.method == "random" and line.high is not None), None)
            if bar is None:
                continue
            for line in lines:
                if (
                    line.method != "random"
                    and not line.stand_in
                    and line.precision is not None
                    and line.precision <= bar
                ):
                    poor.setdefault(line.method, []).append(f"{target} ({line.precision:.2f}; random up to {bar:.2f})")
        found = [
            f"{method} is no better than random rows for {', '.join(of)}: do not use it there"
            for method, of in poor.items()
        ]
        return found + [said for target in targets for said in training_warnings(self.trained, self.by_row, target)]

    def of_training(self, target: str) -> list[tuple[str, ...]]:
        """Cells of the models that were trained for a target."""
        return training_cells(self.trained, self.by_row, target)

    def ranks(self, seed: int = 0) -> list[Rank]:
        """Methods by their mean rank over the labelled targets; those that did not run on all, and stand-ins, have none.

        The interval resamples targets, and precision within its :attr:`samples`.
        """
        targets = [name for name in self.targets if any(line.precision is not None for line in self.of(name))]
        lines = {(line.method, line.target): line for line in self.lines if not line.stand_in and not line.reason}
        methods = [
            name for name in dict.fromkeys(method for method, _ in lines) if all((name, t) in lines for t in targets)
        ]
        if not targets or len(methods) < 2:
            return []
        means = np.asarray([[lines[method, target].precision or 0.0 for target in targets] for method in methods])
        draw = np.random.default_rng(seed)
        drawn = np.empty((BOOTSTRAP, len(methods)))
        for b in range(BOOTSTRAP):
            chosen = draw.integers(0, len(targets), len(targets))
            values = means[:, chosen]
            for i, method in enumerate(methods):
                for place, t in enumerate(chosen.tolist()):
                    sample = self.samples.get((method, targets[t]))
                    if sample is not None and len(sample) > 1:
                        values[i, place] = draw.choice(sample)
            drawn[b] = _ranks(values).mean(axis=1)
        mean, low, high = (_ranks(means).mean(axis=1), *np.percentile(drawn, [LOW, HIGH], axis=0))
        found = [Rank(method, float(mean[i]), float(low[i]), float(high[i])) for i, method in enumerate(methods)]
        return sorted(found, key=lambda one: one.mean)

    def overlaps(self, target: str) -> tuple[list[str], np.ndarray]:
        """Methods that ran, and the Jaccard index of each one's rows with each other's: ``[m, m]``."""
        methods = [line.method for line in self.of(target) if (line.method, target) in self.selections]
        picked = [self.selections[method, target].indices for method in methods]
        return methods, np.asarray([[jaccard(one, other) for other in picked] for one in picked])


RANKS = ("method", "mean rank", "5–95 %")


def rank_cells(one: Rank) -> tuple[str, ...]:
    return one.method, f"{one.mean:.1f}", f"{one.low:.1f}–{one.high:.1f}"


def slug(label: str) -> str:
    """A method's label as a folder name."""
    return re.sub(r"[^\w.=-]+", "-", label).strip("-")


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Shared rows over all rows of two selections."""
    shared = len(np.intersect1d(one, other))
    return shared / max(1, len(one) + len(other) - shared)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Places within each column, 1 for the largest, equal values share the mean place: ``[m, t]`` -> ``[m, t]``."""
    above = (values[:, None, :] < values[None, :, :]).sum(axis=1)
    equal = (values[:, None, :] == values[None, :, :]).sum(axis=1)
    return above + (equal + 1) / 2


def number(value: float | None, places: int) -> str:
    return "" if value is None else f"{value:.{places}f}"
