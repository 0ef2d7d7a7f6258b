"""In which order rows are taken once they are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np


def order_by_score(scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Valid rows, best first, ties to the smaller row: int64."""
    rows = np.flatnonzero(valid)
    return rows[np.lexsort((rows, -scores[rows]))]


@dataclass(frozen=True)
class Picker(ABC):
    """Orders the rows of a pool for one target."""

    @abstractmethod
    def order(self, scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """The order in which rows are taken.

        Args:
            scores: float64 ``[N]``, or ``[N, exemplars]``. valid: bool ``[N]``, rows that may be taken.

        Returns:
            int64, every valid row once.
        """


@dataclass(frozen=True)
class BestFirst(Picker):
    """The largest score first; of several exemplars the best counts."""

    def order(self, scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return order_by_score(row_scores(scores), valid)


@dataclass(frozen=True)
class RoundRobin(Picker):
    """Each exemplar in turn takes its best row that is not taken yet (RDS+, arXiv 2503.01807)."""

    def order(self, scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
        table = scores[:, None] if scores.ndim == 1 else scores
        return take_turns([order_by_score(table[:, i], valid) for i in range(table.shape[1])])


def take_turns(orders: list[np.ndarray], taken: list[int] | None = None) -> np.ndarray:
    """Each order in turn gives its best row that is not taken yet, until none is left.

    Args:
        taken: rows taken before.
    """
    taken = list(taken or [])
    seen, at = set(taken), [0] * len(orders)
    total = len(orders[0])
    while len(taken) < total:
        for i, order in enumerate(orders):
            while at[i] < len(order) and int(order[at[i]]) in seen:
                at[i] += 1
            if at[i] < len(order):
                taken.append(int(order[at[i]]))
                seen.add(taken[-1])
    return np.asarray(taken, dtype=np.int64)


def row_scores(scores: np.ndarray) -> np.ndarray:
    """One score a row: of several exemplars the best."""
    return scores if scores.ndim == 1 else scores.max(axis=1)
