"""LLM2Vec (arXiv 2404.05961): a causal LM made a text encoder, and its control with nothing but the mask lifted."""

from __future__ import annotations

from dataclasses import dataclass

from .base import register_method
from .embeddings import EmbeddingMethod


@register_method
@dataclass(frozen=True)
class Llm2Vec(EmbeddingMethod):
    """Cosine of LLM2Vec's embedding of a row to the exemplars': bidirectional attention and an adapter trained for it."""

    name = "llm2vec"
    paper = "arXiv:2404.05961"
    signals = ("llm2vec",)


@register_method
@dataclass(frozen=True)
class Bidirectional(EmbeddingMethod):
    """As :class:`Llm2Vec` without its adapter: nothing but the mask is lifted. The paper's control, poor for most models."""

    name = "bidirectional"
    signals = ("bidirectional",)
