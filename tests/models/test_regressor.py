"""A text encoder with one number: what it reads, that it learns, and that it does so the same each time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import write_encoder
from families import tiny_model, tiny_tokenizer
from transformers import BertConfig, BertModel

from hf_neuronselect import NeuronSelectError
from hf_neuronselect.models import regressor as module
from hf_neuronselect.models.pin import pin_named
from hf_neuronselect.models.regressor import PIECES, Regressor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoders") / "one")


def load(folder: Path) -> Regressor:
    return Regressor.load(pin_named(str(folder), "regressor"), "regressor").eval()


TEXTS = ["the apple", "", "the " * 70, "a b c", "the apple " * 200, "xyz"]


def test_texts_are_cut_into_windows(folder: Path) -> None:
    made = load(folder)
    assert made.window == 64  # positions of the encoder
    cut = made.cut(TEXTS)
    start, end = made.tokenizer.cls_token_id, made.tokenizer.sep_token_id
    assert [len(pieces) for pieces in cut] == [1, 1, 2, 1, PIECES, 1]
    for text, pieces in zip(TEXTS, cut, strict=True):
        assert all(piece[0] == start and piece[-1] == end and len(piece) <= 64 for piece in pieces)
        inner = [token for piece in pieces for token in piece[1:-1]]
        assert inner == made.tokenizer(text, add_special_tokens=False)["input_ids"][: PIECES * 62]


def test_a_prediction_is_the_head_on_the_mean_state_of_all_tokens(folder: Path) -> None:
    made = load(folder)
    cut = made.cut(TEXTS)
    encoder, head = made.encoder.double(), made.head.double()
    wanted = []
    with torch.no_grad():
        for pieces in cut:
            states = torch.cat([encoder(torch.tensor(piece)[None]).last_hidden_state[0] for piece in pieces])
            wanted.append(head(states.mean(dim=0)).item())
    made.float()
    np.testing.assert_allclose(made.predict(cut), wanted, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        np.testing.assert_allclose(made(cut).numpy(), wanted, rtol=1e-4, atol=1e-6)


def task(n: int = 60) -> tuple[list[str], np.ndarray]:
    """Texts whose value is how many apples they have, in other units."""
    draw = np.random.default_rng(3)
    counts = draw.integers(0, 6, n)
    return [" ".join(draw.permutation(["apple"] * k + ["the"] * (8 - k))) for k in counts], 7 + 0.01 * counts


def test_it_learns_and_the_same_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RATE", 3e-3)
    texts, values = task()
    found = []
    for noise in (0, 1):
        torch.manual_seed(noise)  # whatever was drawn before
        made = load(folder)
        rho = made.learn(made.cut(texts), values, epochs=12)
        found.append((rho, made.predict(made.cut(texts))))
    assert found[0][0] == found[1][0] > 0.8
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert np.corrcoef(found[0][1], values)[0, 1] > 0.8
    assert abs(found[0][1].mean()) < 0.5 and 0.3 < found[0][1].std() < 2, "predictions are z-scores"


def test_other_seeds_give_other_predictions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, values = task(20)
    found = []
    for seed in (1234, 1234, 5):
        monkeypatch.setattr(module, "SEED", seed)
        made = load(folder)
        made.learn(made.cut(texts), values, epochs=1)
        found.append(made.predict(made.cut(texts)))
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-4


def test_the_best_epoch_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter([0.1, 0.7, 0.7, 0.3])
    states = []

    def spearman(one: np.ndarray, other: np.ndarray) -> float:
        states.append(made.head.weight.detach().clone())
        return next(said)

    monkeypatch.setattr(module, "spearman", spearman)
    texts, values = task(20)
    made = load(folder)
    assert made.learn(made.cut(texts), values, epochs=4) == 0.7
    assert torch.equal(made.head.weight, states[2])


def test_the_random_state_is_left_alone(folder: Path) -> None:
    torch.manual_seed(8)
    wanted = torch.rand(1)
    torch.manual_seed(8)
    made = load(folder)
    made.learn(made.cut(["a", "b", "c"]), np.asarray([1.0, 2.0, 3.0]), epochs=1)
    assert torch.equal(torch.rand(1), wanted)


def test_memory_is_bounded_and_gradients_are_those_of_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, values = task(24)
    found = []
    for tokens in (1, 4096):
        monkeypatch.setattr(module, "_BATCH_TOKENS", tokens)
        made = load(folder)
        for part in made.modules():  # where a text is dropped differs by the batch
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        made.learn(made.cut(texts), values, epochs=1)
        found.append(made.predict(made.cut(texts)))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_equal_values_are_no_error(folder: Path) -> None:
    made = load(folder)
    rho = made.learn(made.cut(["a", "b", "c"] * 4), np.full(12, 0.25), epochs=1)
    assert rho == 0 and np.isfinite(made.predict(made.cut(["a"]))).all()


def test_what_was_saved_is_restored(folder: Path, tmp_path: Path) -> None:
    texts, values = task(20)
    made = load(folder)
    rho = made.learn(made.cut(texts), values, epochs=1)
    made.save(tmp_path / "r.safetensors", rho)
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]
    other = load(folder)
    assert other.restore(tmp_path / "r.safetensors") == rho
    np.testing.assert_array_equal(other.predict(other.cut(texts)), made.predict(made.cut(texts)))


def test_an_encoder_that_cannot_be_used_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    BertModel(BertConfig.from_pretrained(folder, num_hidden_layers=1)).save_pretrained(broken)
    BertConfig.from_pretrained(folder).save_pretrained(broken)
    with pytest.raises(NeuronSelectError, match=r"regressor='broken': lacks encoder\.layer\.1.*; name another encoder"):
        load(broken)
    (broken / "model.safetensors").write_bytes(b"no")
    with pytest.raises(NeuronSelectError, match="regressor='broken': cannot be loaded: "):
        load(broken)
    tiny_model("llama").save_pretrained(tmp_path / "unpadded")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    with pytest.raises(NeuronSelectError, match="needs a fast tokenizer with a padding token; name another encoder"):
        load(tmp_path / "unpadded")
