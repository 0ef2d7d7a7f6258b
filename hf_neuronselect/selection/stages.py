"""What a method does before rows are scored: work done once, and signals kept for a second reading."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import uuid
from collections.abc import Iterator

from datasets import Dataset, IterableDataset

from ..core.digests import cache_dir
from ..core.errors import NeuronSelectError
from ..core.provenance import SourceRecord
from ..methods.base import Method, vector_signal
from ..methods.each import EachExemplar
from ..pickers.base import Picker
from ..rows.identity import pool_digest
from ..signals.base import SIGNALS
from ..signals.extractor import NeuronFeatureExtractor
from ..store.store import FeatureStore, write_store
from .auto_ratio import feature_signal
from .reader import Reader


def prepared(
    method: Method, pool: Dataset | IterableDataset, source: SourceRecord, extractor: NeuronFeatureExtractor | None
) -> Method:
    """The method after its :meth:`~hf_neuronselect.methods.Method.prepare`.

    Its folder belongs to the pool's content; a stream of which nothing is known gets a folder of its own.
    """
    if type(method).prepare is Method.prepare:
        return method
    what = pool_digest(pool) if isinstance(pool, Dataset) else source.commit or uuid.uuid4().hex
    work = cache_dir() / "prepared" / hashlib.blake2b(what.encode(), digest_size=8).hexdigest()
    work.mkdir(parents=True, exist_ok=True)
    return method.prepare(pool, extractor, work)


def check_compared(method: Method, picker: Picker) -> None:
    """Refuse a picker that compares rows by a signal without vectors.

    Raises:
        NeuronSelectError: so it is.
    """
    for signal in vector_signal(method, picker):
        if not SIGNALS[signal].has_vector:
            raise NeuronSelectError(
                f"compares rows by vectors, and {signal} has none: name another signal, e.g. {picker.name}(by=hidden)",
                option="picker", value=str(picker),
            )  # fmt: skip


def opened(
    method: Method,
    picker: Picker,
    pool: Dataset | IterableDataset,
    source: SourceRecord,
    reader: Reader,
    auto: bool = False,
) -> tuple[Method, tuple[str, ...]]:
    """The method as it scores a pool, and the signal whose vectors are kept, which the reader then reads too.

    Args:
        auto: whether a ratio is estimated: features are then kept also where the picker does not compare rows.
    """
    ready = prepared(method, pool, source, reader.extractor)
    compared = vector_signal(ready, picker) or (feature_signal(ready) if auto else ())
    reader.names = (*reader.names, *compared)
    reader.compact = () if compared else reader.compact
    return EachExemplar(ready) if picker.each else ready, compared


@contextlib.contextmanager
def spooled(method: Method, pool: Dataset | IterableDataset, reader: Reader) -> Iterator[None]:
    """For a method that observes the pool, whose rows are read again: what a model computes is kept in a temporary store."""
    if not method.observes or not isinstance(pool, Dataset) or reader.store is not None:
        yield
        return
    plan = reader.plan(pool.column_names)
    if not plan.needs_model or plan.extractor is None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="neuronselect-") as folder:
        write_store(pool, plan.extractor, folder, pool_about={})
        reader.store = FeatureStore(folder)
        yield
