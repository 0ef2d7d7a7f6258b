"""Train SAEs on the rows of a pool, measure them on rows they never saw, and write their folder."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import save_file

from ..core.digests import SAE_FILES
from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.folders import SAE, SAE_WORK
from ..core.provenance import SourceRecord, plain
from ..core.sae_configs import SaeTrainConfig
from ..core.sae_record import SAE_RECORD, SaeRecord, read_record, verdict_of
from ..core.seals import encode, write_checksums
from ..core.sources import Source
from ..core.writing import writing
from ..hub.cards import SaeCard, write_card
from ..models.backbone import Backbone, resolve_layer
from ..models.loading import causal_lm_of, tokenizer_of
from ..models.sae_formats import load_sae
from ..models.sae_match import norms_hash
from ..rows.encode import Limits, SampleEncoder
from ..signals.extraction import Extraction
from ..signals.forward import place_of
from .models import BUNDLED
from .sae_loop import Progress, fit_saes
from .sae_measure import measure_saes
from .sae_rows import HELD_TOKENS, SaeRows, foresee, gather_rows
from .token_rows import Activations, TokenRows
from .topk import TopK, TopKPlan, default_batch

Say = Callable[[str], None]
_FORWARD = {"cpu": 8192, "cuda": 32768}  # tokens of a forward pass
_MEASURED = {"cpu": 2048, "cuda": 8192}  # the same where logits are held, too
_BLOCK = {"cpu": 1 << 17, "cuda": 1 << 20}  # tokens shuffled at once, at most: a killed training loses one block
CONFIG, WEIGHTS, CHECKPOINT = "cfg.json", "sae.safetensors", "checkpoint.safetensors"


@dataclass(frozen=True)
class Shape:
    """What is trained: blocks of the model, and the SAE of each."""

    layers: tuple[int, ...]
    width: int
    latents: int
    k: int


def shape_of(config: SaeTrainConfig, lm_config: Any, device: torch.device) -> Shape:
    """The SAEs that options ask for.

    Raises:
        NeuronSelectError: a block that the model lacks, fewer latents than k, or more than memory holds.
    """
    text = lm_config.get_text_config()
    layers = tuple(sorted({resolve_layer(layer, text.num_hidden_layers) for layer in config.layer}))
    latents = config.latents or config.expansion_factor * text.hidden_size
    if config.k > latents:
        raise NeuronSelectError(f"is more than the {latents} latents", option="k", value=config.k)
    # Encoder and decoder, with their gradients and two averages each.
    needed, there = 32 * latents * text.hidden_size * len(layers), _memory(device)
    if there is not None and needed > there:
        raise NeuronSelectError(
            f"training needs {needed / 1e9:,.0f} GB of memory, {device.type} has {there / 1e9:,.0f} GB: ask for fewer",
            option="expansion_factor" if config.latents is None else "latents", value=latents,
        )  # fmt: skip
    return Shape(layers, text.hidden_size, latents, config.k)


def _memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def train_on_rows(
    extraction: Extraction, lm_config: Any, data: Dataset | IterableDataset, pool: SourceRecord, config: SaeTrainConfig,
    *, note: Say,
) -> dict[str, SaeRecord]:  # fmt: skip
    """Train the SAEs and write them into ``config.out``, which the caller holds.

    A training that was killed goes on at its last checkpoint, in ``config.out``.

    Returns:
        The record of each SAE, by its folder's name.

    Raises:
        NeuronSelectError: too few rows, a full disk, a checkpoint of another training, or no finite activation.
    """
    assert extraction.model is not None
    place = place_of(extraction, None)
    assert isinstance(place, torch.device)
    shape = shape_of(config, lm_config, place)
    rows = _rows(extraction, data, pool, config)
    note(foresee(rows, shape.latents, shape.k, config.tokens))
    lm = causal_lm_of(extraction.spec, place)
    work = config.out / SAE_WORK
    checkpoint = work / CHECKPOINT
    resumed = checkpoint.is_file()
    started = time.monotonic()
    try:
        with _fast_products(place):
            stream, sites, saes = _fit(
                Backbone(lm), shape, rows, work, _identity(extraction, rows, config), config, note
            )
    finally:  # also when it is stopped: only a checkpoint is of use later
        for block in work.glob("block-*"):
            block.unlink()
        if not checkpoint.is_file():
            shutil.rmtree(work, ignore_errors=True)
    training = {
        "tokens": saes[0].seen, "rows": rows.rows, "distinct_tokens": rows.train.usable, "pool": plain(pool),
        "k": shape.k, "batch": saes[0].plan.batch, "lr": config.learning_rate, "seed": config.seed,
        "context": config.context, "dtype": extraction.options.dtype, "seconds": round(time.monotonic() - started),
        "resumed": resumed, "sinks_left_out": stream.counts.sinks, "not_finite": stream.counts.broken,
    }  # fmt: skip
    if stream.counts.broken:
        warnings.warn(
            f"{stream.counts.broken:,} tokens with NaN or infinite activations were left out: try dtype float32",
            NeuronSelectWarning, stacklevel=2,
        )  # fmt: skip
    made = work / "made"
    shutil.rmtree(made, ignore_errors=True)
    folders = [write_sae(made / site, sae) for site, sae in zip(sites, saes, strict=True)]
    note("measuring on rows that were not trained on")
    records = _measured(lm, folders, shape, rows, extraction.model, training, config)
    with writing(config.out, SAE) as new:
        for name, record in records.items():
            shutil.copytree(made / name, new / name)
            (new / name / SAE_RECORD).write_text(encode(record), encoding="utf-8")
            write_checksums(new / name, (*SAE_FILES, SAE_RECORD))
        write_card(new, SaeCard(_others(config.out) | records), before=config.out)
    shutil.rmtree(work, ignore_errors=True)
    return records


def _rows(
    extraction: Extraction, data: Dataset | IterableDataset, pool: SourceRecord, config: SaeTrainConfig
) -> SaeRows:
    limits = extraction.limits
    context = min(config.context, limits.positions or config.context)
    if context < config.context:
        warnings.warn(f"rows are cut into pieces of the model's {context} positions, not of context {config.context}",
                      NeuronSelectWarning, stacklevel=3)  # fmt: skip
    assert extraction.model is not None
    encoder = SampleEncoder(tokenizer_of(extraction.model), max_length=1 << 30, limits=Limits(None, limits.embeddings))
    return gather_rows(data, encoder, tokens=config.tokens, context=context, seed=config.seed, name=pool.id)


def _identity(extraction: Extraction, rows: SaeRows, config: SaeTrainConfig) -> str:
    return json.dumps([extraction.model_state(), config.context, rows.digest], sort_keys=True, default=str)


def _fit(
    backbone: Backbone, shape: Shape, rows: SaeRows, work: Path, identity: str, config: SaeTrainConfig, note: Say
) -> tuple[Activations, list[str], list[TopK]]:
    sites = [backbone.residual(layer) for layer in shape.layers]
    token_bytes = shape.width * next(backbone.decoder.parameters()).dtype.itemsize * len(sites)
    batch = config.batch or default_batch(config.tokens)
    longest = int(rows.train.lengths.max())
    block = int(config.buffer_gb * 1e9) // token_bytes - longest
    if block < batch:
        raise NeuronSelectError(
            f"holds {max(0, block + longest):,} tokens; at least {(batch + longest) * token_bytes / 1e9:.2g} are needed",
            option="buffer_gb", value=config.buffer_gb,
        )  # fmt: skip
    kind = backbone.device.type
    stream = Activations(
        backbone, sites, rows.train, block=min(block, config.tokens, _BLOCK.get(kind, 1 << 17)),
        batch=_FORWARD.get(kind, 8192), seed=config.seed, folder=work,
    )  # fmt: skip
    _check_room(work, 2 * 24 * shape.latents * shape.width * len(sites))
    plan = TopKPlan(shape.width, shape.latents, shape.k, config.tokens, batch, config.learning_rate, config.seed)
    checkpoint = work / CHECKPOINT
    if checkpoint.is_file():
        note("going on with the unfinished training in this folder")

    def report(progress: Progress) -> None:
        note(str(progress))

    saes = fit_saes(
        stream, [(i, plan) for i in range(len(sites))], checkpoint=checkpoint, identity=identity, report=report
    )
    return stream, [site.module for site in sites], saes


def _check_room(folder: Path, needed: int) -> None:
    """Refuse a disk without room for two checkpoints, of which one replaces the other."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NeuronSelectError(
            f"the disk has {free / 1e9:.2g} GB left beside the activations, checkpoints need {needed / 1e9:.2g} GB: make "
            "room, or ask for fewer latents", option="out", value=folder.parent.name,
        )  # fmt: skip


@contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """On a GPU, products of matrices in TF32 while training: the SAE's own noise is larger."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------------------------ files
def write_sae(folder: Path, sae: TopK) -> Path:
    """Write an SAE in eai-sparsify's format, in float16 where its values fit; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = sae.weights()
    half = {name: tensor.half() for name, tensor in weights.items()}
    fits = all(bool(tensor.isfinite().all()) for tensor in half.values())
    save_file(half if fits else weights, folder / WEIGHTS)
    plan = sae.plan
    config = {"activation": "topk", "d_in": plan.width, "num_latents": plan.latents, "k": plan.k,
              "expansion_factor": plan.latents // plan.width, "normalize_decoder": True, "multi_topk": False,
              "skip_connection": False, "transcode": False}  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config) + "\n")
    return folder


def _measured(
    lm: Any, folders: Sequence[Path], shape: Shape, rows: SaeRows, model: Source, training: Mapping[str, Any],
    config: SaeTrainConfig,
) -> dict[str, SaeRecord]:  # fmt: skip
    saes = [load_sae(folder, layer=layer) for folder, layer in zip(folders, shape.layers, strict=True)]
    more = _some(rows.train, HELD_TOKENS - rows.held_out.usable)
    kind = next(lm.parameters()).device.type
    figures = measure_saes(lm, saes, rows.held_out, batch=_MEASURED.get(kind, 2048), more=more)
    name = model.id if config.model else BUNDLED
    return {
        folder.name: SaeRecord(
            model=name,
            commit=model.commit,
            norms=norms_hash(model),
            layer=layer,
            **asdict(one),
            loss_recovered=one.loss_recovered,
            verdict=verdict_of(one.fvu, one.dead),
            training=dict(training),
        )  # fmt: skip
        for folder, layer, one in zip(folders, shape.layers, figures, strict=True)
    }


def _some(rows: TokenRows, tokens: int) -> TokenRows | None:
    """The first rows, of about so many tokens."""
    if tokens <= 0:
        return None
    count = int(np.searchsorted(np.cumsum(rows.lengths - rows.first), tokens)) + 1
    return rows.take(np.arange(min(count, len(rows))))


def _others(out: Path) -> dict[str, SaeRecord]:
    """Records of the SAEs that are in the folder already."""
    found = {}
    for path in sorted(out.glob(f"*/{SAE_RECORD}")):
        if record := read_record(path.parent, path.parent.name):
            found[path.parent.name] = record
    return found
