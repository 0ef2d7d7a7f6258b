"""The encoder method: embeddings against a slow reference and the library's own, rows of any length, cosines, records."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from encoders import WIDTH, WINDOW, write_encoder
from hub import Hub
from huggingface_hub import HfApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny import rows
from transformers import AutoModel, AutoTokenizer

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector
from hf_neuronselect.core.configs import CompareConfig, SelectConfig
from hf_neuronselect.core.options import options_of
from hf_neuronselect.methods import make_method
from hf_neuronselect.models import encoders, loading
from hf_neuronselect.pipelines.compare import compare
from hf_neuronselect.pipelines.select import select
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.store.store import FeatureStore, write_store

TEXTS = [
    "the apple",
    "x + y",
    "Tom has the apple, and Ann has it not.",
    "one two three four five six " * 6,
    "q" * 90,  # a word longer than the window
    "the\n\n\tapple   the apple",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "tiny-encoder")


@pytest.fixture(scope="module")
def embedder(folder: Path) -> NeuronFeatureExtractor:
    return NeuronFeatureExtractor.from_pretrained(features=["embedding"], encoder=str(folder))


def embedded(extractor: NeuronFeatureExtractor, texts: Sequence[str]) -> np.ndarray:
    found = extractor(Dataset.from_dict({"text": list(texts)})[:])
    assert found["neuron_skip"] == [""] * len(texts)
    return np.stack(found["embedding"])


# ------------------------------------------------------------------------------------- the embedding
def pieces_by_hand(words: list[list[int]], room: int) -> list[list[int]]:
    """Words, each a list of token ids, into lists of at most ``room`` ids; a word is only cut if it must be."""
    found: list[list[int]] = [[]]
    for word in words:
        if len(found[-1]) + len(word) > room and found[-1] and len(word) <= room:
            found.append([])
        for i in word:
            if len(found[-1]) == room:
                found.append([])
            found[-1].append(i)
    return found


def embedding_by_hand(folder: Path, text: str, window: int = WINDOW) -> np.ndarray:
    """Mean over pieces of the unit mean of the last hidden states, in float64, one piece at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    words: dict[int, list[int]] = {}
    encoded = tokenizer(text, add_special_tokens=False)
    for number, word in zip(encoded["input_ids"], encoded.word_ids(), strict=True):
        words.setdefault(word, []).append(number)
    found = []
    for piece in pieces_by_hand(list(words.values()), window - 2):
        with torch.no_grad():
            states = model(torch.tensor([[2, *piece, 3]])).last_hidden_state[0].numpy()
        mean = states.mean(axis=0)
        found.append(mean / np.sqrt((mean * mean).sum()))
    return np.mean(found, axis=0)


def test_a_row_is_the_mean_of_its_pieces(folder: Path, embedder: NeuronFeatureExtractor) -> None:
    found = embedded(embedder, TEXTS[:4])
    assert found.dtype == np.float32 and found.shape == (4, WIDTH)
    for text, vector in zip(TEXTS, found, strict=False):
        np.testing.assert_allclose(vector, embedding_by_hand(folder, text), atol=1e-5)
    assert np.linalg.norm(found[3]) < 0.999  # of several pieces


def test_short_rows_are_as_the_library_gives_them(folder: Path, embedder: NeuronFeatureExtractor) -> None:
    own = SentenceTransformer(str(folder), device="cpu")
    short = [text for text in TEXTS if len(own.tokenizer(text)["input_ids"]) <= WINDOW]
    assert len(short) == 3
    np.testing.assert_allclose(embedded(embedder, short), own.encode(short), atol=1e-6)


