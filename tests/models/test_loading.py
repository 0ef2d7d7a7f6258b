"""Only what the first blocks need is downloaded and read, and nothing is made up; models spread by a device map."""

from __future__ import annotations

import gc
import json
import logging
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from families import BLOCKS, FAMILIES, tiny_model, tiny_tokenizer
from hub import Hub
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import write_sae
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError
from hf_neuronselect.models import loading, prefix
from hf_neuronselect.models.backbone import Backbone
from hf_neuronselect.models.loading import quiet_peft
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.signals.forward import ForwardSignal

TEXTS = {"text": ["some words here", "others, and more of them", "x"]}
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    loading._BACKBONES.clear()
    yield
    loading._BACKBONES.clear()


def save(folder: Path, model: Any, *, shards: bool = True) -> Path:
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save(tmp_path / "model", tiny_model("llama"))


def extractor(model: Path | str, layer: int = 1, **options: Any) -> NeuronFeatureExtractor:
    return NeuronFeatureExtractor.from_pretrained(str(model), layer=layer, **{"features": ["hidden"]} | options)


def backbone_of(made: NeuronFeatureExtractor) -> Backbone:
    return made.forward.loaded([signal for signal in made.signals if isinstance(signal, ForwardSignal)])[0]


def features(made: NeuronFeatureExtractor) -> dict[str, Any]:
    names = [signal.name for signal in made.signals]
    return {name: column for name, column in made(TEXTS).items() if name in names or "mona" in name}


def same(got: NeuronFeatureExtractor, want: NeuronFeatureExtractor) -> bool:
    a, b = features(got), features(want)
    return a.keys() == b.keys() and all(np.array_equal(x, y) for k in a for x, y in zip(a[k], b[k], strict=True))


def whole(folder: Path, layer: int = 1, **options: Any) -> NeuronFeatureExtractor:
    """Around the whole model as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = {"features": ["hidden"]} | options
    return NeuronFeatureExtractor.from_model(model, AutoTokenizer.from_pretrained(folder), layer=layer, **options)


def files_of(folder: Path, needed: Callable[[str], bool]) -> set[str]:
    return {file for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items() if needed(name)}


def in_first_two(name: str) -> bool:
    return name.startswith(("model.embed_tokens.", "model.layers.0.", "model.layers.1."))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


# -------------------------------------------------------------------------------------- which, and equal
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prefix_gives_the_whole_models_bits(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_model(family, tie_word_embeddings=FAMILIES.index(family) % 2 == 0))
    got = extractor(folder)
    assert same(got, whole(folder))
    backbone = backbone_of(got)
    assert len(backbone.blocks) == 2 and backbone.num_layers == BLOCKS
    # The final norm is not there at all, rather than with numbers of its own.
    assert not any(hasattr(backbone.decoder, name) for name in ("norm", "ln_f", "final_layer_norm"))


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("mixtral", False)])
def test_one_file_and_every_block(family: str, tied: bool, tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_model(family, tie_word_embeddings=tied), shards=False)
    assert same(extractor(folder, 0), whole(folder, 0))
    assert same(extractor(folder, -1, features=["nait", "hidden"]), whole(folder, -1, features=["nait", "hidden"]))


def test_names_of_older_checkpoints(tmp_path: Path) -> None:
    """GPT-2's own has no ``transformer.`` before its names, and buffers that are no weights."""
    folder = save(tmp_path, tiny_model("gpt2", tie_word_embeddings=True), shards=False)
    want = features(extractor(folder))
    mask = {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(BLOCKS)}
    rewrite(folder, lambda held: {k.removeprefix("transformer."): v for k, v in held.items()} | mask)
    got = extractor(folder)
    assert np.array_equal(features(got)["hidden"], want["hidden"]) and len(backbone_of(got).blocks) == 2


