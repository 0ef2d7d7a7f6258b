"""Accuracy on held-out rows: answers are generated greedily and compared with the rows' own, where that can be done by rule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..core.progress import track
from ..metrics.answer_match.answer_match import answer_match, choice, last_number
from ..models.next_token import GREEDY
from ..rows.answers import AnswerEncoder
from ..rows.formats import Conversation
from ..training.evaluation import BASE

METRIC, CHECKED = "answer_match", "answers_checked"
ROWS = 200
"""So many of the rows that can be checked are, spread over them."""
MOST, SPARE = 256, 16
"""Tokens of an answer at most, and tokens that it may have more than the longest of the rows' own."""
WORDS = 6
BATCH_TOKENS = 8192
_LETTER = re.compile(r"[\W_]*[A-Ja-j][\W_]*")
_NUMBER = re.compile(r"[-+]?[$€£¥]?[\d,]*\.?\d+ ?%?\.?")
_SAID = re.compile(r"\banswer is:?\s*([^\n]+?)\.?\s*$", re.IGNORECASE | re.MULTILINE)
NOT_CHECKED = f"no held-out row ends in an answer of a number, a letter or at most {WORDS} words"


def kind_of(answer: str) -> str | None:
    """How an answer is compared, a ``kind`` of the metric ``answer_match`` or ``said``; None: only a reader can tell.

    ``number``: after ``####`` (GSM8K), or nothing else. ``choice``: a letter A to J and nothing else. ``said``: what follows
    the last "answer is" (BBH). ``text``: one line of at most 6 words.
    """
    text = answer.strip()
    if ("####" in text or _NUMBER.fullmatch(text)) and last_number(text) is not None:
        return "number"
    if _LETTER.fullmatch(text) and choice(text) is not None:
        return "choice"
    if (found := _SAID.findall(text)) and len(found[-1].split()) <= WORDS:
        return "said"
    return "text" if text and "\n" not in text and len(text.split()) <= WORDS else None


def matches(said: str, answer: str, kind: str) -> bool:
    """Whether a generated answer is the row's own."""
    if kind == "said":
        parts = [_SAID.findall(text) for text in (said, answer)]
        if not parts[0]:
            return False
        said, answer, kind = parts[0][-1], parts[1][-1], "text"
    elif kind == "text":
        said = said.strip().partition("\n")[0]
    return bool(answer_match([said], [answer], kind)["matches"])


@dataclass
class Accuracy:
    """Measures models on held-out rows; what the untouched model answers is kept for the same rows.

    Args:
        max_length: longer prompts are not asked.
    """

    max_length: int = 2048
    _known: dict[tuple[str, ...], dict[str, float]] = field(default_factory=dict)

    def __call__(self, name: str, model: Any, tokenizer: Any, rows: Sequence[Conversation]) -> dict[str, float]:
        """``answer_match``, the share of right answers, and ``answers_checked``, how many there are; none: nothing can be checked."""
        key = tuple(row.exact() for row in rows)
        if name == BASE and key in self._known:
            return self._known[key]
        found = self._measured(name, model, tokenizer, rows)
        if name == BASE:
            self._known[key] = found
        return found

    def _measured(self, name: str, model: Any, tokenizer: Any, rows: Sequence[Conversation]) -> dict[str, float]:
        able = [
            (row, kind)
            for row in rows
            if not row.skip and row.messages and row.messages[-1]["role"] == "assistant"
            and (kind := kind_of(row.messages[-1]["content"])) is not None
        ]  # fmt: skip
        encoder = AnswerEncoder(tokenizer, max_length=self.max_length)
        asked = []
        for (row, kind), sample in zip(able, encoder.encode([row for row, _ in able]), strict=True):
            if not sample.skip and sample.n_total == len(sample.input_ids):
                at = np.flatnonzero(sample.pooled)
                start = int(at[np.flatnonzero(np.diff(at, prepend=-2) > 1)[-1]])  # of the last answer
                asked.append(
                    (row.messages[-1]["content"], kind, sample.input_ids[:start], sample.input_ids[start : at[-1] + 1])
                )
        asked = [asked[i] for i in np.unique(np.linspace(0, len(asked) - 1, min(ROWS, len(asked))).astype(int))]
        most = min(MOST, max((len(answer) for *_, answer in asked), default=0) + SPARE)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or self.max_length
        asked = [one for one in asked if len(one[2]) + most <= longest]
        if not asked:
            return {}
        ends = {int(answer[-1]) for *_, answer in asked} & {
            *tokenizer.all_special_ids,
            *tokenizer.get_added_vocab().values(),
        }
        ends |= {tokenizer.eos_token_id} - {None}
        said = generated(model, [prompt for _, _, prompt, _ in asked], most, sorted(ends), f"answers of {name}")
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
        right = [matches(text, answer, kind) for text, (answer, kind, *_) in zip(texts, asked, strict=True)]
        return {METRIC: float(np.mean(right)), CHECKED: float(len(right))}


@torch.no_grad()
def generated(model: Any, prompts: Sequence[np.ndarray], most: int, ends: Sequence[int], what: str) -> list[list[int]]:
    """The greedy continuation of each prompt: at most ``most`` tokens, up to one of ``ends``.

    Prompts of a batch are padded on the left, which the mask hides.
    """
    found: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with track(what, len(prompts), brief=True) as progress:
        while order:
            width = len(prompts[order[0]])
            rows, order = order[: (size := max(1, BATCH_TOKENS // (width + most)))], order[size:]
            ids = torch.zeros((len(rows), width), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, width - len(prompts[row]) :] = torch.as_tensor(prompts[row])
                mask[i, width - len(prompts[row]) :] = 1
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **GREEDY, max_new_tokens=most,
                eos_token_id=list(ends) or None,
                pad_token_id=ends[0] if ends else 0,
            )  # fmt: skip
            for row, new in zip(rows, out[:, width:].tolist(), strict=True):
                stop = next((i for i, token in enumerate(new) if token in ends), len(new))
                found[row] = new[:stop]
            progress.done(len(rows))
    return [found[i] for i in range(len(prompts))]
