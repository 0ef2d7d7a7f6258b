"""Sizes that a model's configuration states, compared with its files before memory is taken for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..core.errors import NeuronSelectError
from ..core.seals import json_object
from ..core.sources import Source, hub_errors
from .prefix import check_parameters, described, fetched, tensor_files

# By the ends of their names: numbers of which an object each is made, and widths; and more than any model has of them.
_MOST = (
    (re.compile(r"(^|_)(layers?|blocks|experts|depth)$"), 1 << 12),
    (re.compile(r"(^|_)labels$"), 1 << 16),
    (re.compile(r"_(size|dim|heads|embd|model|ff|inner)$"), 1 << 24),
)
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FULL = ("LOKR",)  # a rank beyond the layer's width means full matrices there


def check_counts(source: Source, stated: Mapping[str, Any]) -> None:
    """Refuse a configuration with more layers, experts or labels than any model has, before it is built.

    Raises:
        NeuronSelectError: there are more.
    """
    for name, value in _numbers(stated):
        for pattern, most in _MOST:
            if pattern.search(name) and value > most:
                raise NeuronSelectError(
                    f"its config.json states {name} {value}; no model has more than {most}: download it again",
                    option="model", value=source.id,
                )  # fmt: skip


def _numbers(stated: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    waiting = [stated]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif isinstance(value, int | float):
                yield str(name), int(value) if value == value and abs(value) != float("inf") else 1 << 63


def check_whole(source: Source, config: Any) -> None:
    """:func:`check_parameters` of a whole checkpoint, before it is loaded."""
    held = _bytes_of(source)
    if held is None:
        return
    model = described(source, config)
    packed = any(getattr(part, "quantization_config", None) for part in (config, config.get_text_config()))
    check_parameters(source, model.parameters(), held, packed=packed)


def _bytes_of(source: Source) -> int | None:
    """Bytes of a checkpoint's safetensors; None if it names its files in a way of its own."""
    if source.revision is None:
        return sum(path.stat().st_size for path in Path(source.location).glob("*.safetensors"))
    try:
        names = set(tensor_files(source).values())
    except NeuronSelectError:  # whoever loads it says what is wrong with it
        return None
    with hub_errors("model", source.id):
        folder = snapshot_download(source.location, revision=source.revision, allow_patterns=sorted(names))
    return sum((Path(folder) / name).stat().st_size for name in names if (Path(folder) / name).is_file())


def check_rank(adapter: Source, name: str, option: str) -> None:
    """Refuse an adapter whose configuration states a rank that its weights do not have.

    Raises:
        NeuronSelectError: it does, or its files cannot be read.
    """
    with hub_errors(option, adapter.id):
        files = [fetched(adapter, _ADAPTER_CONFIG), fetched(adapter, _ADAPTER_WEIGHTS)]
    config, weights = files
    if config is None or weights is None:
        return
    try:
        stated = json_object(config)
        with safe_open(weights, framework="pt") as tensors:
            widest = max((max(tensors.get_slice(key).get_shape(), default=0) for key in tensors.keys()), default=0)  # noqa: SIM118
    except (ValueError, OSError, SafetensorError) as cause:
        reason = " ".join(str(cause).split())[:200]
        raise NeuronSelectError(f"its files cannot be read ({reason}); download it again", option=option,
                                value=name) from cause  # fmt: skip
    ranks = {"r": stated.get("r"), "init_r": stated.get("init_r")}
    ranks |= pattern if isinstance(pattern := stated.get("rank_pattern"), dict) else {}
    for key, rank in ranks.items():
        if isinstance(rank, int | float) and rank > widest and stated.get("peft_type") not in _FULL:
            raise NeuronSelectError(
                f"its {_ADAPTER_CONFIG} states {key} {rank}, its weights are at most {widest} wide: download it again",
                option=option, value=name,
            )  # fmt: skip
