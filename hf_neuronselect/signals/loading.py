"""Loaded parts, shared within a process: one model, one SAE, whatever features are asked of them."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import find_adapter_config_file

from ..core.errors import NeuronSelectError
from ..core.sources import Source, hub_errors
from ..models.backbone import Backbone, find_decoder
from ..models.prefix import fetched, load_prefix, lost_tensors, no_safetensors, quiet_report
from ..models.sae import SparseAutoencoder
from ..models.sae_formats import load_sae
from ..rows.encode import SampleEncoder
from .config import DTYPES, ExtractorConfig
from .forward import FEATURES, Feature, Projection

logger = logging.getLogger(__name__)

_KEPT = 2  # models held at once in a process

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
Place = torch.device | str | dict[str, Any]
"""Where a model goes: onto one device, or by a device map as transformers takes it."""


@dataclass
class Runtime:
    """What an extractor runs with; never pickled. Without weights: only what tokenising needs."""

    tokenizer: Any
    encoder: SampleEncoder
    backbone: Backbone | None
    sae: SparseAutoencoder | None


_BACKBONES: OrderedDict[tuple[Any, ...], tuple[int, Backbone]] = OrderedDict()
# Models and tokenizers that live in this process only, by the state hash in their Source.
_IN_MEMORY: WeakValueDictionary[str, torch.nn.Module] = WeakValueDictionary()
_IN_MEMORY_TOKENIZERS: dict[str, Any] = {}


def remember(commit: str, model: torch.nn.Module, tokenizer: Any) -> None:
    """Make an in-memory model known to copies of its extractor in this process."""
    _IN_MEMORY[commit] = model
    _IN_MEMORY_TOKENIZERS[commit] = tokenizer


def sample_encoder(config: ExtractorConfig, tokenizer: Any) -> SampleEncoder:
    """The row encoder an extractor's configuration asks for."""
    return SampleEncoder(
        tokenizer,
        pool_tokens=config.pool_tokens,
        max_length=config.max_length,
        truncation_side=config.truncation_side,
        content_spans=any(FEATURES[name].needs_content for name in config.features),
        chat_template=config.chat_template,
    )


def load_runtime(config: ExtractorConfig, place: Place, *, weights: bool) -> Runtime:
    """Load, or find already loaded, what a configuration needs in a place.

    Args:
        place: a device; or a device map, by which the blocks are spread: the SAE goes where the last of them runs.
        weights: False: the tokenizer alone.

    Raises:
        NeuronSelectError: an in-memory model in a process that does not have it; files that cannot be had.
    """
    in_memory = config.model.commit.startswith("state:")
    if in_memory and config.model.commit not in _IN_MEMORY:
        raise NeuronSelectError(
            "this extractor holds a model in memory, which cannot be sent to another process: save it with "
            "save_pretrained and use NeuronFeatureExtractor.from_pretrained, or num_proc=None"
        )
    tokenizer = _IN_MEMORY_TOKENIZERS[config.model.commit] if in_memory else _tokenizer(config.model)
    encoder = sample_encoder(config, tokenizer)
    if not weights or not config.computes:
        return Runtime(tokenizer, encoder, None, None)
    sae = None
    if config.sae is not None:
        if config.sae.commit.startswith("state:"):
            raise NeuronSelectError("an SAE held in memory cannot be sent to another process: pass its folder")
        sae = _sae(
            config.sae, config.options.layer, str(place if isinstance(place, torch.device) else "cpu"), config.dtype
        )
    backbone = Backbone(_IN_MEMORY[config.model.commit]) if in_memory else _backbone(config, sae, place)
    if config.sae is not None and not isinstance(place, torch.device):
        sae = _sae(config.sae, config.options.layer, str(backbone.device), config.dtype)
    return Runtime(tokenizer, encoder, backbone, sae)


@lru_cache(maxsize=4)
def _tokenizer(source: Source) -> Any:
    return AutoTokenizer.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)


@lru_cache(maxsize=_KEPT)
def _sae(source: Source, layer: int, device: str, dtype: str) -> SparseAutoencoder:
    return load_sae(source.location, layer=layer).to(device, DTYPES[dtype])


def _depth(config: ExtractorConfig, sae: SparseAutoencoder | None, num_layers: int) -> int:
    """Blocks that must run."""
    kinds: list[type[Feature]] = [FEATURES[name] for name in config.features]
    if config.directions is not None:
        kinds.append(Projection)
    return 1 + max(kind.deepest(config.options, sae, num_layers) for kind in kinds)


def _backbone(config: ExtractorConfig, sae: SparseAutoencoder | None, place: Place) -> Backbone:
    key = (config.model, config.dtype, config.quantize, config.attn_implementation, str(place))
    if key in _BACKBONES:
        blocks, backbone = _BACKBONES[key]
        if blocks >= _depth(config, sae, backbone.num_layers):
            _BACKBONES.move_to_end(key)
            return backbone
        del _BACKBONES[key]  # more blocks are needed than were kept
    started = time.perf_counter()
    whole = Backbone(_load_model(config, sae, place))
    depth = _depth(config, sae, whole.num_layers)
    backbone = Backbone(whole.decoder, depth=depth)
    if not isinstance(place, torch.device):
        backbone.device = _runs_on(backbone.blocks[-1])
    _BACKBONES[key] = depth, backbone
    while len(_BACKBONES) > _KEPT:
        _BACKBONES.popitem(last=False)
    logger.info(
        "loaded %s (%d of %d blocks, %s) in %.1f s", config.model.id, depth, whole.num_layers, config.dtype,
        time.perf_counter() - started,
    )  # fmt: skip
    return backbone


