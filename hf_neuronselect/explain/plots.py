"""The report's pictures as matplotlib figures, with the report's own numbers.

No figure touches pyplot, its list of open figures or its backend. Colours are those of the report; text, lines and the
background follow matplotlib's settings, so that a dark style makes a dark figure.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..core.text import replaced
from .charts import cut_of, edges_of, shortened
from .pool_map import PoolMap
from .profile import Panel

POOL, PICKS, CHANCE, EXEMPLARS = "#a9b4be", "#d55e00", "#0072b2", "#00795b"
_BINS, _LENGTH_BINS = 56, 40  # as many as the report's pictures have
_RUG = 300  # at most so many strokes
_PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}  # a dollar sign in a name starts no formula


class Picture(Figure):
    """A figure that a notebook shows as it is, without pyplot."""

    def _repr_png_(self) -> bytes:
        out = io.BytesIO()
        self.savefig(out, format="png", dpi=144)
        return out.getvalue()


def picture(height: float) -> Picture:
    """A new figure of the usual width; ``height`` in inches."""
    return Picture(figsize=(7.6, height), layout="constrained")


def draw_scores(
    axes: tuple[Axes, Axes], name: str, scores: np.ndarray, picked: np.ndarray, drawn: np.ndarray, held: np.ndarray
) -> None:
    """How many rows have which score, the picks among them in colour; below, each pick beside as many random rows and exemplars.

    Args:
        axes: for the histogram and for the strokes below it, with one x axis. name: of the target, or "".
        scores: float64 ``[N]``, finite. picked: bool ``[N]``. drawn: bool ``[N]``, random rows, as many as the picks.
        held: float64, what exemplars score when they are not fitted on; may be empty.
    """
    upper, lower = axes
    cut = cut_of(scores, picked)
    edges = edges_of(scores, _BINS, cut)
    inside = np.clip(scores, edges[0], edges[-1])
    for kind, colour, values in (("pool", POOL, inside), ("picks", PICKS, inside[picked])):
        counts = np.histogram(values, edges)[0]
        upper.bar(edges[:-1], counts, 0.92 * np.diff(edges), align="edge", color=colour, label=kind)
    if cut is not None:
        ink = rcParams["text.color"]
        for axis in axes:
            axis.axvline(cut, color=ink, linestyle=(0, (4, 3)), linewidth=1.2)
        right = cut < (edges[0] + edges[-1]) / 2
        upper.annotate(
            f"cut {cut:.4g}", (cut, 1), (6 if right else -6, -2), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="left" if right else "right", va="top", fontweight="bold",
        )  # fmt: skip
    better = float((scores < np.median(scores[picked])).mean()) if picked.any() else 0.0
    title = f"Scores for {shortened(replaced(name), 40)}" if name else "Scores of the pool"
    _titled(upper, f"{title}: the median pick scores above {better:.1%} of {len(scores):,} rows")
    upper.set_ylabel("rows")
    upper.legend(frameon=False, loc="upper left" if cut is None or cut > edges.mean() else "upper right")
    upper.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    upper.yaxis.set_major_formatter(_grouped())
    upper.tick_params(labelbottom=False, bottom=False)
    strokes = {"picks": (PICKS, inside[picked]), "chance": (CHANCE, inside[drawn])}
    if len(held):
        strokes["exemplars"] = (EXEMPLARS, np.clip(held, edges[0], edges[-1]))
    colours, values = [colour for colour, _ in strokes.values()], [_some(found) for _, found in strokes.values()]
    heights = [-i for i in range(len(strokes))]
    lower.eventplot(values, lineoffsets=heights, linelengths=0.7, linewidths=0.9, colors=colours, alpha=0.7)
    lower.set_yticks(heights, list(strokes))
    lower.tick_params(left=False)
    for label, colour in zip(lower.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    lower.set_ylim(heights[-1] - 0.6, 0.6)
    lower.set_xlim(edges[0], edges[-1])
    unfitted = "; exemplars: when not fitted on" if len(held) else ""
    lower.set_xlabel(f"score of a row; chance: as many random rows{unfitted}")
    _bare(upper, "top", "right")
    _bare(lower, "top", "right", "left")


def draw_lengths(axis: Axes, pool: np.ndarray, picked: np.ndarray) -> None:
    """Tokens of the picks against those of the whole pool, as shares of either, on a logarithmic axis.

    Args:
        pool, picked: tokens of their rows, at least 1.
    """
    low, high = np.log10(max(1, int(pool.min()))), np.log10(max(2, int(pool.max())) + 1)
    edges = np.linspace(low, high, _LENGTH_BINS + 1)
    of_pool, of_picks = (np.histogram(np.log10(np.maximum(one, 1)), edges)[0] / len(one) for one in (pool, picked))
    axis.set_xscale("log")
    axis.stairs(of_pool, 10**edges, fill=True, color=POOL, label=f"pool, median {np.median(pool):,.0f}")
    axis.stairs(of_picks, 10**edges, color=PICKS, linewidth=2.2, label=f"picks, median {np.median(picked):,.0f}")
    for values, colour in ((pool, rcParams["text.color"]), (picked, PICKS)):
        axis.axvline(float(np.median(values)), color=colour, linestyle=(0, (3, 3)), linewidth=1.1)
    _titled(axis, f"A pick has {picked.mean():,.0f} tokens on average, a row of the pool {pool.mean():,.0f}")
    axis.set_xlim(10**low, 10**high)
    axis.set_xlabel("tokens of a row")
    axis.set_ylabel("share of the rows")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(_grouped())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.yaxis.set_major_formatter(_percent())
    axis.legend(frameon=False, loc="best")
    _bare(axis, "top", "right")


def draw_profile(axes: tuple[Axes, Axes], panel: Panel) -> None:
    """A line for each row and a column for each unit; the stronger the colour, the more active the unit.

    Args:
        axes: for the picks, and for as many random rows below them.
    """
    for axis, name, rows, colour in zip(axes, ("picks", "the pool"), panel.strength, (PICKS, POOL), strict=True):
        pixels = np.zeros((*rows.shape, 4))
        pixels[:, :, :3], pixels[:, :, 3] = to_rgb(colour), rows
        axis.imshow(pixels, aspect="auto", interpolation="nearest")
        axis.set_ylabel(name)
        axis.set_xticks([])
        axis.set_yticks([])
        _bare(axis, "top", "right", "bottom", "left")
    unit = "features of the SAE" if panel.features else f"neurons of the model ({panel.signal})"
    _titled(axes[0], f"{len(panel.units)} {unit}: {panel.apart:.1%} of their variance is between the two kinds of rows")
    axes[1].set_xlabel("from what picks have more to what random rows have more")


def draw_map(axis: Axes, found: PoolMap) -> None:
    """Random rows of the pool, picks and exemplars by the two main directions of a signal."""
    for name, places, colour, size in (
        ("random rows of the pool", found.places[~found.picked], POOL, 9), ("picks", found.places[found.picked], PICKS, 12),
    ):  # fmt: skip
        axis.scatter(places[:, 0], places[:, 1], size, colour, linewidths=0, label=name)
    own = np.concatenate([np.zeros((0, 2)), *found.exemplars.values()])
    if len(own):
        axis.scatter(own[:, 0], own[:, 1], 30, "none", marker="D", edgecolors=EXEMPLARS, label="exemplars")
    _titled(axis, f"The two main directions of {found.signal}, {sum(found.share):.0%} of the pool's variance")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.02), ncols=3)


def draw_shares(axis: Axes, shares: Sequence[tuple[str, float, float | None]]) -> None:
    """Shares of the picks by name, and those of the pool where they are known.

    Args:
        shares: name, share of the picks, share of the pool or None.
    """
    places = np.arange(len(shares), dtype=float)
    known = shares[0][2] is not None
    axis.barh(places - (0.2 if known else 0), [one[1] for one in shares], 0.38, color=PICKS, label="picks")
    if known:
        axis.barh(places + 0.2, [one[2] or 0.0 for one in shares], 0.32, color=POOL, label="pool")
        axis.legend(frameon=False, loc="lower right")
    for place, (_, picks, pool) in zip(places, shares, strict=True):
        said = f"{picks:.1%}" + ("" if pool is None else f" (pool {pool:.1%})")
        axis.annotate(said, (max(picks, pool or 0.0), place), (5, 0), textcoords="offset points", va="center")
    first = shares[0]
    of_pool = f", {first[2]:.1%} of the pool" if first[2] is not None else ""
    _titled(axis, f"{first[1]:.0%} of the picks come from {shortened(replaced(first[0]), 40)}{of_pool}")
    axis.set_yticks(places, [shortened(replaced(one[0]), 28) for one in shares], **_PLAIN)
    axis.tick_params(left=False)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(max(picks, pool or 0.0) for _, picks, pool in shares))
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(_percent())
    _bare(axis, "top", "right", "left")


def _titled(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", fontsize="medium", **_PLAIN)


def _bare(axis: Axes, *sides: str) -> None:
    axis.spines[list(sides)].set_visible(False)


def _some(values: np.ndarray) -> np.ndarray:
    """At most so many values as strokes can be told apart, spread as all of them are."""
    return values if len(values) <= _RUG else np.quantile(values, np.linspace(0, 1, _RUG))


def _grouped() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:,.0f}")


def _percent() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
