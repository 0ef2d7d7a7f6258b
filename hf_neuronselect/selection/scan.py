"""Scoring a pool row by row, and what is left out of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, IterableDataset

from ..core.errors import NeuronSelectError
from ..core.progress import track
from ..methods.base import Method, PoolMethod, Target, check_scores
from ..methods.pickers import row_scores
from ..rows.formats import Conversation, Row
from ..rows.leakage import Leakage, Seen, exact_key
from .doubts import Doubts
from .reader import Batch, Reader

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
        excluded: codes of :data:`EXCLUDED`.
    """

    index: np.ndarray
    scores: dict[str, np.ndarray]
    n_tokens: np.ndarray
    truncated: np.ndarray
    excluded: np.ndarray
    rows: list[Row] | None


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

    def add(self, scored: Scored, batch: Batch) -> None:
        tokens = int(scored.n_tokens[scored.n_tokens > 0].sum())
        self.rows += len(scored.index)
        self.tokens += tokens
        self.read_seconds += batch.seconds
        self.truncated += int(scored.truncated.sum())
        for code, count in zip(*np.unique(scored.excluded, return_counts=True), strict=True):
            if code:
                self.excluded[EXCLUDED[code]] += int(count)
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
        with track(f"{method.name}, pass {passes}", len(data)) as progress:
            for batch in reader.read(data):
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
) -> Iterator[Scored]:
    """Score every row of ``data``, in order. ``excluded`` says why a row cannot be selected.

    Args:
        doubts: watches the scores.
    """
    seen = Seen()
    doubts = doubts or Doubts(method)
    fitted = observe_pool(data, reader, method, {**targets, **doubts.targets}, tally)
    score = method.scorer(fitted)
    doubts.start(score)
    total = len(data) if isinstance(data, Dataset) else None
    with track(method.name, total) as progress:
        for batch in reader.read(data):
            started = time.perf_counter()
            n = len(batch)
            excluded = np.asarray([_OF_SKIP.get(skip, _ERROR) for skip in batch.skips], dtype=np.int8)
            if exclude:
                _mark_known(excluded, batch.conversations, leakage, exclude, seen)
            usable = np.flatnonzero(batch.rows.usable)
            scores = {name: np.full(n, np.nan) for name in targets}
            if len(usable):
                rows = batch.rows.only_usable()
                given = {name: check_scores(method, one, len(usable)) for name, one in score(rows).items()}
                doubts.watch(rows, given, batch.n_tokens[usable])
                for name in targets:
                    scores[name] = np.full((n, *given[name].shape[1:]), np.nan)
                    scores[name][usable] = given[name]
            for found in scores.values():
                excluded[(excluded == 0) & ~np.isfinite(row_scores(found))] = _NULL
            scored = Scored(batch.rows.index, scores, batch.n_tokens, batch.truncated, excluded, batch.raw)
            tally.add(scored, batch)
            tally.score_seconds += time.perf_counter() - started
            progress.done(n)
            yield scored


def _mark_known(
    excluded: np.ndarray, conversations: Sequence[Conversation], leakage: Leakage, exclude: Sequence[str], seen: Seen
) -> None:
    """Mark exemplars and duplicates of earlier rows among those not excluded yet."""
    rows = np.flatnonzero(excluded == 0).tolist()
    keys = [exact_key(conversations[i]) for i in rows]
    before, new = seen.contains(keys), set[bytes]()
    for i, row_key, known in zip(rows, keys, before.tolist(), strict=True):
        if "leak" in exclude and leakage.find(conversations[i]):
            excluded[i] = _LEAK
        elif "duplicate" in exclude and (known or row_key in new):
            excluded[i] = _DUPLICATE
        if not known:
            new.add(row_key)
    seen.add(new)
