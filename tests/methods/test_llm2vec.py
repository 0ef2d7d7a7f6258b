"""LLM2Vec and its control: states of both directions, in every family allowed, against attention written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from encoders import write_mntp
from families import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tiny import rows
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError
from hf_neuronselect.core.configs import CompareConfig, SelectConfig
from hf_neuronselect.models.backbone import find_decoder
from hf_neuronselect.models.bidirectional import FAMILIES, check_lifted, encode
from hf_neuronselect.pipelines.compare import compare
from hf_neuronselect.pipelines.select import select
from hf_neuronselect.signals.bidirectional import first_words

TEXTS = ["the sky is blue", "x", "print(7 + 5) # why?", "two\n\nnumbers  and a list of them"]


def model_of(family: str) -> Any:
    """A tiny model of a family; its local blocks, where it has some, see 6 tokens."""
    if family == "gemma":
        from transformers import GemmaConfig, GemmaForCausalLM

        torch.manual_seed(0)
        return GemmaForCausalLM(GemmaConfig(
            num_hidden_layers=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            intermediate_size=48, vocab_size=128, max_position_embeddings=512, initializer_range=0.15,
        )).eval()  # fmt: skip
    return tiny_model("gemma3" if family == "gemma3_text" else family)


def written_out(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any, scaling: float, **more: Any
) -> tuple[torch.Tensor, None]:
    """Attention without any mask, head by head: each token sees all."""
    times = query.shape[1] // key.shape[1]
    found = torch.zeros_like(query)
    for head in range(query.shape[1]):
        scores = query[0, head] @ key[0, head // times].T * scaling
        if cap := more.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        found[0, head] = (weights / weights.sum(dim=-1, keepdim=True)) @ value[0, head // times]
    return found.transpose(1, 2).contiguous(), None


@torch.no_grad()
def states_by_hand(model: Any, ids: list[int]) -> np.ndarray:
    """A row's last states in float64, by itself and without padding."""
    wide = find_decoder(model)[0].double()
    ALL_ATTENTION_FUNCTIONS.register("written_out", written_out)
    before, wide.config._attn_implementation = wide.config._attn_implementation, "written_out"
    try:
        return wide(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0].numpy()
    finally:
        wide.config._attn_implementation = before
        find_decoder(model)[0].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_sees_both_directions(family: str) -> None:
    model = model_of(family)
    assert model.config.model_type == family
    decoder = find_decoder(model)[0]
    check_lifted(decoder, family)
    long, short = [1, 9, 8, 7, 6, 5, 40, 41, 42, 43, 44], [1, 20, 30]
    padded = torch.tensor([long, short + [0] * 8])
    found = encode(decoder, padded, torch.tensor([11, 3]))
    for row, ids in enumerate((long, short)):
        np.testing.assert_allclose(found[row, : len(ids)], states_by_hand(model, ids), rtol=1e-3, atol=1e-3)
    other = encode(decoder, torch.tensor([[*long[:-1], 99]]), torch.tensor([11]))
    assert (found[0, 0] - other[0, 0]).abs().max() > 1e-3  # the last token moves the first, ten tokens away
    with torch.no_grad():
        causal = [decoder(input_ids=torch.tensor([one]), use_cache=False).last_hidden_state[0, 0]
                  for one in (long, [*long[:-1], 99])]  # fmt: skip
    assert torch.equal(*causal)  # and does not with the model's own mask, which is as it was


def test_a_model_that_stays_causal_is_refused() -> None:
    decoder = find_decoder(tiny_model("llama"))[0]
    forward = decoder.forward
    decoder.forward = lambda *words, attention_mask=None, **more: forward(*words, **more)  # type: ignore[method-assign]
    with pytest.raises(NeuronSelectError, match="stays causal"):
        check_lifted(decoder, "deaf")


