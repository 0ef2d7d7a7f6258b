"""Damaged files of every kind through the command line: done, or one line and exit status 2, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import RECORDS, change_json, damage, files_in
from datasets import DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny import rows, write_sae
from transformers import AutoModelForCausalLM

from hf_neuronselect import FeatureLibrary, NeuronFeatureExtractor, NeuronSelector
from hf_neuronselect.cli import main as cli
from hf_neuronselect.core.digests import SAE_FILES
from hf_neuronselect.core.provenance import SourceRecord, TrainingRecord
from hf_neuronselect.core.seals import checksums, write_checksums
from hf_neuronselect.models import loading
from hf_neuronselect.pipelines.steps import Steps
from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.store.store import FeatureStore, write_store
from hf_neuronselect.training.models import base_source
from hf_neuronselect.training.sft import write_record

SELECT = "select --k 3 --out {out} --pool"
COMMANDS = {
    "selection": ["export {it} --format trl --base-model a/b --out {out}", f"{SELECT} {{it}} --method random"],
    "store": [
        f"{SELECT} {{pool}} --features {{it}} --target capability:{{whole}}/capability --model {{model}} --sae {{sae}}"
    ],
    "capability": [
        f"{SELECT} {{pool}} --features {{whole}}/store --target capability:{{it}} --model {{model}} --sae {{sae}}"
    ],
    "library": [
        f"{SELECT} {{pool}} --features {{whole}}/store --target capability:{{it}}:a --model {{model}} --sae {{sae}}"
    ],
    "sae": ["sae inspect {it}", f"{SELECT} {{pool}} --target t={{held}} --model {{model}} --sae {{it}}"],
    "saelens": ["sae inspect {it}"],
    "gemma_scope": ["sae inspect {it}"],
    "llama_scope-L2R-8x": ["sae inspect {it}"],
    "model": [f"{SELECT} {{pool}} --method hidden --target t={{held}} --model {{it}}"],
    "adapter": ["evaluate --model {model} --adapter a={it} --data x={held} --out {out}"],
    "foreign": [f"{SELECT} {{pool}} --method hidden --target t={{held}} --model {{it}}"],
    "saved": [f"{SELECT} {{it}} --method random"],
    "run": ["run {recipe} --out {it} --no-push"],
}


@pytest.fixture(scope="module")
def whole(extractor: NeuronFeatureExtractor, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each kind, undamaged."""
    root = tmp_path_factory.mktemp("whole")
    rows(24).to_json(root / "pool.jsonl")
    rows(3, seed=4).to_json(root / "held.jsonl")
    pool = load_rows(str(root / "pool.jsonl"))
    write_store(pool.data, extractor, root / "store", pool_about=pool.about, shard_rows=8)
    fitted = NeuronSelector("mona").fit({"t": rows(4, seed=1)}, extractor=extractor)
    fitted.save_pretrained(root / "capability")
    FeatureLibrary({"a": fitted}).save_pretrained(root / "library")
    fitted.select(pool.data, k=5, features=FeatureStore(root / "store")).save_pretrained(root / "selection")
    DatasetDict({"train": rows(9), "test": rows(4, seed=9)}).save_to_disk(root / "saved")
    shutil.copytree(tiny_folder / "model", root / "model")
    _saes(root)
    _adapters(root)
    (root / "recipe.yaml").write_text(json.dumps({"select": {"pool": str(root / "nowhere"), "method": "random", "k": 3},
                                                  "train": {"max_steps": 1}}))  # fmt: skip
    (root / "run").mkdir()
    Steps(root / "run", lambda text: None).run("select random", [1], lambda: None)
    return root


