"""From scores to rows: budgets, ties, several targets (methods.md section 9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import NeuronSelectError, one_of
from ..core.provenance import Budget
from ..pickers.base import Picker, best_first, row_scores
from ..pickers.best_first import BestFirst
from ..pickers.round_robin import take_turns
from ..pickers.vectors import Vectors

AGGREGATES = ("quota", "round_robin", "mean", "max", "weighted")


def percentiles(order: np.ndarray, total: int) -> np.ndarray:
    """Rank as a share in (0, 1]: 1 for the first row of the order; NaN for rows not in it."""
    out = np.full(total, np.nan)
    out[order] = 1.0 - np.arange(len(order)) / max(1, len(order))
    return out


@dataclass(frozen=True)
class Picked:
    """Attributes:
    indices: selected rows, best first. score: ``[N]``, one score a row (several targets: of ranks).
    rank: ``[N]``, 0-based place among the valid rows by ``score``, -1 for the others.
    """

    indices: np.ndarray
    score: np.ndarray
    rank: np.ndarray


def pick(
    scores: Mapping[str, np.ndarray],
    valid: np.ndarray,
    n_tokens: np.ndarray,
    budget: Budget,
    *,
    aggregate: str = "quota",
    weights: Mapping[str, float] | None = None,
    picker: Picker | None = None,
    vectors: Vectors | None = None,
    thin: Callable[[np.ndarray, int | None], np.ndarray] | None = None,
) -> Picked:
    """Choose rows.

    Args:
        scores: target -> float64 ``[N]`` or ``[N, exemplars]``. valid: rows that may be chosen.
        n_tokens: ``[N]``, for ``max_tokens``.
        aggregate: several targets: ``quota`` (k split evenly, union, refilled in turns), ``round_robin``, or the
            ``mean``, ``max`` or ``weighted`` mean of per-target ranks.
        weights: target -> weight, for ``weighted``.
        thin: leaves rows out of an order; stops at as many as are wanted, if that is known.
        picker: order in which a target takes rows; default best first. vectors: of the rows, if it compares them.

    Raises:
        NeuronSelectError: options that do not go together.
    """
    picker, names = picker or BestFirst(), list(scores)
    check_aggregate(names, budget, aggregate, weights)
    wanted = budget.rows(len(valid))
    first = wanted if thin is None else None  # more may be looked at
    orders = {name: picker.order(scores[name], valid, first, vectors) for name in names}
    if len(names) == 1:
        combined, order = row_scores(scores[names[0]]), orders[names[0]]
        return Picked(_cut(order, combined, valid, n_tokens, budget, thin), combined, _places(order, len(valid)))
    table = np.stack([percentiles(orders[name], len(valid)) for name in names])
    if aggregate in ("quota", "round_robin", "max"):
        combined = table.max(axis=0)
    elif aggregate == "mean":
        combined = table.mean(axis=0)
    else:
        share = np.asarray([(weights or {})[name] for name in names], dtype=np.float64)
        combined = (share[:, None] * table).sum(axis=0) / share.sum()  # `@` rounds equal sums differently
    if aggregate in ("quota", "round_robin"):
        turns = list(orders.values())
        order = take_turns(turns) if aggregate == "round_robin" or wanted is None else _quota(turns, wanted)
    else:
        order = best_first(combined, valid)
    chosen = _cut(order, combined, valid, n_tokens, budget, thin)
    return Picked(chosen, combined, _places(order, len(valid)))


def check_aggregate(names: Sequence[str], budget: Budget, aggregate: str, weights: Mapping[str, float] | None) -> None:
    """Refuse a budget or aggregate that these targets cannot have.

    Raises:
        NeuronSelectError: an unknown aggregate, a threshold for several targets, wrong weights.
    """
    one_of(aggregate, AGGREGATES, "aggregate")
    if len(names) == 1:
        return
    if budget.threshold is not None:
        raise NeuronSelectError(
            f"unclear with {len(names)} targets, whose scores have different scales; use k, ratio or max_tokens",
            option="threshold", value=budget.threshold,
        )  # fmt: skip
    if aggregate == "weighted" and (
        weights is None or set(weights) != set(names) or not all(w >= 0 for w in weights.values())
        or sum(weights.values()) <= 0
    ):  # fmt: skip
        raise NeuronSelectError(
            f"needs a weight >= 0 for each of {', '.join(names)}, one of them above 0",
            option="weights",
            value=weights,
        )


def _cut(
    order: np.ndarray, score: np.ndarray, valid: np.ndarray, n_tokens: np.ndarray, budget: Budget,
    thin: Callable[[np.ndarray, int | None], np.ndarray] | None,
) -> np.ndarray:  # fmt: skip
    if thin is not None:
        most = budget.rows(len(valid))
        order = thin(order if budget.threshold is None else order[score[order] >= budget.threshold], most)
    if budget.threshold is not None:
        return order[score[order] >= budget.threshold]
    if budget.max_tokens is not None:
        return order[: int(np.searchsorted(np.cumsum(n_tokens[order]), budget.max_tokens, side="right"))]
    return order[: budget.rows(len(valid))]


def _places(order: np.ndarray, total: int) -> np.ndarray:
    places = np.full(total, -1, dtype=np.int64)
    places[order] = np.arange(len(order))
    return places


def _quota(orders: list[np.ndarray], wanted: int) -> np.ndarray:
    """Each target's own best ``wanted / targets`` (first targets one more), then in turns."""
    share, more = divmod(min(wanted, len(orders[0])), len(orders))
    union: dict[int, None] = {}
    for i, order in enumerate(orders):
        union.update(dict.fromkeys(order[: share + (i < more)].tolist()))
    return take_turns(orders, list(union))
