"""What is at hand to explain a selection with: its selector, a model, a store, the pool, the exemplars; all checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from ..core.errors import NeuronSelectError
from ..core.options import ExtractionOptions, part_of
from ..methods.base import Target, exemplar_signals
from ..methods.each import EachExemplar
from ..rows.formats import Conversation, RowFormat, read_row, row_format
from ..rows.leakage import exact_key
from ..rows.load import single_split, without_selection
from ..signals.base import Signal, signals_of
from ..signals.columns import RowBatch
from ..signals.extractor import NeuronFeatureExtractor
from ..store.lookup import row_of
from ..store.store import FeatureStore, columns_of, skips_of
from .reader import Reader, column_names, own_columns
from .scan import Tally, observe_pool
from .stages import prepared

if TYPE_CHECKING:
    from .selection import Selection

NEAR = 0.05
"""How much what is fitted on the same exemplars may differ between machines and dtypes."""


class Evidence:
    """See :meth:`Selection.explainer` for the arguments and what is raised.

    Attributes:
        method: as it scores. target: its name. rows: of the pool. notes: what could not be told, each once.
    """

    def __init__(
        self, selection: Selection, target: str | None, extractor: NeuronFeatureExtractor | None,
        features: FeatureStore | None, pool: Dataset | None, exemplars: Dataset | None,
    ) -> None:  # fmt: skip
        if selection.selector is None:
            raise NeuronSelectError(
                f"a selection by {selection.provenance.method.name} keeps nothing of its exemplars: select again, and explain "
                "in the same process", option="selection",
            )  # fmt: skip
        self.selection, self.selector, self.made = selection, selection.selector, selection.provenance
        self.method, known = self.selector.scored_by, self.selector.scored_against
        self.target = target or next(iter(known))
        if self.target not in known:
            raise NeuronSelectError(f"one of {', '.join(known)}", option="target", value=target)
        self.rows, self.notes, self._lasting = self.made.counts.rows, dict[str, None](), dict[str, None]()
        self.store = features or selection.features
        self.pool = selection.pool if pool is None else without_selection(single_split(pool, "pool"))
        self.examples = exemplars if exemplars is not None else self.selector.examples.get(self.target)
        self._given = extractor
        self._ahead: dict[int, RowBatch] = {}
        self._read: dict[
            int, tuple[Dataset, Dataset, RowFormat]
        ] = {}  # rows are kept with it, so that no id comes again
        self._check()

    def note(self, text: str, *, lasting: bool = False) -> None:
        """Remember what could not be told, and how it can; a lasting note is told of every row."""
        self.notes[text.rstrip(".")] = None
        if lasting:
            self._lasting[text.rstrip(".")] = None

    def forget_notes(self) -> None:
        """Keep lasting notes alone: the others are of a row told before."""
        self.notes = dict(self._lasting)

    def _check(self) -> None:
        known, rows = self.made.pool, self.rows
        if self.pool is not None and len(self.pool) != rows:
            raise NeuronSelectError(
                f"it has {len(self.pool)} rows, and the selection is from {known.id}, {rows} rows: name that one",
                option="pool",
            )
        if self.store is None:
            return
        pool = self.store.manifest["pool"]
        others = pool.get("commit") and known.commit and pool["commit"] != known.commit
        if len(self.store) != rows or others:
            raise NeuronSelectError(
                f"it is of {pool.get('id')} at {pool.get('commit')}, {len(self.store)} rows, and the selection of {known.id} at "
                f"{known.commit}, {rows} rows: name that pool's store",
                option="features", value=self.store.folder.name,
            )  # fmt: skip

    # ------------------------------------------------------------------------------------- the model
    @cached_property
    def extractor(self) -> NeuronFeatureExtractor | None:
        """What computes signals; None where the model is not at hand and a store has all that a score needs.

        Raises:
            NeuronSelectError: it is not at hand and needed, or is another one.
        """
        found = self._given or self.selector.extractor
        if found is not None or self.selector.extraction.model is None:
            return found
        try:
            return self.selector.make_extractor()
        except NeuronSelectError as cause:
            if not self.stored:
                raise
            self.note(f"tokens are not told, since they need the model: {cause.message}", lasting=True)
            return None

    def reader(self, signals: Sequence[Any], *, option: str = "pool", store: FeatureStore | None = None) -> Reader:
        """Reads rows with signals; those of texts need no model."""
        texts = all(signal.engine == "text" for signal in signals_of(signals))
        extractor = self._without_model() if texts else self.extractor
        return Reader(
            tuple(signals), extractor, dict(self.selector.identities), option=option, name=self.target, needs_rows=False,
            store=store,
        )  # fmt: skip

    def _without_model(self) -> NeuronFeatureExtractor:
        record = self.made.extractor.options if self.made.extractor else None
        options = part_of(record, type(record)) if record else {}
        return NeuronFeatureExtractor.without_model(ExtractionOptions(**options), ())

    # ------------------------------------------------------------------------------------- rows and texts
    def conversation(self, data: Dataset, i: int) -> Conversation:
        """A row as it is read for its score."""
        if id(data) not in self._read:  # choosing columns takes longer than reading a row
            fmt = self.selection.row_format if data is self.selection.dataset else self._format(data)
            self._read[id(data)] = (data, data.with_format(None).select_columns(fmt.used), fmt)
        _, texts, fmt = self._read[id(data)]
        return read_row(texts[i], fmt)

    def conversations(self, data: Dataset) -> Iterator[Conversation]:
        """All rows of the pool or of exemplars, one after the other: much faster than each by its place."""
        fmt = self._format(data)
        return (read_row(row, fmt) for row in data.with_format(None).select_columns(fmt.used))

    def _format(self, data: Dataset) -> RowFormat:
        own, record = own_columns(data.column_names), self.made.extractor.options if self.made.extractor else None
        return row_format(own, record.row_format, record.columns) if record else row_format(own)

    def place_of(self, number: int) -> int | None:
        """The place of a row of the pool in the selection."""
        found = np.flatnonzero(self.selection.indices == number)
        return int(found[0]) if len(found) else None

    def text_of(self, number: int) -> Conversation | None:
        """A row of the pool; None where it is not at hand.

        Raises:
            NeuronSelectError: the pool given has another text there than the selection.
        """
        place = self.place_of(number)
        own = None if place is None else self.conversation(self.selection.dataset, place)
        if self.pool is None:
            return own
        found = self.conversation(self.pool, number)
        if own is not None and exact_key(own) != exact_key(found):
            raise NeuronSelectError(
                f"its row {number} is not the selection's row {place}, which is from {self.made.pool.id} at "
                f"{self.made.pool.commit}: name that one", option="pool",
            )  # fmt: skip
        return found

    # ------------------------------------------------------------------------------------- signals
    @cached_property
    def stored(self) -> dict[str, str]:
        """Signal -> identity, of what the store has: all that a score needs, or nothing."""
        if self.store is None:
            return {}
        expected = self.selector.identities
        compact = (
            self.method.compact_signals([self.selector.scored_against[self.target]]) if self.method.needs_target else ()
        )
        for wanted in ([one for one in signals_of(self.method.signals) if one.stored], compact):
            if wanted and all(one.name in self.store.identities for one in wanted):
                return {one.name: self._identity(one.name, expected.get(one.name)) for one in wanted}
        return {}

    def _identity(self, signal: str, expected: str | None) -> str:
        """Under which identity the store has a signal.

        Raises:
            NeuronSelectError: of another model or SAE than the selection's.
        """
        assert self.store is not None
        try:
            return self.store.identity_of(signal, expected)
        except NeuronSelectError as cause:
            record = self.made.extractor
            used = ", ".join(f"{one.id} at {one.commit}" for one in (record.model, record.sae) if one) if record else ""
            message = f"{cause.message} (the selection was made with {used})" if used else cause.message
            raise NeuronSelectError(message, option="features", value=self.store.folder.name) from cause

    def row(self, number: int) -> RowBatch:
        """The signals of a row of the pool, from the store or else computed.

        Raises:
            NeuronSelectError: it has none, and why; its text is not at hand.
        """
        columns: dict[str, Any] = {}
        if self.stored and self.store is not None:
            tables = row_of(self.store, self.stored, number)
            if why := skips_of(tables)[0]:
                raise NeuronSelectError(f"has no {', '.join(self.stored)}: {why}", option="row", value=number)
            columns |= columns_of(tables)
        if missing := self.missing:
            columns |= self._computed(number, missing)
        return RowBatch(np.asarray([number]), np.ones(1, bool), columns)

    def read_ahead(self, numbers: Sequence[int]) -> None:
        """Compute in one pass what a store lacks of these rows; those whose text is not at hand are left out."""
        new = [number for number in numbers if number not in self._ahead]
        at_hand = [number for number in new if self.pool is not None or self.place_of(number) is not None]
        if self.missing and at_hand:
            self.compute(at_hand, self.missing)

    def compute(self, numbers: Sequence[int], signals: Sequence[Signal]) -> RowBatch:
        """Signals of rows of the pool, in one pass; rows that can be used are remembered.

        Args:
            signals: with all that a store lacks.
        """
        found = RowBatch.join([batch.rows for batch in self.reader(signals).read(self._texts(numbers))])
        rows = RowBatch(np.asarray(numbers, np.int64), found.usable, found.columns).only_usable()
        self._ahead |= {int(number): rows.take(np.asarray([i])) for i, number in enumerate(rows.index)}
        return rows

    @property
    def missing(self) -> list[Signal]:
        """Signals that are computed: those that no store has."""
        return [one for one in signals_of(self.method.signals) if not (self.stored and one.stored)]

    def _texts(self, numbers: Sequence[int]) -> Dataset:
        """Rows of the pool, by the pool or else by the selection."""
        if self.pool is not None:
            return self.pool.select(numbers)
        data, places = self.selection.dataset, [self.place_of(number) for number in numbers]
        if None in places:
            number = numbers[places.index(None)]
            raise NeuronSelectError(f"row {number} was not selected: give the pool, which has its text", option="pool")
        data = data.remove_columns([c for c in data.column_names if c.startswith("neuron_") or c == "source_index"])
        return data.select(places)

    def _computed(self, number: int, signals: Sequence[Signal]) -> Mapping[str, Any]:
        if number in self._ahead:
            return self._ahead[number].columns
        batch = next(iter(self.reader(signals).read(self._texts([number]))))
        if not batch.rows.usable[0]:
            raise NeuronSelectError(f"cannot be read: {batch.skips[0]}", option="row", value=number)
        return batch.rows.columns

    # ------------------------------------------------------------------------------------- the target
    @cached_property
    def finished(self) -> Target:
        """What rows are scored by, after the pool was seen, where the method looks at it.

        Raises:
            NeuronSelectError: it does, and the pool is not at hand.
        """
        fitted: Target = self.selector.scored_against[self.target]
        if self.pool is not None and self.method is self.selector.method:
            self.method = prepared(self.method, self.pool, self.made.pool, self._given or self.selector.extractor)
        if not self.method.observes:
            return fitted
        if (known := self.selection.finished.get(self.target)) is not None:
            return known
        if self.pool is None:
            raise NeuronSelectError(
                f"{self.method.name} weighs a row by the whole pool, which a selection does not keep: give the pool",
                option="pool",
            )
        reader = self.reader(self.method.signals, store=self.store if self.stored else None)
        return observe_pool(self.pool, reader, self.method, {self.target: fitted}, Tally())[self.target]

    @cached_property
    def exemplars(self) -> RowBatch | None:
        """The exemplars' signals; None where they are not at hand, or the method does not tell them.

        Raises:
            NeuronSelectError: they are others than those that the target was fitted on.
        """
        method = self.method.of if isinstance(self.method, EachExemplar) else self.method
        names = tuple(dict.fromkeys([*exemplar_signals(method), *method.signals]))
        kept = self.selector.kept.get(self.target)
        if self.examples is self.selector.examples.get(self.target) and kept is not None and method.tells_exemplars:
            if all(column in kept for signal in signals_of(names) for column in column_names(signal)):
                return kept
        runs = any(signal.engine != "text" for signal in signals_of(method.signals))
        if self.examples is None or not method.tells_exemplars or (runs and self.extractor is None):
            return None
        reader = self.reader(names, option="target")
        found = RowBatch.join([batch.rows.only_usable() for batch in reader.read(self.examples)])
        fitted, again = self.selector.scored_against[self.target], self.method.fit(found)
        same = fitted.keys() == again.keys() and all(
            fitted[name].shape == again[name].shape and np.allclose(fitted[name], again[name], rtol=NEAR, atol=1e-3)
            for name in fitted
        )
        if not same:
            record = self.selector.exemplars.get(self.target)
            was = record.source.id if record and record.source else "others"
            raise NeuronSelectError(
                f"these {len(found)} exemplars are not the {record.used if record else ''} of {was} that it was fitted on: name "
                "those", option="target", value=self.target,
            )  # fmt: skip
        return found
