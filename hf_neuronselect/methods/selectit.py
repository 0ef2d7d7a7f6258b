"""SelectIT (arXiv 2402.16705): how surely, and how steadily, the model rates a row well."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..core.errors import NeuronSelectError
from ..core.options import opt
from ..core.provenance import Budget, SourceRecord
from ..signals.columns import RowBatch
from .base import Method, Target, register_method
from .why import Why

if TYPE_CHECKING:
    from ..core.sources import Source
    from ..signals.rating import Ratings

RATINGS = 5


@register_method
@dataclass(frozen=True)
class SelectIt(Method):
    """Self-rating at three levels, from the shares ``p_k`` of the ratings 1 to 5 behind five prompts.

    Token: the likeliest rating times the mean over the 4 others of ``p_max - p_k``. Sentence: over the prompts,
    ``mean / (1 + 0.2 * std)``. Model: over several models, weighted by their sizes. A row whose rating fails has no
    score; the others keep their places.
    """

    name = "selectit"
    paper = "arXiv:2402.16705"
    needs_target = False
    default_budget = Budget(ratio=0.2)

    p: Literal["paper", "code"] = opt(
        "paper", "Shares of the ratings as the paper defines them, or put through a softmax again, as the code does."
    )
    alpha: float = opt(0.2, "Weight of the spread over the prompts.", minimum=0)
    model_2: str | None = opt(None, "A second model that rates, too: folder or Hub id[@revision].")
    model_3: str | None = opt(None, "A third one.")
    sizes: str = opt("7 13 70", "Sizes of the models, in their order: their weights.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_3 is not None and self.model_2 is None:
            raise NeuronSelectError("comes after model_2: name that one", option="model_3", value=self.model_3)
        _ = self.weights

    @property
    def weights(self) -> np.ndarray:
        """The models' weights, which add up to 1.

        Raises:
            NeuronSelectError: not a size above 0 for each model.
        """
        models = 1 + (self.model_2 is not None) + (self.model_3 is not None)
        try:
            sizes = np.asarray([float(size) for size in self.sizes.split()][:models])
        except ValueError:
            sizes = np.zeros(0)
        if len(sizes) < models or not (np.isfinite(sizes) & (sizes > 0)).all():
            raise NeuronSelectError(f"must be {models} numbers above 0, as '7 13 70'", option="sizes", value=self.sizes)
        return np.asarray(sizes / sizes.sum())

    @cached_property
    def _pinned(self) -> dict[str, Source]:
        from ..models.pin import pin_named  # heavy

        named = {"model_2": self.model_2, "model_3": self.model_3}
        return {option: pin_named(name, option) for option, name in named.items() if name is not None}

    @property
    def signals(self) -> tuple[Ratings, ...]:  # type: ignore[override]
        from ..signals.rating import Ratings  # heavy

        return (Ratings(), *(Ratings(source, option) for option, source in self._pinned.items()))

    def sources(self) -> dict[str, SourceRecord]:
        return {option: SourceRecord.of(source) for option, source in self._pinned.items()}

    def check(self) -> None:
        super().check()
        _ = self._pinned

    def score(self, rows: RowBatch, target: Target) -> np.ndarray:
        found = np.zeros(len(rows))
        for weight, signal in zip(self.weights, self.signals, strict=True):
            found += weight * self._sentence(rows.dense(signal.name).reshape(len(rows), -1, RATINGS))
        return found

    def explain(self, row: RowBatch, target: Target, exemplars: RowBatch | None) -> Why:
        """Each model's weighted part of the score."""
        parts = [
            weight * float(self._sentence(row.dense(signal.name).reshape(1, -1, RATINGS))[0])
            for weight, signal in zip(self.weights, self.signals, strict=True)
        ]
        shares = row.dense(self.signals[0].name).reshape(-1, RATINGS)
        rated = ", ".join(str(1 + int(one.argmax())) for one in shares)
        return Why.of(f"{sum(parts):.4g}; the likeliest ratings behind the prompts are {rated}", "model", parts)

    def _sentence(self, stored: np.ndarray) -> np.ndarray:
        """One model's score of each row, from shares ``[n, prompts, 5]``."""
        shares = stored.astype(np.float64)
        shares /= shares.sum(axis=2, keepdims=True)
        if self.p == "code":
            shares = np.exp(shares)
            shares /= shares.sum(axis=2, keepdims=True)
        best = shares.max(axis=2)
        # the sum over all ratings: the best one's own difference is 0
        sure = (best[:, :, None] - shares).sum(axis=2) / (RATINGS - 1)
        tokens = (shares.argmax(axis=2) + 1) * sure
        return np.asarray(tokens.mean(axis=1) / (1 + self.alpha * tokens.std(axis=1)))
