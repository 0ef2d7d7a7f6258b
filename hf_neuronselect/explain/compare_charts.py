"""Pictures of a comparison as inline SVG, like those of a selection's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ..core.text import replaced
from .charts import WIDE, drawing, note_at, round_step, scale_of, shortened

STRONGEST = 0.6
"""Opacity of the fullest cell of a heat map: text stays legible on it."""
_SETS = {True: 24, False: 9}  # columns of an upset plot, on a screen and on a phone


@dataclass(frozen=True)
class Point:
    """A line of a dot chart.

    Attributes:
        value: of the dot. low, high: its interval, if known. control: whether it is no method but what methods must beat.
        marks: further values, as thin strokes.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    control: bool = False
    marks: tuple[float, ...] = ()


def dot_chart(points: Sequence[Point], base: float | None, axis: str, alt: str, width: int) -> str:
    """A value of each method with its interval; controls are squares in another colour.

    Args:
        base: the value of all rows, a dashed line. axis: what the values are.
    """
    wide = width == WIDE
    left, right, top, step = width * (0.26 if wide else 0.36), width - 50.0, 30.0, 27
    bottom = top + step * len(points)
    most = max([base or 0.0, *(max(one.value, one.high or 0.0, *one.marks) for one in points)]) or 1.0
    x = scale_of(0, most, left, right)
    tick = round_step(most / (5 if wide else 3))
    ticks = [i * tick for i in range(int(most / tick + 1e-9) + 1)]
    parts = [f'<path class="level" d="{"".join(f"M{x(at):.1f} {top:.0f}V{bottom:.0f}" for at in ticks)}"/>']
    parts += [note_at(f"{at:.6g}", x(at), bottom + 17, "middle") for at in ticks]
    parts.append(note_at(axis, right, bottom + 34, "end"))
    if base is not None:
        end = "start" if x(base) < (left + right) / 2 else "end"
        parts.append(f'<path class="cut" d="M{x(base):.1f} {top - 8:.0f}V{bottom:.0f}"/>')
        parts.append(note_at(f"the pool: {base:.2f}", x(base), top - 13, end))
    for i, one in enumerate(points):
        y = top + step * i + step / 2
        kind = "chance" if one.control else "picks"
        bars = "".join(f'<path class="mark {kind}" d="M{x(at):.1f} {y - 6:.1f}v12"/>' for at in one.marks)
        said = f"{one.name}: {one.value:.3f}"
        if one.low is not None and one.high is not None:
            said += f" ({one.low:.3f} to {one.high:.3f})"
            bars += f'<path class="span {kind}" d="M{x(one.low):.1f} {y:.1f}H{x(one.high):.1f}"/>'
        at = x(one.value)
        bars += (
            f'<rect class="{kind}" x="{at - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'
            if one.control
            else f'<circle class="{kind}" cx="{at:.1f}" cy="{y:.1f}" r="6"/>'
        )
        parts.append(f"<g><title>{escape(replaced(said))}</title>{bars}</g>")
        parts.append(note_at(shortened(one.name, 28 if wide else 18), left - 14, y + 4, "end", "" if one.control else "strong"))  # fmt: skip
        parts.append(note_at(f"{one.value:.2f}", width, y + 4, "end", "strong"))
    return drawing(alt, width, int(bottom + 42), parts)


