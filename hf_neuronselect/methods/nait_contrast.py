"""nait-contrast: NAIT's directions taken against the pool (ours; NAIT is arXiv 2603.13201)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..core.provenance import Budget
from ..signals.columns import RowBatch
from .base import PoolMethod, Scorer, Target, register_method
from .why import Moves, Why

CONTENT, ANSWER = "content_mean", "answer_mean"


@dataclass
class PoolMeans:
    """What the pool's rows have in common, gathered in two passes.

    Attributes:
        rows: seen in this pass. content, answer, unit: float64 ``[blocks, width]``, means of ``a_l``, ``r_l`` and, from
            the second pass, ``u_l``; sums while a pass lasts.
    """

    nth: int = 1
    rows: int = 0
    content: np.ndarray = field(default_factory=lambda: np.zeros(()))
    answer: np.ndarray = field(default_factory=lambda: np.zeros(()))
    unit: np.ndarray = field(default_factory=lambda: np.zeros(()))


@register_method
@dataclass(frozen=True)
class NaitContrast(PoolMethod):
    """``s = sum_l cos(a_l - mean_pool a_l, v_l)``: how a row differs from the pool, against how the exemplars do, top 10 %.

    ``a_l`` is a row's mean state over the turns' texts, ``r_l`` over its answers, at every block;
    ``u_l = unit(r_l - mean_pool r_l)`` and ``v_l = unit(mean_exemplars u_l - mean_pool u_l)``. Two passes over the
    pool's stored signals come first, one over the model.
    """

    name = "nait-contrast"
    paper = "ours, after arXiv:2603.13201"
    signals = (CONTENT, ANSWER)
    exemplar_signals = (ANSWER,)
    default_budget = Budget(ratio=0.10)

    def fit(self, exemplars: RowBatch) -> Target:
        """The exemplars' ``r_l``, float32 ``[n, blocks, width]``: what they share depends on the pool's mean."""
        return {"answers": exemplars.dense(ANSWER)}

    def start(self) -> PoolMeans:
        return PoolMeans()

    def observe(self, state: PoolMeans, rows: RowBatch) -> None:
        answers = rows.dense(ANSWER).astype(np.float64)
        state.rows += len(rows)
        if state.nth == 2:
            state.unit = state.unit + _unit(answers - state.answer).sum(axis=0)
            return
        state.answer = state.answer + answers.sum(axis=0)
        state.content = state.content + rows.dense(CONTENT).sum(axis=0, dtype=np.float64)

    def again(self, state: PoolMeans) -> bool:
        rows = max(1, state.rows)
        if state.nth == 2:
            state.unit = state.unit / rows
            return False
        state.answer, state.content = state.answer / rows, state.content / rows
        state.nth, state.rows = 2, 0
        return True

    def finish(self, state: PoolMeans, targets: Mapping[str, Target]) -> Mapping[str, Target]:
        """``directions`` ``[blocks, width]``, unit rows, and ``mean``, the pool's ``a_l``."""
        found = {}
        for name, target in targets.items():
            exemplars = _unit(target["answers"].astype(np.float64) - state.answer).mean(axis=0)
            found[name] = {"directions": _unit(exemplars - state.unit), "mean": state.content}
        return found

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        return self.scorer({"target": target})(rows)["target"]

    def scorer(self, targets: Mapping[str, Target]) -> Scorer:
        """A row's vectors are computed once for all targets with the same mean of the pool: here, all of them."""
        alike: dict[bytes, list[str]] = {}
        for name, target in targets.items():
            alike.setdefault(target["mean"].tobytes(), []).append(name)

        def score(rows: RowBatch) -> dict[str, np.ndarray]:
            content = rows.dense(CONTENT).astype(np.float64)
            found = {}
            for names in alike.values():
                vectors = _unit(content - targets[names[0]]["mean"])
                for name in names:
                    found[name] = np.einsum("nld,ld->n", vectors, targets[name]["directions"])
            return found

        return score

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """Each block's cosine, which add up to the score, and the tokens whose states moved it."""
        away = row.dense(CONTENT)[0].astype(np.float64) - target["mean"]
        norms = np.linalg.norm(away, axis=1, keepdims=True)
        weights = np.divide(target["directions"], norms, out=np.zeros_like(away), where=norms > 0)
        parts = (away * weights).sum(axis=1)
        says = f"{parts.sum():.4g} = the sum over {len(parts)} blocks of the cosine to how the exemplars differ from the pool"
        return Why.of(says, "block", parts, moves=Moves(CONTENT, weights, target["mean"]))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors divided by their norms, 0 where they are 0."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
