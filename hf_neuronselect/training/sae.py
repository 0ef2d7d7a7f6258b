"""Train a TopK SAE on a block of a causal LM, through eai-sparsify (extra ``[sae]``)."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..core.digests import SAE_FILES
from ..core.errors import NeuronSelectError
from ..core.folders import SAE
from ..core.progress import track
from ..core.seals import write_checksums
from ..core.writing import put, writing
from ..hub.cards import SaeCard, write_card
from ..models.backbone import Backbone
from ..models.batching import TokenBatch
from ..models.sae import SparseAutoencoder
from ..models.sae_formats import load_sae
from ..rows.encode import Sample, SampleEncoder
from ..rows.formats import read_row, row_format

logger = logging.getLogger(__name__)


def packed_rows(token_ids: Iterable[Sequence[int] | np.ndarray], bos: int | None, context: int) -> np.ndarray:
    """Concatenate documents and cut them into rows of ``context`` tokens, each starting with BOS.

    Returns:
        int64 ``[rows, context]``; the remainder that fills no row is dropped.
    """
    body = context if bos is None else context - 1
    flat = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids])
    rows = flat[: len(flat) // body * body].reshape(-1, body)
    return rows if bos is None else np.concatenate([np.full((len(rows), 1), bos), rows], axis=1)


def train_sae(
    model: str,
    rows: np.ndarray,
    out: str | Path,
    *,
    layer: int = -2,
    expansion_factor: int = 32,
    k: int = 32,
    batch_tokens: int = 4096,
    auxk_alpha: float = 1 / 32,
    dead_after_tokens: int = 500_000,
    lr: float | None = None,
    exclude_tokens: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Train an SAE on the output of a block and save it in sparsify format as ``out/<blocks>.<layer>``.

    Args:
        model: folder or Hub id. rows: int64 ``[N, context]`` token ids (see :func:`packed_rows`).
        expansion_factor: latents as a multiple of the model's width. k: latents kept of a token.
        exclude_tokens: ids left out of training (a BOS attention sink can be most of the variance).

    Returns:
        The SAE's folder.

    Raises:
        NeuronSelectError: eai-sparsify is not installed, or there are too few rows.
    """
    try:
        from sparsify import SaeConfig, TrainConfig, Trainer
    except ImportError as cause:
        raise NeuronSelectError("training an SAE needs eai-sparsify: pip install 'hf-neuronselect[sae]'") from cause
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=False).eval()
    backbone = Backbone(lm)
    number = backbone.layer(layer)
    hookpoint = backbone.residual(number).module
    # Deeper blocks are never read: drop them, so that training only runs the prefix.
    setattr(lm.base_model, backbone.blocks_name, backbone.blocks[: number + 1])
    lm.base_model.config.use_cache = False
    context = rows.shape[1]
    batch = max(1, batch_tokens // context)
    if len(rows) < 2 * batch:
        raise NeuronSelectError(
            f"{len(rows)} rows of {context} tokens are too few; at least {2 * batch} are needed", option="rows",
            value=len(rows),
        )  # fmt: skip
    dataset = Dataset.from_dict({"input_ids": list(rows)}).with_format("torch")
    out = Path(out)
    with tempfile.TemporaryDirectory() as work:
        config = TrainConfig(
            SaeConfig(expansion_factor=expansion_factor, k=k),
            batch_size=batch,
            hookpoints=[hookpoint],
            auxk_alpha=auxk_alpha,
            dead_feature_threshold=dead_after_tokens,
            lr=lr,
            exclude_tokens=list(exclude_tokens),
            save_every=10**9,
            save_dir=work,
            run_name="sae",
            log_to_wandb=False,
        )
        with (
            contextlib.redirect_stdout(io.StringIO()) as said,
            contextlib.redirect_stderr(io.StringIO()),  # its own bar, which floods a log
            track("sae train", len(rows)) as progress,
        ):
            trainer = Trainer(config, dataset, lm.base_model)
            progress.read(len(rows), rows.size)
            lm.base_model.register_forward_hook(lambda *_: progress.advance(batch * context))
            trainer.fit()
            progress.done(len(rows))
        logger.info("%s", " | ".join(said.getvalue().split("\n")))
        target = out / hookpoint
        next(iter(trainer.saes.values())).save_to_disk(target)
    return target


def measure_sae(model: str, sae: SparseAutoencoder | str, rows: np.ndarray, *, batch_rows: int = 16) -> dict[str, Any]:
    """Measure how well an SAE reconstructs held-out rows, without the first token (BOS) of each row.

    Returns:
        ``fvu`` (fraction of variance unexplained), ``dead`` (latents that never fire), ``latents``, ``tokens``, ``l0``
        (mean active latents), ``first_token_norm_ratio`` (norm of the first token over that of the others).
    """
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
    backbone = Backbone(lm)
    sae = load_sae(sae) if isinstance(sae, str) else sae
    decoder = sae
    encoder = sae.to("cpu", torch.float32)
    fired = torch.zeros(sae.num_latents, dtype=torch.bool)
    squares = error = tokens = active = 0.0
    total, first_norm, other_norm = torch.zeros(sae.d_in, dtype=torch.float64), 0.0, 0.0
    for block in _blocks(rows, batch_rows):
        samples = [Sample(ids, np.ones(len(ids), bool), (0, len(ids) - 1), len(ids)) for ids in block]
        batch = TokenBatch.of(samples, 0, torch.device("cpu"))
        seen: list[torch.Tensor] = []

        def observe(hidden: torch.Tensor, seen: list[torch.Tensor] = seen) -> None:
            seen.append(hidden.clone())

        backbone.run(batch, [(sae.site, observe)])
        hidden = seen[0].float()
        first_norm += hidden[:, 0].norm(dim=-1).sum().item()
        x = hidden[:, 1:].reshape(-1, sae.d_in)
        other_norm += x.norm(dim=-1).sum().item()
        values, indices = encoder.encode(x)
        if indices is None:
            raise NeuronSelectError("only top-k SAEs can be measured", option="sae")
        fired[indices[values > 0]] = True
        error += (x - decoder.decode(values, indices)).double().pow(2).sum().item()
        squares += x.double().pow(2).sum().item()
        total += x.double().sum(dim=0)
        tokens += len(x)
        active += (values > 0).sum().item()
    variance = squares - (total.pow(2).sum() / tokens).item()
    return {
        "fvu": error / variance,
        "dead": int((~fired).sum()),
        "latents": sae.num_latents,
        "tokens": int(tokens),
        "l0": active / tokens,
        "first_token_norm_ratio": (first_norm / len(rows)) / (other_norm / tokens),
    }


def _blocks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def train_on_rows(
    model: str, rows: Dataset, out: str | Path, *, context: int = 512, **options: Any
) -> tuple[Path, dict[str, Any]]:
    """Train an SAE on rows of any format, measure it on the last 2 % and save ``training.json`` beside it."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    encoder = SampleEncoder(tokenizer, max_length=1 << 30)
    fmt = row_format(rows.column_names)
    samples = encoder.encode([read_row(row, fmt) for row in rows.select_columns(fmt.used)])
    usable = [sample.input_ids for sample in samples if not sample.skip]
    if not usable:
        raise NeuronSelectError(f"no row can be used ({samples[0].skip})", option="pool")
    packed = packed_rows(usable, tokenizer.bos_token_id, context)
    held_out = max(1, len(packed) // 50)
    with tempfile.TemporaryDirectory(prefix="neuronselect-") as work:
        folder = train_sae(model, packed[:-held_out], work, **options)
        record = measure_sae(model, str(folder), packed[-held_out:])
        with writing(Path(out), SAE) as new:
            shutil.copytree(folder, new / folder.name)
            put(new / folder.name / "training.json", json.dumps(record, indent=1) + "\n")
            write_checksums(new / folder.name, SAE_FILES)
            name = Path(model).resolve().name if Path(model).is_dir() else model
            write_card(new, SaeCard(name, folder.name, record), before=Path(out))
    return Path(out) / folder.name, record
