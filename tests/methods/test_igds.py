"""IGDS against a slow float64 reference, batches and padding, a kill in the middle, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from datasets import Dataset
from families import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tiny import LATENTS, K, chat, make_extractor, rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, NeuronSelectWarning
from hf_neuronselect.core.configs import CompareConfig, ExtractConfig
from hf_neuronselect.core.digests import cache_dir
from hf_neuronselect.metrics.answer_match.answer_match import answer_match
from hf_neuronselect.models.sae_formats import load_sae
from hf_neuronselect.models.steering import SteeredModel
from hf_neuronselect.pipelines.compare import compare
from hf_neuronselect.pipelines.extract import extract
from hf_neuronselect.selection.capability import Capability
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.signals.intervention import FeatureGains, last_number, same_number, words_in_common
from hf_neuronselect.store.store import FeatureStore

LONGEST = 6
BLOCK = 2  # that the SAE reads
EXEMPLARS = rows(9, seed=1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without gains from other tests."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def igds(**options: Any) -> NeuronSelector:
    return NeuronSelector("igds", **({"tau": 0.5, "top_k": 3, "answer_tokens": LONGEST} | options))


def extractor_for(selector: NeuronSelector, folder: Path, **options: Any) -> NeuronFeatureExtractor:
    return make_extractor(folder, features=selector.signals, **options)


def gains(folder: Path, data: Dataset, measure: str = "loss", **options: Any) -> list[dict[int, float]]:
    """Each row's gains by latent; none of a row that is left out."""
    signal = FeatureGains(measure, LONGEST, range(LATENTS))
    found = make_extractor(folder, features=[signal], **options)(data[:])
    pairs = zip(found[f"{signal.name}_indices"], found[f"{signal.name}_values"], strict=True)
    return [dict(zip(indices.tolist(), values.tolist(), strict=True)) for indices, values in pairs]


