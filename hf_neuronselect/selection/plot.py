"""Pictures of a selection from Python: those of its report, as matplotlib figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from ..core.errors import NeuronSelectError
from ..core.spread import Spread
from ..explain.charts import top_shares
from ..explain.page_data import held_out_scores
from ..explain.plots import draw_lengths, draw_map, draw_profile, draw_scores, draw_shares, picture
from ..signals.columns import RowBatch
from ..store.store import FeatureStore
from .reasons import sampled
from .reported import reported
from .sample import PoolSample, pool_map, profile_of

if TYPE_CHECKING:
    from .selection import Selection


class Plots:
    """Pictures of a selection, see :attr:`Selection.plot`. Each is a new figure: change it, or write it with ``savefig``."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection

    def scores(self, target: str | None = None) -> Figure:
        """The pool's scores with the picks among them, as many random rows, and exemplars that were not fitted on.

        Args:
            target: one of several; default each of them, below each other.

        Raises:
            NeuronSelectError: no such target; no row has a score.
        """
        table = reported(self.selection, examples=False).table
        every = dict(table.targets) or {"": table.score}
        if target is not None:
            known = table.targets or dict.fromkeys(self.selection.provenance.targets, table.score)
            if target not in known:
                raise NeuronSelectError(f"one of {', '.join(known) or 'none'}", option="target", value=target)
            every = {target: known[target]}
        figure = picture(3.5 * len(every))
        axes = figure.subplots(2 * len(every), 1, squeeze=False, height_ratios=[6, 1.4] * len(every))[:, 0]
        for i, (name, values) in enumerate(every.items()):
            there = table.compared & np.isfinite(values)
            scores, picked = values[there], table.picked[there]
            if not len(scores):
                raise NeuronSelectError("no row has a score", option="target", value=name or None)
            drawn = np.zeros(len(scores), dtype=bool)  # the report's own draw
            drawn[np.random.default_rng(0).choice(len(scores), int(picked.sum()), replace=False)] = True
            upper, lower = axes[2 * i : 2 * i + 2]
            upper.sharex(lower)
            draw_scores((upper, lower), name, scores, picked, drawn, held_out_scores(self.selection.provenance, name))
        return figure

    def lengths(self) -> Figure:
        """Tokens of the picks against those of the pool.

        Raises:
            NeuronSelectError: tokens were not counted.
        """
        table = reported(self.selection, examples=False).table
        known = table.able & (table.n_tokens > 0)
        pool, picked = table.n_tokens[known], table.n_tokens[known & table.picked]
        if not len(picked):
            raise NeuronSelectError("the selection does not know how many tokens its rows have: select with a model")
        figure = picture(3.2)
        draw_lengths(figure.subplots(), pool, picked)
        return figure

    def sources(self) -> Figure:
        """Which sources the picks come from, and the pool's rows where the pool is at hand: the ten largest.

        Raises:
            NeuronSelectError: the rows have no column that names sources.
        """
        report = reported(self.selection, examples=True, reasons=False)
        if not report.sources:
            column = (self.selection.provenance.spread or Spread()).source_column
            raise NeuronSelectError("the rows have no such column of names", option="source_column", value=column)
        shares = top_shares(report.sources, report.pool_sources)
        figure = picture(0.9 + 0.42 * len(shares))
        draw_shares(figure.subplots(), shares)
        return figure

    def profile(self, features: FeatureStore | None = None) -> Figure:
        """Activations of 100 picks and of 100 random rows: of the 100 units of each kind that vary most (MoNA, figure 4).

        Args:
            features: a store of the pool's signals; default the one that the selection was made with, in the same process, or else
                the model runs over 100 to 400 rows of the pool.

        Raises:
            NeuronSelectError: neither a store nor the model and the pool are at hand; nothing varies.
        """
        found = profile_of(self._sample(features)[0])
        if found is None:
            raise NeuronSelectError("no unit varies between its rows", option="features")
        figure = picture(3.4 * len(found.panels))
        axes = figure.subplots(2 * len(found.panels), 1, squeeze=False)[:, 0]
        for i, panel in enumerate(found.panels):
            draw_profile((axes[2 * i], axes[2 * i + 1]), panel)
        return figure

    def map(self, features: FeatureStore | None = None) -> Figure:
        """Picks, exemplars and random rows of the pool by the two main directions of the method's signal.

        Args:
            features: as of :meth:`profile`.

        Raises:
            NeuronSelectError: neither a store nor the model and the pool are at hand; rows do not differ.
        """
        sample, exemplars = self._sample(features)
        found = pool_map(sample, exemplars)
        if found is None:
            raise NeuronSelectError("its rows do not differ", option="features")
        figure = picture(5.2)
        draw_map(figure.subplots(), found)
        return figure

    def _sample(self, features: FeatureStore | None) -> tuple[PoolSample, dict[str, RowBatch]]:
        """Rows of the pool, and the exemplars of the targets that are kept.

        Raises:
            NeuronSelectError: neither a store nor the model and the pool are at hand.
        """
        explainer = self.selection.explainer(features=features)
        found, why = sampled(explainer, reported(self.selection, examples=False).table)
        if found is None:
            raise NeuronSelectError(why, option="features")
        return found, dict(explainer.evidence.selector.kept)
