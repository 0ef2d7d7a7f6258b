"""Explain picks: why a row has its score, why another was not selected, why one beats another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ..core.errors import NeuronSelectError
from ..explain.explanation import Contrast, Explanation, WhyNot
from ..explain.labels import Label
from ..explain.spots import Spot
from ..methods.why import Why
from ..rows.leakage import exact_key
from ..signals.base import signals_of
from ..signals.columns import RowBatch
from ..signals.extractor import NeuronFeatureExtractor
from ..store.store import FeatureStore
from .behind import Behind
from .evidence import Evidence
from .reader import column_names
from .sample import random_rows

if TYPE_CHECKING:
    from .selection import Selection

AVERAGED = 200
"""Rows of the pool whose average says what parts usually add."""
DIFFERENT = 1e-3
"""Relative difference between the score recorded and computed again from which on it is told."""
_LEFT_OUT = {
    "duplicate": "left out as a duplicate: an earlier row says the same",
    "leak": "left out as a leak: it is an exemplar, or holds an exemplar's question",
    "empty": "left out: it has no text",
    "error": "left out: it cannot be read, or the model gives it no such signal",
    "null": "left out: the method gives it no score",
}


class Explainer:
    """Explains the rows of a selection, see :meth:`Selection.explainer`."""

    def __init__(
        self, selection: Selection, target: str | None = None, extractor: NeuronFeatureExtractor | None = None,
        features: FeatureStore | None = None, pool: Dataset | None = None, exemplars: Dataset | None = None,
    ) -> None:  # fmt: skip
        self.selection = selection
        self.evidence = Evidence(selection, target, extractor, features, pool, exemplars)
        self.behind = Behind(self.evidence)

    def explain(self, i: int, top: int = 10) -> Explanation:
        """See :meth:`Selection.explain`."""
        self.evidence.forget_notes()
        return self._explained(self._number(i), top)

    def _number(self, i: int) -> int:
        """The number in the pool of a place in the selection."""
        if not 0 <= i < len(self.selection):
            has = f"rows 0 to {len(self.selection) - 1}" if len(self.selection) else "no rows"
            raise NeuronSelectError(f"the selection has {has}", option="row", value=i)
        return int(self.selection.indices[i])

    def _explained(self, number: int, top: int, found: tuple[Why, float] | None = None) -> Explanation:
        """A row told; ``found`` is what :meth:`_why` says of it, where that is known."""
        evidence, text = self.evidence, self.evidence.text_of(number)
        why, now = found or self._why(number)
        recorded, less = self._recorded(number), self.evidence.selector.avoided
        if less and evidence.target not in less:
            evidence.note(
                f"this is what the row scores for {evidence.target} alone, {now:.6g}; rows are picked by that less what they score "
                f"for {', '.join(less)}, both in standard deviations of the pool"
            )
        elif np.isfinite(recorded) and abs(now - recorded) > DIFFERENT * max(abs(recorded), 1e-9):
            evidence.note(
                f"the score is {now:.6g} when it is computed again and {recorded:.6g} as recorded: other dtypes, machines and "
                "batches round differently"
            )
        parts = self.behind.parts(why, number, text, top)
        moved = self.behind.moved(why.moves, text) if top and why.moves is not None else ()
        return Explanation(
            method=evidence.method.name, target=evidence.target, row=number, place=evidence.place_of(number),
            score=recorded if np.isfinite(recorded) else now, text=text.content() if text else "", says=why.says,
            parts=parts, of=len(why.ids), moved=moved, notes=tuple(evidence.notes),
        )  # fmt: skip

    def reasons(self, i: int) -> Why:
        """The method's own reasons for a place in the selection, with all parts and nothing behind them."""
        return self.why(self._number(i))

    def why(self, number: int) -> Why:
        """The same for a row of the pool, by its number there."""
        return self._why(number)[0]

    def spots(self, i: int, units: Sequence[int]) -> dict[int, tuple[Spot, ...]]:
        """Where in a row of the selection units of the method's sparse signal are strongest."""
        why = self.reasons(i)
        return self.behind.tokens(why.signal, units, self.evidence.text_of(self._number(i))) if why.signal else {}

    def label(self, why: Why, unit: int) -> Label | None:
        """What a feature of these reasons fires on, in words; None where there is no label."""
        return self.behind.label(why.signal, unit) if why.signal else None

    def _why(self, number: int) -> tuple[Why, float]:
        """A row's reasons, and its score computed now."""
        evidence = self.evidence
        finished, row = evidence.finished, evidence.row(number)
        found = evidence.method.scorer({evidence.target: finished})(row)[evidence.target]
        # What chance adds is in the wanted score alone.
        avoided = evidence.target in evidence.selector.avoided
        before, score = (
            float(np.max(one[0])) for one in (found, found if avoided else evidence.method.drawn(found, row.index))
        )
        why = evidence.method.explain(row, finished, evidence.exemplars)
        if np.isfinite(score) and score != before:  # a row without a score has nothing drawn
            why = replace(why, says=f"{why.says}; {score - before:+.4g} was drawn")
        return why if self.usual is None else why.against(self.usual), score

    @cached_property
    def usual(self) -> np.ndarray | None:
        """What each unit adds to the score of an average row of the pool, float64 ``[units]``.

        None without a store of the pool that has what a score needs, or where the parts of a score are no units.
        """
        evidence = self.evidence
        if evidence.store is None or not set(map(str, evidence.method.signals)) <= set(evidence.stored):
            return None
        return self._average(random_rows(evidence.store, evidence.stored, AVERAGED))

    def average_over(self, rows: RowBatch) -> None:
        """Take :attr:`usual` from these random rows of the pool, which were read for something else, too."""
        signals = signals_of(self.evidence.method.signals)
        if all(column in rows for signal in signals for column in column_names(signal)):
            self.usual = self._average(rows.take(np.arange(0, len(rows.index), -(-len(rows.index) // AVERAGED) or 1)))

    def _average(self, rows: RowBatch) -> np.ndarray | None:
        evidence, total = self.evidence, np.zeros(1)
        for place in range(len(rows.index)):
            why = evidence.method.explain(rows.take(np.asarray([place])), evidence.finished, None)
            if not why.signal:
                return None
            total = np.pad(total, (0, max(0, int(why.ids.max(initial=0)) + 1 - len(total))))
            total[why.ids] += why.amounts
        return total / len(rows.index) if len(rows.index) else None

    # ------------------------------------------------------------------------------------- one against another
    def contrast(self, one: int, other: int, top: int = 10) -> Contrast:
        """See :meth:`Selection.contrast`."""
        self.evidence.forget_notes()
        return self._contrasted(self._number(one), self._number(other), top)

    def _contrasted(self, one: int, other: int, top: int) -> Contrast:
        found = [self._why(one), self._why(other)]
        added, first = [_added(*of) for of in found], found[0][0]
        names = sorted({**added[0], **added[1]}, key=lambda key: -abs(added[0].get(key, 0.0) - added[1].get(key, 0.0)))
        parts = [(name, added[0].get(name, 0.0), added[1].get(name, 0.0)) for name in names[:top]]
        signal, unit = first.signal, f"{first.unit} "
        labels = {
            name: label for name in names[:top]
            if signal and (label := self.behind.label(signal, int(name.removeprefix(unit)))) is not None
        }  # fmt: skip
        told = [self._explained(number, 0, of) for number, of in zip((one, other), found, strict=True)]
        return Contrast(told[0], told[1], tuple(parts), labels)

    # ------------------------------------------------------------------------------------- why not
    @cached_property
    def _scores(self) -> pa.Table:
        return self.selection.scores

    def _recorded(self, number: int) -> float:
        """A row's score for the target, as the selection has it; NaN if it has none."""
        names = (f"{kind}_{self.evidence.target}" for kind in ("avoided", "score"))
        column = self._scores.column(next((one for one in names if one in self._scores.column_names), "score"))
        value = column.filter(pc.equal(self._scores.column("source_index"), number)).to_pylist()
        return float(value[0]) if value and value[0] is not None else np.nan

    def why_not(self, number: int, top: int = 10) -> WhyNot:
        """See :meth:`Selection.why_not`."""
        self.evidence.forget_notes()
        if not 0 <= number < self.evidence.rows:
            raise NeuronSelectError(f"the pool has rows 0 to {self.evidence.rows - 1}", option="why_not", value=number)
        row = self._scores.filter(pc.equal(self._scores.column("source_index"), number)).to_pylist()[0]
        score = self._scores.column("score").to_numpy(zero_copy_only=False)
        picked = self._scores.column("selected").to_numpy(zero_copy_only=False)
        free = self._scores.column("excluded").is_null().to_numpy(zero_copy_only=False)
        threshold = self.evidence.made.budget.threshold  # alone says something where nothing was selected
        cut = float(np.nanmin(score[picked])) if picked.any() else np.nan if threshold is None else threshold
        own = np.nan if row["score"] is None else float(row["score"])
        ahead = int((free & ~picked & (score > own)).sum())
        stage, says = self._stage(row, own, cut, ahead)
        contrast = None
        if stage in ("below", "passed over") and self._can_tell():
            contrast = self._contrasted(int(self.selection.indices[-1]), number, top)
        elif stage in ("below", "passed over") and len(self.selection):
            says.append(
                "with the pool (--pool) or a store of its signals (--features) it is compared with the last pick"
            )
        value = None if np.isnan(own) else own
        return WhyNot(number, stage, value, row["rank"], cut, ahead, tuple(says), contrast)

    def _can_tell(self) -> bool:
        evidence = self.evidence
        if not len(self.selection) or (evidence.method.observes and evidence.pool is None):
            return False
        return evidence.pool is not None or bool(evidence.stored) or not evidence.method.signals

    def _stage(self, row: dict[str, Any], own: float, cut: float, ahead: int) -> tuple[str, list[str]]:
        number, made = row["source_index"], self.evidence.made
        if row["selected"]:
            place = self.evidence.place_of(number)
            return "selected", [f"it was selected, at place {place}", f"--row {place} says why"]
        if row["excluded"]:
            says = [_LEFT_OUT[row["excluded"]]]
            if more := self._more_of(row["excluded"], number):
                says.append(more)
            if np.isfinite(own):
                would = "would have been selected" if own >= cut else f"is {cut - own:.4g} below the cut"
                says.append(f"its score, {own:.4g}, {would}")
            return row["excluded"], says
        if np.isnan(own):
            return "below", ["it was read in a stream, which keeps no score of it"]
        rank = "" if row["rank"] is None else f", rank {row['rank']} of the pool"
        if own < cut:
            return "below", [
                f"its score, {own:.4g}{rank}, is {cut - own:.4g} below the cut at {cut:.4g}",
                f"{ahead} rows that were not selected either are above it",
            ]
        spread = made.spread
        kinds = [
            *(["the share that one source may have"] if spread and spread.source_share is not None else []),
            *(["a nearly equal row that was taken"] if spread and spread.drop_near_copies else []),
            *([f"the order of the picker {made.method.picker}"] if made.method.picker else []),
            *(["the number of tokens"] if made.budget.max_tokens is not None else []),
            *([f"how targets share the budget ({made.aggregate})"] if made.aggregate else []),
        ]
        reason = (
            " or ".join(kinds) or f"the order in which {made.method.name} takes rows ({self.evidence.selector.picker})"
        )
        lowest = f"not below the lowest selected, {cut:.4g}" if np.isfinite(cut) else "below no row selected"
        return "passed over", [f"its score, {own:.4g}{rank}, is {lowest}",
                               f"it was passed over for {reason}"]  # fmt: skip

    def _more_of(self, stage: str, number: int) -> str:
        """What the pool's text says about a row that was left out."""
        evidence = self.evidence
        if evidence.pool is None:
            return "" if stage in ("empty", "leak") else "the pool (--pool) says more"
        if stage == "duplicate":
            key = exact_key(evidence.conversation(evidence.pool, number))
            rows = evidence.conversations(evidence.pool.select(range(number)))
            return next((f"it is row {i} again" for i, row in enumerate(rows) if exact_key(row) == key), "")
        if stage == "error":
            try:
                evidence.row(number)
            except NeuronSelectError as cause:
                return cause.message
        if stage == "null":
            return self._why(number)[0].says
        return ""


def _added(why: Why, score: float) -> dict[str, float]:
    """What each part adds to a score: its amount, times score over the sum of all amounts."""
    scale = score / why.total if why.total else 0.0
    names = why.names or [f"{why.unit} {number}" for number in why.ids.tolist()]
    return dict(zip(names, (why.amounts * scale).tolist(), strict=True))
