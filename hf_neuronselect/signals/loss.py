"""The loss engine: how likely the model finds a row's answers, with and without their question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..core.errors import NeuronSelectError
from ..models.batching import logits_budget
from ..models.loading import causal_lm_of, tokenizer_of
from ..models.loss import sample_losses
from ..rows.encode import Sample, SampleEncoder
from ..rows.formats import Conversation
from .base import Signal, register_signal
from .engine import Computed, Engine, register_engine
from .extraction import Extraction
from .forward import place_of

ALONE = "### Response:"


class LossSignal(Signal):
    """Mean loss of a row's answer tokens: float32, nats a token."""

    engine = "loss"

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        return {self.name: pa.float32()}


@register_signal
class AnswerLoss(LossSignal):
    """Loss of the answers given everything before them, ``meanNLL(A|Q)`` (IFD, arXiv 2308.12032, eq. 1)."""

    name = "answer_loss"


@register_signal
class AnswerAloneLoss(LossSignal):
    """Loss of the answers after ``### Response:`` alone, ``meanNLL(A)`` (IFD, arXiv 2308.12032, eq. 2).

    Choices: several answers of a row are joined by line breaks, and no more of their tokens count than count beside
    the question.
    """

    name = "answer_alone_loss"


@register_engine
class LossEngine(Engine):
    """Runs the whole model over rows and takes the loss of their answers' own tokens (template tokens left out)."""

    name = "loss"

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        return extraction.model_state()

    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> dict[str, list[Sample]]:
        options = self.extraction.options
        tokenizer = tokenizer_of(self.extraction.spec.source)
        encoder = SampleEncoder(
            tokenizer,
            pool_tokens="assistant",
            max_length=options.max_length,
            truncation_side=options.truncation_side,
            chat_template=options.chat_template,
            limits=self.extraction.limits,
        )
        found = {"answer_loss": [_predicted(sample) for sample in encoder.encode(conversations)]}
        if any(isinstance(signal, AnswerAloneLoss) for signal in signals):
            found["answer_alone_loss"] = [
                _alone(tokenizer, conversation, beside, encoder.max_length)
                for conversation, beside in zip(conversations, found["answer_loss"], strict=True)
            ]
        return found

    def load(self, signals: Sequence[Signal], rank: int | None = None) -> None:
        causal_lm_of(self.extraction.spec, place_of(self.extraction, rank))

    def compute(
        self, given: Mapping[str, list[Sample]], signals: Sequence[Signal], rank: int | None = None
    ) -> Computed:
        model = causal_lm_of(self.extraction.spec, place_of(self.extraction, rank))
        columns: dict[str, Any] = {}
        skips: dict[str, list[str]] = {}
        for signal in signals:
            samples = given[signal.name]
            usable = [i for i, sample in enumerate(samples) if not sample.skip]
            means = np.full(len(samples), np.nan, dtype=np.float32)
            if usable:
                batch_tokens = logits_budget(model, self.extraction.options.batch_tokens)
                nll, tokens = sample_losses(model, [samples[i] for i in usable], batch_tokens)
                means[usable] = nll / tokens
            skips[signal.name] = [
                sample.skip or ("" if np.isfinite(mean) else "error: the loss is not finite; try dtype float32")
                for sample, mean in zip(samples, means, strict=True)
            ]
            columns[signal.name] = means
        return Computed(columns, skips)


def _predicted(sample: Sample) -> Sample:
    """The sample without position 0 among its answer tokens: it is never predicted."""
    if sample.skip:
        return sample
    pooled = sample.pooled.copy()
    pooled[0] = False
    skip = "" if pooled.any() else "error: no answer token that is predicted"
    return Sample(sample.input_ids, pooled, {}, sample.n_total, skip)


def _alone(tokenizer: Any, conversation: Conversation, beside: Sample, max_length: int) -> Sample:
    """The answers after ``### Response:``, at most as many tokens of them as count beside the question."""
    if beside.skip:
        return beside
    if not tokenizer.is_fast:
        raise NeuronSelectError("finding the answers needs a fast tokenizer (offsets)", option="model")
    answers = "\n".join(m["content"] for m in conversation.messages if m["role"] == "assistant")
    encoded = tokenizer(ALONE + answers, return_offsets_mapping=True, truncation=False, verbose=False)
    ids = np.asarray(encoded["input_ids"], np.int64)
    offsets = np.asarray(encoded["offset_mapping"]).reshape(-1, 2)
    answer = (offsets[:, 1] > len(ALONE)) & (offsets[:, 1] > offsets[:, 0])
    answer[0] = False
    positions = np.flatnonzero(answer)[: int(beside.pooled.sum())]
    if not len(positions):
        return Sample(ids, answer, {}, len(ids), "error: no answer token that is predicted")
    end = min(int(positions[-1]) + 1, max_length)
    return Sample(ids[:end], answer[:end], {}, len(ids), "" if answer[:end].any() else "error: no answer token")
