"""Pin a model: its commit or content hash and, of a PEFT adapter, those of its base, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.utils import find_adapter_config_file

from ..core.errors import NeuronSelectError
from ..core.folders import ADAPTER_FILES, TRAINING_RECORD, read_adapter
from ..core.provenance import TrainingRecord
from ..core.seals import SEAL, json_object
from ..core.sources import Source, hub_errors, resolve
from .gguf import model_folder

APPLIED = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "VERA")
"""Kinds of adapters that change a model's layers in place; others would be lost where only some blocks run."""

_CHANGES_MORE = ("alora_invocation_tokens", "layer_replication")  # LoRA that depends on the tokens, or adds blocks


def pin_model(name: str, *, revision: str | None, token: str | bool | None, option: str = "model") -> Source:
    """Pin a model or a PEFT adapter by folder or Hub id; an adapter's base is pinned with it.

    Raises:
        NeuronSelectError: it cannot be had, or is an adapter of a kind that cannot be applied.
    """
    source = resolve(model_folder(name, option), revision=revision, token=token, option=option)
    stated = _adapter_config(source, token, option)
    if stated is None:
        return source
    _check_applied(stated, source.id, option)
    if source.revision is None:  # one on the Hub is checked when its weights are loaded
        check_trained(source, source.id, option)
    base_name, base_revision = stated.get("base_model_name_or_path"), stated.get("revision")
    if not isinstance(base_name, str) or not base_name:
        raise NeuronSelectError(
            "its adapter_config.json does not name its base model; write a folder or Hub id into base_model_name_or_path there",
            option=option,
            value=source.id,
        )
    # A folder, by its path from the adapter's own folder or from here, or a Hub id and its revision.
    places = [Path(base_name).expanduser()] if source.revision else [Path(source.location) / base_name, Path(base_name)]
    folder = next((path for path in places if path.is_dir()), None)
    try:
        base = resolve(str(folder or base_name), revision=None if folder else base_revision, token=token, option=option)
    except NeuronSelectError as cause:
        raise NeuronSelectError(
            f"is an adapter of {Path(base_name).name if Path(base_name).is_absolute() else base_name}, which cannot be "
            f"had ({cause.message}); write a folder or Hub id that can into base_model_name_or_path of its "
            "adapter_config.json", option=option, value=source.id,
        ) from cause  # fmt: skip
    if _adapter_config(base, token, option) is not None:
        raise NeuronSelectError(
            f"is an adapter of {base.id}, which is an adapter, too: merge that into its base first", option=option,
            value=source.id,
        )  # fmt: skip
    return replace(source, base=base)


def pin_adapter(name: str, *, revision: str | None, token: str | bool | None, option: str) -> Source:
    """Pin a PEFT adapter that goes on a model named elsewhere.

    Raises:
        NeuronSelectError: it cannot be had, is no adapter, or is one of a kind that cannot be applied.
    """
    source = resolve(name, revision=revision, token=token, option=option, probe=("adapter_config.json",))
    stated = _adapter_config(source, token, option)
    if stated is None:
        raise NeuronSelectError("is no PEFT adapter (it has no adapter_config.json)", option=option, value=name)
    _check_applied(stated, source.id, option)
    return source


def _adapter_config(source: Source, token: str | bool | None, option: str) -> dict[str, Any] | None:
    """An adapter's configuration; None of a model that is none."""
    with hub_errors(option, source.id):
        found = find_adapter_config_file(source.location, revision=source.revision, token=token)
    if found is None:
        return None
    try:
        return json_object(Path(found))
    except ValueError as cause:
        raise NeuronSelectError(f"its {cause}", option=option, value=source.id) from cause


def check_trained(adapter: Source, name: str, option: str, token: str | bool | None = None) -> TrainingRecord | None:
    """The record of an adapter that was trained here, its files checked; None of one made elsewhere.

    Raises:
        NeuronSelectError: it was changed.
    """
    folder = Path(adapter.location)
    if adapter.revision is not None:
        with hub_errors(option, adapter.id):
            try:
                record = hf_hub_download(adapter.location, TRAINING_RECORD, revision=adapter.revision, token=token)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None
            snapshot_download(
                adapter.location, revision=adapter.revision, token=token, allow_patterns=list(ADAPTER_FILES)
            )
        folder = Path(record).parent
    if not (folder / TRAINING_RECORD).is_file() or _foreign(folder / TRAINING_RECORD):
        return None
    try:
        return read_adapter(folder, name, option)
    except NeuronSelectError as cause:
        mend = f"; as an adapter made elsewhere it is used without its {TRAINING_RECORD}"
        raise NeuronSelectError(cause.message + mend, option=option, value=name) from cause


def _foreign(record: Path) -> bool:
    """Whether another program's file has the name of our record; a damaged one is ours."""
    try:
        return json_object(record).keys().isdisjoint((SEAL, "base_model"))
    except ValueError:
        return False


def check_adapters(model: Any, option: str = "model") -> None:
    """Refuse a model in memory with an adapter that would not be applied.

    Raises:
        NeuronSelectError: an adapter of a kind that cannot be applied.
    """
    for name, stated in (getattr(model, "peft_config", None) or {}).items():
        _check_applied(stated.to_dict(), name, option)


def _check_applied(stated: Mapping[str, Any], name: str, option: str) -> None:
    kind = stated.get("peft_type")
    kind = str(getattr(kind, "value", kind))  # an enum in memory
    if kind not in APPLIED:
        raise NeuronSelectError(
            f"is an adapter of type {kind}, which cannot be applied here; types that can: {', '.join(APPLIED)}",
            option=option, value=name,
        )  # fmt: skip
    if odd := next((name for name in _CHANGES_MORE if stated.get(name)), None):
        raise NeuronSelectError(
            f"is a {kind} adapter with {odd}, which cannot be applied here: merge it into its base first",
            option=option, value=name,
        )  # fmt: skip


def pin_named(name: str, option: str) -> Source:
    """Pin a model that an option of a method names: a folder, or ``org/name[@revision]``.

    Raises:
        NeuronSelectError: as :func:`pin_model`.
    """
    known, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    return pin_model(known, revision=revision or None, token=None, option=option)
