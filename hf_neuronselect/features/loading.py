"""Loaded parts, shared within a process: one model, one SAE, whatever features are asked of them."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ..activations.backbone import Backbone
from ..activations.sae import SparseAutoencoder
from ..activations.sae_formats import load_sae
from ..errors import NeuronSelectError
from ..samples import SampleEncoder
from ..sources import Source, hub_errors
from .config import DTYPES, ExtractorConfig
from .features import FEATURES, Feature, Projection

logger = logging.getLogger(__name__)

_KEPT = 2  # models held at once in a process


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


def load_runtime(config: ExtractorConfig, device: torch.device, *, weights: bool) -> Runtime:
    """Load, or find already loaded, what a configuration needs on a device.

    Args:
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
        sae = _sae(config.sae, config.options.layer, str(device), config.dtype)
    backbone = Backbone(_IN_MEMORY[config.model.commit]) if in_memory else _backbone(config, sae, device)
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


def _backbone(config: ExtractorConfig, sae: SparseAutoencoder | None, device: torch.device) -> Backbone:
    key = (config.model, config.dtype, config.quantize, config.attn_implementation, str(device))
    if key in _BACKBONES:
        blocks, backbone = _BACKBONES[key]
        if blocks >= _depth(config, sae, backbone.num_layers):
            _BACKBONES.move_to_end(key)
            return backbone
        del _BACKBONES[key]  # more blocks are needed than were kept
    started = time.perf_counter()
    whole = Backbone(_load_model(config, device))
    depth = _depth(config, sae, whole.num_layers)
    _BACKBONES[key] = depth, Backbone(whole.decoder, depth=depth)
    while len(_BACKBONES) > _KEPT:
        _BACKBONES.popitem(last=False)
    logger.info(
        "loaded %s (%d of %d blocks, %s) in %.1f s", config.model.id, depth, whole.num_layers, config.dtype,
        time.perf_counter() - started,
    )  # fmt: skip
    return _BACKBONES[key][1]


def _load_model(config: ExtractorConfig, device: torch.device) -> Any:
    extra: dict[str, Any] = {}
    if config.quantize is not None:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=config.quantize == "4bit", load_in_8bit=config.quantize == "8bit"
        )
    if config.attn_implementation is not None:
        extra["attn_implementation"] = config.attn_implementation
    with hub_errors("model", config.model.id):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                config.model.location,
                revision=config.model.revision,
                dtype=DTYPES[config.dtype],
                trust_remote_code=False,
                **extra,
            )
        except ImportError as cause:
            if config.quantize is None:
                raise
            raise NeuronSelectError(
                "needs bitsandbytes: pip install bitsandbytes", option="quantize", value=config.quantize
            ) from cause
    model.eval().requires_grad_(False)
    if config.quantize is None:
        torch.nn.Module.to(model, device)
    return model
