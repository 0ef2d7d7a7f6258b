"""Pictures of a report as inline SVG: without script or style attribute, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

from ..core.text import replaced

WIDE, NARROW = 760, 380
"""Widths a picture is drawn in, for a screen and for a phone: text is legible on both."""
_RUG = 300  # at most so many strokes


def in_both_widths(draw: Callable[[int], str]) -> str:
    """A picture drawn for a screen and for a phone; the style sheet shows one of them."""
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


# ------------------------------------------------------------------------------------------- pictures
def score_histogram(
    scores: np.ndarray, picked: np.ndarray, drawn: np.ndarray, held: np.ndarray, cut: float | None, alt: str, width: int
) -> str:
    """How many rows have which score, the picks among them in colour, and a random draw for comparison.

    Args:
        scores: float64 ``[N]``, finite. picked: bool ``[N]``. drawn: bool ``[N]``, random rows, as many as the picks.
        held: float64 ``[n]``, what exemplars score when they are not fitted on.
        cut: score at which the picks end, where one score parts them from the rest. alt: the picture in words.
    """
    edges = edges_of(scores, 56 if width == WIDE else 32, cut)
    every, chosen = (
        np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] for values in (scores, scores[picked])
    )
    left, right, top, bottom, floor = 58.0, width - 12.0, 34.0, 248.0, 330
    x, y = scale_of(edges[0], edges[-1], left, right), scale_of(0, float(every.max()) * 1.04, bottom, top)
    parts = [_count_axis(every.max(), y, left, right)]
    for i, (rows, taken) in enumerate(zip(every.tolist(), chosen.tolist(), strict=True)):
        if rows:
            x0, x1 = x(edges[i]), x(edges[i + 1])
            said = f"score {edges[i]:.4g} to {edges[i + 1]:.4g}: {rows:,} rows, {taken:,} of them picked"
            bars = _bar("pool", x0, x1, y(rows), bottom)
            if taken:
                bars += _bar("picks", x0, x1, min(y(taken), bottom - 2), bottom)
            parts.append(f"<g><title>{said}</title>{bars}</g>")
    parts += [
        _value_axis(edges[0], edges[-1], x, bottom, width),
        note_at("the score of a row", right, bottom + 36, "end"),
    ]
    if cut is not None:
        place = x(cut)
        end = "end" if place > width / 2 else "start"
        parts.append(f'<path class="cut" d="M{place:.1f} {top - 8:.0f}V{bottom + 5:.0f}"/>')
        parts.append(note_at(f"cut {cut:.4g}", place + (-6 if end == "end" else 6), top - 4, end, "strong"))
    rugs = {"picks": scores[picked], "chance": scores[drawn], **({"held-out": held} if len(held) else {})}
    for i, (kind, values) in enumerate(rugs.items()):
        parts.append(_rug(kind, np.clip(values, edges[0], edges[-1]), x, 292.0 + 19 * i))
        parts.append(note_at(kind, left - 5, 301 + 19 * i, "end"))
    return drawing(alt, width, floor + 19 * (len(rugs) - 2), parts)


def length_histogram(pool: np.ndarray, picked: np.ndarray, alt: str, width: int) -> str:
    """Tokens of the picks against those of the whole pool, as shares of either, on a logarithmic axis.

    Args:
        pool, picked: tokens of their rows, at least 1.
    """
    low, high = math.log10(max(1, int(pool.min()))), math.log10(max(2, int(pool.max())) + 1)
    edges = np.linspace(low, high, (40 if width == WIDE else 24) + 1)
    shares = [np.histogram(np.log10(np.maximum(one, 1)), edges)[0] / max(1, len(one)) for one in (pool, picked)]
    left, right, top, bottom = 46.0, width - 12.0, 34.0, 210.0
    most = float(max(share.max() for share in shares))
    x, y = scale_of(low, high, left, right), scale_of(0, most * 1.06, bottom, top)
    parts = []
    for i, (of_pool, of_picks) in enumerate(zip(*shares, strict=True)):
        said = f"{10 ** edges[i]:.0f} to {10 ** edges[i + 1]:.0f} tokens: {of_pool:.1%} of the pool, {of_picks:.1%} of the picks"
        x0, x1 = x(edges[i]), x(edges[i + 1])
        parts.append(f"<g><title>{said}</title>{_bar('pool', x0, x1, y(of_pool), bottom)}</g>")
    steps = "".join(
        f"{'L' if i else 'M'}{x(edges[i]):.1f} {y(one):.1f}H{x(edges[i + 1]):.1f}" for i, one in enumerate(shares[1])
    )
    parts.append(f'<path class="outline" d="{steps}"/>')
    middles = [float(np.median(values)) for values in (pool, picked)]
    longer = middles[1] >= middles[0]  # labels stand on either side of the two lines
    for kind, middle, place in (("pool", middles[0], 12.0), ("picks", middles[1], 27.0)):
        at = x(math.log10(max(1.0, middle)))
        end = "end" if (kind == "pool") == longer else "start"
        end = "start" if at < left + 110 else "end" if at > right - 110 else end
        parts.append(f'<path class="median {kind}" d="M{at:.1f} {place - 9:.0f}V{bottom:.0f}"/>')
        parts.append(
            note_at(
                f"{kind}: {'median ' if width == WIDE else ''}{middle:.0f}",
                at + (-5 if end == "end" else 5),
                place,
                end,
            )
        )
    steps_of_ten = (1, 2, 5) if width == WIDE or high - low < 1.9 else (1,)
    ticks = [n * 10**power for power in range(8) for n in steps_of_ten]
    axis = [note_at(f"{tick:,}", x(math.log10(tick)), bottom + 17, "middle") for tick in ticks
            if low <= math.log10(tick) <= high]  # fmt: skip
    parts += [f'<path class="axis" d="M{left} {bottom}H{right}"/>', *axis, note_at("tokens", right, bottom + 34, "end")]
    for level in (0, most / 2, most):
        parts.append(note_at(f"{level:.0%}", left - 5, y(level) + 4, "end"))
    return drawing(alt, width, 250, parts)


def share_bars(shares: Sequence[tuple[str, float, float | None]], alt: str, width: int) -> str:
    """Shares of the picks by name, and those of the pool where they are known.

    Args:
        shares: name, share of the picks, share of the pool or None.
    """
    left, right, step, top = (
        width * (0.24 if width == WIDE else 0.33),
        width - (140.0 if width == WIDE else 50.0),
        34,
        8,
    )
    most = max(max(picks, pool or 0.0) for _, picks, pool in shares) or 1.0
    x = scale_of(0, most, left, right)
    parts = []
    for i, (name, picks, pool) in enumerate(shares):
        y = top + i * step
        said = f"{picks:.1%}" + ("" if pool is None else f" (pool {pool:.1%})")
        parts.append(note_at(shortened(name, 28 if width == WIDE else 15), left - 8, y + 16, "end"))
        if pool is not None:
            parts.append(_across("pool", left, x(pool), y + 14, 8))
        if picks:
            parts.append(_across("picks", left, x(picks), y + 3, 10))
        parts.append(
            note_at(said if width == WIDE else f"{picks:.0%}", max(x(picks), x(pool or 0)) + 6, y + 16, "start")
        )
    return drawing(alt, width, top + step * len(shares) + 4, parts)


# ----------------------------------------------------------------------------------------------- parts
def cut_of(scores: np.ndarray, picked: np.ndarray) -> float | None:
    """The lowest score of the picks, if no row left behind scores higher."""
    if not picked.any() or picked.all():
        return None
    lowest = float(scores[picked].min())
    return lowest if scores[~picked].max() <= lowest else None


def top_shares(
    picks: Mapping[str, int], pool: Mapping[str, int] | None, most: int = 10
) -> list[tuple[str, float, float | None]]:
    """Names with the largest shares of the picks first, then of the pool; those beyond ``most`` together."""
    picked, every = sum(picks.values()) or 1, sum((pool or {}).values()) or 1
    found = [
        (name, picks.get(name, 0) / picked, None if pool is None else pool.get(name, 0) / every)
        for name in {**picks, **(pool or {})}
    ]
    found.sort(key=lambda one: (-one[1], -(one[2] or 0.0), one[0]))
    rest = found[most:]
    if not rest:
        return found
    others = None if pool is None else sum(one[2] or 0.0 for one in rest)
    return [*found[:most], (f"{len(rest)} others", sum(one[1] for one in rest), others)]


def edges_of(scores: np.ndarray, bins: int, cut: float | None) -> np.ndarray:
    """Bins between the scores' ends, one edge at the cut; far outliers fall into the first and the last one."""
    low, high = float(scores.min()), float(scores.max())
    inner = np.quantile(scores, (0.002, 0.998))
    if inner[1] - inner[0] < (high - low) / 3 and inner[1] > inner[0]:
        span = float(inner[1] - inner[0])
        low, high = max(low, float(inner[0]) - span / 4), min(high, float(inner[1]) + span / 4)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = (high - low) / bins
    if cut is None or not low < cut < high:
        return low + step * np.arange(bins + 1)
    before, after = (math.ceil(span / step - 1e-9) for span in (cut - low, high - cut))
    return cut + step * np.arange(-before, after + 1)  # the edge is the cut itself, not nearly so


