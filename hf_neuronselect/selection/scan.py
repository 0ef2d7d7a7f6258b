"""Scoring a pool row by row, and what is left out of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, IterableDataset

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.progress import track
from ..methods.base import Method, PoolMethod, Target, check_scores
from ..pickers.base import row_scores
from ..rows.formats import Row
from ..rows.leakage import Leakage
from ..signals.base import signals_of
from ..signals.columns import RowBatch
from .doubts import Doubts
from .marks import Marker, Marks
from .reader import Batch, Reader, column_names

# Codes of `excluded`, in the order they are decided.
EXCLUDED = ("", "empty", "error", "duplicate", "leak", "null")
_EMPTY, _ERROR, _DUPLICATE, _LEAK, _NULL = range(1, 6)
_OF_SKIP = {"": 0, "empty": _EMPTY}  # by what skipped a row; everything else is an error
_NAMED_ERRORS = 5


@dataclass
class Scored:
    """One batch, scored: what selection needs of it.

    Attributes:
        scores: target -> float64 ``[n]`` or ``[n, exemplars]``, NaN where there is none.
        excluded: codes of :data:`EXCLUDED`. vectors: columns of signals by which a picker compares rows.
    """

    index: np.ndarray
    scores: dict[str, np.ndarray]
    n_tokens: np.ndarray
    truncated: np.ndarray
    excluded: np.ndarray
    rows: list[Row] | None
    vectors: RowBatch


@dataclass
class Tally:
    """What happened on the way: counts, a few reasons, seconds and tokens.

    Attributes:
        tokens: of all rows.
        read_seconds: reading and computing. score_seconds: observing and scoring.
    """

    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    excluded: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EXCLUDED[1:], 0))
    reasons: list[str] = field(default_factory=list)
    read_seconds: float = 0.0
    score_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.read_seconds + self.score_seconds

    def check(self, some: bool) -> None:
        """Refuse a pool of which no row can be selected.

        Raises:
            NeuronSelectError: so it is.
        """
        if not some:
            why = ", ".join(f"{count} {name}" for name, count in self.excluded.items() if count)
            first = f"; {self.reasons[0]}" if self.reasons else ""
            why = f"none of the {self.rows} rows can be selected ({why}{first}); give others"
            raise NeuronSelectError(why, option="pool")

    def count(self, scored: Scored) -> None:
        """Count rows, and those that are left out."""
        self.rows += len(scored.index)
        self.tokens += int(scored.n_tokens[scored.n_tokens > 0].sum())
        self.truncated += int(scored.truncated.sum())
        for code, count in zip(*np.unique(scored.excluded, return_counts=True), strict=True):
            if code:
                self.excluded[EXCLUDED[code]] += int(count)

    def add(self, scored: Scored, batch: Batch) -> None:
        self.count(scored)
        self.read_seconds += batch.seconds
        for i, skip in enumerate(batch.skips):
            if skip.startswith("error") and len(self.reasons) < _NAMED_ERRORS:
                self.reasons.append(f"row {int(scored.index[i])}: {skip.removeprefix('error: ')}")


def observe_pool(
    data: Dataset | IterableDataset, reader: Reader, method: Method, targets: Mapping[str, Target], tally: Tally
) -> Mapping[str, Target]:
    """The targets as a method scores by them: a pool method observes every row first.

    Raises:
        NeuronSelectError: a pool method on a stream, which is read only once.
    """
    if not isinstance(method, PoolMethod) or not method.observes:
        return targets
    if isinstance(data, IterableDataset):
        raise NeuronSelectError(
            f"{method.name} looks at the whole pool before it scores, and a stream is read only once: load it as a "
            "Dataset (drop streaming)", option="method", value=method.name,
        )  # fmt: skip
    state, passes = method.start(), 0
    while True:
        passes += 1
        with track(f"{method.name}, pass {passes}", len(data), brief=reader.store is not None) as progress:
            for batch in reader.read(data, bare=True):
                tally.read_seconds += batch.seconds
                started = time.perf_counter()
                if batch.rows.usable.any():
                    method.observe(state, batch.rows.only_usable())
                tally.score_seconds += time.perf_counter() - started
                progress.done(len(batch))
        if not method.again(state):
            return method.finish(state, targets)


def scan(
    data: Dataset | IterableDataset,
    reader: Reader,
    method: Method,
    targets: Mapping[str, Target],
    leakage: Leakage,
    exclude: Sequence[str],
    tally: Tally,
    doubts: Doubts | None = None,
    marks: Marks | None = None,
    compared: Sequence[str] = (),
    avoided: Collection[str] = (),
    *,
    raw: bool = False,
) -> Iterator[Scored]:
    """Score every row of ``data``, in order. ``excluded`` says why a row cannot be selected.

    Args:
        doubts: watches the scores. marks: leaks and duplicates of all rows, if they were looked for before.
        compared: signals whose columns are passed on. avoided, raw: give the scores of these targets, or all, without what a
            method's seed adds: taken off a wanted target's score, it would cancel.
    """
    marker, position = Marker(), 0
    kept = [column for signal in signals_of(compared) for column in column_names(signal)]
    doubts = doubts or Doubts(method)
    fitted = observe_pool(data, reader, method, {**targets, **doubts.targets}, tally)
    if method.scores_by_row:
        reader.names = compared
    score = method.scorer(fitted)
    doubts.finished = fitted
    doubts.start(score)
    total = len(data) if isinstance(data, Dataset) else None
    if total is not None and (said := method.forecast(total, fitted)):
        warnings.warn(said, NeuronSelectWarning, stacklevel=2)
    with track(method.name, total, brief=reader.store is not None) as progress:
        for batch in reader.read(data):
            started = time.perf_counter()
            n = len(batch)
            excluded = np.asarray([_OF_SKIP.get(skip, _ERROR) for skip in batch.skips], dtype=np.int8)
            if exclude:
                free = excluded == 0
                known = (
                    _marks(marker, batch, free, leakage, exclude) if marks is None else marks[position : position + n]
                )
                leave_out(excluded, known, exclude)
            usable = np.flatnonzero(batch.rows.usable)
            scores = {name: np.full(n, np.nan) for name in targets}
            if len(usable):
                rows = batch.rows.only_usable()
                found = {name: check_scores(method, one, len(usable)) for name, one in score(rows).items()}
                doubts.watch(rows, found, batch.n_tokens[usable])
                for name in targets:
                    scores[name] = np.full((n, *found[name].shape[1:]), np.nan)
                    scores[name][usable] = found[name]
                    if not raw and name not in avoided:
                        scores[name] = method.drawn(scores[name], batch.rows.index)
            excluded = without_scores(excluded, scores)
            scored = Scored(
                batch.rows.index, scores, batch.n_tokens, batch.truncated, excluded, batch.raw,
                RowBatch(batch.rows.index, batch.rows.usable, {name: batch.rows.columns[name] for name in kept}),
            )  # fmt: skip
            tally.add(scored, batch)
            tally.score_seconds += time.perf_counter() - started
            position += n
            progress.done(n)
            yield scored


def leave_out(excluded: np.ndarray, marks: Marks, exclude: Sequence[str]) -> None:
    """Set the codes of rows that are duplicates or leaks, where these are left out."""
    free = excluded == 0
    excluded[free & marks.duplicate & ("duplicate" in exclude)] = _DUPLICATE
    excluded[free & marks.leak & ("leak" in exclude)] = _LEAK


def without_scores(excluded: np.ndarray, scores: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    """The codes again, with those of rows that have no score by these scores, and by no others."""
    found = np.where(excluded == _NULL, 0, excluded).astype(np.int8)
    for values in (scores or {}).values():
        found[(found == 0) & ~np.isfinite(row_scores(values))] = _NULL
    return found


def _marks(marker: Marker, batch: Batch, free: np.ndarray, leakage: Leakage, exclude: Sequence[str]) -> Marks:
    """Marks of a batch, of the kinds that are asked for."""
    return Marks(
        leak=marker.leaks(batch.conversations, free & ("leak" in exclude), leakage),
        duplicate=marker.duplicates(batch.conversations, free & ("duplicate" in exclude)),
    )
