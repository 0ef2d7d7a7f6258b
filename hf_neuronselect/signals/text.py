"""The text engine: signals that need a row's text and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..rows.formats import Conversation
from .base import Signal, register_signal
from .engine import Computed, Engine, register_engine
from .extraction import Extraction


@register_signal
class Text(Signal):
    """All turns of a row in one string, roles included."""

    name = "text"
    engine = "text"
    stored = False

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        return {"text": pa.string()}


@register_engine
class TextEngine(Engine):
    """Reads rows, nothing more."""

    name = "text"
    has_model = False

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        return extraction.rows_state()

    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> Computed:
        texts = [conversation.content() if not conversation.skip else "" for conversation in conversations]
        return Computed({"text": texts}, {"text": [conversation.skip for conversation in conversations]})

    def compute(self, given: Computed, signals: Sequence[Signal], rank: int | None = None) -> Computed:
        return given
