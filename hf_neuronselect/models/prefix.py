"""Load only the weights that a model's first blocks need, from safetensors.

A checkpoint's index maps tensors to files: files that are not needed are neither downloaded nor read. Deeper blocks and
the lm_head never take any memory, nor does the final norm where blocks are left away.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from ..core.errors import NeuronSelectError
from ..core.sources import Source
from .backbone import FINAL_NORMS, find_decoder

logger = logging.getLogger(__name__)

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SLACK = 1 << 20  # parameters


def load_prefix(source: Source, lm_config: Any, depth: int, **options: Any) -> Any | None:
    """Load only the first blocks of a causal LM, with the final norm if these are all, without lm_head unless it is tied.

    Args:
        lm_config: its configuration; not changed, since some blocks read the total number of blocks.
        depth: number of blocks to keep. options: options of ``from_pretrained``.

    Returns:
        The model in eval mode; None if its tensor names are not understood and the whole model must be loaded.

    Raises:
        NeuronSelectError: no safetensors, or a damaged or missing file.
    """
    whole = described(source, lm_config)
    decoder, blocks = find_decoder(whole)
    cut = depth < len(getattr(decoder, blocks))
    unused = {name for name in FINAL_NORMS if cut and hasattr(decoder, name)}
    head = whole.get_output_embeddings()
    if not whole.all_tied_weights_keys:
        unused |= {name.rpartition(".")[2] for name, module in whole.named_modules() if module is head}
    files = {name: file for name, file in tensor_files(source).items() if _needed(name, blocks, depth, unused)}
    if isinstance(device_map := options.get("device_map"), dict):  # it names modules of the whole model
        options["device_map"] = {k: v for k, v in device_map.items() if _needed(f"{k}.", blocks, depth, unused)}
    state = _read(source, files)
    wanted = (parameter for name, parameter in whole.named_parameters() if _needed(name, blocks, depth, unused))
    check_parameters(source, wanted, sum(tensor.nbytes for tensor in state.values()))
    with quiet_report():
        model, info = _prefix_of(type(whole), depth).from_pretrained(
            None, config=whole.config, state_dict=state, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    if lost := lost_tensors(model, info):
        logger.info("%s is loaded whole: tensor %s was not found where expected", source.id, lost[0])
        return None
    return model


def described(source: Source, lm_config: Any) -> Any:
    """The model that a configuration describes, without memory for its weights.

    Raises:
        NeuronSelectError: none can be built.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(lm_config, trust_remote_code=False)
    except ImportError:
        raise
    except Exception as cause:  # of many kinds: a name that is no name, sizes that do not fit
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        raise NeuronSelectError(
            f"its config.json describes a model that cannot be built ({reason}): save or download it again",
            option="model", value=source.id,
        ) from cause  # fmt: skip


def check_parameters(source: Source, parameters: Iterable[nn.Parameter], held: int, *, packed: bool = False) -> None:
    """Refuse a model that would need far more memory than its files have bytes.

    Args:
        parameters: of the model on the meta device, as its configuration describes it. held: bytes of its weights.
        packed: they are quantised: down to a bit each.

    Raises:
        NeuronSelectError: it would.
    """
    described = sum(parameter.numel() for parameter in parameters)
    if described > held * (16 if packed else 2) + _SLACK:
        raise NeuronSelectError(
            f"its config.json describes {described:,} parameters, its weights are {held:,} bytes: one of them is damaged, "
            "download it again", option="model", value=source.id,
        )  # fmt: skip


def _needed(name: str, blocks: str, depth: int, unused: set[str]) -> bool:
    """Whether a tensor may belong to the prefix; only tensors that surely do not are left out."""
    if block := re.search(rf"(?:^|\.){blocks}\.(\d+)\.", name):
        return int(block[1]) < depth
    return unused.isdisjoint(name.split(".")[-2:-1])


