"""Selecting from a stream that is read once: bounded heaps instead of all scores."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset

from ..core.errors import NeuronSelectError
from ..pickers.base import Picker, row_scores
from ..pickers.best_first import BestFirst
from ..rows.formats import PICK_COLUMNS, Row
from ..rows.media import as_stored
from ..rows.table import as_dataset
from .budget import Budget, Picked, pick
from .reader import added_columns
from .scan import Scored
from .scores import score_table


@dataclass
class StreamPicks:
    """What was selected from a stream.

    Attributes:
        dataset: the rows, best first. indices: their numbers in the stream.
        scores: parquet file of every row's scores, in ``folder``. kept: rows that could be selected.
    """

    dataset: Dataset
    indices: np.ndarray
    scores: Path
    folder: tempfile.TemporaryDirectory[str]
    kept: int


def stream_budget(
    pool: IterableDataset, budget: Budget, targets: Sequence[str], aggregate: str, picker: Picker
) -> int | None:
    """How many rows the heaps hold; None where a threshold decides.

    The rows of a ratio are only known at the end, as a stream may be cut: until then as many are held as its whole
    split would give.

    Raises:
        NeuronSelectError: a budget, aggregate or picker that needs the whole pool.
    """
    k = budget.k
    if budget.ratio is not None:
        most = _longest(pool)
        if most is None:
            raise NeuronSelectError("the length of a stream is not known; use k", option="ratio", value=budget.ratio)
        k = budget.rows(most)
    if budget.max_tokens is not None:
        raise NeuronSelectError("a stream needs k or threshold", option="max_tokens", value=budget.max_tokens)
    if len(targets) > 1 and (aggregate not in ("quota", "round_robin") or k is None):
        raise NeuronSelectError(
            "ranks of a whole stream are not kept; several targets take quota or round_robin, and k",
            option="aggregate", value=aggregate,
        )  # fmt: skip
    if not isinstance(picker, BestFirst):
        raise NeuronSelectError(
            "this method takes rows in an order that needs the whole pool: load it as a Dataset", option="streaming"
        )
    return k


def _longest(pool: IterableDataset) -> int | None:
    """Rows of the stream's split, as its source states them; the stream may be a part of it."""
    splits = pool.info.splits or {}
    known = splits.get(str(pool.split)) if pool.split else None
    return (known.num_examples or None) if known is not None else None


