"""Load models, tokenizers and SAEs, once per process."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ..core.errors import NeuronSelectError
from ..core.sources import Source, hub_errors
from .backbone import Backbone, find_decoder
from .checkpoint import config_of, read_tokenizer
from .dtypes import DTYPES
from .pin import check_trained
from .prefix import fetched, load_prefix, lost_tensors, no_safetensors, quiet_report
from .sae import SparseAutoencoder
from .sae_formats import load_sae
from .sizes import check_rank, check_whole

logger = logging.getLogger(__name__)

_KEPT = 2  # models kept in a process

Place = torch.device | str | dict[str, Any]
"""Where a model is loaded: one device, or a device map of transformers."""


@dataclass(frozen=True)
class ModelSpec:
    """A model and how it is loaded; see :class:`~hf_neuronselect.core.options.ModelOptions`."""

    source: Source
    dtype: str
    quantize: str | None = None
    attn_implementation: str | None = None

    @property
    def in_memory(self) -> bool:
        return self.source.commit.startswith("state:")


_BACKBONES: OrderedDict[tuple[ModelSpec, str], tuple[int, Backbone]] = OrderedDict()
_WHOLE: OrderedDict[tuple[ModelSpec, str], Any] = OrderedDict()
_FREED: list[Callable[[], None]] = []
# In-memory models and tokenizers of this process, by the state hash in their Source.
_IN_MEMORY: WeakValueDictionary[str, torch.nn.Module] = WeakValueDictionary()
_IN_MEMORY_TOKENIZERS: dict[str, Any] = {}


def remember(commit: str, model: torch.nn.Module, tokenizer: Any) -> None:
    """Register an in-memory model, so that copies of its extractor in this process find it."""
    _IN_MEMORY[commit] = model
    _IN_MEMORY_TOKENIZERS[commit] = tokenizer


def _remembered(source: Source) -> Any:
    if source.commit not in _IN_MEMORY:
        raise NeuronSelectError(
            "this extractor has an in-memory model, which cannot be sent to another process: save it with "
            "save_pretrained and use NeuronFeatureExtractor.from_pretrained, or num_proc=None"
        )
    return _IN_MEMORY[source.commit]


def tokenizer_of(source: Source) -> Any:
    """The tokenizer of a model.

    Raises:
        NeuronSelectError: an in-memory model of another process.
    """
    if source.commit.startswith("state:"):
        _remembered(source)
        return _IN_MEMORY_TOKENIZERS[source.commit]
    return _tokenizer(source)


@lru_cache(maxsize=4)
def _tokenizer(source: Source) -> Any:
    return read_tokenizer(source)


def sae_on(source: Source, layer: int, device: torch.device, dtype: str) -> SparseAutoencoder:
    """An SAE on a device.

    Raises:
        NeuronSelectError: an in-memory SAE of another process.
    """
    if source.commit.startswith("state:"):
        raise NeuronSelectError("an in-memory SAE cannot be sent to another process: pass its folder")
    return _sae(source, layer, str(device), dtype)


@lru_cache(maxsize=_KEPT)
def _sae(source: Source, layer: int, device: str, dtype: str) -> SparseAutoencoder:
    return load_sae(source.location, layer=layer).to(device, DTYPES[dtype])


@lru_cache(maxsize=1)
def decoding_sae(source: Source, layer: int) -> SparseAutoencoder:
    """An SAE with its decoder, in main memory.

    Raises:
        NeuronSelectError: it has none, is a transcoder, or was handed over without its folder.
    """
    if source.commit.startswith("state:"):
        raise NeuronSelectError("an SAE in memory is not read for its decoder: pass its folder", option="sae")
    sae = load_sae(source.location, layer=layer)
    sae.check_decodes()
    return sae


def backbone_of(spec: ModelSpec, place: Place, depth_of: Callable[[int], int]) -> Backbone:
    """The first blocks of a model, from the cache or loaded.

    Args:
        place: a device, or a device map for the blocks.
        depth_of: total number of blocks -> blocks that must run.

    Raises:
        NeuronSelectError: an in-memory model of another process, or files that cannot be loaded.
    """
    if spec.in_memory:
        return Backbone(_remembered(spec.source))
    key = (spec, str(place))
    if key in _BACKBONES:
        blocks, backbone = _BACKBONES[key]
        if blocks >= depth_of(backbone.num_layers):
            _BACKBONES.move_to_end(key)
            return backbone
        del _BACKBONES[key]  # more blocks are needed than were kept
    started = time.perf_counter()
    whole = Backbone(_load_model(spec, place, depth_of))
    depth = depth_of(whole.num_layers)
    backbone = Backbone(whole.decoder, depth=depth)
    if not isinstance(place, torch.device):
        backbone.device = _runs_on(backbone.blocks[-1])
    _keep(_BACKBONES, key, (depth, backbone))
    logger.info(
        "loaded %s (%d of %d blocks, %s) in %.1f s", spec.source.id, depth, whole.num_layers, spec.dtype,
        time.perf_counter() - started,
    )  # fmt: skip
    return backbone


def causal_lm_of(spec: ModelSpec, place: Place) -> Any:
    """A whole causal LM with its head, in eval mode, from the cache or loaded."""
    if spec.in_memory:
        return _remembered(spec.source)
    key = (spec, str(place))
    if key not in _WHOLE:
        _keep(_WHOLE, key, _load_model(spec, place, None))
    return _WHOLE[key]


def on_forget(free: Callable[[], None]) -> None:
    """Have :func:`forget` call this, too: what another module keeps models in is emptied by it."""
    _FREED.append(free)


def forget() -> None:
    """Free the memory of models that this process keeps; they are loaded again when they are needed."""
    for free in _FREED:
        free()
    _BACKBONES.clear()
    _WHOLE.clear()
    _sae.cache_clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fresh_lm(spec: ModelSpec, place: Place) -> Any:
    """A whole causal LM that nobody else has, in eval mode, from files."""
    return _load_model(spec, place, None)


def adapted_decoder_of(spec: ModelSpec, adapter: Source, option: str, place: Place) -> nn.Module:
    """The blocks of a model with a PEFT adapter on them, with the final norm, from the cache or loaded.

    Args:
        adapter: of the whole causal LM, or of its decoder alone, as the names of its tensors say. option: names it.

    Raises:
        NeuronSelectError: it does not fit, or the model is in memory, where it must stay as it is.
    """
    if spec.in_memory or spec.source.base is not None:
        what = (
            "is an adapter itself: name its base" if spec.source.base else "is in memory: save it, and name its folder"
        )
        raise NeuronSelectError(f"{what}, for the adapter to go on", option="model", value=spec.source.id)
    key = (replace(spec, source=replace(adapter, base=spec.source)), str(place))
    if key not in _WHOLE:
        model = _load_model(spec, place, None)
        path = fetched(adapter, "adapter_model.safetensors")
        if path is None:
            raise no_safetensors(adapter)  # PEFT would open the pickle
        try:
            with safe_open(path, "pt") as file:
                whole = any(name.startswith("base_model.model.model.") for name in file.keys())  # noqa: SIM118
        except SafetensorError as cause:
            raise NeuronSelectError(f"cannot be read: {cause}", option=option, value=adapter.id) from cause
        made = load_adapter(model if whole else find_decoder(model)[0], adapter, adapter.id, option)
        _keep(_WHOLE, key, made.eval().requires_grad_(False))
    return find_decoder(_WHOLE[key])[0]


def _keep(cache: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    cache[key] = value
    while len(cache) > _KEPT:
        cache.popitem(last=False)


def _load_model(spec: ModelSpec, place: Place, depth_of: Callable[[int], int] | None) -> Any:
    """Load a model in eval mode: the blocks that must run, or all if they cannot be told apart."""
    if isinstance(place, torch.device):
        model = _from_files(spec, depth_of, {})
        if spec.quantize is None:
            nn.Module.to(model, place)
        return model
    offload = tempfile.mkdtemp(prefix="neuronselect_")  # for modules that the map puts on disk
    try:
        model = _from_files(spec, depth_of, {"device_map": place, "offload_folder": offload})
    except BaseException as cause:
        shutil.rmtree(offload, ignore_errors=True)
        if isinstance(cause, NeuronSelectError) or not isinstance(cause, (ValueError, RuntimeError, AssertionError)):
            raise
        reason = " ".join(str(cause).split())[:300]  # a module without a device, or a device that does not exist
        raise NeuronSelectError(
            f"the model cannot be placed like this: {reason}", option="device_map", value=place
        ) from cause
    weakref.finalize(find_decoder(model)[0], shutil.rmtree, offload, ignore_errors=True)
    return model


def _from_files(spec: ModelSpec, depth_of: Callable[[int], int] | None, options: dict[str, Any]) -> Any:
    options = options | {"dtype": DTYPES[spec.dtype]}
    if spec.quantize is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=spec.quantize == "4bit", load_in_8bit=spec.quantize == "8bit"
        )
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    with hub_errors("model", spec.source.id):
        try:
            lm_config = _plain(spec)
            model = None
            if lm_config is not None and depth_of is not None:
                depth = depth_of(lm_config.get_text_config().num_hidden_layers)
                model = load_prefix(spec.source, lm_config, depth, **options)
            if model is None:
                model = _whole(spec.source, options, plain=lm_config is not None)
        except ImportError as cause:
            reason = " ".join(str(cause).split())[:240]
            if spec.quantize is not None:
                raise NeuronSelectError(
                    "needs bitsandbytes: pip install bitsandbytes", option="quantize", value=spec.quantize
                ) from cause
            if spec.attn_implementation is not None:
                raise NeuronSelectError(
                    f"cannot be had here: {reason}", option="attn_implementation", value=spec.attn_implementation
                ) from cause
            raise NeuronSelectError(f"cannot be loaded: {reason}", option="model", value=spec.source.id) from cause
    return model.eval().requires_grad_(False)


def _plain(spec: ModelSpec) -> Any | None:
    """The configuration of a plain checkpoint; None for adapters, quantised models and unusual file names."""
    source = spec.source
    if spec.quantize is not None or source.base is not None:
        return None
    lm_config = config_of(source)
    parts = (lm_config, lm_config.get_text_config())
    odd = any(getattr(part, name, None) for part in parts for name in ("quantization_config", "transformers_weights"))
    return None if odd else lm_config


def _whole(source: Source, options: dict[str, Any], *, plain: bool) -> Any:
    if source.base is not None and fetched(source, "adapter_model.safetensors") is None:
        raise no_safetensors(source)  # PEFT would open the pickle
    base = source.base or source
    check_whole(base, config_of(base))
    # Quantised models have other tensors: for them transformers' report says what is missing.
    with quiet_report() if plain else nullcontext():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base.location, revision=base.revision, trust_remote_code=False, use_safetensors=True,
                output_loading_info=True, ignore_mismatched_sizes=plain, **options,
            )  # fmt: skip
        except OSError as cause:
            if not re.search("use_safetensors|no file named", str(cause)):
                raise
            raise no_safetensors(source) from cause
    model, info = loaded
    if plain and (lost := lost_tensors(model, info)):
        raise NeuronSelectError(
            f"the checkpoint lacks {lost[0]}{f' and {len(lost) - 1} more' if lost[1:] else ''}; save or download the model again with all its weights",
            option="model",
            value=source.id,
        )
    return model if source.base is None else load_adapter(model, source, source.id, "model")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence peft 0.21's use of an old attribute of transformers 5, which users cannot change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def load_adapter(model: Any, adapter: Source, name: str, option: str, token: str | bool | None = None) -> Any:
    """Put a PEFT adapter on a model.

    It uses peft directly, since the versions of peft that transformers' own loader accepts change with its releases.

    Raises:
        NeuronSelectError: the adapter, called ``name`` and given as ``option``, does not fit the model.
    """
    from peft import PeftModel  # a second, for adapters alone

    check_trained(adapter, name, option, token)
    check_rank(adapter, name, option)
    try:
        with hub_errors(option, adapter.id), quiet_peft():
            # Missing adapter weights would keep their initial values, and the adapter would do nothing.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, adapter.location, revision=adapter.revision, token=token)
    except NeuronSelectError:
        raise
    except Exception as cause:  # damaged files raise errors of many kinds
        reason = " ".join(str(cause).split())[:240]
        raise NeuronSelectError(
            f"the adapter {name!r} does not fit the model: {reason}", option=option, value=adapter.id
        ) from cause


def named_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        NeuronSelectError: torch knows no such device, or the machine has none.
    """
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise NeuronSelectError("no CUDA device is available; use cpu", option="device", value=name)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)  # a name that torch knows may still be of hardware that is not here
    except (RuntimeError, AssertionError, ImportError) as cause:
        raise NeuronSelectError(
            "no such device here; use auto, cpu, cuda, cuda:1 or mps", option="device", value=name
        ) from cause
    if device.type == "meta":
        raise NeuronSelectError("computes no numbers; use auto, cpu, cuda, cuda:1 or mps", option="device", value=name)
    return device


def _runs_on(block: nn.Module) -> torch.device:
    """The device on which a block placed by accelerate computes; its weights may be on another."""
    for module in block.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(block.parameters()).device
