"""Models that give a text one number: rewards of answers, and encoder-decoders that answer yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from ..core import progress
from ..core.errors import NeuronSelectError
from ..core.sources import Source, hub_errors
from .batching import plan_batches
from .dtypes import DTYPES
from .loading import on_forget

Kind = Literal["reward", "unieval"]
_CLASSES: dict[str, Any] = {"reward": AutoModelForSequenceClassification, "unieval": AutoModelForSeq2SeqLM}
_PROMPTER, _ASSISTANT = "<|prompter|>", "<|assistant|>"


@lru_cache(maxsize=2)
def tokenizer_for(source: Source, kind: Kind) -> Any:
    """The tokenizer of a model.

    Raises:
        NeuronSelectError: it cannot be read.
    """
    return _load(AutoTokenizer, source, kind)


@lru_cache(maxsize=2)
def model_for(source: Source, kind: Kind, device: torch.device, dtype: str) -> Any:
    """A model with all its weights, in eval mode.

    Raises:
        NeuronSelectError: it cannot be loaded, or is of another kind.
    """
    model, info = _load(
        _CLASSES[kind], source, kind, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):  # they would be random
        raise NeuronSelectError(f"lacks {missing[0]}: it is no {kind} model", option=kind, value=source.id)
    if kind == "reward" and model.config.num_labels != 1:
        raise NeuronSelectError(
            f"gives {model.config.num_labels} numbers a text, a reward model one: name another", option=kind,
            value=source.id,
        )  # fmt: skip
    return model.to(device).eval().requires_grad_(False)


def _load(kind_of: Any, source: Source, option: str, **more: Any) -> Any:
    try:
        with hub_errors(option, source.id):
            return kind_of.from_pretrained(source.location, revision=source.revision, trust_remote_code=False, **more)
    except NeuronSelectError:
        raise
    except Exception as cause:  # transformers raises errors of many kinds
        reason = " ".join(str(cause).replace(source.location, source.id).split())[:240]
        raise NeuronSelectError(f"cannot be loaded: {reason}", option=option, value=source.id) from cause


def reward_ids(tokenizer: Any, question: str, answer: str, most: int) -> list[int]:
    """Tokens of a question with its answer, in the form of the reward model: its chat template, or two texts."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False, truncation=True, max_length=most)["input_ids"])
    if {_PROMPTER, _ASSISTANT} <= tokenizer.get_vocab().keys():
        end = tokenizer.eos_token
        text = f"{_PROMPTER}{question}{end}{_ASSISTANT}{answer}{end}"
        return list(tokenizer(text, truncation=True, max_length=most)["input_ids"])
    return list(tokenizer(question, answer, truncation=True, max_length=most)["input_ids"])


def rewards(model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], batch_tokens: int) -> np.ndarray:
    """The one logit of each sequence: float64 ``[n]``."""
    pad = model.config.get_text_config().pad_token_id
    pad = tokenizer.pad_token_id if pad is None else pad
    if pad is None:  # such a model cannot tell where a padded row ends
        batch_tokens = 1
    found = np.zeros(len(ids))
    for rows, given in _batches(model, ids, pad or 0, batch_tokens):
        found[rows] = model(**given).logits[:, 0].double().cpu().numpy()
    return found


def yes_shares(model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], batch_tokens: int) -> np.ndarray:
    """``P(Yes) / (P(Yes) + P(No))`` of the first token that an encoder-decoder says: float64 ``[n]``."""
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")]
    found = np.zeros(len(ids))
    start = model.config.decoder_start_token_id
    for rows, given in _batches(model, ids, tokenizer.pad_token_id or 0, batch_tokens):
        first = torch.full((len(rows), 1), start, dtype=torch.int64, device=given["input_ids"].device)
        logits = model(**given, decoder_input_ids=first).logits[:, 0].double().cpu()
        found[rows] = torch.softmax(logits[:, words], dim=1)[:, 0].numpy()
    return found


def _batches(model: Any, ids: Sequence[Sequence[int]], pad: int, batch_tokens: int) -> Any:
    """Rows and their padded tokens with a mask, since an encoder attends to both sides."""
    device = next(model.parameters()).device
    with torch.no_grad():
        for rows in plan_batches([len(row) for row in ids], batch_tokens):
            width = max(len(ids[i]) for i in rows)
            tokens = torch.full((len(rows), width), pad, dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            for j, i in enumerate(rows):
                tokens[j, : len(ids[i])] = torch.tensor(ids[i])
                mask[j, : len(ids[i])] = 1
            yield rows, {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
            progress.advance(int(mask.sum()))


on_forget(model_for.cache_clear)
