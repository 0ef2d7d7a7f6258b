"""``Dataset.map`` gives every row its columns, whatever the dataset's format, row by row and in batches."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from hf_neuronselect import NeuronFeatureExtractor

TURNS: list[dict[str, Any]] = [{"role": "user", "content": "two and two"}, {"role": "assistant", "content": "four"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": TURNS}, {"messages": [*TURNS, *TURNS]}],
    "qa": [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}],
}


@pytest.mark.parametrize("kind", sorted(ROWS))
@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow", "torch"])
def test_formats(form: str, kind: str, extractor: NeuronFeatureExtractor) -> None:
    plain = Dataset.from_list(ROWS[kind])
    want = plain.map(extractor, batched=True)
    found = plain.with_format(form).map(extractor, batched=True).with_format(None)
    assert found["neuron_skip"] == ["", ""] and found["n_tokens"] == want["n_tokens"]


@pytest.mark.parametrize("empty", ["first", "last", "all"])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_rows_without_turns_one_by_one(column: str, empty: str, extractor: NeuronFeatureExtractor) -> None:
    rows: list[dict[str, Any]] = {
        "first": [{column: []}, {column: TURNS}],
        "last": [{column: TURNS}, {column: []}],
        "all": [{column: []}, {column: []}],
    }[empty]
    found = Dataset.from_list(rows).map(extractor)
    assert found["neuron_skip"] == ["" if row[column] else "empty" for row in rows]
    if empty != "all":
        assert found.features["n_tokens"] == Dataset.from_list(rows).map(extractor, batched=True).features["n_tokens"]
