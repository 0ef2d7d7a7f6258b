"""Polysemantic activations: MoNA's comparison (arXiv 2503.15573, App. B.3, after CATS, arXiv 2404.08763)."""

from __future__ import annotations

from dataclasses import dataclass

from .base import register_method
from .prototype import SparsePrototypeMethod


@register_method
@dataclass(frozen=True)
class Polysemantic(SparsePrototypeMethod):
    """As MoNA, on the K largest gate activations ``act(W_gate x)`` of the same layer instead of SAE latents.

    Negatives are 0 for Jaccard (choice).
    """

    name = "polysemantic"
    paper = "arXiv:2503.15573 App. B.3"
    signals = ("polysemantic",)
    unit = "neuron"
