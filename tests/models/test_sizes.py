"""Sizes that files only claim are refused before memory is taken for them."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import write_sae

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError
from hf_neuronselect.models.sae_formats import load_sae
from hf_neuronselect.training.models import base_source, load_causal_lm

ROW = {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}
MOST = 1 << 33  # bytes of address space beyond what is used: an allocation of a hostile size fails


@pytest.fixture(autouse=True)
def little_memory() -> Any:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def changed(folder: Path, to: Path, file: str = "config.json", **values: object) -> Path:
    shutil.copytree(folder, to)
    stated = json.loads((to / file).read_text()) | values
    (to / file).write_text(json.dumps(stated))
    return to


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**9}, "states num_hidden_layers 1000000000; no model has more than 4096"),
        ({"text_config": {"num_local_experts": 10**9}}, "states num_local_experts 1000000000"),
        ({"num_labels": 10**8}, "states num_labels 100000000"),
        ({"hidden_size": 10**13}, "states hidden_size 10000000000000"),
        ({"rope_parameters": {"rope_type": "", "rope_theta": 1e4}}, "describes a model that cannot be built"),
        ({"hidden_size": 1 << 21}, r"describes [\d,]+ parameters, its weights are [\d,]+ bytes"),
        ({"vocab_size": 1 << 24}, r"describes [\d,]+ parameters, its weights are [\d,]+ bytes"),
        ({"intermediate_size": 1 << 24}, r"describes [\d,]+ parameters, its weights are [\d,]+ bytes"),
    ],
    ids=str,
)
def test_a_configuration_of_hostile_sizes(
    values: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = changed(tiny_folder / "model", tmp_path / "m", **values)

    def extract() -> object:
        return NeuronFeatureExtractor.from_pretrained(str(folder), features=("hidden",))(ROW)

    def train() -> object:
        return load_causal_lm(base_source(str(folder)))

    for load in (extract, train):
        with pytest.raises(NeuronSelectError, match=message) as caught:
            load()
        assert caught.value.option == "model"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_an_adapter_of_a_hostile_rank(tiny_folder: Path, tmp_path: Path) -> None:
    tuned = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "a")
    base = str(tiny_folder / "model")
    folder = changed(tmp_path / "a", tmp_path / "b", "adapter_config.json", base_model_name_or_path=base, r=10**11)
    with pytest.raises(NeuronSelectError, match="states r 100000000000, its weights are at most 32 wide"):
        NeuronFeatureExtractor.from_pretrained(str(folder), features=("hidden",))(ROW)


@pytest.mark.parametrize("name", ["k", "d_in", "num_latents"])
def test_an_sae_of_hostile_sizes(name: str, tmp_path: Path) -> None:
    write_sae(tmp_path / "layers.1", 8)
    with pytest.raises(NeuronSelectError, match=f"{name} is 100000000000 in its"):
        load_sae(changed(tmp_path / "layers.1", tmp_path / "b" / "layers.1", "cfg.json", **{name: 10**11}))


# ------------------------------------------------------------------------------------------ weights
def npy(shape: tuple[int, ...], content: bytes = b"") -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


def a_claim(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_enc.npy", npy((10**6, 10**6), bytes(64)))


def a_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", npy((1 << 19, 8), bytes(1 << 24)))


def no_array(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_enc.npy", b"x" * 90)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_claim, "states 4,000,000,000,000 bytes and holds 64"),
        (a_bomb, "it would unpack to 16,777,"),
        (no_array, "magic"),
    ],
)
def test_an_npz_that_claims_more_than_it_holds(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path / "params.npz")
    with pytest.raises(NeuronSelectError, match=message):
        load_sae(tmp_path, layer=1)


def test_a_packed_npz_of_weights_is_read(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {name: draw.normal(size=size).astype("f4") for name, size in
              (("W_enc", (8, 64)), ("W_dec", (64, 8)), ("b_enc", 64), ("b_dec", 8), ("threshold", 64))}  # fmt: skip
    np.savez_compressed(tmp_path / "params.npz", **arrays)
    assert torch.equal(load_sae(tmp_path, layer=1).W_enc, torch.from_numpy(arrays["W_enc"].T))


@pytest.mark.parametrize("size", [1 << 62, 100 << 20, 10_000])
def test_safetensors_whose_header_claims_more_than_the_file(size: int, tiny_folder: Path, tmp_path: Path) -> None:
    write_sae(tmp_path / "layers.1", 8)
    claim = json.dumps({"encoder.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}})
    for length in (size, len(claim)):
        (tmp_path / "layers.1" / "sae.safetensors").write_bytes(struct.pack("<Q", length) + claim.encode())
        with pytest.raises(NeuronSelectError, match=r"sae.safetensors.*cannot be read"):
            load_sae(tmp_path)
    shutil.copytree(tiny_folder / "model", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(struct.pack("<Q", len(claim)) + claim.encode())
    with pytest.raises(NeuronSelectError, match=r"model.safetensors is damaged"):
        NeuronFeatureExtractor.from_pretrained(str(tmp_path / "m"), features=("hidden",))(ROW)


def test_a_model_in_half_precision_is_not_too_large(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder / "model", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    found = NeuronFeatureExtractor.from_pretrained(str(tmp_path / "m"), features=("hidden",))(ROW)
    assert found["neuron_skip"] == [""]
