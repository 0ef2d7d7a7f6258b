"""Why a row has its score: what the methods' ``explain`` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Moves:
    """How a row's tokens add to its score: each token's state on every block is projected, ``sum_l (h_l - o_l) . w_l``.

    Attributes:
        signal: the signal, a vector per block, whose tokens they are.
        weights: float64 ``[blocks, width]``. offset: what is taken off each state, of the same shape; None for nothing.
    """

    signal: str
    weights: np.ndarray
    offset: np.ndarray | None = None


@dataclass(frozen=True)
class Why:
    """Why one row has its score.

    Attributes:
        says: the score in words and numbers, a sentence without a full stop.
        unit: what a part is (``feature``, ``block``, ``word``); "" where the score has no parts.
        ids: the parts' numbers, int64 ``[n]``, largest amount first, or as :meth:`against` orders them. names: of parts that are no numbers.
        amounts: float64 ``[n]``, what each part adds to the sum that the score is made from.
        facts: name -> float64 ``[n]``, more about each part.
        signal: the sparse signal whose units the ids are; "" if they are of none.
        moves: how tokens move the score; None where they do not.
        usual: float64 ``[n]``, each part's share of the sum of an average row of the pool; None where it is not known.
    """

    says: str
    unit: str = ""
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    amounts: np.ndarray = field(default_factory=lambda: np.zeros(0))
    names: tuple[str, ...] = ()
    facts: Mapping[str, np.ndarray] = field(default_factory=dict)
    signal: str = ""
    moves: Moves | None = None
    usual: np.ndarray | None = None

    @classmethod
    def of(
        cls, says: str, unit: str, amounts: Sequence[float] | np.ndarray, *, ids: np.ndarray | None = None,
        names: Sequence[str] = (), facts: Mapping[str, np.ndarray] | None = None, signal: str = "",
        moves: Moves | None = None,
    ) -> Self:  # fmt: skip
        """Parts in any order; those that add nothing are left out."""
        values = np.asarray(amounts, np.float64)
        order = np.argsort(-values, kind="stable")
        order = order[values[order] != 0]
        numbers = np.arange(len(values)) if ids is None else np.asarray(ids)
        return cls(
            says, unit, numbers[order].astype(np.int64), values[order], tuple(names[i] for i in order) if names else (),
            {name: np.asarray(fact, np.float64)[order] for name, fact in (facts or {}).items()}, signal, moves,
        )  # fmt: skip

    @property
    def total(self) -> float:
        """The sum of all parts: the numerator of a similarity, or the score itself."""
        return float(self.amounts.sum())

    @property
    def shares(self) -> np.ndarray:
        """Each part's share of the sum of all parts' absolute values, float64 ``[n]``."""
        return self.amounts / max(float(np.abs(self.amounts).sum()), np.finfo(float).tiny)

    def against(self, usual: np.ndarray) -> Self:
        """The same, the parts first that add most beyond what they usually do.

        Args:
            usual: float64 ``[units]``, what each unit adds on average; units beyond its end add nothing.
        """
        found = np.zeros(len(self.ids))
        inside = self.ids < len(usual)
        found[inside] = usual[self.ids[inside]]
        order = np.argsort(found - self.amounts, kind="stable")
        share = found / max(float(np.abs(usual).sum()), np.finfo(float).tiny)
        return replace(
            self, ids=self.ids[order], amounts=self.amounts[order], usual=share[order],
            facts={name: fact[order] for name, fact in self.facts.items()},
            names=tuple(self.names[i] for i in order) if self.names else (),
        )  # fmt: skip

    def prefixed(self, words: str) -> Self:
        """The same with words in front of the sentence."""
        return replace(self, says=f"{words}{self.says}")
