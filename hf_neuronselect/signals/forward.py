"""What is computed during the forward pass: one class a feature, any set of them in one pass.

A feature names the sites it reads and reduces each activation inside the hook, so no
``[tokens, width]`` tensor outlives its block. A third party adds one with ``@register_feature``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Features, List, Value

from ..core.errors import NeuronSelectError
from ..core.registry import Registry
from ..models.backbone import Backbone, Observer
from ..models.batching import TokenBatch
from ..models.sae import CHUNK_ELEMENTS, Site, SparseAutoencoder, top_k

DRIFTS = ("endpoints", "mean", "per_token")
PAPER_K = 192  # MoNA's K, used where neither K nor an SAE's own k is given


@dataclass(frozen=True)
class FeatureOptions:
    """Everything about features that changes a number.

    Attributes:
        layer: block read by ``mona``, ``hidden`` and ``polysemantic`` (resolved, 0-based).
        top_k: K of ``mona`` and ``polysemantic``; None is the SAE's own.
        pool: ``mean`` over pooled tokens (MoNA, eq. 7) or ``sum`` (its appendix D.5).
        site: ``residual`` or ``mlp``, what ``nait`` reads. drift: one of :data:`DRIFTS`.
    """

    layer: int
    top_k: int | None = None
    pool: str = "mean"
    site: str = "residual"
    drift: str = "endpoints"
    value_dtype: str = "float16"


Reducer = Callable[[], dict[str, Any]]


class Feature(ABC):
    """One feature of a row.

    Class attributes:
        name: its column (sparse: ``<name>_indices``, ``<name>_values``). needs_sae, sparse.
    """

    name: ClassVar[str]
    needs_sae: ClassVar[bool] = False
    sparse: ClassVar[bool] = False
    needs_content: ClassVar[bool] = False
    """Whether the first and last content token of each row must be known."""

    def __init__(self, backbone: Backbone, sae: SparseAutoencoder | None, options: FeatureOptions) -> None:
        self.backbone, self.sae, self.options = backbone, sae, options

    @classmethod
    @abstractmethod
    def deepest(cls, options: FeatureOptions, sae: SparseAutoencoder | None, num_layers: int) -> int:
        """The deepest block that must run, 0-based."""

    @abstractmethod
    def start(self, batch: TokenBatch) -> tuple[list[tuple[Site, Observer]], Reducer]:
        """Observers for one batch, and what gives its columns afterwards (numpy, one entry a row)."""

    @classmethod
    def column_types(cls, options: FeatureOptions) -> dict[str, Any]:
        if cls.sparse:
            return {f"{cls.name}_indices": List(Value("int32")), f"{cls.name}_values": List(Value(options.value_dtype))}
        return {cls.name: List(Value("float32"))}


FEATURES: Registry[type[Feature]] = Registry("feature", "features")
register_feature = FEATURES.add


def _sparse_columns(name: str, sums: torch.Tensor, batch: TokenBatch, options: FeatureOptions) -> dict[str, Any]:
    """Pooled latents float32 ``[B, m]`` as rows of nonzeros."""
    pooled = sums / batch.n_pooled[:, None] if options.pool == "mean" else sums
    # Nonzeros are found where the sums lie: what leaves a GPU is a hundredth of [B, m].
    cast = pooled.to(getattr(torch, options.value_dtype))
    places = cast.view(-1).nonzero().flatten()
    rows, latents, values = (
        part.cpu().numpy() for part in (places // cast.shape[1], (places % cast.shape[1]).int(), cast.view(-1)[places])
    )
    splits = np.searchsorted(rows, np.arange(1, len(cast)))
    return {f"{name}_indices": np.split(latents, splits), f"{name}_values": np.split(values, splits)}


@register_feature
class MonaFeature(Feature):
    """MoNA, eq. 6-7: mean over pooled tokens of the top-K SAE latents at one site."""

    name = "mona"
    needs_sae = True
    sparse = True

    @classmethod
    def deepest(cls, options: FeatureOptions, sae: SparseAutoencoder | None, num_layers: int) -> int:
        # The SAE's own site decides, which may lie in another block than `layer`.
        assert sae is not None
        return sae.site.block or 0

    def start(self, batch: TokenBatch) -> tuple[list[tuple[Site, Observer]], Reducer]:
        sae = self.sae
        assert sae is not None
        sums: list[torch.Tensor] = []

        def observe(hidden: torch.Tensor) -> None:
            sums.append(sae.sum_rows(batch.pooled(hidden), batch.row, batch.size, self.options.top_k))

        return [(sae.site, observe)], lambda: _sparse_columns(self.name, sums[0], batch, self.options)


@register_feature
class PolysemanticFeature(Feature):
    """MoNA's comparison (App. B.3): mean over tokens of the K largest ``act(W_gate x)``, negatives 0."""

    name = "polysemantic"
    sparse = True

    @classmethod
    def deepest(cls, options: FeatureOptions, sae: SparseAutoencoder | None, num_layers: int) -> int:
        return options.layer

    def start(self, batch: TokenBatch) -> tuple[list[tuple[Site, Observer]], Reducer]:
        site, activate = self.backbone.gate(self.options.layer)
        k = self.options.top_k or (self.sae.resolve_k(None) if self.sae else None) or PAPER_K
        sums: list[torch.Tensor] = []

        def observe(gate: torch.Tensor) -> None:
            tokens = batch.pooled(gate)
            total: torch.Tensor | None = None
            step = max(64, CHUNK_ELEMENTS // tokens.shape[-1])
            for start in range(0, len(tokens), step):
                acts = activate(tokens[start : start + step]).clamp_min(0)
                if total is None:
                    total = torch.zeros(batch.size * acts.shape[-1], device=acts.device)
                values, indices = top_k(acts, k)
                owner = batch.row[start : start + step, None] * acts.shape[-1]
                total.scatter_add_(0, (indices + owner).flatten(), values.float().flatten())
            assert total is not None
            sums.append(total.view(batch.size, -1))

        return [(site, observe)], lambda: _sparse_columns(self.name, sums[0], batch, self.options)


@register_feature
class HiddenFeature(Feature):
    """Mean hidden state over pooled tokens at one block (MoNA's "w/o SAE"): float32 ``[d]``."""

    name = "hidden"

    @classmethod
    def deepest(cls, options: FeatureOptions, sae: SparseAutoencoder | None, num_layers: int) -> int:
        return options.layer

    def start(self, batch: TokenBatch) -> tuple[list[tuple[Site, Observer]], Reducer]:
        means: list[torch.Tensor] = []
        site = self.backbone.residual(self.options.layer)
        observers: list[tuple[Site, Observer]] = [(site, lambda hidden: means.append(batch.mean(hidden)))]
        return observers, lambda: {self.name: list(means[0].cpu().numpy())}


class _EveryBlock(Feature):
    """A vector per block: ``[num_layers, width]``."""

    @classmethod
    def deepest(cls, options: FeatureOptions, sae: SparseAutoencoder | None, num_layers: int) -> int:
        return num_layers - 1

    def site(self, layer: int) -> Site:
        if self.options.site == "mlp":
            return self.backbone.neurons(layer)
        return self.backbone.residual(layer)

    @abstractmethod
    def vector(self, hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """``[B, L, width]`` -> float32 ``[B, width]``."""

    def start(self, batch: TokenBatch) -> tuple[list[tuple[Site, Observer]], Reducer]:
        vectors: dict[int, torch.Tensor] = {}

        def observer(layer: int) -> Observer:
            return lambda hidden: vectors.__setitem__(layer, self.vector(hidden, batch))

        observers = [(self.site(layer), observer(layer)) for layer in range(self.backbone.num_layers)]

        def finish() -> dict[str, Any]:
            stacked = torch.stack([vectors[layer] for layer in range(self.backbone.num_layers)], dim=1)
            return {self.name: list(stacked.cpu().numpy())}

        return observers, finish

    @classmethod
    def column_types(cls, options: FeatureOptions) -> dict[str, Any]:
        return {cls.name: List(List(Value("float32")))}


@register_feature
class NaitFeature(_EveryBlock):
    """NAIT's activation drift per block: last minus first token (``drift`` option: other readings)."""

    name = "nait"

    def vector(self, hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        first = hidden[:, 0].float()
        if self.options.drift == "mean":
            return batch.mean(hidden) - first
        drift = batch.at(hidden, batch.last) - first
        return drift / (batch.last + 1)[:, None] if self.options.drift == "per_token" else drift


@register_feature
class NaitContentFeature(_EveryBlock):
    """The drift between the first and last CONTENT token: template tokens and BOS left out."""

    name = "nait_content"
    needs_content = True

    def vector(self, hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        return batch.at(hidden, batch.content[:, 1]) - batch.at(hidden, batch.content[:, 0])


@register_feature
class NaitLastFeature(_EveryBlock):
    """Each block's output at the last token."""

    name = "nait_last"

    def vector(self, hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        return batch.at(hidden, batch.last)


@register_feature
class NaitMeanFeature(_EveryBlock):
    """Each block's output, mean over pooled tokens."""

    name = "nait_mean"

    def vector(self, hidden: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        return batch.mean(hidden)


@register_feature
class RoutingFeature(Feature):
    """Mean over pooled tokens of every MoE block's routing weights over all experts, concatenated."""

    name = "routing"

    @classmethod
    def deepest(cls, options: FeatureOptions, sae: SparseAutoencoder | None, num_layers: int) -> int:
        return num_layers - 1

    def start(self, batch: TokenBatch) -> tuple[list[tuple[Site, Observer]], Reducer]:
        found = [(layer, self.backbone.router(layer)) for layer in range(self.backbone.num_layers)]
        routers = [(layer, router) for layer, router in found if router is not None]
        if not routers:
            raise NeuronSelectError("the model has no mixture-of-experts block", option="features", value="routing")
        means: dict[int, torch.Tensor] = {}
        observers: list[tuple[Site, Observer]] = []
        for layer, (site, weigh) in routers:

            def observe(
                hidden: torch.Tensor, layer: int = layer, weigh: Callable[[torch.Tensor], torch.Tensor] = weigh
            ) -> None:
                means[layer] = batch.mean(weigh(hidden))

            observers.append((site, observe))
        return observers, lambda: {self.name: list(torch.cat([means[k] for k in sorted(means)], dim=1).cpu().numpy())}


PROJECTION = "nait_on_"  # and 16 hex digits of the directions: a column can be taken for no other capability's


@dataclass(frozen=True, eq=False)
class Directions:
    """What candidates are projected on while they are extracted: one number per block and capability is kept.

    A NAIT drift is ``blocks x width`` (262 KB a row at 8B); its score needs ``x_l . v_l`` alone.

    Attributes:
        feature: what is projected: ``nait``, ``nait_mean`` or ``nait_last``.
        normalize: divide each block's vector by its norm first.
        vectors: column -> float64 ``[blocks, width]``; see :meth:`of`.
    """

    feature: str
    normalize: bool
    vectors: Mapping[str, np.ndarray]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Directions) and list(self.vectors) == list(other.vectors)

    def __hash__(self) -> int:
        return hash(tuple(self.vectors))

    @classmethod
    def column(cls, feature: str, normalize: bool, vectors: np.ndarray) -> str:
        """The name of the column that holds a feature's projections on these vectors."""
        digest = hashlib.blake2b(f"{feature}\0{normalize}\0{vectors.shape}\0".encode(), digest_size=8)
        digest.update(np.ascontiguousarray(vectors, dtype="<f8").tobytes())
        return PROJECTION + digest.hexdigest()

    @classmethod
    def of(cls, feature: str, normalize: bool, vectors: Iterable[np.ndarray]) -> Directions:
        """Directions of one or several capabilities, float64 ``[blocks, width]`` each."""
        return cls(feature, normalize, {cls.column(feature, normalize, one): one for one in vectors})


def merge_directions(found: Sequence[Directions]) -> Directions:
    """Directions of several capabilities as one.

    Raises:
        NeuronSelectError: they project different things.
    """
    first = found[0]
    for other in found[1:]:
        if (other.feature, other.normalize) != (first.feature, first.normalize):
            raise NeuronSelectError(
                f"one projects {first.feature} (normalize={first.normalize}), another {other.feature} "
                f"(normalize={other.normalize}): extract each to a store of its own", option="capability",
            )  # fmt: skip
    return Directions(
        first.feature, first.normalize, {column: one for part in found for column, one in part.vectors.items()}
    )


class Projection(Feature):
    """A vector per block, projected on directions: a column ``[blocks]`` for each capability.

    Args:
        directions: what is projected, and on what.

    Raises:
        NeuronSelectError: the directions are of a model of another shape.
    """

    def __init__(self, backbone: Backbone, options: FeatureOptions, directions: Directions) -> None:
        super().__init__(backbone, None, options)
        kind = FEATURES[directions.feature]
        assert issubclass(kind, _EveryBlock)
        self.of, self.directions = kind(backbone, None, options), directions
        stacked = np.stack([*directions.vectors.values()], axis=1)  # [blocks, capabilities, width]
        if len(stacked) != backbone.num_layers:
            raise NeuronSelectError(
                f"its directions are of {len(stacked)} blocks, the model has {backbone.num_layers}: it belongs to "
                "another model", option="capability",
            )  # fmt: skip
        self.vectors = torch.from_numpy(stacked)

    @classmethod
    def deepest(cls, options: FeatureOptions, sae: SparseAutoencoder | None, num_layers: int) -> int:
        return num_layers - 1

    def start(self, batch: TokenBatch) -> tuple[list[tuple[Site, Observer]], Reducer]:
        found: dict[int, torch.Tensor] = {}

        def observer(layer: int) -> Observer:
            def observe(hidden: torch.Tensor) -> None:
                vector = self.of.vector(hidden, batch).cpu().double()
                if self.directions.normalize:
                    vector = torch.nn.functional.normalize(vector, dim=-1, eps=1e-300)
                found[layer] = vector @ self.vectors[layer].T

            return observe

        observers = [(self.of.site(layer), observer(layer)) for layer in range(self.backbone.num_layers)]

        def finish() -> dict[str, Any]:
            table = torch.stack([found[layer] for layer in range(self.backbone.num_layers)], dim=1).float().numpy()
            return {name: list(table[:, :, i]) for i, name in enumerate(self.directions.vectors)}

        return observers, finish


def column_types(names: tuple[str, ...], options: FeatureOptions, directions: Directions | None = None) -> Features:
    """The ``datasets`` types of the columns these features and the bookkeeping make."""
    types: dict[str, Any] = {}
    for name in names:
        types |= FEATURES[name].column_types(options)
    if directions is not None:
        types |= {name: List(Value("float32")) for name in directions.vectors}
    types |= {"n_tokens": Value("int32"), "truncated": Value("bool"), "neuron_skip": Value("string")}
    return Features(types | {"neuron_extractor": Value("string")})