# ----------------------------------------------------------------------------------------- reference
class Reference:
    """The paper's steps, one sequence and one feature at a time, in float64, from the files."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = tiny_model("llama").double(), tiny_tokenizer()
        tensors = load_file(folder / "sae" / "layers.2" / "sae.safetensors")
        self.sae = {name: tensor.double().numpy() for name, tensor in tensors.items()}

    def split(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Tokens up to the first answer, and of it: a character is a token, and so is each mark."""
        head = self.tokenizer.apply_chat_template(messages[:1], tokenize=False) + "<|im_start|>assistant\n"
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (head, messages[1]["content"])]

    @torch.no_grad()
    def logits(self, ids: list[int], start: int, vector: np.ndarray | None = None) -> tuple[torch.Tensor, np.ndarray]:
        """Of all tokens, with the vector added behind the block from a token on; and the block's output there before it."""
        seen = []

        def add(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            seen.append(output[0, start].numpy().copy())
            output = output.clone()
            if vector is not None:
                output[:, start:] += torch.from_numpy(vector)
            return output

        handle = self.model.model.layers[BLOCK].register_forward_hook(add)
        try:
            return self.model(torch.tensor([ids]), use_cache=False).logits[0], seen[0]
        finally:
            handle.remove()

    def latents(self, h: np.ndarray) -> np.ndarray:
        z = np.maximum((h - self.sae["b_dec"]) @ self.sae["encoder.weight"].T + self.sae["encoder.bias"], 0)
        return np.where(np.argsort(np.argsort(-z, kind="stable"), kind="stable") < K, z, 0)

    def at_end(self, messages: list[dict[str, str]]) -> np.ndarray:
        prompt, _ = self.split(messages)
        return self.latents(self.logits(prompt, len(prompt) - 1)[1])

    def quality(self, prompt: list[int], answer: list[int], vector: np.ndarray | None, measure: str) -> float:
        start = len(prompt) - 1
        if measure == "loss":
            logits, _ = self.logits(prompt + answer, start, vector)
            picked = logits.log_softmax(-1)[start:-1]
            return float(np.mean([picked[i, token] for i, token in enumerate(answer)]))
        said: list[int] = []
        while len(said) < LONGEST:
            token = int(self.logits(prompt + said, start, vector)[0][-1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            said.append(token)
        one, other = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (said, answer))
        words = [Counter("".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split())
                 for text in (one, other)]  # fmt: skip
        common = sum(min(words[0][word], words[1][word]) for word in words[0])
        return 2 * common / max(1, sum(words[0].values()) + sum(words[1].values()))

    def gains(self, messages: list[dict[str, str]], measure: str) -> dict[int, float]:
        prompt, answer = self.split(messages)
        active = self.at_end(messages)
        usual = self.quality(prompt, answer, None, measure)
        return {
            int(f): self.quality(prompt, answer, active[f] * self.sae["W_dec"][f], measure) - usual
            for f in np.flatnonzero(active)
        }


@pytest.mark.parametrize("measure", ["loss", "words"])
def test_features_and_scores_are_the_references(measure: str, tiny_folder: Path, pool: Dataset) -> None:
    reference = Reference(tiny_folder)
    # Answers of single letters and digits: something of what the tiny model says is then in them.
    given = EXEMPLARS if measure == "loss" else Dataset.from_list(
        [{"messages": chat(row["messages"][0]["content"], " ".join("0123456789abcdefghijklmnopqrstuvwxyz"))}
         for row in EXEMPLARS]
    )  # fmt: skip
    each = [reference.gains(messages, measure) for messages in given["messages"]]
    got = gains(tiny_folder, given, measure)
    assert [one.keys() for one in got] == [one.keys() for one in each]
    for mine, theirs in zip(got, each, strict=True):
        np.testing.assert_allclose([mine[f] for f in theirs], list(theirs.values()), rtol=1e-3, atol=2e-5)
    mean = {f: sum(one.get(f, 0.0) for one in each) / len(each) for f in range(LATENTS)}
    share = {f: sum(f in one for one in each) / len(each) for f in range(LATENTS)}
    recalled = [f for f in range(LATENTS) if share[f] >= 0.5]
    assert len(recalled) > 3 and any(mean[f] != 0 for f in recalled)
    best = sorted(recalled, key=lambda f: (-round(mean[f], 9), f))[:3]
    selector = igds(measure=measure)
    selector.fit({"t": given}, extractor=extractor_for(selector, tiny_folder))
    target = selector.targets["t"]
    assert target["features"].tolist() == best
    np.testing.assert_allclose(target["gain"], [mean[f] for f in best], rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(target["share"], [share[f] for f in best])
    expected = [reference.at_end(messages)[best].sum() for messages in pool["messages"]]
    selection = selector.select(pool)
    assert len(selection) == 30, "the paper's half"
    np.testing.assert_allclose(selection.scores.column("score").to_numpy(), expected, rtol=1e-4, atol=1e-4)
    order = np.argsort(-np.asarray(expected), kind="stable")[:5]
    assert selection.indices[:5].tolist() == order.tolist()


def test_explained_by_its_features(tiny_folder: Path) -> None:
    selector = igds()
    target = {"features": np.asarray([4, 9]), "gain": np.asarray([0.5, 0.25]), "share": np.asarray([1.0, 0.9])}
    columns = {
        "prompt_latents_indices": [np.asarray([1, 4, 9], np.int32), np.asarray([2], np.int32)],
        "prompt_latents_values": [np.asarray([7, 1, 3], np.float16), np.asarray([5], np.float16)],
    }
    batch = RowBatch(np.arange(2), np.ones(2, bool), columns)
    np.testing.assert_array_equal(selector.method.score(batch, target), [4.0, 0.0])
    first = selector.method.explain(batch.take(np.asarray([0])), target, None)
    assert (first.ids.tolist(), first.amounts.tolist()) == ([9, 4], [3.0, 1.0])
    assert {name: array.tolist() for name, array in first.facts.items()} == {
        "gain": [0.25, 0.5], "exemplars with it": [0.9, 1.0]
    }  # fmt: skip
    assert len(selector.method.explain(batch.take(np.asarray([1])), target, None).ids) == 0


# -------------------------------------------------------------------------------- batches, padding, turns
@pytest.mark.parametrize("batch_tokens", [1, 90])
def test_batches_move_nothing(batch_tokens: int, tiny_folder: Path, pool: Dataset, home: Path) -> None:
    few, more = make_extractor(tiny_folder, features=["prompt_latents"]), {"features": ["prompt_latents"]}
    one, other = few(pool[:]), make_extractor(tiny_folder, batch_tokens=batch_tokens, **more)(pool[:])
    for a, b in zip(one["prompt_latents_indices"], other["prompt_latents_indices"], strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(one["prompt_latents_values"], other["prompt_latents_values"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for measure in ("loss", "words"):
        usual = gains(tiny_folder, EXEMPLARS, measure)
        shutil.rmtree(home)
        again = gains(tiny_folder, EXEMPLARS, measure, batch_tokens=batch_tokens)
        shutil.rmtree(home)
        alone = [gains(tiny_folder, EXEMPLARS.select([i]), measure)[0] for i in range(len(EXEMPLARS))]
        for a, b, c in zip(usual, again, alone, strict=True):
            assert a == pytest.approx(b, abs=1e-5) and a == pytest.approx(c, abs=1e-5)


def test_the_first_answer_counts(tiny_folder: Path) -> None:
    """What comes behind it changes neither the activations nor the gains."""
    first = chat("add two #1?", "two")
    several = [first, [*first, *chat("why?", "is the sky blue")]]
    data = Dataset.from_list([{"messages": messages} for messages in several])
    found = make_extractor(tiny_folder, features=["prompt_latents"])(data[:])
    np.testing.assert_array_equal(*found["prompt_latents_indices"])
    for measure in ("loss", "words"):
        one, other = gains(tiny_folder, data, measure)
        assert len(one) == K and one == pytest.approx(other, abs=1e-6)


def test_rows_without_prompt_or_answer_are_left_out(tiny_folder: Path) -> None:
    data = [chat("a", "b")[:1], chat("a" * 30, "b"), chat("add", "two")]
    data = Dataset.from_list([{"messages": messages} for messages in data])
    signal = FeatureGains("number", LONGEST, range(LATENTS))
    options: dict[str, Any] = {"max_length": 30}
    found = make_extractor(tiny_folder, features=["prompt_latents", signal], **options)(data[:])
    cut = "error: no answer token within max_length=30"
    assert found["neuron_skip"][:2] == [cut, cut]
    assert found["neuron_skip"][2] == "error: the answer has no number to compare with; use measure=words"
    texts = make_extractor(tiny_folder, features=["prompt_latents"])(Dataset.from_dict({"text": ["a b"]})[:])
    assert texts["neuron_skip"] == ["error: no prompt token within max_length=2048"]
    assert [len(row) for row in found["prompt_latents_indices"]] == [0, 0, K]


# ---------------------------------------------------------------------------------------------- resume
def test_a_kill_costs_one_exemplar(tiny_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    made = SteeredModel.__init__

    def counted(self: SteeredModel, *given: Any) -> None:
        begun.append(len(given[2]))
        if len(begun) == 4:
            raise KeyboardInterrupt
        made(self, *given)

    monkeypatch.setattr(SteeredModel, "__init__", counted)
    selector = igds(measure="loss")
    extractor = extractor_for(selector, tiny_folder)
    with pytest.raises(KeyboardInterrupt):
        selector.fit({"t": EXEMPLARS}, extractor=extractor)
    (folder,) = (cache_dir() / "gains").iterdir()
    assert folder.name.startswith("loss-") and len(list(folder.iterdir())) == 3
    selector.fit({"t": EXEMPLARS}, extractor=extractor)
    assert len(begun) == 4 + len(EXEMPLARS) - 3
    found = selector.targets["t"]
    next(folder.iterdir()).write_text('{"latents": [1, 2], "gai')  # a disk that was full
    again = igds(measure="loss").fit({"t": EXEMPLARS}, extractor=extractor)
    assert len(begun) == 2 + len(EXEMPLARS)
    for name, array in found.items():
        np.testing.assert_array_equal(again.targets["t"][name], array)
    shutil.rmtree(home)
    whole = igds(measure="loss").fit({"t": EXEMPLARS}, extractor=extractor).targets["t"]
    for name, array in found.items():
        np.testing.assert_array_equal(whole[name], array)


def test_only_features_that_are_asked_for_are_tried(
    tiny_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    losses = SteeredModel.losses

    def counted(self: SteeredModel, vectors: torch.Tensor, *given: Any) -> np.ndarray:
        tried.append(len(vectors) - 1)
        return losses(self, vectors, *given)

    monkeypatch.setattr(SteeredModel, "losses", counted)
    extractor = make_extractor(tiny_folder, features=["prompt_latents"])
    active = [set(row.tolist()) for row in extractor(EXEMPLARS[:])["prompt_latents_indices"]]
    share = Counter(latent for row in active for latent in row)
    for tau, before in ((0.8, 1.01), (0.5, 0.8), (0.8, 0.5)):
        tried.clear()
        igds(measure="loss", tau=tau).fit({"t": EXEMPLARS}, extractor=extractor)
        new = {latent for latent, count in share.items() if tau <= count / len(EXEMPLARS) < before}
        assert sum(tried) == (sum(len(row & new) for row in active) if tau < before else 0)
        assert tau > before or sum(tried) > 0


def test_kept_gains_belong_to_their_options(tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tensors = load_file(other / "sae" / "layers.2" / "sae.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, other / "sae" / "layers.2" / "sae.safetensors")
    two = EXEMPLARS.select([0, 1])
    gains(tiny_folder, two)
    gains(tiny_folder, two, top_k_features=3)
    gains(tiny_folder, two, dtype="bfloat16")
    gains(other, two)
    gains(tiny_folder, two, "words")
    assert len(list((cache_dir() / "gains").iterdir())) == 5
    gains(tiny_folder, two, batch_tokens=7)
    assert len(list((cache_dir() / "gains").iterdir())) == 5
    names = {folder.name.rpartition("-")[0] for folder in (cache_dir() / "gains").iterdir()}
    assert names == {"loss", f"words-{LONGEST}"}


# -------------------------------------------------------------------------------------------- measures
@pytest.mark.parametrize(
    "text",
    ["so 18", "18.00 dollars.", "#### 1,234", "5 #### 7", "x = -3", "10-4", "$2.50", "1, 2", "none", "v.9 and 8"],
)
def test_numbers_are_read_as_the_metric_reads_them(text: str) -> None:
    for said in ("18", "1234", "7", "-3", "4", "2.5", "2", "8"):
        expected = answer_match([text], [said])["matches"]
        assert same_number(text, said) == expected, (text, said)
    assert last_number("none") is None and same_number("none", "none") == 0


def test_words_in_common() -> None:
    assert words_in_common("The sky, the SKY!", "the sky is blue") == pytest.approx(2 * 2 / 8)
    assert words_in_common("", "a") == words_in_common("!", "?") == 0
    assert words_in_common("空は青い", "空が青い") == pytest.approx(2 * 3 / 8)
    assert words_in_common("a b", "b a") == 1


# --------------------------------------------------------------------------------------------- refused
def test_refused(tiny_folder: Path, tmp_path: Path) -> None:
    selector = igds(measure="loss")
    with pytest.raises(NeuronSelectError, match="needs a sparse autoencoder"):
        extractor_for(selector, tiny_folder, sae=None)
    with pytest.raises(NeuronSelectError, match="gains_on_.* needs a sparse autoencoder"):
        NeuronFeatureExtractor.from_pretrained(str(tiny_folder / "model"), features=[FeatureGains("loss", 1, [0])])
    bare, across = tmp_path / "bare", tmp_path / "across"
    for folder in (bare, across):
        shutil.copytree(tiny_folder, folder)
    tensors = load_file(bare / "sae" / "layers.2" / "sae.safetensors")
    save_file({name: one for name, one in tensors.items() if name != "W_dec"}, bare / "sae/layers.2/sae.safetensors")
    with pytest.raises(NeuronSelectError, match=r"no decoder \(W_dec\)"):
        selector.fit({"t": EXEMPLARS}, extractor=extractor_for(selector, bare))
    cfg = across / "sae" / "layers.2" / "cfg.json"
    cfg.write_text(json.dumps(json.loads(cfg.read_text()) | {"transcode": True}))
    with pytest.raises(NeuronSelectError, match=r"is a transcoder: its latents write elsewhere than layers\.2"):
        selector.fit({"t": EXEMPLARS}, extractor=extractor_for(selector, across))
    held = load_sae(tiny_folder / "sae" / "layers.2")
    made = NeuronFeatureExtractor.from_model(
        tiny_model("llama"), tiny_tokenizer(), sae=held, features=selector.signals, value_dtype="float32"
    )
    with pytest.raises(NeuronSelectError, match="an SAE in memory is not read for its decoder: pass its folder"):
        selector.fit({"t": EXEMPLARS}, extractor=made)
    extractor = extractor_for(selector, tiny_folder)
    with pytest.raises(NeuronSelectError, match=r"target='1 usable row\(s\)': .*need at least 2"):
        selector.fit({"t": EXEMPLARS.select([0])}, extractor=extractor)
    far = Dataset.from_list([{"messages": chat("a", "b")}, {"messages": chat("z" * 40, "sky")}])
    with pytest.raises(NeuronSelectError, match=r"tau=1\.0: no feature is active .*the most: .*; lower it"):
        igds(measure="loss", tau=1.0, top_k=1).fit({"t": far}, extractor=make_extractor(
            tiny_folder, features=selector.signals, top_k_features=1))  # fmt: skip
    with pytest.raises(NeuronSelectError, match=r"tau=1\.5: is a share of the exemplars, at most 1"):
        igds(tau=1.5).fit({"t": EXEMPLARS}, extractor=extractor)
    with pytest.raises(NeuronSelectError, match="measure"):
        igds(measure="bleu")


def test_no_gain_is_said(tiny_folder: Path) -> None:
    given = Dataset.from_list([{"messages": chat(f"q{i}", "zebra stripes")} for i in range(4)])
    with pytest.warns(NeuronSelectWarning, match=r"target t: doubling none of the \d+ features .*measure=words"):
        selector = igds(answer_tokens=2)
        selector.fit({"t": given}, extractor=extractor_for(selector, tiny_folder))
    assert selector.exemplars["t"].doubts and (selector.targets["t"]["gain"] == 0).all()


# ------------------------------------------------------------------------------------ around the method
def test_halves_are_fitted_and_a_capability_holds_the_features(
    tiny_folder: Path, tmp_path: Path, pool: Dataset
) -> None:
    selector = igds(measure="loss")
    selector.fit({"t": EXEMPLARS}, extractor=extractor_for(selector, tiny_folder))
    assert "t" in selector.halves, "held-out exemplars are scored, too"
    picked = selector.select(pool, k=9)
    selector.save_pretrained(tmp_path / "cap")
    again = NeuronSelector.of(Capability.fetch(tmp_path / "cap"))
    again.make_extractor(model=str(tiny_folder / "model"), sae=str(tiny_folder / "sae"))
    assert again.select(pool, k=9).indices.tolist() == picked.indices.tolist()


def test_a_store_holds_no_gains_of_the_pool(
    tiny_folder: Path, tmp_path: Path, pool: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.to_json(tmp_path / "pool.jsonl")
    config = ExtractConfig(
        pool=str(tmp_path / "pool.jsonl"), out=tmp_path / "store", method="igds", model=str(tiny_folder / "model"),
        sae=str(tiny_folder / "sae"), value_dtype="float32",
    )  # fmt: skip
    extract(config)
    assert not (cache_dir() / "gains").exists()
    store = FeatureStore(tmp_path / "store")
    assert set(store.identities) == {"prompt_latents", "tokens"}
    selector = igds(measure="loss")
    selector.fit({"t": EXEMPLARS}, extractor=extractor_for(selector, tiny_folder))
    usual = selector.select(pool, k=9)
    assert selector.select(pool, k=9, features=store).indices.tolist() == usual.indices.tolist()


def test_compared_beside_others(tiny_folder: Path, tmp_path: Path, pool: Dataset) -> None:
    """Exemplars drawn again are not answered again."""
    pool.to_json(tmp_path / "pool.jsonl")
    EXEMPLARS.to_json(tmp_path / "t.jsonl")
    config = CompareConfig(
        pool=str(tmp_path / "pool.jsonl"), target=(f"t={tmp_path / 't.jsonl'}",), out=tmp_path / "out",
        methods="mona,igds(measure=loss,tau=0.3)", model=str(tiny_folder / "model"), sae=str(tiny_folder / "sae"), k=8,
        related={"t": "s1"}, resamples=3,
    )  # fmt: skip
    found = compare(config)
    assert {line.method for line in found.lines} == {"mona", "igds(measure=loss,tau=0.3)"}
    (folder,) = (cache_dir() / "gains").iterdir()
    assert len(list(folder.iterdir())) == len(EXEMPLARS)
    assert len(found.samples["igds(measure=loss,tau=0.3)", "t"]) == 3


def test_exemplars_that_cannot_be_measured_are_left_out(tiny_folder: Path) -> None:
    """They are none of the features' exemplars either, and exemplars may be a stream."""
    given = [
        {"messages": chat(f"add {i}?", text)} for i, text in enumerate(["7", "is", "5 + 7", "12", "sky", "#### 3"])
    ]
    data = Dataset.from_list(given)
    selector = igds(measure="number", tau=0.1)
    extractor = extractor_for(selector, tiny_folder)
    with pytest.warns(NeuronSelectWarning, match=r"2 of 6 exemplars are left out \(error: the answer has no number"):
        selector.fit({"t": data}, extractor=extractor)
    assert selector.exemplars["t"].used == 4
    kept = igds(measure="number", tau=0.1).fit({"t": data.select([0, 2, 3, 5])}, extractor=extractor)
    stream = igds(measure="number", tau=0.1).fit({"t": data.to_iterable_dataset()}, extractor=extractor)
    for name, array in selector.targets["t"].items():
        np.testing.assert_array_equal(stream.targets["t"][name], array)
    assert stream.exemplars["t"].used == 4 and set(kept.targets["t"]) == {"features", "gain", "share"}


def test_each_exemplar_chooses_by_its_best_of_the_shared_features(tiny_folder: Path, pool: Dataset) -> None:
    selector = igds(measure="loss", picker="round-robin", top_k=1)
    selector.fit({"t": EXEMPLARS}, extractor=extractor_for(selector, tiny_folder))
    of_all = gains(tiny_folder, EXEMPLARS)
    share = Counter(latent for row in of_all for latent in row)
    for i, row in enumerate(of_all):
        recalled = {latent: gain for latent, gain in row.items() if share[latent] >= 0.5 * len(EXEMPLARS)}
        assert selector.targets["t"][f"{i}/features"].tolist() == [max(recalled, key=lambda one: recalled[one])]
    assert len(selector.select(pool, k=6)) == 6
