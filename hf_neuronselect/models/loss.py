"""Compute a model's loss on answers, in nats per answer token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from ..core import progress
from ..core.errors import NeuronSelectError
from ..rows.answers import AnswerEncoder
from ..rows.encode import Sample
from ..rows.formats import Conversation
from .batching import logits_budget, plan_batches
from .checkpoint import limits_of

_CHUNK = 1 << 25  # float32 logits in memory at once for the cross entropy: 128 MB


@dataclass(frozen=True, eq=False)
class AnswerLoss:
    """The loss of each row's answers.

    Attributes:
        nll: float64 ``[n]``, negative log-likelihood in nats, summed over the row's answer tokens; NaN if unusable.
        tokens: int64 ``[n]``, number of answer tokens; 0 if unusable.
        skips: reason a row is unusable, ``""`` for a usable one.
    """

    nll: np.ndarray
    tokens: np.ndarray
    skips: list[str]

    @property
    def mean(self) -> float:
        """Nats per answer token over all usable rows; NaN if there are none."""
        total = int(self.tokens.sum())
        return float(np.nansum(self.nll)) / total if total else math.nan


def answer_losses(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    max_length: int = 2048,
    batch_tokens: int | Literal["auto"] = "auto",
) -> AnswerLoss:
    """Compute the loss of a causal LM on the answers of conversations, each given the turns before it.

    Answer tokens are the tokens that training learns: those of the assistant turns and the token that ends each turn,
    or what the chat template marks (see :class:`~hf_neuronselect.rows.answers.AnswerEncoder`).

    Args:
        model: a loaded causal LM or a ``PeftModel`` of one; it is in eval mode during the call.
        tokenizer: its tokenizer, a fast one.
        conversations: rows read by :func:`~hf_neuronselect.rows.formats.read_row`.
        max_length: tokens kept of a row, from its beginning.
        batch_tokens: padded tokens per batch; changes memory and time, not the result. A longer row gets its own batch.

    Raises:
        NeuronSelectError: an option out of range, a tokenizer without offsets, a prompt-learning adapter, no row with
            an answer (option ``data``), or a loss that is not finite (the error names the row).
    """
    if batch_tokens != "auto" and batch_tokens < 1:
        raise NeuronSelectError("must be at least 1", option="batch_tokens", value=batch_tokens)
    peft_config = getattr(model, "active_peft_config", None)
    if peft_config is not None and peft_config.is_prompt_learning:
        raise NeuronSelectError(
            "prompt and prefix tuning shift the tokens and are not supported; use an adapter in the layers (LoRA)",
            option="model",
            value=str(peft_config.peft_type),
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    limits = limits_of(getattr(base, "config", None))
    rows = AnswerEncoder(tokenizer, max_length=max_length, limits=limits).encode(conversations)
    skips = [row.skip for row in rows]
    usable = [i for i, skip in enumerate(skips) if not skip]
    if not usable:
        first = next((f"; row {i}: {skip}" for i, skip in enumerate(skips)), "")
        raise NeuronSelectError(
            f"no row has an answer to compute a loss on{first}; give rows with an assistant turn",
            option="data",
            value=f"{len(skips)} rows",
        )
    nll = np.full(len(rows), np.nan)
    tokens = np.zeros(len(rows), dtype=np.int64)
    progress.read(len(rows), sum(len(rows[i].input_ids) for i in usable))
    nll[usable], tokens[usable] = sample_losses(model, [rows[i] for i in usable], logits_budget(base, batch_tokens))
    for i in usable:
        if not math.isfinite(nll[i]):
            raise NeuronSelectError(
                f"the loss of this row is {nll[i]}: check the weights for NaN, or load the model in "
                "float32 or bfloat16 (float16 overflows)",
                option="data",
                value=f"row {i}",
            )
    return AnswerLoss(nll, tokens, skips)


def sample_losses(model: Any, samples: Sequence[Sample], batch_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the loss of each sample's ``pooled`` tokens, given all tokens before them.

    Args:
        batch_tokens: padded tokens per batch; changes memory, not the result.

    Returns:
        Nats summed over the pooled tokens, float64 ``[n]``, and the number of pooled tokens, int64 ``[n]``.
    """
    nll, tokens = np.zeros(len(samples)), np.zeros(len(samples), dtype=np.int64)
    with evaluating(model):
        for batch in plan_batches([len(sample.input_ids) for sample in samples], batch_tokens):
            nll[batch], tokens[batch] = _batch_losses(model, [samples[i] for i in batch])
            progress.advance(sum(len(samples[i].input_ids) for i in batch))
    return nll, tokens


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Disable gradients and use eval mode; each module's mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _batch_losses(model: Any, rows: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Run one batch: nats summed over each row's answer, float64 ``[B]``, and answer tokens, int64 ``[B]``."""
    losses, row_of = token_losses(model, rows)
    nll = np.bincount(row_of, weights=losses.double().cpu().numpy(), minlength=len(rows))
    return nll, np.bincount(row_of, minlength=len(rows))


def token_losses(model: Any, rows: Sequence[Sample]) -> tuple[torch.Tensor, np.ndarray]:
    """Run one batch: nats of each answer token, float32 ``[T]`` row by row, and each one's row, int64 ``[T]``.

    Gradients flow where they are enabled.
    """
    width = max(len(row.input_ids) for row in rows)
    # Padded on the right, without a mask: no token attends to tokens on its right.
    ids = np.zeros((len(rows), width), dtype=np.int64)
    answer = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = row.input_ids
        answer[i, : len(row.pooled)] = row.pooled
    row_of, position = np.nonzero(answer)
    target = torch.from_numpy(ids[row_of, position])
    before = position - 1  # the position whose logits predict the token
    device = next(model.parameters()).device
    given: dict[str, Any] = {"input_ids": torch.from_numpy(ids).to(device), "use_cache": False}
    at = torch.from_numpy(row_of * width + before)
    with _head_sees(model, at):
        logits = model(**given).logits
    flat, target = logits.flatten(0, 1), target.to(logits.device)
    if len(flat) != len(at):  # the model has no head to hook
        flat = flat[at.to(logits.device)]
    chunk = max(1, _CHUNK // flat.shape[-1])
    losses = [
        F.cross_entropy(flat[i : i + chunk].float(), target[i : i + chunk], reduction="none")
        for i in range(0, len(at), chunk)
    ]
    return torch.cat(losses), row_of


@contextmanager
def _head_sees(model: Any, at: torch.Tensor) -> Iterator[None]:
    """The model's head computes logits ``[1, len(at), V]`` of these positions alone, numbered row by row: its largest product."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    if head is None:
        yield
        return

    def keep(_: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = given
        return (hidden.flatten(0, 1)[at.to(hidden.device)][None], *rest)

    hook = head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()
