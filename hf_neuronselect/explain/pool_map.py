"""A map of a pool: rows, picks and exemplars in the plane of a signal's two main directions; numbers, and their picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.text import replaced
from ..signals.columns import RowBatch
from .charts import drawing

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
    if drawn.sum() < 3:
        return None
    columns, variance = _varied(rows.take(np.flatnonzero(drawn)), signal)
    if variance <= 1e-9:
        return None  # alike but for rounding, or without any unit
    table = _unit(rows, signal, columns)
    middle = table[drawn].mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = table[drawn] - middle
    values, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    if values[0] <= 1e-9:
        return None  # alike but for rounding
    axes = centred.T.astype(np.float64) @ (vectors / np.sqrt(np.maximum(values, 1e-12)))
    places = (table - middle) @ axes
    if picked.any():  # picks are to the right, and above
        side = np.where(places[picked].mean(axis=0) >= np.median(places, axis=0), 1.0, -1.0)
        axes, places = axes * side, places * side
    found = {
        name: (_unit(one.take(np.arange(min(len(one), MOST_EXEMPLARS))), signal, columns) - middle) @ axes
        for name, one in exemplars.items()
        if len(one)
    }
    shares = np.maximum(values, 0.0) / (len(centred) * variance)
    return PoolMap(signal, rows.index, places, picked, found, (float(shares[0]), float(shares[1])))


def _varied(rows: RowBatch, signal: str) -> tuple[np.ndarray, float]:
    """The units that vary most between rows of length 1, int64 ascending, and the variance of all units together."""
    if f"{signal}_indices" in rows:
        sparse = rows.sparse(signal)
        values = sparse.values / np.repeat(_lengths(rows, signal), np.diff(sparse.indptr))
        first, second = (np.bincount(sparse.indices, values**power) / len(rows) for power in (1, 2))
    else:
        table = rows.dense(signal).reshape(len(rows), -1) / _lengths(rows, signal)[:, None]
        first, second = table.mean(axis=0, dtype=np.float64), np.einsum("ij,ij->j", table, table) / len(rows)
    variance = np.maximum(second - first**2, 0.0)
    return np.sort(np.argsort(-variance, kind="stable")[:_COLUMNS]), float(variance.sum())


def _unit(rows: RowBatch, signal: str, columns: np.ndarray) -> np.ndarray:
    """Some units of rows of length 1, float32 ``[n, columns]``; 0 where a row has none."""
    table = np.zeros((len(rows), len(columns)), np.float32)
    if f"{signal}_indices" in rows:
        sparse = rows.sparse(signal)
        place = np.minimum(np.searchsorted(columns, sparse.indices), len(columns) - 1)
        known = columns[place] == sparse.indices
        table[np.repeat(np.arange(len(rows)), np.diff(sparse.indptr))[known], place[known]] = sparse.values[known]
    else:
        table[:] = rows.dense(signal).reshape(len(rows), -1)[:, columns]
    return table / _lengths(rows, signal)[:, None]


def _lengths(rows: RowBatch, signal: str) -> np.ndarray:
    """Length of each row, float32 ``[n]``; 1 where it is 0."""
    if f"{signal}_indices" in rows:
        sparse = rows.sparse(signal)
        row = np.repeat(np.arange(len(rows)), np.diff(sparse.indptr))
        squares = np.bincount(row, sparse.values.astype(np.float64) ** 2, minlength=len(rows))
    else:
        flat = rows.dense(signal).reshape(len(rows), -1)
        squares = np.einsum("ij,ij->i", flat, flat)
    return np.where(squares > 0, np.sqrt(squares), 1.0).astype(np.float32)


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
    ring = '<circle class="ring" r="13" display="none"/>'
    return drawing(alt, _SIDE, _HEIGHT, [*dots, f'<path class="exemplar" d="{marks}"/>', ring])


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
