"""Rows of any shape: scoring and training read the same text of each, or refuse it for the same reason."""

from __future__ import annotations

from typing import Any

from chats import QWEN25
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_neuronselect.rows.answers import AnswerEncoder
from hf_neuronselect.rows.encode import SampleEncoder
from hf_neuronselect.rows.formats import read_row, row_format

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
