"""What picks for several targets have in common: overlaps, the rows picked for many targets, and sets of targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Core:
    """Rows picked for at least ``least`` targets.

    Attributes:
        rows: int64, numbers in the pool, ascending. share: of all rows picked for any target.
        by_chance: the share expected if each target's picks were drawn at random, independently of the others.
    """

    least: int
    rows: np.ndarray
    share: float
    by_chance: float


@dataclass(frozen=True)
class SharedPicks:
    """Picks of one method for several targets.

    Attributes:
        targets: their names. rows: int64 ``[R]``, rows picked for any target, ascending. picked: bool ``[R, targets]``.
        total: rows of the pool.
    """

    targets: tuple[str, ...]
    rows: np.ndarray
    picked: np.ndarray
    total: int

    @classmethod
    def of(cls, picks: Mapping[str, np.ndarray], total: int) -> SharedPicks:
        """From the numbers of each target's picks in a pool of ``total`` rows."""
        none = np.empty(0, np.int64)
        rows = np.unique(np.concatenate([none, *picks.values()])).astype(np.int64)
        picked = np.stack([np.isin(rows, one) for one in picks.values()], axis=1) if picks else np.empty((0, 0), bool)
        return cls(tuple(picks), rows, picked, total)

    @property
    def served(self) -> np.ndarray:
        """int64 ``[R]``: the number of targets each row is picked for."""
        return self.picked.sum(axis=1, dtype=np.int64)

    @property
    def common(self) -> np.ndarray:
        """int64 ``[targets, targets]``: rows picked for both; on the diagonal, for one."""
        picked = self.picked.astype(np.int64)
        return picked.T @ picked

    @property
    def overlap(self) -> np.ndarray:
        """float64 ``[targets, targets]``: Jaccard index, rows picked for both over rows picked for either."""
        common = self.common
        sizes = np.diag(common)
        return common / np.maximum(1, sizes[:, None] + sizes[None, :] - common)

    @property
    def cores(self) -> list[Core]:
        """The rows picked for at least m targets, for every m from 2."""
        served, chance = self.served, self._by_chance()
        found = []
        for least in range(2, len(self.targets) + 1):
            rows = self.rows[served >= least]
            expected = float(chance[least:].sum() / max(chance[1:].sum(), 1e-300))
            found.append(Core(least, rows, len(rows) / max(1, len(self.rows)), expected))
        return found

    def _by_chance(self) -> np.ndarray:
        """float64 ``[targets + 1]``: probability that a row is drawn for exactly so many targets (Poisson binomial)."""
        found = np.ones(1)
        for share in (self.picked.sum(axis=0) / max(1, self.total)).tolist():
            found = np.convolve(found, (1 - share, share))
        return found

    @property
    def sets(self) -> list[tuple[tuple[str, ...], int]]:
        """Targets, and how many rows are picked for exactly these: each row counts once, the largest set first."""
        patterns, counts = np.unique(self.picked, axis=0, return_counts=True)
        found = [
            (tuple(name for name, there in zip(self.targets, pattern, strict=True) if there), count)
            for pattern, count in zip(patterns.tolist(), counts.tolist(), strict=True)
        ]
        places = {name: i for i, name in enumerate(self.targets)}
        return sorted(found, key=lambda one: (-one[1], len(one[0]), [places[name] for name in one[0]]))
