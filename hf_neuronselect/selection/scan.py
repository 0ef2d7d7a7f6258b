"""Reading a pool or exemplars batch by batch: rows, features, scores and what is left out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm

from ..core.cost import Meter
from ..core.errors import NeuronSelectError
from ..core.prefetch import ahead
from ..methods import Method
from ..methods.base import Target
from ..rows.formats import Conversation, read_row, row_format, rows_of
from ..rows.leakage import Leakage, Seen, key
from ..signals.columns import BOOKKEEPING, FeatureBatch
from ..signals.extractor import NeuronFeatureExtractor
from ..signals.forward import FEATURES, PROJECTION
from ..store.store import FeatureStore

# Codes of `excluded`, in the order they are decided.
EXCLUDED = ("", "empty", "error", "duplicate", "leak", "null")
_EMPTY, _ERROR, _DUPLICATE, _LEAK, _NULL = range(1, 6)
BATCH_ROWS = 2000
_OF_SKIP = {"": 0, "empty": _EMPTY}  # of what skipped a row; all else is an error
_NAMED_ERRORS = 5


def feature_columns(features: Sequence[str]) -> list[str]:
    """The columns these features are kept in."""
    found: list[str] = []
    for name in features:
        sparse = not name.startswith(PROJECTION) and FEATURES[name].sparse
        found += [f"{name}_indices", f"{name}_values"] if sparse else [name]
    return found


def added_columns(column_names: Sequence[str]) -> list[str]:
    """Which of the columns an extractor added."""
    if "neuron_extractor" not in column_names:
        return []
    ours = set(feature_columns(FEATURES.names())) | set(BOOKKEEPING)
    return [name for name in column_names if name in ours or name.startswith(PROJECTION)]


@dataclass
class Batch:
    """Some consecutive rows: their features, why some have none, and their texts if they were read."""

    features: FeatureBatch
    truncated: np.ndarray
    skips: Sequence[str]
    conversations: list[Conversation]
    rows: list[dict[str, Any]] | None = None  # only of streams, whose rows cannot be read again


@dataclass
class Reader:
    """Reads data as a method needs it: from a store or feature columns if they are there, else by an extractor.

    Args:
        names: the features needed. optional: taken along where they are there or can be computed.
        projections: columns that do instead of the features, where the data has all of them.
        extractor: used where columns are missing. store: has the features of the data's rows.
        expect: hash the features must have come from; None takes what stands in the data.
        needs_rows: whether what is said in the rows is asked for, besides their features.

    Raises:
        NeuronSelectError: columns missing and no extractor; features of another extractor or of other rows; no rows.
    """

    names: Sequence[str]
    extractor: NeuronFeatureExtractor | None
    expect: str | None
    option: str = "pool"
    optional: Sequence[str] = ()
    needs_texts: bool = False
    needs_lengths: bool = True
    projections: Sequence[str] = ()
    needs_rows: bool = True
    store: FeatureStore | None = None

    def __post_init__(self) -> None:
        self.hash = self.expect
        self.meter = Meter("forward" if self.names else "text", self.names)  # of what is computed here, not read

    def read(self, data: Dataset | IterableDataset) -> Iterator[Batch]:
        names = list(data.column_names or [])
        if isinstance(data, IterableDataset) and not names:
            names = list(next(iter(data), {}))
        if self.store is not None:
            self._check_store(self.store, data)
        wanted = self._there(names if self.store is None else self.store.column_names)
        computed = wanted is not None
        if not computed and (self.store is not None or self.extractor is None and (self.names or self.needs_lengths)):
            raise self._absent(names)
        if not computed and self.extractor is not None:
            self._check(self.extractor.hash, "the extractor given")
        own = [name for name in names if name not in added_columns(names)]
        settings = self.extractor.config if self.extractor is not None else None
        fmt = row_format(own, settings.row_format, dict(settings.columns)) if settings else row_format(own)
        extractor = self.extractor.with_features([*self.names, *self.optional]) if self.extractor else None
        used = fmt.used if self.needs_rows or self.needs_texts or not computed else []

        def prepare(chunk: tuple[list[dict[str, Any]], dict[str, Any]]) -> Any:
            rows, columns = chunk
            conversations = [read_row(row, fmt) for row in rows] if used else []
            return rows, columns, conversations, extractor.tokenize(conversations) if extractor and not computed else []

        position = 0
        chunks = _chunks(data, used, [*wanted, *BOOKKEEPING] if wanted is not None else [], self.store)
        for rows, columns, conversations, samples in ahead(chunks, prepare):
            if not computed:
                with self.meter.stage("compute"):
                    columns = extractor.compute(samples) if extractor else _without_features(conversations)
                lengths = _numbers(columns["n_tokens"], np.int64)
                self.meter.add_tokens(int(lengths[lengths > 0].sum()))
                self.meter.add_rows(len(lengths))
            skips = _python(columns["neuron_skip"])
            n = len(skips)
            if computed:
                for found in set(_python(columns["neuron_extractor"])):
                    self._check(found, "the data's features")
            features = FeatureBatch(
                index=np.arange(position, position + n),
                n_tokens=_numbers(columns["n_tokens"], np.int64),
                usable=np.asarray([not skip for skip in skips], dtype=bool),
                columns=columns,
                texts=[c.content() for c in conversations] if self.needs_texts else (),
            )
            truncated = _numbers(columns["truncated"], bool)
            raw = rows if isinstance(data, IterableDataset) else None
            yield Batch(features, truncated, skips, conversations, raw)
            position += n
        if position == 0:
            raise NeuronSelectError("there are no rows", option=self.option)

    def _there(self, names: Sequence[str]) -> list[str] | None:
        """The feature columns to read of those there are; None if what is needed is not there."""
        wanted = feature_columns(self.names)
        if all(name in names for name in (*wanted, *BOOKKEEPING)):
            return wanted + [name for name in feature_columns(self.optional) if name in names]
        if self.projections and all(name in names for name in (*self.projections, *BOOKKEEPING)):
            return list(self.projections)
        return None

    def _absent(self, names: Sequence[str]) -> NeuronSelectError:
        wanted = ", ".join(feature_columns(self.names)) or "n_tokens"
        there = names if self.store is None else self.store.column_names
        if other := [name for name in there if name.startswith(PROJECTION)]:
            wanted += f"; it has projections on other directions than this capability's ({', '.join(other)})"
        if self.store is None:
            return NeuronSelectError(
                f"the data has no feature columns {wanted}: map it with a NeuronFeatureExtractor first, or pass extractor="
            )
        return NeuronSelectError(
            f"the store has no feature columns {wanted}: extract with the method, or the capability, that you select by",
            option="features", value=self.store.folder.name,
        )  # fmt: skip

    def _check(self, found: str, whose: str) -> None:
        if self.hash is None:
            self.hash = found
        if found != self.hash:
            raise NeuronSelectError(
                f"{whose} come from extractor {found}, the target's from {self.hash}: model, SAE, layer, K, "
                "template and tokens must be the same; extract both with one extractor"
            )

    def _check_store(self, store: FeatureStore, data: Dataset | IterableDataset) -> None:
        name = store.folder.name
        if not isinstance(data, Dataset):
            raise NeuronSelectError("a store is of a whole pool, not of a stream", option="features", value=name)
        if len(store) != len(data):
            raise NeuronSelectError(
                f"the store has {len(store)} rows, the pool {len(data)}: they are not of the same rows",
                option="features", value=name,
            )  # fmt: skip
        self._check(store.manifest["extractor_hash"], "the store's features")


def _python(column: Any) -> list[Any]:
    return column.to_pylist() if hasattr(column, "to_pylist") else list(column)


def _numbers(column: Any, dtype: type) -> np.ndarray:
    return np.asarray(column.to_numpy() if isinstance(column, pa.ChunkedArray) else list(column), dtype=dtype)


def _without_features(conversations: Sequence[Conversation]) -> dict[str, Any]:
    n = len(conversations)
    return {
        "n_tokens": np.full(n, -1),
        "truncated": np.zeros(n, bool),
        "neuron_skip": [c.skip for c in conversations],
        "neuron_extractor": [""] * n,
    }


def _chunks(
    data: Dataset | IterableDataset, used: list[str], features: list[str], store: FeatureStore | None
) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Rows (of a map-style dataset only the ``used`` columns) and feature columns, a chunk at a time."""
    if isinstance(data, IterableDataset):
        for batch in data.iter(batch_size=BATCH_ROWS):
            yield rows_of(batch), {name: batch[name] for name in features}
        return
    texts = data.with_format(None).select_columns(used)
    start = 0
    for n, columns in _feature_chunks(data, features, store):
        yield rows_of(texts[start : start + n]) if used else [], columns
        start += n


