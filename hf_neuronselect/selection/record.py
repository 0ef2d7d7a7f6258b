"""Records of what a selector did, from its parts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

import numpy as np

from ..core.cost import Cost
from ..core.options import NumberOptions, part_of
from ..core.provenance import (
    AutoRatio,
    Budget,
    CapabilityRecord,
    Counts,
    ExtractionRecord,
    Lengths,
    MethodRecord,
    Provenance,
    SourceRecord,
    Timing,
    plain,
)
from ..core.spread import Spread
from ..hub.command import source_word
from ..methods import Method
from ..pickers import Picker, picker_of
from ..signals.base import Signal, signals_of
from ..signals.extractor import NeuronFeatureExtractor
from .scan import Tally

_PACKAGES = ("hf-neuronselect", "datasets", "transformers", "torch", "huggingface-hub", "numpy")


def method_record(method: Method, picker: Picker) -> MethodRecord:
    """A method as it is recorded: rows that options name are named without their folders, at their commit."""
    sources = method.sources()
    named = {name: source_word(source) for name, source in sources.items()}
    return MethodRecord(
        name=method.name, paper=method.paper or None, options=plain(method.options) | named, sources=sources,
        picker=None if str(picker) == str(picker_of(method.default_picker)) else str(picker),
    )  # fmt: skip


def extraction_record(extractor: NeuronFeatureExtractor, signals: Iterable[str | Signal]) -> ExtractionRecord:
    """How an extractor computes these signals."""
    extraction = extractor.extraction
    return ExtractionRecord(
        model=SourceRecord.of(extraction.model) if extraction.model else None,
        sae=SourceRecord.of(extraction.sae) if extraction.sae else None,
        **{name: SourceRecord.of(source) for name, source in extractor.beside.items()},
        options=NumberOptions(**part_of(extraction.options, NumberOptions)),
        signals={signal.name: extractor.identity(signal) for signal in signals_of(signals)},
        doubts=extractor.doubts,
    )


def selection_record(
    fitted: CapabilityRecord,
    *,
    capability: SourceRecord | None,
    pool: SourceRecord,
    budget: Budget,
    auto: AutoRatio | None,
    aggregate: str | None,
    weights: Mapping[str, float] | None,
    exclude: Sequence[str],
    spread: Spread | None,
    extractor: ExtractionRecord | None,
    tally: Tally,
    lengths: np.ndarray,
    selected: int,
    cost: Cost,
    passes: Cost,
) -> Provenance:
    """``selection.json`` of a selection.

    Args:
        capability: where the selector was loaded from. extractor: what computed the pool's signals.
        lengths: tokens of the selected rows, where they are known.
        cost: of fitting and scoring. passes: over the pool; those read from a store are marked as reused.
    """
    rate = passes.tokens_per_second()
    return Provenance(
        method=fitted.method,
        targets=fitted.targets,
        avoided=fitted.avoided,
        budget=budget,
        auto=auto,
        aggregate=aggregate,
        weights={name: float(weight) for name, weight in weights.items()} if weights else None,
        exclude=tuple(exclude),
        spread=spread or None,
        pool=pool,
        capability=capability,
        extractor=extractor,
        counts=Counts(
            rows=tally.rows,
            selected=selected,
            truncated=tally.truncated,
            **tally.excluded,
            reasons=tuple(tally.reasons),
        ),
        tokens=Lengths(
            pool_mean=round(tally.tokens / max(1, tally.rows), 2) if tally.tokens else None,
            selected_mean=mean_length(lengths) if tally.tokens else None,
        ),
        packages={name: version(name) for name in _PACKAGES},
        timing=Timing(
            seconds=round(tally.seconds, 3),
            tokens_per_second=round(rate) if rate else None,
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        ),
        cost=cost.merge(passes).folded(),
    )


def mean_length(lengths: np.ndarray) -> float | None:
    """Mean tokens of a row, to two digits; None of no rows."""
    return round(float(lengths.mean()), 2) if len(lengths) else None
