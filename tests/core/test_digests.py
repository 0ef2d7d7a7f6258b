"""What a file or folder is: its bytes, not its name, place or time; only files that move a model's numbers count."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hf_neuronselect.core import digests
from hf_neuronselect.core.digests import file_hash, model_hash, sae_hash, tree_hash


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"bytes of {name}")
    return folder


# ------------------------------------------------------------------------------------------- models
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
     "added_tokens.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "vocab.json", "merges.txt",
     "spiece.model"],
)  # fmt: skip
def test_files_that_move_a_models_numbers(tmp_path: Path, name: str) -> None:
    folder = put(tmp_path, "config.json", "model.safetensors")
    before = model_hash(folder)
    put(folder, name)
    (folder / name).write_text("other bytes")
    assert model_hash(folder) != before


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "README.md", "eval_results.json", "generation_config.json", "trainer_state.json", "optimizer.pt",
     "backup.safetensors", "checkpoint-5/model.safetensors", "pool.jsonl", ".gitattributes"],
)  # fmt: skip
def test_files_that_are_nobodys_business(tmp_path: Path, name: str) -> None:
    folder = put(tmp_path, "config.json", "model.safetensors", "tokenizer.json")
    before = model_hash(folder)
    assert model_hash(put(folder, name)) == before


def test_weights_in_shards(tmp_path: Path) -> None:
    folder = put(tmp_path, "config.json", "a.safetensors", "b.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    before = model_hash(folder)
    (folder / "b.safetensors").write_text("other bytes")
    assert model_hash(folder) != before
    os.rename(folder / "a.safetensors", folder / "c")
    assert model_hash(folder) != before


def test_weights_of_another_name(tmp_path: Path) -> None:
    folder = put(tmp_path, "odd.safetensors")
    (folder / "config.json").write_text('{"transformers_weights": "odd.safetensors"}')
    before = model_hash(folder)
    (folder / "odd.safetensors").write_text("other bytes")
    assert model_hash(folder) != before


def test_a_folder_of_another_name_is_the_same(tmp_path: Path) -> None:
    names = ("config.json", "model.safetensors")
    assert model_hash(put(tmp_path / "a", *names)) == model_hash(put(tmp_path / "b", *names))


def test_an_sae_is_the_files_it_is_read_from(tmp_path: Path) -> None:
    folder = put(tmp_path, "cfg.json", "sae.safetensors")
    before = sae_hash(folder)
    assert sae_hash(put(folder, "README.md", "training.json")) == before
    (folder / "cfg.json").write_text("{}")
    assert sae_hash(folder) != before


# ------------------------------------------------------------------------------------------ any folder
@pytest.mark.parametrize("suffix", [".csv", ".jsonl.gz", ".xz", ".zst", ".arrow", ".bz2", ".zip", ""])
def test_every_file_of_a_folder_counts(tmp_path: Path, suffix: str) -> None:
    folder = put(tmp_path / "folder", f"deep/er/rows{suffix}")
    before = tree_hash(folder)
    (folder / f"deep/er/rows{suffix}").write_text("other bytes")
    assert tree_hash(folder) != before


def test_links_count_and_end(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "a.csv")
    folder = put(tmp_path / "folder", "b.csv")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "c.csv").symlink_to(tmp_path / "elsewhere" / "a.csv")
    (folder / "round").symlink_to(folder)
    before = tree_hash(folder)
    (tmp_path / "elsewhere" / "a.csv").write_text("other bytes")
    assert tree_hash(folder) != before


# ------------------------------------------------------------------------------------------- the memo
@pytest.fixture
def memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files whose bytes were read; all are remembered, however small and new."""
    read: list[Path] = []
    real = digests.checksum
    monkeypatch.setattr(digests, "checksum", lambda path: (read.append(path), real(path))[1])
    monkeypatch.setattr(digests, "MEMO_FROM", 0)
    monkeypatch.setattr(digests, "_SETTLED", -60.0)
    monkeypatch.setattr(digests, "cache_dir", lambda: tmp_path / "cache")
    return read


def test_an_unchanged_file_is_read_once(tmp_path: Path, memo: list[Path]) -> None:
    file = put(tmp_path, "w") / "w"
    assert file_hash(file) == file_hash(file) and memo == [file]
    os.rename(file, tmp_path / "v")  # changes its ctime, not its bytes
    file_hash(tmp_path / "v")
    (saved,) = list((tmp_path / "cache").rglob("*"))[-1:]
    saved.write_text("torn")
    assert len(file_hash(tmp_path / "v")) == 32


def test_other_bytes_of_the_same_size_and_time(tmp_path: Path, memo: list[Path]) -> None:
    """Written in place, and put in its place."""
    file = tmp_path / "w"
    file.write_bytes(b"one")
    seen, when = [file_hash(file)], file.stat().st_mtime_ns
    file.write_bytes(b"two")
    os.utime(file, ns=(when, when))
    seen.append(file_hash(file))
    (tmp_path / "new").write_bytes(b"six")
    os.utime(tmp_path / "new", ns=(when, when))
    (tmp_path / "new").replace(file)
    seen.append(file_hash(file))
    assert len(set(seen)) == 3


def test_a_file_that_just_changed_is_not_remembered(
    tmp_path: Path, memo: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED", 3.0)
    file = put(tmp_path, "w") / "w"
    assert file_hash(file) == file_hash(file) and memo == [file, file]


def test_an_adapters_identity_is_what_it_computes(tmp_path: Path) -> None:
    """Not where its base lay, which version wrote it, or in which order a set came."""
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "/a/b",
              "peft_version": "0.19", "lora_dropout": 0.05, "task_type": "CAUSAL_LM"}  # fmt: skip

    def hash_of(**changes: object) -> str:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        return model_hash(tmp_path)

    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    before = hash_of()
    notes = {"base_model_name_or_path": "org/b", "revision": "main", "peft_version": "0.20", "inference_mode": True,
             "task_type": None, "lora_dropout": 0.0, "target_modules": ["v_proj", "q_proj"]}  # fmt: skip
    assert hash_of(**notes) == before
    for change in ({"r": 8}, {"target_modules": ["q_proj"]}, {"use_rslora": True}, {"a_new_field": 1}):
        assert hash_of(**change) != before
    hash_of()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"others")
    assert model_hash(tmp_path) != before
