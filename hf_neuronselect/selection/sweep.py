"""A pool scored once for several targets; each is then selected for as if it were alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from ..core.cost import Cost
from ..core.provenance import Budget, SourceRecord
from ..core.spread import Spread
from ..methods.base import Target
from ..signals.columns import RowBatch
from ..store.store import FeatureStore
from .doubts import Doubts
from .marks import Marks
from .reader import Reader
from .scan import Scored, Tally, leave_out, scan, without_scores
from .scores import PoolScores
from .stages import opened, spooled

if TYPE_CHECKING:
    from .selector import NeuronSelector


@dataclass(frozen=True)
class Sweep:
    """All rows of a pool, scored for several targets.

    Attributes:
        scored: all rows as one batch: none is marked, and what a method's seed adds is not added.
        compared: the signal by which a picker compares rows, or none.
        tally, passes: what one of the targets cost: an equal share of the seconds, the passes as a whole.
    """

    pool: Dataset
    scored: Scored
    compared: Sequence[str]
    doubts: Doubts
    tally: Tally
    passes: Cost

    def rows(
        self, selector: NeuronSelector, targets: Collection[str], exclude: Sequence[str], marks: Marks | None, tally: Tally
    ) -> Scored:  # fmt: skip
        """The rows as :func:`~hf_neuronselect.selection.scan.scan` scores them for some of the targets.

        Args:
            selector: of the method that scored, or the same with another seed. marks: needed where something is left out.
        """
        given = self.scored
        excluded = without_scores(given.excluded)
        if exclude:
            assert marks is not None
            leave_out(excluded, marks, exclude)
        method = selector.scored_by
        scores = {
            name: given.scores[name] if name in selector.avoided else method.drawn(given.scores[name], given.index)
            for name in targets
        }
        found = replace(given, scores=scores, excluded=without_scores(excluded, scores))
        tally.count(found)
        tally.reasons += self.tally.reasons
        tally.read_seconds, tally.score_seconds = self.tally.read_seconds, self.tally.score_seconds
        return found

    def pick(
        self, target: str, selector: NeuronSelector, budget: Budget, exclude: Sequence[str], spread: Spread | None,
        marks: Marks | None,
    ) -> np.ndarray:  # fmt: skip
        """Rows that a selection for one target holds: int64, best first."""
        rows = self.rows(selector, [target, *selector.avoided], exclude, marks, Tally())
        options = selector.extractor.extraction.options if selector.extractor else None
        scores = PoolScores.of(
            self.pool, [rows], "quota", None, selector.picker, self.compared, spread, options, selector.avoided,
            selector.avoid_weight,
        )  # fmt: skip
        return scores.pick(budget).indices


def sweep_pool(
    selectors: Sequence[NeuronSelector], pool: Dataset, store: FeatureStore | None, source: SourceRecord,
    more: Mapping[str, Target] | None = None,
) -> Sweep:  # fmt: skip
    """Score a pool once for the targets of several selectors.

    Args:
        selectors: fitted, of one method and picker, with targets of different names (or without a target).
        store: has signals of the pool. more: further targets of the same method, of which nothing is doubted.

    Raises:
        NeuronSelectError: as :meth:`~hf_neuronselect.NeuronSelector.select`.
    """
    first = selectors[0]
    targets = {name: target for one in selectors for name, target in one.scored_against.items()}
    reader = Reader(
        first.method.signals, first.extractor, {k: v for one in selectors for k, v in one.identities.items()},
        needs_rows=False, store=store, compact=tuple(dict.fromkeys(s for one in selectors for s in one.compact_signals())),
    )  # fmt: skip
    reader.name = source.id
    method, compared = opened(first.method, first.picker, pool, source, reader)
    halves = {name: half for one in selectors for name, half in one.halves.items()}
    doubts = Doubts(method, halves if reader.whole(pool.column_names) else {}, watched=targets)
    tally = Tally()
    with spooled(method, pool, reader):
        parts = list(
            scan(
                pool,
                reader,
                method,
                {**targets, **(more or {})},
                first.leakage,
                (),
                tally,
                doubts,
                None,
                compared,
                raw=True,
            )
        )
    count = len(selectors)
    tally = replace(tally, read_seconds=tally.read_seconds / count, score_seconds=tally.score_seconds / count)
    return Sweep(pool, _joined(parts), compared, doubts, tally, reader.cost())


def _joined(parts: Sequence[Scored]) -> Scored:
    """Batches as one."""
    names = ("index", "n_tokens", "truncated", "excluded")
    return Scored(
        scores={name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores},
        rows=None,
        vectors=RowBatch.join([part.vectors for part in parts]),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
    )
