"""A TopK sparse autoencoder in training, with explicit gradients: sparse on a CPU, dense on a GPU.

Activations are centred and scaled to unit RMS while training; :meth:`TopK.weights` folds both into the weights, so that
whoever loads the file sees an SAE of the activations themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

AUX_WEIGHT = 1 / 32  # of the loss that revives dead latents (AuxK of Gao et al., arXiv:2406.04093)
WARMUP, DECAY = 0.02, 0.3  # shares of training in which the learning rate rises at first, and falls at last


@dataclass(frozen=True)
class TopKPlan:
    """What is trained.

    Attributes:
        width: of the activations. latents: of the SAE. k: latents kept of a token.
        tokens: activations it will see in all, which fixes the schedule of the learning rate. batch: those of a step.
        dead_after: tokens without firing after which a latent counts as dead and is revived.
    """

    width: int
    latents: int
    k: int
    tokens: int
    batch: int
    lr: float = 4e-4
    seed: int = 0

    @property
    def dead_after(self) -> int:
        return max(20_000, min(1_000_000, self.tokens // 20))

    def lr_at(self, seen: int) -> float:
        done = seen / self.tokens
        return self.lr * min(1.0, (done + 1e-3) / WARMUP, max(0.0, 1 - done) / DECAY)


def default_batch(tokens: int) -> int:
    """Tokens of a step where none are named: few for a short training, which needs steps."""
    return max(1024, min(4096, 1 << (tokens // 1000).bit_length()))


class TopK:
    """The state of one SAE in training.

    Args:
        sample: float ``[n, width]``, activations that give the centre and the scale, and the decoder's first
            directions.
    """

    def __init__(self, plan: TopKPlan, sample: torch.Tensor) -> None:
        self.plan = plan
        device = sample.device
        sample = sample.float()
        self.centre = sample.mean(dim=0)
        self.scale = float((sample - self.centre).pow(2).mean().sqrt().clamp_min(1e-8))
        draw = torch.Generator().manual_seed(plan.seed)
        decoder = torch.randn(plan.latents, plan.width, generator=draw).to(device)
        self.decoder = F.normalize(decoder, dim=1)
        self.encoder = self.decoder.clone()
        self.bias = torch.zeros(plan.latents, device=device)
        self.offset = torch.zeros(plan.width, device=device)
        self.quiet = torch.zeros(plan.latents, dtype=torch.int64, device=device)  # tokens since a latent last fired
        self.seen = 0
        self.adam = torch.optim.Adam([self.encoder, self.decoder, self.bias, self.offset], lr=plan.lr, fused=True)
        self.zero_figures()

    # ---------------------------------------------------------------------------------- training
    @torch.no_grad()
    def step(self, activations: torch.Tensor) -> None:
        """One step on activations ``[n, width]`` of any dtype."""
        x = (activations.float() - self.centre) / self.scale
        n, k = len(x), self.plan.k
        pre = torch.addmm(self.bias, x, self.encoder.T)
        values, latents = pre.topk(k, dim=1, sorted=False)
        values = values.relu_()
        dense = x.is_cuda
        if dense:
            z = torch.zeros_like(pre).scatter_(1, latents, values)
            error = torch.addmm(self.offset, z, self.decoder) - x
        else:
            error = F.embedding_bag(latents, self.decoder, per_sample_weights=values, mode="sum") + self.offset - x
        slope = error * (2 / n)  # of the squared error, summed over the width and averaged over tokens
        if dense:
            of_z = (slope @ self.decoder.T) * (z > 0)
            grads = [of_z.T @ x, z.T @ slope, of_z.sum(dim=0)]
        else:
            of_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                slope, self.decoder, latents.flatten(), torch.arange(0, n * k, k),
                torch.arange(n).repeat_interleave(k), 0,
            ).view(n, k) * (values > 0)  # fmt: skip
            grads = [*_by_latent(latents, [(of_values, x), (values, slope)], self.plan.latents),
                     torch.zeros_like(self.bias).index_add_(0, latents.flatten(), of_values.flatten())]  # fmt: skip
        self.quiet += n
        self.quiet[latents[values > 0]] = 0
        self._revive(x, pre, error, grads)
        self._update([*grads, slope.sum(dim=0)])
        self.seen += n
        self._error += error.pow(2).sum()
        self._variance += x.pow(2).sum()

    def _revive(self, x: torch.Tensor, pre: torch.Tensor, error: torch.Tensor, grads: list[torch.Tensor]) -> None:
        """Add the gradients of AuxK: dead latents learn to reconstruct what the others leave over."""
        dead = (self.quiet > self.plan.dead_after).nonzero().flatten()
        if not len(dead):
            return
        decoder = self.decoder[dead]
        values, places = pre[:, dead].topk(min(len(dead), self.plan.width // 2), dim=1, sorted=False)
        z = torch.zeros(len(x), len(dead), device=x.device).scatter_(1, places, values.relu_())
        slope = (z @ decoder + error) * (2 * AUX_WEIGHT / len(x))
        of_z = (slope @ decoder.T) * (z > 0)
        grads[0].index_add_(0, dead, of_z.T @ x)
        grads[1].index_add_(0, dead, z.T @ slope)
        grads[2].index_add_(0, dead, of_z.sum(dim=0))

    def _update(self, grads: list[torch.Tensor]) -> None:
        # The decoder's rows keep norm 1, so a gradient along them only disturbs Adam's averages.
        grads[1] -= (grads[1] * self.decoder).sum(dim=1, keepdim=True) * self.decoder
        for parameter, grad in zip(self.adam.param_groups[0]["params"], grads, strict=True):
            parameter.grad = grad
        self.adam.param_groups[0]["lr"] = self.plan.lr_at(self.seen)
        self.adam.step()
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp_min(1e-8))

    # ----------------------------------------------------------------------------------- figures
    def zero_figures(self) -> None:
        self._error = torch.zeros((), device=self.centre.device)
        self._variance = torch.zeros((), device=self.centre.device)

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained, over the activations since :meth:`zero_figures`."""
        return float(self._error / self._variance) if self._variance else math.nan

    @property
    def dead(self) -> int:
        return int((self.quiet > self.plan.dead_after).sum())

    # ------------------------------------------------------------------------------------- state
    def weights(self) -> dict[str, torch.Tensor]:
        """The SAE of unscaled activations in eai-sparsify's names: float32 on the CPU."""
        # There, z = encoder (x - b_dec) + bias and x' = z decoder + b_dec; here x is centred and scaled, and the encoder
        # sees it without the offset. Latents come out `scale` times as large, so that the decoder's rows keep norm 1.
        bias = self.scale * (self.bias + self.encoder @ self.offset)
        found = {
            "encoder.weight": self.encoder,
            "encoder.bias": bias,
            "W_dec": self.decoder,
            "b_dec": self.centre + self.scale * self.offset,
        }
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in found.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that :meth:`restore` needs to go on as if nothing had happened."""
        found = {"centre": self.centre, "scale": torch.tensor(self.scale, dtype=torch.float64), "quiet": self.quiet,
                 "seen": torch.tensor(self.seen)}  # fmt: skip
        for name, parameter in zip(_PARAMETERS, self.adam.param_groups[0]["params"], strict=True):
            found[name] = parameter
            for key, value in self.adam.state[parameter].items():
                found[f"{name}.{key}"] = value
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        device = self.centre.device
        self.centre, self.quiet = state["centre"].to(device), state["quiet"].to(device)
        self.scale, self.seen = float(state["scale"]), int(state["seen"])
        for name, parameter in zip(_PARAMETERS, self.adam.param_groups[0]["params"], strict=True):
            parameter.data.copy_(state[name])
            self.adam.state[parameter] = {
                key.removeprefix(f"{name}."): value.clone().to(device)
                for key, value in state.items()
                if key.startswith(f"{name}.")
            }


_PARAMETERS = ("encoder", "decoder", "bias", "offset")


def _by_latent(latents: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]], m: int) -> list[torch.Tensor]:
    """For each pair of weights ``[n, k]`` and vectors ``[n, d]``, sum the weighted vectors of each latent: ``[m, d]``."""
    flat = latents.flatten()
    order = flat.argsort(stable=True)
    token = order // latents.shape[1]
    starts = F.pad(torch.bincount(flat, minlength=m).cumsum(0), (1, 0))[:-1]
    return [
        F.embedding_bag(token, vectors, starts, mode="sum", per_sample_weights=weights.flatten()[order])
        for weights, vectors in pairs
    ]
