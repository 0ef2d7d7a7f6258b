"""A GGUF file as a model. transformers' reader is stood in for: a real file is as large as a model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from tiny import rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError
from hf_neuronselect.models import gguf
from hf_neuronselect.models.pin import pin_model


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that transformers would read as the tiny model."""
    (tmp_path / "downloads").mkdir()
    made = tmp_path / "downloads" / "Tiny.Q4_0.GGUF"
    made.write_bytes(b"GGUF and so on")
    monkeypatch.setattr(gguf, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    return made


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What transformers was asked to read."""
    asked: list[str] = []

    def model(folder: Path, *, gguf_file: str, dtype: torch.dtype) -> Any:
        asked.append(gguf_file)
        read = tiny_model("llama")
        read.config.quantization_config = {"quant_method": "gguf"}
        return read

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder, gguf_file: tiny_tokenizer())
    return asked


def test_a_gguf_file_is_unpacked_once_and_is_a_model_like_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        asked = reads(patch)
        first, again = (pin_model(str(file), revision=None, token=None) for _ in range(2))
    assert asked == [file.name] and first == again and first.id == "Tiny.Q4_0"
    extractor = NeuronFeatureExtractor.from_pretrained(str(file), features=["hidden"])
    assert extractor.extraction.model == first
    assert not any(extractor(rows(3)[:])["neuron_skip"])


def test_what_cannot_be_unpacked_is_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*words: Any, **more: Any) -> None:
        raise ValueError("GGUF model with architecture odd\nis not supported yet.")

    def refused(name: Path) -> str:
        with pytest.raises(NeuronSelectError) as caught:
            pin_model(str(name), revision=None, token=None)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    assert "architecture odd is not supported" in refused(file)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in refused(file)
    assert "no such" in refused(file.with_name("other.gguf"))
    file.rename(file.with_suffix(".gguf"))
    assert f"name the GGUF file: {file.parent}/Tiny.Q4_0.gguf" in refused(file.parent)
