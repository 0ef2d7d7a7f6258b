"""RDS+ (arXiv 2503.01807): rows near single exemplars, which take turns."""

from __future__ import annotations

from dataclasses import dataclass

from .base import register_method
from .embeddings import EmbeddingMethod


@register_method
@dataclass(frozen=True)
class RdsPlus(EmbeddingMethod):
    """Cosine of a row's position-weighted mean hidden state to each exemplar's; exemplars in turn take their best row.

    The paper keeps 10,000 rows of some millions; the share kept by default is ours. Its authors strip the text, so that no
    line break follows the last turn; here a row's tokens are those of the chat template (choice).
    """

    name = "rds-plus"
    paper = "arXiv:2503.01807"
    signals = ("rds_plus",)
    default_picker = "round-robin"