def test_the_text_part_of_a_model_that_sees(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 48, "vocab_size": 128, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    folder = save(tmp_path, AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    got = extractor(folder)
    assert same(got, whole(folder)) and len(backbone_of(got).blocks) == 2


def test_other_shards_need_not_be_there(sharded: Path) -> None:
    want = features(extractor(sharded))
    loading._BACKBONES.clear()
    needed = files_of(sharded, in_first_two)
    dropped = {file.name for file in sharded.glob("*.safetensors")} - needed
    assert dropped
    for name in dropped:
        (sharded / name).unlink()
    assert np.array_equal(features(extractor(sharded))["hidden"], want["hidden"])
    with pytest.raises(
        NeuronSelectError, match=r"the file model-\d+-of-\d+.safetensors, which has model.layers"
    ) as raised:
        features(extractor(sharded, features=["nait"]))
    assert raised.value.option == "model" and any(name in str(raised.value) for name in dropped)


@pytest.mark.parametrize("tied", [True, False])
def test_other_tensors_are_not_read(tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, tiny_model("llama", tie_word_embeddings=tied), shards=False)
    read = []

    class Recorder:
        def __init__(self, *words: Any, **more: Any) -> None:
            self.inner = safe_open(*words, **more)

        def __enter__(self) -> Recorder:
            self.held = self.inner.__enter__()
            return self

        def __exit__(self, *words: Any) -> None:
            self.inner.__exit__(*words)

        def keys(self) -> list[str]:
            return list(self.held.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.held.get_tensor(name)

    monkeypatch.setattr(prefix, "safe_open", Recorder)
    features(extractor(folder))
    assert sorted(read) == sorted(name for name in load_file(folder / "model.safetensors") if in_first_two(name))


def test_more_blocks_are_loaded_when_they_are_asked_for(sharded: Path) -> None:
    for layer, blocks in ((0, 1), (2, 3), (1, 3)):
        made = extractor(sharded, layer)
        assert same(made, whole(sharded, layer)) and len(backbone_of(made).blocks) == blocks


def test_a_prefix_that_is_not_understood_is_loaded_whole(
    sharded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a family whose early blocks take weights that stand under a later one's name."""
    read = prefix._read
    monkeypatch.setattr(
        prefix, "_read", lambda *words: {k: v for k, v in read(*words).items() if "layers.1.mlp" not in k}
    )
    with caplog.at_level(logging.INFO, "hf_neuronselect"):
        got = extractor(sharded)
        assert same(got, whole(sharded))
    assert "is loaded whole" in caplog.text and "layers.1.mlp" in caplog.text


# ------------------------------------------------------------------------------------- nothing is made up
def test_transformers_reports_nothing(sharded: Path, capfd: pytest.CaptureFixture[str]) -> None:
    features(extractor(sharded))
    said = capfd.readouterr().err
    assert "LOAD REPORT" not in said and "UNEXPECTED" not in said and "Warning" not in said


def test_a_missing_tensor_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "broken", tiny_model("llama"), shards=False)
    want = features(extractor(folder))
    behind = ("model.layers.3.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight")
    rewrite(folder, lambda held: {k: v for k, v in held.items() if k not in behind})
    assert np.array_equal(features(extractor(folder))["hidden"], want["hidden"])
    # With all blocks comes the norm behind them, which rds_plus reads: made up, it would be silently wrong.
    with pytest.raises(
        NeuronSelectError, match=r"broken.*lacks model.layers.3.mlp.up_proj.weight and 1 more; save or download"
    ):
        features(extractor(folder, -1))
    rewrite(folder, lambda held: held | {"model.layers.1.mlp.up_proj.weight": torch.ones(3, 3)})
    with pytest.raises(NeuronSelectError, match=r"lacks model.layers.1.mlp.up_proj.weight \(of shape \(3, 3\)"):
        features(extractor(folder))
    rewrite(folder, lambda held: {k: v for k, v in held.items() if "q_proj" not in k})
    with pytest.raises(NeuronSelectError, match=r"lacks model.layers.0.self_attn.q_proj.weight and 6 more"):
        features(extractor(folder))
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_damaged_files_are_one_clear_line(tmp_path: Path, sharded: Path) -> None:
    first = sorted(files_of(sharded, in_first_two))[0]
    (sharded / first).write_bytes((sharded / first).read_bytes()[:-7])
    with pytest.raises(NeuronSelectError, match=f"the file {first} is damaged"):
        features(extractor(sharded))
    for text in ("{", "[]", '{"metadata": {}}'):
        (sharded / INDEX).write_text(text)
        with pytest.raises(NeuronSelectError, match=f"{INDEX} cannot be read"):
            features(extractor(sharded))


def test_a_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    folder = save(tmp_path / "pickled", model, shards=False)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    base = save(tmp_path / "base", model, shards=False)
    adapter = tmp_path / "adapter"
    with_adapter().save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    monkeypatch.setattr(torch, "load", lambda *words, **more: pytest.fail("a pickle was opened"))
    with pytest.raises(NeuronSelectError, match=r"model='pickled': has no safetensors weights"):
        features(extractor(folder))
    _based_on(adapter, base)
    with pytest.raises(NeuronSelectError, match=r"model='adapter': has no safetensors weights"):
        features(extractor(adapter))
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    _based_on(adapter, folder)
    with pytest.raises(NeuronSelectError, match="has no safetensors weights"):
        features(extractor(adapter))


def with_adapter() -> Any:
    with quiet_peft():
        lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        return get_peft_model(tiny_model("llama"), lora).eval()


def _based_on(adapter: Path, base: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))


def test_an_adapter_is_loaded_whole(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny_model("llama"))
    tuned = with_adapter()
    tuned.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    _based_on(tmp_path / "adapter", base)
    got = extractor(tmp_path / "adapter")
    want = NeuronFeatureExtractor.from_model(tuned, AutoTokenizer.from_pretrained(base), features=["hidden"], layer=1)
    assert same(got, want) and not same(got, extractor(base))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(
        NeuronSelectError, match="the adapter 'adapter' does not fit the model: Found missing adapter keys"
    ):
        features(extractor(tmp_path / "adapter"))


@pytest.mark.parametrize("kind", [AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, OFTConfig, VeraConfig, "DoRA"])
def test_other_kinds_of_adapters_are_applied(tmp_path: Path, kind: Any) -> None:
    """As the model with the adapter computes them itself."""
    base, options = save(tmp_path / "base", tiny_model("llama")), {"target_modules": ["q_proj", "down_proj"]}
    if kind is IA3Config:
        config = IA3Config(**options, feedforward_modules=["down_proj"])
    elif kind is AdaLoraConfig:
        config = AdaLoraConfig(**options, total_step=1)
    elif kind is OFTConfig:
        config = OFTConfig(**options, oft_block_size=4)
    else:
        config = LoraConfig(**options, use_dora=True) if kind == "DoRA" else kind(**options)
    with quiet_peft():
        tuned = get_peft_model(tiny_model("llama"), config).eval()
    for number, parameter in enumerate(tuned.parameters()):
        if parameter.requires_grad:  # trained, as far as anyone can tell
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data += 0.3 * noise
    tuned.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    _based_on(tmp_path / "adapter", base)
    made = extractor(tmp_path / "adapter")
    got = features(made)["hidden"]
    with torch.no_grad():
        for i, sample in enumerate(made.forward.read([Conversation(text=text) for text in TEXTS["text"]], ())):
            ids = torch.as_tensor(sample.input_ids)[None]
            want = tuned(input_ids=ids, output_hidden_states=True).hidden_states[2][0].mean(0)
            assert np.allclose(got[i], want, atol=1e-5)
    assert not same(made, extractor(base))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"peft_type": "PREFIX_TUNING"}, "of type PREFIX_TUNING"),
        ({"peft_type": "P_TUNING"}, "of type P_TUNING"),
        ({"peft_type": "XLORA"}, "of type XLORA"),
        ({"peft_type": None}, "of type None"),
        ({"alora_invocation_tokens": [3]}, "LORA adapter with alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 4]]}, "LORA adapter with layer_replication"),
        ({"base_model_name_or_path": None}, "does not name its base model"),
        ({"base_model_name_or_path": "/nowhere/gone"}, "is an adapter of gone, which cannot be had"),
    ],
)
def test_adapters_that_cannot_be_applied_are_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with_adapter().save_pretrained(tmp_path / "adapter")
    _based_on(tmp_path / "adapter", save(tmp_path / "base", tiny_model("llama")))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(NeuronSelectError, match=f"model='adapter': .*{named}"):
        extractor(tmp_path / "adapter")


