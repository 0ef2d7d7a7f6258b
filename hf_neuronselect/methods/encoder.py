"""DLRDS with a text encoder (DLRDS-BGE in MoNA's paper, arXiv 2503.15573): rows whose embeddings are near the exemplars'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import register_method
from .embeddings import EmbeddingMethod

if TYPE_CHECKING:
    from ..signals.extraction import Extraction


@register_method
@dataclass(frozen=True)
class EncoderMethod(EmbeddingMethod):
    """Cosine of a text encoder's embedding of a row to the exemplars'."""

    name = "encoder"
    paper = "arXiv:2503.15573"
    signals = ("embedding",)
    libraries = ("sentence_transformers",)

    def stand_in(self, extraction: Extraction) -> str:
        """Any encoder that is not one of the BGE family, by its name."""
        name = "" if extraction.encoder is None else extraction.encoder.id
        return "" if name.rsplit("/", 1)[-1].lower().startswith("bge-") else name
