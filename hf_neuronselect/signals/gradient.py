"""The gradient engine: a row's gradient at LoRA factors, projected as it is made and never kept whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..core import progress
from ..models.batching import plan_batches
from ..models.gradients import row_gradients
from ..models.loading import tokenizer_of
from ..models.lora import LoraModel, LoraShape, batch_tokens, lora_model_of
from ..models.sketch import CHUNK, CountSketch
from ..models.warm_up import EPSILON, FIRST, SECOND, Checkpoint, Moments
from ..rows.answers import AnswerEncoder
from ..rows.encode import Sample
from ..rows.formats import Conversation
from .base import Signal, register_signal
from .engine import Computed, Engine, register_engine
from .extraction import Extraction
from .forward import place_of

DIM = 8192


@register_signal
class Gradient(Signal):
    """A row's gradient at LoRA factors, projected to ``dim`` numbers and divided by its norm: float16 ``[dim]``.

    The loss is the mean over the row's answer tokens. ``<name>_norm``, float32: the norm before the projection.

    Args:
        checkpoint: of a warm-up; None: LoRA's first factors, at which the model is the untouched one.
        adam: the step that Adam would take on this row instead, ``m' / sqrt(v' + 1e-8)`` with the checkpoint's moments
            (LESS, arXiv 2402.04333, sec. 3.1; no bias correction, eps inside the root).
        dim: length of the projection.
    """

    name = "gradient"
    engine = "gradient"
    has_vector = True

    def __init__(self, checkpoint: Checkpoint | None = None, *, adam: bool = False, dim: int = DIM) -> None:
        self.checkpoint, self.adam, self.dim = checkpoint, adam, dim
        self.shape = LoraShape() if checkpoint is None else checkpoint.shape
        if checkpoint is not None:
            self.name = f"{'adam_' if adam else ''}gradient_on_{checkpoint.digest}_{dim}"

    @property
    def norm(self) -> str:
        return f"{self.name}_norm"

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        return {self.name: pa.list_(pa.float16()), self.norm: pa.float32()}

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        at = None if self.checkpoint is None else self.checkpoint.digest
        return {"checkpoint": at, "adam": self.adam, "dim": self.dim, "lora": self.shape.state()}


@register_engine
class GradientEngine(Engine):
    """Runs the whole model over rows and back, once for each checkpoint."""

    name = "gradient"

    def __init__(self, extraction: Extraction) -> None:
        super().__init__(extraction)
        self._sketches: dict[int, CountSketch] = {}

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        return extraction.model_state()

    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> list[Sample]:
        return answers_of(self.extraction, conversations)

    def tokens(self, given: list[Sample]) -> int:
        return sum(len(sample.input_ids) for sample in given if not sample.skip)

    def load(self, signals: Sequence[Signal], rank: int | None = None) -> None:
        for signal in signals:
            assert isinstance(signal, Gradient)
            lora_model_of(self.extraction.spec, place_of(self.extraction, rank), signal.shape)

    def compute(self, given: list[Sample], signals: Sequence[Signal], rank: int | None = None) -> Computed:
        columns: dict[str, Any] = {}
        skips: dict[str, list[str]] = {}
        groups: dict[tuple[LoraShape, str], list[Gradient]] = {}
        for signal in signals:
            assert isinstance(signal, Gradient)
            groups.setdefault((signal.shape, signal.checkpoint.digest if signal.checkpoint else ""), []).append(signal)
        for (shape, _), alike in groups.items():
            lora = lora_model_of(self.extraction.spec, place_of(self.extraction, rank), shape)
            found = self._at(lora, alike, given, 1 / len(groups))
            for signal, (vectors, norms) in zip(alike, found, strict=True):
                skips[signal.name] = [
                    sample.skip or _flaw(norm) for sample, norm in zip(given, norms, strict=True)
                ]  # fmt: skip
                none = np.zeros(0, np.float16)
                columns[signal.name] = [
                    none if skip else vector for vector, skip in zip(vectors, skips[signal.name], strict=True)
                ]
                columns[signal.norm] = norms
        return Computed(columns, skips)

    def _at(
        self, lora: LoraModel, signals: Sequence[Gradient], samples: Sequence[Sample], share: float
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Unit projections float16 ``[n, dim]`` and norms float32 ``[n]`` of each signal, all at one checkpoint."""
        at = signals[0].checkpoint
        lora.set(None if at is None else at.weights())
        moments = at.moments(lora.device) if at is not None and any(signal.adam for signal in signals) else None
        found = [
            (np.zeros((len(samples), s.dim), np.float16), np.full(len(samples), np.nan, np.float32)) for s in signals
        ]
        usable = [i for i, sample in enumerate(samples) if not sample.skip]
        asked = self.extraction.options.batch_tokens
        budget = batch_tokens(lora.device) if asked == "auto" else int(asked)
        for plan in plan_batches([len(samples[i].input_ids) for i in usable], budget):
            rows = [usable[j] for j in plan]
            sums = [_Sum(len(rows), signal, self._sketch(signal.dim), lora.device, moments) for signal in signals]

            def sink(name: str, values: torch.Tensor, sums: Sequence[_Sum] = sums) -> None:
                for one in sums:
                    one.add(name, values)

            row_gradients(lora, [samples[i] for i in rows], sink)
            for one, (vectors, norms) in zip(sums, found, strict=True):
                vectors[rows], norms[rows] = one.units(), one.norms()
            progress.advance(round(share * sum(len(samples[i].input_ids) for i in rows)))
        return found

    def _sketch(self, dim: int) -> CountSketch:
        return self._sketches.setdefault(dim, CountSketch(dim, seed=0))


