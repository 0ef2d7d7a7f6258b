"""The encoder engine: embeddings of a row's texts by a text encoder of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..core import progress
from ..core.errors import NeuronSelectError
from ..core.sources import Source
from ..models.encoders import Encoder, Pieces, encoder_of, pin_encoder
from ..rows.formats import Conversation
from .base import Signal, register_signal
from .engine import Computed, Engine, register_engine
from .extraction import Extraction
from .forward import place_of

_CPU_TOKENS, _GPU_TOKENS = 1024, 32768  # a batch; on a CPU more are slower (MiniLM: 4 and 5.5 seconds at 1 k and 8 k)
_NO_TEXT = Pieces((), ())


@dataclass(frozen=True)
class Read:
    """A row as an encoder reads it; ``skip``: why it cannot, else ""."""

    pieces: Pieces
    skip: str


@register_signal
class Embedding(Signal):
    """Embedding of a row's text, float32: the mean of the embeddings of its pieces, which fill the encoder's window.

    A row's text is the texts of all its turns, without role names and chat template (choice). A piece's
    embedding is the encoder's own, of length 1 where the encoder says so; pieces count equally.
    """

    name = "embedding"
    has_vector = True
    engine = "encoder"
    reads = ("encoder_window", "encoder_prompt", "encoder_dtype")
    sources = ("encoder",)


@register_engine
class EncoderEngine(Engine):
    """Runs a text encoder over rows; no causal LM is needed."""

    name = "encoder"
    model_option = "encoder"

    @classmethod
    def pin(cls, extraction: Extraction, signals: Sequence[Signal], token: str | bool | None) -> Extraction:
        options = extraction.options
        found = pin_encoder(options.encoder, revision=options.encoder_revision, token=token)
        return replace(extraction, encoder=found)

    @classmethod
    def state(cls, extraction: Extraction) -> Mapping[str, Any]:
        return extraction.rows_state() | {"encoder": _source(extraction).key}

    @property
    def encoder(self) -> Encoder:
        options = self.extraction.options
        return encoder_of(
            _source(self.extraction), options.encoder_window, options.encoder_prompt, options.encoder_dtype
        )

    def open(self) -> None:
        _ = self.encoder

    def read(self, conversations: Sequence[Conversation], signals: Sequence[Signal]) -> list[Read]:
        texts = ["" if one.skip else one.words().strip() for one in conversations]
        pieces = iter(self.encoder.cut([text for text in texts if text]))
        found = [next(pieces) if text else _NO_TEXT for text in texts]
        return [
            Read(piece, one.skip or ("" if sum(piece.tokens) else "empty"))
            for one, piece in zip(conversations, found, strict=True)
        ]

    def tokens(self, given: Sequence[Read]) -> int:
        return sum(sum(row.pieces.tokens) for row in given if not row.skip)

    def compute(self, given: Sequence[Read], signals: Sequence[Signal], rank: int | None = None) -> Computed:
        options = self.extraction.options
        skips = [row.skip for row in given]
        column: list[np.ndarray] = [np.zeros(0, np.float32)] * len(given)
        usable = [i for i, skip in enumerate(skips) if not skip]
        if usable:
            device, asked = _device(self.extraction, rank), options.batch_tokens
            budget = (_CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS) if asked == "auto" else int(asked)
            vectors = self.encoder.embed([given[i].pieces for i in usable], device, budget, progress.advance)
            for i, vector in zip(usable, vectors, strict=True):
                if np.isfinite(vector).all():
                    column[i] = vector
                else:
                    skips[i] = "error: the encoder gives NaN or infinite values; name another encoder"
        return Computed({"embedding": column}, {"embedding": skips})


def _source(extraction: Extraction) -> Source:
    if extraction.encoder is None:
        raise NeuronSelectError("name an encoder: this needs one", option="encoder")
    return extraction.encoder


def _device(extraction: Extraction, rank: int | None) -> torch.device:
    """An encoder fits one device: a map for the model is not for it."""
    placed = replace(extraction, options=replace(extraction.options, device_map=None))
    found = place_of(placed, rank)
    assert isinstance(found, torch.device)
    return found
