"""Training an SAE on a pool: rows, resuming, full disks, broken activations, and what is foreseen."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from tiny import rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_neuronselect.core.errors import NeuronSelectError, NeuronSelectWarning
from hf_neuronselect.core.sae_configs import SaeTrainConfig
from hf_neuronselect.core.sae_record import SaeRecord
from hf_neuronselect.models.sae_formats import load_sae
from hf_neuronselect.pipelines.sae import train_sae
from hf_neuronselect.rows.encode import SampleEncoder
from hf_neuronselect.training import sae_train
from hf_neuronselect.training.sae_rows import dead_share, gather_rows
from hf_neuronselect.training.topk import TopK

FEW = {"latents": 64, "k": 4, "tokens": 3000, "batch": 100, "context": 32, "buffer_gb": 0.0001}


@pytest.fixture(scope="module")
def pool_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    rows(60).to_json(path)
    return path


@pytest.fixture
def config(tiny_folder: Path, pool_file: Path, tmp_path: Path) -> SaeTrainConfig:
    return SaeTrainConfig(pool=str(pool_file), model=str(tiny_folder / "model"), out=tmp_path / "sae", **FEW)


def changed(config: SaeTrainConfig, **changes: Any) -> SaeTrainConfig:
    return SaeTrainConfig(**config.changed() | changes)


@pytest.fixture(autouse=True)
def few_tokens() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*different tokens are few", NeuronSelectWarning)
        yield


def trained(config: SaeTrainConfig) -> dict[str, torch.Tensor]:
    (name,) = train_sae(config)
    return load_file(config.out / name / "sae.safetensors")


# ------------------------------------------------------------------------------------------- what comes of it
def test_two_blocks_then_a_third(config: SaeTrainConfig) -> None:
    said: list[str] = []
    records = train_sae(changed(config, layer=(-2, 1)), say=said.append, note=said.append)
    assert (
        list(records) == ["layers.1", "layers.2"]
        and said[-2].startswith("layers.1: ")
        and said[-1].endswith("layers.2")
    )
    assert " rows: " in said[0] and records["layers.2"].verdict in said[-1]
    for name, record in records.items():
        found = load_sae(config.out / name)
        assert isinstance(record, SaeRecord) and found.record == record and found.site.module == name
        assert (found.num_latents, found.k, found.d_in) == (64, 4, 32) and found.W_enc.dtype == torch.float16
        assert record.model == "model" and 3000 <= record.training["tokens"] < 3100
        assert record.loss_with_sae != record.loss and 0 < record.fvu
    assert not (config.out / "unfinished").exists()
    train_sae(changed(config, layer=(0,)))
    assert {path.name for path in config.out.iterdir()} == {"layers.0", "layers.1", "layers.2", "README.md"}
    card = (config.out / "README.md").read_text()
    assert all(f"## layers.{layer}" in card for layer in range(3)) and records["layers.1"].verdict in card


class Killed(BaseException):
    """Nothing in the package handles it."""


def test_a_training_killed_at_any_step_gives_the_same_weights(
    config: SaeTrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_neuronselect.training.sae_loop.SAVE_EVERY", -1.0)
    whole = trained(changed(config, out=tmp_path / "whole"))
    kills, step = random.Random(5), TopK.step
    for _ in range(2):
        left = kills.randrange(4, 14)

        def dying(self: TopK, part: torch.Tensor) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Killed
            step(self, part)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(TopK, "step", dying)
            train_sae(config)
        assert [path.name for path in config.out.rglob("*") if path.is_file()] == ["checkpoint.safetensors"]
    with pytest.raises(NeuronSelectError, match="another model, pool or options"):
        train_sae(changed(config, seed=1))
    resumed = trained(config)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


# ------------------------------------------------------------------------------------------------ the rows
def test_rows_are_trained_on_or_measured_on_never_both(tiny_folder: Path) -> None:
    encoder = SampleEncoder(AutoTokenizer.from_pretrained(tiny_folder / "model"), max_length=1 << 30)
    data = rows(40)
    twice = Dataset.from_list([*data, *data, {"messages": [], "source": "", "id": 0}])
    found = gather_rows(twice, encoder, tokens=10**6, context=16)
    assert found.rows == 40 and found.left_out["the same as another row"] == 40 and found.left_out.total() == 41

    def pieces(part: Any) -> set[bytes]:
        return {part.ids[a:b].tobytes() for a, b in zip(part.starts[:-1], part.starts[1:], strict=True) if b - a == 16}

    beginnings = pieces(found.train), pieces(found.held_out)
    assert len(beginnings[1]) >= 4 and not beginnings[0] & beginnings[1]
    assert found.digest == gather_rows(twice, encoder, tokens=10**6, context=16).digest
    assert found.digest != gather_rows(twice, encoder, tokens=10**6, context=16, seed=1).digest


def test_a_stream_is_read_as_far_as_the_tokens_need(tiny_folder: Path) -> None:
    read = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal read
        while True:
            for row in rows(500, seed=read):
                read += 1
                yield row

    encoder = SampleEncoder(AutoTokenizer.from_pretrained(tiny_folder / "model"), max_length=1 << 30)
    found = gather_rows(IterableDataset.from_generator(endless), encoder, tokens=2000, context=64)
    assert 2000 <= len(found.train.ids) < 2300 and read <= 10_000 and found.held_out.usable


@pytest.mark.parametrize("number", [0, 1])
def test_a_pool_without_rows_to_measure_on_is_refused(number: int, config: SaeTrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    Dataset.from_list([*rows(number), {"messages": [], "source": "", "id": 9}]).to_json(path)
    with pytest.raises(NeuronSelectError, match=r"one\.jsonl.*too few rows.*left out: empty \(1\)"):
        train_sae(changed(config, pool=str(path)))
    assert not config.out.exists()


def test_too_few_tokens_are_foreseen_before_the_pass(config: SaeTrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*given: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sae_train, "causal_lm_of", load)
    few = (
        ({"tokens": 10**6}, "21 % of them dead and ", "more rows"),
        ({"tokens": 1000, "k": 1}, "92 % of them dead and ", "more --tokens"),
    )
    for changes, dead, mend in few:
        with (
            pytest.warns(NeuronSelectWarning, match=f"few for 4,096 latents.*819,200.*{dead}an SAE .*{mend}"),
            pytest.raises(ZeroDivisionError),
        ):
            train_sae(changed(config, latents=4096, **changes))
    assert dead_share(10, 100_000, 4) > 0.9 and dead_share(10**6, 1000, 32) < 1e-6


# ------------------------------------------------------------------------------------------------ refusals
REFUSED = {
    "k": ({"k": 65}, "--k 65: is more than the 64 latents"),
    "memory": ({"latents": 10**12}, "--latents 1000000000000: training needs .* GB"),
    "both": ({"expansion_factor": 4}, "--latents 64: give latents or expansion_factor"),
    "buffer": ({"buffer_gb": 1e-6}, "--buffer-gb 1e-06: holds 7 tokens; at least .* are needed"),
    "layer": ({"layer": (9,)}, "--layer 9: out of range"),
    "model": ({"model": "/nowhere"}, "--model /nowhere: no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_nothing_is_left(case: str, config: SaeTrainConfig) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(NeuronSelectError) as error:
        train_sae(changed(config, **changes))
    line = error.value.as_command_line()
    assert re.match(message, line) and "\n" not in line
    assert not config.out.exists()


def full(*given: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_before_the_pass(config: SaeTrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(NeuronSelectError, match="shuffled activations cannot be written .No space left"):
            train_sae(config)
    assert not config.out.exists()
    usage = shutil.disk_usage(config.out.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(NeuronSelectError, match="checkpoints need"):
        train_sae(config)
    assert not config.out.exists()


def test_a_disk_that_is_full_later_keeps_the_last_checkpoint(
    config: SaeTrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_neuronselect.training.sae_loop.SAVE_EVERY", -1.0)
    from hf_neuronselect.training import sae_loop

    save, saved = sae_loop.save_file, 0

    def until_full(*given: Any, **more: Any) -> None:
        nonlocal saved
        saved += 1
        (save if saved < 3 else full)(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(sae_loop, "save_file", until_full)
        with pytest.raises(NeuronSelectError, match="checkpoint cannot be written.*run the same command again"):
            train_sae(config)
    assert [path.name for path in (config.out / "unfinished").iterdir()] == ["checkpoint.safetensors"]
    whole = trained(changed(config, out=tmp_path / "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in trained(config).items())


# ------------------------------------------------------------------------------------- broken activations
def broken_model(folder: Path, tiny_folder: Path, tokens: int | None) -> Path:
    """The tiny model, in which some tokens, or all, have a NaN."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
    with torch.no_grad():
        lm.get_input_embeddings().weight[tokens] = torch.nan
    lm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder / "model").save_pretrained(folder)
    return folder


def test_nan_is_left_out_and_counted(config: SaeTrainConfig, tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    sky = tokenizer("sky", add_special_tokens=False)["input_ids"][-1]
    model = broken_model(tmp_path / "some", tiny_folder, sky)
    with pytest.warns(NeuronSelectWarning, match="NaN or infinite activations were left out"):
        (record,) = train_sae(changed(config, model=str(model))).values()
    assert record.training["not_finite"] > 0 and np.isfinite(record.fvu)
    model = broken_model(tmp_path / "all", tiny_folder, slice(None))  # type: ignore[arg-type]
    with pytest.raises(NeuronSelectError, match="no activation is finite"):
        train_sae(changed(config, model=str(model), out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
