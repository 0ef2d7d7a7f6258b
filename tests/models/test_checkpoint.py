"""Models that cannot be used are refused in one line, before any row is read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import VOCAB, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from tiny import chat
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError
from hf_neuronselect.core.errors import NeuronSelectWarning
from hf_neuronselect.models.checkpoint import limits_of
from hf_neuronselect.models.loading import quiet_peft
from hf_neuronselect.rows.encode import SampleEncoder
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.training.models import base_source, load_causal_lm, load_tokenizer

KNOWN = len(tiny_tokenizer())
ROWS = {"messages": [chat("a b c", "d e"), chat("f g h i", "j")]}


def extractor(folder: Path, features: str = "hidden", **options: Any) -> NeuronFeatureExtractor:
    return NeuronFeatureExtractor.from_pretrained(str(folder), features=[features], layer=1, **options)


def refused(folder: Path, what: str) -> str:
    with pytest.raises(NeuronSelectError, match=what) as raised:
        extractor(folder)
    assert (
        raised.value.option == "model" and "\n" not in str(raised.value) and str(folder.parent) not in str(raised.value)
    )
    return str(raised.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def configure(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# ------------------------------------------------------------------------------------------ no causal LM
def test_models_that_do_not_read_from_left_to_right(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", vocab_size=VOCAB, **small))
    both = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for name, model, what in (("bert", encoder, "is an encoder "), ("t5", both, "is an encoder-decoder")):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        assert "decoder-only" in refused(tmp_path / name, what)
        with pytest.raises(NeuronSelectError, match=what):
            base_source(str(tmp_path / name))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ("{ no", "cannot be read as JSON"),
        ("[1]", "is no JSON object"),
        ('"llama"', "is no JSON object"),
        ("\xff", "cannot be read as JSON"),
        ('{"_class_name": "UNet2DConditionModel"}', "transformers can load"),
        ('{"model_type": "vit"}', "is no causal language model"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "mine.Config"}}', "needs code of its own"),
        ('{"model_type": "llama", "num_hidden_layers": "many"}', "transformers can load"),
        ('{"model_type": "musicgen"}', "its config.json is not|is no causal"),
        (None, "has no config.json"),
    ],
)
def test_a_configuration_of_something_else(folder: Path, config: str | None, what: str) -> None:
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_bytes(config.encode("latin-1"))
    refused(folder, what)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_a_quantised_checkpoint_without_its_package(folder: Path, method: str) -> None:
    stated = {"quant_method": method, "bits": 4, "group_size": 8, "load_in_4bit": method == "bitsandbytes"}
    configure(folder, quantization_config=stated)
    assert method in refused(folder, "is stored quantised .* cannot run here: ")
    extractor(folder, "text")  # counts tokens alone
    with pytest.raises(NeuronSelectError, match="is stored quantised"):
        load_causal_lm(base_source(str(folder)))


# -------------------------------------------------------------------------------------------- tokenizers
def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, "has no tokenizer: put tokenizer.json")
    with pytest.raises(NeuronSelectError, match="has no tokenizer"):
        load_tokenizer(base_source(str(folder)))


def test_a_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": ')
    refused(folder, "its tokenizer cannot be read")


def test_a_tokenizer_of_a_larger_model(tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=64).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert f"has the id {KNOWN - 1}," in refused(tmp_path / "model", "embeddings for 64 tokens")


def added(*tokens: str, template: str | None = None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    assert tokenizer.convert_tokens_to_ids(tokens[0]) == KNOWN
    tokenizer.chat_template = template
    return tokenizer


def test_added_tokens_without_embeddings(folder: Path) -> None:
    tiny_model("llama", vocab_size=KNOWN).save_pretrained(folder)
    added("<im>").save_pretrained(folder)
    made = extractor(folder)
    found = made({"messages": [chat("a b", "c"), chat("a <im> b", "c")]})
    assert found["neuron_skip"][0] == "" and len(found["hidden"][1]) == 0
    assert f"'<im>' has the id {KNOWN}, the model embeddings for {KNOWN} tokens" in found["neuron_skip"][1]
    loss = extractor(folder, "answer_loss")({"messages": [chat("a b", "c <im>"), chat("a", "b")]})
    assert f"has the id {KNOWN}" in loss["neuron_skip"][0] and np.isfinite(loss["answer_loss"][1])
    added("<im>", template="{% for m in messages %}<im>{{ m['content'] }}{% endfor %}").save_pretrained(folder)
    refused(folder, f"'<im>' has the id {KNOWN}.*resize_token_embeddings")


def test_the_same_in_memory() -> None:
    template = "{% for m in messages %}<im>{{ m['content'] }}{% endfor %}"
    with pytest.raises(NeuronSelectError, match="resize_token_embeddings"):
        NeuronFeatureExtractor.from_model(
            tiny_model("gpt2", vocab_size=KNOWN), added("<im>", template=template), features=["hidden"]
        )


# -------------------------------------------------------------------------------------------- templates
NAMED = {
    "default": "{% for m in messages %}D {{ m['content'] }} {% endfor %}",
    "tool_use": "{% for m in messages %}T {{ m['content'] }} {% endfor %}",
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize("named", [NAMED, [{"name": name, "template": text} for name, text in NAMED.items()]])
def test_named_templates(named: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = named
    encoder = SampleEncoder(tokenizer, pool_tokens="assistant")
    plain, tools = Conversation(chat("a", "b")), Conversation(chat("a", "b"), tools=TOOLS)
    assert encoder.render(plain) == "D a D b " and encoder.render(tools) == "T a T b "
    assert all(not sample.skip and sample.pooled.sum() for sample in encoder.encode([plain, tools]))
    assert SampleEncoder(tokenizer, chat_template=NAMED["tool_use"]).render(plain) == "T a T b "


def test_named_templates_without_those_names() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": NAMED["default"]}
    assert SampleEncoder(tokenizer).render(Conversation(chat("a", "b"), tools=TOOLS)) == "D a D b "
    tokenizer.chat_template = {"rag": NAMED["default"], "chat": NAMED["default"]}
    with pytest.raises(NeuronSelectError, match="named rag, chat, none default"):
        SampleEncoder(tokenizer)


def test_a_template_that_is_given_replaces_those_that_cannot_be_used(folder: Path) -> None:
    """As the errors about them advise."""
    tokenizer = tiny_tokenizer()
    for unusable in ({"rag": NAMED["default"]}, "{{ [1, 2] | random }}"):
        tokenizer.chat_template = unusable
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
        with pytest.raises(NeuronSelectError, match="give one"):
            extractor(folder)
        assert len(extractor(folder, chat_template=NAMED["default"])(ROWS)["hidden"]) == 2
        model = AutoModelForCausalLM.from_pretrained(folder)
        made = NeuronFeatureExtractor.from_model(
            model, tokenizer, features=["hidden"], layer=1, chat_template=NAMED["default"]
        )
        assert len(made(ROWS)["hidden"]) == 2


def test_named_templates_of_a_folder_and_its_training(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NAMED
    tokenizer.save_pretrained(folder)
    assert extractor(folder)(ROWS)["neuron_skip"] == ["", ""]


# --------------------------------------------------------------------------------------------- adapters
def adapter_of(base: Path, folder: Path, named: str) -> Path:
    with quiet_peft():
        model = AutoModelForCausalLM.from_pretrained(base)
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": named}))
    return folder


@pytest.mark.parametrize(
    "named",
    [lambda base: str(base), lambda base: f"../{base.name}", lambda base: base.name],
    ids=["path", "beside", "here"],
)
def test_an_adapter_as_peft_saves_it(
    folder: Path, named: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(folder, folder.parent / "adapter", named(folder))
    monkeypatch.chdir(folder.parent)
    one, other = extractor(adapter)(ROWS), extractor(folder)(ROWS)
    assert one["neuron_skip"] == ["", ""] and not np.allclose(one["hidden"][0], other["hidden"][0])
    assert one["n_tokens"].tolist() == other["n_tokens"].tolist()
    assert load_causal_lm(base_source("adapter")).config.model_type == "llama"
    assert load_tokenizer(base_source("adapter")).eos_token
    with pytest.raises(NeuronSelectError, match="is a PEFT adapter: name its base model"):
        base_source("adapter", to_train=True)


def test_an_adapter_without_its_base(folder: Path) -> None:
    adapter = adapter_of(folder, folder.parent / "adapter", "/home/bob/llama")
    assert "base_model_name_or_path" in refused(adapter, "is an adapter of llama, which cannot be had")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(adapter, "does not name its base model")
    (adapter / "adapter_config.json").write_text("LORA")
    refused(adapter, "adapter_config.json cannot be read")


# -------------------------------------------------------------------------------------------- positions
LONG = {"messages": [chat("a b c", "d e"), chat("a " * 40, "b " * 40)]}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("features", ["hidden", "answer_loss"])
def test_rows_longer_than_the_positions(family: str, features: str, tmp_path: Path) -> None:
    tiny_model(family, max_position_embeddings=48).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    made = extractor(tmp_path, features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made({"messages": LONG["messages"][:1]})["truncated"].tolist() == [False]
    with pytest.warns(NeuronSelectWarning, match="the model's 48 positions are cut there, not at max_length 2048"):
        found = made(LONG)
    assert found["truncated"].tolist() == [False, True] and found["n_tokens"][1] == 48
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the user's own limit is no surprise
        assert extractor(tmp_path, features, max_length=30)(LONG)["n_tokens"][1] == 30


def test_positions_may_be_stretched() -> None:
    def positions(**values: Any) -> int | None:
        return limits_of(AutoConfig.for_model("llama", max_position_embeddings=64, **values)).positions

    rope = {"rope_theta": 10000.0}
    assert positions() == 64
    assert positions(rope_parameters=rope | {"rope_type": "yarn", "factor": 4.0}) == 256
    stretched = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert positions(rope_parameters=rope | stretched) == 64
    assert limits_of(AutoConfig.for_model("bloom")).positions is None
    assert limits_of(AutoConfig.for_model("mpt")).positions == 2048
