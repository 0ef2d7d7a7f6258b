"""The forward engine: any set of its signals in one pass of the model's first blocks."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from ..core import progress
from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..models.backbone import Backbone, Observer
from ..models.batching import TokenBatch, auto_budget, plan_batches
from ..models.loading import Place, backbone_of, named_device, sae_on, tokenizer_of
from ..models.sae import Site, SparseAutoencoder
from ..rows.encode import Sample, SampleEncoder
from ..rows.formats import Conversation
from .base import Signal, register_signal
from .engine import Computed, Engine, register_engine
from .extraction import Extraction

Reducer = Callable[[], dict[str, Any]]


class ForwardSignal(Signal):
    """A signal read off activations.

    It names the sites it reads and reduces each activation inside the hook, so no ``[tokens, width]`` tensor outlives
    its block.

    Class attributes:
        marks: tokens it reads besides the pooled ones, by their names in :data:`~hf_neuronselect.rows.encode.MARKS`; rows
            without one of them have no such signal.
    """

    engine = "forward"
    marks: ClassVar[tuple[str, ...]] = ()

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        return {**super().numbers(extraction), **({"marks": list(self.marks)} if self.marks else {})}

    def deepest(self, extraction: Extraction, num_layers: int) -> int:
        """The deepest block that must run, 0-based; by default the last."""
        return num_layers - 1

    @abstractmethod
    def start(
        self, batch: TokenBatch, backbone: Backbone, sae: SparseAutoencoder | None, extraction: Extraction
    ) -> tuple[list[tuple[Site, Observer]], Reducer]:
        """Observers for one batch, and a function that returns its columns afterwards (numpy, one entry a row)."""


@register_signal
class Tokens(Signal):
    """How many tokens the model is fed (``n_tokens``, int32), and whether the row was cut (``truncated``)."""

    name = "tokens"
    engine = "forward"

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        return {"n_tokens": pa.int32(), "truncated": pa.bool_()}

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        return {}


@register_engine
class ForwardEngine(Engine):
    """Tokenises rows and runs the model's first blocks over them, in batches of a token budget."""

    name = "forward"

    def __init__(self, extraction: Extraction) -> None:
        super().__init__(extraction)
        self.model: Any = None  # an in-memory model, kept alive
        self.backbone: Backbone | None = None  # of an in-memory model
        self.sae: SparseAutoencoder | None = None  # of an in-memory model
        self._budget: int | None = None  # tokens a batch, once memory ran out at more

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        return extraction.model_state() | {"pool_tokens": extraction.options.pool_tokens}

    # ------------------------------------------------------------------------------------ reading
    def encoder(self, signals: Sequence[Signal] = ()) -> SampleEncoder:
        """The row encoder that the options ask for."""
        options = self.extraction.options
        return SampleEncoder(
            self.tokenizer,
            pool_tokens=options.pool_tokens,
            max_length=options.max_length,
            truncation_side=options.truncation_side,
            marks=sorted({mark for signal in signals if isinstance(signal, ForwardSignal) for mark in signal.marks}),
            chat_template=options.chat_template,
            limits=self.extraction.limits,
        )

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.extraction.spec.source)

    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> list[Sample]:
        return self.encoder(signals).encode(conversations)

    # ---------------------------------------------------------------------------------- computing
    def load(self, signals: Sequence[Signal], rank: int | None = None) -> None:
        if forward := [signal for signal in signals if isinstance(signal, ForwardSignal)]:
            self.loaded(forward, rank)

    def compute(self, given: Sequence[Sample], signals: Sequence[Signal], rank: int | None = None) -> Computed:
        types = {signal: signal.types(self.extraction) for signal in signals}
        columns: dict[str, Any] = {
            name: blanks(kind, len(given)) for one in types.values() for name, kind in one.items() if not _plain(kind)
        }
        skips = {signal.name: [sample.skip for sample in given] for signal in signals}
        forward = [signal for signal in signals if isinstance(signal, ForwardSignal)]
        usable = [i for i, sample in enumerate(given) if not sample.skip]
        if forward and usable:
            self._run(given, usable, forward, columns, skips, rank)
            self._leave_out_unmarked(given, usable, forward, columns, skips)
        if any(isinstance(signal, Tokens) for signal in signals):
            columns["n_tokens"] = np.asarray([len(sample.input_ids) for sample in given], dtype=np.int32)
            columns["truncated"] = np.asarray([sample.truncated for sample in given], dtype=bool)
        return Computed(columns, skips)

    def _run(
        self, samples: Sequence[Sample], usable: list[int], signals: Sequence[ForwardSignal],
        columns: dict[str, Any], skips: dict[str, list[str]], rank: int | None,
    ) -> None:  # fmt: skip
        self._fill(samples, usable, signals, columns, *self.loaded(signals, rank))
        owned = {signal: list(signal.types(self.extraction)) for signal in signals}
        broken = _not_finite(owned, columns, usable)
        dtype = self.extraction.options.dtype
        if broken and dtype != "float32" and self.extraction.options.quantize is None and self.backbone is None:
            rows = sorted({i for found in broken.values() for i in found})
            warnings.warn(
                f"{len(rows)} of {len(usable)} rows (first: row {rows[0]} of its batch) overflow in {dtype} and are "
                "computed again in float32; --dtype float32 (or bfloat16) saves the second pass",
                NeuronSelectWarning,
                stacklevel=5,
            )
            wide = ForwardEngine(replace(self.extraction, options=replace(self.extraction.options, dtype="float32")))
            self._fill(samples, rows, signals, columns, *wide.loaded(signals, rank))
            broken = _not_finite(owned, columns, rows)
        for signal, found in broken.items():
            for i in found:
                skips[signal.name][i] = (
                    f"error: NaN or infinite activations ({signal.name}); try dtype float32, value_dtype float32"
                )
                for name in owned[signal]:
                    columns[name][i] = columns[name][i][:0]

    def _leave_out_unmarked(
        self, samples: Sequence[Sample], usable: list[int], signals: Sequence[ForwardSignal],
        columns: dict[str, Any], skips: dict[str, list[str]],
    ) -> None:  # fmt: skip
        """Rows without a token that a signal reads have none of it, and the reason is given."""
        for signal in signals:
            for mark in signal.marks:
                for i in usable:
                    if not samples[i].marks[mark].any():
                        length = self.extraction.options.max_length
                        skips[signal.name][i] = f"error: no {mark} token within max_length={length}"
                        for name in signal.types(self.extraction):
                            columns[name][i] = columns[name][i][:0]

    def _fill(
        self, samples: Sequence[Sample], rows: Sequence[int], signals: Sequence[ForwardSignal],
        columns: dict[str, Any], backbone: Backbone, sae: SparseAutoencoder | None,
    ) -> None:  # fmt: skip
        """Run the model over some rows and put their values into the columns."""
        budget = self.token_budget(backbone)
        lengths = [len(samples[i].input_ids) for i in rows]
        waiting = [[rows[j] for j in plan] for plan in plan_batches(lengths, budget)][::-1]
        while waiting:
            chosen = waiting.pop()
            try:
                found = self._forward([samples[i] for i in chosen], signals, backbone, sae)
            except (MemoryError, RuntimeError) as cause:
                if not _out_of_memory(cause):
                    raise
                if len(chosen) == 1:
                    raise NeuronSelectError(
                        f"one row of {len(samples[chosen[0]].input_ids)} tokens does not fit into memory: lower it, or "
                        "use a smaller dtype or a larger device",
                        option="max_length", value=self.extraction.options.max_length,
                    ) from cause  # fmt: skip
                budget = max(1, sum(len(samples[i].input_ids) for i in chosen) // 2)
                self._budget = budget
                warnings.warn(
                    f"out of memory: going on with batches of {budget} tokens; next time give --batch-tokens {budget}",
                    NeuronSelectWarning,
                    stacklevel=6,
                )
                if backbone.device.type == "cuda":
                    torch.cuda.empty_cache()
                left = sorted([i for rest in waiting for i in rest] + chosen)
                lengths = [len(samples[i].input_ids) for i in left]
                waiting = [[left[j] for j in plan] for plan in plan_batches(lengths, budget)][::-1]
                continue
            progress.advance(sum(len(samples[i].input_ids) for i in chosen))
            for name, values in found.items():
                column = columns[name]
                for row, value in zip(chosen, values, strict=True):
                    column[row] = value

    def _forward(
        self, samples: Sequence[Sample], signals: Sequence[ForwardSignal], backbone: Backbone,
        sae: SparseAutoencoder | None,
    ) -> dict[str, Any]:  # fmt: skip
        """One batch through the model: column name -> its rows' values."""
        pad = 0  # any id the embeddings hold: a pad token may be newer than they are, and nothing ever sees it
        batch = TokenBatch.of(samples, pad, backbone.device)
        observers, reducers = [], []
        for signal in signals:
            asked, reduce = signal.start(batch, backbone, sae, self.extraction)
            observers += asked
            reducers.append(reduce)
        backbone.run(batch, observers)
        return {name: values for reduce in reducers for name, values in reduce().items()}

    def token_budget(self, backbone: Backbone) -> int:
        """Padded tokens of a batch: what was asked for, what fits the machine, or less once memory ran out."""
        asked = self.extraction.options.batch_tokens
        width = getattr(backbone.config.get_text_config(), "intermediate_size", None) or 4 * backbone.hidden_size
        return self._budget or (auto_budget(backbone.device, width) if asked == "auto" else int(asked))

    # ------------------------------------------------------------------------------------ loading
    def loaded(
        self, signals: Sequence[ForwardSignal], rank: int | None = None
    ) -> tuple[Backbone, SparseAutoencoder | None]:
        """The model's first blocks and the SAE, from the process' cache or from disk."""
        if self.backbone is not None:
            return self.backbone, self.sae
        extraction, place = self.extraction, place_of(self.extraction, rank)

        def depth_of(num_layers: int) -> int:
            return 1 + max(signal.deepest(extraction, num_layers) for signal in signals)

        backbone = backbone_of(extraction.spec, place, depth_of)
        if extraction.sae is None:
            return backbone, None
        # With a device map the SAE goes where the last block runs.
        device = place if isinstance(place, torch.device) else backbone.device
        return backbone, sae_on(extraction.sae, extraction.options.layer, device, extraction.options.dtype)


def place_of(extraction: Extraction, rank: int | None) -> Place:
    """The device or device map of a shard.

    Raises:
        NeuronSelectError: no such device, or a device map for several workers.
    """
    options = extraction.options
    if options.device_map is not None:
        if rank:
            raise NeuronSelectError(
                "spreads one model over all devices, so several workers cannot have one each: drop with_rank and num_proc",
                option="device_map",
                value=options.device_map,
            )
        return options.device_map
    if options.device in ("auto", "cuda"):
        if torch.cuda.is_available():
            return torch.device("cuda", (rank or 0) % torch.cuda.device_count())
        if options.device == "auto" and torch.backends.mps.is_available():
            return torch.device("mps")
        if options.device == "auto":
            return torch.device("cpu")
    return named_device(options.device)


def blanks(kind: pa.DataType, rows: int) -> list[np.ndarray]:
    """Empty values of a list column, one a row."""
    nested = pa.types.is_list(kind.value_type)
    value = kind.value_type.value_type if nested else kind.value_type
    return [np.zeros((0, 0) if nested else 0, dtype=value.to_pandas_dtype())] * rows


def _plain(kind: pa.DataType) -> bool:
    return not pa.types.is_list(kind)


def _out_of_memory(cause: BaseException) -> bool:
    """On a GPU torch has an error of its own for it, on a CPU only words."""
    words = ("not enough memory", "can't allocate memory")
    return isinstance(cause, (MemoryError, torch.OutOfMemoryError)) or any(word in str(cause) for word in words)


def _not_finite(
    owned: Mapping[ForwardSignal, Iterable[str]], columns: Mapping[str, Any], rows: Iterable[int]
) -> dict[ForwardSignal, list[int]]:
    """Signal -> rows with a NaN or infinite value."""
    found: dict[ForwardSignal, list[int]] = {}
    for signal, names in owned.items():
        for i in rows:
            for name in names:
                value = columns[name][i]
                if value.dtype.kind == "f" and not np.isfinite(value).all():
                    found.setdefault(signal, []).append(i)
                    break
    return found