def test_nothing_of_a_long_row_is_lost(embedder: NeuronFeatureExtractor) -> None:
    encoder: Any = embedder.engine("encoder").encoder
    for text, pieces in zip(TEXTS, encoder.cut(TEXTS), strict=True):
        assert "".join("".join(pieces.texts).split()) == "".join(text.split())
        assert all(len(encoder.tokenizer(piece)["input_ids"]) <= WINDOW for piece in pieces.texts)
    own, models = encoder.tokenizer.backend_tokenizer, encoder.model.tokenizer.backend_tokenizer
    models.enable_truncation(4)  # as the model sets it while a thread cuts the next rows
    assert own.truncation is None
    one, other = embedded(embedder, ["the apple is red " * 9, "the apple is red " * 8 + "the apple is not"])
    assert np.abs(one - other).max() > 1e-4  # the very end counts


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=120) | st.lists(st.text("ab.- \n京é", max_size=40), max_size=8).map(" ".join))
def test_any_text_fits_the_window(embedder: NeuronFeatureExtractor, text: str) -> None:
    encoder: Any = embedder.engine("encoder").encoder
    (pieces,) = encoder.cut([text])
    assert len(pieces.texts) == len(pieces.tokens)
    for piece, tokens in zip(pieces.texts, pieces.tokens, strict=True):
        assert piece in text and len(encoder.tokenizer(piece)["input_ids"]) == tokens + 2 <= WINDOW
    whole = len(encoder.tokenizer(text)["input_ids"]) - 2
    assert sum(pieces.tokens) >= whole and (len(pieces.texts) == 1) == (whole <= WINDOW - 2)


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_the_batch_size_moves_nothing(folder: Path, embedder: NeuronFeatureExtractor, batch_tokens: int) -> None:
    other = NeuronFeatureExtractor.from_pretrained(
        features=["embedding"], encoder=str(folder), batch_tokens=batch_tokens
    )
    assert other.identities == embedder.identities
    np.testing.assert_allclose(embedded(other, TEXTS), embedded(embedder, TEXTS), atol=1e-6)
    alone = np.concatenate([embedded(embedder, [text]) for text in TEXTS])
    np.testing.assert_allclose(alone, embedded(embedder, TEXTS), atol=1e-6)


def test_a_smaller_window_and_a_prompt(folder: Path, tmp_path: Path, embedder: NeuronFeatureExtractor) -> None:
    def made(where: Path = folder, **options: Any) -> NeuronFeatureExtractor:
        return NeuronFeatureExtractor.from_pretrained(features=["embedding"], encoder=str(where), **options)

    small = made(encoder_window=7)
    np.testing.assert_allclose(embedded(small, TEXTS[3:4])[0], embedding_by_hand(folder, TEXTS[3], 7), atol=1e-5)
    asked = embedded(made(encoder_prompt="the: "), ["apple"])
    np.testing.assert_allclose(asked, embedded(embedder, ["the: apple"]), atol=1e-6)
    own = write_encoder(tmp_path / "prompted", default_prompt="the: ")
    np.testing.assert_allclose(embedded(made(own), ["apple"]), asked, atol=1e-6)
    np.testing.assert_allclose(
        embedded(made(own, encoder_prompt=""), ["apple"]), embedded(embedder, ["apple"]), atol=1e-6
    )
    prompted = made(encoder_prompt="the: ")
    encoder: Any = prompted.engine("encoder").encoder
    for piece in encoder.cut(TEXTS[3:4])[0].texts:  # the prompt is before each piece, and still fits
        assert len(encoder.tokenizer(f"the: {piece}")["input_ids"]) <= WINDOW


def test_an_encoder_in_another_number_format(folder: Path, tmp_path: Path, embedder: NeuronFeatureExtractor) -> None:
    """It runs in the format that is asked for, whatever it is stored in; what comes out is float32."""

    def made(where: Path, dtype: str) -> NeuronFeatureExtractor:
        return NeuronFeatureExtractor.from_pretrained(features=["embedding"], encoder=str(where), encoder_dtype=dtype)

    exact = embedded(embedder, TEXTS)
    for dtype, digits in (("bfloat16", 8), ("float16", 11)):
        rounded = made(folder, dtype)
        engine: Any = rounded.engine("encoder")
        assert {str(one.dtype) for one in engine.encoder.model.parameters()} == {f"torch.{dtype}"}
        found = embedded(rounded, TEXTS)
        assert found.dtype == np.float32 and not np.array_equal(found, exact)
        np.testing.assert_allclose(found, exact, atol=8 * 2.0**-digits)
    stored = shutil.copytree(folder, tmp_path / "stored")
    halved = {name: value.bfloat16() for name, value in load_file(stored / "model.safetensors").items()}
    save_file(halved, stored / "model.safetensors", {"format": "pt"})
    engine = made(stored, "float32").engine("encoder")
    assert {str(one.dtype) for one in engine.encoder.model.parameters()} == {"torch.float32"}