def _prefix_of(family: type, depth: int) -> Any:
    """A subclass whose models end at a block. It keeps the name, by which transformers renames tensors."""

    def init(self: Any, config: Any, *words: Any, **more: Any) -> None:
        family.__init__(self, config, *words, **more)  # type: ignore[misc]
        decoder, blocks = find_decoder(self)
        cut = depth < len(getattr(decoder, blocks))
        setattr(decoder, blocks, getattr(decoder, blocks)[:depth])
        for name in FINAL_NORMS:
            if cut and hasattr(decoder, name):
                delattr(decoder, name)
        if self.get_output_embeddings() is not None and not self.all_tied_weights_keys:
            self.set_output_embeddings(nn.Identity())

    return type(family.__name__, (family,), {"__init__": init, "__module__": family.__module__})


def lost_tensors(model: Any, info: Mapping[str, Any]) -> list[str]:
    """Decoder tensors that are missing from the checkpoint or differ in shape, from ``output_loading_info``."""
    decoder, blocks = find_decoder(model)
    path = next(name for name, module in model.named_modules() if module is decoder)
    found = [*info["missing_keys"], *(f"{name} (of shape {tuple(has)}, the model's is {tuple(needs)})"
                                      for name, has, needs in info["mismatched_keys"])]  # fmt: skip
    inside = [name for name in sorted(found) if name.startswith(f"{path}." if path else "")]
    gone = {name for name in FINAL_NORMS if not hasattr(decoder, name)}
    return [name for name in inside if _needed(name.split(" ")[0], blocks, len(getattr(decoder, blocks)), gone)]


@contextmanager
def quiet_report() -> Iterator[None]:
    """Silence transformers' table of unused tensors; the caller checks for missing ones itself."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(keep)
    try:
        yield
    finally:
        reporter.removeFilter(keep)


# ---------------------------------------------------------------------------------------------- files
def fetched(source: Source, *names: str) -> Path | None:
    """The first of these files that the model has, downloaded if needed; None if it has none of them."""
    if source.revision is None:
        return next((path for name in names if (path := Path(source.location) / name).is_file()), None)
    for name in names:
        if isinstance(cached := try_to_load_from_cache(source.location, name, revision=source.revision), str):
            return Path(cached)
    for name in names:
        try:
            return Path(hf_hub_download(source.location, name, revision=source.revision))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
    return None


def no_safetensors(source: Source) -> NeuronSelectError:
    return NeuronSelectError(
        "has no safetensors weights, and pickles (.bin) are never opened: save it again with save_pretrained, or "
        "name a revision that has them",
        option="model",
        value=source.id,
    )


def tensor_files(source: Source) -> dict[str, str]:
    """Tensor name -> file.

    Raises:
        NeuronSelectError: no safetensors, or an unreadable index.
    """
    path = fetched(source, _SINGLE, _INDEX)
    if path is None:
        raise no_safetensors(source)
    if path.name == _SINGLE:
        return dict.fromkeys(_opened(source, path, lambda tensors: list(tensors.keys())), _SINGLE)
    try:
        return {str(name): str(file) for name, file in json.loads(path.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        raise NeuronSelectError(f"{_INDEX} cannot be read: {cause!r}"[:200], option="model", value=source.id) from cause


def _read(source: Source, files: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Tensors by name, memory-mapped from their files."""
    shards: dict[str, set[str]] = {}
    for name, file in files.items():
        shards.setdefault(file, set()).add(name)
    if source.revision is not None and len(shards) > 1:  # several at a time
        snapshot_download(source.location, revision=source.revision, allow_patterns=sorted(shards))
    state: dict[str, torch.Tensor] = {}
    for file, names in sorted(shards.items()):
        path = fetched(source, file)
        if path is None:
            raise NeuronSelectError(
                f"the file {file}, which has {min(names)}, is missing; download the model again",
                option="model",
                value=source.id,
            )
        state |= _opened(
            source, path, lambda held, names=names: {k: held.get_tensor(k) for k in names.intersection(held.keys())}
        )
    return state


def _opened(source: Source, path: Path, read: Callable[..., Any]) -> Any:
    try:
        with safe_open(path, framework="pt") as tensors:
            return read(tensors)
    except SafetensorError as cause:
        raise NeuronSelectError(
            f"the file {path.name} is damaged ({cause}); download it again", option="model", value=source.id
        ) from cause
