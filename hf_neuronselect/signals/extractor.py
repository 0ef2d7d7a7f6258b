"""NeuronFeatureExtractor: a plain callable for ``Dataset.map`` that adds signals to rows."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from datasets import Features
from datasets.utils._dill import pklregister

from ..core import progress
from ..core.cost import Meter
from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.options import ExtractionOptions, check_names, options_of
from ..core.sources import Source
from ..models.backbone import Backbone, resolve_layer
from ..models.checkpoint import check_tokens, limits_of
from ..models.loading import remember
from ..models.pin import check_adapters
from ..models.sae import SparseAutoencoder
from ..models.sae_formats import load_sae
from ..rows.batch import plain_batch
from ..rows.formats import Conversation, read_row, row_format, rows_of
from . import (  # noqa: F401 (registers the signals and engines)
    activations,
    answers,
    bidirectional,
    encoder,
    gradient,
    indicators,
    intervention,
    judge,
    loss,
    probe,
    rating,
    text,
)
from .base import BOOKKEEPING, VERSION, Signal, digest, pack_identities, signals_of
from .engine import ENGINES, Computed, Engine
from .extraction import Extraction, resolve_extraction, resolve_sae, with_sae
from .forward import ForwardEngine, Tokens

Asked = str | Signal | Iterable[str | Signal]
_ran_in: int | None = None  # the process that a model ran in last


@dataclass(frozen=True)
class Prepared:
    """Rows that were read for each engine; the work that is left needs the weights.

    Attributes:
        given: engine -> what it read. seconds: engine -> stage -> how long that took.
    """

    conversations: Sequence[Conversation]
    given: Mapping[str, Any]
    seconds: Mapping[str, Mapping[str, float]]

    def __len__(self) -> int:
        return len(self.conversations)


class NeuronFeatureExtractor:
    """Adds the columns of signals to rows: ``dataset.map(extractor, batched=True)``.

    It is a plain callable. It pickles without weights and, for ``datasets``' fingerprints, as the identities of its
    signals alone, so a cache hit takes milliseconds in any process. Weights are loaded at the first batch, once a
    process and device.

    Make one with :meth:`from_pretrained`, :meth:`from_options` or :meth:`from_model`.
    """

    def __init__(self, extraction: Extraction, signals: Asked, engines: dict[str, Engine] | None = None) -> None:
        self.extraction = extraction
        self.signals = signals_of(signals)
        self._engines = {} if engines is None else engines
        if extraction.sae is None and (names := _needing_sae(self.signals)):
            raise NeuronSelectError(
                f"{', '.join(names)} needs a sparse autoencoder: make the extractor with sae=", option="sae"
            )

    # ------------------------------------------------------------------------------ construction
    @classmethod
    def from_pretrained(
        cls, model: str | None = None, *, features: Asked = ("mona",), token: str | bool | None = None, **options: Any
    ) -> NeuronFeatureExtractor:
        """An extractor for a model (and SAE) on the Hub or in a local folder.

        Args:
            model: Hub id or folder of a causal LM, or of a PEFT adapter, read with ``trust_remote_code=False``; None: the
                bundled one, which only counts tokens where no signal runs a model.
            features: names of signals: ``mona``, ``nait``, ``polysemantic``, ``hidden``, ``routing``, ``answer_loss``,
                ...; each engine computes all of its own in one pass.
            token: Hub token; never stored.
            options: see :class:`~hf_neuronselect.core.options.ExtractionOptions`.

        Raises:
            NeuronSelectError: an option that cannot be, with the mend.
        """
        check_names(ExtractionOptions, options, "option of an extractor", "option")
        return cls.from_options(ExtractionOptions(model=model, **options), features, token=token)

    @classmethod
    def from_options(
        cls, options: ExtractionOptions, features: Asked, *, token: str | bool | None = None
    ) -> NeuronFeatureExtractor:
        """An extractor by its options; without a model, of the bundled model and SAE.

        Raises:
            NeuronSelectError: as :meth:`from_pretrained`.
        """
        signals = signals_of(features)
        runs = any(runs_model(signal) for signal in signals)
        extraction = resolve_extraction(options, needs_sae=_needing_sae(signals), runs=runs, token=token)
        made = cls(_pinned(extraction, signals, token), signals)
        made._warn()
        return made

    @classmethod
    def from_model(
        cls, model: Any, tokenizer: Any, *, features: Asked = ("mona",), sae: SparseAutoencoder | str | None = None,
        **options: Any,
    ) -> NeuronFeatureExtractor:  # fmt: skip
        """An extractor around a model that is in memory (it is left as it is, in its dtype and on its device).

        Its identity is a hash of state dict, configuration and tokenizer, taken once here. It cannot be sent to other
        processes: save the model and use :meth:`from_pretrained` for ``num_proc``.

        Args:
            model: a causal LM in eval mode. tokenizer: its tokenizer. sae: a loaded SAE or a folder.
            features, options: as in :meth:`from_pretrained`.
        """
        check_names(ExtractionOptions, options, "option of an extractor", "option")
        check_adapters(model)
        parameter, lm_config = next(model.parameters()), model.config
        asked = ExtractionOptions(**options)
        if asked.device_map is not None:
            raise NeuronSelectError("a model in memory stays where it is", option="device_map", value=asked.device_map)
        layer = resolve_layer(asked.layer, lm_config.get_text_config().num_hidden_layers)
        dtype: Any = str(parameter.dtype).removeprefix("torch.")
        asked = replace(
            asked,
            layer=layer,
            dtype=dtype,
            device=str(parameter.device),
            attn_implementation=getattr(lm_config, "_attn_implementation", None),
        )
        digest_of_model = digest([state_hash(model.state_dict().items()), *_about(model, tokenizer)])
        source = Source(getattr(lm_config, "name_or_path", "") or "in-memory", f"state:{digest_of_model}", "")
        limits = replace(limits_of(lm_config), embeddings=model.get_input_embeddings().weight.shape[0])
        check_tokens(source, tokenizer, limits, asked.chat_template)
        extraction, placed = Extraction(asked, source, limits=limits), None
        if sae is not None:
            sae_source = _in_memory(sae) if isinstance(sae, SparseAutoencoder) else resolve_sae(sae, None, layer, None)
            loaded = sae if isinstance(sae, SparseAutoencoder) else load_sae(sae_source.location, layer=layer)
            extraction = with_sae(extraction, sae_source, loaded, lm_config)
            placed = loaded.to(parameter.device, parameter.dtype)
        remember(source.commit, model, tokenizer)
        forward = ForwardEngine(extraction)
        forward.model, forward.backbone, forward.sae = model, Backbone(model), placed
        made = cls(_pinned(extraction, signals_of(features), None), features, {"forward": forward})
        made._warn()
        return made

    @classmethod
    def without_model(cls, options: ExtractionOptions, signals: Asked) -> NeuronFeatureExtractor:
        """An extractor of signals that need no model."""
        return cls(Extraction(options), signals)

    def with_features(self, features: Asked) -> NeuronFeatureExtractor:
        """The same extractor computing other signals; weights already loaded are shared."""
        return type(self)(self.extraction, features, self._engines)

    @property
    def beside(self) -> dict[str, Source]:
        """What its signals need besides model and SAE, by option."""
        names = dict.fromkeys(name for signal in self.signals for name in signal.sources)
        return {name: source for name in names if (source := getattr(self.extraction, name)) is not None}

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against its SAE, a sentence each, if a signal reads it."""
        return self.extraction.doubts if _needing_sae(self.signals) else ()

    def _warn(self) -> None:
        for doubt in self.doubts:
            warnings.warn(doubt, NeuronSelectWarning, stacklevel=4)

    # ------------------------------------------------------------------------- identity, pickling
    @property
    def computed(self) -> tuple[Signal, ...]:
        """The signals computed: those asked for and, with a model, each row's tokens."""
        tokens = (Tokens(),) if self.extraction.model is not None else ()
        return tuple(dict.fromkeys([*tokens, *self.signals]))

    @property
    def identities(self) -> dict[str, str]:
        """Signal -> 16 hex digits of everything that moves its numbers."""
        return {signal.name: self.identity(signal) for signal in self.computed}

    @property
    def hash(self) -> str:
        """All its identities in 16 hex digits."""
        return digest(self.identities)

    def identity(self, signal: str | Signal) -> str:
        """The identity of a signal as this extractor computes it."""
        (signal,) = signals_of(signal)
        state = {
            "version": VERSION,
            "signal": signal.name,
            "numbers": dict(signal.numbers(self.extraction)),
            "engine": {signal.engine: dict(ENGINES[signal.engine].state(self.extraction))},
        }
        return digest(state)

    def key(self, signal: str | Signal) -> str:
        """A signal and its identity in one word: ``mona-8c5ddb91c9adda5a``."""
        (signal,) = signals_of(signal)
        return f"{signal.name}-{self.identity(signal)}"

    def about(self, signal: str | Signal) -> dict[str, Any]:
        """What a signal is computed with, for people and for messages: its engine's state and its own options."""
        (signal,) = signals_of(signal)
        return {
            "engine": signal.engine,
            "state": dict(ENGINES[signal.engine].state(self.extraction)) | dict(signal.numbers(self.extraction)),
        }

    @property
    def column_types(self) -> Features:
        """The ``datasets`` types of the columns added; ``features=`` of ``IterableDataset.map``."""
        kinds = [
            pa.field(name, kind) for signal in self.computed for name, kind in signal.types(self.extraction).items()
        ]
        kinds += [pa.field(name, pa.string()) for name in BOOKKEEPING]
        return Features.from_arrow_schema(pa.schema(kinds))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.extraction, self.signals)

    def __repr__(self) -> str:
        model = self.extraction.model.id if self.extraction.model else None
        sae = f", sae={self.extraction.sae.id!r}" if self.extraction.sae else ""
        sae += "".join(f", {name}={source.id!r}" for name, source in self.beside.items())
        return f"NeuronFeatureExtractor({model!r}{sae}, features=[{', '.join(s.name for s in self.signals)}])"

    # -------------------------------------------------------------------------------- the callable
    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, Any]:
        """The signals' columns of a batch (columns of equal length) or of a single row.

        Args:
            batch: dict of columns, or of one row's values.
            rank: shard index (``with_rank=True``); picks the GPU ``cuda:{rank % count}``.

        Returns:
            The columns (see :mod:`.columns`), numpy, in the batch's order. ``Dataset.map`` merges them with the row's
            own.

        Raises:
            NeuronSelectError: unknown columns; a signal's column is taken in the data.
            TypeError: ``rank`` is no int (``with_indices=True`` passes indices there).
        """
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
            raise TypeError(f"rank must be an int or None, got {type(rank).__name__}: use with_rank=True, not indices")
        batch, single = plain_batch(batch)
        if taken := [name for name in self.column_types if name in batch]:
            ours = taken[0] in (*BOOKKEEPING, "n_tokens", "truncated")
            raise NeuronSelectError(
                f"the data already has the column {taken[0]!r}; remove or rename it"
                + (" (several signals come from ONE extractor: features=[...])" if ours else "")
            )
        options = self.extraction.options
        fmt = row_format(batch, options.row_format, options.columns)
        single = _is_single(batch[fmt.used[0]]) if single is None else single
        columns = {name: [batch[name]] if single else batch[name] for name in fmt.used}
        result = self.extract([read_row(row, fmt) for row in rows_of(columns)], rank)
        return {name: column[0] for name, column in result.items()} if single else result

    def extract(self, conversations: Sequence[Conversation], rank: int | None = None) -> dict[str, Any]:
        """The columns of rows already read; one entry a row, in order. See :meth:`__call__`."""
        found = self.compute(self.prepare(conversations), rank)
        reasons = [next((skip for skip in of_row if skip), "") for of_row in zip(*found.skips.values(), strict=True)]
        identities = pack_identities(self.identities)
        return found.columns | {"neuron_skip": reasons, "neuron_signals": [identities] * len(reasons)}

    def prepare(self, conversations: Sequence[Conversation]) -> Prepared:
        """Rows to tokens: the half of :meth:`extract` that needs no weights and may run in a thread."""
        given, seconds = {}, {}
        for name, signals in self._by_engine().items():
            engine, started = self.engine(name), time.perf_counter()
            engine.open()
            opened = time.perf_counter()
            given[name] = engine.read(conversations, signals)
            seconds[name] = {"load": opened - started, "read": time.perf_counter() - opened}
        return Prepared(conversations, given, seconds)

    def compute(
        self, prepared: Prepared, rank: int | None = None, *, meters: dict[str, Meter] | None = None
    ) -> Computed:
        """The signals of prepared rows: the other half of :meth:`extract`, one pass an engine.

        Args:
            meters: engine -> what its pass cost so far; added to.
        """
        _mend_fork()
        found = Computed({}, {})
        meters = {} if meters is None else meters
        groups = self._by_engine()
        for name, signals in groups.items():
            counted = [self.key(signal) for signal in signals if not isinstance(signal, Tokens)]
            meter = meters.setdefault(name, Meter(name, counted))
            for stage, seconds in prepared.seconds[name].items():
                meter.add_seconds(stage, seconds)
            with meter.stage("load"):
                self.engine(name).load(signals, rank)
        running = {
            name: self.engine(name).tokens(prepared.given[name])
            for name, signals in groups.items()
            if ENGINES[name].has_model and any(not isinstance(signal, Tokens) for signal in signals)
        }
        progress.read(len(prepared), sum(running.values()))
        for name, signals in groups.items():
            meter = meters[name]
            with meter.stage("compute"):
                one = self.engine(name).compute(prepared.given[name], signals, rank)
            meter.add_requests(*self.engine(name).bill())
            if name in running:
                meter.add_rows(len(prepared))
                meter.add_tokens(running[name])
            found |= one
        return found

    def _by_engine(self) -> dict[str, list[Signal]]:
        groups: dict[str, list[Signal]] = {}
        for signal in self.computed:
            groups.setdefault(signal.engine, []).append(signal)
        return groups

    def engine(self, name: str) -> Engine:
        """One of its engines, made when it is first used."""
        if name not in self._engines:
            self._engines[name] = ENGINES[name](self.extraction)
        return self._engines[name]

    @property
    def forward(self) -> ForwardEngine:
        """The engine of the model's first blocks."""
        found = self.engine("forward")
        assert isinstance(found, ForwardEngine)
        return found


