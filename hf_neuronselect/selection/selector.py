"""NeuronSelector: fit targets, score pools, select rows; saved, it is a reusable capability."""

from __future__ import annotations

import heapq
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset

from ..core.cost import Cost
from ..core.errors import NeuronSelectError, NeuronSelectWarning, one_of
from ..core.provenance import Budget, CapabilityRecord, ExtractionRecord, SourceRecord, TargetRecord
from ..hub.cards import CapabilityCard, write_card
from ..hub.pushable import PushToHub
from ..methods import Method, make_method
from ..methods.base import Target
from ..rows.leakage import Leakage
from ..rows.load import source_of
from ..signals.columns import FeatureBatch
from ..signals.extractor import NeuronFeatureExtractor
from ..signals.forward import Directions
from ..store.store import FeatureStore
from .budget import AGGREGATES, Picked, pick
from .capability import Capability, make_extractor
from .record import extraction_record, method_record, selection_record
from .scan import Reader, Scored, Tally, added_columns, scan
from .selection import Selection, score_table

Data: TypeAlias = Dataset | IterableDataset
TARGET_NAME = re.compile(r"[A-Za-z0-9_-]+")
EXCLUDE = ("duplicate", "leak")


class NeuronSelector(PushToHub):
    """Selects the rows of a pool whose neurons act most like those of a target's exemplars.

    Args:
        method: a registered method's name. params: the method's options (``metric="cosine"``, ``seed=1``).

    Attributes:
        targets: name -> what the method keeps of its exemplars, after :meth:`fit`.
        exemplars: name -> how many there were, and where they came from.
        extractor_hash: the extractor the exemplars' features came from.

    Raises:
        NeuronSelectError: unknown method or option.
    """

    def __init__(self, method: str = "mona", **params: Any) -> None:
        self.method: Method = make_method(method, params)
        self.extractor: NeuronFeatureExtractor | None = None
        self._forget()

    def _forget(self) -> None:
        """Start clean: nothing is fitted, no exemplar is known."""
        self.targets: dict[str, Target] = {} if self.method.needs_target else {self.method.name: {}}
        self.exemplars: dict[str, TargetRecord] = {}
        self.extractor_hash: str | None = None
        self.extraction = ExtractionRecord()  # how the exemplars' signals were computed
        self.capability: SourceRecord | None = None  # where a loaded one came from
        self.leakage = Leakage()
        self.cost = Cost()  # of fitting

    def __repr__(self) -> str:
        fitted = ", ".join(self.targets) or "not fitted"
        return f"NeuronSelector({self.method.name!r}, targets: {fitted})"

    # ---------------------------------------------------------------------------------------- fit
    def fit(
        self,
        target: Data | Mapping[str, Data],
        *,
        extractor: NeuronFeatureExtractor | None = None,
        sources: Mapping[str, SourceRecord] | None = None,
    ) -> NeuronSelector:
        """Learn one target, or several named ones, from their exemplars. What was fitted before is forgotten.

        Args:
            target: exemplars (10-100 of the task's train or dev set), or ``{name: exemplars}``, with
                feature columns or without (then ``extractor`` computes them).
            extractor: also remembered for :meth:`score` and :meth:`select`.
            sources: name -> where its exemplars came from; default what their cache files tell.

        Returns:
            self.

        Raises:
            NeuronSelectError: no usable exemplar, a bad name, features missing or of another extractor.
        """
        named = dict(target) if isinstance(target, Mapping) and not isinstance(target, Dataset) else {"target": target}
        self._forget()
        self.extractor = extractor or self.extractor
        started = time.perf_counter()
        for name, data in named.items():
            if not TARGET_NAME.fullmatch(name):
                raise NeuronSelectError("a target's name is letters, digits, _ and -", option="target", value=name)
            rows = _single_split(data, "target")
            fitted = self._fit_one(name, rows, (sources or {}).get(name) or source_of(rows))
            if self.method.needs_target:
                self.targets[name] = fitted
        passes = sum(cost.total_seconds for cost in self.cost.passes.values())
        self.cost = self.cost.merge(Cost(fit_seconds=round(time.perf_counter() - started - passes, 6)))
        return self

    def _fit_one(self, name: str, data: Data, source: SourceRecord | None) -> Target:
        method = self.method
        reader = Reader(
            method.fit_features if method.fit_features is not None else method.features,
            self.extractor,
            self.extractor_hash,
            option="target",
            optional=method.optional_fit_features,
            needs_texts=method.needs_texts,
            needs_lengths=method.needs_target,
        )
        parts: list[FeatureBatch] = []
        rows, reasons = 0, []
        for batch in reader.read(data):
            rows += len(batch.features)
            reasons += [skip for skip in batch.skips if skip]
            parts.append(batch.features.only_usable())
            self.leakage |= Leakage.of(batch.conversations)
        usable = sum(len(part) for part in parts)
        self.exemplars[name] = TargetRecord(exemplars=rows, used=usable, source=source)
        self.cost = self.cost.merge(reader.meter.cost())
        if usable == 0:
            raise NeuronSelectError(f"no exemplar can be used ({reasons[0]})", option="target", value=name)
        if usable < rows:
            warnings.warn(
                f"target {name}: {rows - usable} of {rows} exemplars left out ({reasons[0]})",
                NeuronSelectWarning,
                stacklevel=4,
            )
        if method.needs_target:
            self.extractor_hash = reader.hash
            self.extraction = self._extraction(self.extractor)
        return {key: np.asarray(value) for key, value in method.fit(_joined(parts)).items()}

    def _extraction(self, extractor: NeuronFeatureExtractor | None) -> ExtractionRecord:
        """How the method's signals are computed, as far as known."""
        if extractor is not None and extractor.hash == (self.extractor_hash or extractor.hash):
            return extraction_record(extractor, self.method.features)
        if self.extraction.signals or self.extractor_hash is None:
            return self.extraction
        return ExtractionRecord(signals=dict.fromkeys(self.method.features, self.extractor_hash))

    def make_extractor(self, *, token: str | bool | None = None, **options: Any) -> NeuronFeatureExtractor:
        """Make the extractor that this capability was fitted with, and remember it.

        Args:
            options: see :func:`hf_neuronselect.selection.capability.make_extractor`; all may be left out where the
                model is bundled or on the Hub.

        Raises:
            NeuronSelectError: the model is not at hand, or an option contradicts the capability.
        """
        features = dict.fromkeys((*self.method.features, *(self.method.fit_features or ())))
        self.extractor = make_extractor(self.extraction, features, token=token, **options)
        return self.extractor

    # -------------------------------------------------------------------------------------- score
    def _reader(
        self, extractor: NeuronFeatureExtractor | None, store: FeatureStore | None = None, *, needs_rows: bool = False
    ) -> Reader:
        if not self.targets:
            raise NeuronSelectError("fit a target first: NeuronSelector(...).fit(exemplars, extractor=...)")
        return Reader(
            self.method.features,
            extractor or self.extractor,
            self.extractor_hash,
            needs_texts=self.method.needs_texts,
            needs_lengths=self.method.needs_target or self.method.name in ("longest", "shortest"),
            projections=list(directions.vectors) if (directions := self.directions()) is not None else (),
            needs_rows=needs_rows,
            store=store,
        )

    def directions(self) -> Directions | None:
        """What an extractor can project rows on, ``extractor.with_features([], selector.directions())``: then one
        number per block and target is kept of a row instead of its vectors, and scores are the same.

        Returns:
            None where the method has no directions.
        """
        return self.method.directions(self.targets.values()) if self.targets else None

    def _score_batch(self, batch: dict[str, Any]) -> dict[str, np.ndarray]:
        """Score columns of a batch that has feature columns: name -> float64 ``[n]``."""
        data = Dataset.from_dict(batch)
        nothing = Tally()
        parts = list(scan(data, self._reader(None), self.method, self.targets, Leakage(), (), nothing))
        return {name: np.concatenate([part.scores[name] for part in parts]) for name in self.targets}

    def score(
        self, pool: Data, *, extractor: NeuronFeatureExtractor | None = None, features: FeatureStore | None = None
    ) -> Data:
        """Add ``neuron_score`` (several targets: ``neuron_score_<target>``) to every row; NaN where there is none.

        Args:
            extractor, features: as of :meth:`select`.

        Raises:
            NeuronSelectError: a score column is there already; see :meth:`select`.
        """
        extractor = extractor or self.extractor
        names = self._score_names()
        if taken := [name for name in names.values() if name in (pool.column_names or [])]:
            raise NeuronSelectError(f"the data already has the column {taken[0]!r}; remove or rename it")
        if isinstance(pool, Dataset) or features is not None:
            tally = Tally()
            parts = list(scan(pool, self._reader(extractor, features), self.method, self.targets, Leakage(), (), tally))
            for target, column in names.items():
                pool = pool.add_column(column, np.concatenate([part.scores[target] for part in parts]))
            return pool
        mapped = pool if extractor is None else pool.map(extractor.with_features(self.method.features), batched=True)

        def add(batch: dict[str, Any]) -> dict[str, np.ndarray]:
            scores = self._score_batch(batch)
            return {column: scores[target] for target, column in names.items()}

        return mapped.map(add, batched=True, batch_size=1000)

    def _score_names(self) -> dict[str, str]:
        if len(self.targets) == 1:
            return dict.fromkeys(self.targets, "neuron_score")
        return {name: f"neuron_score_{name}" for name in self.targets}

    def above(self, threshold: float) -> Callable[[dict[str, Any]], list[bool]]:
        """A predicate for ``pool.filter(selector.above(0.2), batched=True)`` over a pool with feature columns.

        Raises:
            NeuronSelectError: several targets.
        """
        if len(self.targets) != 1:
            raise NeuronSelectError(
                f"unclear with {len(self.targets)} targets; use select", option="threshold", value=threshold
            )
        target = next(iter(self.targets))

        def keep(batch: dict[str, Any]) -> list[bool]:
            return (self._score_batch(batch)[target] >= threshold).tolist()

        return keep

    # ------------------------------------------------------------------------------------- select
    def select(
        self,
        pool: Data,
        *,
        ratio: float | None = None,
        k: int | None = None,
        threshold: float | None = None,
        max_tokens: int | None = None,
        aggregate: str = "quota",
        weights: Mapping[str, float] | None = None,
        exclude: Sequence[str] = EXCLUDE,
        extractor: NeuronFeatureExtractor | None = None,
        features: FeatureStore | None = None,
        source: SourceRecord | None = None,
    ) -> Selection:
        """Select the best rows of a pool.

        Args:
            pool: rows, with feature columns or without (then the extractor computes them in the same
                pass; nothing but scores is kept). A stream is read once, with a bounded heap.
            ratio, k, threshold, max_tokens: the budget, at most one; without one the method's own ratio.
            aggregate: several targets: ``quota``, ``round_robin``, ``mean``, ``max``, ``weighted`` (of ranks).
            weights: target -> weight, for ``weighted``.
            exclude: ``duplicate`` (exact, the first stays) and ``leak`` (rows that are an exemplar or
                hold one's question) are left out; pass fewer to keep them.
            extractor: default the one given to :meth:`fit`.
            features: a store of this pool's features: the model does not run over it.
            source: where the pool came from; default what its cache files tell.

        Returns:
            A :class:`Selection`; never bare indices.

        Raises:
            NeuronSelectError: no rows, none that can be selected, options that do not go together.
        """
        if ratio is None and k is None and threshold is None and max_tokens is None:
            ratio = self.method.default_ratio
        budget = Budget(ratio, k, threshold, max_tokens)
        one_of(aggregate, AGGREGATES, "aggregate")
        for what in exclude:
            one_of(what, EXCLUDE, "exclude")
        pool = _single_split(pool, "pool")
        extractor = extractor or self.extractor
        tally = Tally()
        reader = self._reader(extractor, features, needs_rows=bool(exclude))
        found = scan(pool, reader, self.method, self.targets, self.leakage, exclude, tally)
        if isinstance(pool, Dataset):
            selection = self._select_rows(pool, found, budget, aggregate, weights, tally)
        else:
            selection = self._select_stream(pool, found, budget, aggregate, tally)
        known = source or source_of(pool) or SourceRecord()
        selection.provenance = selection_record(
            self.about(),
            capability=self.capability,
            pool=replace(known, fingerprint=getattr(pool, "_fingerprint", None), rows=tally.rows),
            budget=budget,
            aggregate=aggregate if len(self.targets) > 1 else None,
            weights=weights,
            exclude=exclude,
            extractor=self._extraction(extractor) if extractor or self.extraction.signals else None,
            tally=tally,
            lengths=selection.picked_lengths(),
            selected=len(selection),
            cost=self.cost.merge(Cost(score_seconds=round(tally.score_seconds, 6))),
            passes=reader.meter.cost(),
        )
        return selection

    def _select_rows(
        self, pool: Dataset, found: Any, budget: Budget, aggregate: str, weights: Any, tally: Tally
    ) -> Selection:
        parts: list[Scored] = list(found)
        scores = {name: np.concatenate([part.scores[name] for part in parts]) for name in self.targets}
        n_tokens = np.concatenate([part.n_tokens for part in parts])
        excluded = np.concatenate([part.excluded for part in parts])
        truncated = np.concatenate([part.truncated for part in parts])
        self._check_some(excluded, tally)

        def choose(budget: Budget) -> tuple[Dataset, Picked, pa.Table]:
            picked = pick(scores, excluded == 0, n_tokens, budget, aggregate=aggregate, weights=weights)
            table = score_table(scores, picked, n_tokens, truncated, excluded)
            return self._rows(pool, picked.indices, scores, picked.score[picked.indices]), picked, table

        dataset, picked, table = choose(budget)
        if budget.k is not None and budget.k > int((excluded == 0).sum()):
            warnings.warn(
                f"k={budget.k} is more than the {int((excluded == 0).sum())} rows that can be selected; all are taken",
                NeuronSelectWarning,
                stacklevel=4,
            )
        return Selection(dataset, picked.indices, table, selector=self, choose=choose)

    def _check_some(self, excluded: np.ndarray, tally: Tally) -> None:
        if not (excluded == 0).any():
            why = ", ".join(f"{count} {name}" for name, count in tally.excluded.items() if count)
            first = f"; {tally.reasons[0]}" if tally.reasons else ""
            raise NeuronSelectError(f"none of the {tally.rows} rows can be selected ({why}{first})", option="pool")

    def _rows(self, pool: Dataset, indices: np.ndarray, scores: Mapping[str, np.ndarray], score: np.ndarray) -> Dataset:
        """The selected rows as they came, with ``neuron_score``, ``neuron_rank`` and ``source_index``."""
        rows = pool.with_format(None).remove_columns(added_columns(pool.column_names))
        _check_free(rows.column_names)
        # Taken as one table: an index mapping would be flattened again for each column added.
        rows = Dataset(rows.with_format("arrow")[indices.tolist()], info=rows.info.copy(), split=rows.split)
        columns = {"neuron_score": score, "neuron_rank": np.arange(len(indices)), "source_index": indices}
        if len(scores) > 1:
            columns |= {f"neuron_score_{name}": values[indices] for name, values in scores.items()}
        for name, values in columns.items():
            rows = rows.add_column(name, values)
        return rows

    def _select_stream(
        self, pool: IterableDataset, found: Any, budget: Budget, aggregate: str, tally: Tally
    ) -> Selection:
        k = budget.k
        if budget.ratio is not None:
            splits = pool.info.splits or {}
            known = splits.get(str(pool.split)) if pool.split else None
            if known is None or not known.num_examples:
                raise NeuronSelectError(
                    "the length of a stream is not known; use k", option="ratio", value=budget.ratio
                )
            k = budget.rows(known.num_examples)
        if budget.max_tokens is not None:
            raise NeuronSelectError("a stream needs k or threshold", option="max_tokens", value=budget.max_tokens)
        if len(self.targets) > 1 and (aggregate not in ("quota", "round_robin") or k is None):
            raise NeuronSelectError(
                "ranks of a whole stream are not kept; several targets take quota or round_robin, and k",
                option="aggregate", value=aggregate,
            )  # fmt: skip
        best = _Best(list(self.targets), k, budget.threshold)
        folder = tempfile.TemporaryDirectory(prefix="neuronselect-")
        log_path = Path(folder.name) / "scores.parquet"
        log: pq.ParquetWriter | None = None
        for part in found:
            nothing = Picked(np.zeros(0, np.int64), _first(part.scores), np.full(len(part.index), -1))
            table = score_table(part.scores, nothing, part.n_tokens, part.truncated, part.excluded, part.index)
            log = log or pq.ParquetWriter(log_path, table.schema)
            log.write_table(table)
            for i in np.flatnonzero(part.excluded == 0):
                best.offer(
                    int(part.index[i]), {name: float(part.scores[name][i]) for name in part.scores}, part.rows[i]
                )
        if log is not None:
            log.close()
        heaps, kept, valid = best.heaps, best.kept, best.offered
        if not valid:
            self._check_some(np.ones(1), tally)
        # Among the kept rows, a target's scores below its own heap stand for "worse than all kept".
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
        own = [name for name in (pool.column_names or list(rows[0] if rows else {}))]
        drop = set(added_columns(own))
        features = None if pool.features is None else pool.features.copy()
        if features is not None:
            for name in drop:
                features.pop(name)
        dataset = Dataset.from_list(
            [{key: value for key, value in row.items() if key not in drop} for row in rows], features=features
        )
        _check_free(dataset.column_names)
        dataset = dataset.add_column("neuron_score", score)
        dataset = dataset.add_column("neuron_rank", np.arange(len(indices)))
        dataset = dataset.add_column("source_index", indices)
        if len(heaps) > 1:
            for name in heaps:
                dataset = dataset.add_column(f"neuron_score_{name}", scores[name][picked.indices])
        return Selection(dataset, indices, log_path, selector=self, keep_alive=folder)

    # -------------------------------------------------------------------------------- persistence
    def about(self) -> CapabilityRecord:
        """``config.json`` of this capability: method, exemplars, and how their signals were computed."""
        return CapabilityRecord(
            method=method_record(self.method), targets=dict(self.exemplars), extractor=self.extraction
        )

    def fitted(self) -> Capability:
        """What is kept of the targets, without extractor or data."""
        return Capability(self.about(), dict(self.targets), self.leakage, self.capability)

    @classmethod
    def of(cls, capability: Capability) -> NeuronSelector:
        """A selector of fitted targets.

        Raises:
            NeuronSelectError: an unknown method, or one without these options.
        """
        record = capability.record
        selector = cls(record.method.name, **record.method.options)
        if selector.method.needs_target:
            selector.targets = dict(capability.targets)
        selector.exemplars, selector.extraction = dict(record.targets), record.extractor
        selector.extractor_hash = next(iter(record.extractor.signals.values()), None)
        selector.capability, selector.leakage = capability.source, capability.leakage
        return selector

    def save_pretrained(self, folder: str | Path, *, card: bool = True) -> None:
        """Write a capability: ``config.json``, ``capability.safetensors`` (no exemplar text) and ``README.md``.

        Args:
            card: write the README, keeping what was added to the one that is there.

        Raises:
            NeuronSelectError: nothing is fitted.
        """
        if not self.targets:
            raise NeuronSelectError("fit a target first: there is nothing to save")
        self.fitted().save(Path(folder))
        if card:
            write_card(Path(folder), CapabilityCard(self.about()))

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | bool | None = None, subfolder: str = ""
    ) -> NeuronSelector:
        """Load a saved capability, from a folder or the Hub.

        Args:
            subfolder: of the folder or repository (a feature library has several).

        Raises:
            NeuronSelectError: not a capability, or a damaged one.
        """
        return cls.of(Capability.fetch(source, revision=revision, token=token, subfolder=subfolder))


