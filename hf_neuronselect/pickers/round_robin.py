"""Exemplars in turn take their best row (RDS+, arXiv 2503.01807)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..core.options import opt
from .base import Picker, best_first, register_picker, table_of
from .vectors import Vectors


@register_picker
@dataclass(frozen=True)
class RoundRobin(Picker):
    """Each exemplar in turn takes its best row. Of a row that is taken already, ``taken`` says what happens."""

    name = "round-robin"
    paper = "arXiv:2503.01807"
    each = True

    taken: Literal["skip", "lose"] = opt(
        "skip", "skip: the exemplar takes its next best; lose: it loses the turn, as in the authors' code."
    )

    def order(
        self, scores: np.ndarray, valid: np.ndarray, wanted: int | None = None, vectors: Vectors | None = None
    ) -> np.ndarray:
        table = table_of(scores)
        orders = [best_first(table[:, i], valid) for i in range(table.shape[1])]
        if self.taken == "skip":
            return take_turns(orders)
        turns = np.stack(orders, axis=1).ravel()  # turn by turn: who comes late finds its row taken
        _, first = np.unique(turns, return_index=True)
        return turns[np.sort(first)]


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
