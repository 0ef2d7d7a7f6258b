"""Fitting one target: from exemplars to what a method keeps of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset, IterableDataset

from ..core.cost import Cost
from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.progress import track
from ..core.provenance import SourceRecord, TargetRecord
from ..methods.base import Method, Target
from ..rows.formats import Row
from ..rows.leakage import Leakage
from ..signals.base import Signal, signals_of
from ..signals.columns import RowBatch
from .doubts import Halves, fit_watched
from .reader import Reader, column_names


@dataclass(frozen=True)
class Fitted:
    """A target, how many exemplars it has, and what is left out of pools for their sake.

    Attributes:
        exemplars: those that it was fitted on, with their signals.
        halves: of the exemplars, to see whether one half finds the other; none where they cannot be scored.
    """

    target: Target
    exemplars: RowBatch
    record: TargetRecord
    leakage: Leakage
    halves: dict[str, Halves]
    cost: Cost


def fit_target(
    method: Method, name: str, data: Dataset | IterableDataset, reader: Reader, source: SourceRecord | None
) -> Fitted:
    """Read a target's exemplars and fit the method on those that can be used.

    Raises:
        NeuronSelectError: none can be used, or signals are missing or of another extraction.
    """
    parts: list[RowBatch] = []
    raw: list[Row] = []  # of a stream, which may run only once
    leakage, rows, reasons = Leakage(), 0, []
    total = len(data) if isinstance(data, Dataset) else None
    with track(f"exemplars of {name}", total, brief=True) as progress:
        for batch in reader.read(data):
            rows += len(batch)
            reasons += [skip for skip in batch.skips if skip]
            parts.append(batch.rows.only_usable())
            raw += batch.raw or ()
            leakage |= Leakage.of(batch.conversations)
            progress.done(len(batch))
    exemplars = RowBatch.join(parts)
    if len(exemplars) and (further := method.further_signals(exemplars)):
        again = data if isinstance(data, Dataset) else Dataset.from_list(raw, features=data.features)
        exemplars, more = _with_signals(name, exemplars, again.select(exemplars.index), further, reader)
        reasons += more
    usable = len(exemplars)
    if usable == 0:
        raise NeuronSelectError(
            f"no exemplar can be used ({reasons[0]}); give others", option=reader.option, value=name
        )
    if usable < rows:
        _warn(name, f"{rows - usable} of {rows} exemplars are left out ({reasons[0]}); mend or remove them")
    fitted, doubts = fit_watched(method, exemplars)
    for doubt in doubts:
        _warn(name, doubt)
    scorable = method.needs_target and method.judges_others and _has(exemplars, method.signals)
    return Fitted(
        target=fitted,
        exemplars=exemplars,
        record=TargetRecord(exemplars=rows, used=usable, source=source, doubts=doubts),
        leakage=leakage,
        halves=Halves.of(name, method, exemplars) if scorable else {},
        cost=reader.cost(),
    )


def _with_signals(
    name: str, rows: RowBatch, data: Dataset, signals: Sequence[Signal], reader: Reader
) -> tuple[RowBatch, list[str]]:
    """Rows with more signals, those that have all of them, and why others have not."""
    reading = replace(reader, names=signals, optional=(), expect={})
    found = []
    with track(f"further signals of {name}'s exemplars", len(data), brief=True) as progress:
        for batch in reading.read(data, bare=True):
            found.append(batch)
            progress.done(len(batch))
    more = RowBatch.join([batch.rows for batch in found])
    kept = np.flatnonzero(more.usable)
    both = rows.take(kept)
    return RowBatch(both.index, both.usable, {**both.columns, **more.take(kept).columns}), [
        skip for batch in found for skip in batch.skips if skip
    ]


def _has(rows: RowBatch, signals: Sequence[str]) -> bool:
    return all(column in rows for signal in signals_of(signals) for column in column_names(signal))


def _warn(name: str, why: str) -> None:
    warnings.warn(f"target {name}: {why}", NeuronSelectWarning, stacklevel=5)
