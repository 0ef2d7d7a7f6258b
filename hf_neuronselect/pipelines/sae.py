"""Train sparse autoencoders, find some, or look at one."""

from __future__ import annotations

from datasets import Dataset

from ..core import bundled
from ..core.errors import NeuronSelectError
from ..core.folders import SAE
from ..core.options import AUTO, ExtractionOptions
from ..core.sae_configs import SaeFindConfig, SaeInspectConfig, SaeTrainConfig
from ..core.sae_record import SaeRecord
from ..core.sources import Source
from ..explain.report import text_table
from ..models.backbone import resolve_layer
from ..models.checkpoint import config_of
from ..models.find_sae import SHIPPED, FoundSae, find_saes, how_to_train, pick_sae
from ..models.pin import pin_model
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


HEADER = ("use it with", "blocks", "format", "license", "where")


def find_sae(config: SaeFindConfig, *, say: Say = quiet) -> list[tuple[str, ...]]:
    """List the SAEs of a model, or say how to train one; :data:`HEADER` names the columns.

    Raises:
        NeuronSelectError: no such folder, or no block of that number.
    """
    lm_config, seen = None, ""
    try:
        source = pin_model(config.model, revision=config.revision, token=None)
        lm_config = config_of(source)
    except NeuronSelectError as cause:  # what is published is known without the model itself
        if config.model.count("/") != 1 or config.model.startswith((".", "/", "~")):
            raise
        source, seen = Source(config.model, config.revision or "main", config.model), cause.message
    found = find_saes(source)
    layer = config.layer
    if lm_config is not None:
        layer = resolve_layer(layer, lm_config.get_text_config().num_hidden_layers)
    elif layer < 0:  # most have an SAE for every block
        layer += 1 + max((max(one.sae) for one in found), default=-layer)
    picked = pick_sae(found, layer)
    lines = [_line(one, layer) for one in found]
    if seen:
        say(f"{config.model} itself could not be read ({seen}); this is what is known by its name.")
    if lines:
        say(text_table(HEADER, lines))
        if picked is not None and picked[0].place != SHIPPED:
            say(f"--sae auto takes {picked[0].sae[picked[1]]}.")
        for one in found:
            if one.doubt:
                say(f"It may not fit: {one.doubt}.")
    else:
        say(f"No SAE of {config.model} is known; name one with --sae, or {how_to_train(config.model, lm_config)}.")
    return lines


def _line(one: FoundSae, layer: int) -> tuple[str, ...]:
    blocks = sorted(one.sae)
    several = len(blocks) > 2 and blocks == list(range(blocks[0], blocks[-1] + 1))
    flag = AUTO if one.place == SHIPPED else one.sae[one.nearest(layer)]
    listed = f"{blocks[0]}-{blocks[-1]}" if several else ", ".join(map(str, blocks))
    return f"--sae {flag}", listed, one.format, one.license, one.place


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
