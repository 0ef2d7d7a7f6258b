"""Targets that must not be served: what rows score for them is taken off their score for the wanted ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from datasets import Dataset, IterableDataset

from ..core.configs import check_avoid_weight
from ..core.errors import NeuronSelectError
from ..methods.base import Method
from ..pickers.base import row_scores


def standardised(scores: np.ndarray) -> np.ndarray:
    """Scores in standard deviations from the pool's mean; 0 where all are the same.

    Args:
        scores: float64 ``[N]``, or ``[N, exemplars]`` with one mean and deviation for all exemplars, whose order stays. What
            is not finite stays as it is, and does not count.
    """
    known = np.sort(scores[np.isfinite(scores)])  # sorted: the sums do not depend on the order of the rows
    if not len(known) or known[0] == known[-1]:
        return np.where(np.isfinite(scores), 0.0, scores)
    return np.asarray((scores - known.mean()) / known.std())


def less_avoided(scores: Mapping[str, np.ndarray], avoided: Collection[str], weight: float) -> dict[str, np.ndarray]:
    """The wanted targets' scores, less the avoided ones'; as they are where none is avoided.

    ``z(target) - weight * max(0, largest z(avoided))``, where z is :func:`standardised` over the pool. Raw scores of one
    method for two targets have different means and spreads (projections, sums over words), so that their difference would
    depend on the exemplars' number and length. A row below the pool's mean for an avoided target loses nothing and gains
    nothing: otherwise rows that are like neither target would win.

    Args:
        scores: by target, avoided ones too: float64 ``[N]``, or ``[N, exemplars]``, of which an avoided target's best counts.
    """
    wanted = {name: values for name, values in scores.items() if name not in avoided}
    if not avoided:
        return wanted
    largest = np.stack([standardised(row_scores(scores[name])) for name in avoided]).max(axis=0)
    lost = np.maximum(largest, 0.0)
    return {
        name: standardised(values) - weight * (lost if values.ndim == 1 else lost[:, None])
        for name, values in wanted.items()
    }


def check_avoided(method: Method, targets: Collection[str], avoided: Collection[str], weight: float) -> None:
    """Refuse targets that cannot be avoided.

    Raises:
        NeuronSelectError: a name that is a target's, too, a method that scores no target, or a weight that is not above 0.
    """
    check_avoid_weight(weight)
    for name in avoided:
        if not method.needs_target:
            raise NeuronSelectError(
                f"{method.name} scores rows without a target, so nothing can be taken off: choose a method that has one, "
                "or remove it", option="avoid", value=name,
            )  # fmt: skip
        if name in targets:
            raise NeuronSelectError(
                "is the name of a target, too; avoid another one, or give each its own name: NAME=...",
                option="avoid", value=name,
            )  # fmt: skip


def check_whole(pool: Dataset | IterableDataset, avoided: Collection[str]) -> None:
    """Refuse a stream: what is taken off depends on the whole pool's scores.

    Raises:
        NeuronSelectError: it is one.
    """
    if avoided and isinstance(pool, IterableDataset):
        raise NeuronSelectError(
            "scores are measured by the whole pool's mean and spread, which a stream does not tell: load it as a Dataset "
            "(drop streaming)", option="avoid", value=next(iter(avoided)),
        )  # fmt: skip
