"""The forward engine's signals: SAE latents, gate activations, hidden states, drifts, routing weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from ..core.errors import NeuronSelectError
from ..models.backbone import Backbone, Observer
from ..models.batching import MarkedTokens, TokenBatch
from ..models.sae import CHUNK_ELEMENTS, Site, SparseAutoencoder, top_k
from ..rows.encode import Sample
from .base import register_signal
from .extraction import Extraction
from .forward import ForwardSignal, Reducer

NEURONS = 20  # of each block, NAG's
PAPER_K = 192  # MoNA's K, used where neither K nor an SAE's own k is given


class _Sparse(ForwardSignal):
    """Pooled latents, of which only the nonzeros are kept."""

    has_vector = True

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        value = pa.float16() if extraction.options.value_dtype == "float16" else pa.float32()
        return {f"{self.name}_indices": pa.list_(pa.int32()), f"{self.name}_values": pa.list_(value)}

    def columns(self, sums: torch.Tensor, batch: TokenBatch, extraction: Extraction) -> dict[str, Any]:
        """Sums over pooled tokens, float32 ``[B, m]``, as rows of nonzeros."""
        pooled = sums / batch.pooled.count[:, None] if extraction.options.pooling == "mean" else sums
        return self.nonzeros(pooled, extraction)

    def nonzeros(self, dense: torch.Tensor, extraction: Extraction) -> dict[str, Any]:
        """Latents, float32 ``[B, m]``, as rows of nonzeros."""
        # Nonzeros are found on the device: a hundredth of [B, m] is copied off a GPU.
        cast = dense.to(getattr(torch, extraction.options.value_dtype))
        places = cast.view(-1).nonzero().flatten()
        rows, latents, values = (
            part.cpu().numpy()
            for part in (places // cast.shape[1], (places % cast.shape[1]).int(), cast.view(-1)[places])
        )
        splits = np.searchsorted(rows, np.arange(1, len(cast)))
        return {f"{self.name}_indices": np.split(latents, splits), f"{self.name}_values": np.split(values, splits)}


class _Latents(_Sparse):
    """Latents of the extraction's SAE."""

    needs_sae = True

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        # The SAE's own site decides, which may be in another block than `layer`.
        return {**super().numbers(extraction), "sae": extraction.sae_state(), "site": extraction.sae_site}

    def deepest(self, extraction: Extraction, num_layers: int) -> int:
        assert extraction.sae_site is not None
        return Site(extraction.sae_site.split()[0]).block or 0


@register_signal
class Mona(_Latents):
    """Mean over pooled tokens of the top-K SAE latents at one site (MoNA, arXiv 2503.15573, eq. 6-7)."""

    name = "mona"
    reads = ("top_k_features", "pooling", "value_dtype")

    def start(
        self, batch: TokenBatch, backbone: Backbone, sae: SparseAutoencoder | None, extraction: Extraction
    ) -> tuple[list[tuple[Site, Observer]], Reducer]:
        assert sae is not None
        sums: list[torch.Tensor] = []

        def observe(hidden: torch.Tensor) -> None:
            k = extraction.options.top_k_features
            sums.append(sae.sum_rows(batch.pooled.vectors(hidden), batch.pooled.row, batch.size, k))

        return [(sae.site, observe)], lambda: self.columns(sums[0], batch, extraction)


@register_signal
class PromptLatents(_Latents):
    """The SAE's latents at one token, the last before the first answer (IGDS, arXiv 2604.25167)."""

    name = "prompt_latents"
    reads = ("top_k_features", "value_dtype")
    marks = ("prompt", "answer")

    def start(
        self, batch: TokenBatch, backbone: Backbone, sae: SparseAutoencoder | None, extraction: Extraction
    ) -> tuple[list[tuple[Site, Observer]], Reducer]:
        assert sae is not None
        found: list[torch.Tensor] = []

        def observe(hidden: torch.Tensor) -> None:
            rows = torch.arange(batch.size, device=hidden.device)
            at_end = batch.at(hidden, batch.marks["prompt"].last)
            found.append(sae.sum_rows(at_end, rows, batch.size, extraction.options.top_k_features))

        return [(sae.site, observe)], lambda: self.nonzeros(found[0], extraction)


