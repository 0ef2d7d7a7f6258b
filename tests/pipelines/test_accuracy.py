"""Accuracy on held-out rows: which answers can be checked, what counts as right, and greedy generation in batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model, tiny_tokenizer
from tiny import chat

from hf_neuronselect.pipelines import accuracy
from hf_neuronselect.pipelines.accuracy import Accuracy, generated, kind_of, matches
from hf_neuronselect.rows.formats import Conversation


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("3 + 4 = 7\n#### 7", "number"),
        ("#### none", "text"),
        ("1,234.5", "number"),
        ("$5.", "number"),
        ("B", "choice"),
        ("(b).", "choice"),
        ("K", "text"),
        ("Think.\nSo the answer is (C).", "said"),
        ("So the answer is not to be told in so few words as these.", None),
        ("the River Nile", "text"),
        ("one two three four five six seven", None),
        ("def f(x):\n    return x", None),
        ("", None),
        (" \n", None),
    ],
)
def test_kinds_of_answers(answer: str, kind: str | None) -> None:
    assert kind_of(answer) == kind


@pytest.mark.parametrize(
    ("said", "answer", "kind", "right"),
    [
        ("It is 7 or 8. #### 8", "x\n#### 8.0", "number", True),
        ("#### 7", "#### 8", "number", False),
        ("", "#### 8", "number", False),
        ("(B) since", "B", "choice", True),
        ("C", "B", "choice", False),
        ("No.\nSo the answer is False.", "So the answer is false", "said", True),
        ("False", "So the answer is False.", "said", False),
        ("The Nile.\nBecause", "the nile", "text", True),
        ("The Rhine", "the nile", "text", False),
        ("", "the nile", "text", False),
    ],
)
def test_what_counts_as_right(said: str, answer: str, kind: str, right: bool) -> None:
    assert matches(said, answer, kind) is right


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_generation_is_greedy_whatever_the_batch(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "BATCH_TOKENS", batch_tokens)
    model = tiny_model("llama").double().eval()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 60, n) for n in (5, 1, 17, 9, 9)]
    wanted = []
    for prompt in prompts:
        ids = prompt.tolist()
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        wanted.append(ids[len(prompt) :])
    assert generated(model, prompts, 8, [], "t") == wanted
    end = wanted[2][3]  # cut before the first of these
    assert generated(model, prompts, 8, [end], "t") == [
        one[: one.index(end)] if end in one else one for one in wanted
    ]  # fmt: skip


def test_a_models_own_settings_do_not_move_what_is_generated() -> None:
    model = tiny_model("llama").double().eval()
    prompts = [np.asarray([5, 9, 9, 5]), np.asarray([7] * 9)]
    plain = generated(model, prompts, 8, [], "t")
    model.generation_config.repetition_penalty = 1.7
    model.generation_config.no_repeat_ngram_size = 2
    assert generated(model, prompts, 8, [], "t") == plain


def test_the_share_of_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts end where the answer begins; what the untouched model says is asked for once."""
    model, tokenizer, seen = tiny_model("llama"), tiny_tokenizer(), []
    rows = [Conversation(messages=chat(q, a)) for q, a in (("2+2?", "4"), ("why?", "blue"), ("long?", "x " * 20))]
    rows += [Conversation(skip="empty"), Conversation(text="plain text")]

    def said(model: Any, prompts: Any, most: int, ends: Any, what: str) -> list[list[int]]:
        seen.append(([tokenizer.decode(prompt) for prompt in prompts], most, [tokenizer.decode([e]) for e in ends]))
        return [tokenizer.encode(text, add_special_tokens=False) for text in ("5", "Blue!")]

    monkeypatch.setattr(accuracy, "generated", said)
    measure = Accuracy()
    for _ in range(2):
        assert measure("base", model, tokenizer, rows) == {"answer_match": 0.5, "answers_checked": 2.0}
    ((prompts, most, ends),) = seen
    wanted = [f"<s><|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in ("2+2?", "why?")]
    assert prompts == wanted and ends == ["</s>"]
    assert most == len("blue") + accuracy.SPARE  # a token a character
    measure("run", model, tokenizer, rows)
    assert len(seen) == 2
    assert measure("run", model, tokenizer, rows[2:]) == {}
