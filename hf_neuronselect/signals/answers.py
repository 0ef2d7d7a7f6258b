"""The answers engine: how many of a row's tokens are answers. It needs a tokenizer and no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..models.loading import tokenizer_of
from ..rows.encode import SampleEncoder
from ..rows.formats import Conversation
from .base import Signal, register_signal
from .engine import Computed, Engine, register_engine
from .extraction import Extraction


@register_signal
class AnswerTokens(Signal):
    """How many tokens of the assistant turns' texts the model is fed (``n_answer_tokens``, int32)."""

    name = "answer_tokens"
    engine = "answers"

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        return {"n_answer_tokens": pa.int32()}


@register_engine
class AnswersEngine(Engine):
    """Tokenises rows and finds their answers."""

    name = "answers"
    has_model = False

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        return extraction.tokens_state()

    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> Computed:
        options = self.extraction.options
        encoder = SampleEncoder(
            tokenizer_of(self.extraction.spec.source),
            max_length=options.max_length,
            truncation_side=options.truncation_side,
            marks=("answer",),
            chat_template=options.chat_template,
            limits=self.extraction.limits,
        )
        samples = encoder.encode(conversations)
        counts = [0 if sample.skip else int(sample.marks["answer"].sum()) for sample in samples]
        return Computed(
            {"n_answer_tokens": np.asarray(counts, np.int32)}, {"answer_tokens": [sample.skip for sample in samples]}
        )

    def compute(self, given: Computed, signals: Sequence[Signal], rank: int | None = None) -> Computed:
        return given
