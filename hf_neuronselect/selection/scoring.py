"""Scores of rows by fitted targets: as columns, or as a predicate for ``Dataset.filter``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, IterableDataset

from ..core.errors import NeuronSelectError
from ..core.progress import untracked
from ..methods import Method
from ..methods.base import Target
from ..pickers.base import row_scores
from ..rows.leakage import Leakage
from ..signals.extractor import NeuronFeatureExtractor
from ..store.store import FeatureStore
from .avoid import check_whole, less_avoided
from .reader import Reader
from .scan import Tally, scan

Data: TypeAlias = Dataset | IterableDataset


class Scoring:
    """The part of :class:`~hf_neuronselect.NeuronSelector` that gives scores and picks nothing."""

    method: Method
    targets: dict[str, Target]
    avoided: dict[str, Target]
    avoid_weight: float
    extractor: NeuronFeatureExtractor | None

    @property
    def scored_by(self) -> Method:
        raise NotImplementedError

    @property
    def scored_against(self) -> dict[str, Target]:
        """Every target that rows are scored for: the wanted and the avoided ones."""
        return {**self.targets, **self.avoided}

    def _reader(
        self, extractor: NeuronFeatureExtractor | None, store: FeatureStore | None = None, *, needs_rows: bool = False
    ) -> Reader:
        raise NotImplementedError

    def _score_batch(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
        """Scores of a batch that has the signals' columns: target -> float64 ``[n]``."""
        with untracked():
            return self._scores(Dataset.from_dict(batch), self._reader(None))

    def _scores(self, data: Dataset, reader: Reader) -> dict[str, np.ndarray]:
        found = scan(data, reader, self.scored_by, self.scored_against, Leakage(), (), Tally(), avoided=self.avoided)
        parts = list(found)
        scores = {name: np.concatenate([part.scores[name] for part in parts]) for name in self.scored_against}
        return {name: row_scores(one) for name, one in less_avoided(scores, self.avoided, self.avoid_weight).items()}

    def score(
        self, pool: Data, *, extractor: NeuronFeatureExtractor | None = None, features: FeatureStore | None = None
    ) -> Data:
        """Add ``neuron_score`` (several targets: ``neuron_score_<target>``) to every row; NaN where there is none.

        Args:
            extractor, features: as of :meth:`select`.

        Raises:
            NeuronSelectError: a score column is there already; see :meth:`select`.
        """
        extractor = extractor or self.extractor
        check_whole(pool, self.avoided)
        names = self._score_names()
        if taken := [name for name in names.values() if name in (pool.column_names or [])]:
            raise NeuronSelectError(f"the data already has the column {taken[0]!r}; remove or rename it")
        if isinstance(pool, Dataset) or features is not None:
            scores = self._scores(pool, self._reader(extractor, features))
            for target, column in names.items():
                pool = pool.add_column(column, scores[target])
            return pool
        if self.method.observes:
            raise NeuronSelectError(
                "looks at the whole pool before it scores; load the pool as a Dataset", option="method",
                value=self.method.name,
            )  # fmt: skip
        mapped = pool if extractor is None else pool.map(extractor.with_features(self.method.signals), batched=True)

        def add(batch: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
            scores = self._score_batch(batch)
            return {column: scores[target] for target, column in names.items()}

        return mapped.map(add, batched=True, batch_size=1000)

    def _score_names(self) -> dict[str, str]:
        if len(self.targets) == 1:
            return dict.fromkeys(self.targets, "neuron_score")
        return {name: f"neuron_score_{name}" for name in self.targets}

    def above(self, threshold: float) -> Callable[[Mapping[str, Sequence[Any]]], list[bool]]:
        """A predicate for ``pool.filter(selector.above(0.2), batched=True)`` over a pool with feature columns.

        Raises:
            NeuronSelectError: several targets, or avoided ones.
        """
        if self.avoided:
            raise NeuronSelectError(
                "takes rows off by the whole pool's scores, and a filter sees a batch at a time; use select(threshold=...)",
                option="avoid", value=next(iter(self.avoided)),
            )  # fmt: skip
        if len(self.targets) != 1:
            raise NeuronSelectError(
                f"unclear with {len(self.targets)} targets; use select", option="threshold", value=threshold
            )
        target = next(iter(self.targets))

        def keep(batch: Mapping[str, Sequence[Any]]) -> list[bool]:
            return (self._score_batch(batch)[target] >= threshold).tolist()

        return keep
