"""The bidirectional engine: a causal LM whose tokens see each other in both directions, as a text encoder (LLM2Vec)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core import progress
from ..core.errors import NeuronSelectError
from ..models.backbone import find_decoder
from ..models.batching import TokenBatch, auto_budget, plan_batches
from ..models.bidirectional import check_family, check_lifted, encode
from ..models.loading import adapted_decoder_of, causal_lm_of, tokenizer_of
from ..models.pin import pin_adapter
from ..rows.encode import Sample
from ..rows.formats import Conversation
from .base import Signal, register_signal
from .engine import Computed, Engine, register_engine
from .extraction import Extraction
from .forward import place_of

WORDS, TOKENS = 400, 512
"""Of a row's text the encoder reads this many words, and of them this many tokens, special ones included: the authors'."""
_FIRST_WORDS = re.compile(rf"\s*(?:\S+\s+){{0,{WORDS - 1}}}\S+")


class BidirectionalSignal(Signal):
    """Mean of a row's last hidden states, after the final norm: float32.

    A row's text is the texts of all its turns, without role names and chat template (choice). Its own tokens
    alone are averaged, not the BOS or other special tokens that the tokenizer adds.
    """

    engine = "bidirectional"
    has_vector = True


@register_signal
class Bidirectional(BidirectionalSignal):
    """The states of the model as it is, with nothing but its mask lifted."""

    name = "bidirectional"


@register_signal
class Llm2Vec(BidirectionalSignal):
    """The states of the model with an adapter that was trained without the mask (arXiv 2404.05961)."""

    name = "llm2vec"
    sources = ("mntp_adapter",)

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        return {"mntp_adapter": None if extraction.mntp_adapter is None else extraction.mntp_adapter.key}


@register_engine
class BidirectionalEngine(Engine):
    """Runs the whole model over rows, without its causal mask."""

    name = "bidirectional"

    def __init__(self, extraction: Extraction) -> None:
        super().__init__(extraction)
        self._checked: set[int] = set()  # decoders whose mask was seen to be lifted

    @classmethod
    def pin(cls, extraction: Extraction, signals: Sequence[Signal], token: str | bool | None) -> Extraction:
        options = extraction.options
        check_family(extraction.spec)
        if not any(isinstance(signal, Llm2Vec) for signal in signals):
            return extraction
        if options.mntp_adapter is None:
            raise NeuronSelectError(
                "LLM2Vec needs an adapter of the model that was trained with bidirectional attention: name it; without one, "
                "use the method bidirectional", option="mntp_adapter",
            )  # fmt: skip
        found = pin_adapter(options.mntp_adapter, revision=options.mntp_revision, token=token, option="mntp_adapter")
        return replace(extraction, mntp_adapter=found)

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        spec = extraction.spec
        return extraction.rows_state() | {
            "model": spec.source.key,
            "dtype": spec.dtype,
            "quantize": spec.quantize,
            "attn_implementation": spec.attn_implementation,
        }

    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> dict[str, list[Sample]]:
        tokenizer = tokenizer_of(self.extraction.spec.source)
        limits = self.extraction.limits
        most = min(TOKENS, limits.positions or TOKENS)
        texts = [first_words("" if one.skip else one.words()) for one in conversations]
        encoded = tokenizer(texts, return_special_tokens_mask=True, truncation=False, verbose=False) if texts else {}
        found = []
        for i, one in enumerate(conversations):
            ids = np.asarray(encoded["input_ids"][i], np.int64)
            own = np.asarray(encoded["special_tokens_mask"][i]) == 0
            skip = one.skip or ("" if texts[i] and own[:most].any() else "empty")
            if not skip and (beyond := limits.beyond(tokenizer, ids[:most])):
                skip = f"error: {beyond}"
            found.append(Sample(ids[:most], own[:most], {}, len(ids), skip))
        return {signal.name: found for signal in signals}

    def load(self, signals: Sequence[Signal], rank: int | None = None) -> None:
        for signal in signals:
            self._decoder(signal, rank)

    def _decoder(self, signal: Signal, rank: int | None) -> Any:
        """The model's blocks and final norm, its mask seen to be lifted."""
        extraction, place = self.extraction, place_of(self.extraction, rank)
        if isinstance(signal, Llm2Vec):
            if extraction.mntp_adapter is None:
                raise NeuronSelectError("name an adapter: this needs one", option="mntp_adapter")
            decoder: Any = adapted_decoder_of(extraction.spec, extraction.mntp_adapter, "mntp_adapter", place)
        else:
            decoder = find_decoder(causal_lm_of(extraction.spec, place))[0]
        if id(decoder) not in self._checked:
            check_lifted(decoder, extraction.spec.source.id)
            self._checked.add(id(decoder))
        return decoder

    def compute(
        self, given: Mapping[str, list[Sample]], signals: Sequence[Signal], rank: int | None = None
    ) -> Computed:
        columns: dict[str, Any] = {}
        skips: dict[str, list[str]] = {}
        asked = self.extraction.options.batch_tokens
        for signal in signals:
            samples = given[signal.name]
            decoder = self._decoder(signal, rank)
            device = next(decoder.parameters()).device
            column: list[np.ndarray] = [np.zeros(0, np.float32)] * len(samples)
            reasons = [sample.skip for sample in samples]
            usable = [i for i, skip in enumerate(reasons) if not skip]
            lengths = [len(samples[i].input_ids) for i in usable]
            inner = decoder.config.get_text_config().intermediate_size
            for plan in plan_batches(lengths, auto_budget(device, inner) if asked == "auto" else int(asked)):
                chosen = [usable[j] for j in plan]
                batch = TokenBatch.of([samples[i] for i in chosen], 0, device)
                vectors = _means(decoder, batch)
                for i, vector in zip(chosen, vectors, strict=True):
                    if np.isfinite(vector).all():
                        column[i] = vector
                    else:
                        reasons[i] = f"error: NaN or infinite activations ({signal.name}); try dtype float32"
                progress.advance(sum(len(samples[i].input_ids) for i in chosen))
            columns[signal.name], skips[signal.name] = column, reasons
        return Computed(columns, skips)


def _means(decoder: nn.Module, batch: TokenBatch) -> np.ndarray:
    """Mean states of the pooled tokens: float32 ``[rows, width]``."""
    hidden = encode(decoder, batch.input_ids, batch.last + 1)
    pooled: torch.Tensor = batch.pooled.mean(hidden.to(batch.input_ids.device))
    return pooled.cpu().numpy()


def first_words(text: str) -> str:
    """The first :data:`WORDS` words of a text, with the spaces between them."""
    found = _FIRST_WORDS.match(text)
    return found[0].strip() if found else ""
