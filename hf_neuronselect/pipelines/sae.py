"""Train sparse autoencoders, or look at one."""

from __future__ import annotations

from datasets import Dataset

from ..core import bundled
from ..core.configs import SaeInspectConfig, SaeTrainConfig
from ..core.folders import SAE
from ..core.options import ExtractionOptions
from ..core.sae_record import SaeRecord
from ..models.sae_formats import find_folder, load_sae
from ..rows.load import load_rows
from .parts import Say, hold, quiet


def train_sae(config: SaeTrainConfig, *, say: Say = quiet, note: Say = quiet) -> dict[str, SaeRecord]:
    """Train TopK SAEs on the rows of a pool, and write them into ``config.out``.

    Args:
        say: receives the verdicts. note: receives remarks and the progress.

    Returns:
        The record of each SAE, by its folder's name in ``config.out``.

    Raises:
        NeuronSelectError: bad input, found before the model runs wherever that is possible, or a full disk.
    """
    with hold(config.out, SAE):
        return _train(config, say, note)


def _train(config: SaeTrainConfig, say: Say, note: Say) -> dict[str, SaeRecord]:
    # torch and transformers: looking at an SAE does without them
    from ..models.checkpoint import config_of
    from ..signals.extraction import resolve_extraction
    from ..training.sae_train import train_on_rows

    extraction = resolve_extraction(
        ExtractionOptions(
            model=config.model or str(bundled.MODEL), revision=config.revision, dtype=config.dtype, device=config.device
        )
    )
    assert extraction.model is not None
    rows = load_rows(config.pool, streaming=config.streaming)
    data = rows.data
    if config.max_rows is not None:
        data = (
            data.select(range(min(config.max_rows, len(data))))
            if isinstance(data, Dataset)
            else data.take(config.max_rows)
        )
    records = train_on_rows(extraction, config_of(extraction.model), data, rows.source, config, note=note)
    for name, made in records.items():
        loss = "" if made.loss is None else f", loss {made.loss:.3f} -> {made.loss_with_sae:.3f} with it"
        say(
            f"{name}: {made.verdict} (FVU {made.fvu:.3f}, {100 * made.dead:.1f} % of {made.latents:,} latents dead{loss}) "
            f"-> {config.out / name}"
        )
    return records


def inspect_sae(config: SaeInspectConfig) -> dict[str, str]:
    """Facts about an SAE on disk, by name."""
    found = load_sae(find_folder(config.sae or bundled.SAE, config.layer), layer=config.layer)
    return {
        "format": found.format,
        "site": f"{found.site.io} of {found.site.module}",
        "latents": str(found.num_latents),
        "width": str(found.d_in),
        "activation": found.activation + (f", k = {found.k}" if found.k else ""),
        "b_dec subtracted": "yes" if found.b_pre is not None else "no",
        "input norm": str(found.input_norm),
        "decoder": "yes" if found.W_dec is not None else "no",
        "trained on": (found.record and found.record.model) or found.model_name or "not said",
        **({"verdict": found.record.verdict} if found.record and found.record.verdict else {}),
        "dtype": str(found.W_enc.dtype).removeprefix("torch."),
    }
