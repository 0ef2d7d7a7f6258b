"""A ratio estimated from one target's scores of a whole pool (``ratio="auto"``): three proxies and one rule.

With N rows read, rows in the order they are picked, ``m_r`` the mean of their features over the first ``r N`` and ``t`` the
exemplars' mean:

* ``knee``: Kneedle (Satopää et al. 2011) on the sorted scores. Scores and ranks are scaled to [0, 1]; the knee is the rank
  deepest below the line from the best to the worst row.
* ``coverage``: the smallest share whose ``sim(m_r, t) - sim(m_1, t)`` is :data:`COVERED` of the largest. ``sim`` is the
  generalized Jaccard of sparse features and the cosine of dense ones.
* ``features``: the smallest share whose effective number of features, ``exp(-sum p log p)`` with ``p = |m_r| / sum |m_r|``, is
  that of the exemplars' mean: fewer rows are more alike than the exemplars are.

The rule: the median of the proxies that name a share, on a log scale. The papers leave the ratio open; all of this is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.options import AUTO
from ..core.provenance import AutoRatio, Budget
from ..methods.base import Method, Target
from ..pickers.base import row_scores
from ..pickers.vectors import Vectors
from ..signals.base import SIGNALS
from .scores import PoolScores

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
LEAST = 20  # rows: a mean over fewer says little
LEAST_POOL = 100
COVERED = 0.95
FLAT = 0.1
"""A knee less deep than this share of the scores' range is none: of evenly spread scores it is chance."""


def check_auto(method: Method, targets: int, streaming: bool) -> None:
    """Refuse what no ratio can be estimated for. Called before rows are scored.

    Raises:
        NeuronSelectError: a control, several targets, or a stream.
    """
    why = ""
    if not method.grades:
        why = f"scores of {method.name} do not say how good a row is; give a number, e.g. 0.05"
    elif targets > 1:
        why = f"estimates the ratio of one target, and there are {targets}; select for each alone, or give a number"
    elif streaming:
        why = "needs the scores of the whole pool: load it as a Dataset (drop streaming), or give k"
    if why:
        raise NeuronSelectError(why, option="ratio", value=AUTO)


def feature_signal(method: Method) -> tuple[str, ...]:
    """The signal whose vectors are compared with the exemplars' mean; () where the method reads none."""
    first = next(iter(method.signals), None)
    return (first,) if isinstance(first, str) and method.needs_target and SIGNALS[first].has_vector else ()


def estimate_ratio(scored: PoolScores, method: Method, target: Target, compared: Sequence[str] = ()) -> AutoRatio:
    """Estimate the ratio.

    Args:
        scored: of one target. target: what the method keeps of it.
        compared: the signal of ``scored.vectors``, or none.

    Raises:
        NeuronSelectError: too few rows, equal scores, or no proxy names a share.
    """
    total, able = len(scored.valid), int(scored.valid.sum())
    scores = np.sort(row_scores(next(iter(scored.scores.values())))[scored.valid])[::-1]
    if able < LEAST_POOL:
        raise NeuronSelectError(
            f"needs {LEAST_POOL} rows that can be selected, and there are {able}; give a number, or a larger pool",
            option="ratio", value=AUTO,
        )  # fmt: skip
    if scores[0] == scores[-1]:
        raise NeuronSelectError(
            f"all rows have the same score ({scores[0]:g}): none is better than another; give a number, or another method",
            option="ratio", value=AUTO,
        )  # fmt: skip
    asked = {share: Budget(ratio=share).rows(total) or 0 for share in SHARES}
    counts = {share: min(able, rows) for share, rows in asked.items() if rows >= LEAST}
    shares = [share for share in counts if counts[share] < able or share == SHARES[-1]]
    estimates, absent, curves = {}, {}, {}

    curves["knee"] = depths(scores)[[counts[share] - 1 for share in shares]]
    rows, depth = knee(scores)
    if depth < FLAT:
        absent["knee"] = f"the scores fall evenly: {depth:.2f} below the straight line at most"
    else:
        estimates["knee"] = min(1.0, max(rows, LEAST) / total)

    if reason := _no_features(method, target, compared):
        absent |= dict.fromkeys(("coverage", "features"), reason)
    else:
        assert scored.vectors is not None
        order = scored.picker.order(scored.scores[next(iter(scored.scores))], scored.valid, None, scored.vectors)
        means = list(mean_features(scored.vectors, order, [counts[share] for share in shares]))
        wanted = np.asarray(target["prototype"], dtype=np.float64)
        alike = np.asarray([similarity(mean, wanted, scored.vectors.sparse is not None) for mean in means])
        curves["coverage"], gain = alike, alike - alike[-1]
        if gain.max() <= 0:
            absent["coverage"] = "no share of the pool is nearer to the exemplars than the whole pool"
        else:
            estimates["coverage"] = shares[int(np.argmax(gain >= COVERED * gain.max()))]
        curves["features"] = number = np.asarray([effective_number(mean) for mean in means])
        if not (enough := number >= effective_number(wanted)).any():
            absent["features"] = "no share of the pool has as many features as the exemplars"
        else:
            estimates["features"] = shares[int(np.argmax(enough))]
    if not estimates:
        raise NeuronSelectError(f"no ratio can be told: {'; '.join(dict.fromkeys(absent.values()))}; give a number",
                                option="ratio", value=AUTO)  # fmt: skip
    return AutoRatio(
        ratio=combined(list(estimates.values())),
        estimates={name: float(f"{share:.4g}") for name, share in estimates.items()},
        absent=absent,
        shares=tuple(shares),
        curves={name: tuple(float(f"{value:.6g}") for value in curve) for name, curve in curves.items()},
    )


