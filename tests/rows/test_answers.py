"""The answers of a row, found in templates that do not mark them."""

from __future__ import annotations

from typing import Any

import pytest
from chats import CHATS, GEMMA, LLAMA3, MISTRAL, QWEN3, Chat
from tiny import chat

from hf_neuronselect.core import bundled
from hf_neuronselect.rows.answers import AnswerEncoder, left_out
from hf_neuronselect.rows.encode import SampleEncoder
from hf_neuronselect.rows.formats import Conversation

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "of x", "parameters": {"type": "object"}}}


def talk(kind: Chat) -> Conversation:
    """Several turns, with a system turn where the template takes one."""
    turns = [*chat("First?", "One answer."), *chat("And then, Paris?", "Paris, and more.")]
    return Conversation(messages=([{"role": "system", "content": "Be brief."}] if kind.system else []) + turns)


def calls() -> Conversation:
    turns = [{"role": "user", "content": "What is f of 1?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
             {"role": "tool", "content": "2"}, {"role": "assistant", "content": "It is 2."}]  # fmt: skip
    return Conversation(messages=turns, tools=[TOOL])


def learnt(tokenizer: Any, row: Conversation, **options: Any) -> list[str]:
    """The text of each run of answer tokens."""
    (sample,) = AnswerEncoder(tokenizer, **options).encode([row])
    assert not sample.skip, sample.skip
    runs: list[list[int]] = []
    for i, answer in enumerate(sample.pooled):
        if answer and (i == 0 or not sample.pooled[i - 1]):
            runs.append([])
        if answer:
            runs[-1].append(int(sample.input_ids[i]))
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", CHATS)
def test_the_answers_and_their_ends_are_learnt(name: str) -> None:
    kind = CHATS[name]
    space = " " * (kind is MISTRAL)  # a token a character: the template's own space is no answer
    assert learnt(kind.tokenizer, talk(kind)) == [f"One answer.{kind.end}", f"Paris, and more.{kind.end}"], space
    if kind.call is not None:
        assert learnt(kind.tokenizer, calls()) == [kind.call + kind.end, "It is 2." + kind.end]


@pytest.mark.parametrize("name", CHATS)
def test_they_are_the_tokens_of_scoring_and_the_ends(name: str) -> None:
    kind = CHATS[name]
    for row in [talk(kind)] + [calls()] * (kind.call is not None):
        (scored,) = SampleEncoder(kind.tokenizer, pool_tokens="assistant").encode([row])
        (found,) = AnswerEncoder(kind.tokenizer).encode([row])
        assert found.input_ids.tolist() == scored.input_ids.tolist()
        more = found.pooled & ~scored.pooled
        assert (found.pooled | scored.pooled).tolist() == found.pooled.tolist()
        assert {kind.tokenizer.decode([i]) for i in found.input_ids[more]} == {kind.end}


def test_subwords_that_hold_a_bit_of_the_template() -> None:
    from transformers import AutoTokenizer

    for kind in CHATS.values():
        tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
        tokenizer.add_tokens(list({*kind.marks, kind.end}), special_tokens=True)
        tokenizer.eos_token, tokenizer.chat_template = kind.end, kind.template
        found = [text.strip() for text in learnt(tokenizer, talk(kind))]
        assert found == [f"One answer.{kind.end}", f"Paris, and more.{kind.end}"]


def test_thoughts_are_part_of_the_answer() -> None:
    thought = "<think>\nTwo and two.\n</think>\n\nFour."
    row = Conversation(messages=chat("2+2?", thought))
    assert learnt(QWEN3.tokenizer, row) == [thought + QWEN3.end]
    # Earlier ones are cut by the template itself.
    row = Conversation(messages=[*chat("2+2?", thought), *chat("Sure?", "Yes.")])
    assert learnt(QWEN3.tokenizer, row) == ["Four." + QWEN3.end, "Yes." + QWEN3.end]


def test_space_before_the_end_of_text_is_learnt() -> None:
    template = MISTRAL.template.replace("m.content + '</s>'", "m.content + ' \n</s>'")
    tokenizer = Chat(template, "</s>", MISTRAL.marks).tokenizer
    assert learnt(tokenizer, Conversation(messages=chat("q", "a"))) == ["a \n</s>"]


def test_the_beginning_of_the_next_turn_is_not_learnt() -> None:
    """A template without ends: the token of the text's beginning follows an answer, and is none."""
    template = "{% for m in messages %}{{ bos_token + m.role + ': ' + m.content }}{% endfor %}"
    tokenizer = Chat(template, "</s>", ()).tokenizer
    assert learnt(tokenizer, Conversation(messages=[*chat("q", "a"), *chat("r", "b")])) == ["a", "b"]


def test_rows_without_an_answer_say_why() -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [
        Conversation(messages=chat("q", "a")),
        Conversation(messages=[system, *chat("q", "a")]),
        Conversation(messages=chat("q", " \n")),
        Conversation(messages=chat("q" * 80, "a")),
        Conversation(text="plain"),
        Conversation(skip="empty"),
    ]
    samples = AnswerEncoder(GEMMA.tokenizer, max_length=40).encode(rows)
    assert [sample.skip for sample in samples] == [
        "",
        "error: the chat template refused the row: no system role",
        "error: no assistant turn with an answer",
        "error: no assistant token within max_length=40",
        "error: no assistant turn with an answer",
        "empty",
    ]
    assert left_out(samples).startswith("no assistant turn with an answer (2), the chat template refused the row")
    # Cut on the left, the end of the long row is kept; the answer is not.
    (kept,) = AnswerEncoder(LLAMA3.tokenizer, max_length=20, truncation_side="left").encode([rows[3]])
    assert LLAMA3.tokenizer.decode(kept.input_ids[kept.pooled]) == "a<|eot_id|>"
