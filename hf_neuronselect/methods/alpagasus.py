"""AlpaGasus (arXiv 2307.08701): rows to which a judge gives a high mark."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..core.judging import JudgeOptions
from ..core.options import opt
from ..core.provenance import Budget, SourceRecord
from ..signals.columns import RowBatch
from .base import Method, Target, register_method
from .why import Why

if TYPE_CHECKING:
    from ..models.chat import JudgeSpec
    from ..signals.extraction import Extraction
    from ..signals.judge import Mark

PAPERS = "gpt-3.5-turbo"
LINE = 6
"""Tokens that a local judge says: only the first line counts."""
_TASK = (
    "You check examples that an assistant is trained on. Below are an instruction, with its input if it has one, and a "
    "response to it. Judge the {what} of the response."
)
_HOW = (
    "Answer with a mark from 0 to 5, where 5 means the highest {what}; halves are allowed. Write the number alone on the "
    "first line. Then explain on the next lines, in a few sentences and without favouring any style, what speaks for it."
)


@register_method
@dataclass(frozen=True)
class AlpaGasus(JudgeOptions, Method):
    """A judge's mark from 0 to 5, greedily; rows of 4.5 and more are kept, best first.

    Choices: the prompt is in our own words; the last answer of a row is judged, given all turns before it. A row whose mark
    cannot be read has none, and is counted. Answers are kept on disk: nothing is asked twice.
    """

    name = "alpagasus"
    paper = "arXiv:2307.08701"
    needs_target = False
    default_budget = Budget(threshold=4.5)

    ask: Literal["accuracy", "helpfulness"] = opt("accuracy", "What is judged.")
    judge: str = opt(PAPERS, "The judge: a name that the API knows, a Hub id, or a folder of a model on this machine.")

    @cached_property
    def _spec(self) -> JudgeSpec:
        from ..models.chat import JudgeSpec  # heavy

        return JudgeSpec.of(self, begin="Mark:", local_tokens=LINE)

    @property
    def signals(self) -> tuple[Mark]:  # type: ignore[override]
        from ..signals.judge import Mark  # heavy

        return (Mark(self._spec, _TASK.format(what=self.ask), _HOW.format(what=self.ask)),)

    def sources(self) -> dict[str, SourceRecord]:
        return {} if self._spec.model is None else {"judge": SourceRecord.of(self._spec.model)}

    def stand_in(self, extraction: Extraction) -> str:
        """Any judge but the paper's."""
        name = self.judge if self._spec.model is None else self._spec.model.id
        return "" if name == PAPERS else name

    def check(self) -> None:
        super().check()
        self._spec.check()

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return rows[self.signals[0].name].astype(np.float64)

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        mark = float(self.score(row, target)[0])
        said = "gave no mark that can be read" if np.isnan(mark) else f"gave {mark:g} of 5"
        return Why(f"{self._spec.name} {said} for {self.ask}")
