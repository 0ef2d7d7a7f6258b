"""The examples of docs/extend.md run as printed: an added method and an added signal work everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from chat_server import ChatServer, chatting
from datasets import Dataset
from tiny import ROOT, chat, make_extractor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_neuronselect import (
    NeuronFeatureExtractor,
    NeuronSelectError,
    NeuronSelector,
)
from hf_neuronselect.core.options import ExtractionOptions
from hf_neuronselect.methods import METHODS
from hf_neuronselect.pickers import PICKERS
from hf_neuronselect.signals.base import SIGNALS
from hf_neuronselect.store.store import FeatureStore, write_store

TEXTS = ["no", "a much longer answer", "yes, it is"]


@pytest.fixture
def example() -> Iterator[Callable[[str], None]]:
    """Runs the block that defines a class; what it registers is removed afterwards."""
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    registries = (METHODS, PICKERS, SIGNALS)
    before = [set(registry.names()) for registry in registries]

    def run(name: str) -> None:
        (block,) = (text for text in found if f"class {name}(" in text)
        names = {"__name__": "example"}
        exec(compile(found[0], "extend.md", "exec", dont_inherit=True), names)  # the page's imports
        exec(compile(block, "extend.md", "exec", dont_inherit=True), names)

    yield run
    for registry, names in zip(registries, before, strict=True):
        for name in set(registry.names()) - names:
            registry.remove(name)


def test_the_method_with_an_option(example: Callable[[str], None]) -> None:
    example("LongAnswers")
    pool = Dataset.from_dict({"text": TEXTS})
    assert NeuronSelector("long-answers").select(pool, k=3).indices.tolist() == [1, 2, 0]
    selection = NeuronSelector("long-answers", most=5).select(pool, k=3)
    assert selection.dataset["neuron_score"] == [5.0, 5.0, 2.0]
    assert selection.provenance.method.options == {"most": 5}
    with pytest.raises(NeuronSelectError, match="most"):
        NeuronSelector("long-answers", most=0)


def test_the_picker(example: Callable[[str], None]) -> None:
    example("Lottery")
    pool = Dataset.from_dict({"text": [*"abcdefgh"]})
    draws = [NeuronSelector("full", picker=f"lottery(seed={i})").select(pool, k=8).indices.tolist() for i in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2] and all(sorted(one) == list(range(8)) for one in draws)


def test_the_judge(example: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    example("Polite")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    with chatting(
        ChatServer(lambda prompt: "5" if "yes, it is" in prompt else "4" if "longer" in prompt else "1")
    ) as url:
        selector = NeuronSelector("polite", at=url)
        pool = Dataset.from_list([{"messages": chat("?", text)} for text in TEXTS])
        extractor = NeuronFeatureExtractor.from_options(ExtractionOptions(), selector.method.signals)
        assert selector.select(pool, extractor=extractor).indices.tolist() == [2, 1]


def test_the_signal(example: Callable[[str], None], tiny_folder: Path, pool: Dataset, tmp_path: Path) -> None:
    """The last token's state, by ``dataset.map`` and by a store, is the one that transformers computes."""
    example("LastState")
    few = pool.select(range(5))
    extractor = make_extractor(tiny_folder, features=["last_state"], layer=2)
    mapped = few.map(extractor, batched=True, batch_size=2)
    found = np.asarray(mapped["last_state"])
    model = AutoModelForCausalLM.from_pretrained(tiny_folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    for row, state in zip(few, found, strict=True):
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        seen: list[torch.Tensor] = []
        hook = model.model.layers[2].register_forward_hook(lambda block, given, made, seen=seen: seen.append(made))
        with torch.no_grad(), hook:
            model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids)
        np.testing.assert_allclose(state, seen[0][0, -1].numpy(), atol=1e-5)
    write_store(few, extractor, tmp_path / "store", pool_about={})
    stored = FeatureStore(tmp_path / "store").dataset("last_state")["last_state"]
    np.testing.assert_allclose(np.asarray(stored), found, atol=1e-5)