def test_prompt_tuning_in_memory_is_refused() -> None:
    with quiet_peft():
        tuned = get_peft_model(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(NeuronSelectError, match="model='default': is an adapter of type PROMPT_TUNING"):
        NeuronFeatureExtractor.from_model(tuned, tiny_tokenizer(), features=["hidden"])


def test_an_adapter_of_an_adapter_is_refused(tmp_path: Path) -> None:
    for name, below in (("one", save(tmp_path / "base", tiny_model("llama"))), ("two", tmp_path / "one")):
        with_adapter().save_pretrained(tmp_path / name)
        _based_on(tmp_path / name, below)
    with pytest.raises(NeuronSelectError, match="model='two': is an adapter of one, which is an adapter, too"):
        extractor(tmp_path / "two")


def test_an_adapters_identity_has_its_base(tmp_path: Path) -> None:
    """Other weights under it, or another chat template beside it, are another model."""
    base = save(tmp_path / "base", tiny_model("llama"), shards=False)
    with_adapter().save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    _based_on(tmp_path / "adapter", base)
    seen = [extractor(tmp_path / "adapter").hash]
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if "layers.0" in name)
    save_file(weights | {name: weights[name] + 1}, base / "model.safetensors", metadata={"format": "pt"})
    seen.append(extractor(tmp_path / "adapter").hash)
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    seen.append(extractor(tmp_path / "adapter").hash)
    assert len(set(seen)) == 3
    base.rename(tmp_path / "elsewhere")  # the same base in another place; the adapter's configuration follows it
    _based_on(tmp_path / "adapter", tmp_path / "elsewhere")
    assert extractor(tmp_path / "adapter").extraction.model.base.id == "elsewhere"