@pytest.mark.parametrize("family", ["gpt2", "olmoe", "phi3"])
def test_other_families_are_refused(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(NeuronSelectError, match="cannot be lifted for sure") as caught:
        NeuronFeatureExtractor.from_pretrained(str(tmp_path / "model"), features=["bidirectional"])
    assert caught.value.option == "model" and "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------- the signals
@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    return write_mntp(tmp_path_factory.mktemp("adapter") / "mntp", tiny_folder / "model")


def embedded(texts: list[str], signal: str, model: Path, **options: Any) -> np.ndarray:
    made = NeuronFeatureExtractor.from_pretrained(str(model), features=[signal], **options)
    found = made(Dataset.from_dict({"text": texts})[:])
    assert found["neuron_skip"] == [""] * len(texts)
    return np.stack(found[signal])


def test_the_mean_leaves_out_the_bos(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
    tokenizer = tiny_tokenizer()
    found = embedded(TEXTS, "bidirectional", tiny_folder / "model")
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        np.testing.assert_allclose(vector, states_by_hand(model, ids)[1:].mean(axis=0), atol=1e-4)
    for size in (1, 30):
        other = embedded(TEXTS, "bidirectional", tiny_folder / "model", batch_tokens=size)
        np.testing.assert_allclose(other, found, atol=1e-5)


def test_a_model_in_memory_is_left_as_it_is(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder / "model").eval()
    ids = torch.tensor([[1, 9, 8]])
    with torch.no_grad():
        before = model(ids).logits
        made = NeuronFeatureExtractor.from_model(model, tiny_tokenizer(), features=["bidirectional", "hidden"])
        found = made({"text": TEXTS})["bidirectional"]
        assert torch.equal(model(ids).logits, before)
    np.testing.assert_allclose(found, embedded(TEXTS, "bidirectional", tiny_folder / "model"), atol=1e-5)


def test_the_adapter_is_on_the_model(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    plain = embedded(TEXTS, "bidirectional", tiny_folder / "model")
    found = embedded(TEXTS, "llm2vec", tiny_folder / "model", mntp_adapter=str(adapter))
    assert np.abs(found - plain).max() > 1e-3
    np.testing.assert_allclose(embedded(TEXTS, "bidirectional", tiny_folder / "model"), plain, atol=0)  # still without
    # the model with the adapter's weights added by hand
    model = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
    weights, config = (
        load_file(adapter / "adapter_model.safetensors"),
        json.loads((adapter / "adapter_config.json").read_text()),
    )
    with torch.no_grad():
        for name in {name.partition(".lora_")[0] for name in weights}:
            added = (
                weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"] * config["lora_alpha"] / config["r"]
            )
            model.get_submodule(name.removeprefix("base_model.model.")).weight += added
    ids = tiny_tokenizer()(TEXTS[0])["input_ids"]
    np.testing.assert_allclose(found[0], states_by_hand(model, ids)[1:].mean(axis=0), atol=1e-4)
    # the authors save theirs of the decoder alone
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    save_file(
        {name.replace("model.model.", "model."): one for name, one in weights.items()},
        bare / "adapter_model.safetensors",
    )
    np.testing.assert_allclose(
        embedded(TEXTS, "llm2vec", tiny_folder / "model", mntp_adapter=str(bare)), found, atol=1e-6
    )


def test_what_is_read_of_a_row(tiny_folder: Path) -> None:
    assert first_words("  a  b\nc ") == "a  b\nc" and first_words(" \n") == "" and first_words("") == ""
    assert first_words("ab " * 500) == ("ab " * 400).strip()
    made = NeuronFeatureExtractor.from_pretrained(str(tiny_folder / "model"), features=["bidirectional"])
    found = made({"text": ["", "a" * 600, "a" * 511, "a " * 500]})
    assert found["neuron_skip"] == ["empty", "", "", ""]
    np.testing.assert_allclose(found["bidirectional"][1], found["bidirectional"][2], atol=1e-6)
    chat = made({"messages": [[{"role": "user", "content": "the sky"}, {"role": "assistant", "content": "blue"}]]})
    np.testing.assert_array_equal(
        chat["bidirectional"][0], embedded(["the sky\nblue"], "bidirectional", tiny_folder / "model")[0]
    )


def test_bad_adapters_are_refused_in_a_line(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    def refused(words: str, option: str, model: Path = tiny_folder / "model", **options: Any) -> None:
        with pytest.raises(NeuronSelectError, match=words) as caught:
            NeuronFeatureExtractor.from_pretrained(str(model), features=["llm2vec"], **options)({"text": ["a"]})
        assert caught.value.option == option and "\n" not in str(caught.value)

    refused("use the method bidirectional", "mntp_adapter")
    refused("is no PEFT adapter", "mntp_adapter", mntp_adapter=str(tiny_folder / "model"))
    refused("no such folder", "mntp_adapter", mntp_adapter="./nowhere")
    tiny_model("llama", hidden_size=16).save_pretrained(tmp_path / "narrow")
    tiny_tokenizer().save_pretrained(tmp_path / "narrow")
    refused("does not fit the model", "mntp_adapter", tmp_path / "narrow", mntp_adapter=str(adapter))
    refused(
        "use sdpa or eager", "attn_implementation", mntp_adapter=str(adapter), attn_implementation="flash_attention_2"
    )


# ------------------------------------------------------------------------------------- the methods
def test_no_table_calls_a_lifted_mask_llm2vec(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    rows(20).to_json(tmp_path / "pool.jsonl")
    rows(4, seed=1).to_json(tmp_path / "t.jsonl")
    config: dict[str, Any] = {
        "pool": str(tmp_path / "pool.jsonl"), "target": (f"t={tmp_path / 't.jsonl'}",), "k": 5,
        "model": str(tiny_folder / "model"),
    }  # fmt: skip
    with pytest.raises(NeuronSelectError, match="needs an adapter"):
        select(SelectConfig(**config, method="llm2vec", out=tmp_path / "none"))
    config["mntp_adapter"] = str(adapter)
    made = compare(CompareConfig(**config, methods="llm2vec,bidirectional", out=tmp_path / "out"))
    scores = {line.method: made.selections[line.method, "t"].scores["score"].to_numpy() for line in made.lines}
    assert np.abs(scores["llm2vec"] - scores["bidirectional"]).max() > 1e-6
    records = {name: made.selections[name, "t"].provenance.extractor for name in scores}
    assert records["llm2vec"].mntp_adapter.id == "mntp" and records["bidirectional"].mntp_adapter is None
    picked = select(SelectConfig(**config, method="llm2vec", out=tmp_path / "one"))
    again = select(SelectConfig(**config | {"target": (f"capability:{tmp_path / 'one'}",)}, out=tmp_path / "again"))
    assert picked.indices.tolist() == again.indices.tolist() == made.selections["llm2vec", "t"].indices.tolist()
    assert "--mntp-adapter mntp" in (tmp_path / "one" / "README.md").read_text()
