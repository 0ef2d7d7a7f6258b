"""Rows of any shape: scoring, training and exports read the same text of each, or refuse it for the same reason."""

from __future__ import annotations

import json
from typing import Any

from chats import QWEN25
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.export.base import BaseModel, Files, Rows
from hf_neuronselect.export.export import EXPORTERS
from hf_neuronselect.rows.answers import AnswerEncoder, answered
from hf_neuronselect.rows.encode import SampleEncoder
from hf_neuronselect.rows.formats import Conversation, read_row, row_format
from hf_neuronselect.rows.turns import RESULTS

WORDS = st.text("ab c\n", max_size=8)
TEXT = WORDS | st.none() | st.lists(WORDS, max_size=2).map(lambda t: [{"type": "text", "text": x} for x in t])
CALLS = st.none() | st.fixed_dictionaries({"x": st.none() | st.integers(0, 9)}).map(
    lambda arguments: [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT}, optional={"tool_calls": CALLS}
)
TURNS = st.lists(TURN, max_size=4) | st.none()
TOOLS = st.sampled_from([None, "", "[]", "null", [], '[{"name": "f"}]', [{"name": "f", "x": None}]])
SAID = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "tool"]), "value": TEXT})
ROWS = st.one_of(
    st.fixed_dictionaries({"messages": TURNS, "tools": TOOLS}),
    st.fixed_dictionaries({"prompt": WORDS | TURNS, "completion": WORDS | TURNS}, optional={"tools": TOOLS}),
    st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}, optional={"input": TEXT, "system": TEXT}),
    st.fixed_dictionaries({"conversations": st.lists(SAID, max_size=4)}, optional={"system": TEXT, "tools": TOOLS}),
)


@given(row=ROWS)
@settings(max_examples=80, deadline=None)
def test_scoring_and_training_read_the_same(row: dict[str, Any]) -> None:
    read = read_row(row, row_format(row))
    (scored,) = SampleEncoder(QWEN25.tokenizer).encode([read])
    (trained,) = AnswerEncoder(QWEN25.tokenizer).encode([read])
    if scored.skip:
        assert trained.skip in (scored.skip, "error: no assistant turn with an answer")
    elif not trained.skip:
        assert trained.input_ids.tolist() == scored.input_ids.tolist() and trained.pooled.any()
    else:
        assert trained.skip.startswith("error: no assistant t")


# ------------------------------------------------------------------------------------------------ exporters
def trl_reads(files: Files) -> Conversation:
    """``trl sft`` gives messages and tools, which are JSON text, to the chat template."""
    line = json.loads(str(files["train.jsonl"]))
    turns = [{name: value for name, value in turn.items() if name != "source_index"} for turn in line["messages"]]
    return Conversation(messages=turns, tools=json.loads(line.get("tools", "null")))


def axolotl_reads(files: Files) -> Conversation:
    """``type: chat_template`` reads arguments and parameters that are JSON text as objects."""
    line = json.loads(str(files["train.jsonl"]))
    for turn in line["messages"]:
        for call in turn.get("tool_calls") or ():
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return Conversation(messages=line["messages"], tools=line.get("tools"))


def unsloth_reads(files: Files) -> Conversation:
    """The script gives each row to the chat template."""
    line = json.loads(str(files["train.jsonl"]))
    return Conversation(messages=line["conversations"], tools=line.get("tools"))


def llamafactory_reads(files: Files) -> Conversation:
    """``formatting: sharegpt``: a system text beside the turns, calls as a JSON list, results of tools in one turn."""
    info = json.loads(str(files["dataset_info.json"]))["selection"]
    (line,) = json.loads(str(files[info["file_name"]]))
    columns = {ours: line[theirs] for ours, theirs in info["columns"].items()}
    roles = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
    turns: list[dict[str, Any]] = []
    for said in columns["messages"]:
        turn = {"role": roles[said["from"]], "content": said["value"]}
        if said["from"] == "function_call":
            before, mark, calls = said["value"].partition("<tool_call>")
            calls = calls.removesuffix("</tool_call>") if mark else before
            turn = {"role": "assistant", "content": before if mark else "", "tool_calls": json.loads(calls)}
        turns.append(turn)
    system = [{"role": "system", "content": columns["system"]}] if columns["system"] else []
    return Conversation(messages=system + turns, tools=json.loads(columns.get("tools") or "null"))


TAKE = {"trl": trl_reads, "axolotl": axolotl_reads, "unsloth": unsloth_reads, "llamafactory": llamafactory_reads}


def turns_of(conversation: Conversation) -> list[tuple[str, str, list[Any]]]:
    """Turns as LLaMA-Factory can hold them: results that follow each other are one, an empty system text is none."""
    found: list[tuple[str, str, list[Any]]] = []
    for turn in conversation.messages:
        calls = [call.get("function", call) for call in turn.get("tool_calls") or ()]
        made = [(call["name"], call.get("arguments", {})) for call in calls]
        text = turn["content"] if not made or turn["content"].strip() else ""
        if turn["role"] == "tool" and found and found[-1][0] == "tool":
            found[-1] = ("tool", found[-1][1] + RESULTS + text, [])
        elif turn["role"] != "system" or text:
            found.append((turn["role"], text, made))
    return found


@given(row=ROWS)
@settings(max_examples=80, deadline=None)
def test_every_exporter_hands_over_the_same(row: dict[str, Any]) -> None:
    """Read back as each trainer documents it, an exported row is the scored text; as token ids, the scored tokens."""
    read = read_row(row, row_format(row))
    encoder = SampleEncoder(QWEN25.tokenizer)
    (scored,), (trained,) = encoder.encode([read]), AnswerEncoder(QWEN25.tokenizer).encode([read])
    if scored.skip or read.text is not None or not answered(read):
        return  # an export refuses such a row
    assert set(TAKE) == set(EXPORTERS)
    for name, exporter in EXPORTERS.items():
        try:
            taken = TAKE[name](exporter.write(Rows([read], [0]), BaseModel("org/lm", None), 512))
        except NeuronSelectError as refusal:
            assert name == "llamafactory" and "row 0 of the selection" in str(refusal)
            continue
        if name == "llamafactory":
            assert turns_of(taken) == turns_of(read) and (taken.tools or None) == (read.tools or None)
        else:
            assert encoder.render(taken) == encoder.render(read), name
        base = BaseModel("org/lm", None, QWEN25.tokenizer)
        if exporter.tokens(base) and not trained.skip:
            text = str(exporter.write(Rows([read], [0], [trained]), base, 512)["train.jsonl"])
            line = json.loads(text)
            assert line["input_ids"] == scored.input_ids.tolist() == trained.input_ids.tolist()
            learnt = line.get("assistant_masks") or [int(label != -100) for label in line["labels"]]
            assert learnt == trained.pooled.astype(int).tolist()