def _describe_options() -> None:
    """Give ``from_pretrained`` the signature that its options declare."""
    described = inspect.signature(NeuronFeatureExtractor.from_pretrained.__func__)  # type: ignore[attr-defined]
    kept = [p for p in described.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    more = [
        inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.kind)
        for option in options_of(ExtractionOptions).values()
        if option.name != "model"
    ]
    NeuronFeatureExtractor.from_pretrained.__func__.__signature__ = described.replace(  # type: ignore[attr-defined]
        parameters=[*kept, *more]
    )


_describe_options()


@pklregister(NeuronFeatureExtractor)
def _fingerprint(pickler: Any, extractor: NeuronFeatureExtractor) -> None:
    """Only for ``datasets``' fingerprints: device and batch size change no number."""
    pickler.save_reduce(json.loads, (json.dumps(extractor.identities, sort_keys=True),), obj=extractor)


def _mend_fork() -> None:
    """Use one thread in a process that was forked after a model ran, as ``Dataset.map(num_proc=2)`` does.

    OpenMP's threads are not there after a fork, and it would wait for them for ever.
    """
    global _ran_in
    if _ran_in not in (None, os.getpid()):
        torch.set_num_threads(1)
    _ran_in = os.getpid()


def state_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of named tensors: names, dtypes, shapes and bytes; 32 hex digits."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        hashed.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def _about(model: Any, tokenizer: Any) -> list[Any]:
    """What else moves the numbers of a model in memory: its configuration, and how text becomes tokens."""
    config = {
        name: value for name, value in model.config.to_dict().items() if not name.startswith(("_", "transformers"))
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [json.dumps(config, sort_keys=True, default=str), words, special, tokenizer.chat_template]


def _in_memory(sae: SparseAutoencoder) -> Source:
    tensors = [("W_enc", sae.W_enc), ("b_enc", sae.b_enc), ("b_pre", sae.b_pre), ("threshold", sae.threshold)]
    parts = state_hash((name, tensor) for name, tensor in tensors if tensor is not None)
    about = f"{sae.site}{sae.activation}{sae.k}{sae.input_norm}"
    return Source("in-memory", f"state:{parts}{hashlib.blake2b(about.encode()).hexdigest()[:8]}", "")


def runs_model(signal: Signal) -> bool:
    """Whether a signal is computed with the weights that ``model`` names."""
    engine = ENGINES[signal.engine]
    return engine.has_model and engine.model_option == "model" and not isinstance(signal, Tokens)


def _pinned(extraction: Extraction, signals: Sequence[Signal], token: str | bool | None) -> Extraction:
    """The extraction with all that the signals' engines need."""
    for name in dict.fromkeys(signal.engine for signal in signals):
        own = [signal for signal in signals if signal.engine == name]
        extraction = ENGINES[name].pin(extraction, own, token)
    return extraction


def _needing_sae(signals: Iterable[Signal]) -> tuple[str, ...]:
    return tuple(s.name for s in signals if s.needs_sae)


def _is_single(value: Any) -> bool:
    """Whether a column's entry is one row's value rather than a list of rows."""
    if value is None or isinstance(value, (str, Mapping)):
        return True
    return len(value) > 0 and isinstance(value[0], Mapping)


__all__ = ["NeuronFeatureExtractor", "Prepared", "state_hash"]