def test_weights_in_a_file_of_another_name(tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_model("llama"), shards=False)
    want = features(extractor(folder))
    (folder / "model.safetensors").rename(folder / "odd.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "odd.safetensors"}))
    assert np.array_equal(features(extractor(folder))["hidden"], want["hidden"])


# ------------------------------------------------------------------------------------------------ the Hub
def test_only_needed_shards_are_downloaded(hub: Hub, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "me/in-shards"
    hub.add("models", name, {p.name: p.read_bytes() for p in sharded.iterdir() if p.is_file()})

    def downloaded(start: int) -> set[str]:
        got = (request for request in hub.requests[start:] if request.startswith("GET"))
        return {request.rpartition("/")[2] for request in got if request.endswith(".safetensors")}

    start = len(hub.requests)
    made = extractor(name)
    made.prepare([])  # tokenizing needs no weights
    assert not downloaded(start)
    assert same(made, extractor(sharded))
    first = files_of(sharded, in_first_two)
    assert downloaded(start) == first
    assert made.extraction.model.commit == hub.commit("models", name)
    # Without the Hub what is cached does, and what is not is said.
    loading._BACKBONES.clear()
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert same(extractor(name), extractor(sharded))
        with pytest.raises(NeuronSelectError, match="HF_HUB_OFFLINE is set and nothing of that name is in the cache"):
            features(extractor(name, 3))
    start = len(hub.requests)
    assert same(extractor(name, 3), extractor(sharded, 3))
    assert downloaded(start) == files_of(sharded, lambda tensor: "layers." in tensor) - first


def test_a_repository_without_safetensors(hub: Hub, sharded: Path) -> None:
    kept = {p.name: p.read_bytes() for p in sharded.iterdir() if p.suffix == ".json" and p.name != INDEX}
    hub.add("models", "me/pickled", kept | {"pytorch_model.bin": b"pickle"})
    start = len(hub.requests)
    with pytest.raises(NeuronSelectError, match="model='me/pickled': has no safetensors weights"):
        features(extractor("me/pickled"))
    assert not any(request.endswith(".bin") for request in hub.requests[start:])


# ------------------------------------------------------------------------------------------- device maps
def spread(**places: str) -> dict[str, str]:
    """Everything on the CPU but what is named otherwise (``layers_0="disk"``)."""
    modules = ["embed_tokens", "rotary_emb", *(f"layers.{i}" for i in range(BLOCKS)), "norm"]
    named = {name.replace("_", ".") if name.startswith("layers") else name: place for name, place in places.items()}
    return {**{f"model.{name}": named.get(name, "cpu") for name in modules}, "lm_head": "cpu"}


@pytest.mark.parametrize(
    "device_map", ["auto", "sequential", spread(layers_0="disk"), spread(embed_tokens="disk", layers_1="disk", layers_3="disk")]
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_a_spread_model_gives_the_same_bits(family: str, device_map: Any, tmp_path: Path) -> None:
    """What is on the disk moves to the CPU for its block's turn, by the hooks that also move between GPUs."""
    folder = save(tmp_path / "model", tiny_model(family))
    sae = str(write_sae(tmp_path / "sae" / "layers.2", 32).parent)
    for names in (["mona", "hidden"], ["nait", "mona"]):
        plain = extractor(folder, 2, features=names, sae=sae)
        made = extractor(folder, 2, features=names, sae=sae, device_map=device_map)
        assert same(made, plain)
        assert made.identities == plain.identities
        again = pickle.loads(pickle.dumps(made))
        assert again.extraction.options.device_map == device_map == made.extraction.options.device_map
        assert backbone_of(again) is backbone_of(made) is not backbone_of(plain)


def test_what_is_offloaded_is_cleaned_up(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    features(extractor(sharded, device_map=spread(layers_0="disk")))
    (offload,) = tmp_path.glob("neuronselect_*")
    assert any(offload.iterdir())
    loading._BACKBONES.clear()
    gc.collect()
    assert not offload.exists()
    with pytest.raises(NeuronSelectError):
        features(extractor(sharded, device_map={"": "nowhere"}))
    assert not list(tmp_path.glob("neuronselect_*"))


def test_activations_are_read_where_the_last_block_runs(sharded: Path) -> None:
    made = extractor(sharded, device_map=spread(layers_0="disk", layers_1="disk"))
    backbone = backbone_of(made)
    assert all(parameter.is_meta for parameter in backbone.blocks[-1].parameters())
    assert backbone.device == torch.device("cpu")
    moved = []

    class Elsewhere(torch.Tensor):
        def to(self, device: Any) -> torch.Tensor:  # type: ignore[override]
            moved.append(device)
            return self.as_subclass(torch.Tensor)

    backbone.blocks[-1].register_forward_hook(lambda _m, _i, out: out.as_subclass(Elsewhere))
    assert same(made, extractor(sharded)) and moved == [torch.device("cpu")] * len(moved) != []


def test_a_router_on_the_disk_is_said(tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_model("olmoe"))
    made = extractor(folder, features=["routing"], device_map=spread(layers_1="disk"))
    with pytest.raises(NeuronSelectError, match="offloads the router of block 1"):
        features(made)
    assert same(
        extractor(folder, features=["routing"], device_map=spread(embed_tokens="disk")),
        extractor(folder, features=["routing"]),
    )


def test_a_device_map_that_cannot_be(sharded: Path) -> None:
    with pytest.raises(NeuronSelectError, match="must be one of auto, balanced"):
        extractor(sharded, device_map="fast")
    with pytest.raises(NeuronSelectError, match="replaces device, which is cpu"):
        extractor(sharded, device_map="auto", device="cpu")
    with pytest.raises(NeuronSelectError, match="spreads one model over all devices"):
        extractor(sharded, device_map="auto")(TEXTS, rank=1)
    assert "hidden" in extractor(sharded, device_map="auto")(TEXTS, rank=0)
    with pytest.raises(NeuronSelectError, match="a model in memory stays where it is"):
        NeuronFeatureExtractor.from_model(tiny_model("llama"), tiny_tokenizer(), features=["hidden"], device_map="auto")
    for device_map, words in (({"": "nowhere"}, "cannot be placed like this: .*device"),
                              ({"model.layers.0": "disk", "model.layers.1": "cpu"}, "embed_tokens")):  # fmt: skip
        with pytest.raises(NeuronSelectError, match=words):
            features(extractor(sharded, device_map=device_map))
