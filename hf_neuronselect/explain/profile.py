"""Activation profiles of picks and of random rows, as in figure 4 of the MoNA paper: numbers, and their picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..signals.columns import RowBatch
from .charts import WIDE, drawing, note_at
from .png import data_url

SAMPLES, UNITS = 100, 100
"""Rows of either kind and units, at most."""
PICKS_COLOUR, POOL_COLOUR = (213, 94, 0), (112, 128, 144)
_GAP = 4  # lines between the two kinds of rows


@dataclass(frozen=True)
class Panel:
    """The units of one signal that vary most between rows.

    Attributes:
        signal: its name. features: whether its units are an SAE's features, else the model's own neurons.
        units: int64 ``[u]``, those first that picks have most beyond random rows.
        picks, pool: float32 ``[rows, u]``, of picks and of random rows.
        apart: mean over the units of the share of their variance that is between the two kinds of rows; by chance
            ``1 / (rows - 1)``.
    """

    signal: str
    features: bool
    units: np.ndarray
    picks: np.ndarray
    pool: np.ndarray
    apart: float

    @property
    def by_chance(self) -> float:
        return 1 / max(1, len(self.picks) + len(self.pool) - 1)

    @property
    def strength(self) -> tuple[np.ndarray, np.ndarray]:
        """The picks' and the pool's values from 0 to 1: a unit's scale reaches from the 1st to the 99th percentile of all rows."""
        both = np.concatenate([self.picks, self.pool])
        low, top = np.quantile(both, (0.01, 0.99), axis=0)
        found = np.clip((both - low) / np.where(top > low, top - low, 1.0), 0, 1)
        return found[: len(self.picks)], found[len(self.picks) :]


@dataclass(frozen=True)
class Profile:
    """Activation profiles; panels of the model's own neurons come first."""

    panels: tuple[Panel, ...]


def panel_of(signal: str, features: bool, picks: RowBatch, pool: RowBatch) -> Panel | None:
    """The units with the largest variance over all these rows; None where nothing varies.

    Args:
        picks, pool: rows that have the signal.
    """
    dense, units = _dense(RowBatch.join([picks, pool]), signal)
    variance = dense.var(axis=0, dtype=np.float64)
    most = np.argsort(-variance, kind="stable")[:UNITS]
    most = most[variance[most] > 0]
    if not len(most) or not len(picks) or not len(pool):
        return None
    gap = dense[: len(picks), most].mean(axis=0) - dense[len(picks) :, most].mean(axis=0)
    most = most[np.argsort(-gap / dense[:, most].std(axis=0), kind="stable")]
    one, other = dense[: len(picks), most], dense[len(picks) :, most]
    middle = dense[:, most].mean(axis=0, dtype=np.float64)
    between = sum(len(rows) * (rows.mean(axis=0, dtype=np.float64) - middle) ** 2 for rows in (one, other))
    apart = float((between / (len(dense) * variance[most])).mean())
    return Panel(signal, features, units[most], one, other, apart)


def _dense(rows: RowBatch, signal: str) -> tuple[np.ndarray, np.ndarray]:
    """A signal's values as float32 ``[n, units]``, and the units' numbers; of a sparse signal those that are not 0."""
    if f"{signal}_indices" not in rows:
        flat = rows.dense(signal).reshape(len(rows), -1)
        return flat, np.arange(flat.shape[1])
    sparse = rows.sparse(signal)
    units, column = np.unique(sparse.indices, return_inverse=True)
    table = np.zeros((len(rows), len(units)), np.float32)
    table[np.repeat(np.arange(len(rows)), np.diff(sparse.indptr)), column] = sparse.values
    return table, units.astype(np.int64)


# ------------------------------------------------------------------------------------------ the picture
def profile_panel(panel: Panel, alt: str, width: int) -> str:
    """A line for each row and a column for each unit; the stronger the colour, the more active the unit is for its kind."""
    left, right, high = 58.0, width - 12.0, 150.0 if width == WIDE else 120.0
    picks, pool = panel.strength
    count = len(picks)
    pixels = np.zeros((count + _GAP + len(pool), len(panel.units), 4), np.uint8)
    for rows, colour, start in ((picks, PICKS_COLOUR, 0), (pool, POOL_COLOUR, count + _GAP)):
        pixels[start : start + len(rows), :, :3] = colour
        pixels[start : start + len(rows), :, 3] = np.rint(255 * rows)
    step = high * 2 / len(pixels)
    image = (
        f'<image href="{data_url(pixels)}" x="{left:.0f}" y="6" width="{right - left:.0f}" height="{2 * high:.0f}" '
        'preserveAspectRatio="none"/>'
    )
    middles = [6 + step * count / 2, 6 + step * (count + _GAP + len(panel.pool) / 2)]
    notes = [note_at(said, left - 6, at + 4, "end") for said, at in zip(("picks", "the pool"), middles, strict=True)]
    unit = "features" if panel.features else "neurons"
    ends = [
        note_at(f"← {unit} that picks have more", left, 2 * high + 24, "start"),
        note_at("random rows have more →" if width == WIDE else "random more →", right, 2 * high + 24, "end"),
    ]
    return drawing(alt, width, int(2 * high) + 30, [image, *notes, *ends])


def profile_said(panels: Sequence[Panel]) -> str:
    """What is to be seen, in a sentence or two."""
    parts = [
        f"{panel.apart:.1%} of the variance of {len(panel.units)} {'SAE features' if panel.features else 'neurons'}"
        for panel in panels
    ]
    first = panels[0]
    return (
        f"{len(first.picks)} picks against {len(first.pool)} random rows: {' and '.join(parts)} "
        f"{'is' if len(parts) == 1 else 'are'} between the two kinds of rows ({first.by_chance:.1%} by chance). "
        "The units that vary most are shown; where picks and random rows look alike, these units do not tell them apart."
    )
