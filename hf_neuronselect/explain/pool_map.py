"""A map of a pool: rows, picks and exemplars in the plane of a signal's two main directions; numbers, and their picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.text import replaced
from ..signals.columns import RowBatch, SparseRows
from .charts import _svg

MOST_EXEMPLARS = 200
"""Exemplars of a target on a map."""
_COLUMNS = 4096  # of a wide signal, those that vary most
_SIDE, _HEIGHT, _EDGE = 1000, 620, 24.0


@dataclass(frozen=True)
class PoolMap:
    """Where rows are in the plane of the first two principal components of a signal.

    Rows are scaled to length 1. The components are those of random rows of the pool; picks and exemplars are projected.

    Attributes:
        signal: its name. rows: int64 ``[n]``, numbers in the pool. places: float64 ``[n, 2]``. picked: bool ``[n]``.
        exemplars: target -> float64 ``[m, 2]``. share: of the pool's variance, for either component.
    """

    signal: str
    rows: np.ndarray
    places: np.ndarray
    picked: np.ndarray
    exemplars: Mapping[str, np.ndarray]
    share: tuple[float, float]


def map_of(
    signal: str, rows: RowBatch, drawn: np.ndarray, picked: np.ndarray, exemplars: Mapping[str, RowBatch]
) -> PoolMap | None:
    """A map of these rows; None where fewer than three were drawn, or all are alike.

    Args:
        drawn: bool ``[n]``, rows that chance chose. picked: bool ``[n]``. exemplars: of each target, those that have the signal.
    """
    table, width = _unit(rows, signal)
    base = table[drawn]
    if len(base) < 3:
        return None
    variance = float((base**2).sum(axis=1).mean() - (base.mean(axis=0) ** 2).sum())
    columns = np.sort(np.argsort(-base.var(axis=0), kind="stable")[:_COLUMNS])
    middle = base[:, columns].mean(axis=0)
    centred = base[:, columns] - middle
    values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    if variance <= 1e-9 or values[0] <= 1e-9:
        return None
    axes = centred.T.astype(np.float64) @ (vectors / np.sqrt(np.maximum(values, 1e-12)))
    places = (table[:, columns] - middle) @ axes
    if picked.any():  # picks are to the right, and above
        side = np.where(places[picked].mean(axis=0) >= np.median(places, axis=0), 1.0, -1.0)
        axes, places = axes * side, places * side
    found = {
        name: (_unit(one.take(np.arange(min(len(one), MOST_EXEMPLARS))), signal, width)[0][:, columns] - middle) @ axes
        for name, one in exemplars.items()
        if len(one)
    }
    shares = np.maximum(values, 0.0) / (len(base) * variance)
    return PoolMap(signal, rows.index, places, picked, found, (float(shares[0]), float(shares[1])))


def _unit(rows: RowBatch, signal: str, width: int | None = None) -> tuple[np.ndarray, int]:
    """Rows of length 1, float32 ``[n, width]``; units beyond a width that is given are left out."""
    if f"{signal}_indices" in rows:
        table, width = _table(rows.sparse(signal), width)
    else:
        table = rows.dense(signal).reshape(len(rows), -1).astype(np.float32)
        width = table.shape[1]
    length = np.linalg.norm(table, axis=1, keepdims=True)
    return np.divide(table, length, out=np.zeros_like(table), where=length > 0), width


def _table(rows: SparseRows, width: int | None) -> tuple[np.ndarray, int]:
    width = int(rows.indices.max(initial=0)) + 1 if width is None else width
    table = np.zeros((len(rows), width), np.float32)
    inside = rows.indices < width
    table[np.repeat(np.arange(len(rows)), np.diff(rows.indptr))[inside], rows.indices[inside]] = rows.values[inside]
    return table, width


# ------------------------------------------------------------------------------------------ the picture
def scaled(found: PoolMap) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows and exemplars in the picture's own units, int64 ``[n, 2]``; far outliers are at its edge."""
    every = np.concatenate([found.places, *found.exemplars.values()])
    low, high = np.quantile(every, (0.002, 0.998), axis=0)
    span = np.where(high > low, high - low, 1.0)
    room = np.asarray([_SIDE - 2 * _EDGE, _HEIGHT - 2 * _EDGE])

    def place(points: np.ndarray) -> np.ndarray:
        inside = np.clip((points - low) / span, 0, 1) * room + _EDGE
        inside[:, 1] = _HEIGHT - inside[:, 1]
        return np.rint(inside).astype(np.int64)

    return place(found.places), {name: place(points) for name, points in found.exemplars.items()}


def map_picture(found: PoolMap, alt: str) -> str:
    """Random rows as small dots, picks as larger ones, exemplars as diamonds."""
    rows, exemplars = scaled(found)
    dots = [
        f'<path class="dot {kind}" d="{"".join(f"M{x} {y}h0" for x, y in points.tolist())}"/>'
        for kind, points in (("pool", rows[~found.picked]), ("picks", rows[found.picked]))
    ]
    marks = "".join(f"M{x - 7} {y}l7-7 7 7-7 7z" for points in exemplars.values() for x, y in points.tolist())
    ring = '<circle class="ring" r="13" cx="-99" cy="-99"/>'
    return _svg(alt, _SIDE, _HEIGHT, [*dots, f'<path class="exemplar" d="{marks}"/>', ring])


def map_data(found: PoolMap, texts: Mapping[int, str], of_exemplars: Mapping[str, Sequence[str]]) -> list[list[Any]]:
    """A map as a page's script reads it: x, y, row or target, kind (0 pool, 1 pick, 2 exemplar), text; safe to show."""
    rows, exemplars = scaled(found)
    points: list[list[Any]] = [
        [x, y, number, int(picked), texts.get(number, "")]
        for (x, y), number, picked in zip(rows.tolist(), found.rows.tolist(), found.picked.tolist(), strict=True)
    ]
    for name, places in exemplars.items():
        said = of_exemplars.get(name, ())
        points += [
            [x, y, replaced(name), 2, said[i] if i < len(said) else ""] for i, (x, y) in enumerate(places.tolist())
        ]
    return points
