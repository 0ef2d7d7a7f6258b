"""Gradients of single rows at LoRA factors, for a whole batch in one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ..rows.encode import Sample
from .lora import LoraModel
from .loss import token_losses

Sink = Callable[[str, torch.Tensor], None]
"""Is given a factor's name and the rows' gradients at it, float32 ``[rows, coordinates]``, once a factor and pass."""


def row_gradients(lora: LoraModel, rows: Sequence[Sample], sink: Sink) -> torch.Tensor:
    """Gradients of each row's loss, the mean over its answer tokens, at every LoRA factor.

    A factor is a linear layer: with the layer's inputs ``x_t`` and the loss's gradients ``d_t`` at its outputs, a row's
    gradient is ``sum_t d_t x_t^T``, which two batched products give as soon as the backward pass has ``d``. No weight
    asks for a gradient, none is kept, and the other rows of the batch are not in it: padding has ``d_t = 0``.

    Args:
        rows: their ``pooled`` tokens are the answers; padded on the right.

    Returns:
        Loss of each row, nats a token, float32 ``[rows]``.
    """

    def watch(name: str) -> Callable[..., None]:
        def forward(module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            given = inputs[0].detach()

            def backward(slope: torch.Tensor) -> None:
                with torch.no_grad():
                    sink(name, torch.bmm(slope.transpose(1, 2), given).flatten(1).float())

            output.register_hook(backward)

        return forward

    with ExitStack() as hooks, torch.enable_grad():
        for name, module in lora.modules.items():
            hooks.callback(module.register_forward_hook(watch(name)).remove)
        losses, row_of = token_losses(lora.model, rows)
        where = torch.from_numpy(row_of).to(losses.device)
        totals = torch.zeros(len(rows), device=losses.device).index_add(0, where, losses)
        means = totals / torch.bincount(where, minlength=len(rows))
        means.sum().backward()
    return means.detach()
