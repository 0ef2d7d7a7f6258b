"""Compute a pool's signals into a feature store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from datasets import Dataset

from ..core.configs import CAPABILITY, ExtractConfig
from ..core.errors import NeuronSelectError
from ..core.folders import STORE
from ..core.writing import check_folder
from ..rows.load import load_again, load_rows
from ..selection.library import load_capability
from ..signals.base import SIGNALS, Signal
from ..signals.extractor import NeuronFeatureExtractor
from ..store.store import FeatureStore, write_store
from .job import check_rows
from .methods import methods_to_extract, signals_read
from .parts import Say, extractor_of, quiet


def extract(config: ExtractConfig, *, say: Say = quiet, note: Say = quiet) -> FeatureStore | None:
    """Compute signals of every row of a pool, resuming an unfinished store.

    Returns:
        The store, or None while shards of other jobs are missing.

    Raises:
        NeuronSelectError: bad input, or a store of another pool or model.
    """
    methods = methods_to_extract(config)
    check_folder(config.out, STORE)
    texts = tuple(config.columns.values())
    rows = load_rows(config.pool, texts=texts)
    assert isinstance(rows.data, Dataset)
    check_rows([rows], config)
    extractor = extractor_of(config, signals_read(methods), note)
    extractor = extractor.with_features(signals_read([chosen.prepared(rows, extractor) for chosen in methods]))
    if config.capability:
        extractor = extractor.with_features([*extractor.signals, *_compact(config.capability, extractor)])
    path = Path(config.pool)
    done = write_store(
        rows.data,
        extractor,
        config.out,
        pool_about=rows.about,
        shard_rows=config.shard_rows,
        shard=config.part,
        num_workers=config.processes,
        backend=config.backend,
        load_pool=partial(load_again, str(path.resolve()) if path.exists() else config.pool, rows.about, texts),
        say=note,
    )
    rate = f", {done['tokens'] / done['seconds']:,.0f} tokens/s" if done["tokens"] else ""
    say(
        f"{done['rows']} rows, {done['bytes'] / max(1, done['rows']):,.0f} bytes a row{rate}, "
        f"{done['skipped_shards']} shards were there already -> {config.out}"
    )
    if done["healed_shards"]:
        note(f"{done['healed_shards']} damaged shards were done again.")
    if done["missing_shards"]:
        note(f"{done['missing_shards']} shards are still missing; without --shard, extract makes what is missing.")
        return None
    return FeatureStore(config.out)


def _compact(specs: Sequence[str], extractor: NeuronFeatureExtractor) -> list[Signal]:
    """Signals that are enough to score saved capabilities.

    Raises:
        NeuronSelectError: a method without such signals, or a capability of another extraction.
    """
    found: list[Signal] = []
    for spec in specs:
        selector = load_capability(spec.removeprefix(CAPABILITY))
        signals = selector.compact_signals()
        if not signals:
            raise NeuronSelectError(
                f"is of method {selector.method.name}, whose signals cannot be made smaller; extract with --method "
                f"{selector.method.name}", option="capability", value=spec,
            )  # fmt: skip
        for name, identity in selector.identities.items():
            known = name in (one.name for one in signals) or name in SIGNALS.names()
            own = next((one for one in signals if one.name == name), name)
            if known and extractor.identity(own) != identity:
                raise NeuronSelectError(
                    f"its signal {name} is {identity}, the options here make {extractor.identity(own)}: model, layer, "
                    "template and tokens must be the same", option="capability", value=spec,
                )  # fmt: skip
        found += signals
    return found
