"""The probe engine: how a model's loss on a row changes when it takes one training step on each of some other rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import progress
from ..core.errors import NeuronSelectError
from ..models.batching import logits_budget
from ..models.loading import causal_lm_of, tokenizer_of
from ..models.probe import Prober
from ..rows.answers import AnswerEncoder
from ..rows.encode import Sample
from ..rows.formats import Conversation
from ..rows.leakage import exact_key
from .base import VERSION, Signal, digest
from .engine import Computed, Engine, register_engine
from .extraction import Extraction
from .forward import place_of

_BEFORE = "before"  # in the place of a row's key: no step was taken


@dataclass(frozen=True, eq=False)
class Probes:
    """Rows to take steps on.

    Attributes:
        rows: one step each. filling: rows whose gradients fill the optimizer's state; none: it starts empty.
        learning_rate: of the steps. folder: where losses are kept; None: nowhere.
    """

    rows: Sequence[Conversation] = ()
    filling: Sequence[Conversation] = ()
    learning_rate: float = 1e-3
    folder: Path | None = None

    @cached_property
    def keys(self) -> list[str]:
        """A hash of each row."""
        return [exact_key(row).hex() for row in self.rows]

    @cached_property
    def step(self) -> dict[str, Any]:
        """What moves the loss after a step on a given row."""
        return {"learning_rate": self.learning_rate, "filling": [exact_key(row).hex() for row in self.filling]}


class ProbeLosses(Signal):
    """Change of a row's loss by one AdamW step on each probe, ``loss after - loss before``: float32 ``[probes]``.

    The loss is the mean of the row's answer tokens, in nats. NaN: the probe has no answer token, or the loss is not finite.
    """

    engine = "probe"
    stored = False

    def __init__(self, probes: Probes) -> None:
        self.probes = probes
        self.name = f"probes_on_{digest([probes.keys, probes.step])}"

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        return {"probes": self.probes.keys, **self.probes.step}


@register_engine
class ProbeEngine(Engine):
    """Trains a copy of the model for one step, measures, and takes the step back."""

    name = "probe"

    @classmethod
    def pin(cls, extraction: Extraction, signals: Sequence[Signal], token: str | bool | None) -> Extraction:
        if extraction.options.quantize is not None:
            raise NeuronSelectError(
                "a step cannot be taken on packed weights: leave it out", option="quantize",
                value=extraction.options.quantize,
            )  # fmt: skip
        return extraction

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        return extraction.model_state()

    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> list[Sample]:
        options = self.extraction.options
        encoder = AnswerEncoder(
            tokenizer_of(self.extraction.spec.source),
            max_length=options.max_length,
            truncation_side=options.truncation_side,
            chat_template=options.chat_template,
            limits=self.extraction.limits,
        )
        return encoder.encode(conversations)

    def load(self, signals: Sequence[Signal], rank: int | None = None) -> None:
        self._model(rank)

    def _model(self, rank: int | None) -> Any:
        placed = replace(self.extraction, options=replace(self.extraction.options, device_map=None))
        place = place_of(placed, rank)  # a copy that is trained is not spread over devices
        assert isinstance(place, torch.device)
        return causal_lm_of(self.extraction.spec, place)

    def compute(self, given: Sequence[Sample], signals: Sequence[Signal], rank: int | None = None) -> Computed:
        columns: dict[str, Any] = {}
        skips: dict[str, list[str]] = {}
        for signal in signals:
            assert isinstance(signal, ProbeLosses)
            reasons = [sample.skip for sample in given]
            usable = [i for i, reason in enumerate(reasons) if not reason]
            column: list[np.ndarray] = [np.zeros(0, np.float32)] * len(given)
            if usable and signal.probes.rows:
                before, after = self._losses([given[i] for i in usable], signal.probes, rank)
                for place, i in enumerate(usable):
                    if math.isfinite(before[place]):
                        column[i] = (after[place] - before[place]).astype(np.float32)
                    else:
                        reasons[i] = "error: the loss is not finite; try dtype float32"
            columns[signal.name], skips[signal.name] = column, reasons
        return Computed(columns, skips)

    def _losses(self, rows: Sequence[Sample], probes: Probes, rank: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Losses of rows before any step, float64 ``[rows]``, and after one on each probe, float64 ``[rows, probes]``.

        Those that were kept are not measured again.
        """
        file = None if probes.folder is None else probes.folder / f"probes-{self._digest(probes)}.jsonl"
        known, keys = _kept(file), [_key(row) for row in rows]
        samples = dict(zip(probes.keys, self.read(probes.rows, ()), strict=True))
        with progress.track("probes", len(samples), unit="probes") as done:
            prober: Prober | None = None
            for probe in (_BEFORE, *samples):
                found = known.setdefault(probe, {})
                missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in found}
                if probe != _BEFORE and samples[probe].skip:
                    found.update(dict.fromkeys(missing, math.nan))
                elif missing:
                    prober = prober or self._prober(probes, rank)
                    prober.reference = list(missing.values())
                    losses = prober.losses() if probe == _BEFORE else prober.losses_after(samples[probe])
                    new = dict(zip(missing, losses.tolist(), strict=True))
                    found.update(new)
                    if file is not None:
                        _keep(file, probe, new)
                done.done(probe != _BEFORE)
        after = [[known[probe][key] for probe in probes.keys] for key in keys]
        return np.asarray([known[_BEFORE][key] for key in keys]), np.asarray(after)

    def _digest(self, probes: Probes) -> str:
        return digest([VERSION, dict(self.state(self.extraction)), probes.step])

    def _prober(self, probes: Probes, rank: int | None) -> Prober:
        model = self._model(rank)
        made = Prober(
            model,
            learning_rate=probes.learning_rate,
            batch_tokens=logits_budget(model, self.extraction.options.batch_tokens),
        )
        if filling := [sample for sample in self.read(probes.filling, ()) if not sample.skip]:
            made.fill(filling)
        return made


def _key(sample: Sample) -> str:
    """A hash of all that the model reads of a row."""
    return hashlib.blake2b(sample.input_ids.tobytes() + sample.pooled.tobytes(), digest_size=8).hexdigest()


def _kept(file: Path | None) -> dict[str, dict[str, float]]:
    """Losses by probe and row; a line that was cut by a kill is left out."""
    found: dict[str, dict[str, float]] = {}
    for line in file.read_bytes().splitlines() if file is not None and file.is_file() else ():
        try:
            one = json.loads(line)
            found.setdefault(str(one["probe"]), {}).update({str(key): float(x) for key, x in one["losses"].items()})
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found


def _keep(file: Path, probe: str, losses: Mapping[str, float]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as out:  # the first line end closes a line that was cut
        out.write(("\n" + json.dumps({"probe": probe, "losses": losses}) + "\n").encode())
