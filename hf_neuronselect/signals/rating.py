"""The rating engine: which of a few words the model says next when it is asked to rate a row."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from ..core.sources import Source
from ..models.batching import logits_budget
from ..models.checkpoint import config_of, limits_of
from ..models.loading import ModelSpec, causal_lm_of, tokenizer_of
from ..models.next_token import Prompt, next_logits, word_ids
from ..rows.encode import Limits
from ..rows.formats import Conversation
from .base import Signal, digest, register_signal
from .engine import Computed, Engine, register_engine
from .extraction import Extraction
from .forward import place_of

NO_ANSWER = "error: no answer to rate"
_NAMES = {"user": "Instruction", "assistant": "Response"}


@dataclass(frozen=True)
class Question:
    """A text, and what is asked behind it (all prompts of a row begin with the text)."""

    text: str
    endings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Asked:
    """What a model reads of a row: no prompt if there is a reason in ``skip``."""

    prompts: tuple[Prompt, ...]
    skip: str = ""

    @property
    def input_ids(self) -> np.ndarray:
        """All tokens that the model runs over."""
        parts = [part for prompt in self.prompts for part in (prompt.shared, *prompt.endings)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class RatingSignal(Signal):
    """What a model says behind prompts about a row, without a chat template: the logits of a few words.

    Args:
        model: pinned; None: the extraction's. option: what errors call it.

    Attributes:
        words: the ratings. behind: what every prompt ends with.
    """

    engine = "rating"
    words: ClassVar[tuple[str, ...]]
    behind: ClassVar[str]

    def __init__(self, model: Source | None = None, option: str = "model") -> None:
        self.model, self.option = model, option
        if model is not None:
            self.engine = "scorer"  # type: ignore[misc]
            self.name = f"{self.name}_on_{digest(model.key)}"

    def columns(self, values: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
        """Its columns from each row's :meth:`value`."""
        return {self.name: values}

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        return {
            "scorer": None if self.model is None else self.model.key,
            "words": list(self.words),
            "asked": digest([self.behind, self.form()]),
        }

    @abstractmethod
    def form(self) -> list[str]:
        """The texts of the prompts, by which a change of them is seen."""

    @abstractmethod
    def questions(self, conversation: Conversation) -> list[Question]:
        """What is asked about a row; nothing: it has no answer to rate."""

    @abstractmethod
    def value(self, logits: np.ndarray) -> np.ndarray:
        """What is kept of float64 logits ``[prompts, words]``, in one dimension."""


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


@register_signal
class Ratings(RatingSignal):
    """Shares of the ratings 1 to 5 behind five prompts (SelectIT, arXiv 2402.16705): float32 ``[25]``, prompt by prompt.

    Choices: the prompts are in our own words, and come behind the row, so that the row is read once.
    """

    name = "ratings"
    words = ("1", "2", "3", "4", "5")
    behind = "\nRating:\n"
    asked = (
        "On a scale of 1 (useless) to 5 (excellent), how well does the response above answer its instruction?",
        "Judge the answer above for being right, complete and clear. Give it a mark, where 5 is best and 1 is worst.",
        "Would this exchange teach an assistant well? Say so by a number: 1 means not at all, 5 means very much.",
        "Consider how helpful and how accurate the reply is, and grade the pair from 1 (poor) to 5 (outstanding).",
        "How good is this example of following instructions? Choose from 1, the lowest quality, to 5, the highest.",
    )

    def form(self) -> list[str]:
        return [*self.asked, *_NAMES.values()]

    def questions(self, conversation: Conversation) -> list[Question]:
        if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in conversation.messages):
            return []
        turns = (
            f"{_NAMES.get(turn['role'], turn['role'].title())}:\n{turn['content']}" for turn in conversation.messages
        )
        return [Question("\n\n".join(turns) + "\n\n", tuple(one + self.behind for one in self.asked))]

    def value(self, logits: np.ndarray) -> np.ndarray:
        return softmax(logits).ravel()