def heat_map(
    names: Sequence[str],
    columns: Sequence[str],
    values: np.ndarray,
    most: float | np.ndarray,
    alt: str,
    width: int,
    places: int = 2,
) -> str:
    """Numbers in a grid, the larger the stronger: those above 0 in one colour, those below in the other.

    Args:
        values: float64 ``[names, columns]``; NaN stays empty. most: the number of the strongest colour, or one for each column. Columns that are named
            like the rows have their numbers as heads.
    """
    wide = width == WIDE
    same = list(names) == list(columns)
    left = width * (0.3 if wide else 0.36)
    side = min(64.0 if wide else 46.0, (width - left) / max(1, len(columns)))
    height = min(34.0, max(side, 22.0))
    heads = [str(i + 1) for i in range(len(columns))] if same else [shortened(one, max(2, int(side / 7))) for one in columns]  # fmt: skip
    every = max(1, int(np.ceil(22 / side)))
    strongest = np.broadcast_to(most, len(columns)).tolist()
    parts = [note_at(head, left + side * (i + 0.5), 14, "middle") for i, head in enumerate(heads) if i % every == 0]
    for i, name in enumerate(names):
        y = 20 + height * i
        label = f"{i + 1}  {name}" if same else name
        parts.append(note_at(shortened(label, 30 if wide else 19), left - 8, y + height / 2 + 4, "end"))
        for k, value in enumerate(values[i].tolist()):
            if np.isnan(value):
                continue
            kind = "chance" if value >= 0 else "picks"
            strength = min(1.0, abs(value) / (strongest[k] or 1.0)) * STRONGEST
            said = f"{name}, {columns[k]}: {value:.3f}"
            cell = (
                f'<rect class="{kind}" fill-opacity="{strength:.3f}" x="{left + side * k:.1f}" y="{y:.1f}" '
                f'width="{side - 1:.1f}" height="{height - 1:.1f}"/>'
            )
            text = f"{value:.{places}f}"
            if side >= 7.2 * len(text):
                cell += note_at(text, left + side * (k + 0.5) - 0.5, y + height / 2 + 4, "middle", "cell")
            parts.append(f"<g><title>{escape(replaced(said))}</title>{cell}</g>")
    return drawing(alt, width, int(24 + height * len(names)), parts)


def upset_plot(
    targets: Sequence[str], sizes: Sequence[int], sets: Sequence[tuple[tuple[str, ...], int]], alt: str, width: int
) -> str:
    """How many rows are picked for exactly which targets: a column each, dots name the targets.

    Args:
        sizes: picks of each target. sets: targets and rows, the largest first; those that do not fit are not drawn.
    """
    wide = width == WIDE
    left, top, floor, step = width * (0.24 if wide else 0.36), 22.0, 150.0, 24
    shown = sets[: _SETS[wide]]
    side = min(40.0, (width - left) / max(1, len(shown)))
    y = scale_of(0, max((count for _, count in shown), default=1), floor, top)
    parts = [f'<path class="axis" d="M{left:.0f} {floor:.0f}H{left + side * len(shown):.0f}"/>']
    places = {name: floor + 22 + step * i for i, name in enumerate(targets)}
    for name, size in zip(targets, sizes, strict=True):
        parts.append(note_at(f"{shortened(name, 20 if wide else 11)} {size:,}", left - 10, places[name] + 4, "end"))
    for i, (of, count) in enumerate(shown):
        middle = left + side * (i + 0.5)
        kind = "picks" if len(of) > 1 else "pool"
        part = f'<rect class="{kind}" x="{middle - side * 0.34:.1f}" y="{y(count):.1f}" width="{side * 0.68:.1f}" height="{floor - y(count):.1f}"/>'
        dots = [places[name] for name in of]
        for name in targets:
            dot = kind if name in of else "off"
            part += f'<circle class="{dot}" cx="{middle:.1f}" cy="{places[name]:.1f}" r="5"/>'
        if len(dots) > 1:
            part += f'<path class="span {kind}" d="M{middle:.1f} {dots[0]:.1f}V{dots[-1]:.1f}"/>'
        if side >= 7 * len(f"{count}"):
            part += note_at(f"{count}", middle, y(count) - 4, "middle")
        said = f"only for {of[0]}" if len(of) == 1 else f"for {', '.join(of)}"
        parts.append(f"<g><title>{escape(f'{count:,} rows {said}')}</title>{part}</g>")
    return drawing(alt, width, int(floor + 22 + step * len(targets)), parts)
