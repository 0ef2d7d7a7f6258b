"""The tokens of a row that are learnt, and that a loss is measured on: its answers and the marks that end them."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..core.errors import NeuronSelectError
from .encode import Limits, Sample, SampleEncoder, templates_of
from .formats import Conversation

# Prints nothing: transformers before 5.6 sees no answer before a template has printed something.
_BEGUN = "{% set nothing = '' %}{{ nothing }}"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
NO_ANSWER = "error: no assistant turn with an answer"


def answered(conversation: Conversation) -> bool:
    """Whether an assistant turn has text or calls a tool."""
    return any(
        turn["role"] == "assistant" and (turn["content"].strip() or turn.get("tool_calls"))
        for turn in conversation.messages
    )


def left_out(samples: Iterable[Sample]) -> str:
    """Reasons of the rows without tokens, with their numbers: ``empty (2), no assistant turn (1)``."""
    reasons = Counter(sample.skip.removeprefix("error: ") for sample in samples if sample.skip)
    return ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(5))


class AnswerEncoder:
    """Turns conversations into the token ids of scoring, with the answers' tokens in ``pooled``.

    If the chat template marks what the model writes (``{% generation %}``), the marked tokens are the answers, as in
    TRL. Else they are the text of the assistant turns, found as in scoring, and the token that ends each turn. The
    first token is never predicted and therefore no answer.

    Args:
        tokenizer: a fast transformers tokenizer.
        max_length: tokens kept of a row; None keeps all.
        truncation_side: the side that is cut; ``right`` keeps the beginning.
        chat_template: overrides the tokenizer's own.
        limits: of the model: positions and embeddings.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        truncation_side: str = "right",
        chat_template: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise NeuronSelectError(
                "finding the answers needs a fast tokenizer (offsets)",
                option="tokenizer",
                value=type(tokenizer).__name__,
            )
        if chat_template is None and len(templates := templates_of(tokenizer)) == 1:
            (chat_template,) = templates.values()  # of several, the encoder knows which one a row takes
        self.marked = marks_answers(chat_template)
        self._encoder = (SampleEncoder if self.marked else _WithEnds)(
            tokenizer,
            pool_tokens="all" if self.marked else "assistant",
            max_length=sys.maxsize if max_length is None else max_length,
            truncation_side=truncation_side,
            chat_template=chat_template,
            limits=limits,
        )

    def encode(self, conversations: Sequence[Conversation]) -> list[Sample]:
        """Tokenise. Rows without an answer token are returned with ``skip`` set, never dropped."""
        asked = [
            conversation if conversation.skip or answered(conversation) else Conversation(skip=NO_ANSWER)
            for conversation in conversations
        ]
        return [
            sample if sample.skip else self._answers(sample, conversation)
            for sample, conversation in zip(self._encoder.encode(asked), asked, strict=True)
        ]

    def _answers(self, sample: Sample, conversation: Conversation) -> Sample:
        encoder = self._encoder
        answer = sample.pooled.copy()
        if self.marked:
            encoded = encoder.tokenizer.apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                chat_template=_BEGUN + encoder.templates["default"],
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            answer = np.asarray(encoded["assistant_masks"], dtype=bool)
            kept = len(sample.input_ids)
            answer = answer[:kept] if encoder.truncation_side == "right" else answer[-kept:]
        answer[0] = False
        skip = "" if answer.any() else f"error: no assistant token within max_length={encoder.max_length}"
        return Sample(sample.input_ids, answer, {}, sample.n_total, skip)


class _WithEnds(SampleEncoder):
    """Pools the assistant turns and the token that ends each."""

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        eos, bos = tokenizer.eos_token, tokenizer.bos_token
        others = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} - {eos, bos}
        others = {token for token in others if token.strip()}  # some vocabularies add runs of spaces
        ends = [rf"\s*{re.escape(eos)}"] if eos else []
        self.end = re.compile("|".join(ends + [re.escape(token) for token in sorted(others, key=len, reverse=True)]))

    def turn_spans(self, conversation: Conversation, rendered: str) -> list[tuple[str, int, int]]:
        found = super().turn_spans(conversation, rendered)
        ends = [self.end.match(rendered, end) if end > start else None for _, start, end in found]
        return [
            (role, start, mark.end() if mark else end) for (role, start, end), mark in zip(found, ends, strict=True)
        ]


def marks_answers(template: str | None) -> bool:
    """Whether a chat template marks what the model writes."""
    return template is not None and _GENERATION.search(template) is not None
