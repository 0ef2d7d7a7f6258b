"""What a method is, and the registry of them."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

import numpy as np

from ..core.errors import unknown
from ..core.registry import Registry
from ..signals.columns import FeatureBatch
from ..signals.forward import Directions

Target: TypeAlias = Mapping[str, np.ndarray]
"""What a method keeps of a target's exemplars: a few named arrays, saved as safetensors."""

Scorer: TypeAlias = Callable[[FeatureBatch], dict[str, np.ndarray]]
"""A batch's scores by target: float64 ``[n]`` each."""


class Method(ABC):
    """Scores rows against a target; higher is always better outside.

    A method's options are the arguments of its ``__init__``, kept as attributes of the same names.

    Class attributes:
        name: what users call it. paper: where it comes from.
        features: feature columns a row needs to be scored. fit_features: those exemplars need
            (default: the same). optional_fit_features: used if they are there.
        needs_target: False for baselines that look at the pool alone.
        needs_texts: whether ``batch.texts`` must be filled.
        pool_dependent: whether a row's score depends on the other rows of the pool.
        default_ratio: the share the paper keeps.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    features: tuple[str, ...] = ()
    fit_features: tuple[str, ...] | None = None
    optional_fit_features: tuple[str, ...] = ()
    needs_target: ClassVar[bool] = True
    needs_texts: ClassVar[bool] = False
    pool_dependent: ClassVar[bool] = False
    default_ratio: ClassVar[float] = 0.05

    def fit(self, exemplars: FeatureBatch) -> Target:
        """What to keep of a target's exemplars (all of them usable, at least one)."""
        return {}

    @abstractmethod
    def score(self, batch: FeatureBatch, target: Target) -> np.ndarray:
        """Float64 ``[n]``, one score a row of ``batch`` (all rows usable); NaN where there is none.

        A row's score must not depend on the other rows of the batch.
        """

    def directions(self, targets: Iterable[Target]) -> Directions | None:
        """What rows can be projected on while they are extracted, so that only projections are kept; None if nothing."""
        return None

    def scorer(self, targets: Mapping[str, Target]) -> Scorer:
        """What scores batch after batch against all targets, as :meth:`score` does against one.

        Called once for a pool: what is the same for all batches is made here.
        """
        return lambda batch: {name: self.score(batch, target) for name, target in targets.items()}

    def explain(self, batch: FeatureBatch, target: Target) -> list[dict[str, np.ndarray]]:
        """Per row, what its score is made of: equally long arrays, largest ``share`` first.

        Methods that cannot say return an empty list.
        """
        return []

    def params(self) -> dict[str, Any]:
        """The options, as given."""
        return {name: getattr(self, name) for name in inspect.signature(type(self).__init__).parameters
                if name not in ("self", "args", "kwargs")}  # fmt: skip


METHODS: Registry[type[Method]] = Registry("method", "method")
register_method = METHODS.add


def make_method(name: str, params: Mapping[str, Any]) -> Method:
    """A method with its options.

    Raises:
        NeuronSelectError: unknown method, or an option it does not have.
    """
    cls = METHODS[name]
    known = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "args", "kwargs")]
    for option in params:
        if option not in known:
            raise unknown(f"option of method {name!r}", option, known or ["none"], "method_option")
    return cls(**params)
