"""What picked rows are like: sources, answers, diversity of words, near copies. Each row is read once for all selections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset

from ..core.options import RowOptions
from ..metrics.mtld.mtld import mtld
from ..rows.formats import Conversation, read_row, row_format, rows_of
from ..rows.near import NearCopies, has_datasketch, min_hash
from ..selection.reader import BATCH_ROWS, own_columns

SOME, MOST = 1000, 5000
"""So many rows, spread over a selection, tell its diversity of words, and its near copies."""


@dataclass(frozen=True)
class Texture:
    """Attributes:
    answers: share of the characters that are the assistant's.
    mtld: mean lexical diversity of the answers; None: no row has words.
    near_copies: share of rows with a near copy among the others: at least 0.8 of the runs of five words are common to
        both, estimated by MinHash. None: datasketch is not installed.
    """

    answers: float | None
    mtld: float | None
    near_copies: float | None


@dataclass
class RowFacts:
    """What is measured of single rows of a pool, kept for the next selection that has them."""

    pool: Dataset
    options: RowOptions

    def __post_init__(self) -> None:
        n = len(self.pool)
        self.known = np.zeros(n, dtype=bool)
        self.characters, self.answered = np.zeros(n), np.zeros(n)
        self.diversity = np.full(n, np.nan)
        self.hashes: dict[int, Any] = {}
        self.has_hashes = has_datasketch()

    @cached_property
    def whole(self) -> Texture:
        """Of the pool, by some of its rows; near copies are not looked for."""
        rows = _some(np.arange(len(self.pool)))
        self._read(rows, hashed=False)
        return self._texture(rows, None)

    def of(self, rows: np.ndarray) -> Texture:
        """Of some rows; of more than :data:`MOST`, of so many of them."""
        rows = _some(rows, MOST)
        self._read(rows, hashed=self.has_hashes)
        return self._texture(rows, self._near_copies(rows) if self.has_hashes else None)

    def _texture(self, rows: np.ndarray, near_copies: float | None) -> Texture:
        total = float(self.characters[rows].sum())
        diversity = self.diversity[_some(rows)]
        diversity = diversity[np.isfinite(diversity)]
        return Texture(
            answers=float(self.answered[rows].sum()) / total if total else None,
            mtld=float(diversity.mean()) if len(diversity) else None,
            near_copies=near_copies,
        )

    def _read(self, rows: np.ndarray, *, hashed: bool) -> None:
        fmt = row_format(own_columns(self.pool.column_names), self.options.row_format, self.options.columns)
        texts = self.pool.with_format(None).select_columns(fmt.used)
        some = set(_some(rows).tolist())
        wanted = np.asarray(
            [i for i in rows.tolist() if not self.known[i] or (hashed and i not in self.hashes)
             or (i in some and math.isnan(self.diversity[i]))], dtype=np.int64
        )  # fmt: skip
        for start in range(0, len(wanted), BATCH_ROWS):
            part = wanted[start : start + BATCH_ROWS].tolist()
            for i, row in zip(part, rows_of(texts[part]), strict=True):
                self._learn(i, read_row(row, fmt), diverse=i in some, hashed=hashed)

    def _learn(self, i: int, row: Conversation, *, diverse: bool, hashed: bool) -> None:
        text, answer = ("", "") if row.skip else (row.words(), _answer(row))
        self.known[i] = True
        self.characters[i], self.answered[i] = len(text), len(answer)
        if diverse:
            self.diversity[i] = mtld(answer or text)
        if hashed:
            self.hashes[i] = min_hash(text)

    def _near_copies(self, rows: np.ndarray) -> float:
        known = NearCopies()
        for i in rows.tolist():
            known.add(self.hashes[i])
        return float(np.mean([known.of(self.hashes[i]) > 1 for i in rows.tolist()])) if len(rows) else 0.0  # 1: itself


def _some(rows: np.ndarray, most: int = SOME) -> np.ndarray:
    """At most so many of the rows, spread evenly."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def _answer(row: Conversation) -> str:
    return "\n".join(turn["content"] for turn in row.messages if turn["role"] == "assistant")


def shares_of(sources: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Share of each source among some rows, the largest first."""
    names, counts = np.unique(sources[rows].astype(str), return_counts=True)
    order: Sequence[int] = np.lexsort((names, -counts)).tolist()
    return {str(names[i]): float(counts[i] / len(rows)) for i in order}
