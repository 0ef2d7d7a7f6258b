"""How well single features tell where a row comes from: SAE latents against raw neurons, on one model's stored signals.

    python benchmarks/monosemanticity.py --features STORE --pool pool.jsonl --out benchmarks/monosemanticity.json

For each source of a labelled pool, the AUC of every single feature against "the row is of this source": the probability that a row of
the source has a larger value than another row. 0.5 is chance, 1 is a feature for this source alone. The best feature is chosen on one half
of the rows and measured on the other half. All values are means over a row's tokens, as stored.

Criteria, written before the first run:

* Rows: 10,000 drawn at random (seed 0) and cut into two halves in that order. Sources: those with at least 50 rows in either half.
* Spaces: ``sae``, the latents of the SAE at one block; ``hidden``, the dimensions of the hidden state that the SAE reads, either
  sign; ``gate``, the 32 largest gate activations a token of the MLP at the same block, as MoNA's comparison has them.
* The result is the mean over sources of the best feature's AUC on the second half. Intervals (2.5 to 97.5 %) are of 500 resamples of
  the second half's rows and of the sources, the same for all spaces.
* Latents are *more* monosemantic in this sense if the interval of ``sae - hidden`` and that of ``sae - gate`` lie above 0, *less* if one
  lies below 0; otherwise nothing is shown.
* A space with more features has more tries. ``sae, as many`` has as many latents as the hidden state has dimensions, drawn at random, the mean
  of 10 draws: if its interval against ``hidden`` does not lie above 0, the number of latents makes the difference, and that is said.
* ``hidden, turned`` is the hidden state in a random orthonormal basis: if ``hidden`` is no better than it, single neurons mean no more
  than any other direction.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, disable_progress_bars

from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.signals.base import BOOKKEEPING
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.store.store import FeatureStore

ROWS, LEAST, DRAWS, RESAMPLES = 10_000, 50, 10, 500
SIGNALS = {"sae": "mona", "hidden": "hidden", "gate": "polysemantic"}
logger = logging.getLogger("monosemanticity")


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Places of values ``[n]`` from 1, the smallest first; equal ones share their mean place."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def aucs(columns: Iterable[np.ndarray], members: np.ndarray) -> np.ndarray:
    """AUC of every feature against every source.

    Args:
        columns: features, a value for each row ``[n]``. members: bool ``[n, sources]``.

    Returns:
        float64 ``[features, sources]``.
    """
    inside = members.sum(axis=0)
    outside = len(members) - inside
    of = members.T.astype(np.float64)
    sums = np.stack([of @ average_ranks(column) for column in columns])
    return (sums - inside * (inside + 1) / 2) / (inside * outside)


@dataclass
class Space:
    """Features of rows: float ``[n, features]``. signed: whether a feature may tell by small values, too."""

    values: np.ndarray
    signed: bool = False

    @classmethod
    def of(cls, batch: RowBatch, signal: str) -> Space:
        if signal == SIGNALS["hidden"]:
            return cls(batch.dense(signal).astype(np.float64), signed=True)
        sparse = batch.sparse(signal)
        values = np.zeros((len(batch), int(sparse.indices.max()) + 1), np.float32)
        values[np.repeat(np.arange(len(batch)), np.diff(sparse.indptr)), sparse.indices] = sparse.values
        return cls(values)

    def aucs(self, members: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """float64 ``[features, sources]``."""
        return aucs((self.values[rows, f] for f in range(self.values.shape[1])), members[rows])

    def best(self, known: np.ndarray, only: np.ndarray | None = None) -> list[tuple[int, int]]:
        """For each source the feature with the largest of the known AUCs, and its sign; ``only``: among these."""
        gain = np.abs(known - 0.5) if self.signed else known
        features = np.arange(len(known)) if only is None else only
        chosen = features[gain[features].argmax(axis=0)]
        return [(int(f), 1 if not self.signed or known[f, s] >= 0.5 else -1) for s, f in enumerate(chosen)]


def measured(space: Space, best: list[tuple[int, int]], members: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float64 ``[sources]``: AUC of each source's feature on rows."""
    return np.asarray([
        aucs([sign * space.values[rows, f]], members[rows][:, [s]])[0, 0] for s, (f, sign) in enumerate(best)
    ])  # fmt: skip