def test_rows_without_text_have_a_reason(embedder: NeuronFeatureExtractor) -> None:
    found = embedder({"text": ["", "  \n", "\x00", "the"]})
    assert found["neuron_skip"] == ["empty", "empty", "empty", ""]
    assert [len(vector) for vector in found["embedding"]] == [0, 0, 0, WIDTH]


def test_the_text_is_that_of_all_turns(embedder: NeuronFeatureExtractor) -> None:
    turns = [{"role": "user", "content": "the apple"}, {"role": "assistant", "content": "x y"}]
    found = embedder({"messages": [turns]})["embedding"][0]
    np.testing.assert_array_equal(found, embedded(embedder, ["the apple\nx y"])[0])


# -------------------------------------------------------------------------------------- its identity
def test_what_moves_the_identity(folder: Path, tmp_path: Path, embedder: NeuronFeatureExtractor) -> None:
    def identity(where: Path, **options: Any) -> str:
        found = NeuronFeatureExtractor.from_pretrained(features=["embedding"], encoder=str(where), **options)
        return found.identities["embedding"]

    own = embedder.identities["embedding"]
    assert own == identity(folder, max_length=9, layer=1, pool_tokens="assistant", device="cpu")
    copy = tmp_path / "copied"
    shutil.copytree(folder, copy)
    (copy / "notes.json").write_text("{}")
    assert identity(copy) == own
    (copy / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": True})
    )
    others = [
        identity(copy),
        identity(write_encoder(tmp_path / "other", seed=1)),
        identity(write_encoder(tmp_path / "raw", normalised=False)),
        identity(write_encoder(tmp_path / "window", window=12)),
        identity(folder, encoder_window=12),
        identity(folder, encoder_prompt="the "),
        identity(folder, encoder_dtype="bfloat16"),
        identity(folder, row_format="text"),
    ]
    assert len({own, *others}) == 9


def test_an_encoder_on_the_hub_is_pinned(hub: Hub, folder: Path) -> None:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    first = hub.add("models", "me/encoder", files | {"pytorch_model.bin": b"never fetched"})
    HfApi().upload_file(repo_id="me/encoder", path_or_fileobj=b"later", path_in_repo="notes.txt")
    made = NeuronFeatureExtractor.from_pretrained(features=["embedding"], encoder="me/encoder", encoder_revision=first)
    assert made.beside["encoder"].commit == first
    local = NeuronFeatureExtractor.from_pretrained(features=["embedding"], encoder=str(folder))
    np.testing.assert_allclose(embedded(made, TEXTS[:2]), embedded(local, TEXTS[:2]), atol=1e-6)


def test_bad_encoders_are_refused_in_a_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(words: str, where: object = folder, **options: Any) -> None:
        with pytest.raises(NeuronSelectError, match=words) as caught:
            made = NeuronFeatureExtractor.from_pretrained(features=["embedding"], encoder=str(where), **options)
            made({"text": ["the apple"]})
        assert "\n" not in str(caught.value) and str(caught.value.option).startswith("encoder")

    refused("takes at most 16", encoder_window=17)
    refused("no room for text beside 20 tokens of the prompt", encoder_prompt="q" * 20)
    refused("no such folder", "./nowhere")
    refused("nothing of that name is in the cache", "me/not-there")
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused("pickles", pickled)
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"nonsense")
    refused("cannot be loaded", damaged)
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    refused(r"pip install 'hf-neuronselect\[rivals\]'")


# ----------------------------------------------------------------------------------------- the method
def embeddings(vectors: np.ndarray) -> RowBatch:
    return RowBatch(np.arange(len(vectors)), np.ones(len(vectors), bool), {"embedding": list(vectors)})


def test_scores_are_cosines() -> None:
    draw = np.random.default_rng(0)
    vectors, shown = draw.normal(size=(9, 5)).astype(np.float32), draw.normal(size=(3, 5)).astype(np.float32)
    vectors[4] = 0
    method = make_method("encoder", {})
    found = method.score(embeddings(vectors), method.fit(embeddings(shown)))
    wide = shown.astype(np.float64)
    for i, row in enumerate(vectors.astype(np.float64)):
        other = sum(wide) / 3
        norms = sum(x * x for x in row) ** 0.5 * sum(x * x for x in other) ** 0.5
        cosine = sum(x * y for x, y in zip(row, other, strict=True)) / norms if norms else 0.0
        np.testing.assert_allclose(found[i], cosine, rtol=1e-12)


