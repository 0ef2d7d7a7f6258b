"""The judge engine: marks that a chat model gives to rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from ..core import progress
from ..core.judging import LOCAL
from ..models.chat import JudgeSpec, Messages
from ..models.judge import Judge
from ..models.loading import Place
from ..models.marks import read_mark
from ..rows.formats import Conversation
from .base import Signal, digest
from .engine import Computed, Engine, register_engine
from .extraction import Extraction
from .forward import place_of
from .rating import NO_ANSWER

NO_MARK = "error: the judge's answer has no mark on its first line"


@dataclass(frozen=True)
class ToAsk:
    """What a judge is asked about a row; no messages for the reason in ``skip``."""

    messages: Messages
    skip: str = ""


class JudgeSignal(Signal):
    """A judge's mark of a row, float32; a row whose answer cannot be read has none, and is counted.

    Args:
        judge: who is asked, and how.

    Attributes:
        most: the best mark.
    """

    engine = "judge"
    most = 5.0

    def __init__(self, judge: JudgeSpec) -> None:
        self.judge = judge
        self.name = f"{self.name}_on_{digest([judge.identity, self.form()])}"

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        return {self.name: pa.float32()}

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        return {"judge": self.judge.identity, "asked": digest(self.form())}

    def form(self) -> list[str]:
        """The texts of what is asked, by which a change of them is seen."""
        said = self.messages("\0", "\1")
        return [turn["content"] for turn in said]

    @abstractmethod
    def messages(self, question: str, answer: str) -> Messages:
        """What a judge is asked about an answer, and all that came before it."""

    def read(self, answer: str) -> float | None:
        """The mark in an answer; None where there is none."""
        return read_mark(answer, self.most)

    def asked(self, conversation: Conversation) -> ToAsk:
        """About the last answer of a row."""
        if conversation.skip:
            return ToAsk((), conversation.skip)
        turns = conversation.messages
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
        if last < 0 or not turns[last]["content"].strip():
            return ToAsk((), NO_ANSWER)
        before = turns[:last]
        question = before[0]["content"] if len(before) == 1 else "\n\n".join(
            f"{turn['role'].title()}: {turn['content']}" for turn in before
        )  # fmt: skip
        return ToAsk(self.messages(question, turns[last]["content"]))


class Mark(JudgeSignal):
    """A mark by what a task says, in one user turn: what is judged, the instruction, its response, and how to answer.

    Args:
        task: what is judged. how: what the answer must look like: the mark alone on its first line.
    """

    name = "mark"

    def __init__(self, judge: JudgeSpec, task: str, how: str) -> None:
        self.task, self.how = task, how
        super().__init__(judge)

    def messages(self, question: str, answer: str) -> Messages:
        text = f"{self.task}\n\nInstruction:\n{question}\n\nResponse:\n{answer}\n\n{self.how}"
        return [{"role": "user", "content": text}]


@register_engine
class JudgeEngine(Engine):
    """Asks a judge about each row, several at once."""

    name = "judge"
    model_option = "judge"

    def __init__(self, extraction: Extraction) -> None:
        super().__init__(extraction)
        self.judges: dict[JudgeSpec, Judge] = {}
        self._told: tuple[int, float] = (0, 0.0)

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        return extraction.rows_state()

    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> dict[str, list[ToAsk]]:
        found = {}
        for signal in signals:
            assert isinstance(signal, JudgeSignal)
            found[signal.name] = [signal.asked(conversation) for conversation in conversations]
        return found

    def tokens(self, given: Mapping[str, list[ToAsk]]) -> int:
        return sum(_letters(row.messages) for rows in given.values() for row in rows) // 4

    def compute(self, given: Mapping[str, list[ToAsk]], signals: Sequence[Signal], rank: int | None = None) -> Computed:
        columns: dict[str, Any] = {}
        skips: dict[str, list[str]] = {}
        for signal in signals:
            assert isinstance(signal, JudgeSignal)
            judge = self.judges.setdefault(signal.judge, Judge(signal.judge, place=self._place(signal.judge, rank)))
            rows = given[signal.name]
            asked = [row for row in rows if not row.skip]
            ratings = iter(
                judge.rate([row.messages for row in asked], signal.read, what="rows", unread=NO_MARK, done=_advance)
            )
            marks = np.full(len(rows), np.nan, dtype=np.float32)
            reasons = [row.skip for row in rows]
            for i, row in enumerate(rows):
                if row.skip:
                    continue
                rating = next(ratings)
                reasons[i] = rating.problem
                if rating.value is not None:
                    marks[i] = rating.value
            columns[signal.name], skips[signal.name] = marks, reasons
        return Computed(columns, skips)

    def _place(self, judge: JudgeSpec, rank: int | None) -> Place | None:
        """Where a local judge's model is loaded: on the GPU of this process, as a whole."""
        if judge.at != LOCAL:
            return None
        options = replace(self.extraction.options, device_map=None)
        return place_of(replace(self.extraction, options=options), rank)

    def bill(self) -> tuple[int, float]:
        requests = sum(judge.requests for judge in self.judges.values())
        money = sum(judge.money for judge in self.judges.values())
        new = (requests - self._told[0], money - self._told[1])
        self._told = (requests, money)
        return new


def _advance(messages: Messages) -> None:
    progress.advance(_letters(messages) // 4)


def _letters(messages: Messages) -> int:
    return sum(len(turn["content"]) for turn in messages)