def select_from_stream(
    pool: IterableDataset,
    found: Iterable[Scored],
    budget: Budget,
    targets: Sequence[str],
    aggregate: str,
    k: int | None,
    of_kept: bool = False,
) -> StreamPicks:
    """The best rows of a stream; memory is O(selected).

    Args:
        of_kept: whether a ratio is of the rows that can be selected, not of all.
    """
    best, read, most = _Best(list(targets), k, budget.threshold), 0, _longest(pool)
    folder = tempfile.TemporaryDirectory(prefix="neuronselect-")
    log_path = Path(folder.name) / "scores.parquet"
    log: pq.ParquetWriter | None = None
    for part in found:
        scores = {name: row_scores(values) for name, values in part.scores.items()}
        nothing = Picked(np.zeros(0, np.int64), _first(scores), np.full(len(part.index), -1))
        table = score_table(scores, nothing, part.n_tokens, part.truncated, part.excluded, part.index)
        log = log or pq.ParquetWriter(log_path, table.schema)
        log.write_table(table)
        assert part.rows is not None
        check_free(list(dict.fromkeys(chain(*part.rows))))
        read += len(part.rows)
        if budget.ratio is not None and read > (most or 0):
            raise NeuronSelectError(
                f"the stream has more rows than its source states ({most}): their share is not known; use k",
                option="ratio", value=budget.ratio,
            )  # fmt: skip
        for i in np.flatnonzero(part.excluded == 0):
            best.offer(int(part.index[i]), {name: float(scores[name][i]) for name in scores}, part.rows[i])
    if log is not None:
        log.close()
    heaps, kept, valid = best.heaps, best.kept, best.offered
    if budget.ratio is not None:
        k = budget.rows(valid if of_kept else read)
    if not valid:
        return StreamPicks(Dataset.from_list([]), np.zeros(0, np.int64), log_path, folder, 0)
    # Rows kept only for another target rank last for this one.
    held = np.asarray(sorted(kept), dtype=np.int64)
    inside = {name: {-i for _, i in heap} for name, heap in heaps.items()}
    scores = {name: np.asarray([kept[i][1][name] for i in held.tolist()]) for name in heaps}
    masked = {name: np.where([i in inside[name] for i in held.tolist()], scores[name], -np.inf) for name in heaps}
    cut = Budget(k=max(1, min(k, len(held)))) if k is not None else budget
    picked = pick(masked, np.ones(len(held), bool), np.ones(len(held)), cut, aggregate=aggregate)
    indices = held[picked.indices]
    score = picked.score[picked.indices]
    if len(heaps) > 1:  # percentiles among ALL valid rows, as without streaming
        score = 1.0 - (1.0 - score) * len(held) / valid
    rows = [kept[i][0] for i in indices.tolist()]
    dataset = _dataset(pool, rows)
    dataset = dataset.add_column("neuron_score", score)
    dataset = dataset.add_column("neuron_rank", np.arange(len(indices)))
    dataset = dataset.add_column("source_index", indices)
    if len(heaps) > 1:
        for name in heaps:
            dataset = dataset.add_column(f"neuron_score_{name}", scores[name][picked.indices])
    return StreamPicks(dataset, indices, log_path, folder, valid)


def _dataset(pool: IterableDataset, rows: list[Row]) -> Dataset:
    """Kept rows with their own columns; rows of a stream without known types may have different ones."""
    drop = set(added_columns(list(pool.column_names or dict.fromkeys(chain(*rows)))))
    rows = [{key: value for key, value in row.items() if key not in drop} for row in rows]
    if pool.features is None:
        return as_dataset(rows)
    features = Features({name: feature for name, feature in pool.features.items() if name not in drop})
    return as_stored(rows, features)


def check_free(names: Sequence[str]) -> None:
    """Refuse a pool that has a column which the selection adds.

    Raises:
        NeuronSelectError: it has one.
    """
    for name in PICK_COLUMNS:
        if name in names:
            raise NeuronSelectError(f"the pool already has the column {name!r}; remove or rename it", option="pool")


class _Best:
    """The best rows of a stream for each target: bounded heaps, and the rows that one of them holds."""

    def __init__(self, targets: Sequence[str], k: int | None, threshold: float | None) -> None:
        self.k, self.threshold = k, threshold
        self.heaps: dict[str, list[tuple[float, int]]] = {name: [] for name in targets}
        self.kept: dict[int, tuple[Row, dict[str, float]]] = {}
        self.offered = 0
        self._uses: dict[int, int] = {}

    def offer(self, index: int, scores: dict[str, float], row: Row) -> None:
        """A row that may be selected; ties go to the smaller index."""
        self.offered += 1
        taken = 0
        for name, heap in self.heaps.items():
            item = (scores[name], -index)
            if self.k is not None and len(heap) == self.k:
                if item > heap[0]:
                    self._drop(-heapq.heapreplace(heap, item)[1])
                    taken += 1
            elif self.threshold is None or item[0] >= self.threshold:
                heapq.heappush(heap, item)
                taken += 1
        if taken:
            self._uses[index] = taken
            self.kept[index] = (row, scores)

    def _drop(self, index: int) -> None:
        self._uses[index] -= 1
        if not self._uses[index]:
            del self._uses[index], self.kept[index]


def _first(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    first = next(iter(scores.values()))
    return first if len(scores) == 1 else np.full(len(first), np.nan)
