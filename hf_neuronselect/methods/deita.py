"""DEITA (arXiv 2312.15685): rows that one scorer finds hard and another good."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..core.options import opt
from ..core.provenance import Budget, SourceRecord
from ..signals.columns import RowBatch
from .base import Method, Target, register_method
from .why import Why

if TYPE_CHECKING:
    from ..core.sources import Source
    from ..signals.extraction import Extraction
    from ..signals.rating import TurnScores

SCORERS = {
    "quality_scorer": "hkust-nlp/deita-quality-scorer",
    "complexity_scorer": "hkust-nlp/deita-complexity-scorer",
}
# The prompts that the two scorers were trained on, to the letter: they are part of the models, as a chat template is.
_QUALITY = (
    "You are a helpful assistant. Please identify the quality score of the Response corresponding to the Question. \n "
    "#Question#:\n{question}\n#Response#:\n{answer} ",
    "\n##Quality: ",
)
_COMPLEXITY = (
    "You are a helpful assistant. Please identify the complexity score of the following user query. \n##Query: {question}  ",
    "\n##Complexity: ",
)


@register_method
@dataclass(frozen=True)
class Deita(Method):
    """``sum over turns of c * q``: complexity of each question times quality of its answer, best first; 10,000 rows.

    ``c`` and ``q`` are means of the ratings 1 to 6, weighted by their shares among the six digits that a scorer could say
    next. Choices: a turn is an answer with the user turns since the one before it; other roles are not read. Rows
    too near to one that is taken are passed over: the cosine of the last token's states, by the model that selects (the
    paper's is Mistral-7B).
    """

    name = "deita"
    paper = "arXiv:2312.15685"
    needs_target = False
    default_budget = Budget(k=10_000)
    default_picker = "diverse(cosine=0.9,by=last_normed)"

    quality_scorer: str = opt(SCORERS["quality_scorer"], "Model that rates answers: folder or Hub id[@revision].")
    complexity_scorer: str = opt(
        SCORERS["complexity_scorer"], "Model that rates questions: folder or Hub id[@revision]."
    )

    @cached_property
    def _pinned(self) -> dict[str, Source]:
        from ..models.pin import pin_named  # heavy

        return {option: pin_named(getattr(self, option), option) for option in SCORERS}

    @property
    def signals(self) -> tuple[TurnScores, TurnScores]:  # type: ignore[override]
        from ..signals.rating import TurnScores  # heavy

        forms = {"quality_scorer": _QUALITY, "complexity_scorer": _COMPLEXITY}
        quality, complexity = (TurnScores(source, name, *forms[name]) for name, source in self._pinned.items())
        return quality, complexity

    def sources(self) -> dict[str, SourceRecord]:
        return {option: SourceRecord.of(source) for option, source in self._pinned.items()}

    def stand_in(self, extraction: Extraction) -> str:
        """Scorers that are not the paper's."""
        others = [source.id for option, source in self._pinned.items() if source.id != SCORERS[option]]
        return ", ".join(dict.fromkeys(others))

    def check(self) -> None:
        super().check()
        _ = self._pinned

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        quality, complexity = (rows.sparse(signal.name) for signal in self.signals)
        products = quality.values.astype(np.float64) * complexity.values.astype(np.float64)
        of_row = np.repeat(np.arange(len(rows)), np.diff(quality.indptr))
        return np.bincount(of_row, weights=products, minlength=len(rows))

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """Each turn's complexity times quality, which add up to the score."""
        quality, complexity = (row.sparse(signal.name).values.astype(np.float64) for signal in self.signals)
        products = quality * complexity
        says = f"{products.sum():.4g} = the sum over {len(products)} turns of complexity times quality"
        return Why.of(says, "turn", products, facts={"complexity": complexity, "quality": quality})
