"""Rows of every format to messages, tokens and the spans of the turns."""

from __future__ import annotations

import json
import re
from datetime import date, datetime, time
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from families import CHATML, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.rows.answers import AnswerEncoder
from hf_neuronselect.rows.encode import Sample, SampleEncoder
from hf_neuronselect.rows.formats import Conversation, read_row, row_format, rows_of
from hf_neuronselect.rows.leakage import exact_key
from hf_neuronselect.rows.turns import RESULTS, ROLES

TOKENIZER = tiny_tokenizer()
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def _m(*turns: str) -> list[dict[str, Any]]:
    """``"user: hi"`` ... as messages."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


QA = _m("user: q", "assistant: a")


def _read(row: dict[str, Any], **how: Any) -> Conversation:
    return read_row(row, row_format(row, **how))


def _encode(*rows: Any, tokenizer: Any = TOKENIZER, **options: Any) -> list[Sample]:
    """Rows given as messages or as whole rows."""
    rows = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    return SampleEncoder(tokenizer, **options).encode([_read(row) for row in rows])


def _text(sample: Sample, mask: np.ndarray | None = None) -> str:
    ids = sample.input_ids if mask is None else sample.input_ids[mask]
    return "".join(TOKENIZER.convert_ids_to_tokens(ids.tolist()))


def _span_texts(
    messages: list[dict[str, Any]], roles: Any, tokenizer: Any = TOKENIZER, tools: list | None = None
) -> list[str]:
    encoder = SampleEncoder(tokenizer, marks=["content"])
    conversation = Conversation(messages=messages, tools=tools)
    rendered = encoder.render(conversation)
    return [rendered[start:end] for start, end in encoder.spans(conversation, rendered, roles)]


def _generation_mask(messages: list[dict[str, Any]], tokenizer: Any = TOKENIZER) -> list[bool]:
    got = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return [bool(inside) for inside in got["assistant_masks"]]


# ------------------------------------------------------------------------------------- row formats
@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"messages": QA, "id": 3}, QA),
        ({"messages": _m("system: s", "user: q", "assistant: a", "user: r", "assistant: b")}, None),
        ({"prompt": "q", "completion": "a"}, QA),
        ({"prompt": QA[:1], "completion": QA[1:]}, QA),
        ({"question": "q", "answer": "a"}, QA),
        ({"prompt": _m("system: s", "user: q"), "completion": "a"}, _m("system: s", "user: q", "assistant: a")),
        ({"instruction": "q", "output": "a"}, QA),
        ({"instruction": "q", "input": "more", "output": "a"}, _m("user: q\n\nmore", "assistant: a")),
        ({"instruction": "q", "input": " \n", "output": "a"}, QA),
        ({"instruction": "q", "input": None, "system": None, "output": "a"}, QA),
        ({"instruction": "q", "system": "s", "output": "a"}, _m("system: s", "user: q", "assistant: a")),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
        (
            {
                "conversations": [
                    {"from": speaker, "value": "x"}
                    for speaker in ("system", "user", "chatgpt", "bot", "model", "assistant", "observation", "tool")
                ]
            },
            [
                {"role": role, "content": "x"}
                for role in ("system", "user", "assistant", "assistant", "assistant", "assistant", "tool", "tool")
            ],
        ),
        ({"conversations": [{"from": "human", "value": "q"}], "system": "s"}, _m("system: s", "user: q")),
        ({"messages": [{"role": "user", "content": "q", "name": None, "tool_calls": None}]}, _m("user: q")),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"text": "r"}]}]},
            _m("user: q\nr"),
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "reasoning_content": "hm"}]},
            [{"role": "assistant", "content": "a", "reasoning_content": "hm"}],
        ),
    ],
)
def test_formats(row: dict[str, Any], want: list | None) -> None:
    got = _read(row)
    assert not got.skip and got.text is None
    assert got.messages == (row["messages"] if want is None else want)


ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WRITTEN = '{"name": "add", "arguments": {"a": 1}}'
THOUGHT = "<think>\nHm.\n</think>\n\n"


@pytest.mark.parametrize(
    ("turn", "want"),
    [
        ({"role": "user", "content": "q"}, {"role": "user", "content": "q"}),
        ({"from": " User ", "value": "q"}, {"role": "user", "content": "q"}),
        ({"from": "HUMAN", "value": "q", "weight": 1}, {"role": "user", "content": "q"}),
        ({"from": "Gpt", "value": 5}, {"role": "assistant", "content": "5"}),
        ({"role": "Assistant", "content": "a", "weight": 1}, {"role": "assistant", "content": "a", "weight": 1}),
        ({"from": "function_call", "value": WRITTEN}, {"role": "assistant", "content": "", "tool_calls": [ADD]}),
        ({"from": "Tool_Call", "value": f"[{WRITTEN}, {WRITTEN}]"},
         {"role": "assistant", "content": "", "tool_calls": [ADD, ADD]}),
        ({"from": "function_call", "value": f"{THOUGHT}[{WRITTEN}]"},
         {"role": "assistant", "content": THOUGHT, "tool_calls": [ADD]}),
        ({"from": "function_call", "value": f"Well.<tool_call>{WRITTEN}</tool_call>"},
         {"role": "assistant", "content": "Well.", "tool_calls": [ADD]}),
        ({"from": "function_call", "value": "add(1)"}, {"role": "assistant", "content": "add(1)"}),
        ({"from": "observation", "value": 2.5}, {"role": "tool", "content": "2.5"}),
        ({"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]},
         {"role": "assistant", "content": "", "tool_calls": [ADD]}),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "no"}}]},
         {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "no"}}]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_turns_however_they_are_written(turn: dict[str, Any], want: dict[str, Any], column: str) -> None:
    first = {"role": "user", "content": "q"}
    for written in ([first, turn], json.dumps([first, turn])):
        got = _read({column: written})
        assert got.messages == [first, want] and not got.skip, got
        assert list(got.messages[1])[:2] == list(want)[:2]  # templates that print a whole turn keep its order


def test_joined_results_of_tools_are_told_apart() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "observation", "value": f"1{RESULTS}2"}]
    assert _read({"conversations": turns}).messages == [*_m("user: q"), *_m("tool: 1", "tool: 2")]
    plain = [{"role": "tool", "content": f"1{RESULTS}2"}]
    assert _read({"messages": plain}).messages == plain


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"), (1.5, "1.5"), (True, "true"), (np.float32(2), "2.0"), (Decimal("1.10"), "1.10"),
        (date(2024, 3, 1), "2024-03-01"), (datetime(2024, 3, 1, 10), "2024-03-01 10:00:00"), (time(9, 30), "09:30:00"),
        ("null", "null"), ("None", "None"),
    ],
)  # fmt: skip
def test_single_values_are_texts(value: Any, text: str) -> None:
    assert _read({"question": "q", "answer": value}).messages == _m("user: q", f"assistant: {text}")
    assert _read({"prompt": value, "completion": "a"}).messages == _m(f"user: {text}", "assistant: a")
    assert _read({"instruction": "q", "output": value}).messages == _m("user: q", f"assistant: {text}")
    assert _read({"text": value}).text == text
    assert _read({"messages": [{"role": "user", "content": value}]}).messages == _m(f"user: {text}")
    assert _read({"instruction": "q", "output": "a", "system": value}).messages[0]["content"] == text


@pytest.mark.parametrize("tools", ["", "  ", "[]", "null", None, [], [None], float("nan")])
def test_rows_without_tools(tools: Any) -> None:
    got = _read({"messages": QA, "tools": tools})
    assert got.messages == QA and got.tools is None and not got.skip


def test_tools_however_they_are_written() -> None:
    inner = TOOLS[0]["function"]
    typed = [{**TOOLS[0], "function": {**inner, "parameters": json.dumps(inner["parameters"])}}]
    for tools in (TOOLS, json.dumps(TOOLS), TOOLS[0], json.dumps(TOOLS[0]), [json.dumps(TOOLS[0])], typed):
        assert _read({"messages": QA, "tools": tools}).tools == TOOLS


def test_only_rows_equal_to_the_letter_are_the_same() -> None:
    rows = [
        {"messages": QA},
        {"messages": _m("user: Q", "assistant: a")},
        {"messages": _m("user: q ", "assistant: a")},
        {"messages": _m("system: ", "user: q", "assistant: a")},
        {"messages": QA, "tools": TOOLS},
        {"messages": QA, "tools": [TOOLS[0] | {"type": "other"}]},
        {"messages": [QA[0], QA[1] | {"tool_calls": [CALL]}]},
        {"messages": [QA[0], QA[1] | {"name": "n"}]},
        {"text": "q"},
        {"text": "Q"},
    ]
    assert len({exact_key(_read(row)) for row in rows}) == len(rows)
    same = [{"question": "q", "answer": "a"}, {"messages": json.dumps(QA), "tools": "[]"}]
    assert {exact_key(_read(row)) for row in same} == {exact_key(_read(rows[0]))}


def test_text_and_renamed_columns() -> None:
    assert _read({"text": "just text", "url": "u"}).text == "just text"
    row = {"question": "q", "response": "a", "context": "more"}
    renames = {"instruction": "question", "output": "response", "input": "context"}
    assert _read(row, renames=renames).messages == _m("user: q\n\nmore", "assistant: a")
    assert row_format(row, renames=renames).used == ["question", "response", "context"]
    both = {"text": "t", "messages": QA}
    assert row_format(both).name == "messages" and row_format(both, "text").name == "text"


@pytest.mark.parametrize(
    ("columns", "how", "match"),
    [
        (["a", "b"], {}, "columns missing: the data has a, b"),
        (["prompt"], {}, "columns missing"),
        ([], {}, "the data has none"),
        (["text"], {"name": "messages"}, "messages: messages"),
        (["text"], {"name": "mesages"}, "did you mean messages"),
        (["text"], {"renames": {"text": "body"}}, "no such column"),
    ],
)
def test_missing_columns(columns: list[str], how: dict, match: str) -> None:
    with pytest.raises(NeuronSelectError, match=match):
        row_format(columns, **how)


def test_tools_column() -> None:
    plain = _text(_encode(QA)[0])
    with_tools = _encode({"messages": QA, "tools": TOOLS}, {"messages": QA, "tools": None})
    assert '"name": "add"' in _text(with_tools[0]) and _text(with_tools[1]) == plain
    as_text = _encode({"messages": QA, "tools": '[{"type": "function", "function": {"name": "add"}}]'})[0]
    assert '"name": "add"' in _text(as_text)
    assert _read({"messages": QA, "tools": "{not json"}).skip == "error: tools is text that is not JSON"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None}, "empty"),
        ({"messages": []}, "empty"),
        ({"messages": _m("user:  ", "assistant: \n\t")}, "empty"),
        ({"prompt": None, "completion": "a"}, "empty"),
        ({"instruction": None, "output": None}, "empty"),
        ({"conversations": None}, "empty"),
        ({"text": None}, "empty"),
        ({"text": " \n"}, "empty"),
        ({"messages": "user: q"}, "messages is str"),
        ({"messages": 5}, "messages is int"),
        ({"messages": ["q"]}, r"messages\[0\] is str"),
        ({"messages": [None]}, r"messages\[0\] is NoneType"),
        ({"messages": _m("wizard: q")}, "unknown role 'wizard'"),
        ({"messages": [{"content": "q"}]}, "unknown role None"),
        ({"messages": [{"role": 3, "content": "q"}]}, "unknown role 3"),
        ({"messages": [*QA, {"role": "user", "content": None}]}, r"messages\[2\].content is NoneType"),
        ({"messages": [{"role": "user", "content": {"text": "q"}}]}, "content is dict"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "part of type 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "part of type 'text'"),
        ({"messages": [{"role": "user", "content": ["q"]}]}, "part of type 'str'"),
        ({"instruction": "q", "output": None}, "output is NoneType"),
        ({"instruction": "q", "output": "a", "system": ["s"]}, "system holds a part"),
        ({"text": {"a": 1}}, "text is dict"),
        ({"question": "q", "answer": float("inf")}, "answer is float"),
        ({"question": "q", "answer": float("nan")}, "empty"),
        ({"messages": '{"role": "user"}'}, "messages is str"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "tool_calls is int"),
        ({"messages": _m("user: q"), "tools": "5"}, "tools is int"),
        ({"conversations": [{"from": "wizard", "value": "q"}]}, "unknown role 'wizard'"),
        ({"conversations": [{"from": "human", "value": None}]}, "content is NoneType"),
        ({"conversations": "x"}, "conversations is str"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: dict[str, Any], reason: str) -> None:
    got = _read(row)
    assert re.fullmatch("empty" if reason == "empty" else f"error: .*{reason}.*", got.skip)
    assert not got.messages
    sample = _encode(row)[0]
    assert sample.skip == got.skip and len(sample.input_ids) == len(sample.pooled) == sample.n_total == 0


@pytest.mark.parametrize("role", [["user"], {"a": 1}])
def test_a_role_that_is_no_text(role: Any) -> None:
    assert "unknown role" in _read({"messages": [{"role": role, "content": "q"}]}).skip
    assert "unknown role" in _read({"conversations": [{"from": role, "value": "q"}]}).skip


def test_keys_that_arrow_filled_with_none_are_not_rendered() -> None:
    """Arrow gives every row's tool call the argument keys of every other row's."""
    filled = CALL | {"function": {"name": "add", "arguments": {"a": 1, "b": None}}, "x": None}
    rows = [[{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}] for call in (CALL, filled)]
    one, other = _encode(*rows)
    assert _text(one) == _text(other)


def test_rows_keep_their_place_and_are_told_apart_by_content() -> None:
    samples = _encode(None, QA, [], _m("user: r", "assistant: b"))
    assert [bool(sample.skip) for sample in samples] == [True, False, True, False]
    assert rows_of({"a": [1, 2], "b": [3, 4]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    conversation = _read({"messages": [*QA, {"role": "assistant", "tool_calls": [CALL]}]})
    assert conversation.questions() == ["q"]
    assert conversation.content() != _read({"messages": [*QA, _m("assistant: ")[0]]}).content()
    assert _read({"text": "t"}).content() == "t"


# ------------------------------------------------------------------------- rendering and tokenising
def test_plain_form_without_a_chat_template() -> None:
    plain = tiny_tokenizer(None)
    sample = _encode(_m("system: s", "user: q", "assistant: a", "user: r", "assistant: b"), tokenizer=plain)[0]
    want = "<s><|system|>\ns\n<|user|>\nq\n<|assistant|>\na</s>\n<|user|>\nr\n<|assistant|>\nb</s>\n"
    assert _text(sample) == want
    assert sample.input_ids.tolist().count(plain.bos_token_id) == 1
    assert sample.input_ids.tolist().count(plain.eos_token_id) == 2
    pooled = _encode(QA, tokenizer=plain, pool_tokens="assistant")[0]
    assert _text(pooled, pooled.pooled).removesuffix("</s>") == "a"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_no_double_bos(adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    chat, text, marked = _encode(QA, tokenizer=tokenizer) + _encode(
        {"text": "hello"}, {"text": "<s>hello"}, tokenizer=tokenizer
    )
    assert _text(chat) == "<s><|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert chat.input_ids.tolist() == TOKENIZER.apply_chat_template(QA, return_dict=True)["input_ids"]
    assert _text(text) == ("<s>hello" if adds_bos else "hello")
    assert _text(marked) == _text(text) or not adds_bos


def test_text_rows_spans() -> None:
    row = {"text": "hello"}
    found = _encode(row, marks=["content", "answer"])[0]
    assert _text(found, found.marks["content"]) == _text(found, found.marks["answer"]) == "hello"
    sample = _encode(row, pool_tokens="no_special")[0]
    assert _text(sample, sample.pooled) == "hello"
    assert "no assistant turn" in _encode(row, pool_tokens="assistant")[0].skip


def test_another_chat_template() -> None:
    other = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    for tokenizer in (TOKENIZER, tiny_tokenizer(None)):
        assert _text(_encode(QA, tokenizer=tokenizer, chat_template=other)[0]) == "[user] q [assistant] a "


def test_pooled_tokens() -> None:
    chat = _m("system: sys", "user: ask", "assistant: one", "user: more", "assistant: two")
    want = {"assistant": "onetwo", "user": "askmore", "content": "sysaskonemoretwo"}
    for pool_tokens, text in want.items():
        sample = _encode(chat, pool_tokens=pool_tokens)[0]
        assert _text(sample, sample.pooled) == text
    assert _encode(chat)[0].pooled.all()
    sample = _encode(chat, pool_tokens="no_special")[0]
    assert _text(sample, sample.pooled) == "system\nsys\nuser\nask\nassistant\none\nuser\nmore\nassistant\ntwo\n"
    found = _encode(chat, marks=["content", "answer"])[0]
    assert (
        _text(found, found.marks["content"]) == "sysaskonemoretwo" and _text(found, found.marks["answer"]) == "onetwo"
    )
    assert found.pooled.all()
    for pool_tokens, other in (("assistant", "user"), ("user", "assistant")):
        assert f"no {pool_tokens} turn" in _encode(_m(f"{other}: x"), pool_tokens=pool_tokens)[0].skip


def test_the_end_of_the_prompt() -> None:
    """One token, the last before the first answer; none where there is no answer, no prompt, or it is cut off."""

    def end(row: Any, **options: Any) -> list[int]:
        return np.flatnonzero(_encode(row, marks=["prompt"], **options)[0].marks["prompt"]).tolist()

    chat = _m("system: sys", "user: ask", "assistant: one", "user: more", "assistant: two")
    head = "<s><|im_start|>system\nsys<|im_end|>\n<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n"
    length = len(TOKENIZER(head, add_special_tokens=False)["input_ids"])
    assert end(chat) == [length - 1] == end(chat, pool_tokens="assistant")
    assert end(chat, max_length=length + 1) == [length - 1]
    assert end(chat, max_length=length) == [length - 1] and end(chat, max_length=length - 1) == []
    whole = len(_encode(chat)[0].input_ids)
    assert end(chat, max_length=whole - 5, truncation_side="left") == [length - 6]
    assert end(_m("user: ask", "assistant: ", "user: well?", "assistant: yes")) != end(_m("user: ask", "assistant: x"))
    assert end(_m("user: ask")) == end({"text": "hello"}) == []
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert end(_m("assistant: one"), chat_template=bare) == []
    assert end(_m("user: ask", "assistant: one"), chat_template=bare) == [2]


def test_truncation_is_recorded_with_the_true_length() -> None:
    chat = _m("user: 0123456789", "assistant: abcdefghij")
    whole = _encode(chat)[0]
    assert not whole.truncated and whole.n_total == len(whole.input_ids) == 42
    for side, part in (("right", slice(0, 12)), ("left", slice(-12, None))):
        cut = _encode(chat, max_length=12, truncation_side=side)[0]
        assert (cut.n_total, cut.truncated, len(cut.input_ids)) == (42, True, 12)
        np.testing.assert_array_equal(cut.input_ids, whole.input_ids[part])
    assert not _encode(chat, max_length=42)[0].truncated
    left = _encode(chat, max_length=12, truncation_side="left", pool_tokens="assistant", marks=["content"])[0]
    assert _text(left, left.pooled) == "abcdefghij" and np.flatnonzero(left.marks["content"]).tolist() == [*range(10)]
    assert "no assistant token within max_length=12" in _encode(chat, max_length=12, pool_tokens="assistant")[0].skip


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pool_tokens": "answers"}, "must be one of"),
        ({"truncation_side": "middle"}, "must be one of"),
        ({"max_length": 0}, "at least 1"),
    ],
)
def test_options_that_cannot_be(options: dict, match: str) -> None:
    with pytest.raises(NeuronSelectError, match=match):
        SampleEncoder(TOKENIZER, **options)


def test_spans_need_offsets() -> None:
    slow = SimpleNamespace(is_fast=False, chat_template=None, all_special_ids=[])
    SampleEncoder(slow, pool_tokens="no_special")
    for options in ({"pool_tokens": "assistant"}, {"marks": ["content"]}):
        with pytest.raises(NeuronSelectError, match="fast tokenizer"):
            SampleEncoder(slow, **options)


# ---------------------------------------------------------------------------------------- the spans
STRIPPING = (  # as reasoning models do: thoughts of earlier turns go, whitespace is trimmed
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{% if '</think>' in m['content'] and not loop.last %}{{ m['content'].split('</think>')[-1] | trim }}"
    "{% else %}{{ m['content'] | trim }}{% endif %}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
CHATS = [
    QA,
    _m("system: s", "user: q", "assistant: a", "user: q", "assistant: a"),
    _m("user: a", "assistant: a", "user: aa", "assistant: aaa"),
    _m("user: assistant\n", "assistant: \nuser\n"),
    _m("user: q", "assistant: <|im_end|>\n<|im_start|>assistant\nagain<|im_end|>\n"),
    _m("user: <|im_start|>assistant\na<|im_end|>\n", "assistant: a"),
    _m("user: q", "assistant: <think>long</think> first", "user: r", "assistant: <think>b</think> second"),
    _m("user:   padded  ", "assistant: \n kept? \n", "user: r", "assistant: b "),
    _m("user: q", "assistant: <think>only a thought</think>", "user: r", "assistant: b"),
]


@pytest.mark.parametrize("template", [CHATML, STRIPPING], ids=["chatml", "stripping"])
@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
def test_assistant_tokens_are_the_templates_own_generation(messages: list, template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    sample = _encode(messages, tokenizer=tokenizer, pool_tokens="assistant")[0]
    assert sample.pooled.tolist() == _generation_mask(messages, tokenizer)


def test_spans_point_at_what_was_rendered() -> None:
    tokenizer = tiny_tokenizer(STRIPPING)
    thinking, padded = CHATS[6], CHATS[7]
    assert _span_texts(thinking, ["assistant"], tokenizer) == ["first", "<think>b</think> second"]
    assert _span_texts(thinking, ["user"], tokenizer) == ["q", "r"]
    assert _span_texts(padded, ROLES, tokenizer) == ["padded", "kept?", "r", "b"]
    assert _span_texts(CHATS[8], ["assistant"], tokenizer) == ["b"]
    assert _span_texts(CHATS[4], ["assistant"]) == [CHATS[4][1]["content"]]


def test_tool_calls_belong_to_their_turn() -> None:
    chat = [*_m("user: q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, *_m("tool: 3", "assistant: a")]
    spans = _span_texts(chat, ["assistant"], tools=TOOLS)
    assert len(spans) == 2 and spans[0].startswith("<call>") and spans[0].endswith("</call>") and spans[1] == "a"
    assert _span_texts(chat, ["tool"], tools=TOOLS) == ["3"]


def test_a_template_that_raises_is_a_counted_skip() -> None:
    strict = CHATML.replace(
        "{% for m in messages %}",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no\n system   turn') }}{% endif %}"
        "{% for m in messages %}",
        1,
    )
    for options in ({}, {"pool_tokens": "assistant"}, {"marks": ["content"]}):
        bad, good = _encode(_m("system: s", "user: q", "assistant: a"), QA, tokenizer=tiny_tokenizer(strict), **options)
        assert bad.skip == "error: the chat template refused the row: no system turn"
        assert not good.skip and len(good.input_ids)


STRICT_TOOLS = (  # as Mistral's: a tool turn needs its id, and turns alternate, tool calls not counted
    "{% set ns = namespace(i=0) %}{% for m in messages %}"
    "{% if m['role'] == 'user' or (m['role'] == 'assistant' and m['tool_calls'] is undefined) %}"
    "{% if (m['role'] == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.i = ns.i + 1 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'tool' and m['tool_call_id'] is undefined %}"
    "{{ raise_exception('a tool turn needs its id') }}{% endif %}"
    "{{ '[' + m['role'] + ']' }}{% if m['tool_calls'] is defined %}{{ m['tool_calls'] | tojson }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '[/]' }}{% endfor %}"
)


def test_tool_turns_under_a_strict_template() -> None:
    """A row that renders is never refused because one of its turns was replaced to find its span."""
    chat = [
        *_m("user: q"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": CALL["id"]},
        *_m("assistant: a"),
    ]
    tokenizer = tiny_tokenizer(STRICT_TOOLS)
    assert not _encode(chat, tokenizer=tokenizer)[0].skip
    for options in ({"pool_tokens": "assistant"}, {"marks": ["content"]}):
        assert _encode(chat, tokenizer=tokenizer, **options)[0].skip == ""
    assert _span_texts(chat, ["tool"], tokenizer) == ["3"]
    assert _span_texts(chat, ["assistant"], tokenizer)[-1] == "a"


@pytest.mark.parametrize("content", ["\ue000", "\ue000abc", "abc\ue000", "a\ue000b"])
def test_content_that_holds_a_private_use_character(content: str) -> None:
    assert _span_texts([{"role": "user", "content": content}], ["user"]) == [content]


PIECES = st.one_of(
    st.text(st.characters(exclude_categories=("Cs", "Co")), max_size=12),
    st.sampled_from(["<|im_start|>", "<|im_end|>", "\n", "<s>", "user", "assistant\n", "{{ x }}", "{% if %}", " "]),
)
CONTENT = st.lists(PIECES, max_size=4).map("".join)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), CONTENT), min_size=1, max_size=6)


@settings(deadline=None, max_examples=150)
@given(TURNS)
def test_every_span_is_its_turns_content(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    for roles in (ROLES, ["assistant"], ["user"]):
        want = [content for role, content in turns if role in roles and content]
        assert _span_texts(messages, roles) == want


@settings(deadline=None, max_examples=50)
@given(TURNS)
def test_pooled_assistant_tokens_of_any_content(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    sample = _encode(messages, pool_tokens="assistant")[0]
    if sample.skip:
        assert not any(role == "assistant" and content for role, content in turns) or sample.skip == "empty"
    else:
        assert sample.pooled.tolist() == _generation_mask(messages)


def test_reasoning_belongs_to_its_turn() -> None:
    template = CHATML.replace("{{ m['content'] }}", "{{ m['reasoning_content'] or '' }}{{ m['content'] }}")
    chat = [*_m("user: q"), {"role": "assistant", "content": "a", "reasoning_content": "hm, "}]
    assert _span_texts(chat, ["assistant"], tiny_tokenizer(template)) == ["hm, a"]


@pytest.mark.parametrize("template", [CHATML, STRIPPING], ids=["chatml", "stripping"])
def test_a_row_of_many_turns_is_rendered_twice(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = _m(*(f"{('user', 'assistant')[i % 2]}:  turn {i} " for i in range(600)))
    encoder = SampleEncoder(tiny_tokenizer(template), pool_tokens="assistant")
    conversation = Conversation(messages=chat)
    rendered = encoder.render(conversation)
    calls: list[Conversation] = []
    render = encoder.render
    monkeypatch.setattr(encoder, "render", lambda one: calls.append(one) or render(one))
    spans = encoder.spans(conversation, rendered, ["assistant"])
    want = [turn["content"].strip() if template == STRIPPING else turn["content"] for turn in chat[1::2]]
    assert [rendered[start:end] for start, end in spans] == want and len(calls) == 1


@settings(deadline=None, max_examples=60)
@given(TURNS, st.sampled_from([CHATML, STRIPPING]))
def test_spans_found_at_once_are_those_found_alone(turns: list[tuple[str, str]], template: str) -> None:
    conversation = Conversation(messages=[{"role": role, "content": content} for role, content in turns])
    encoder = SampleEncoder(tiny_tokenizer(template), marks=["content"])
    rendered = encoder.render(conversation)
    at_once = encoder.spans(conversation, rendered, ROLES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "_spans_at_once", lambda *_: None)
        assert encoder.spans(conversation, rendered, ROLES) == at_once


CLOCK = (
    "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}\n{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
)
MARKED = CLOCK.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")


@pytest.mark.parametrize("template", [CLOCK, MARKED], ids=["plain", "marked"])
def test_a_template_that_prints_the_time_gives_the_same_tokens_each_time(template: str) -> None:
    tokenizer, rows = tiny_tokenizer(template), [Conversation(messages=QA)]
    for encoder in (SampleEncoder(tokenizer, pool_tokens="assistant"), AnswerEncoder(tokenizer)):
        (one,), (other,) = encoder.encode(rows), encoder.encode(rows)
        assert not one.skip and one.input_ids.tolist() == other.input_ids.tolist()
        text = tokenizer.decode(one.input_ids)
        assert text.startswith("26 Jul 2024 00:00:00.000000")


@pytest.mark.parametrize(
    "word",
    ["{{ [1, 2] | random }}", "{{ [1, 2]|random }}", "{{ lipsum(1) }}", "{% set f = '%d' %}{{ strftime_now(f) }}"],
)
def test_a_template_that_prints_something_else_each_time_is_refused(word: str) -> None:
    with pytest.raises(NeuronSelectError, match="something else each time"):
        SampleEncoder(tiny_tokenizer(word + CLOCK))
    SampleEncoder(tiny_tokenizer("{{ messages[0].random }} | randomly " + CLOCK))
