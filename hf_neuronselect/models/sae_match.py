"""Whether an SAE belongs to a model: by its record, or by the model that its file names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..core.errors import NeuronSelectError
from ..core.sources import Source
from .prefix import tensor_files
from .sae import SparseAutoencoder

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_match(sae: SparseAutoencoder, model: Source, blocks: int, name: str) -> str:
    """Refuse an SAE of another model or block.

    Args:
        blocks: of the model. name: of the SAE, in errors.

    Returns:
        A doubt in one sentence where files do not say enough; else "".

    Raises:
        NeuronSelectError: its record names another model or block than it is used with.
    """
    record, block = sae.record, sae.site.block
    if block is not None and block >= blocks:
        raise NeuronSelectError(
            f"it reads block {block}, {model.id} has {blocks} blocks: it belongs to another model",
            option="sae",
            value=name,
        )
    if record is None or record.model is None:
        told = sae.model_name
        near = not told or any(_last(told) in one.id.lower() for one in _with_base(model))
        return "" if near else _may_not_fit(str(told), model)
    if record.layer is not None and block not in (None, record.layer):
        raise NeuronSelectError(
            f"its record says block {record.layer}, its folder block {block}: give the folder its first name back",
            option="sae", value=name,
        )  # fmt: skip
    models = list(_with_base(model))
    if record.commit is not None and any(one.commit == record.commit for one in models):
        return ""
    if record.norms is not None and any(norms_hash(one) == record.norms for one in models):
        return (f"the SAE was trained on {record.model}, whose norms {model.id} has: if its other weights were trained on, "
                "train an SAE of its own")  # fmt: skip
    if any(_alike(record.model, one.id) for one in models):
        return _doubt_of_commit(record.model, record.commit, models)
    # Names of folders say nothing, but hashes of files and ids on the Hub do.
    near = any(_last(record.model) in one.id.lower() for one in models)  # the Instruct of a base model
    if not near and any(_comparable(record.model, record.commit, one) for one in models):
        raise NeuronSelectError(
            f"was trained on {record.model}, not on {model.id}, where its latents mean nothing: name an SAE of that model, "
            "or train one (neuronselect sae train)", option="sae", value=name,
        )  # fmt: skip
    return _may_not_fit(record.model, model)


def norms_hash(source: Source) -> str | None:
    """32 hex digits of the norms of a local model in bfloat16; None if they cannot be read.

    Rounding and quantising leave norms as they are, training changes them.
    """
    if not source.commit.startswith("content:"):
        return None
    found = hashlib.blake2b(digest_size=16)
    try:
        files = tensor_files(source)
        names = sorted(name for name in files if re.search(r"norm\d*\.weight$|ln_\w+\.weight$", name))
        for name in names:
            with safe_open(Path(source.location) / files[name], "pt") as file:
                weight = file.get_tensor(name)
            if weight.ndim != 1:
                return None
            found.update(f"{name.removeprefix('model.')} {len(weight)} ".encode())
            found.update(weight.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    except (OSError, SafetensorError, NeuronSelectError, RuntimeError):
        return None
    return found.hexdigest() if names else None


def _with_base(model: Source) -> Iterator[Source]:
    yield model
    if model.base is not None:
        yield from _with_base(model.base)


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()


def _alike(one: str, other: str) -> bool:
    return _last(one) == _last(other)


def _comparable(name: str, commit: str | None, model: Source) -> bool:
    if model.commit.startswith("content:"):
        return (commit or "").startswith("content:")
    return model.revision is not None and _HUB_ID.fullmatch(name) is not None


def _may_not_fit(told: str, model: Source) -> str:
    return f"the SAE was trained on {told}, the model is {model.id}: its latents may not fit"


def _doubt_of_commit(told: str, commit: str | None, models: list[Source]) -> str:
    known = [one for one in models if _alike(told, one.id) and commit is not None]
    if any((commit or "").startswith("content:") == one.commit.startswith("content:") for one in known):
        return f"the SAE was trained on other files of {told} ({commit}): if its weights have changed since, train the SAE again"
    return ""
