"""MoNA (arXiv 2503.15573): similarity of monosemantic activations to the target's prototype."""

from __future__ import annotations

from dataclasses import dataclass

from .base import register_method
from .prototype import SparsePrototypeMethod


@register_method
@dataclass(frozen=True)
class Mona(SparsePrototypeMethod):
    """Generalized Jaccard of mean-pooled top-K SAE latents to the exemplars' mean (eq. 6-8), top 5 %.

    K, layer, SAE and pooled tokens belong to the extractor; the paper's are K = 192, layer -2 and
    EleutherAI/sae-llama-3-8b-32x on Meta-Llama-3-8B.
    """

    name = "mona"
    paper = "arXiv:2503.15573"
    signals = ("mona",)
