"""Hashes of files by their bytes: what a model, an SAE or any folder is, whatever it is called and wherever it lies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants

logger = logging.getLogger(__name__)

MEMO_FROM = 64 << 20  # bytes; a smaller file is hashed faster than its memo is worth
_SETTLED = 3.0  # seconds since a file's last change: within a clock's tick it could change again unseen
_HEX = re.compile("[0-9a-f]{32}")

# Files of a model's folder that move its numbers, besides its weights. Anything else there is nobody's business.
_MODEL_FILES = (
    "config.json", "adapter_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "tekken.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken", "bpe.codes", "dict.txt", "emoji.json",
)  # fmt: skip
_MODULES = "modules.json"
_ENCODER_FILES = ("config_sentence_transformers.json", "sentence_*_config.json")  # prompts; windows
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Of an adapter's configuration: what does not change what it computes. Its base is pinned by itself.
_ADAPTER_NOTES = frozenset({
    "auto_mapping", "base_model_name_or_path", "eva_config", "corda_config", "inference_mode", "init_lora_weights",
    "init_weights", "loftq_config", "lora_dropout", "megatron_config", "module_dropout", "parent_library", "peft_version",
    "revision", "runtime_config", "task_type",
})  # fmt: skip
SAE_FILES = ("cfg.json", "sae.safetensors", "sae_weights.safetensors", "params.npz", "params.safetensors", "hyperparams.json",
             "checkpoints/final.safetensors", "activation_scaler.json")  # fmt: skip


def cache_dir() -> Path:
    """``$HF_HOME/neuronselect``."""
    return Path(constants.HF_HOME) / "neuronselect"


# ------------------------------------------------------------------------------------------- one file
def checksum(path: Path) -> str:
    """32 hex digits of a file's bytes, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def file_hash(path: Path) -> str:
    """:func:`checksum`, remembered for a large file as long as the file system says that it is unchanged."""
    before = path.stat()
    if before.st_size < MEMO_FROM:
        return checksum(path)
    seen = [before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns]
    memo = cache_dir() / "file_hashes" / hashlib.blake2b(json.dumps(seen).encode(), digest_size=16).hexdigest()
    with contextlib.suppress(OSError, UnicodeError):
        if _HEX.fullmatch(found := memo.read_text()):
            return found
    started, found, after = time.time(), checksum(path), path.stat()
    now = [after.st_dev, after.st_ino, after.st_size, after.st_mtime_ns, after.st_ctime_ns]
    if now == seen and started - max(before.st_mtime, before.st_ctime) > _SETTLED:
        try:
            memo.parent.mkdir(parents=True, exist_ok=True)
            part = memo.with_name(f"{memo.name}.{os.getpid()}")
            part.write_text(found)
            part.replace(memo)
        except OSError as error:  # with a read-only home, hash again next time
            logger.debug("hash not remembered: %s", error)
    return found


# ---------------------------------------------------------------------------------------- several files
def files_hash(folder: Path, names: Iterable[str]) -> str:
    """32 hex digits of some files of a folder: of their names there and their bytes."""
    found = [(name, file_hash(folder / name)) for name in sorted(set(names))]
    return hashlib.blake2b(json.dumps(found).encode(), digest_size=16).hexdigest()


def contents_hash(files: Iterable[Path]) -> str:
    """32 hex digits of the bytes of files in their order, whatever they are called."""
    return hashlib.blake2b(json.dumps([file_hash(file) for file in files]).encode(), digest_size=16).hexdigest()


def tree_hash(path: Path) -> str:
    """32 hex digits of a file, or of every file in a folder, at any depth and behind links."""
    if path.is_file():
        return file_hash(path)
    return files_hash(path, (file.relative_to(path).as_posix() for file in files_below(path)))


def files_below(folder: Path) -> Iterator[Path]:
    """Every regular file in a folder, at any depth; links are followed, each folder is entered once."""
    entered = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(place)) in entered:
            folders.clear()
            continue
        entered.add(real)
        yield from (path for name in sorted(files) if (path := Path(place) / name).is_file())


# -------------------------------------------------------------------------------------- models and SAEs
def model_hash(folder: Path) -> str:
    """32 hex digits of the weights, configuration, tokenizer and chat template of a model's or adapter's folder."""
    there = [path for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in there]
    used = [name for name in names if any(fnmatch(name, pattern) for pattern in _MODEL_FILES)]
    found = files_hash(folder, [
        name for name in (*used, *_weights(folder)) if name != _ADAPTER_CONFIG and (folder / name).is_file()
    ])  # fmt: skip
    if not (folder / _ADAPTER_CONFIG).is_file():
        return found
    return hashlib.blake2b(f"{found}{_adapter_hash(folder / _ADAPTER_CONFIG)}".encode(), digest_size=16).hexdigest()


def encoder_hash(folder: Path) -> str:
    """32 hex digits of a text encoder's folder: its modules, in their order, with the files of each."""
    try:
        paths = [str(one["path"]) for one in json.loads((folder / _MODULES).read_bytes())]
    except (OSError, ValueError, KeyError, TypeError):  # a plain model, or whoever loads it says what is wrong
        paths = [""]
    names = [name for name in (_MODULES, "config_sentence_transformers.json") if (folder / name).is_file()]
    for path in dict.fromkeys(paths):
        there = [one.name for one in (folder / path).iterdir() if one.is_file()] if (folder / path).is_dir() else []
        patterns = (*_MODEL_FILES, *_ENCODER_FILES, "*.safetensors", "*.safetensors.index.json", "*.jinja")
        names += [f"{path}/{one}" if path else one for one in there if any(fnmatch(one, part) for part in patterns)]
    return files_hash(folder, names)


def _adapter_hash(path: Path) -> str:
    """Hash of what an adapter's configuration says of its layers: not of paths, versions or how it was trained."""
    stated = _json(path)
    if not stated:
        return file_hash(path)
    kept = {
        # peft writes sets in any order
        name: sorted(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else value
        for name, value in stated.items()
        if name not in _ADAPTER_NOTES
    }
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16).hexdigest()


def _weights(folder: Path) -> list[str]:
    """Names of the files that weights are loaded from."""
    if (folder / _ADAPTER_CONFIG).is_file():
        return [_ADAPTER]
    named = _json(folder / "config.json").get("transformers_weights")
    if isinstance(named, str):
        return [named]
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    shards = _json(folder / _INDEX).get("weight_map")
    return [_INDEX, *map(str, shards.values())] if isinstance(shards, dict) else [_INDEX]


def _json(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # whoever loads it says what is wrong with it
        return {}
    return found if isinstance(found, dict) else {}


def sae_hash(folder: Path) -> str:
    """32 hex digits of the files that an SAE is read from."""
    return files_hash(folder, (name for name in SAE_FILES if (folder / name).is_file()))
