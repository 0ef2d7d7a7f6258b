"""Reading a pool or exemplars batch by batch, with the signals that a method needs."""

from __future__ import annotations

import lzma
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from datasets.table import CastError

from ..core.cost import Cost, Meter
from ..core.errors import NeuronSelectError
from ..core.options import ExtractionOptions
from ..core.prefetch import ahead
from ..rows.formats import Conversation, Row, RowFormat, read_row, row_format, rows_of
from ..rows.media import undecoded
from ..signals.base import BOOKKEEPING, SIGNALS, Signal, signals_of, unpack_identities
from ..signals.columns import RowBatch
from ..signals.extraction import Extraction
from ..signals.extractor import NeuronFeatureExtractor
from ..store.store import FeatureStore, columns_of, skips_of

BATCH_ROWS = 2000
# What the libraries raise for a damaged file, or one whose rows have no common type.
_UNREADABLE = (pa.ArrowException, CastError, DatasetGenerationError, UnicodeDecodeError, EOFError, OSError, zlib.error,
               lzma.LZMAError)  # fmt: skip
_DEFAULT = Extraction(ExtractionOptions())  # names of columns are the same for all options
_COMPACT = re.compile(r"\w+_on_[0-9a-f]{16}(_indices|_values)?")


def column_names(signal: Signal) -> list[str]:
    """The columns of a signal."""
    return list(signal.types(_DEFAULT))


def added_columns(names: Sequence[str]) -> list[str]:
    """Which of the columns an extractor added."""
    if "neuron_signals" not in names:
        return []
    ours = {column for name in SIGNALS.names() for column in column_names(SIGNALS[name]())} | set(BOOKKEEPING)
    return [name for name in names if name in ours or _COMPACT.fullmatch(name)]


def own_columns(names: Sequence[str]) -> list[str]:
    """The data's own columns, without those an extractor added."""
    added = set(added_columns(names))
    return [name for name in names if name not in added]


@dataclass
class Batch:
    """Some consecutive rows.

    Attributes:
        rows: their signals. skips: why a row has not all of them, else "".
        n_tokens: int64 ``[n]``, -1 where it is not known. truncated: bool ``[n]``.
        conversations: the rows as read, if they were. raw: the rows as they came, of a stream.
        seconds: time to read and to compute them.
    """

    rows: RowBatch
    skips: Sequence[str]
    n_tokens: np.ndarray
    truncated: np.ndarray
    conversations: Sequence[Conversation]
    raw: list[Row] | None
    seconds: float

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class Plan:
    """Where each signal comes from."""

    stored: dict[str, str] = field(default_factory=dict)  # signal -> identity
    columns: list[Signal] = field(default_factory=list)
    computed: list[Signal] = field(default_factory=list)
    extractor: NeuronFeatureExtractor | None = None

    @property
    def needs_model(self) -> bool:
        """Whether an engine with weights runs."""
        return any(signal.engine != "text" and signal.name != "tokens" for signal in self.computed)


