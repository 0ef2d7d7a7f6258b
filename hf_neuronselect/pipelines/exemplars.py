"""Exemplars of a comparison: models read them once for all methods, and the next run reads what they computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from ..core.configs import CompareConfig
from ..core.progress import untracked
from ..rows.identity import pool_digest
from ..rows.load import Rows
from ..signals.base import Signal, signals_of
from ..signals.extractor import NeuronFeatureExtractor
from ..store.store import FeatureStore, write_store
from .failures import Failures
from .job import Job
from .methods import Chosen
from .parts import Say, extractor_of, quiet

TRIED = 4
"""Rows of the pool that a method is tried on once a pass has failed."""


def signals_to_keep(chosen: Chosen) -> list[Signal]:
    """Signals that a method reads of exemplars and that are worth keeping."""
    return [signal for signal in signals_of(chosen.exemplar_signals) if signal.stored]


def read_exemplars(
    methods: Sequence[Chosen], targets: Mapping[str, Rows], folder: Path, config: CompareConfig, note: Say
) -> tuple[NeuronFeatureExtractor, dict[str, FeatureStore]]:
    """The extractor of all methods, and a store of each target's signals, which it computes in one pass an engine.

    Rows that have columns of these names have no store: they are the user's, and each method computes its own.

    Args:
        folder: of the stores, which are named by their rows: a rerun computes what is missing.
    """
    extractor = extractor_of(config, list(dict.fromkeys(one for chosen in methods for one in chosen.signals)), note)
    reading = extractor.with_features([signal for chosen in methods for signal in signals_to_keep(chosen)])
    found = {}
    for name, rows in targets.items():
        assert isinstance(rows.data, Dataset)
        if set(reading.column_types) & set(rows.data.column_names) or not any(one.stored for one in reading.computed):
            continue
        place = folder / pool_digest(rows.data)[:16]
        write_store(rows.data, reading, place, pool_about=rows.about, say=None, what=f"exemplars of {name}")
        found[name] = FeatureStore(place)
    return extractor, found


def with_signals(rows: Rows, chosen: Chosen, extractor: NeuronFeatureExtractor, store: FeatureStore | None) -> Rows:
    """Exemplars with the columns that a method reads of them. It leaves out those that lack one of its own signals."""
    if store is None:
        return rows
    assert isinstance(rows.data, Dataset)
    kept = {signal.name: extractor.identity(signal) for signal in signals_of(["tokens", *signals_to_keep(chosen)])}
    made = store.dataset(*kept, identities=kept)
    # beside the rows' own columns as they are: an older `datasets` cannot write JSON columns again
    return Rows(concatenate_datasets([rows.data, made], axis=1), rows.about)


def able_on_pool(jobs: Mapping[str, Job], failures: Failures) -> list[str]:
    """The methods, by their labels, that can read the first rows of the pool: their judges answer, their models can be had."""
    found = []
    for label, job in jobs.items():
        with failures.noted(label):
            assert job.extractor is not None and isinstance(job.rows.data, Dataset)
            with untracked():
                job.extractor(job.rows.data[:TRIED])
            found.append(label)
    return found


def able(
    methods: Sequence[Chosen], targets: Mapping[str, Rows], config: CompareConfig, failures: Failures
) -> list[Chosen]:
    """The methods whose signals can be computed, tried on one exemplar of each target.

    Raises:
        NeuronSelectError: there are none.
    """
    found = []
    for chosen in methods:
        with failures.noted(chosen.label):
            reading = extractor_of(config, chosen.signals, quiet).with_features(signals_to_keep(chosen))
            for rows in targets.values():
                assert isinstance(rows.data, Dataset)
                if not set(reading.column_types) & set(rows.data.column_names):
                    reading(rows.data[:1])
            found.append(chosen)
    failures.check(found)
    return found
