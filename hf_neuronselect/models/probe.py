"""Loss on reference rows after one training step on one row: how much that row helps (MATES, arXiv 2406.06046)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..rows.encode import Sample
from .loss import sample_losses, token_losses

BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
"""Of AdamW, as in the authors' code."""


class Prober:
    """Takes a step of AdamW on one row, measures the loss on reference rows, and takes the step back.

    The model itself is never changed: steps are taken on a float32 copy, since a step of 1e-3 is mostly lost in the 8 bits
    of a bfloat16 weight. The copy is in eval mode, without dropout.

    Args:
        model: a causal LM in float32, bfloat16 or float16. learning_rate: of the step.
        batch_tokens: padded tokens a batch of reference rows; changes memory, not the result.

    Attributes:
        reference: the reference rows.
    """

    def __init__(self, model: Any, *, learning_rate: float, batch_tokens: int) -> None:
        self.learning_rate, self.batch_tokens = learning_rate, batch_tokens
        self.reference: Sequence[Sample] = ()
        self.model = copy.deepcopy(model).float().eval().requires_grad_(True)
        self._weights = list(zip(self.model.parameters(), model.parameters(), strict=True))
        self._moments: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fill(self, samples: Sequence[Sample]) -> None:
        """Fill AdamW's moments, as of a long training at these weights: means of the rows' gradients and of their squares."""
        firsts = [torch.zeros_like(weight) for weight, _ in self._weights]
        seconds = [torch.zeros_like(weight) for weight, _ in self._weights]
        for sample in samples:
            for gradient, first, second in zip(self._gradients(sample), firsts, seconds, strict=True):
                if gradient is not None:
                    first.add_(gradient, alpha=1 / len(samples))
                    second.addcmul_(gradient, gradient, value=1 / len(samples))
        self._moments = list(zip(firsts, seconds, strict=True))

    def losses_after(self, sample: Sample) -> np.ndarray:
        """:meth:`losses` after a step on the mean loss of a row's ``pooled`` tokens; the step is then taken back."""
        try:
            self._step(self._gradients(sample))
            return self.losses()
        finally:
            self._restore()

    def losses(self) -> np.ndarray:
        """Mean loss of each reference row's ``pooled`` tokens, float64 ``[n]``, in nats; NaN where it is not finite."""
        nll, tokens = sample_losses(self.model, self.reference, self.batch_tokens)
        return np.where(np.isfinite(nll), nll / tokens, np.nan)

    def _gradients(self, sample: Sample) -> list[torch.Tensor | None]:
        """Gradients of the row's mean loss, clipped to norm 1 in all; None of weights that it does not use."""
        token_losses(self.model, [sample])[0].mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        found = [weight.grad for weight, _ in self._weights]
        self.model.zero_grad(set_to_none=True)
        return found

    @torch.no_grad()
    def _step(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """``w -= rate * (decay * w + m / (sqrt(v) + eps))``; empty moments are corrected for their start, full ones are not."""
        (beta1, beta2), rate = BETAS, self.learning_rate
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if self._moments:
                first, second = self._moments[i]
                first = beta1 * first + (1 - beta1) * gradient
                second = beta2 * second + (1 - beta2) * gradient**2
                update = first / (second.sqrt() + EPS)
            else:  # the first step: m = g and v = g * g
                update = gradient / (gradient.abs() + EPS)
            self._weights[i][0].mul_(1 - rate * WEIGHT_DECAY).sub_(update, alpha=rate)

    @torch.no_grad()
    def _restore(self) -> None:
        for weight, original in self._weights:
            weight.copy_(original)
