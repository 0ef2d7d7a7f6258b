"""Small real things, made once a session: a saved tiny model with its tokenizer and SAE, a pool, a target."""

# ruff: noqa: E402 (the environment is set before anything reads it)
from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# The clients read these when they are imported. Nothing of the developer's own: no token, no cache, no real Hub. The
# port is kept and closed until the `hub` fixture serves on it: without it, a request is refused at once.
PORT = socket.socket()
if "PYTEST_CURRENT_TEST" not in os.environ:  # else a worker that a test started: it keeps its parent's
    PORT.bind(("127.0.0.1", 0))
    home = tempfile.mkdtemp(prefix="hf_home_")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
        del os.environ[name]
    os.environ |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{PORT.getsockname()[1]}",
        "HF_TOKEN": "hf_secret",
        "HF_HOME": home,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets counts downloads elsewhere, whatever the endpoint
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }

import datasets.config
import faulty
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from datasets import Dataset
from families import tiny_model, tiny_tokenizer
from hub import Hub, running
from safetensors.torch import save_file

from hf_neuronselect import NeuronFeatureExtractor

LATENTS, K = 96, 6
ALL = ("mona", "nait", "polysemantic", "hidden")


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """A Hub that this process's clients, and those of its children, push to and load from."""
    made = Hub()
    with running(made, PORT):
        yield made


@pytest.fixture(autouse=True)
def offline_without_a_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "hub" not in request.fixturenames:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model/`` (a 4-block Llama, hidden 32) and ``sae/layers.2`` (sparsify format)."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    write_sae(folder / "sae" / "layers.2", 32)
    return folder


def write_sae(folder: Path, width: int, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(LATENTS, width, generator=generator) / width**0.5
    folder.mkdir(parents=True)
    tensors = {
        "encoder.weight": weight,
        "encoder.bias": 0.1 * torch.randn(LATENTS, generator=generator),
        "W_dec": weight.clone(),
        "b_dec": 0.1 * torch.randn(width, generator=generator),
    }
    save_file(tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "k": K, "num_latents": LATENTS, "d_in": width, "expansion_factor": 3}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def make_extractor(folder: Path, **options: object) -> NeuronFeatureExtractor:
    options = {"features": ALL, "sae": str(folder / "sae"), "value_dtype": "float32"} | options
    return NeuronFeatureExtractor.from_pretrained(str(folder / "model"), **options)


@pytest.fixture(scope="session")
def extractor(tiny_folder: Path) -> NeuronFeatureExtractor:
    return make_extractor(tiny_folder)


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows(n: int, seed: int = 0) -> Dataset:
    """Random rows of different lengths; no two are the same."""
    draw = np.random.default_rng(seed)
    words = ["add", "two", "numbers", "print", "list", "def", "why", "is", "the", "sky", "blue", "7", "+", "5"]

    def text(most: int) -> str:
        return " ".join(draw.choice(words, size=draw.integers(1, most)))

    return Dataset.from_list(
        [{"messages": chat(f"{text(12)} #{seed}.{i}?", text(20)), "source": f"s{i % 3}", "id": i} for i in range(n)]
    )


@pytest.fixture(scope="session")
def pool() -> Dataset:
    return rows(60)


@pytest.fixture(scope="session")
def target() -> Dataset:
    return rows(6, seed=1)


@pytest.fixture(scope="session")
def pool24() -> Dataset:
    """The pool of six shards, in which a faulty extractor knows its rows."""
    return rows(faulty.N)


@pytest.fixture
def make_faulty(extractor: NeuronFeatureExtractor, tmp_path: Path) -> Callable[..., faulty.Faulty]:
    return lambda deeds: faulty.make_faulty(extractor, deeds, tmp_path / "counted")
