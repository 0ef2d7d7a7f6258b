"""Small real things, made once a session: a saved tiny model with its tokenizer and SAE, a pool, a target."""

# ruff: noqa: E402 (the environment is set before anything reads it)
from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Tests run in several processes, one core each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets counts downloads elsewhere, whatever the endpoint
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }

import datasets.config
import faulty
import huggingface_hub.constants
import pytest
from chat_server import KEY, ChatServer, chatting
from datasets import Dataset
from families import tiny_model, tiny_tokenizer
from hub import Hub, running
from tiny import make_extractor, rows, write_sae

from hf_neuronselect import NeuronFeatureExtractor


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


@pytest.fixture(scope="session")
def extractor(tiny_folder: Path) -> NeuronFeatureExtractor:
    return make_extractor(tiny_folder)


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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ChatServer]:
    """A server, an empty cache, a key; ``server.url`` is its base URL."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    told = ChatServer()
    with chatting(told) as url:
        told.url = url
        yield told