def interval(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in np.percentile(values, [2.5, 97.5])]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--features", type=Path, required=True, help="store with the signals mona, hidden and polysemantic"
    )
    parser.add_argument("--pool", required=True, help="its pool, with a column source")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    disable_progress_bars()
    pool, store = load_rows(args.pool).data, FeatureStore(args.features)
    assert isinstance(pool, Dataset) and len(pool) == len(store), "the store is of another pool"
    signals = {name: store.dataset(signal) for name, signal in SIGNALS.items()}
    usable = np.flatnonzero(
        [not any(skips) for skips in zip(*(one[BOOKKEEPING[0]][:] for one in signals.values()), strict=True)]
    )
    draw = np.random.default_rng(0)
    rows = draw.permutation(usable)[: args.rows]
    sources = np.asarray(pool["source"][:])[rows]
    half = len(rows) // 2
    first, second = np.arange(half), np.arange(half, len(rows))
    names = [
        name for name in np.unique(sources) if min((sources[part] == name).sum() for part in (first, second)) >= LEAST
    ]
    members = sources[:, None] == np.asarray(names)
    spaces = {}
    for name, signal in SIGNALS.items():
        columns = [c for c in signals[name].column_names if c.startswith(signal)]
        table = signals[name].with_format("arrow").select_columns(columns)[rows]
        batch = RowBatch(np.arange(len(rows)), np.ones(len(rows), bool), {c: table.column(c) for c in columns})
        spaces[name] = Space.of(batch, signal)
        logger.info("%s: %d rows, %d features", name, *spaces[name].values.shape)
    width = spaces["hidden"].values.shape[1]
    turn = np.linalg.qr(draw.normal(size=(width, width)))[0]
    spaces["hidden, turned"] = Space(spaces["hidden"].values @ turn, signed=True)
    alive = np.flatnonzero(spaces["sae"].values[first].any(axis=0))
    known = {name: space.aucs(members, first) for name, space in spaces.items()}
    best = {name: [space.best(known[name])] for name, space in spaces.items()}
    some = [draw.choice(alive, min(width, len(alive)), replace=False) for _ in range(DRAWS)]
    spaces["sae, as many"], best["sae, as many"] = (
        spaces["sae"],
        [spaces["sae"].best(known["sae"], one) for one in some],
    )

    def result(on: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: np.mean([measured(spaces[name], one, members, on) for one in tries], axis=0)
            for name, tries in best.items()
        }

    found = result(second)
    again: dict[str, list[float]] = {name: [] for name in found}
    for i in range(RESAMPLES):
        of_rows, of_sources = draw.choice(second, len(second)), draw.integers(0, len(names), len(names))
        for name, values in result(of_rows).items():
            again[name].append(float(values[of_sources].mean()))
        if i % 100 == 0:
            logger.info("resample %d", i)
    drawn = {name: np.asarray(values) for name, values in again.items()}
    pairs = (("sae", "hidden"), ("sae", "gate"), ("sae, as many", "hidden"), ("hidden", "hidden, turned"))
    record = {
        "rows": len(rows), "sources": {name: int(members[:, s].sum()) for s, name in enumerate(names)},
        "signals": {name: store.identity_of(signal) for name, signal in SIGNALS.items()},
        "features": {name: int(space.values.shape[1]) for name, space in spaces.items()} | {"sae, as many": width},
        "alive": len(alive),
        "mean": {name: {"auc": round(float(values.mean()), 4), "interval": interval(drawn[name]), "least": round(float(values.min()), 4)}
                 for name, values in found.items()},
        "differences": [
            {"of": one, "against": other, "auc": round(float((found[one] - found[other]).mean()), 4),
             "interval": interval(drawn[one] - drawn[other]), "better_for": int((found[one] > found[other]).sum())}
            for one, other in pairs
        ],
        "by_source": {name: {space: round(float(values[s]), 4) for space, values in found.items()} for s, name in enumerate(names)},
        "best": {name: {space: best[space][0][s] for space in SIGNALS} for s, name in enumerate(names)},
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    logger.info(json.dumps({"mean": record["mean"], "differences": record["differences"]}, indent=1))


if __name__ == "__main__":
    main()
