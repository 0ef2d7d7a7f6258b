"""What the gradient methods share: a warm-up on the pool, at whose checkpoints rows' gradients are taken."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.options import opt
from ..signals.columns import RowBatch
from .base import Method

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from ..models.warm_up import Checkpoint
    from ..signals.base import Signal
    from ..signals.extractor import NeuronFeatureExtractor


@dataclass(frozen=True)
class WarmedMethod(Method):
    """Gradients at LoRA factors after each epoch of a warm-up on a random share of the pool (LESS, sec. 4.1).

    The warm-up is kept in the pool's folder, and methods with the same options share it.

    Class attributes:
        adam: whether rows' gradients become the steps that Adam would take.
    """

    costly = True
    not_saved = "fits the checkpoints of a warm-up on one pool"
    adam: ClassVar[bool] = False

    warm_up: float = opt(0.05, "Share of the pool's rows that the warm-up trains on.")
    epochs: int = opt(4, "Epochs of the warm-up.", minimum=1)
    batch: int = opt(32, "Rows of a step of the warm-up.", minimum=1)
    rate: float = opt(2e-5, "Learning rate at the warm-up's peak.", minimum=1e-12)
    rank: int = opt(128, "Rank of the LoRA factors.", minimum=1)
    alpha: int = opt(512, "LoRA's alpha.", minimum=1)
    dropout: float = opt(0.1, "LoRA's dropout in the warm-up.", minimum=0)
    dim: int = opt(8192, "Numbers that a gradient is projected to.", minimum=1)
    warm_up_seed: int = opt(0, "Seed of the LoRA factors, of the warm-up's rows and of their order.", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.warm_up <= 1:
            raise NeuronSelectError("is a share, above 0 and at most 1", option="warm_up", value=self.warm_up)
        if self.dropout >= 1:
            raise NeuronSelectError("is a share, below 1", option="dropout", value=self.dropout)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The warm-up's; () before :meth:`prepare`."""
        return getattr(self, "_checkpoints", ())

    @property
    def used_epochs(self) -> int:
        """How many checkpoints are used, from the first on."""
        return self.epochs

    def _signals(self, adam: bool) -> tuple[Signal | str, ...]:
        if not self.checkpoints:
            return ("gradient",)
        from ..signals.gradient import Gradient  # heavy

        return tuple(Gradient(one, adam=adam, dim=self.dim) for one in self.checkpoints)

    @property
    def signals(self) -> tuple[Signal | str, ...]:  # type: ignore[override]
        return self._signals(self.adam)

    @property
    def exemplar_signals(self) -> tuple[Signal | str, ...]:  # type: ignore[override]
        return self._signals(adam=False)

    def prepare(self, pool: Dataset | IterableDataset, extractor: NeuronFeatureExtractor | None, work: Path) -> Self:
        """Train the warm-up, unless its checkpoints are there.

        Raises:
            NeuronSelectError: no model or a stream, no row with an answer, or a model that takes no LoRA.
        """
        if not hasattr(pool, "__len__"):
            raise NeuronSelectError("trains on rows of the pool, so a stream will not do; load it as a Dataset",
                                    option="method", value=self.name)  # fmt: skip
        if extractor is None:
            raise NeuronSelectError("needs a model: give an extractor", option="method", value=self.name)
        from ..models.lora import LoraShape  # heavy
        from ..models.warm_up import WarmUp
        from ..signals.warm_up import trainer_of

        how = WarmUp(
            LoraShape(self.rank, self.alpha, self.dropout, self.warm_up_seed), self.warm_up, self.epochs, self.batch,
            self.rate, seed=self.warm_up_seed,
        )  # fmt: skip
        made = copy.copy(self)
        found = trainer_of(pool, extractor.extraction, how, work).checkpoints(self.used_epochs)
        object.__setattr__(made, "_checkpoints", tuple(found))
        return made

    def gradients(self, exemplars: RowBatch, signal: Any) -> np.ndarray:
        """Exemplars' projected gradients, each of norm 1: float64 ``[n, dim]``.

        Raises:
            NeuronSelectError: the method was not prepared.
        """
        if not self.checkpoints:
            raise NeuronSelectError(
                "is fitted after its warm-up on the pool: call prepare(pool, extractor=...) first", option="method",
                value=self.name,
            )  # fmt: skip
        return units(exemplars.dense(signal.name))


def units(rows: np.ndarray) -> np.ndarray:
    """Rows of norm 1, float64; float16 has rounded them."""
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
