"""Instruction Mining (arXiv 2307.06290): rows on which a linear rule predicts a low loss."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.options import opt
from ..core.provenance import SourceRecord
from ..signals.columns import RowBatch
from .base import PoolMethod, Target, register_method
from .why import Why

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ..core.sources import Source
    from ..signals.base import Signal
    from ..signals.extraction import Extraction
    from ..signals.extractor import NeuronFeatureExtractor

REWARD, UNIEVAL = "OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1", "MingZhong/unieval-dialog"
COLUMN = "column"
"""In the place of a model: the pool's own columns have its numbers."""
NEIGHBOUR = 6
_COLUMNS = {"reward": ("reward",), "unieval": ("und", "nat", "coh")}
_BLOCK = 512  # rows whose distances to all others are in memory at once


@register_method
@dataclass(frozen=True)
class InstructionMining(PoolMethod):
    """The log loss that a linear rule predicts, lower first.

    ``v1``: ``1.0694 - 0.1498 Rew + 8.257e-5 Len - 0.9350 KNN_6``; ``v3``: ``0.0274 - 0.0078 Rew + 0.4421 Und - 0.3212 Nat -
    0.1520 Coh``. Choices: the last answer of a row counts, with the user turns since the one before it; ``Len`` is its
    tokens in the model's tokenizer; ``KNN_6`` is the Euclidean distance of embeddings to the 6th nearest row of the pool.
    """

    name = "instruction-mining"
    paper = "arXiv:2307.06290"
    needs_target = False

    version: Literal["v3", "v1"] = opt("v3", "Whose rule: of the paper's third or first version.")
    reward: str = opt(REWARD, "Reward model: folder or Hub id[@revision]; or column: the pool's column `reward`.")
    unieval: str = opt(UNIEVAL, "Model of the v3 indicators; or column: the pool's columns `und`, `nat` and `coh`.")

    @property
    def observes(self) -> bool:
        return self.version == "v1"

    @property
    def judges_others(self) -> bool:  # type: ignore[override]
        return not self.observes

    @property
    def _used(self) -> dict[str, str]:
        """Option -> its value, of the indicators that the rule has."""
        return {"reward": self.reward} | ({"unieval": self.unieval} if self.version == "v3" else {})

    @cached_property
    def _pinned(self) -> dict[str, Source]:
        from ..models.pin import pin_named  # heavy

        named = (
            {"unieval": self.unieval} if self.unieval != UNIEVAL else {}
        )  # recorded without its folder even if unused
        return {option: pin_named(name, option) for option, name in (self._used | named).items() if name != COLUMN}

    @cached_property
    def _indicators(self) -> dict[str, Signal]:
        from ..signals.indicators import Reward, UniEval  # heavy

        kinds = {"reward": Reward, "unieval": UniEval}
        return {option: kinds[option](source) for option, source in self._pinned.items() if option in self._used}

    @property
    def signals(self) -> tuple[Signal | str, ...]:  # type: ignore[override]
        more = ("answer_tokens", "embedding") if self.observes else ()
        return (*self._indicators.values(), *more)

    def sources(self) -> dict[str, SourceRecord]:
        return {option: SourceRecord.of(source) for option, source in self._pinned.items()}

    def stand_in(self, extraction: Extraction) -> str:
        """Models that are not the paper's; of encoders, the paper's are Sentence-BERT's own (all-...)."""
        names = [self._pinned[option].id for option in self._used if option in self._pinned]
        names = [name for name in names if name not in (REWARD, UNIEVAL)]
        encoder = extraction.encoder.id.rsplit("/", 1)[-1] if self.observes and extraction.encoder else ""
        return ", ".join([*names, *([encoder] if encoder and not encoder.startswith("all-") else [])])

    def check(self) -> None:
        super().check()
        _ = self._pinned

    def prepare(self, pool: Dataset | IterableDataset, extractor: NeuronFeatureExtractor | None, work: Path) -> Self:
        """With the pool's own columns, where they are asked for.

        Raises:
            NeuronSelectError: one is missing, or holds something that is no number.
        """
        given: dict[str, np.ndarray] = {}
        for option, value in self._used.items():
            if value == COLUMN:
                given[option] = np.stack([_numbers(pool, name, option) for name in _COLUMNS[option]], axis=1)
        made = copy.copy(self)
        object.__setattr__(made, "_given", given)
        return made

    # --------------------------------------------------------------------------- the pool (v1 only)
    def start(self) -> list[RowBatch]:
        return []

    def observe(self, state: list[RowBatch], rows: RowBatch) -> None:
        state.append(RowBatch(rows.index, rows.usable, {"embedding": list(rows.dense("embedding"))}))

    def finish(self, state: list[RowBatch], targets: Mapping[str, Target]) -> Mapping[str, Target]:
        """``rows``, ascending, and the distance of each to its 6th neighbour."""
        rows = np.concatenate([part.index for part in state]) if state else np.zeros(0, np.int64)
        distance = neighbour_distance(np.concatenate([part.dense("embedding") for part in state])) if state else rows
        return {name: {"rows": rows, "distance": np.asarray(distance, np.float64)} for name in targets}

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        reward = self._values("reward", rows)[:, 0]
        if self.version == "v3":
            und, nat, coh = self._values("unieval", rows).T
            return -(0.0274 - 0.0078 * reward + 0.4421 * und - 0.3212 * nat - 0.1520 * coh)
        at = np.searchsorted(target["rows"], rows.index)
        length = rows["n_answer_tokens"].astype(np.float64)
        return -(1.0694 - 0.1498 * reward + 8.257e-5 * length - 0.9350 * target["distance"][at])

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """What each indicator adds to minus the predicted log loss."""
        reward = float(self._values("reward", row)[0, 0])
        if self.version == "v3":
            und, nat, coh = self._values("unieval", row)[0].tolist()
            facts = {"reward": reward, "und": und, "nat": nat, "coh": coh}
            parts = [0.0078 * reward, -0.4421 * und, 0.3212 * nat, 0.1520 * coh]
        else:
            at = int(np.searchsorted(target["rows"], row.index)[0])
            length, near = float(row["n_answer_tokens"][0]), float(target["distance"][at])
            facts = {"reward": reward, "length": length, "knn_6": near}
            parts = [0.1498 * reward, -8.257e-5 * length, 0.9350 * near]
        score = float(self.score(row, target)[0])
        says = f"{score:.4g} = minus the log loss that the rule predicts: what its indicators add, and a constant"
        return Why.of(says, "indicator", parts, names=list(facts), facts={"value": np.asarray(list(facts.values()))})

    def _values(self, option: str, rows: RowBatch) -> np.ndarray:
        if option in self._indicators:
            return rows.dense(self._indicators[option].name).astype(np.float64)
        given: dict[str, Any] = getattr(self, "_given", {})
        if option not in given:
            raise NeuronSelectError(
                "columns of the pool are read by select alone: name a model", option=option, value=COLUMN
            )
        return np.asarray(given[option][rows.index])