def test_it_selects_without_a_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_load_model", lambda *_: pytest.fail("a causal LM was loaded"))
    rows(30).to_json(tmp_path / "pool.jsonl")
    rows(4, seed=1).to_json(tmp_path / "t.jsonl")
    config: dict[str, Any] = {
        "pool": str(tmp_path / "pool.jsonl"), "target": (f"t={tmp_path / 't.jsonl'}",), "method": "encoder",
        "encoder": str(folder), "k": 5,
    }  # fmt: skip
    said: list[str] = []
    found = select(SelectConfig(**config, out=tmp_path / "out"), note=said.append)
    assert not [line for line in said if "model" in line]
    assert found.provenance.extractor is not None and found.provenance.extractor.encoder is not None
    assert found.provenance.extractor.encoder.id == folder.name
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"--encoder {folder.name}" in card and "--model" not in card
    again = select(SelectConfig(**config | {"target": (f"capability:{tmp_path / 'out'}",)}, out=tmp_path / "again"))
    assert again.indices.tolist() == found.indices.tolist()
    with pytest.raises(NeuronSelectError, match="name its folder") as caught:
        NeuronSelector.from_pretrained(tmp_path / "out" / "capability").make_extractor()
    assert caught.value.option == "encoder"


def test_a_store_resumes_it(
    tmp_path: Path, embedder: NeuronFeatureExtractor, pool: Dataset, target: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(pool, embedder, tmp_path / "store", shard_rows=20, pool_about={})
    selector = NeuronSelector("encoder").fit(target, extractor=embedder)
    stored = selector.select(pool, k=9, features=FeatureStore(tmp_path / "store"))
    assert stored.indices.tolist() == selector.select(pool, k=9).indices.tolist()
    monkeypatch.setattr(encoders.Encoder, "embed", lambda *_: pytest.fail("computed again"))
    assert write_store(pool, embedder, tmp_path / "store", shard_rows=20, pool_about={})["skipped_shards"] == 3
    costs = FeatureStore(tmp_path / "store").cost({"embedding": embedder.identities["embedding"]}).passes.values()
    assert sum(cost.rows for cost in costs) == 60 and all(cost.tokens for cost in costs)


@pytest.mark.parametrize(
    ("name", "shown"), [("tiny-encoder", "encoder (stand-in: tiny-encoder)"), ("bge-tiny", "encoder")]
)
def test_compare_says_that_it_is_a_stand_in(folder: Path, tmp_path: Path, name: str, shown: str) -> None:
    (tmp_path / name).symlink_to(folder)
    copy = shutil.copytree(folder, tmp_path / "real" / name)
    rows(20).to_json(tmp_path / "pool.jsonl")
    rows(4, seed=1).to_json(tmp_path / "t.jsonl")
    made = compare(CompareConfig(
        pool=str(tmp_path / "pool.jsonl"), target=(f"t={tmp_path / 't.jsonl'}",), methods="encoder,random",
        encoder=str(copy), k=5, out=tmp_path / "out",
    ))  # fmt: skip
    assert [line.cells()[0].partition(" (mean")[0] for line in made.lines] == [shown, "random"]
    assert [bool(line.stand_in) for line in made.lines] == [shown != "encoder", False]


def test_the_default_is_the_papers_rival() -> None:
    assert options_of(SelectConfig)["encoder"].default.startswith("BAAI/bge-")


@pytest.mark.skipif("NEURONSELECT_MINILM" not in os.environ, reason="NEURONSELECT_MINILM names no folder")
def test_minilm() -> None:
    folder = os.environ["NEURONSELECT_MINILM"]
    made = NeuronFeatureExtractor.from_pretrained(features=["embedding"], encoder=folder)
    own = SentenceTransformer(folder, device="cpu")
    texts = ["How many apples has Tom?", "Tom eats two of his five apples.", "The parliament passed a law."]
    found = embedded(made, texts)
    np.testing.assert_allclose(found, own.encode(texts), atol=1e-6)
    assert found[0] @ found[1] > found[0] @ found[2] + 0.3
    long = " ".join(texts) * 60
    assert len(made.engine("encoder").encoder.cut([long])[0].texts) > 1  # type: ignore[attr-defined]
    assert np.isfinite(embedded(made, [long])).all()