def combined(shares: Sequence[float]) -> float:
    """The median on a log scale, to three digits."""
    return float(f"{np.exp(np.median(np.log(shares))):.3g}")


def _no_features(method: Method, target: Target, compared: Sequence[str]) -> str:
    """Why there are no features to compare, or ""."""
    if not feature_signal(method) or "prototype" not in target:
        return f"{method.name} keeps no mean features of the exemplars"
    if tuple(compared) != feature_signal(method):
        return f"the picker compares rows by {', '.join(compared)}"
    return ""


# --------------------------------------------------------------------------------------------- proxies
def depths(scores: np.ndarray) -> np.ndarray:
    """How far each score lies below the line from the best to the worst, both scaled to [0, 1]: float64 ``[n]``.

    Args:
        scores: best first, not all equal.
    """
    height = (scores - scores[-1]) / (scores[0] - scores[-1])
    return np.asarray(1.0 - np.arange(len(scores)) / (len(scores) - 1) - height)


def knee(scores: np.ndarray) -> tuple[int, float]:
    """How many rows come before the knee, and its depth; of scores best first, not all equal."""
    depth = depths(scores)
    at = int(np.argmax(depth))
    return at, float(depth[at])


def mean_features(vectors: Vectors, order: np.ndarray, counts: Sequence[int]) -> Iterator[np.ndarray]:
    """Mean vector of the first rows of an order, for each of the ascending counts: float64 ``[width]``."""
    sparse, done = vectors.sparse, 0
    width = vectors.dense.shape[1] if vectors.dense is not None else 0
    total = np.zeros(width if sparse is None else int(sparse.indices.max(initial=0)) + 1)
    for count in counts:
        rows, done = order[done:count], count
        if vectors.dense is not None:
            total += vectors.dense[vectors.place[rows]].sum(axis=0, dtype=np.float64)
        else:
            part = vectors.row(rows)
            np.add.at(total, part.indices, part.values.astype(np.float64))
        yield total / count


def similarity(one: np.ndarray, other: np.ndarray, sparse: bool) -> float:
    """Generalized Jaccard of two nonnegative vectors, or the cosine of two dense ones; 0 where one is zero.

    Of sparse ones, a width may be smaller: the rest is 0.
    """
    if not sparse:
        scale = float(np.sqrt((one @ one) * (other @ other)))
        return float(one @ other) / scale if scale > 0 else 0.0
    width = max(len(one), len(other))
    a, b = (np.pad(vector, (0, width - len(vector))) for vector in (one, other))
    larger = float(np.maximum(a, b).sum())
    return float(np.minimum(a, b).sum()) / larger if larger > 0 else 0.0


def effective_number(mean: np.ndarray) -> float:
    """``exp`` of the entropy of a vector's shares: from 1 (one feature) to the width; 0 of a zero vector."""
    size = np.abs(mean)
    if not size.sum() > 0:
        return 0.0
    shares = size[size > 0] / size.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