class TurnScores(RatingSignal):
    """What a scorer thinks of each question, or of each question with its answer (DEITA, arXiv 2312.15685): sparse.

    The mean of the ratings 1 to 6 by their shares behind one prompt a turn; turn numbers are the indices.

    Args:
        form: the prompt that the scorer was trained on, with ``{question}`` and, if it reads it, ``{answer}``. behind: its end.
    """

    name = "turns"
    words = ("1", "2", "3", "4", "5", "6")

    def __init__(self, model: Source, option: str, form: str, behind: str) -> None:
        self.text, self.behind = form, behind  # type: ignore[misc]
        super().__init__(model, option)
        self.name = f"turns_on_{digest([model.key, form, behind])}"

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        return {f"{self.name}_indices": pa.list_(pa.int32()), f"{self.name}_values": pa.list_(pa.float32())}

    def columns(self, values: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
        turns = [np.arange(len(row), dtype=np.int32) for row in values]
        return {f"{self.name}_indices": turns, f"{self.name}_values": values}

    def form(self) -> list[str]:
        return [self.text]

    def questions(self, conversation: Conversation) -> list[Question]:
        # a text may hold braces: nothing is formatted twice
        parts = re.split(r"(\{question\}|\{answer\})", self.text)
        return [
            Question("".join({"{question}": asked, "{answer}": said}.get(part, part) for part in parts), (self.behind,))
            for asked, said in pairs(conversation)
        ]

    def value(self, logits: np.ndarray) -> np.ndarray:
        return np.asarray(softmax(logits) @ np.arange(1.0, 1 + len(self.words)))


def pairs(conversation: Conversation) -> list[tuple[str, str]]:
    """Questions and answers: an assistant turn with text, and the user turns since the one before it."""
    found, asked = [], []
    for turn in conversation.messages:
        if turn["role"] == "user":
            asked.append(turn["content"])
        elif turn["role"] == "assistant" and turn["content"].strip() and any(one.strip() for one in asked):
            found.append(("\n".join(asked), turn["content"]))
            asked = []
    return found


@register_engine
class RatingEngine(Engine):
    """Runs the whole model over prompts about each row."""

    name = "rating"

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        return extraction.model_state()

    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> dict[str, list[Asked]]:
        found = {}
        for signal in signals:
            assert isinstance(signal, RatingSignal)
            reader = _Reader(self.extraction, signal)
            found[signal.name] = [reader.read(conversation) for conversation in conversations]
        return found

    def load(self, signals: Sequence[Signal], rank: int | None = None) -> None:
        for signal in signals:
            assert isinstance(signal, RatingSignal)
            causal_lm_of(spec_of(self.extraction, signal.model), place_of(self.extraction, rank))

    def compute(self, given: Mapping[str, list[Asked]], signals: Sequence[Signal], rank: int | None = None) -> Computed:
        columns: dict[str, Any] = {}
        skips: dict[str, list[str]] = {}
        for signal in signals:
            assert isinstance(signal, RatingSignal)
            rows = given[signal.name]
            spec = spec_of(self.extraction, signal.model)
            words = ids_of(signal, spec.source)
            column: list[np.ndarray] = [np.zeros(0, np.float32)] * len(rows)
            reasons = [row.skip for row in rows]
            prompts = [prompt for row in rows for prompt in row.prompts]
            logits: list[np.ndarray] = []
            if prompts:
                model = causal_lm_of(spec, place_of(self.extraction, rank))
                budget = logits_budget(model, self.extraction.options.batch_tokens)
                logits = next_logits(model, prompts, words, budget)
            start = 0
            for i, row in enumerate(rows):
                own = logits[start : start + len(row.prompts)]
                start += len(row.prompts)
                if row.skip:
                    continue
                values = signal.value(np.concatenate(own)).astype(np.float32)
                if np.isfinite(values).all():
                    column[i] = values
                else:
                    reasons[i] = "error: a rating is not finite; try dtype float32"
            columns |= signal.columns(column)
            skips[signal.name] = reasons
        return Computed(columns, skips)


@register_engine
class ScorerEngine(RatingEngine):
    """The same with models of their own, which belong to a method: the extraction's model moves nothing."""

    name = "scorer"
    model_option = "scorer"

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        options = extraction.options
        used = ("max_length", "truncation_side", "dtype", "quantize", "attn_implementation")
        return extraction.rows_state() | {name: getattr(options, name) for name in used}


def spec_of(extraction: Extraction, model: Source | None) -> ModelSpec:
    """How a method's own model is loaded: as the extraction's is."""
    if model is None:
        return extraction.spec
    options = extraction.options
    return ModelSpec(model, options.dtype, options.quantize, options.attn_implementation)


def ids_of(signal: RatingSignal, source: Source) -> np.ndarray:
    """The ids of a signal's ratings.

    Raises:
        NeuronSelectError: the tokenizer has none.
    """
    return word_ids(tokenizer_of(source), signal.words, signal.behind, option=signal.option, value=source.id)


class _Reader:
    """Turns rows into the prompts of a signal."""

    def __init__(self, extraction: Extraction, signal: RatingSignal) -> None:
        source = spec_of(extraction, signal.model).source
        self.signal, self.tokenizer, self.options = signal, tokenizer_of(source), extraction.options
        self.limits: Limits = extraction.limits if signal.model is None else limits_of(config_of(source))
        self.most = min(self.options.max_length, self.limits.positions or self.options.max_length)
        ids_of(signal, source)  # refused before any row is read

    def read(self, conversation: Conversation) -> Asked:
        if conversation.skip:
            return Asked((), conversation.skip)
        questions = self.signal.questions(conversation)
        if not questions:
            return Asked((), NO_ANSWER)
        prompts = tuple(map(self._prompt, questions))
        for prompt in prompts:
            if not all(len(prompt.shared) + len(ending) for ending in prompt.endings):
                return Asked((), NO_ANSWER)
            if beyond := self.limits.beyond(self.tokenizer, np.concatenate([prompt.shared, *prompt.endings])):
                return Asked((), f"error: {beyond}")
        return Asked(prompts)

    def _prompt(self, question: Question) -> Prompt:
        """Text and endings are tokenised apart; of a long row so much is kept that the endings fit behind it."""
        if len(question.endings) == 1:
            whole = self._ids(question.text + question.endings[0])
            if len(whole) <= self.most:  # as it is, since some tokenizers begin a text in their own way
                return Prompt(np.asarray(whole, np.int64), (np.zeros(0, np.int64),))
        ids = self._ids(question.text)
        endings = [
            self.tokenizer(ending, add_special_tokens=False, verbose=False)["input_ids"] for ending in question.endings
        ]
        room = max(1, self.most - max(map(len, endings)))
        ids = ids[:room] if self.options.truncation_side == "right" else ids[-room:]
        return Prompt(np.asarray(ids, np.int64), tuple(np.asarray(ending, np.int64) for ending in endings))

    def _ids(self, text: str) -> list[int]:
        """Tokens from the beginning, without an end that a tokenizer adds."""
        ids = list(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids
