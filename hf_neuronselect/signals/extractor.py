"""NeuronFeatureExtractor: a plain callable for ``Dataset.map`` that adds neuron features to rows."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Features, List
from datasets.utils._dill import pklregister
from transformers import AutoConfig

from ..core import bundled
from ..core.errors import NeuronSelectError, NeuronSelectWarning, one_of
from ..core.options import ExtractionOptions, part_of
from ..core.sources import Source, commit_of, content_hash, hub_errors, resolve
from ..models.backbone import Backbone, resolve_layer
from ..models.batching import TokenBatch, plan_batches
from ..models.sae import SparseAutoencoder
from ..models.sae_formats import download_sae, find_folder, load_sae
from ..rows.encode import Sample
from ..rows.formats import Conversation, read_row, row_format, rows_of
from .columns import BOOKKEEPING
from .config import DTYPES, ExtractorConfig
from .forward import DRIFTS, FEATURES, Directions, Feature, FeatureOptions, Projection, column_types
from .loading import DEVICE_MAPS, Place, Runtime, load_runtime, remember, sample_encoder

logger = logging.getLogger(__name__)


class NeuronFeatureExtractor:
    """Adds feature columns to a batch of rows: ``dataset.map(extractor, batched=True)``.

    It is a plain callable. It pickles without weights and, for ``datasets``' fingerprints, as the
    values that change a number and nothing else, so a cache hit takes milliseconds in any process.
    Weights are loaded at the first batch, once a process and device.

    Make one with :meth:`from_pretrained` or :meth:`from_model`.
    """

    def __init__(
        self,
        config: ExtractorConfig,
        *,
        device: str = "auto",
        device_map: str | Mapping[str, Any] | None = None,
        batch_tokens: int | str = "auto",
    ) -> None:
        self.config = config
        self.device = device
        self.device_map = _device_map(device_map, device, config)
        self.batch_tokens = _batch_tokens(batch_tokens)

    # ------------------------------------------------------------------------------ construction
    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        sae: str | None = None,
        layer: int = -2,
        features: Iterable[str] = ("mona",),
        top_k_features: int | None = None,
        pool_tokens: str = "all",
        pool: str = "mean",
        site: str = "residual",
        drift: str = "endpoints",
        max_length: int = 2048,
        truncation_side: str = "right",
        row_format: str = "auto",
        columns: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        dtype: str = "auto",
        value_dtype: str = "float16",
        quantize: str | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        sae_revision: str | None = None,
        token: str | bool | None = None,
        device: str = "auto",
        device_map: str | Mapping[str, Any] | None = None,
        batch_tokens: int | str = "auto",
    ) -> NeuronFeatureExtractor:
        """An extractor for a model (and SAE) on the Hub or in a local folder.

        Args:
            model: Hub id or folder of a causal LM, or of a PEFT adapter. Read with
                ``trust_remote_code=False``.
            sae: Hub id (``org/repo`` or ``org/repo/folder``) or folder of an SAE; needed by ``mona``.
            layer: 0-based block, negative from the end; -2 is the penultimate (both papers').
            features: any of ``mona``, ``nait``, ``polysemantic``, ``hidden``, ``routing``, ...; one pass computes all.
            top_k_features: K latents a token keeps; None is the SAE's own (MoNA: 192).
            pool_tokens: tokens averaged: ``all``, ``no_special``, ``assistant``, ``user``.
            pool: ``mean``, or ``sum`` (MoNA, appendix D.5).
            site: what ``nait`` reads: ``residual`` or ``mlp``. drift: ``endpoints``, ``mean``, ``per_token``.
            max_length: tokens kept of a row. truncation_side: the side cut.
            row_format: ``auto``, ``messages``, ``prompt``, ``alpaca``, ``sharegpt``, ``text``.
            columns: a format's column -> the data's column.
            chat_template: overrides the tokenizer's.
            dtype: ``auto`` (the checkpoint's on a GPU, float32 on a CPU), ``float32``, ``bfloat16``, ``float16``.
            value_dtype: of sparse values: ``float16`` or ``float32``. Dense features are always float32.
            quantize: ``4bit`` or ``8bit`` (needs bitsandbytes).
            revision, sae_revision: branch, tag or commit. token: Hub token; never stored.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
            device_map: for a prefix larger than one GPU: ``auto``, ``balanced``, ``balanced_low_0``, ``sequential``, or
                a dict of module name -> device, as in transformers' ``from_pretrained``; instead of ``device``, in one
                process. It is no part of the hash, as ``device`` is none.
            batch_tokens: padded tokens a batch, or ``auto``.

        Raises:
            NeuronSelectError: anything above that cannot be, with the mend.
        """
        source = resolve(model, revision=revision, token=token, option="model")
        with hub_errors("model", model):
            lm_config = _lm_config(source)
        sae_source = None
        names = _feature_names(features)
        num_layers = lm_config.get_text_config().num_hidden_layers
        resolved = resolve_layer(layer, num_layers)
        if sae is not None:
            sae_source = _resolve_sae(sae, sae_revision, resolved, token)
        elif any(FEATURES[name].needs_sae for name in names):
            raise NeuronSelectError(
                f"needed by {', '.join(n for n in names if FEATURES[n].needs_sae)}: name a sparse autoencoder "
                "(a Hub id or folder) of the model's base",
                option="sae",
            )
        config = ExtractorConfig(
            model=source,
            sae=sae_source,
            features=names,
            options=_options(resolved, top_k_features, pool, site, drift, value_dtype),
            pool_tokens=pool_tokens,
            max_length=max_length,
            truncation_side=truncation_side,
            row_format=row_format,
            columns=tuple(sorted((columns or {}).items())),
            chat_template=chat_template,
            dtype=_resolve_dtype(dtype, lm_config, device),
            quantize=None if quantize is None else one_of(quantize, ("4bit", "8bit"), "quantize"),
            attn_implementation=attn_implementation,
        )
        extractor = cls(config, device=device, device_map=device_map, batch_tokens=batch_tokens)
        if sae_source is not None:
            extractor._check_sae(load_sae(sae_source.location, layer=resolved), lm_config)
        return extractor

    @classmethod
    def from_options(
        cls, options: ExtractionOptions, features: Iterable[str], *, token: str | bool | None = None
    ) -> NeuronFeatureExtractor:
        """An extractor by its options; without a model, of the bundled model and SAE."""
        values = part_of(options, ExtractionOptions)
        values["pool"] = values.pop("pooling")
        model = values.pop("model")
        if model is None:
            if options.sae is not None:
                raise NeuronSelectError("belongs to a model: name it with model", option="sae", value=options.sae)
            model, values["sae"] = str(bundled.MODEL), str(bundled.SAE)
        return cls.from_pretrained(model, features=features, token=token, **values)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        sae: SparseAutoencoder | str | None = None,
        layer: int = -2,
        features: Iterable[str] = ("mona",),
        top_k_features: int | None = None,
        pool_tokens: str = "all",
        pool: str = "mean",
        site: str = "residual",
        drift: str = "endpoints",
        max_length: int = 2048,
        truncation_side: str = "right",
        row_format: str = "auto",
        columns: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        value_dtype: str = "float16",
        batch_tokens: int | str = "auto",
    ) -> NeuronFeatureExtractor:
        """An extractor around a model that lives in memory (it is left as it is, in its dtype and device).

        Its identity is a hash of the state dict, taken once here. It cannot be sent to other
        processes: save the model and use :meth:`from_pretrained` for ``num_proc``.

        Args:
            model: a causal LM in eval mode. tokenizer: its tokenizer. sae: a loaded SAE or a folder.
            Others as in :meth:`from_pretrained`.
        """
        parameter = next(model.parameters())
        lm_config = model.config
        resolved = resolve_layer(layer, lm_config.get_text_config().num_hidden_layers)
        digest = state_hash(model.state_dict().items())
        sae_source, names = None, _feature_names(features)
        if isinstance(sae, SparseAutoencoder):
            tensors = [("W_enc", sae.W_enc), ("b_enc", sae.b_enc), ("b_pre", sae.b_pre), ("threshold", sae.threshold)]
            parts = state_hash((name, t) for name, t in tensors if t is not None)
            about = f"{sae.site}{sae.activation}{sae.k}{sae.input_norm}"
            sae_source = Source("in-memory", f"state:{parts}{hashlib.blake2b(about.encode()).hexdigest()[:8]}", "")
        elif sae is not None:
            sae_source = _resolve_sae(sae, None, resolved, None)
            sae = load_sae(sae_source.location, layer=resolved)
        elif any(FEATURES[name].needs_sae for name in names):
            raise NeuronSelectError("needed by mona: pass a SparseAutoencoder or a folder", option="sae")
        config = ExtractorConfig(
            model=Source(getattr(lm_config, "name_or_path", "") or "in-memory", f"state:{digest}", ""),
            sae=sae_source,
            features=names,
            options=_options(resolved, top_k_features, pool, site, drift, value_dtype),
            pool_tokens=pool_tokens,
            max_length=max_length,
            truncation_side=truncation_side,
            row_format=row_format,
            columns=tuple(sorted((columns or {}).items())),
            chat_template=chat_template,
            dtype=str(parameter.dtype).removeprefix("torch."),
            quantize=None,
            attn_implementation=getattr(lm_config, "_attn_implementation", None),
        )
        extractor = cls(config, device=str(parameter.device), batch_tokens=batch_tokens)
        if isinstance(sae, SparseAutoencoder):
            extractor._check_sae(sae, lm_config)
            sae = sae.to(parameter.device, parameter.dtype)
        remember(config.model.commit, model, tokenizer)
        extractor._runtime = Runtime(tokenizer, sample_encoder(config, tokenizer), Backbone(model), sae)
        return extractor

    _runtime: Runtime | None = None  # only of an in-memory model
    _budget: int | None = None  # tokens a batch, once memory ran out at more

    def with_features(self, features: Iterable[str], directions: Directions | None = None) -> NeuronFeatureExtractor:
        """The same extractor computing other features; weights already loaded are shared.

        Args:
            directions: of a capability (``selector.directions()``): besides the features, one number per block
                and capability, which is all its score needs.
        """
        config = replace(self.config, features=_feature_names(features), directions=directions)
        other = NeuronFeatureExtractor(
            config, device=self.device, device_map=self.device_map, batch_tokens=self.batch_tokens
        )
        if self._runtime is not None:
            encoder = sample_encoder(other.config, self._runtime.tokenizer)
            other._runtime = replace(self._runtime, encoder=encoder)
        if self.config.sae is None and any(FEATURES[n].needs_sae for n in other.config.features):
            raise NeuronSelectError("needed by mona: make the extractor with sae=", option="sae")
        return other

    # ------------------------------------------------------------------------- identity, pickling
    @property
    def features(self) -> tuple[str, ...]:
        """The feature names, in the order asked for."""
        return self.config.features

    @property
    def hash(self) -> str:
        """16 hex digits of everything that changes a column's numbers (which columns are made does not)."""
        numbers = self.config.numbers()
        del numbers["features"]
        numbers.pop("directions", None)
        return hashlib.blake2b(json.dumps(numbers, sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def column_types(self) -> Features:
        """The ``datasets`` types of the columns added; pass ``features=`` of them to ``IterableDataset.map``."""
        return column_types(self.config.features, self.config.options, self.config.directions)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.config, self.device, self.device_map, self.batch_tokens)

    def __repr__(self) -> str:
        sae = f", sae={self.config.sae.id!r}" if self.config.sae else ""
        names = ", ".join(self.config.features)
        return f"NeuronFeatureExtractor({self.config.model.id!r}{sae}, features=[{names}], hash={self.hash})"

    # -------------------------------------------------------------------------------- the callable
    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, Any]:
        """Feature columns of a batch (columns of equal length) or of a single row.

        Args:
            batch: dict of columns, or of one row's values.
            rank: shard index (``with_rank=True``); picks the GPU ``cuda:{rank % count}``.

        Returns:
            The feature columns (see :mod:`.columns`), numpy, in the batch's order. ``Dataset.map``
            merges them with the row's own.

        Raises:
            NeuronSelectError: unknown columns; a feature column's name is taken in the data.
            TypeError: ``rank`` is no int (``with_indices=True`` puts indices there).
        """
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
            raise TypeError(f"rank must be an int or None, got {type(rank).__name__}: use with_rank=True, not indices")
        if taken := [name for name in self.column_types if name in batch]:
            raise NeuronSelectError(
                f"the data already has the column {taken[0]!r}; remove or rename it"
                + (" (several features come from ONE extractor: features=[...])" if taken[0] in BOOKKEEPING else "")
            )
        fmt = row_format(batch, self.config.row_format, dict(self.config.columns))
        single = _is_single(batch[fmt.used[0]])
        columns = {name: [batch[name]] if single else batch[name] for name in fmt.used}
        conversations = [read_row(row, fmt) for row in rows_of(columns)]
        result = self.extract(conversations, rank)
        return {name: column[0] for name, column in result.items()} if single else result

    def extract(self, conversations: Sequence[Conversation], rank: int | None = None) -> dict[str, Any]:
        """Feature columns of rows already read; one entry a row, in order. See :meth:`__call__`."""
        return self.compute(self.tokenize(conversations), rank)

    def tokenize(self, conversations: Sequence[Conversation]) -> list[Sample]:
        """Rows to token ids and spans: the half of :meth:`extract` that needs no model and may run in a thread."""
        return self.runtime(weights=False).encoder.encode(conversations)

    def compute(self, samples: Sequence[Sample], rank: int | None = None) -> dict[str, Any]:
        """Feature columns of tokenised rows: the other half of :meth:`extract`."""
        columns: dict[str, Any] = {name: _blanks(kind, len(samples)) for name, kind in self.column_types.items()
                                   if name not in BOOKKEEPING}  # fmt: skip
        skips = [sample.skip for sample in samples]
        if columns:
            self._run_model(samples, columns, skips, rank)
        return columns | {
            "n_tokens": np.asarray([len(sample.input_ids) for sample in samples], dtype=np.int32),
            "truncated": np.asarray([sample.truncated for sample in samples], dtype=bool),
            "neuron_skip": skips,
            "neuron_extractor": [self.hash] * len(samples),
        }

    def _run_model(
        self, samples: Sequence[Sample], columns: dict[str, Any], skips: list[str], rank: int | None
    ) -> None:
        usable = [i for i, sample in enumerate(samples) if not sample.skip]
        if not usable:
            return
        self._fill(samples, usable, columns, self.runtime(rank))
        broken = _not_finite(columns, usable)
        config = self.config
        if broken and config.dtype != "float32" and config.quantize is None and self._runtime is None:
            warnings.warn(
                f"{len(broken)} of {len(usable)} rows (the first of them is row {min(broken)} of its batch) overflow in "
                f"{config.dtype} and are computed again in float32",
                NeuronSelectWarning,
                stacklevel=4,
            )
            wide = load_runtime(replace(config, dtype="float32"), self._device(rank), weights=True)
            self._fill(samples, sorted(broken), columns, wide)
            broken = _not_finite(columns, sorted(broken))
        for i, name in broken.items():
            skips[i] = f"error: NaN or infinite activations ({name}); try dtype float32, value_dtype float32"
            for column in columns.values():
                column[i] = column[i][:0]

    def _fill(self, samples: Sequence[Sample], rows: Sequence[int], columns: dict[str, Any], runtime: Runtime) -> None:
        """Run the model over some rows, by batches of the token budget, and fill their features in."""
        backbone = runtime.backbone
        assert backbone is not None
        budget = self.token_budget(backbone)
        config = self.config
        features: list[Feature] = [FEATURES[name](backbone, runtime.sae, config.options) for name in config.features]
        if config.directions is not None:
            features.append(Projection(backbone, config.options, config.directions))
        lengths = [len(samples[i].input_ids) for i in rows]
        waiting = [[rows[j] for j in plan] for plan in plan_batches(lengths, budget)][::-1]
        while waiting:
            chosen = waiting.pop()
            try:
                found = _forward([samples[i] for i in chosen], backbone, features)
            except (MemoryError, RuntimeError) as cause:
                if not _out_of_memory(cause):
                    raise
                if len(chosen) == 1:
                    raise NeuronSelectError(
                        f"one row of {len(samples[chosen[0]].input_ids)} tokens does not fit into memory: lower it, or "
                        "use a smaller dtype or a larger device", option="max_length", value=self.config.max_length,
                    ) from cause  # fmt: skip
                budget = max(1, sum(len(samples[i].input_ids) for i in chosen) // 2)
                self._budget = budget
                warnings.warn(
                    f"out of memory: going on with batches of {budget} tokens", NeuronSelectWarning, stacklevel=5
                )
                if backbone.device.type == "cuda":
                    torch.cuda.empty_cache()
                left = sorted([i for rest in waiting for i in rest] + chosen)
                lengths = [len(samples[i].input_ids) for i in left]
                waiting = [[left[j] for j in plan] for plan in plan_batches(lengths, budget)][::-1]
                continue
            for name, values in found.items():
                column = columns[name]
                for row, value in zip(chosen, values, strict=True):
                    column[row] = value

    def token_budget(self, backbone: Backbone) -> int:
        """Padded tokens of a batch: what was asked for, what fits the machine, or less once memory ran out."""
        return self._budget or (_auto_budget(backbone) if self.batch_tokens == "auto" else int(self.batch_tokens))

    # ------------------------------------------------------------------------------------ loading
    def _device(self, rank: int | None) -> Place:
        if self.device_map is not None:
            if rank:
                raise NeuronSelectError(
                    "spreads one model over all devices, so several workers cannot have one each: leave with_rank and "
                    "num_proc away",
                    option="device_map",
                    value=self.device_map,
                )
            return self.device_map
        if self.device == "auto" or self.device == "cuda":
            if torch.cuda.is_available():
                return torch.device("cuda", (rank or 0) % torch.cuda.device_count())
            if self.device == "auto" and torch.backends.mps.is_available():
                return torch.device("mps")
            if self.device == "cuda":
                raise NeuronSelectError("no CUDA device is available; use cpu", option="device", value="cuda")
            return torch.device("cpu")
        return torch.device(self.device)

    def runtime(self, rank: int | None = None, *, weights: bool = True) -> Runtime:
        """The loaded parts (tokenizer, model prefix, SAE), from the process' cache or from disk."""
        return self._runtime or load_runtime(self.config, self._device(rank), weights=weights)

    def _check_sae(self, sae: SparseAutoencoder, lm_config: Any) -> None:
        """Width and base model of the SAE against the LM's; the K it can keep."""
        assert self.config.sae is not None
        width = lm_config.get_text_config().hidden_size
        if sae.d_in != width and "o_proj" not in sae.site.module:
            raise NeuronSelectError(
                f"the SAE reads vectors of {sae.d_in}, {self.config.model.id} has {width}: it belongs to another model",
                option="sae",
                value=self.config.sae.id,
            )
        sae.resolve_k(self.config.options.top_k)
        layer = self.config.options.layer
        if sae.site.block not in (None, layer):
            warnings.warn(
                f"the SAE reads block {sae.site.block}, layer says {layer}: mona follows the SAE, the other features "
                f"the layer; pass layer={sae.site.block} to read one block",
                NeuronSelectWarning,
                stacklevel=3,
            )
        told = (sae.model_name or "").rsplit("/", 1)[-1].lower()
        if (
            told
            and told not in self.config.model.id.lower()
            and self.config.model.id.rsplit("/", 1)[-1].lower() != told
        ):
            warnings.warn(
                f"the SAE was trained on {sae.model_name}, the model is {self.config.model.id}: its features may not fit",
                NeuronSelectWarning,
                stacklevel=3,
            )


def _rebuild(
    config: ExtractorConfig, device: str, device_map: str | dict[str, Any] | None, batch_tokens: int | str
) -> NeuronFeatureExtractor:
    return NeuronFeatureExtractor(config, device=device, device_map=device_map, batch_tokens=batch_tokens)


@pklregister(NeuronFeatureExtractor)
def _fingerprint(pickler: Any, extractor: NeuronFeatureExtractor) -> None:
    """Only for ``datasets``' fingerprints: device and batch size change no number."""
    pickler.save_reduce(_rebuild, (json.dumps(extractor.config.numbers(), sort_keys=True),), obj=extractor)


def state_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of named tensors: names, dtypes, shapes and bytes; 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _feature_names(features: Iterable[str]) -> tuple[str, ...]:
    if isinstance(features, str):
        features = [features]
    names = tuple(dict.fromkeys(features))
    for name in names:
        FEATURES[name]
    return names


def _options(layer: int, top_k: int | None, pool: str, site: str, drift: str, value_dtype: str) -> FeatureOptions:
    if top_k is not None and top_k < 1:
        raise NeuronSelectError("must be at least 1", option="top_k_features", value=top_k)
    return FeatureOptions(
        layer=layer,
        top_k=top_k,
        pool=one_of(pool, ("mean", "sum"), "pool"),
        site=one_of(site, ("residual", "mlp"), "site"),
        drift=one_of(drift, DRIFTS, "drift"),
        value_dtype=one_of(value_dtype, ("float16", "float32"), "value_dtype"),
    )


def _batch_tokens(value: int | str) -> int | str:
    if value == "auto":
        return value
    if not isinstance(value, int) or value < 1:
        raise NeuronSelectError("must be 'auto' or at least 1", option="batch_tokens", value=value)
    return value


def _lm_config(source: Source) -> Any:
    adapter = Path(source.location) / "adapter_config.json"
    if adapter.is_file() and not (Path(source.location) / "config.json").is_file():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return AutoConfig.from_pretrained(base, trust_remote_code=False)
    try:
        return AutoConfig.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    except (ValueError, OSError) as cause:
        if isinstance(cause, NeuronSelectError):
            raise
        reason = " ".join(str(cause).split())[:300]
        raise NeuronSelectError(
            f"not a model transformers can load: {reason}", option="model", value=source.id
        ) from cause


def _resolve_sae(sae: str, revision: str | None, layer: int, token: str | bool | None) -> Source:
    path = Path(sae)
    if path.is_dir():
        folder = find_folder(path, layer)
        return Source(folder.name, f"content:{content_hash(folder)}", str(folder.resolve()))
    if sae.startswith((".", "/", "~")) or "/" not in sae or ".." in sae.split("/"):
        raise NeuronSelectError(
            "no such folder, and not a Hub id (org/repo or org/repo/folder)", option="sae", value=sae
        )
    with hub_errors("sae", sae):
        root = download_sae(sae, revision=revision, layer=layer, token=token)
    folder = find_folder(root, layer)
    return Source(sae, commit_of(folder), str(folder))


def _device_map(
    value: str | Mapping[str, Any] | None, device: str, config: ExtractorConfig
) -> str | dict[str, Any] | None:
    if value is None:
        return None
    if config.model.commit.startswith("state:"):
        raise NeuronSelectError("a model in memory stays where it is", option="device_map", value=value)
    if device != "auto":
        raise NeuronSelectError(f"stands instead of device, which is {device}", option="device_map", value=value)
    return dict(value) if isinstance(value, Mapping) else one_of(value, DEVICE_MAPS, "device_map")


def _auto_budget(backbone: Backbone) -> int:
    """Padded tokens a batch: on a CPU what keeps an MLP's activations in the caches (measured best at 1-2 M elements)."""
    if backbone.device.type != "cpu":
        return 32768
    width = getattr(backbone.config.get_text_config(), "intermediate_size", None) or 4 * backbone.hidden_size
    return max(512, min(4096, (1 << 20) // width))


def _resolve_dtype(dtype: str, lm_config: Any, device: str) -> str:
    one_of(dtype, ("auto", *DTYPES), "dtype")
    if dtype != "auto":
        return dtype
    stored = str(getattr(lm_config, "dtype", None) or "float32").removeprefix("torch.")
    stored = stored if stored in DTYPES else "float32"
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return stored
    # On a CPU bf16 is faster where matrix units do it, but its rounding depends on the batch's shape:
    # a score would move with the batch size. It is there for those who ask for it.
    return "float32"


def _forward(samples: Sequence[Sample], backbone: Backbone, features: Sequence[Any]) -> dict[str, Any]:
    """One batch through the model: column name -> its rows' values."""
    pad = 0  # any id the embeddings hold: a pad token may be newer than they are, and nothing ever sees it
    batch = TokenBatch.of(samples, pad, backbone.device)
    observers, finishers = [], []
    for feature in features:
        asked, finish = feature.start(batch)
        observers += asked
        finishers.append(finish)
    backbone.run(batch, observers)
    return {name: values for finish in finishers for name, values in finish().items()}


def _out_of_memory(cause: BaseException) -> bool:
    """On a GPU torch has an error of its own for it, on a CPU only words."""
    words = ("not enough memory", "can't allocate memory")
    return isinstance(cause, (MemoryError, torch.OutOfMemoryError)) or any(word in str(cause) for word in words)


def _not_finite(columns: Mapping[str, Any], rows: Iterable[int]) -> dict[int, str]:
    """Rows with a NaN or infinite value, and the first column it stands in."""
    found: dict[int, str] = {}
    for i in rows:
        for name, column in columns.items():
            if column[i].dtype.kind == "f" and not np.isfinite(column[i]).all():
                found[i] = name
                break
    return found


def _is_single(value: Any) -> bool:
    """Whether a column's entry is one row's value rather than a list of rows."""
    if value is None or isinstance(value, (str, Mapping)):
        return True
    return len(value) > 0 and isinstance(value[0], Mapping)


def _blanks(kind: Any, rows: int) -> list[np.ndarray]:
    nested = isinstance(kind.feature, List)
    value = kind.feature.feature if nested else kind.feature
    return [np.zeros((0, 0) if nested else 0, dtype=np.dtype(value.dtype))] * rows
