"""A model from a GGUF file: brought back to bfloat16 by transformers, once, into a folder of the user's cache."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..core.digests import cache_dir, file_hash
from ..core.errors import NeuronSelectError

SUFFIX = ".gguf"


def model_folder(name: str, option: str) -> str:
    """The model's folder: of a GGUF file, the one it was unpacked into; any other name stays as it is.

    Raises:
        NeuronSelectError: the file cannot be unpacked, or a folder has only such files.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        if files := sorted(file.name for file in path.glob(f"*{SUFFIX}")):
            raise NeuronSelectError(
                f"has no config.json; name the GGUF file: {name}/{files[0]}", option=option, value=name
            )
    if path.suffix.lower() != SUFFIX or not path.is_file():
        return name
    out = cache_dir() / "gguf" / file_hash(path) / path.stem
    if not (out / "config.json").is_file():
        _unpack(path, out, option)
    return str(out)


def _unpack(file: Path, out: Path, option: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise NeuronSelectError(
            "is a GGUF file, which needs a package: pip install gguf", option=option, value=file.name
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        try:
            read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            if hasattr(read.config, "quantization_config"):
                del read.config.quantization_config  # the weights are whole again
            plain: Any = type(read)(read.config)
            plain.load_state_dict(read.state_dict())
            plain.to(torch.bfloat16).save_pretrained(Path(work, "model"))
            tokenizer.save_pretrained(Path(work, "model"))
        except Exception as cause:  # transformers raises errors of many kinds on such files
            reason = " ".join(str(cause).split())[:200]
            raise NeuronSelectError(
                f"is a GGUF file that transformers cannot unpack ({reason}); name the model it was made from",
                option=option, value=file.name,
            ) from cause  # fmt: skip
        with contextlib.suppress(OSError):  # another process was faster
            Path(work, "model").rename(out)
    if not (out / "config.json").is_file():
        raise NeuronSelectError("cannot be written into the cache", option=option, value=str(out))
