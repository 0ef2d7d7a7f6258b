"""From scores to rows: budgets, ties, several targets (methods.md section 9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..core.errors import NeuronSelectError, one_of
from ..core.provenance import Budget

AGGREGATES = ("quota", "round_robin", "mean", "max", "weighted")


def order_by_score(scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Valid rows, best first, ties to the smaller row: int64."""
    rows = np.flatnonzero(valid)
    return rows[np.lexsort((rows, -scores[rows]))]


def percentiles(scores: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Rank as a share in (0, 1]: 1 for the best of the valid rows; NaN elsewhere."""
    order = order_by_score(scores, valid)
    out = np.full(len(scores), np.nan)
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
) -> Picked:
    """Choose rows.

    Args:
        scores: target -> float64 ``[N]``. valid: rows that may be chosen.
        n_tokens: ``[N]``, for ``max_tokens``.
        aggregate: several targets: ``quota`` (k split evenly, union, refilled round-robin),
            ``round_robin``, or the ``mean``, ``max`` or ``weighted`` mean of per-target ranks.
        weights: target -> weight, for ``weighted``.

    Raises:
        NeuronSelectError: options that do not go together.
    """
    one_of(aggregate, AGGREGATES, "aggregate")
    names = list(scores)
    if len(names) == 1:
        combined = scores[names[0]]
        order = order_by_score(combined, valid)
        chosen = _cut(order, combined, valid, n_tokens, budget)
        return Picked(chosen, combined, _places(order, len(valid)))
    if budget.threshold is not None:
        raise NeuronSelectError(
            f"unclear with {len(names)} targets, whose scores have different scales; use k, ratio or max_tokens",
            option="threshold", value=budget.threshold,
        )  # fmt: skip
    ranks = {name: percentiles(scores[name], valid) for name in names}
    table = np.stack([ranks[name] for name in names])
    if aggregate in ("quota", "round_robin", "max"):
        combined = table.max(axis=0)
    elif aggregate == "mean":
        combined = table.mean(axis=0)
    else:
        if weights is None or set(weights) != set(names) or not all(w >= 0 for w in weights.values()) \
                or sum(weights.values()) <= 0:  # fmt: skip
            raise NeuronSelectError(
                f"needs a weight >= 0 for each of {', '.join(names)}, one of them above 0",
                option="weights",
                value=weights,
            )
        share = np.asarray([weights[name] for name in names], dtype=np.float64)
        combined = (share / share.sum()) @ table
    if aggregate in ("quota", "round_robin"):
        orders = [order_by_score(scores[name], valid) for name in names]
        wanted = budget.rows(len(valid))
        order = _round_robin(orders) if aggregate == "round_robin" or wanted is None else _quota(orders, wanted)
    else:
        order = order_by_score(combined, valid)
    chosen = _cut(order, combined, valid, n_tokens, budget)
    return Picked(chosen, combined, _places(order, len(valid)))


def _cut(order: np.ndarray, score: np.ndarray, valid: np.ndarray, n_tokens: np.ndarray, budget: Budget) -> np.ndarray:
    if budget.threshold is not None:
        return order[score[order] >= budget.threshold]
    if budget.max_tokens is not None:
        return order[: int(np.searchsorted(np.cumsum(n_tokens[order]), budget.max_tokens, side="right"))]
    return order[: budget.rows(len(valid))]


def _places(order: np.ndarray, total: int) -> np.ndarray:
    places = np.full(total, -1, dtype=np.int64)
    places[order] = np.arange(len(order))
    return places


def _round_robin(orders: list[np.ndarray], taken: list[int] | None = None) -> np.ndarray:
    """Each target in turn takes its best row not yet taken, until none is left."""
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


def _quota(orders: list[np.ndarray], wanted: int) -> np.ndarray:
    """Each target's own best ``wanted / targets`` (first targets one more), then round-robin."""
    share, more = divmod(min(wanted, len(orders[0])), len(orders))
    union: dict[int, None] = {}
    for i, order in enumerate(orders):
        union.update(dict.fromkeys(order[: share + (i < more)].tolist()))
    return _round_robin(orders, list(union))
