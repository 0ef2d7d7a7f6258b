"""Train a sparse autoencoder, or look at one."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from ..core import bundled
from ..core.configs import SaeInspectConfig, SaeTrainConfig
from ..core.folders import SAE
from ..models.sae_formats import find_folder, load_sae
from ..rows.load import load_rows
from .parts import Say, hold, quiet


def train_sae(config: SaeTrainConfig, *, say: Say = quiet) -> Path:
    """Train a TopK SAE on the rows of a pool.

    Returns:
        The SAE's folder.

    Raises:
        NeuronSelectError: eai-sparsify is not installed, or there are too few rows.
    """
    with hold(config.out, SAE):
        return _train(config, say)


def _train(config: SaeTrainConfig, say: Say) -> Path:
    from ..training.sae import train_on_rows  # torch and transformers: looking at an SAE does without them

    rows = load_rows(config.pool).data
    assert isinstance(rows, Dataset)
    if config.max_rows is not None:
        rows = rows.select(range(min(config.max_rows, len(rows))))
    folder, record = train_on_rows(
        config.model or str(bundled.MODEL),
        rows,
        config.out,
        layer=config.layer,
        expansion_factor=config.expansion_factor,
        k=config.k,
        context=config.context,
    )
    say(f"FVU {record['fvu']:.3f}, {record['dead']} of {record['latents']} latents dead, L0 {record['l0']:.1f} "
        f"-> {folder}")  # fmt: skip
    return folder


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
        "trained on": found.model_name or "not said",
        "dtype": str(found.W_enc.dtype).removeprefix("torch."),
    }