def _saes(root: Path) -> None:
    write_sae(root / "sae" / "layers.2", 32)
    write_checksums(root / "sae" / "layers.2", SAE_FILES)
    weight, bias = torch.randn(32, 96), torch.zeros(96)
    (root / "saelens").mkdir()
    save_file({"W_enc": weight, "b_enc": bias, "b_dec": torch.zeros(32)}, root / "saelens" / "sae_weights.safetensors")
    cfg = {"architecture": "topk", "d_in": 32, "d_sae": 96, "k": 6, "metadata": {"hook_name": "blocks.2.hook_resid_post"},
           "normalize_activations": "expected_average_only_in"}  # fmt: skip
    (root / "saelens" / "cfg.json").write_text(json.dumps(cfg))
    (root / "saelens" / "activation_scaler.json").write_text('{"scaling_factor": 1.5}')
    place = root / "gemma_scope" / "layer_2"
    place.mkdir(parents=True)
    np.savez(place / "params.npz", W_enc=weight.numpy(), b_enc=bias.numpy(), threshold=np.full(96, 0.1, "f4"))
    place = root / "llama_scope-L2R-8x"
    (place / "checkpoints").mkdir(parents=True)
    tensors = {
        "encoder.weight": weight.T,
        "encoder.bias": bias,
        "decoder.weight": weight,
        "decoder.bias": torch.zeros(32),
    }
    save_file({name: one.contiguous() for name, one in tensors.items()}, place / "checkpoints" / "final.safetensors")
    cfg = {
        "jump_relu_threshold": 0.1,
        "dataset_average_activation_norm": {"in": 3.0},
        "sparsity_include_decoder_norm": True,
    }
    (place / "hyperparams.json").write_text(json.dumps(cfg))


def _adapters(root: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(root / "model")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(root / "foreign")
    file = root / "foreign" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(root / "model")}))
    shutil.copytree(root / "foreign", root / "adapter")
    files = checksums(root / "adapter", ["adapter_config.json", "adapter_model.safetensors"])
    base_record = SourceRecord.of(base_source(str(root / "model")))
    write_record(root / "adapter", TrainingRecord(name="a", base_model=base_record, files=files))


def command(line: str) -> tuple[int, str]:
    """Run a command in this process; its exit status and what it wrote to stderr."""
    before = sys.argv
    for cache in (loading._BACKBONES, loading._WHOLE):
        cache.clear()
    sys.argv = ["neuronselect", *line.split()]
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as err, pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = before
    return int(stop.value.code or 0), err.getvalue()


def harmed(folder: Path, seed: int) -> str:
    """Damage one file of a folder."""
    draw = np.random.default_rng(seed)
    files = [
        path for path in files_in(folder) if path.suffix in (".json", ".safetensors", ".npz", ".parquet", ".arrow")
    ]
    path = files[int(draw.integers(len(files)))]
    way = draw.random()
    if way < 0.4 and path.suffix == ".json":
        return change_json(path, draw)
    if way < 0.65:
        name = sorted(RECORDS)[int(draw.integers(len(RECORDS)))]
        path.write_bytes(RECORDS[name])
        return f"{path.name} is a {name}"
    return damage(folder, draw, files)


@pytest.mark.filterwarnings("ignore")  # of libraries, on the files they are given
@pytest.mark.parametrize("kind", COMMANDS)
def test_damaged_files(kind: str, whole: Path, tmp_path: Path) -> None:
    @settings(max_examples=6, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 1 << 30))
    def each(seed: int) -> None:
        place = tmp_path / "case"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole / kind, place / kind)
        how = harmed(place / kind, seed + sum(kind.encode()))
        harm = {path: path.read_bytes() for path in files_in(place)}
        words = {name: whole / name for name in ("model", "sae")} | {
            "whole": whole, "pool": whole / "pool.jsonl", "held": whole / "held.jsonl", "recipe": whole / "recipe.yaml",
            "it": place / kind, "out": tmp_path / "out",
        }  # fmt: skip
        for line in COMMANDS[kind]:
            status, err = command(line.format(**words))
            lines = [text for text in err.splitlines() if not text.startswith("warning: ")]
            assert status in (0, 2), (how, err)
            if status == 2:
                assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable(), (how, err)
                assert not (tmp_path / "out").exists(), (how, err)
                assert harm == {path: path.read_bytes() for path in files_in(place)}, (how, err)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)

    each()
