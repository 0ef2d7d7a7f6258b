"""The text engine: signals that need a row's text and no model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..rows.formats import Conversation
from ..rows.leakage import exact_key
from .base import Signal, register_signal
from .engine import Computed, Engine, register_engine
from .extraction import Extraction


class TextSignal(Signal):
    """A column of one text a row; cheaper to read again than to store."""

    engine = "text"
    stored = False

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        return {self.name: pa.string()}

    @abstractmethod
    def of(self, conversation: Conversation) -> str:
        """The text of one row, which can be read."""


@register_signal
class Text(TextSignal):
    """All turns of a row in one string, roles included."""

    name = "text"

    def of(self, conversation: Conversation) -> str:
        return conversation.content()


@register_signal
class Words(TextSignal):
    """The texts of all turns in one string, without the names of their roles, which every row has."""

    name = "words"

    def of(self, conversation: Conversation) -> str:
        return conversation.words()


@register_signal
class RowKey(TextSignal):
    """A hash of the row (32 hex digits): equal for rows that are equal to the letter, with the same tools."""

    name = "row_key"

    def of(self, conversation: Conversation) -> str:
        return exact_key(conversation).hex()


@register_engine
class TextEngine(Engine):
    """Reads rows, nothing more."""

    name = "text"
    has_model = False

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        return extraction.rows_state()

    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> Computed:
        skips = [conversation.skip for conversation in conversations]
        columns = {
            signal.name: [signal.of(one) if not one.skip else "" for one in conversations]
            for signal in signals
            if isinstance(signal, TextSignal)
        }
        return Computed(columns, {name: list(skips) for name in columns})

    def compute(self, given: Computed, signals: Sequence[Signal], rank: int | None = None) -> Computed:
        return given