def _feature_chunks(
    data: Dataset, features: list[str], store: FeatureStore | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """How many rows, at most ``BATCH_ROWS``, and their feature columns."""
    if store is not None:
        for group in store.tables(features):
            for start in range(0, len(group), BATCH_ROWS):
                part = group.slice(start, BATCH_ROWS)
                yield len(part), {name: part.column(name) for name in features}
        return
    table = data.with_format("arrow").select_columns(features) if features else None
    for start in range(0, len(data), BATCH_ROWS):
        n = min(BATCH_ROWS, len(data) - start)
        arrow = table[start : start + n] if table is not None else None
        yield n, {name: arrow.column(name) for name in features} if arrow is not None else {}


@dataclass
class Scored:
    """One batch, scored: what selection needs of it.

    Attributes:
        scores: target -> float64 ``[n]``, NaN where there is none. excluded: codes of :data:`EXCLUDED`.
    """

    index: np.ndarray
    scores: dict[str, np.ndarray]
    n_tokens: np.ndarray
    truncated: np.ndarray
    excluded: np.ndarray
    rows: list[dict[str, Any]] | None


@dataclass
class Tally:
    """What happened on the way: counts, a few reasons, seconds and tokens."""

    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    excluded: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EXCLUDED[1:], 0))
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0
    score_seconds: float = 0.0

    def add(self, scored: Scored, skips: Sequence[str]) -> None:
        self.rows += len(scored.index)
        self.tokens += int(scored.n_tokens[scored.n_tokens > 0].sum())
        self.truncated += int(scored.truncated.sum())
        for code, count in zip(*np.unique(scored.excluded, return_counts=True), strict=True):
            if code:
                self.excluded[EXCLUDED[code]] += int(count)
        for i, skip in enumerate(skips):
            if skip.startswith("error") and len(self.reasons) < _NAMED_ERRORS:
                self.reasons.append(f"row {int(scored.index[i])}: {skip.removeprefix('error: ')}")


