"""Whether an SAE belongs to a model: by its record, or by the model that its file names."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..core.errors import NeuronSelectError
from ..core.sources import Source
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