class _Best:
    """The best rows of a stream for each target: bounded heaps, and the rows that stand in one of them."""

    def __init__(self, targets: Sequence[str], k: int | None, threshold: float | None) -> None:
        self.k, self.threshold = k, threshold
        self.heaps: dict[str, list[tuple[float, int]]] = {name: [] for name in targets}
        self.kept: dict[int, tuple[dict[str, Any], dict[str, float]]] = {}
        self.offered = 0
        self._uses: dict[int, int] = {}

    def offer(self, index: int, scores: dict[str, float], row: dict[str, Any]) -> None:
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


def _single_split(data: Any, option: str) -> Data:
    if isinstance(data, DatasetDict) and len(data) == 1:
        data = next(iter(data.values()))
    if not isinstance(data, (Dataset, IterableDataset)):
        kind = f"the splits {', '.join(data)}" if isinstance(data, Mapping) else type(data).__name__
        raise NeuronSelectError(f"needs a datasets.Dataset or IterableDataset, got {kind}", option=option)
    return data


def _check_free(names: Sequence[str]) -> None:
    for name in ("neuron_score", "neuron_rank", "source_index"):
        if name in names:
            raise NeuronSelectError(f"the pool already has the column {name!r}; remove or rename it", option="pool")


def _joined(parts: Sequence[FeatureBatch]) -> FeatureBatch:
    """Batches of usable rows as one."""
    columns: dict[str, Any] = {}
    for name in parts[0].columns:
        if isinstance(parts[0].columns[name], (pa.Array, pa.ChunkedArray)):
            arrays = [chunk for part in parts for chunk in _chunks_of(part.columns[name])]
            columns[name] = pa.chunked_array(arrays)
        else:
            columns[name] = [row for part in parts for row in part.columns[name]]
    return FeatureBatch(
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.n_tokens for part in parts]),
        np.concatenate([part.usable for part in parts]),
        columns,
        [text for part in parts for text in part.texts],
    )


def _chunks_of(column: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]
