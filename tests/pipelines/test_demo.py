"""The bundled default does its job: the right rows win, in float32, on a slice of the demo's own pool."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import concatenate_datasets, load_dataset

from hf_neuronselect import NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.core import bundled as paths
from hf_neuronselect.core.configs import DemoConfig
from hf_neuronselect.pipelines import bundled, demo
from hf_neuronselect.pipelines.methods import methods_of


def precision(selection: Selection, related: list[str]) -> float:
    return float(np.isin(np.asarray(selection.dataset["source"]), related).mean())


@pytest.mark.slow
def test_mona_beats_chance_and_length_on_the_bundled_pool() -> None:
    pool, related = bundled.pool(), paths.related_sources()
    sources = np.asarray(pool["source"])
    rows = np.concatenate([np.flatnonzero(sources == name)[:12] for name in np.unique(sources)])
    small = pool.select(rows)
    extractor = bundled.extractor(features=["mona"])
    small = small.map(extractor, batched=True)
    for name in ("gsm8k", "mbpp"):
        target = bundled.targets()[name].select(range(20))
        base = float(np.isin(np.asarray(small["source"]), related[name]).mean())
        selection = NeuronSelector("mona").fit({name: target}, extractor=extractor).select(small, ratio=base)
        longest = NeuronSelector("longest").select(small, ratio=base, extractor=extractor)
        assert precision(selection, related[name]) > max(3 * base, precision(longest, related[name]))


@pytest.mark.slow
def test_the_demo_says_and_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = np.asarray(bundled.pool()["source"])
    rows = np.concatenate([np.flatnonzero(sources == name)[:8] for name in np.unique(sources)])
    bundled.pool().select(rows).to_parquet(tmp_path / "pool.parquet")
    targets = {name: tmp_path / f"{name}.parquet" for name in ("gsm8k", "mbpp")}
    for name, file in targets.items():
        bundled.targets()[name].select(range(8)).to_parquet(file)
    monkeypatch.setattr(paths, "POOL", tmp_path / "pool.parquet")
    monkeypatch.setattr(paths, "TARGETS", targets)
    out = tmp_path / "out"
    said: list[str] = []
    report = demo.demo(DemoConfig(out=out), say=said.append)
    text = "\n".join(said)
    for chosen in methods_of(demo.METHODS, 0):
        assert sum(line.startswith(chosen.label + " ") for line in text.splitlines()) == 1, chosen.label
    assert "tokens/s" in text and "of the overlap" in report.read_text()
    reasons = [line for line in text.splitlines() if line.startswith(("  gsm8k: ", "  mbpp: "))]
    assert len(reasons) == demo.PICKS and all("[" in line and len(line) < 240 for line in reasons)
    for name in ("gsm8k", "mbpp"):
        assert len(load_dataset(str(out / name), split="train")) == 8
        made = json.loads((out / name / "selection.json").read_text())
        assert made["pool"]["id"] == "bundled:pool" and made["extractor"]["options"]["layer"] == 3
        assert f"--pool bundled:pool \\\n    --target {name}=bundled:{name} " in (out / name / "README.md").read_text()
    assert (out / "profiles.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64" in report.read_text()
    with pytest.raises(NeuronSelectError, match="is not a demo folder"):
        demo.demo(DemoConfig(out=tmp_path))


def test_the_demo_with_a_named_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a copy of the bundled model as the real one. Its SAE is found."""
    shutil.copytree(paths.MODEL, tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    targets = {name: tmp_path / f"{name}.parquet" for name in demo.PROFILED}
    for name, file in targets.items():
        bundled.targets()[name].select(range(4)).to_parquet(file)
    monkeypatch.setattr(paths, "TARGETS", targets)
    for name, value in {"SOME_ROWS": 40, "SOME_TOKENS": 256, "DRAWS": 2}.items():
        monkeypatch.setattr(demo, name, value)
    said: list[str] = []
    demo.demo(DemoConfig(model="smollm2", out=tmp_path / "out"), say=said.append, note=said.append)
    text = "\n".join(said)
    assert "40 random rows of the pool, at most 256 tokens of each" in text and "found in this package" in text
    made = json.loads((tmp_path / "out" / "gsm8k" / "selection.json").read_text())
    assert made["pool"]["rows"] == 40 and made["extractor"]["model"]["id"] == "smollm2"
    assert len(load_dataset("parquet", data_files=str(tmp_path / "out" / "pool.parquet"), split="train")) == 40


def test_smollm2_is_a_folder_a_package_or_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SMOLLM2_PACKAGE", "a_package_with_a_model")
    assert demo.find_model("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert demo.find_model("me/other") == "me/other"
    (tmp_path / "site" / "a_package_with_a_model").mkdir(parents=True)
    (tmp_path / "site" / "a_package_with_a_model" / "__init__.py").touch()
    file = tmp_path / "site" / "a_package_with_a_model" / "m.gguf"
    file.touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert demo.find_model("smollm2") == str(file)
    (tmp_path / "smollm2").mkdir()
    assert demo.find_model("smollm2") == "smollm2"


def test_the_bundle_is_permissive_complete_and_small() -> None:
    size = sum(p.stat().st_size for p in paths.ASSETS.rglob("*") if p.is_file())
    assert size < 60_000_000
    allowed = {"xquad", "bbh"}
    assert not allowed & set(bundled.targets()), "share-alike or canary data"
    assert set(paths.related_sources()) == set(bundled.targets())
    everything = concatenate_datasets([bundled.pool(), *bundled.targets().values()])
    assert 2000 <= len(bundled.pool()) <= 5000 and everything.num_rows > 4000
    # Share-alike and non-commercial sources of the pool the demo was drawn from.
    restricted = {"dolly_3k", "alpaca_random9k", "codealpaca_2k", "sgd_dialogue", "jaquad", "cmrc2018", "nusax_mt"}
    assert not restricted & set(bundled.pool()["source"])


def test_the_template_marks_what_the_assistant_says() -> None:
    extractor = bundled.extractor(features=[], pool_tokens="assistant")
    tokenizer = extractor.forward.tokenizer
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    out = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids = np.asarray(out["input_ids"]).ravel()
    mask = np.asarray(out["assistant_masks"]).ravel().astype(bool)
    assert tokenizer.decode(ids[mask]) == "Hello there<|end|>"
    assert (ids == tokenizer.bos_token_id).sum() == 1