def scale_of(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (float(value) - low) / ((high - low) or 1.0) * (end - start)


def _bar(kind: str, x0: float, x1: float, y: float, bottom: float) -> str:
    return f'<rect class="{kind}" x="{x0:.1f}" y="{y:.1f}" width="{max(0.8, x1 - x0 - 0.8):.1f}" height="{bottom - y:.1f}"/>'


def _across(kind: str, x0: float, x1: float, y: float, height: int) -> str:
    return f'<rect class="{kind}" x="{x0:.1f}" y="{y}" width="{max(1.0, x1 - x0):.1f}" height="{height}" rx="1.5"/>'


def _rug(kind: str, values: np.ndarray, x: Callable[[float], float], y: float) -> str:
    if len(values) > _RUG:
        values = np.quantile(values, np.linspace(0, 1, _RUG))
    return f'<path class="rug {kind}" d="{"".join(f"M{x(value):.1f} {y:.0f}v12" for value in values.tolist())}"/>'


def note_at(text: str, x: float, y: float, end: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{end}">{escape(replaced(text))}</text>'


def shortened(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _count_axis(most: int, y: Callable[[float], float], left: float, right: float) -> str:
    step = round_step(float(most) / 3)
    ticks = [level for level in np.arange(step, most + 1, step).tolist() if level >= 1]
    lines = "".join(f"M{left} {y(level):.1f}H{right}" for level in ticks)
    notes = "".join(note_at(f"{level:,.0f}", left - 5, y(level) + 4, "end") for level in ticks)
    return f'<path class="level" d="{lines}"/>{notes}{note_at("rows", left - 5, y(most) - 10, "end")}'


def _value_axis(low: float, high: float, x: Callable[[float], float], y: float, width: int) -> str:
    step = round_step((high - low) / (7 if width == WIDE else 4))
    first = math.ceil(low / step - 1e-9)
    ticks = [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
    notes = "".join(
        note_at(f"{0.0 if abs(tick) < step / 1e6 else tick:.6g}", x(tick), y + 18, "middle") for tick in ticks
    )
    return f'<path class="axis" d="M{x(low):.1f} {y}H{x(high):.1f}"/>{notes}'


def round_step(about: float) -> float:
    """1, 2 or 5 times a power of ten, the next one above."""
    power = 10 ** math.floor(math.log10(about)) if about > 0 else 1.0
    return next(n * power for n in (1, 2, 5, 10) if n * power >= about * (1 - 1e-9)) if about > 0 else 1.0


def drawing(alt: str, width: int, height: int, parts: Sequence[str]) -> str:
    return f'<svg role="img" aria-label="{escape(replaced(alt))}" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