@register_signal
class Polysemantic(_Sparse):
    """Mean over tokens of the K largest ``act(W_gate x)``, negatives 0 (MoNA's comparison, App. B.3)."""

    name = "polysemantic"
    reads = ("layer", "pooling", "value_dtype")

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        return {**super().numbers(extraction), "k": _gate_k(extraction)}

    def deepest(self, extraction: Extraction, num_layers: int) -> int:
        return extraction.options.layer

    def start(
        self, batch: TokenBatch, backbone: Backbone, sae: SparseAutoencoder | None, extraction: Extraction
    ) -> tuple[list[tuple[Site, Observer]], Reducer]:
        site, activate = backbone.gate(extraction.options.layer)
        k = _gate_k(extraction)
        sums: list[torch.Tensor] = []

        def observe(gate: torch.Tensor) -> None:
            tokens = batch.pooled.vectors(gate)
            total: torch.Tensor | None = None
            step = max(64, CHUNK_ELEMENTS // tokens.shape[-1])
            for start in range(0, len(tokens), step):
                acts = activate(tokens[start : start + step]).clamp_min(0)
                if total is None:
                    total = torch.zeros(batch.size * acts.shape[-1], device=acts.device)
                values, indices = top_k(acts, k)
                owner = batch.pooled.row[start : start + step, None] * acts.shape[-1]
                total.scatter_add_(0, (indices + owner).flatten(), values.float().flatten())
            assert total is not None
            sums.append(total.view(batch.size, -1))

        return [(site, observe)], lambda: self.columns(sums[0], batch, extraction)


def _gate_k(extraction: Extraction) -> int:
    return extraction.options.top_k_features or extraction.sae_k or PAPER_K


@register_signal
class Hidden(ForwardSignal):
    """Mean hidden state over pooled tokens at one block (MoNA's "w/o SAE"): float32 ``[d]``."""

    name = "hidden"
    reads = ("layer",)
    has_vector = True

    def deepest(self, extraction: Extraction, num_layers: int) -> int:
        return extraction.options.layer

    def start(
        self, batch: TokenBatch, backbone: Backbone, sae: SparseAutoencoder | None, extraction: Extraction
    ) -> tuple[list[tuple[Site, Observer]], Reducer]:
        means: list[torch.Tensor] = []
        site = backbone.residual(extraction.options.layer)
        observers: list[tuple[Site, Observer]] = [(site, lambda hidden: means.append(batch.pooled.mean(hidden)))]
        return observers, lambda: {self.name: list(means[0].cpu().numpy())}


@register_signal
class RdsPlus(ForwardSignal):
    """``e = unit(sum_t t h_t / sum_t t)`` over all tokens, ``h`` after the final norm (RDS+, arXiv 2503.01807): float32 ``[d]``."""

    name = "rds_plus"
    has_vector = True

    def start(
        self, batch: TokenBatch, backbone: Backbone, sae: SparseAutoencoder | None, extraction: Extraction
    ) -> tuple[list[tuple[Site, Observer]], Reducer]:
        found: list[torch.Tensor] = []

        def observe(hidden: torch.Tensor) -> None:
            tokens = batch.whole
            weight = (tokens.token - tokens.row * hidden.shape[1] + 1).float()
            vectors = tokens.vectors(hidden).float() * weight[:, None]
            total = torch.zeros(batch.size, vectors.shape[-1], device=vectors.device).index_add_(0, tokens.row, vectors)
            total /= (tokens.count * (tokens.count + 1) / 2)[:, None]
            found.append(torch.nn.functional.normalize(total, dim=1))

        return [(backbone.final_norm(), observe)], lambda: {self.name: list(found[0].cpu().numpy())}


@register_signal
class LastNormed(ForwardSignal):
    """The last token's state after the final norm (DEITA's distance, arXiv 2312.15685): float32 ``[d]``."""

    name = "last_normed"
    has_vector = True

    def start(
        self, batch: TokenBatch, backbone: Backbone, sae: SparseAutoencoder | None, extraction: Extraction
    ) -> tuple[list[tuple[Site, Observer]], Reducer]:
        found: list[torch.Tensor] = []
        observers: list[tuple[Site, Observer]] = [
            (backbone.final_norm(), lambda hidden: found.append(batch.at(hidden, batch.whole.last).float()))
        ]
        return observers, lambda: {self.name: list(found[0].cpu().numpy())}


class EveryBlock(ForwardSignal):
    """A vector per block: float32 ``[num_layers, width]``."""

    reads: ClassVar[tuple[str, ...]] = ("site",)
    has_vector = True

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        return {self.name: pa.list_(pa.list_(pa.float32()))}

    def site(self, backbone: Backbone, layer: int, extraction: Extraction) -> Site:
        return backbone.neurons(layer) if extraction.options.site == "mlp" else backbone.residual(layer)

    def tokens(self, batch: TokenBatch) -> MarkedTokens:
        """The tokens it reads: those marked for it, else all."""
        return batch.marks[self.marks[0]] if self.marks else batch.whole

    @abstractmethod
    def vector(self, hidden: torch.Tensor, batch: TokenBatch, extraction: Extraction) -> torch.Tensor:
        """``[B, L, width]`` -> float32 ``[B, width]``."""

    def read_tokens(self, sample: Sample) -> np.ndarray:
        """Numbers of the tokens it reads in a row, int64, ascending."""
        return np.flatnonzero(sample.marks[self.marks[0]] if self.marks else np.ones(len(sample.input_ids), bool))

    @abstractmethod
    def token_parts(self, projected: np.ndarray, extraction: Extraction) -> np.ndarray:
        """What each token it reads adds to the projection of its vector: float64 ``[t]``, which add up to it.

        Args:
            projected: float64 ``[t]``, of these tokens' own states.
        """

    def start(
        self, batch: TokenBatch, backbone: Backbone, sae: SparseAutoencoder | None, extraction: Extraction
    ) -> tuple[list[tuple[Site, Observer]], Reducer]:
        vectors: dict[int, torch.Tensor] = {}

        def observer(layer: int) -> Observer:
            return lambda hidden: vectors.__setitem__(layer, self.vector(hidden, batch, extraction))

        layers = range(backbone.num_layers)
        observers = [(self.site(backbone, layer, extraction), observer(layer)) for layer in layers]

        def finish() -> dict[str, Any]:
            stacked = torch.stack([vectors[layer] for layer in layers], dim=1)
            return {self.name: list(stacked.cpu().numpy())}

        return observers, finish


class Drift(EveryBlock):
    """A drift per block: last minus first token (option ``drift``: their tokens' mean minus the first, or per token)."""

    reads = ("site", "drift")

    def vector(self, hidden: torch.Tensor, batch: TokenBatch, extraction: Extraction) -> torch.Tensor:
        tokens = self.tokens(batch)
        first = batch.at(hidden, tokens.first)
        if extraction.options.drift == "mean":
            return tokens.mean(hidden) - first
        drift = batch.at(hidden, tokens.last) - first
        return drift / tokens.count.clamp_min(1)[:, None] if extraction.options.drift == "per_token" else drift

    def token_parts(self, projected: np.ndarray, extraction: Extraction) -> np.ndarray:
        """The step from the token before; the first token starts at 0."""
        if extraction.options.drift == "mean":
            return (projected - projected[:1]) / max(1, len(projected))
        steps = np.diff(projected, prepend=projected[:1])
        return steps / max(1, len(steps)) if extraction.options.drift == "per_token" else steps


@register_signal
class Nait(Drift):
    """The drift over the turns' own texts, without the template's tokens (NAIT, arXiv 2603.13201)."""

    name = "nait"
    marks = ("content",)


@register_signal
class NaitAnswer(Drift):
    """The drift over the answers, from their first token to their last."""

    name = "nait_answer"
    marks = ("answer",)


@register_signal
class NaitTemplate(Drift):
    """The drift over the whole text, BOS and template tokens included: the paper's reading to the letter."""

    name = "nait_template"


class Last(EveryBlock):
    """Each block's output at the last of its tokens."""

    def vector(self, hidden: torch.Tensor, batch: TokenBatch, extraction: Extraction) -> torch.Tensor:
        return batch.at(hidden, self.tokens(batch).last)

    def token_parts(self, projected: np.ndarray, extraction: Extraction) -> np.ndarray:
        """The last token is all there is."""
        return np.append(np.zeros(len(projected[1:])), projected[-1:])


@register_signal
class NaitLast(Last):
    """The last token of the turns' texts."""

    name = "nait_last"
    marks = ("content",)


@register_signal
class NaitTemplateLast(Last):
    """The last token of all."""

    name = "nait_template_last"


class Mean(EveryBlock):
    """Each block's output, mean over its tokens."""

    def vector(self, hidden: torch.Tensor, batch: TokenBatch, extraction: Extraction) -> torch.Tensor:
        return self.tokens(batch).mean(hidden)

    def token_parts(self, projected: np.ndarray, extraction: Extraction) -> np.ndarray:
        return projected / max(1, len(projected))


@register_signal
class NaitMean(Mean):
    """The mean over the pooled tokens."""

    name = "nait_mean"

    def tokens(self, batch: TokenBatch) -> MarkedTokens:
        return batch.pooled

    def read_tokens(self, sample: Sample) -> np.ndarray:
        return np.flatnonzero(sample.pooled)


@register_signal
class ContentMean(Mean):
    """The mean over the tokens of the turns' texts."""

    name = "content_mean"
    marks = ("content",)


@register_signal
class AnswerMean(Mean):
    """The mean over the answers' tokens."""

    name = "answer_mean"
    marks = ("answer",)


@register_signal
class StrongestNeurons(ForwardSignal):
    """The neurons of each block's up projection with the largest mean magnitude over pooled tokens (NAG, arXiv 2604.15706).

    int32 ``[num_layers * 20]``: ``block * width + neuron``, ascending.
    """

    name = "strongest_neurons"

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        return {self.name: pa.list_(pa.int32())}

    def start(
        self, batch: TokenBatch, backbone: Backbone, sae: SparseAutoencoder | None, extraction: Extraction
    ) -> tuple[list[tuple[Site, Observer]], Reducer]:
        found: dict[int, torch.Tensor] = {}
        observers: list[tuple[Site, Observer]] = []
        for layer in range(backbone.num_layers):
            site, take = backbone.up(layer)

            def observe(
                hidden: torch.Tensor, layer: int = layer, take: Callable[[torch.Tensor], torch.Tensor] = take
            ) -> None:
                means = batch.pooled.mean(take(hidden).abs())
                _, neurons = top_k(means, NEURONS)
                found[layer] = neurons.sort(dim=1).values + layer * means.shape[1]

            observers.append((site, observe))

        def finish() -> dict[str, Any]:
            return {self.name: list(torch.cat([found[k] for k in sorted(found)], dim=1).int().cpu().numpy())}

        return observers, finish


@register_signal
class Routing(ForwardSignal):
    """Mean over pooled tokens of every MoE block's routing weights over all experts, concatenated."""

    name = "routing"

    def start(
        self, batch: TokenBatch, backbone: Backbone, sae: SparseAutoencoder | None, extraction: Extraction
    ) -> tuple[list[tuple[Site, Observer]], Reducer]:
        found = [(layer, backbone.router(layer)) for layer in range(backbone.num_layers)]
        routers = [(layer, router) for layer, router in found if router is not None]
        if not routers:
            raise NeuronSelectError("the model has no mixture-of-experts block", option="features", value="routing")
        means: dict[int, torch.Tensor] = {}
        observers: list[tuple[Site, Observer]] = []
        for layer, (site, weigh) in routers:

            def observe(
                hidden: torch.Tensor, layer: int = layer, weigh: Callable[[torch.Tensor], torch.Tensor] = weigh
            ) -> None:
                means[layer] = batch.pooled.mean(weigh(hidden))

            observers.append((site, observe))
        return observers, lambda: {self.name: list(torch.cat([means[k] for k in sorted(means)], dim=1).cpu().numpy())}
