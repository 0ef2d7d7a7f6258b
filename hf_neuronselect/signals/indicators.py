"""The indicator engine: numbers that other models give to a row's last answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from ..core.sources import Source
from ..models.batching import logits_budget
from ..models.indicators import Kind, model_for, reward_ids, rewards, tokenizer_for, yes_shares
from ..rows.formats import Conversation
from .base import Signal, digest
from .engine import Computed, Engine, register_engine
from .extraction import Extraction
from .forward import place_of
from .rating import NO_ANSWER, pairs


@dataclass(frozen=True)
class Texts:
    """What a model reads of a row: tokens of one text or several; none for the reason in ``skip``."""

    ids: tuple[tuple[int, ...], ...]
    skip: str = ""

    @property
    def input_ids(self) -> list[int]:
        return [number for one in self.ids for number in one]


class Indicator(Signal):
    """Numbers of the last answer of a row, float32.

    Args:
        model: pinned.
    """

    engine = "indicator"
    kind: ClassVar[Kind]

    def __init__(self, model: Source) -> None:
        self.model = model
        self.name = f"{self.kind}_on_{digest(model.key)}"

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        return {"indicator": self.model.key}

    @abstractmethod
    def texts(self, tokenizer: Any, question: str, answer: str, most: int) -> list[list[int]]:
        """Ids of all tokens that the model reads of a row."""

    @abstractmethod
    def values(self, model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], batch_tokens: int) -> np.ndarray:
        """One number a text."""


class Reward(Indicator):
    """A reward model's number, raw: ``[1]``."""

    kind = "reward"

    def texts(self, tokenizer: Any, question: str, answer: str, most: int) -> list[list[int]]:
        return [reward_ids(tokenizer, question, answer, most)]

    def values(self, model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], batch_tokens: int) -> np.ndarray:
        return rewards(model, tokenizer, ids, batch_tokens)


class UniEval(Indicator):
    """How understandable, natural and coherent an answer is (UniEval, arXiv 2210.07197): ``[3]``, each in [0, 1]."""

    kind = "unieval"
    # The questions that the model was trained on, to the letter.
    asked = (
        "Is this an understandable response in the dialogue?",
        "Is this a natural response in the dialogue?",
        "Is this a coherent response given the dialogue history?",
    )

    def texts(self, tokenizer: Any, question: str, answer: str, most: int) -> list[list[int]]:
        behind = ("", "", f" </s> dialogue history: {question}")
        texts = [f"question: {one} </s> response: {answer}{more}" for one, more in zip(self.asked, behind, strict=True)]
        return [list(tokenizer(text, truncation=True, max_length=most)["input_ids"]) for text in texts]

    def values(self, model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], batch_tokens: int) -> np.ndarray:
        return yes_shares(model, tokenizer, ids, batch_tokens)


@register_engine
class IndicatorEngine(Engine):
    """Runs models that belong to a method over the last answer of each row."""

    name = "indicator"
    model_option = "indicator"

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        options = extraction.options
        return extraction.rows_state() | {name: getattr(options, name) for name in ("max_length", "dtype")}

    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> dict[str, list[Texts]]:
        found = {}
        for signal in signals:
            assert isinstance(signal, Indicator)
            tokenizer = tokenizer_for(signal.model, signal.kind)
            most = min(self.extraction.options.max_length, tokenizer.model_max_length)
            found[signal.name] = [_texts(one, signal, tokenizer, most) for one in conversations]
        return found

    def load(self, signals: Sequence[Signal], rank: int | None = None) -> None:
        for signal in signals:
            assert isinstance(signal, Indicator)
            self._model(signal, rank)

    def _model(self, signal: Indicator, rank: int | None) -> Any:
        options = replace(self.extraction.options, device_map=None)  # it fits one device
        device = place_of(replace(self.extraction, options=options), rank)
        assert isinstance(device, torch.device)
        return model_for(signal.model, signal.kind, device, options.dtype if options.dtype != "auto" else "float32")

    def compute(self, given: Mapping[str, list[Texts]], signals: Sequence[Signal], rank: int | None = None) -> Computed:
        columns: dict[str, Any] = {}
        skips: dict[str, list[str]] = {}
        for signal in signals:
            assert isinstance(signal, Indicator)
            rows = given[signal.name]
            reasons = [row.skip for row in rows]
            column: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
            ids = [one for row in rows for one in row.ids]
            if ids:
                tokenizer = tokenizer_for(signal.model, signal.kind)
                model = self._model(signal, rank)
                budget = logits_budget(model, self.extraction.options.batch_tokens)
                values = signal.values(model, tokenizer, ids, budget).astype(np.float32)
                start = 0
                for i, row in enumerate(rows):
                    own = values[start : start + len(row.ids)]
                    start += len(row.ids)
                    if np.isfinite(own).all():
                        column[i] = own
                    else:
                        reasons[i] = f"error: the {signal.kind} is not finite; try dtype float32"
            columns[signal.name], skips[signal.name] = column, reasons
        return Computed(columns, skips)


def _texts(conversation: Conversation, signal: Indicator, tokenizer: Any, most: int) -> Texts:
    turns = [] if conversation.skip else pairs(conversation)
    if not turns:
        return Texts((), conversation.skip or NO_ANSWER)
    return Texts(tuple(map(tuple, signal.texts(tokenizer, *turns[-1], most))))
