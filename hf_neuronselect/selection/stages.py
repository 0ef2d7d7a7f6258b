"""What a method does before rows are scored: work done once, and signals kept for a second reading."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import uuid
from collections.abc import Iterator

from datasets import Dataset, IterableDataset

from ..core.digests import cache_dir
from ..core.provenance import SourceRecord
from ..methods.base import Method
from ..rows.identity import pool_digest
from ..store.store import FeatureStore, write_store
from .reader import Reader


def prepared(method: Method, pool: Dataset | IterableDataset, source: SourceRecord) -> Method:
    """The method after its :meth:`~hf_neuronselect.methods.Method.prepare`.

    Its folder belongs to the pool's content; a stream of which nothing is known gets a folder of its own.
    """
    if type(method).prepare is Method.prepare:
        return method
    what = pool_digest(pool) if isinstance(pool, Dataset) else source.commit or uuid.uuid4().hex
    state = json.dumps([method.name, method.options, what], default=str)
    digest = hashlib.blake2b(state.encode(), digest_size=8).hexdigest()
    work = cache_dir() / "prepared" / f"{method.name}-{digest}"
    work.mkdir(parents=True, exist_ok=True)
    return method.prepare(pool, work)


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