def _load_model(config: ExtractorConfig, sae: SparseAutoencoder | None, place: Place) -> Any:
    """The blocks that must run, or more where they cannot be told apart, in eval mode in their place."""
    if isinstance(place, torch.device):
        model = _from_files(config, sae, {})
        if config.quantize is None:
            nn.Module.to(model, place)
        return model
    offload = tempfile.mkdtemp(prefix="neuronselect_")  # for what the map puts on the disk
    try:
        model = _from_files(config, sae, {"device_map": place, "offload_folder": offload})
    except BaseException as cause:
        shutil.rmtree(offload, ignore_errors=True)
        if isinstance(cause, NeuronSelectError) or not isinstance(cause, (ValueError, RuntimeError, AssertionError)):
            raise
        reason = " ".join(str(cause).split())[:300]  # a module without a device, a device that is not there
        raise NeuronSelectError(f"the model cannot be placed so: {reason}", option="device_map", value=place) from cause
    weakref.finalize(find_decoder(model)[0], shutil.rmtree, offload, ignore_errors=True)
    return model


def _from_files(config: ExtractorConfig, sae: SparseAutoencoder | None, options: dict[str, Any]) -> Any:
    options = options | {"dtype": DTYPES[config.dtype]}
    if config.quantize is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=config.quantize == "4bit", load_in_8bit=config.quantize == "8bit"
        )
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    with hub_errors("model", config.model.id):
        try:
            lm_config = _plain(config)
            model = None
            if lm_config is not None:
                depth = _depth(config, sae, lm_config.get_text_config().num_hidden_layers)
                model = load_prefix(config.model, lm_config, depth, **options)
            if model is None:
                model = _whole(config.model, options, plain=lm_config is not None)
        except ImportError as cause:
            if config.quantize is None:
                raise
            raise NeuronSelectError(
                "needs bitsandbytes: pip install bitsandbytes", option="quantize", value=config.quantize
            ) from cause
    return model.eval().requires_grad_(False)


def _plain(config: ExtractorConfig) -> Any | None:
    """The configuration of a plain checkpoint; None: an adapter, a quantised model, weights in files of other names."""
    source = config.model
    if config.quantize is not None or _is_adapter(source):
        return None
    lm_config = AutoConfig.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    parts = (lm_config, lm_config.get_text_config())
    odd = any(getattr(part, name, None) for part in parts for name in ("quantization_config", "transformers_weights"))
    return None if odd else lm_config


def _whole(source: Source, options: dict[str, Any], *, plain: bool) -> Any:
    if not plain and _is_adapter(source) and fetched(source, "adapter_model.safetensors") is None:
        raise no_safetensors(source)  # PEFT would open the pickle
    adapter = not plain and _is_adapter(source)
    base = (
        _base_of(source) if adapter else {"pretrained_model_name_or_path": source.location, "revision": source.revision}
    )
    # Quantised models have tensors of their own: there transformers' report says what is missing.
    with quiet_report() if plain else nullcontext():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **base, trust_remote_code=False, use_safetensors=True,
                output_loading_info=True, ignore_mismatched_sizes=plain, **options,
            )  # fmt: skip
        except OSError as cause:
            if not re.search("use_safetensors|no file named", str(cause)):
                raise
            raise no_safetensors(source) from cause
    model, info = loaded
    if plain and (lost := lost_tensors(model, info)):
        raise NeuronSelectError(
            f"the checkpoint lacks {lost[0]}{f' and {len(lost) - 1} more' if lost[1:] else ''}: nothing is made up for it",
            option="model",
            value=source.id,
        )
    return load_adapter(model, source, source.id, "model") if adapter else model


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Peft 0.21 asks a transformers 5 model by an old name; its users can do nothing about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def _base_of(adapter: Source) -> dict[str, Any]:
    """The base of a PEFT adapter, as ``from_pretrained`` takes it."""
    path = fetched(adapter, "adapter_config.json")
    assert path is not None
    stated = json.loads(path.read_text(encoding="utf-8"))
    return {"pretrained_model_name_or_path": stated["base_model_name_or_path"], "revision": stated.get("revision")}


def load_adapter(model: Any, adapter: Source, name: str, option: str, token: str | bool | None = None) -> Any:
    """The model with a PEFT adapter on it.

    By peft itself: which versions of it transformers' own way takes changes with their releases.

    Raises:
        NeuronSelectError: the adapter, called ``name`` and given as ``option``, does not fit the model.
    """
    try:
        with hub_errors(option, adapter.id), quiet_peft():
            # Weights that are not there would stay as initialised, and the numbers would be the model's own.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, adapter.location, revision=adapter.revision, token=token)
    except NeuronSelectError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, UserWarning) as cause:
        reason = " ".join(str(cause).split())[:240]
        raise NeuronSelectError(
            f"the adapter {name!r} does not fit the model: {reason}", option=option, value=adapter.id
        ) from cause


def _is_adapter(source: Source) -> bool:
    return find_adapter_config_file(source.location, revision=source.revision) is not None


def _runs_on(block: nn.Module) -> torch.device:
    """Where a block that accelerate has placed computes; its weights may lie elsewhere."""
    for module in block.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(block.parameters()).device
