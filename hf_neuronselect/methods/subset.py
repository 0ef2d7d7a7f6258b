"""The rows of a fixed set: LIMA, or any published selection."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.options import opt
from ..core.provenance import Budget, SourceRecord
from ..signals.columns import RowBatch
from .base import PoolMethod, Target, register_method
from .why import Why

if TYPE_CHECKING:
    from ..rows.load import Rows


@register_method
@dataclass(frozen=True)
class Subset(PoolMethod):
    """Rows of the pool that a given set has, equal to the letter (turns, roles, tools), in the order of the set.

    A row's score falls from 1 (the set's first row) towards 0; rows that are not in the set have none.
    """

    name = "subset"
    signals = ("row_key",)
    needs_target = False
    grades = False
    default_budget = Budget(ratio=1.0)
    source_option = "rows"

    rows: str = opt("", "The set: a file, folder or Hub id, as of --pool; also a selection.")

    def check(self) -> None:
        super().check()
        if not self.rows:
            raise NeuronSelectError(
                f"name the rows to take: --method {self.name}:ROWS (a file, folder or Hub id)", option="method",
                value=self.name,
            )  # fmt: skip
        if not self._places:
            raise NeuronSelectError("no row of it can be read; name others", option="rows", value=self.rows)

    def sources(self) -> dict[str, SourceRecord]:
        return {"rows": self._loaded.source}

    @cached_property
    def _loaded(self) -> Rows:
        from ..rows.load import load_rows  # heavy

        return load_rows(self.rows, option="rows")

    @cached_property
    def _places(self) -> dict[str, int]:
        """Row key -> the first place in the set."""
        from ..rows.leakage import exact_key
        from ..rows.load import conversations_of

        found: dict[str, int] = {}
        for row in conversations_of(self._loaded.data):
            if not row.skip:
                found.setdefault(exact_key(row).hex(), len(found))
        return found

    def start(self) -> set[str]:
        return set()  # rows of the set that the pool has

    def observe(self, state: set[str], rows: RowBatch) -> None:
        state |= self._places.keys() & set(rows["row_key"].tolist())

    def finish(self, state: set[str], targets: Mapping[str, Target]) -> Mapping[str, Target]:
        known, name = len(self._places), self._loaded.source.id
        if not state:
            raise NeuronSelectError(
                f"none of its {known} rows is in the pool; rows are compared to the letter, with roles and tools",
                option="rows", value=name,
            )  # fmt: skip
        if len(state) < known:
            warnings.warn(
                f"{known - len(state)} of the {known} rows of {name} are not in the pool to the letter, and cannot be "
                "picked",
                NeuronSelectWarning,
                stacklevel=2,
            )
        return targets

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        places = np.asarray([self._places.get(key, -1) for key in rows["row_key"]], np.float64)
        return np.where(places >= 0, 1 - places / len(self._places), np.nan)

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        place = self._places.get(row["row_key"][0], -1)
        name = self._loaded.source.id
        return Why(f"it is row {place} of {name}" if place >= 0 else f"it is no row of {name}")
