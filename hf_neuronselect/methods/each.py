"""Any method with a score for each exemplar, for pickers that let exemplars choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..pickers.base import row_scores
from ..signals.columns import RowBatch
from .base import Method, PoolMethod, Scorer, Target
from .why import Why

if TYPE_CHECKING:
    from ..signals.base import Signal


@dataclass(frozen=True)
class EachExemplar(PoolMethod):
    """A method fitted to each exemplar by itself: it scores a row ``[exemplars]`` times.

    What it keeps of exemplar i has the name ``i/NAME``.
    """

    of: Method

    def __post_init__(self) -> None:
        for name in ("name", "signals", "exemplar_signals", "judges_others", "scores_by_row"):
            object.__setattr__(self, name, getattr(self.of, name))

    @property
    def observes(self) -> bool:
        return self.of.observes

    def further_signals(self, exemplars: RowBatch) -> tuple[Signal, ...]:
        return self.of.further_signals(exemplars)

    def fit(self, exemplars: RowBatch) -> Target:
        fitted = [self.of.fit(exemplars.take(np.asarray([i]))) for i in range(len(exemplars))]
        return {f"{i}/{name}": array for i, one in enumerate(fitted) for name, array in one.items()}

    def start(self) -> Any:
        return self._pool_method.start()

    def observe(self, state: Any, rows: RowBatch) -> None:
        self._pool_method.observe(state, rows)

    def again(self, state: Any) -> bool:
        return self._pool_method.again(state)

    def finish(self, state: Any, targets: Mapping[str, Target]) -> Mapping[str, Target]:
        found = self._pool_method.finish(state, _apart(targets))
        return {
            name: {f"{i}/{key}": array for i in range(count) for key, array in found[f"{name}/{i}"].items()}
            for name, count in _counts(targets).items()
        }

    @property
    def _pool_method(self) -> PoolMethod:
        assert isinstance(self.of, PoolMethod)
        return self.of

    def scorer(self, targets: Mapping[str, Target]) -> Scorer:
        score, counts = self.of.scorer(_apart(targets)), _counts(targets)

        def each(rows: RowBatch) -> dict[str, np.ndarray]:
            found = score(rows)
            return {
                name: np.stack([row_scores(found[f"{name}/{i}"]) for i in range(count)], axis=1)
                for name, count in counts.items()
            }

        return each

    def drawn(self, scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return self.of.drawn(scores, rows)

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """Why the nearest exemplar is near, or how near each is where that says more."""
        scores = self.scorer({"target": target})(row)["target"][0]
        best = int(np.nanargmax(scores))
        own = _apart({"target": target})[f"target/{best}"]
        taken = None if exemplars is None else exemplars.take(np.asarray([best]))
        found = self.of.explain(row, own, taken)
        says = f"exemplar {best} of {len(scores)} is nearest; "
        if found.signal or found.moves is not None or found.names:
            return found.prefixed(says)
        return Why.of(f"{says}its score is {scores[best]:.4f}", "exemplar", np.nan_to_num(scores))

    def forecast(self, rows: int, targets: Mapping[str, Target]) -> str:
        return self.of.forecast(rows, _apart(targets))

    def compact_signals(self, targets: Sequence[Target]) -> tuple[Signal, ...]:
        return self.of.compact_signals(list(_apart({str(i): one for i, one in enumerate(targets)}).values()))


def _apart(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Every exemplar as a target of its own: ``NAME/i``."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, target in targets.items():
        for key, array in target.items():
            i, _, key = key.partition("/")
            found.setdefault(f"{name}/{i}", {})[key] = array
    return dict(found)


def _counts(targets: Mapping[str, Target]) -> dict[str, int]:
    """How many exemplars each target has."""
    return {name: 1 + max(int(key.partition("/")[0]) for key in target) for name, target in targets.items()}
