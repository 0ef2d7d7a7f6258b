"""Select as a function: the same as the command, checked before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from tiny import rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, Selection
from hf_neuronselect.core import bundled
from hf_neuronselect.core.configs import ExtractConfig, FitConfig, SelectConfig
from hf_neuronselect.pipelines.extract import extract
from hf_neuronselect.pipelines.fit import fit
from hf_neuronselect.pipelines.select import select
from hf_neuronselect.rows.identity import pool_digest
from hf_neuronselect.rows.load import load_rows, rows_name


@pytest.fixture
def config(tmp_path: Path, tiny_folder: Path) -> SelectConfig:
    rows(40).to_json(tmp_path / "pool.jsonl")
    rows(5, seed=1).to_json(tmp_path / "t.jsonl")
    rows(5, seed=2).to_json(tmp_path / "u.jsonl")
    return SelectConfig(
        pool=str(tmp_path / "pool.jsonl"),
        target=(str(tmp_path / "t.jsonl"),),
        model=str(tiny_folder / "model"),
        sae=str(tiny_folder / "sae"),
        k=5,
        out=tmp_path / "out",
    )


def test_it_gives_and_writes_a_selection(config: SelectConfig) -> None:
    said: list[str] = []
    selection = select(config, say=said.append)
    assert said[0].startswith("5 of 40 rows selected by mona") and list(selection.provenance.targets) == ["t"]
    assert Selection.from_pretrained(config.out).dataset.to_dict() == selection.dataset.to_dict()


def test_a_capability_brings_its_method(config: SelectConfig, tmp_path: Path) -> None:
    same = {name: getattr(config, name) for name in ("target", "model", "sae")}
    fit(FitConfig(**same, method="nait", method_option={"direction": "mean"}, out=tmp_path / "cap"))
    alone = select(replace(config, method="nait", method_option={"direction": "mean"}))
    by_capability = replace(config, target=(f"capability:{tmp_path / 'cap'}",), out=tmp_path / "again")
    found = select(by_capability)
    assert found.indices.tolist() == alone.indices.tolist()
    assert found.provenance.method.options["direction"] == "mean"
    for change, message in (
        ({"method": "hidden"}, "method='hidden': the capability is of method nait"),
        ({"method_option": {"direction": "pca"}}, "method_option='direction': the capability was fitted with"),
    ):
        with pytest.raises(NeuronSelectError, match=message):
            select(replace(by_capability, **change))
    explicit = SelectConfig.from_mapping(by_capability.values() | {"method": "mona"})
    with pytest.raises(NeuronSelectError, match="method='mona': the capability is of method nait"):
        select(explicit)


def test_a_capability_brings_what_it_avoids(config: SelectConfig, tmp_path: Path) -> None:
    given = {"avoid": (f"u={tmp_path / 'u.jsonl'}",), "avoid_weight": 0.5}
    same = {name: getattr(config, name) for name in ("target", "model", "sae")}
    said: list[str] = []
    fit(FitConfig(**same, **given, out=tmp_path / "cap"), say=said.append)
    assert said == [f"mona capability of t (5 exemplars), avoiding u (weight 0.5) -> {tmp_path / 'cap'}"]
    alone = select(replace(config, **given))
    by_capability = replace(config, target=(f"capability:{tmp_path / 'cap'}",), out=tmp_path / "again")
    found = select(by_capability)
    assert found.indices.tolist() == alone.indices.tolist() != select(config).indices.tolist()
    assert found.provenance.avoided == alone.provenance.avoided and found.provenance.avoided is not None
    with pytest.raises(NeuronSelectError, match="avoid='u': the target is a capability, which brings what it avoids"):
        select(replace(by_capability, **given))
    with pytest.raises(NeuronSelectError, match="avoid='u': scores are measured by the whole pool"):
        select(replace(by_capability, streaming=True))


def test_a_control_leaves_out_what_a_capability_would(config: SelectConfig, tmp_path: Path) -> None:
    same = {name: getattr(config, name) for name in ("model", "sae")}
    rows(40).select([3]).to_json(tmp_path / "leak.jsonl")
    fit(FitConfig(**same, target=(f"t={tmp_path / 'leak.jsonl'}",), out=tmp_path / "cap"))
    made = select(replace(config, target=(f"capability:{tmp_path / 'cap'}",), method="random", k=40))
    assert sorted(made.indices.tolist()) == [i for i in range(40) if i != 3]


def test_a_store_is_extracted_by_the_same_function(config: SelectConfig, tmp_path: Path) -> None:
    same = {name: getattr(config, name) for name in ("pool", "model", "sae")}
    store = extract(ExtractConfig(**same, method="mona,nait", shard_rows=16, out=tmp_path / "store"))
    assert store is not None and len(store) == 40
    part = ExtractConfig(**same, shard_rows=16, shard="0/2", out=tmp_path / "part")
    assert extract(part) is None
    again = select(replace(config, features=tmp_path / "store", out=tmp_path / "b"))
    assert again.indices.tolist() == select(config).indices.tolist()
    with pytest.raises(NeuronSelectError, match="is of one method; with several, write name"):
        extract(ExtractConfig(**same, method="mona,nait", method_option={"metric": "cosine"}, out=tmp_path / "x"))


def test_options_of_a_method_decide_what_is_extracted(config: SelectConfig, tmp_path: Path) -> None:
    same = {name: getattr(config, name) for name in ("pool", "model", "sae")}
    for method in ({"method": "nait", "method_option": {"candidate": "mean"}}, {"method": "nait(candidate=mean)"}):
        store = extract(ExtractConfig(**same, **method, out=tmp_path / "store"))  # type: ignore[arg-type]
        assert store is not None and {"nait", "content_mean"} <= set(store.identities)
    made = replace(config, method="nait", method_option={"candidate": "mean"})
    assert select(replace(made, features=tmp_path / "store")).indices.tolist() == select(made).indices.tolist()


def test_a_seed_goes_to_methods_that_have_one(config: SelectConfig) -> None:
    picked = {seed: select(replace(config, method="random", seed=seed)).indices.tolist() for seed in (0, 1)}
    assert picked[0] != picked[1]
    by_option = select(replace(config, method="random", method_option={"seed": "1"}, seed=0))
    assert by_option.indices.tolist() == picked[1]
    assert select(replace(config, seed=1)).indices.tolist() == select(config).indices.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "mono"}, "unknown method; did you mean mona"),
        ({"method_option": {"metrics": "cosine"}}, "unknown option of method 'mona'"),
        ({"method_option": {"metric": "dot"}}, "must be one of jaccard"),
        ({"target": ()}, "needs exemplars"),
        ({"target": ("t={u}", "u={u}"), "k": None, "threshold": 0.5}, "unclear with 2 targets"),
        ({"target": ("t={u}", "u={u}"), "aggregate": "weighted"}, "needs one weight for each of t, u"),
        ({"target": ("t={u}", "u={u}"), "aggregate": "weighted", "weight": {"t": 1, "v": 1}}, "needs one weight for each"),
        ({"target": ("t={u}", "u={u}"), "aggregate": "weighted", "weight": {"t": 0, "u": 0}}, "one of them is above 0"),
        ({"target": ("t={u}", "u={u}"), "aggregate": "mean", "streaming": True}, "use quota or round_robin"),
        ({"k": None, "max_tokens": 9, "streaming": True}, "a stream needs k or threshold"),
        ({"features": Path("store"), "streaming": True}, "a store holds a whole pool"),
        ({"features": Path("nowhere")}, "not a feature store"),
        ({"columns": {"messages": "turns"}}, "columns='turns': no such column"),
        ({"target": ("!",)}, "name it: NAME="),
        ({"target": ("t={u}", "t={u}")}, "is the name of two"),
        ({"target": ("capability:x", "t={u}")}, "a capability is used alone"),
        ({"avoid": ("t=x",)}, "avoid='t': is the name of a target, too; avoid another one"),
        ({"avoid": ("u=x",), "method": "random"}, "avoid='u': random scores rows without a target"),
        ({"avoid": ("u=capability:x",)}, "avoid='capability:x': is fitted already, by itself; give the rows to avoid"),
        ({"avoid": ("{u}",), "streaming": True}, "avoid='u': scores are measured by the whole pool's mean and spread"),
        ({"avoid": ("u=x", "u=y")}, "avoid='u': is the name of two"),
        ({"avoid": ("u=nowhere.jsonl",)}, "avoid='nowhere.jsonl'"),
    ],
)  # fmt: skip
def test_what_can_be_known_is_refused_before_a_model_is_loaded(
    change: dict[str, Any], message: str, config: SelectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NeuronFeatureExtractor, "from_options", lambda *a, **b: pytest.fail("a model was loaded"))
    for name in {"target", "avoid"} & change.keys():
        change = change | {name: tuple(one.format(u=tmp_path / "u.jsonl") for one in change[name])}
    with pytest.raises(NeuronSelectError, match=message):
        select(replace(config, **change))
    assert not config.out.exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(config: SelectConfig, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(NeuronSelectError, match="cannot be written"):
        select(replace(config, out=tmp_path / "locked" / "sel"))


def test_a_file_is_no_folder(config: SelectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NeuronFeatureExtractor, "from_options", lambda *a, **b: pytest.fail("a model was loaded"))
    with pytest.raises(NeuronSelectError, match=r"out='sel': cannot be written: t\.jsonl is read-only or no folder"):
        select(replace(config, out=tmp_path / "t.jsonl" / "sel"))


# ------------------------------------------------------------------------------------------- bundled rows
def test_bundled_rows_have_names() -> None:
    pool = load_rows("bundled:pool")
    assert pool.about == {"id": "bundled:pool", "commit": f"content:{pool_digest(pool.data)}"}
    assert pool.data.to_dict() == load_dataset("parquet", data_files=str(bundled.POOL), split="train").to_dict()
    assert {rows_name(f"bundled:{name}") for name in bundled.TARGETS} == set(bundled.TARGETS)
    assert next(iter(load_rows("bundled:mbpp", streaming=True).data))["messages"]
    with pytest.raises(
        NeuronSelectError, match="target='bundled:gsm9k': unknown bundled rows; did you mean bundled:gsm8k"
    ):
        load_rows("bundled:gsm9k", option="target")


def test_a_folder_named_like_bundled_rows_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows(3).to_json(tmp_path / "bundled:pool")
    with pytest.raises(NeuronSelectError, match=r"needs \.jsonl"):
        load_rows("bundled:pool")
