"""An extraction: options resolved against a model and SAE, from which every signal's identity follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core import bundled
from ..core.digests import sae_hash
from ..core.errors import NeuronSelectError
from ..core.options import AUTO, ExtractionOptions
from ..core.sources import Source, hub_commit, hub_errors
from ..models.backbone import resolve_layer
from ..models.checkpoint import check_runs, check_tokens, config_of, limits_of
from ..models.dtypes import auto_dtype
from ..models.find_sae import SHIPPED, FoundSae, find_saes, how_to_train, pick_sae
from ..models.loading import ModelSpec, tokenizer_of
from ..models.pin import pin_model
from ..models.sae import SparseAutoencoder
from ..models.sae_formats import download_sae, find_folder, load_sae
from ..models.sae_match import check_match
from ..rows.encode import Limits


@dataclass(frozen=True)
class Extraction:
    """Resolved options. Without a model only signals computed from the text alone can be had.

    Attributes:
        options: ``layer`` counts from 0 and ``dtype`` is never ``auto``.
        model, sae: pinned. sae_site: what the SAE reads, e.g. ``layers.30 output``. sae_k: latents it keeps by itself.
        encoder, mntp_adapter: pinned, if a signal needs them.
        limits: of the model. doubts: what speaks against the SAE, a sentence each. sae_found: where it is, if none was named.
    """

    options: ExtractionOptions
    model: Source | None = None
    sae: Source | None = None
    sae_site: str | None = None
    sae_k: int | None = None
    encoder: Source | None = None
    mntp_adapter: Source | None = None
    limits: Limits = Limits()
    doubts: tuple[str, ...] = ()
    sae_found: str = ""

    @property
    def spec(self) -> ModelSpec:
        """The model and how it is loaded.

        Raises:
            NeuronSelectError: there is no model.
        """
        if self.model is None:
            raise NeuronSelectError("name a model: this needs one", option="model")
        options = self.options
        return ModelSpec(self.model, options.dtype, options.quantize, options.attn_implementation)

    def rows_state(self) -> dict[str, Any]:
        """What moves how a row is read."""
        return {"row_format": self.options.row_format, "columns": sorted(self.options.columns.items())}

    def tokens_state(self) -> dict[str, Any]:
        """What moves a row's token ids."""
        options = self.options
        return self.rows_state() | {
            "model": None if self.model is None else self.model.key,
            "chat_template": options.chat_template,
            "max_length": options.max_length,
            "truncation_side": options.truncation_side,
        }

    def model_state(self) -> dict[str, Any]:
        """What moves every number that the model computes from token ids."""
        spec = self.spec
        return self.tokens_state() | {
            "dtype": spec.dtype,
            "quantize": spec.quantize,
            "attn_implementation": spec.attn_implementation,
        }

    def sae_state(self) -> str | None:
        return None if self.sae is None else self.sae.key


def resolve_extraction(
    options: ExtractionOptions, *, needs_sae: tuple[str, ...] = (), runs: bool = True, token: str | bool | None = None
) -> Extraction:
    """Pin the model and SAE of options, and check that they, and the tokenizer, fit.

    Args:
        needs_sae: signals that need an SAE. runs: whether a signal needs the model's weights.

    Raises:
        NeuronSelectError: something cannot be had, or does not fit, with the mend.
    """
    if options.model is None:
        if options.sae not in (None, AUTO):
            raise NeuronSelectError("belongs to a model: give --model, too", option="sae", value=options.sae)
        options = replace(options, model=str(bundled.MODEL), sae=str(bundled.SAE) if runs else None)
    assert options.model is not None
    source = pin_model(options.model, revision=options.revision, token=token)
    lm_config = config_of(source)
    if runs:
        check_runs(source, lm_config)
    limits = limits_of(lm_config)
    check_tokens(source, tokenizer_of(source), limits, options.chat_template)
    layer = resolve_layer(options.layer, lm_config.get_text_config().num_hidden_layers)
    options = replace(
        options, layer=layer, dtype=auto_dtype(lm_config, options.device) if options.dtype == AUTO else options.dtype
    )
    extraction = Extraction(options, source, limits=limits)
    if options.sae is None and not needs_sae:
        return extraction
    name, found = options.sae, None
    if name in (None, AUTO):
        found, layer = _found_sae(options, source, lm_config, needs_sae)
        name = found.sae[layer]
    assert name is not None and options.model is not None
    try:
        sae_source = resolve_sae(name, options.sae_revision, layer, token)
    except NeuronSelectError as cause:
        if options.sae != AUTO:
            raise
        raise NeuronSelectError(
            f"the catalogue names {name}, which cannot be had ({cause.message}); name another SAE with --sae, or "
            f"{_how_to_train(options, lm_config)}", option="sae", value=AUTO,
        ) from cause  # fmt: skip
    sae = load_sae(sae_source.location, layer=layer)
    made = with_sae(extraction, sae_source, sae, lm_config)
    if found is None:
        return made
    doubts = made.doubts or ((f"the SAE may not fit: {found.doubt}",) if found.doubt else ())
    return replace(made, doubts=doubts, sae_found=found.about(layer))


def _found_sae(
    options: ExtractionOptions, source: Source, lm_config: Any, needs_sae: Sequence[str]
) -> tuple[FoundSae, int]:
    """The SAE meant by ``auto`` or, where none is named, the one in the package: the SAE, and its layer.

    Raises:
        NeuronSelectError: there is none.
    """
    assert options.model is not None
    found = find_saes(source) if options.sae == AUTO else find_saes(source, (SHIPPED,))
    picked = pick_sae(found, options.layer)
    if picked is None and options.sae == AUTO:
        raise NeuronSelectError(
            f"no SAE of {source.id} is known; name one, or {_how_to_train(options, lm_config)}", option="sae",
            value=AUTO,
        )  # fmt: skip
    if picked is None:
        raise NeuronSelectError(
            f"{', '.join(needs_sae)} needs a sparse autoencoder of {options.model}: name one (a Hub id or folder), or "
            f"auto for one that `neuronselect sae find {options.model}` lists; or {_how_to_train(options, lm_config)}",
            option="sae",
        )  # fmt: skip
    return picked


def _how_to_train(options: ExtractionOptions, lm_config: Any) -> str:
    """As :func:`how_to_train`, for the pool and the layer of a command's options."""
    return how_to_train(str(options.model), lm_config, pool=getattr(options, "pool", None), layer=options.layer)


def with_sae(extraction: Extraction, source: Source, sae: SparseAutoencoder, lm_config: Any) -> Extraction:
    """The extraction with an SAE, checked against the model: width, base model, block, and K.

    Raises:
        NeuronSelectError: the SAE is of another model, width or block, or cannot keep K latents.
    """
    model, layer = extraction.model, extraction.options.layer
    assert model is not None
    width = lm_config.get_text_config().hidden_size
    if sae.d_in != width and "o_proj" not in sae.site.module:
        raise NeuronSelectError(
            f"the SAE reads vectors of {sae.d_in}, {model.id} has {width}: name an SAE of this model",
            option="sae",
            value=source.id,
        )
    sae.resolve_k(extraction.options.top_k_features)
    blocks = lm_config.get_text_config().num_hidden_layers
    doubts = [check_match(sae, model, blocks, source.id), sae.record.doubt if sae.record else ""]
    if sae.site.block not in (None, layer):
        doubts.append(
            f"the SAE reads block {sae.site.block}, layer says {layer}: mona follows the SAE, the other signals the layer; "
            f"pass layer={sae.site.block} to read one block"
        )
    site = f"{sae.site.module} {sae.site.io}"
    return replace(extraction, sae=source, sae_site=site, sae_k=sae.resolve_k(None), doubts=tuple(filter(None, doubts)))


def resolve_sae(sae: str, revision: str | None, layer: int, token: str | bool | None) -> Source:
    """An SAE by folder or Hub id, pinned.

    Raises:
        NeuronSelectError: it cannot be had.
    """
    path = Path(sae)
    if path.is_dir():
        folder = find_folder(path, layer)
        return Source(folder.name, f"content:{sae_hash(folder)}", str(folder.resolve()))
    if sae.startswith((".", "/", "~")) or "/" not in sae or ".." in sae.split("/"):
        raise NeuronSelectError(
            "no such folder, and not a Hub id (org/repo or org/repo/folder)", option="sae", value=sae
        )
    with hub_errors("sae", sae):
        root = download_sae(sae, revision=revision, layer=layer, token=token)
    folder = find_folder(root, layer)
    return Source(sae, hub_commit(folder), str(folder))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs between two states, in words: ``max_length 128 and 2048``."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return ", ".join(f"{name} {one.get(name)} and {other.get(name)}" for name in names)