class _Sum:
    """The projections of a batch's gradients, factor by factor."""

    def __init__(
        self, rows: int, signal: Gradient, sketch: CountSketch, device: torch.device, moments: Moments | None
    ) -> None:
        self.signal, self.sketch, self.moments = signal, sketch, moments
        self.total = torch.zeros(rows, signal.dim, device=device)
        self.squares = torch.zeros(rows, dtype=torch.float64, device=device)

    def add(self, name: str, values: torch.Tensor) -> None:
        if self.signal.adam:
            assert self.moments is not None
            values = adam_steps(values, *self.moments[name])
        self.squares += torch.linalg.vector_norm(values, dim=1).double().square()
        self.sketch.add(self.total, name, values)

    def units(self) -> np.ndarray:
        norms = torch.linalg.vector_norm(self.total, dim=1, keepdim=True)
        return (self.total / norms.clamp_min(1e-30)).to(torch.float16).cpu().numpy()

    def norms(self) -> np.ndarray:
        return self.squares.sqrt().float().cpu().numpy()


def adam_steps(gradients: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``m' / sqrt(v' + eps)``, ``m' = 0.9 m + 0.1 g``, ``v' = 0.999 v + 0.001 g^2`` (LESS, sec. 3.1, and its code).

    Args:
        gradients: float32 ``[rows, n]``. first, second: moments ``m``, ``v``, float32 ``[n]``.
    """
    steps = torch.empty_like(gradients)
    for start in range(0, gradients.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        own = gradients[:, part]
        scale = (own * own).mul_(1 - SECOND).add_(second[part] * SECOND + EPSILON).rsqrt_()
        torch.mul((own * (1 - FIRST)).add_(first[part] * FIRST), scale, out=steps[:, part])
    return steps


def answers_of(extraction: Extraction, conversations: Sequence[Conversation]) -> list[Sample]:
    """Rows as training reads them: ``pooled`` are the answers' tokens and the marks that end them."""
    options = extraction.options
    encoder = AnswerEncoder(
        tokenizer_of(extraction.spec.source), max_length=options.max_length, truncation_side=options.truncation_side,
        chat_template=options.chat_template, limits=extraction.limits,
    )  # fmt: skip
    return encoder.encode(conversations)


def _flaw(norm: float) -> str:
    if not np.isfinite(norm):
        return "error: the gradient is not finite; try dtype float32"
    return "" if norm > 0 else "error: the gradient is zero"