@dataclass
class Reader:
    """Reads data with the signals a method needs: from a store, from its own columns, else by an extractor.

    Args:
        names: signals needed. optional: taken along where they are there or can be computed.
        extractor: computes what is missing. store: has signals of the data's rows.
        expect: signal -> identity it must have; identities seen are added.
        compact: smaller signals that replace those needed, where the data has all of them.
        needs_rows: whether the rows themselves are needed, besides their signals.
        option, name: what errors call the data.

    Raises:
        NeuronSelectError: signals missing and no extractor; signals of another extraction or of other rows; no rows.
    """

    names: Sequence[str | Signal]
    extractor: NeuronFeatureExtractor | None
    expect: dict[str, str]
    option: str = "pool"
    name: str | None = None
    optional: Sequence[str] = ()
    compact: Sequence[Signal] = ()
    needs_rows: bool = True
    store: FeatureStore | None = None
    meters: dict[str, Meter] = field(default_factory=dict)
    reused: Cost = field(default_factory=Cost)

    def cost(self) -> Cost:
        """What was computed while reading, and what stored signals had cost before."""
        found = self.reused
        for meter in self.meters.values():
            found = found.merge(meter.cost())
        return found

    # ------------------------------------------------------------------------------------ planning
    def plan(self, names: Sequence[str], *, bare: bool = False) -> Plan:
        """Where each signal comes from, for data with these columns.

        Args:
            bare: only the signals needed; lengths are not counted.

        Raises:
            NeuronSelectError: a signal cannot be had, or only from another extraction.
        """
        wanted = list(signals_of(self.names))
        if self.compact and not all(self._there(s, names) for s in wanted):
            if all(self._there(signal, names) for signal in self.compact):
                wanted = list(self.compact)
        plan = Plan()
        for signal in wanted:
            self._add(plan, signal, names, needed=True)
        for signal in () if bare else signals_of([*self.optional, "tokens"]):
            if signal not in wanted:
                self._add(plan, signal, names, needed=False)
        if plan.computed:
            maker = self._maker()
            if bare and all(signal.engine == "text" for signal in plan.computed):  # no row need be tokenised
                maker = NeuronFeatureExtractor.without_model(maker.extraction.options, ())
            plan.extractor = maker.with_features(plan.computed)
            for signal in plan.computed:
                self._agree(signal.name, plan.extractor.identity(signal), "the extractor's")
        return plan

    def whole(self, names: Sequence[str]) -> bool:
        """Whether rows come with the signals asked for, not with smaller ones in their place."""
        return not self.compact or not all(self._there(s, names) for s in self.compact) or all(
            self._there(s, names) for s in signals_of(self.names)
        )  # fmt: skip

    def _there(self, signal: Signal, names: Sequence[str]) -> bool:
        if self.store is not None:
            return signal.name in self.store.identities
        return "neuron_signals" in names and all(name in names for name in column_names(signal))

    def _add(self, plan: Plan, signal: Signal, names: Sequence[str], *, needed: bool) -> None:
        has_model = self.extractor is not None and self.extractor.extraction.model is not None
        if self._there(signal, names):
            if self.store is None:
                plan.columns.append(signal)
                return
            try:
                identity = self.store.identity_of(signal.name, self._expected(signal))
            except NeuronSelectError:
                if needed:
                    raise
                return
            self._agree(signal.name, identity, "the store's")
            plan.stored[signal.name] = identity
        elif not signal.stored or (has_model and (self.store is None or signal.name == "tokens")):
            plan.computed.append(signal)
        elif needed:
            raise self._absent(signal, names)

    def _expected(self, signal: Signal) -> str | None:
        if signal.name in self.expect:
            return self.expect[signal.name]
        if self.extractor is not None and self.extractor.extraction.model is not None:
            return self.extractor.identity(signal)
        return None

    def _maker(self) -> NeuronFeatureExtractor:
        return self.extractor or NeuronFeatureExtractor.without_model(ExtractionOptions(), ())

    def _absent(self, signal: Signal, names: Sequence[str]) -> NeuronSelectError:
        wanted = ", ".join(column_names(signal))
        there = names if self.store is None else list(self.store.identities)
        if other := [name for name in there if _COMPACT.fullmatch(name) and name.startswith(f"{signal.name}_on_")]:
            wanted += f"; it has projections on other directions than this capability's ({', '.join(other)})"
        if self.store is None:
            return NeuronSelectError(
                f"the data has no columns {wanted}: map it with a NeuronFeatureExtractor first, or pass extractor="
            )
        return NeuronSelectError(
            f"the store has no signal {signal.name} ({wanted}): run `neuronselect extract` into it with the method, or "
            "the capability, that you select by",
            option="features", value=self.store.folder.name,
        )  # fmt: skip

    def _agree(self, name: str, found: str, whose: str) -> None:
        expected = self.expect.setdefault(name, found)
        if found != expected:
            raise NeuronSelectError(
                f"{whose} {name} comes from another extraction than the target's ({found}, the target's {expected}): "
                "model, SAE, layer, K, template and tokens must be the same; extract both with one extractor"
            )

    # ------------------------------------------------------------------------------------- reading
    def read(self, data: Dataset | IterableDataset, *, bare: bool = False) -> Iterator[Batch]:
        """The data's rows in order; see the class for what is raised.

        Args:
            bare: with the signals needed and nothing else, as for a pass before rows are scored.
        """
        names = list(data.column_names or [])
        stream = self._raw(data) if isinstance(data, IterableDataset) else iter(())
        if not names:  # looked up in the first rows, which are not read again: a stream may run only once
            first = list(islice(stream, 1))
            names, stream = list(dict.fromkeys(chain(*chain(*first)))), chain(first, stream)
        if self.store is not None:
            self._check_store(self.store, data)
        plan = self.plan(names, bare=bare)
        if self.store is not None:
            self.reused = self.reused.merge(self.store.cost(plan.stored))
        own = own_columns(names)
        options = (plan.extractor or self._maker()).extraction.options
        fmt = row_format(own, options.row_format, options.columns)
        # Without any signal at hand, the rows themselves say how many they are and which can be used.
        used = fmt.used if self.needs_rows or plan.computed or not (plan.columns or plan.stored) else []
        position, started = 0, time.perf_counter()

        def prepare(chunk: _Chunk) -> tuple[_Chunk, list[Conversation], Any]:
            nonlocal fmt
            if isinstance(data, IterableDataset):  # later rows may have other columns
                own.extend(sorted(set(chain(*chunk.raw)).difference(names, own)))
                fmt = row_format(own, fmt.name, options.columns)
            conversations = [read_row(row, fmt) for row in chunk.raw] if used else []
            return chunk, conversations, plan.extractor.prepare(conversations) if plan.extractor else None

        parts = self._chunks(data, plan, used, fmt) if isinstance(data, Dataset) else _of_stream(stream, plan)
        for chunk, conversations, prepared in ahead(parts, prepare):
            columns = dict(chunk.columns)
            skips = [list(chunk.skips)] if chunk.skips else []
            if plan.extractor is not None:
                found = plan.extractor.compute(prepared, meters=self.meters)
                columns |= found.columns
                skips += list(found.skips.values())
            if not skips:
                skips = [[c.skip for c in conversations]]
            for identities in chunk.identities:
                for signal in plan.columns:
                    self._agree(signal.name, unpack_identities(identities).get(signal.name, "none"), "the data's")
            reasons = [next((skip for skip in of_row if skip), "") for of_row in zip(*skips, strict=True)]
            n = len(reasons)
            usable = np.asarray([not reason for reason in reasons], dtype=bool)
            rows = RowBatch(np.arange(position, position + n), usable, columns)
            n_tokens = _numbers(columns["n_tokens"], np.int64) if "n_tokens" in columns else np.full(n, -1)
            truncated = _numbers(columns["truncated"], bool) if "truncated" in columns else np.zeros(n, bool)
            raw = chunk.raw if isinstance(data, IterableDataset) else None
            now = time.perf_counter()
            yield Batch(rows, reasons, n_tokens, truncated, conversations, raw, now - started)
            started = time.perf_counter()
            position += n
        if position == 0:
            raise NeuronSelectError("there are no rows", option=self.option, value=self.name)

    def _check_store(self, store: FeatureStore, data: Dataset | IterableDataset) -> None:
        name = store.folder.name
        if not isinstance(data, Dataset):
            raise NeuronSelectError("a store is of a whole pool, not of a stream", option="features", value=name)
        if len(store) != len(data):
            raise NeuronSelectError(
                f"the store has {len(store)} rows, the pool {len(data)}: they are not the same rows; if rows were "
                "appended, run `neuronselect extract` again",
                option="features", value=name,
            )  # fmt: skip

    def _raw(self, data: IterableDataset) -> Iterator[list[Row]]:
        """The rows of a stream as they come, in lists.

        Raises:
            NeuronSelectError: a file behind the stream cannot be read.
        """
        rows, read = iter(undecoded(data)), 0
        while True:
            try:
                part = list(islice(rows, BATCH_ROWS))
            except _UNREADABLE as cause:
                reason = " ".join(f"{type(cause).__name__} {cause}".split())[:200]
                raise NeuronSelectError(
                    f"the stream breaks off after row {read} or later: {reason}", option=self.option, value=self.name
                ) from cause
            if not part:
                return
            yield part
            read += len(part)

    def _chunks(self, data: Dataset, plan: Plan, used: list[str], fmt: RowFormat) -> Iterator[_Chunk]:
        columns = _columns_of(plan)
        texts = data.with_format(None).select_columns(used)
        if self.store is not None and plan.stored:
            start = 0
            for tables in self.store.batches(plan.stored, data, fmt, BATCH_ROWS):
                skips = skips_of(tables)
                stop = start + len(skips)
                yield _Chunk(rows_of(texts[start:stop]) if used else [], columns_of(tables), skips, set())
                start = stop
            return
        table = data.with_format("arrow").select_columns(columns) if columns else None
        for start in range(0, len(data), BATCH_ROWS):
            n = min(BATCH_ROWS, len(data) - start)
            arrow = table[start : start + n] if table is not None else None
            found = {name: arrow.column(name) for name in columns} if arrow is not None else {}
            yield _chunk(rows_of(texts[start : start + n]) if used else [], found)


