"""NeuronSelector: fit targets, score pools, select rows; saved, it is a reusable capability."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from datasets import Dataset, IterableDataset

from ..core.configs import DEFAULT_METHOD
from ..core.cost import Cost
from ..core.errors import NeuronSelectError, one_of
from ..core.folders import CAPABILITY
from ..core.options import AUTO
from ..core.provenance import (
    Avoided,
    Budget,
    CapabilityRecord,
    ExtractionRecord,
    MethodRecord,
    SourceRecord,
    Spread,
    TargetRecord,
)
from ..core.writing import writing
from ..hub.cards import CapabilityCard, write_card
from ..hub.pushable import PushToHub
from ..methods.base import Method, Target, exemplar_signals, make_method, signals_needed, vector_signal
from ..methods.each import EachExemplar
from ..pickers import Picker, picker_of
from ..rows.leakage import Leakage
from ..rows.load import single_split, source_of, without_selection
from ..signals.base import Signal, signals_of
from ..signals.columns import RowBatch
from ..signals.extractor import NeuronFeatureExtractor
from ..store.store import FeatureStore
from .auto_ratio import check_auto, estimate_ratio
from .avoid import check_avoided, check_whole
from .budget import check_aggregate
from .capability import Capability, make_extractor
from .doubts import Doubts, Halves
from .fitting import fit_target
from .marks import Marks
from .reader import Reader, own_columns
from .record import extraction_record, method_record, selection_record
from .scan import Scored, Tally, scan
from .scores import PoolScores
from .scoring import Scoring
from .selection import Selection
from .spread import check_spread
from .stages import check_compared, opened, prepared, spooled
from .stream import check_free, select_from_stream, stream_budget
from .sweep import Sweep

Data: TypeAlias = Dataset | IterableDataset
TARGET_NAME = re.compile(r"[A-Za-z0-9_-]+")
EXCLUDE = ("duplicate", "leak")


class NeuronSelector(Scoring, PushToHub):
    """Selects the rows of a pool whose neurons act most like those of a target's exemplars.

    Args:
        method: a registered method's name, or a method. options: of one named (``metric="cosine"``, ``seed=1``).
        picker: in which order rows are taken, e.g. ``round-robin`` or ``knn(neighbours=50)``; default the method's own.

    Attributes:
        targets: name -> what the method keeps of its exemplars, after :meth:`fit`.
        avoided: the same of targets whose score is taken off, times ``avoid_weight``.
        exemplars: name -> how many there were, and where they came from, of both.
        identities: signal -> the identity that rows must have it by.

    Raises:
        NeuronSelectError: unknown method, picker or option.
    """

    def __init__(self, method: str | Method = DEFAULT_METHOD, *, picker: str | None = None, **options: Any) -> None:
        self.method: Method = make_method(method, options) if isinstance(method, str) else method
        self.picker: Picker = picker_of(picker or self.method.default_picker)
        if self.picker.each and not self.method.needs_target:
            raise NeuronSelectError(
                f"lets exemplars choose, and {self.method.name} has none; use best-first",
                option="picker",
                value=str(self.picker),
            )
        self.extractor: NeuronFeatureExtractor | None = None
        self._forget()

    def _forget(self) -> None:
        """Start clean: nothing is fitted; of exemplars no halves, signals (kept) or rows (examples) are known."""
        self.targets: dict[str, Target] = {} if self.method.needs_target else {self.method.name: {}}
        self.avoided: dict[str, Target] = {}
        self.avoid_weight = 1.0
        self.exemplars: dict[str, TargetRecord] = {}
        self.halves, self.kept, self.examples = dict[str, Halves](), dict[str, RowBatch](), dict[str, Data]()
        self.identities: dict[str, str] = {}
        self.extraction = ExtractionRecord()  # how the exemplars' signals were computed
        self.capability: SourceRecord | None = None  # where a loaded one came from
        self.recorded: MethodRecord | None = None  # a loaded one's method: what its options name may not be here
        self.leakage, self.cost = Leakage(), Cost()  # of fitting

    def __repr__(self) -> str:
        fitted = ", ".join(self.targets) or "not fitted"
        avoided = f", avoided: {', '.join(self.avoided)}" if self.avoided else ""
        return f"NeuronSelector({self.method.name!r}, targets: {fitted}{avoided})"

    @property
    def scored_by(self) -> Method:
        """The method, or one that gives a score for each exemplar if the picker reads these."""
        return EachExemplar(self.method) if self.picker.each else self.method

    @property
    def signals(self) -> tuple[str, ...]:
        """Signals that rows and exemplars need, for the method and the picker: what an extractor is made for."""
        return tuple(dict.fromkeys([*signals_needed(self.method), *vector_signal(self.method, self.picker)]))

    def check(self) -> None:
        """Refuse what cannot run here. Called before any row is read.

        Raises:
            NeuronSelectError: a package is missing, a file that an option names, or a signal with vectors.
        """
        self.method.check()
        self.picker.check()
        check_compared(self.method, self.picker)

    # ---------------------------------------------------------------------------------------- fit
    def prepare(
        self, pool: Data, *, extractor: NeuronFeatureExtractor | None = None, source: SourceRecord | None = None
    ) -> NeuronSelector:
        """Do the method's work on a pool that comes before :meth:`fit`, if it has any (instruction-mining: its columns).

        Args:
            extractor: also remembered, for the signals that the method then reads. source: where the pool came from.

        Returns:
            self.
        """
        self.check()
        pool, extractor = without_selection(single_split(pool, "pool")), extractor or self.extractor
        known = source or source_of(pool) or SourceRecord()
        self.method = prepared(self.method, pool, known, extractor)
        self.extractor = extractor and extractor.with_features(self.signals)
        return self

    def fit(
        self,
        target: Data | Mapping[str, Data],
        *,
        avoid: Data | Mapping[str, Data] | None = None,
        avoid_weight: float = 1.0,
        extractor: NeuronFeatureExtractor | None = None,
        sources: Mapping[str, SourceRecord] | None = None,
    ) -> NeuronSelector:
        """Learn one target, or several named ones, from their exemplars. What was fitted before is forgotten.

        Args:
            target: exemplars (10-100 of the task's train or dev set), or ``{name: exemplars}``, with the signals'
                columns or without (then ``extractor`` computes them).
            avoid: exemplars of a target that must not be served, or of several named ones: rows lose what they score for it,
                by :func:`~hf_neuronselect.selection.avoid.less_avoided`. avoid_weight: how much of it, above 0.
            extractor: also remembered for :meth:`score` and :meth:`select`.
            sources: name -> where its exemplars came from; default what their cache files tell.

        Returns:
            self.

        Raises:
            NeuronSelectError: no usable exemplar, a bad name, signals missing or of another extraction, or targets that
                cannot be avoided.
        """
        self.check()
        wanted, unwanted = _named(target, "target"), {} if avoid is None else _named(avoid, "avoided")
        check_avoided(self.method, wanted, unwanted, avoid_weight)
        self._forget()
        self.avoid_weight = float(avoid_weight)
        self.extractor = extractor or self.extractor
        started = time.perf_counter()
        for name, data in {**wanted, **unwanted}.items():
            option = "avoid" if name in unwanted else "target"
            if not TARGET_NAME.fullmatch(name):
                raise NeuronSelectError("a target's name is letters, digits, _ and -", option=option, value=name)
            rows = single_split(data, option)
            fitted = self._fit_one(name, rows, (sources or {}).get(name) or source_of(rows), option)
            if self.method.needs_target:
                (self.avoided if name in unwanted else self.targets)[name] = fitted
        if not self.method.needs_target:
            self.identities = {}  # exemplars say nothing of how the pool's signals must be computed
        elif self.extractor is not None and self.extractor.extraction.model is not None:
            # What rows are scored by may be other signals than the exemplars'.
            for signal in (*signals_of(self.method.signals), *self.compact_signals()):
                if signal.stored:
                    self.identities.setdefault(signal.name, self.extractor.identity(signal))
        self.extraction = self.extraction_of(self.extractor)
        passes = sum(cost.total_seconds for cost in self.cost.passes.values())
        self.cost = self.cost.merge(Cost(fit_seconds=round(time.perf_counter() - started - passes, 6)))
        return self

    def _fit_one(self, name: str, data: Data, source: SourceRecord | None, option: str) -> Target:
        method = self.scored_by
        reader = Reader(
            exemplar_signals(method), self.extractor, self.identities, option=option,
            optional=method.signals if method.needs_target else (),
        )  # fmt: skip
        found = fit_target(method, name, data, reader, source)
        self.exemplars[name], self.examples[name], self.kept[name] = found.record, data, found.exemplars
        self.leakage |= found.leakage
        self.halves |= found.halves
        self.cost = self.cost.merge(found.cost)
        return found.target

    def extraction_of(self, extractor: NeuronFeatureExtractor | None) -> ExtractionRecord:
        """How the method's signals are computed, as far as known."""
        if extractor is not None:
            stored = [signal for signal in signals_of(self.method.signals) if signal.stored]
            known = extraction_record(extractor, stored if extractor.extraction.model else ())
            return replace(known, signals={**known.signals, **self.identities})
        return replace(self.extraction, signals={**self.extraction.signals, **self.identities})

    def make_extractor(self, *, token: str | bool | None = None, **options: Any) -> NeuronFeatureExtractor:
        """Make the extractor that this capability was fitted with, and remember it.

        Args:
            options: see :func:`hf_neuronselect.selection.capability.make_extractor`; all may be left out where the
                model is bundled or on the Hub.

        Raises:
            NeuronSelectError: the model is not at hand, or an option contradicts the capability.
        """
        self.extractor = make_extractor(self.extraction, self.signals, token=token, **options)
        return self.extractor

    # -------------------------------------------------------------------------------------- score
    def _reader(
        self, extractor: NeuronFeatureExtractor | None, store: FeatureStore | None = None, *, needs_rows: bool = False
    ) -> Reader:
        if not self.targets:
            raise NeuronSelectError("fit a target first: NeuronSelector(...).fit(exemplars, extractor=...)")
        return Reader(
            self.method.signals,
            extractor or self.extractor,
            dict(self.identities),
            compact=self.compact_signals(),
            needs_rows=needs_rows,
            store=store,
        )

    def compact_signals(self) -> tuple[Signal, ...]:
        """Smaller signals that are enough to score the fitted targets: ``extractor.with_features(...)`` of them keeps
        one number per block instead of a vector. () where the method has none.
        """
        return self.scored_by.compact_signals(list(self.scored_against.values())) if self.targets else ()

    # ------------------------------------------------------------------------------------- select
    def select(
        self,
        pool: Data,
        *,
        ratio: float | Literal["auto"] | None = None,
        k: int | None = None,
        threshold: float | None = None,
        max_tokens: int | None = None,
        aggregate: str = "quota",
        weights: Mapping[str, float] | None = None,
        exclude: Sequence[str] = EXCLUDE,
        spread: Spread | None = None,
        extractor: NeuronFeatureExtractor | None = None,
        features: FeatureStore | None = None,
        source: SourceRecord | None = None,
        marks: Marks | None = None,
        sweep: Sweep | None = None,
    ) -> Selection:
        """Select the best rows of a pool.

        Args:
            pool: rows, with the signals' columns or without (then the extractor computes them in the same pass; nothing
                but scores is kept). A stream is read once, with a bounded heap.
            ratio, k, threshold, max_tokens: the budget, at most one; without one the method's own. ``ratio="auto"`` is
                estimated from the scores (:mod:`~hf_neuronselect.selection.auto_ratio`).
            aggregate: several targets: ``quota``, ``round_robin``, ``mean``, ``max``, ``weighted`` (of ranks).
            weights: target -> weight, for ``weighted``.
            exclude: ``duplicate`` (exact, the first stays) and ``leak`` (rows that are an exemplar or hold one's
                question) are left out; pass fewer to keep them.
            spread: how picks are kept apart: at most a share from one source, no near copies.
            extractor: default the one given to :meth:`fit`.
            features: a store of this pool's signals: the model does not run over it.
            source: where the pool came from; default what its cache files tell.
            marks, sweep: the pool's leaks and duplicates, and its scores, of several selections (``mark_pool``, ``sweep_pool``).

        Returns:
            A :class:`Selection`; never bare indices.

        Raises:
            NeuronSelectError: no rows, none that can be selected, options that do not go together.
        """
        self.check()
        own = ratio is None and k is None and threshold is None and max_tokens is None
        auto = ratio == AUTO
        asked: float | None = 1.0 if isinstance(ratio, str) else ratio  # until the scores are there
        budget = self.method.default_budget if own else Budget(asked, k, threshold, max_tokens)
        of_kept = own and self.method.counts_kept
        for what in exclude:
            one_of(what, EXCLUDE, "exclude")
        check_aggregate(list(self.targets), budget, aggregate, weights)
        pool = without_selection(single_split(pool, "pool"))
        check_whole(pool, self.avoided)
        check_free(own_columns(pool.column_names or []))
        check_spread(spread, pool, budget)
        if auto:
            check_auto(self.method, len(self.targets), isinstance(pool, IterableDataset))
        if marks is not None and isinstance(pool, Dataset) and len(marks) != len(pool):
            raise NeuronSelectError(f"marks of {len(marks)} rows, the pool has {len(pool)}", option="marks")
        extractor = extractor or self.extractor
        tally, against = Tally(), self.scored_against
        held = None  # rows that the heaps of a stream hold
        if isinstance(pool, IterableDataset):
            held = stream_budget(pool, budget, list(self.targets), aggregate, self.picker)
        known, several = source or source_of(pool) or SourceRecord(), len(self.targets) > 1
        reader = self._reader(extractor, features, needs_rows=bool(exclude) and marks is None)
        reader.name = known.id
        estimate = None
        with contextlib.ExitStack() as open_until_scored:
            if sweep is not None:
                found: Iterable[Scored] = [sweep.rows(self, against, exclude, marks, tally)]
                doubts, compared = sweep.doubts, sweep.compared
            else:
                method, compared = opened(self.method, self.picker, pool, known, reader, auto)
                doubts = Doubts(method, self.halves if reader.whole(pool.column_names or []) else {})
                open_until_scored.enter_context(spooled(method, pool, reader))
                found = scan(pool, reader, method, against, self.leakage, exclude, tally, doubts, marks, compared, self.avoided)  # fmt: skip
            if isinstance(pool, Dataset):
                rows = extractor.extraction.options if extractor else None
                scored = PoolScores.of(
                    pool, found, aggregate, weights, self.picker, compared, spread, rows, self.avoided, self.avoid_weight
                )  # fmt: skip
                tally.check(bool(scored.valid.any()))
                budget = Budget(k=budget.rows(int(scored.valid.sum()))) if of_kept else budget
                if auto:
                    estimate = estimate_ratio(scored, self.method, next(iter(self.targets.values())), compared)
                    budget = Budget(ratio=estimate.ratio)
                selection = Selection(*scored.choose(budget), selector=self, choose=scored.choose)
                selection.pool, selection.features, selection.finished = pool, features, doubts.finished
            else:
                picks = select_from_stream(pool, found, budget, list(self.targets), aggregate, held, of_kept)
                tally.check(bool(picks.kept))
                budget = Budget(k=len(picks.indices)) if of_kept else budget
                selection = Selection(
                    picks.dataset, picks.indices, picks.scores, selector=self, keep_alive=picks.folder
                )
        selection.provenance = selection_record(
            doubts.noted(self.about(), self.scored_against),
            capability=self.capability,
            pool=replace(known, fingerprint=getattr(pool, "_fingerprint", None), rows=tally.rows),
            budget=budget,
            auto=estimate,
            aggregate=aggregate if several else None,
            weights=weights if several and aggregate == "weighted" else None,
            exclude=exclude,
            spread=spread,
            extractor=self.extraction_of(extractor) if extractor or self.extraction.signals else None,
            tally=tally,
            lengths=selection.picked_lengths(),
            selected=len(selection),
            cost=self.cost.merge(Cost(score_seconds=round(tally.score_seconds, 6))),
            passes=reader.cost() if sweep is None else sweep.passes,
        )
        return selection

    # -------------------------------------------------------------------------------- persistence
    def about(self) -> CapabilityRecord:
        """``config.json`` of this capability: method, exemplars, and how their signals were computed."""
        avoided = {name: one for name, one in self.exemplars.items() if name in self.avoided}
        return CapabilityRecord(
            method=self.recorded or method_record(self.method, self.picker),
            targets={name: one for name, one in self.exemplars.items() if name not in avoided},
            avoided=Avoided(targets=avoided, weight=self.avoid_weight) if avoided else None,
            extractor=self.extraction,
        )

    def fitted(self) -> Capability:
        """What is kept of the targets, without extractor or data.

        Raises:
            NeuronSelectError: the method's is never saved.
        """
        if self.method.not_saved:
            raise NeuronSelectError(
                f"{self.method.not_saved}, so it is never saved; give the exemplars themselves each time",
                option="method", value=self.method.name,
            )  # fmt: skip
        return Capability(self.about(), self.scored_against, self.leakage, self.capability)

    @classmethod
    def of(cls, capability: Capability) -> NeuronSelector:
        """A selector of fitted targets.

        Raises:
            NeuronSelectError: an unknown method, or one without these options.
        """
        record = capability.record
        selector = cls(record.method.name, picker=record.method.picker, **record.method.options)
        avoided = record.avoided or Avoided(targets={})
        if selector.method.needs_target:
            selector.targets = {name: capability.targets[name] for name in record.targets}
            selector.avoided = {name: capability.targets[name] for name in avoided.targets}
            selector.avoid_weight = avoided.weight
            selector.identities = dict(record.extractor.signals)
        selector.exemplars, selector.extraction = {**record.targets, **avoided.targets}, record.extractor
        selector.recorded = record.method
        selector.capability, selector.leakage = capability.source, capability.leakage
        return selector

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a capability: ``config.json``, ``capability.safetensors`` (no exemplar text) and ``README.md``.

        What was added to the README that is there stays.

        Raises:
            NeuronSelectError: nothing is fitted, the method keeps texts, the folder holds something else, or the disk is full.
        """
        if not self.targets:
            raise NeuronSelectError("fit a target first: there is nothing to save")
        fitted = self.fitted()
        with writing(Path(folder), CAPABILITY) as new:
            fitted.save(new)
            write_card(new, CapabilityCard(self.about()), before=Path(folder))

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


def _named(given: Data | Mapping[str, Data], name: str) -> dict[str, Data]:
    """Exemplars by the names they have; ``name`` for those without one."""
    return dict(given) if isinstance(given, Mapping) and not isinstance(given, Dataset) else {name: given}
