"""Damaged and hostile records: one line, exit status 2, nothing written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from damage import RECORDS
from tiny import rows, write_sae

from hf_neuronselect import NeuronSelectError, NeuronSelector
from hf_neuronselect.cli import main as cli
from hf_neuronselect.core.digests import SAE_FILES
from hf_neuronselect.core.seals import write_checksums
from hf_neuronselect.hub.push import push_folder
from hf_neuronselect.models.sae_formats import load_sae
from hf_neuronselect.pipelines.steps import Steps


def refused(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["neuronselect", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("what", RECORDS)
def test_a_selections_record(what: str, tmp_path: Path, capsys, monkeypatch) -> None:
    NeuronSelector("random").select(rows(20), k=3).save_pretrained(tmp_path / "s")
    (tmp_path / "s" / "selection.json").write_bytes(RECORDS[what])
    words = ["export", str(tmp_path / "s"), "--format", "trl", "--base-model", "a/b", "--out", str(tmp_path / "out")]
    assert "not a selection folder" in refused(capsys, monkeypatch, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", RECORDS)
def test_an_saes_record(what: str, tmp_path: Path, capsys, monkeypatch) -> None:
    write_sae(tmp_path / "layers.1", 8)
    (tmp_path / "layers.1" / "cfg.json").write_bytes(RECORDS[what])
    assert "cfg.json" in refused(capsys, monkeypatch, "sae", "inspect", str(tmp_path))


def test_an_sae_that_keeps_more_than_it_has(tmp_path: Path, capsys, monkeypatch) -> None:
    folder = write_sae(tmp_path / "layers.1", 8)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | {"k": 10**11}))
    assert "k is 100000000000 in its configuration; the SAE has 96 latents" in refused(
        capsys, monkeypatch, "sae", "inspect", str(tmp_path)
    )


def test_an_sae_that_was_changed(tmp_path: Path, capsys, monkeypatch) -> None:
    folder = write_sae(tmp_path / "layers.1", 8)
    write_checksums(folder, SAE_FILES)
    assert load_sae(tmp_path).num_latents == 96
    (folder / "cfg.json").write_text((folder / "cfg.json").read_text() + "\n")
    line = refused(capsys, monkeypatch, "sae", "inspect", str(tmp_path))
    assert line == (
        "error: SAE layers.1: cfg.json was changed after neuronselect-checksums.json was written; download or train it "
        "again\n"
    )
    with pytest.raises(NeuronSelectError, match="cfg.json was changed"):
        push_folder(tmp_path, "me/sae")
    (folder / "neuronselect-checksums.json").unlink()  # an SAE from elsewhere
    assert load_sae(tmp_path).num_latents == 96


@pytest.mark.parametrize("what", RECORDS)
def test_a_runs_record(what: str, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_bytes(RECORDS[what])
    with pytest.raises(NeuronSelectError, match="not a run's folder .*in run.json"):
        Steps(tmp_path / "r", lambda text: None)
    assert (tmp_path / "r" / "run.json").read_bytes() == RECORDS[what]