def _columns_of(plan: Plan) -> list[str]:
    """Columns of signals that the data has."""
    columns = [column for signal in plan.columns for column in column_names(signal)]
    return [*columns, *BOOKKEEPING] if columns else []


def _of_stream(parts: Iterator[list[Row]], plan: Plan) -> Iterator[_Chunk]:
    columns = _columns_of(plan)
    for rows in parts:
        yield _chunk(rows, {name: [row[name] for row in rows] for name in columns})


@dataclass
class _Chunk:
    """Rows and the columns that are there already."""

    raw: list[Row]
    columns: Mapping[str, Any]
    skips: list[str]
    identities: set[str]


def _chunk(raw: list[Row], columns: Mapping[str, Any]) -> _Chunk:
    rest = {name: column for name, column in columns.items() if name not in BOOKKEEPING}
    if not columns:
        return _Chunk(raw, rest, [], set())
    return _Chunk(raw, rest, _python(columns["neuron_skip"]), set(_python(columns["neuron_signals"])))


def _python(column: Any) -> list[Any]:
    return column.to_pylist() if hasattr(column, "to_pylist") else list(column)


def _numbers(column: Any, dtype: type) -> np.ndarray:
    return np.asarray(column.to_numpy() if isinstance(column, pa.ChunkedArray) else list(column), dtype=dtype)