def neighbour_distance(vectors: np.ndarray, nth: int = NEIGHBOUR) -> np.ndarray:
    """Euclidean distance of each row to its n-th nearest other one (of fewer rows, the farthest), float64; NaN of one row."""
    vectors = vectors.astype(np.float64)
    if len(vectors) < 2:
        return np.full(len(vectors), np.nan)
    nth = min(nth, len(vectors) - 1)
    squares = (vectors**2).sum(axis=1)
    found = np.empty(len(vectors))
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        away = squares[start : start + _BLOCK, None] + squares[None, :] - 2 * (block @ vectors.T)
        away[np.arange(len(block)), np.arange(start, start + len(block))] = np.inf  # not itself
        found[start : start + len(block)] = np.partition(away, nth - 1, axis=1)[:, nth - 1]
    return np.sqrt(np.maximum(found, 0))


def _numbers(pool: Dataset | IterableDataset, name: str, option: str) -> np.ndarray:
    if name not in (pool.column_names or []):
        raise NeuronSelectError(
            f"the pool has no column {name}; it has {', '.join(pool.column_names or [])}", option=option, value=COLUMN
        )
    if not hasattr(pool, "select"):
        raise NeuronSelectError(
            "columns of a stream are not read: load the pool as a Dataset", option=option, value=COLUMN
        )
    try:
        return np.asarray([np.nan if value is None else float(value) for value in pool[name]])
    except (TypeError, ValueError):
        raise NeuronSelectError(f"the pool's column {name} must hold numbers", option=option, value=COLUMN) from None
