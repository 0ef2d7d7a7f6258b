"""Compute a model's loss on answers, in nats per answer token."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..core.errors import NeuronSelectError
from ..rows.encode import Sample, SampleEncoder
from ..rows.formats import Conversation
from .batching import plan_batches

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
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
    batch_tokens: int = 4096,
) -> AnswerLoss:
    """Compute the loss of a causal LM on the answers of conversations, each given the turns before it.

    Answer tokens are the tokens that TRL trains with ``assistant_only_loss=True``: tokens that the chat template, or
    TRL's training variant of it, marks with ``{% generation %}``. Without such markers they are the tokens of the
    assistant turns and the special token that ends each turn (which ``pool_tokens="assistant"`` leaves out). A token at
    position 0 is never predicted, so it does not count.

    Args:
        model: a loaded causal LM or a ``PeftModel`` of one; it is in eval mode during the call.
        tokenizer: its tokenizer, a fast one.
        conversations: rows read by :func:`~hf_neuronselect.rows.formats.read_row`.
        max_length: tokens kept of a row, from its beginning.
        batch_tokens: padded tokens per batch; changes memory, not the result. A longer row gets its own batch.

    Raises:
        NeuronSelectError: an option out of range, a tokenizer without offsets, a prompt-learning adapter, no row with
            an answer (option ``data``), or a loss that is not finite (the error names the row).
    """
    if batch_tokens < 1:
        raise NeuronSelectError("must be at least 1", option="batch_tokens", value=batch_tokens)
    peft_config = getattr(model, "active_peft_config", None)
    if peft_config is not None and peft_config.is_prompt_learning:
        raise NeuronSelectError(
            "prompt and prefix tuning shift the tokens and are not supported; use an adapter in the layers (LoRA)",
            option="model",
            value=str(peft_config.peft_type),
        )
    rows, skips = _tokenise(tokenizer, conversations, max_length)
    usable = [i for i, skip in enumerate(skips) if not skip]
    if not usable:
        first = next((f"; row {i}: {skip}" for i, skip in enumerate(skips)), "")
        raise NeuronSelectError(
            f"no row has an answer to compute a loss on{first}", option="data", value=f"{len(skips)} rows"
        )
    nll = np.full(len(rows), np.nan)
    tokens = np.zeros(len(rows), dtype=np.int64)
    nll[usable], tokens[usable] = sample_losses(model, [rows[i] for i in usable], batch_tokens)
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
    with _evaluating(model):
        for batch in plan_batches([len(sample.input_ids) for sample in samples], batch_tokens):
            nll[batch], tokens[batch] = _batch_losses(model, [samples[i] for i in batch])
    return nll, tokens


def _tokenise(tokenizer: Any, conversations: Sequence[Conversation], max_length: int) -> tuple[list[Sample], list[str]]:
    """Tokenise rows into samples whose ``pooled`` tokens are the answers, with the reasons of unusable rows."""
    if not tokenizer.is_fast:
        raise NeuronSelectError(
            "finding the answers needs a fast tokenizer (offsets)", option="tokenizer", value=type(tokenizer).__name__
        )
    template, marked = _template(tokenizer)
    encoder = SampleEncoder(
        tokenizer,
        pool_tokens="all" if marked else "assistant",
        max_length=max_length,
        chat_template=template,
    )
    ends = np.asarray(sorted({*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}), dtype=np.int64)
    samples, skips = [], []
    for conversation, sample in zip(conversations, encoder.encode(conversations), strict=True):
        skip = sample.skip
        if not skip and not any(message["role"] == "assistant" for message in conversation.messages):
            skip = "error: no assistant turn"
        if not skip:
            if marked:
                answer = _generated(tokenizer, template, conversation)[: len(sample.input_ids)]
            else:
                answer = _with_ends(sample, ends)
            answer[0] = False
            skip = "" if answer.any() else f"error: no answer token within max_length={max_length}"
            sample = Sample(sample.input_ids, answer, sample.content, sample.n_total)
        samples.append(sample)
        skips.append(skip)
    return samples, skips


def _template(tokenizer: Any) -> tuple[str | None, bool]:
    """The chat template, or TRL's training variant of it, and whether it marks the assistant's tokens."""
    if not tokenizer.chat_template:
        return None, False
    template = tokenizer.get_chat_template()
    if _GENERATION.search(template):
        return template, True
    from trl import get_training_chat_template  # takes seconds to import and is rarely needed

    try:
        return get_training_chat_template(tokenizer), True
    except ValueError:  # TRL does not know the template
        return template, False


def _generated(tokenizer: Any, template: str | None, conversation: Conversation) -> np.ndarray:
    """Bool ``[n]``: tokens inside the template's ``{% generation %}`` blocks."""
    encoded = tokenizer.apply_chat_template(
        conversation.messages,
        tools=conversation.tools,
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return np.asarray(encoded["assistant_masks"], dtype=bool)


def _with_ends(sample: Sample, ends: np.ndarray) -> np.ndarray:
    """Bool ``[n]``: pooled tokens, and the special token right after each run of them."""
    answer = sample.pooled.copy()
    answer[1:] |= sample.pooled[:-1] & np.isin(sample.input_ids[1:], ends)
    return answer


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
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
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(base.forward).parameters:  # only positions where a row has an answer token
        kept, before = np.unique(before, return_inverse=True)
        given["logits_to_keep"] = torch.from_numpy(kept).to(device)
    logits = model(**given).logits
    at = torch.from_numpy(row_of * logits.shape[1] + before).to(logits.device)
    flat, target = logits.flatten(0, 1), target.to(logits.device)
    chunk = max(1, _CHUNK // flat.shape[-1])
    losses = [
        F.cross_entropy(flat[at[i : i + chunk]].float(), target[i : i + chunk], reduction="none").double().cpu()
        for i in range(0, len(at), chunk)
    ]
    nll = np.bincount(row_of, weights=torch.cat(losses).numpy(), minlength=len(rows))
    return nll, answer.sum(axis=1)
