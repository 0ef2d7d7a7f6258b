"""How alike the directions of fitted targets are: cosines between them, on average and in each block of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..core.errors import NeuronSelectError
from ..hub.cards import source_name
from .selector import NeuronSelector


@dataclass(frozen=True)
class Cosines:
    """Cosines between the vectors of targets.

    Attributes:
        names: of the targets. by_layer: float64 ``[layers, targets, targets]``, of a method with one vector a target one layer;
            0 where either vector is zero.
    """

    names: tuple[str, ...]
    by_layer: np.ndarray

    @property
    def matrix(self) -> np.ndarray:
        """float64 ``[targets, targets]``: mean over layers."""
        return self.by_layer.mean(axis=0)

    @property
    def to_others(self) -> np.ndarray:
        """float64 ``[targets, layers]``: each target's mean cosine with the other targets."""
        own = np.diagonal(self.by_layer, axis1=1, axis2=2)
        return ((self.by_layer.sum(axis=2) - own) / (len(self.names) - 1)).T


def cosines(fitted: NeuronSelector | Mapping[str, NeuronSelector]) -> Cosines:
    """Cosines between the directions that a method fitted on each target (NAIT: a direction for each block).

    Args:
        fitted: a selector with several targets, or selectors by name, as a :class:`~hf_neuronselect.FeatureLibrary` is. A target is
            named ``NAME:TARGET`` where a selector has several.

    Raises:
        NeuronSelectError: fewer than two targets, a method without such vectors, or targets of other methods, models or signals.

    Example:
        >>> cosines(FeatureLibrary.from_pretrained("me/lib")).matrix
    """
    selectors = {"": fitted} if isinstance(fitted, NeuronSelector) else dict(fitted)
    vectors: dict[str, np.ndarray] = {}
    first = next(iter(selectors.items()), None)
    for name, selector in selectors.items():
        assert first is not None
        _check_alike(first, (name, selector))
        for target, kept in selector.targets.items():
            of = target if not name else name if len(selector.targets) == 1 else f"{name}:{target}"
            vectors[of] = _vectors(selector, kept)
    if len(vectors) < 2:
        raise NeuronSelectError("cosines need at least two targets: fit({'one': rows, 'two': rows})", option="target",
                                value=", ".join(vectors) or "none")  # fmt: skip
    return cosines_of(vectors)


def cosines_of(vectors: Mapping[str, np.ndarray]) -> Cosines:
    """Cosines between vectors ``[layers, width]``; shorter ones go on with zeros.

    Raises:
        NeuronSelectError: they differ in their number of layers.
    """
    layers = {len(one) for one in vectors.values()}
    if len(layers) > 1:
        raise NeuronSelectError(f"the targets have directions of {' and '.join(map(str, sorted(layers)))} blocks; fit them with one model",
                                option="target", value=", ".join(vectors))  # fmt: skip
    width = max(one.shape[1] for one in vectors.values())
    stacked = np.stack([np.pad(one.astype(np.float64), ((0, 0), (0, width - one.shape[1]))) for one in vectors.values()], axis=1)  # fmt: skip
    norms = np.linalg.norm(stacked, axis=2, keepdims=True)
    units = np.divide(stacked, norms, out=np.zeros_like(stacked), where=norms > 0)
    return Cosines(tuple(vectors), units @ units.transpose(0, 2, 1))


def _vectors(selector: NeuronSelector, kept: Mapping[str, np.ndarray]) -> np.ndarray:
    """``[layers, width]``."""
    name = selector.method.prototype
    if name and selector.picker.each:
        raise NeuronSelectError("keeps every exemplar by itself and no vector of a target; fit with --picker best-first",
                                option="picker", value=str(selector.picker))  # fmt: skip
    if not name:
        raise NeuronSelectError("keeps no vector of a target; use a method that does, e.g. one that reads drifts or features",
                                option="method", value=selector.method.name)  # fmt: skip
    found = kept[name]
    return found if found.ndim == 2 else found[None]


def _check_alike(first: tuple[str, NeuronSelector], other: tuple[str, NeuronSelector]) -> None:
    (name, one), (named, selector) = first, other
    methods = [(of.method.name, of.method.options) for of in (one, selector)]
    if methods[0] != methods[1]:
        raise NeuronSelectError(
            f"{name} was fitted by {methods[0][0]} and {named} by {methods[1][0]}, or with other options: fit both alike",
            option="target", value=named,
        )  # fmt: skip
    models = [of.extraction.model for of in (one, selector)]
    if models[0] is not None and models[1] is not None and models[0].pins != models[1].pins:
        raise NeuronSelectError(
            f"{name} has directions in {source_name(models[0])} and {named} in {source_name(models[1])}: fit both with one model",
            option="target", value=named,
        )  # fmt: skip
    for signal in sorted(one.identities.keys() & selector.identities.keys()):
        if one.identities[signal] != selector.identities[signal]:
            raise NeuronSelectError(
                f"the signal {signal} of {name} is {one.identities[signal]} and that of {named} {selector.identities[signal]}: "
                "fit both with one model, SAE and extraction options", option="target", value=named,
            )  # fmt: skip
