"""Base models and their LoRA adapters: pin, load, attach and detach them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM

from ..core import bundled
from ..core.errors import NeuronSelectError, one_of
from ..core.provenance import SourceRecord
from ..core.seals import json_object
from ..core.sources import Source, hub_errors, resolve
from ..models.checkpoint import check_runs, config_of, read_tokenizer
from ..models.dtypes import DTYPES
from ..models.loading import load_adapter, named_device
from ..models.pin import check_trained, pin_model
from ..models.sizes import check_whole
from ..rows.encode import PLAIN_TEMPLATE

BUNDLED = "hf_neuronselect-bundled"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


# --------------------------------------------------------------------------------------------- bases
def base_source(
    model: str | None, revision: str | None = None, token: str | bool | None = None, *, to_train: bool = False
) -> Source:
    """The base model, pinned; None is the bundled one.

    Raises:
        NeuronSelectError: no causal LM, or one ``to_train`` that is an adapter itself.
    """
    source = pin_model(model or str(bundled.MODEL), revision=revision, token=token)
    config_of(source)
    if to_train and source.base is not None:
        raise NeuronSelectError(
            "is a PEFT adapter: name its base model, or merge it (merge_and_unload, save_pretrained) and name that",
            option="model", value=source.id,
        )  # fmt: skip
    return source if model else replace(source, id=BUNDLED)


def load_tokenizer(source: Source, token: str | bool | None = None) -> Any:
    """Load a tokenizer; one without a chat template gets the plain template.

    Raises:
        NeuronSelectError: it cannot be loaded or has no end-of-text token.
    """
    tokenizer = read_tokenizer(source)
    if tokenizer.eos_token is None:
        raise NeuronSelectError(
            "its tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json",
            option="model",
            value=source.id,
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def load_causal_lm(source: Source, token: str | bool | None = None, **options: Any) -> Any:
    """Load the base model, an adapter merged into its own; ``options`` go to ``from_pretrained``.

    Raises:
        NeuronSelectError: it cannot be loaded, or not with these options.
    """
    config = config_of(source)
    if options.get("quantization_config") is None:
        check_runs(source, config)
    base = source.base or source
    check_whole(base, config)
    with hub_errors("model", source.id):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                base.location, revision=base.revision, token=token, trust_remote_code=False, **options
            )
        except (ImportError, ValueError) as cause:  # bitsandbytes is missing; no such kind of attention
            reason = " ".join(str(cause).split())[:200]
            raise NeuronSelectError(f"cannot be loaded: {reason}", option="model", value=source.id) from cause
    return model if base == source else load_adapter(model, source, source.id, "model", token).merge_and_unload()


def device_of(name: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return named_device(name)


def load_for_evaluation(source: Source, dtype: str, device: str, token: str | bool | None = None) -> Any:
    """The base model in eval mode; ``auto`` is float32 on a CPU and the stored type elsewhere."""
    one_of(dtype, ("auto", *DTYPES), "dtype")
    place = device_of(device)
    model = load_causal_lm(source, token, dtype=DTYPES.get(dtype, torch.float32 if place.type == "cpu" else "auto"))
    return model.eval().requires_grad_(False).to(place)


# ------------------------------------------------------------------------------------------ adapters
def adapter_source(name: str, token: str | bool | None = None, *, option: str = "adapter") -> Source:
    """Pin an adapter. It must have safetensors weights, since PEFT would otherwise load a pickle.

    Raises:
        NeuronSelectError: it cannot be found, or its configuration or safetensors are missing.
    """
    source = resolve(name, revision=None, token=token, option=option, probe=(_CONFIG,))
    if source.revision is None:
        for file in (_CONFIG, _WEIGHTS):
            if not (Path(source.location) / file).is_file():
                raise NeuronSelectError(f"the folder has no {file}: not a saved adapter", option=option, value=name)
    elif _fetched(source, _WEIGHTS, token, option) is None:
        raise NeuronSelectError(
            f"the repository has no {_WEIGHTS}; save the adapter as safetensors", option=option, value=name
        )
    check_trained(source, name, option, token)
    return source


def _fetched(source: Source, file: str, token: str | bool | None, option: str) -> Path | None:
    """Path of a file of a folder or repository; None if it has no such file."""
    if source.revision is None:
        path = Path(source.location) / file
        return path if path.is_file() else None
    with hub_errors(option, source.id):
        try:
            return Path(hf_hub_download(source.location, file, revision=source.revision, token=token))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None


def check_base(adapter: Source, name: str, base: Source, token: str | bool | None = None) -> None:
    """Check that an adapter was trained on this base model.

    Raises:
        NeuronSelectError: its record names another base model.
    """
    if record := check_trained(adapter, name, "adapter", token):
        stated = record.base_model
    else:  # made elsewhere: at most the base's Hub id is known; a folder's name identifies nothing
        config = _fetched(adapter, _CONFIG, token, "adapter")
        assert config is not None
        try:
            found = json_object(config)
        except ValueError as cause:
            raise NeuronSelectError(f"its {cause}", option="adapter", value=name) from cause
        commit = str(found.get("revision"))  # a branch identifies nothing
        stated = SourceRecord(
            id=str(found.get("base_model_name_or_path")), commit=commit if len(commit) == 40 else None
        )
    if stated.commit:
        same = stated.commit == base.commit
    else:
        named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(stated.id))
        same = named is None or base.revision is None or stated.id == base.id
    if not same:
        raise NeuronSelectError(
            f"was trained on {stated.id} at {stated.commit}, not on {base.id} at {base.commit}: name that "
            "as the model",
            option="adapter", value=name,
        )  # fmt: skip


@contextmanager
def adapted(model: Any, adapter: Source | None, name: str, token: str | bool | None = None) -> Iterator[Any]:
    """Attach an adapter to the model for a ``with`` block; None gives the model itself.

    Raises:
        NeuronSelectError: the adapter does not fit the model.
    """
    if adapter is None:
        yield model
        return
    found = load_adapter(model, adapter, name, "adapter", token)
    try:
        yield found.eval()
    finally:
        found.unload()