def scan(
    data: Dataset | IterableDataset,
    reader: Reader,
    method: Method,
    targets: Mapping[str, Target],
    leakage: Leakage,
    exclude: Sequence[str],
    tally: Tally,
) -> Iterator[Scored]:
    """Score every row of ``data``, in order. Rows that cannot be selected carry why in ``excluded``."""
    seen = Seen()
    score = method.scorer(targets)
    started = time.perf_counter()
    total = len(data) if isinstance(data, Dataset) else None
    with tqdm(total=total, unit=" rows", desc=method.name, disable=None if sys.stderr.isatty() else True) as bar:
        for batch in reader.read(data):
            features, n = batch.features, len(batch.features)
            excluded = np.asarray([_OF_SKIP.get(skip, _ERROR) for skip in batch.skips], dtype=np.int8)
            if exclude:
                _mark_known(excluded, batch.conversations, leakage, exclude, seen)
            usable = np.flatnonzero(features.usable)
            scores = {name: np.full(n, np.nan) for name in targets}
            scoring = time.perf_counter()
            if len(usable):
                for name, found in score(features.only_usable()).items():
                    scores[name][usable] = found
            tally.score_seconds += time.perf_counter() - scoring
            for found in scores.values():
                excluded[(excluded == 0) & ~np.isfinite(found)] = _NULL
            scored = Scored(features.index, scores, features.n_tokens, batch.truncated, excluded, batch.rows)
            tally.add(scored, batch.skips)
            tally.seconds = time.perf_counter() - started
            bar.update(n)
            if reader.meter.tokens:  # none where all signals were stored
                bar.set_postfix_str(f"{reader.meter.tokens / tally.seconds:,.0f} tokens/s")
            yield scored


def _mark_known(
    excluded: np.ndarray, conversations: Sequence[Conversation], leakage: Leakage, exclude: Sequence[str], seen: Seen
) -> None:
    """Exemplars and rows that were ``seen`` before, among those not excluded yet."""
    rows = np.flatnonzero(excluded == 0).tolist()
    keys = [key(conversations[i].content()) for i in rows]
    before, new = seen.contains(keys), set[bytes]()
    for i, row_key, known in zip(rows, keys, before.tolist(), strict=True):
        if "leak" in exclude and leakage.find(conversations[i], row_key):
            excluded[i] = _LEAK
        elif "duplicate" in exclude and (known or row_key in new):
            excluded[i] = _DUPLICATE
        if not known:
            new.add(row_key)
    seen.add(new)
