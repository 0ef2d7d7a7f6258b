"""The features that carry a target, and where each fires: ready to be shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.text import replaced
from ..signals.heat import TokenValues
from .explanation import Part
from .reasons import levels_of, pieces_of

BEFORE, AFTER = 14, 12
"""Tokens of context around the one on which a feature is strongest."""
_BYTES = 600  # of a piece


@dataclass(frozen=True)
class Snippet:
    """A few tokens of a row around the one on which a feature is strongest.

    Attributes:
        row: its number in the pool. values: float64 ``[pieces]``, how strong the feature is; empty where that is not known.
    """

    row: int
    pieces: tuple[str, ...]
    values: np.ndarray


@dataclass(frozen=True)
class TargetFeature:
    """A feature of a target.

    Attributes:
        part: its label, its share of the target's activation, and its rarity. usual: its share of the pool's activation.
    """

    part: Part
    usual: float
    snippets: tuple[Snippet, ...] = ()


def snippet_of(decode: Callable[[Sequence[int]], str], tokens: TokenValues, column: int, row: int) -> Snippet | None:
    """Where a feature is strongest in a row; None where it is nowhere."""
    values = np.zeros(len(tokens.input_ids))
    values[tokens.places] = tokens.values[:, column]
    if not (values > 0).any():
        return None
    at = int(values.argmax())
    span = slice(max(0, at - BEFORE), at + AFTER)
    starts, pieces = pieces_of(decode, tokens.input_ids[span])
    return Snippet(row, tuple(piece[:_BYTES] for piece in pieces), np.add.reduceat(values[span], starts))


def leading(target: np.ndarray, pool: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The units that carry a target most against a pool.

    Args:
        target, pool: float64, mean activations of the units of each, of any widths.

    Returns:
        The units, int64, and their shares of the target's and of the pool's activation; those whose share grows most first.
    """
    width = max(len(target), len(pool))
    shares = [
        np.pad(one, (0, width - len(one))) / max(float(one.sum()), np.finfo(float).tiny) for one in (target, pool)
    ]
    order = np.argsort(shares[1] - shares[0], kind="stable")[:most]
    order = order[shares[0][order] > shares[1][order]]
    return order.astype(np.int64), shares[0][order], shares[1][order]


def features_data(found: Sequence[TargetFeature]) -> list[dict[str, Any]]:
    """Features as a page's script reads them, safe to show."""
    return [
        {
            "name": replaced(str(one.part.label) if one.part.label else one.part.name)[:160],
            "unit": one.part.name if one.part.label else "",
            "made": replaced(one.part.label.made) if one.part.label else "",
            "share": float(f"{one.part.share:.4g}"), "usual": float(f"{one.usual:.4g}"),
            "rarity": None if one.part.rarity is None else float(f"{one.part.rarity:.4g}"),
            "snippets": [
                [snippet.row, [replaced(piece) for piece in snippet.pieces], levels_of(snippet.values)] for snippet in one.snippets
            ],
        }
        for one in found
    ]  # fmt: skip
