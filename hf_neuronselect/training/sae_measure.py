"""How good an SAE is: measured on rows that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..core.errors import NeuronSelectError
from ..models.backbone import Backbone
from ..models.sae import SparseAutoencoder
from .token_rows import SINK, TokenRows, read_sites


@dataclass(frozen=True)
class SaeFigures:
    """An SAE on held-out rows, without the first token of a row and other attention sinks.

    Attributes:
        fvu: fraction of variance unexplained. dead: share of latents that never fire. tokens: it was measured on.
        l0: mean active latents.
        loss: of the model on the next tokens, in nats. loss_with_sae: with the block's output replaced by the
            reconstruction. loss_without: with it replaced by zeros.
    """

    fvu: float
    dead: float
    latents: int
    tokens: int
    l0: float
    loss: float
    loss_with_sae: float
    loss_without: float

    @property
    def loss_recovered(self) -> float:
        gap = self.loss_without - self.loss
        return (self.loss_without - self.loss_with_sae) / gap if gap else math.nan


@torch.inference_mode()
def measure_saes(
    lm: Any, saes: Sequence[SparseAutoencoder], rows: TokenRows, *, batch: int, more: TokenRows | None = None
) -> list[SaeFigures]:
    """Measure top-k SAEs with their decoders on rows.

    Args:
        lm: the causal LM, in eval mode. batch: tokens of a forward pass (whose logits are held at once).
        more: rows on which only the latents that fire are counted: a rare one may miss a few held-out rows.

    Raises:
        NeuronSelectError: an SAE without a decoder or without a top-k, or no finite activation.
    """
    backbone = Backbone(lm)
    device = backbone.device
    encoders = [sae.to(device, torch.float32) for sae in saes]
    tallies = [_Tally(sae, device) for sae in saes]
    limits: list[float] = []
    for _, tokens in rows.batches(batch, device):
        seen = read_sites(backbone, tokens, [sae.site for sae in saes])
        limits = limits or [SINK * float(x.norm(dim=-1).nanmedian()) for x in seen]
        losses = _Losses(lm, tokens)
        clean = losses.total()
        for sae, encoder, tally, x, limit in zip(saes, encoders, tallies, seen, limits, strict=True):
            keep = x.norm(dim=-1) <= limit
            values, indices = encoder.encode(x[keep])
            if indices is None:
                raise NeuronSelectError("only top-k SAEs can be measured", option="sae")
            found = tally.add(x[keep], values, indices)
            x[keep] = found
            module = backbone.resolve(sae.site)
            with _replaced(module, tokens.pooled.token, x):
                tally.loss_with_sae += losses.total()
            with _replaced(module, tokens.pooled.token, torch.zeros_like(x)):
                tally.loss_without += losses.total()
            tally.loss += clean
            tally.predicted += losses.count
    for _, tokens in more.batches(batch, device) if more is not None else ():
        seen = read_sites(backbone, tokens, [sae.site for sae in saes])
        for encoder, tally, x, limit in zip(encoders, tallies, seen, limits, strict=True):
            values, indices = encoder.encode(x[x.norm(dim=-1) <= limit])
            assert indices is not None
            tally.fired[indices[values > 0]] = True
    return [tally.figures() for tally in tallies]


class _Tally:
    def __init__(self, sae: SparseAutoencoder, device: torch.device) -> None:
        if sae.W_dec is None or sae.site.io != "output":
            raise NeuronSelectError(
                "an SAE of a block's output, with its decoder, is needed to measure it", option="sae"
            )
        self.decoder = sae.W_dec.to(device, torch.float32)
        self.offset = 0.0 if sae.b_dec is None else sae.b_dec.to(device, torch.float32)
        self.fired = torch.zeros(sae.num_latents, dtype=torch.bool, device=device)
        self.total = torch.zeros(sae.d_in, dtype=torch.float64, device=device)
        self.error = self.squares = self.active = self.loss = self.loss_with_sae = self.loss_without = 0.0
        self.tokens = self.predicted = 0

    def add(self, x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Count one batch; its reconstruction."""
        self.fired[indices[values > 0]] = True
        found = F.embedding_bag(indices, self.decoder, per_sample_weights=values, mode="sum") + self.offset
        self.error += float((x - found).double().pow(2).sum())
        self.squares += float(x.double().pow(2).sum())
        self.total += x.double().sum(dim=0)
        self.active += float((values > 0).sum())
        self.tokens += len(x)
        return found

    def figures(self) -> SaeFigures:
        variance = self.squares - float(self.total.pow(2).sum()) / max(self.tokens, 1)
        if not self.tokens or not math.isfinite(variance) or variance <= 0:
            raise NeuronSelectError("no finite activation to measure the SAE on", option="pool")
        predicted = max(self.predicted, 1)
        return SaeFigures(
            self.error / variance, float((~self.fired).float().mean()), len(self.fired), self.tokens,
            self.active / self.tokens, self.loss / predicted, self.loss_with_sae / predicted,
            self.loss_without / predicted,
        )  # fmt: skip


class _Losses:
    """The loss on each token that follows a used one, of one batch."""

    def __init__(self, lm: Any, tokens: Any) -> None:
        self.lm, self.ids = lm, tokens.input_ids
        width = self.ids.shape[1]
        at = tokens.pooled.token[(tokens.pooled.token % width) < tokens.last[tokens.pooled.row]]
        self.at, self.target = at, self.ids.flatten()[at + 1]
        self.count = len(at)

    def total(self) -> float:
        logits = self.lm(input_ids=self.ids, use_cache=False).logits.flatten(0, 1)
        pairs = zip(self.at.split(4096), self.target.split(4096), strict=True)
        return sum(float(F.cross_entropy(logits[at].float(), target, reduction="sum")) for at, target in pairs)


@contextmanager
def _replaced(module: torch.nn.Module, token: torch.Tensor, vectors: torch.Tensor) -> Any:
    """Replace the module's output at the tokens (positions in the flattened batch)."""

    def replace(_module: Any, _args: Any, output: Any) -> Any:
        whole = isinstance(output, tuple)
        hidden = output[0] if whole else output
        flat = hidden.reshape(-1, hidden.shape[-1]).clone()
        flat[token] = vectors.to(flat.dtype)
        hidden = flat.view_as(hidden)
        return (hidden, *output[1:]) if whole else hidden

    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
