"""What a causal LM would say next: the logits of some tokens behind a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core import progress
from ..core.errors import NeuronSelectError
from .batching import plan_batches
from .loss import evaluating

GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}  # fmt: skip
"""What ``generate`` is told so that it takes the likeliest token, whatever the model's generation_config.json says."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text with one or more endings, each of which asks something of it.

    Attributes:
        shared: int64 ``[n]``, the tokens all of its prompts begin with. endings: tokens of each ending; one may be empty.
    """

    shared: np.ndarray
    endings: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        """Tokens that a model runs over."""
        return len(self.shared) + sum(map(len, self.endings))

    @property
    def wholes(self) -> list[np.ndarray]:
        """Each prompt from its beginning."""
        return [np.concatenate([self.shared, ending]) for ending in self.endings]


def next_logits(model: Any, prompts: Sequence[Prompt], words: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """The logits of some tokens behind every prompt.

    A text with several endings runs once; its keys and values are shared by the endings.

    Args:
        words: int64 ``[k]``, ids of the tokens. batch_tokens: padded tokens a batch; changes memory, not the result.

    Returns:
        For each prompt float64 ``[endings, k]``.
    """
    found = [np.zeros((len(prompt.endings), len(words))) for prompt in prompts]
    several = [i for i, prompt in enumerate(prompts) if len(prompt.endings) > 1]
    single = [(i, 0) for i, prompt in enumerate(prompts) if len(prompt.endings) == 1]
    with evaluating(model):
        for group in _of_one_length([len(prompts[i].shared) for i in several], batch_tokens):
            rows = [several[j] for j in group]
            shared = _shared(model, [prompts[i] for i in rows], words)
            if shared is None:  # a model whose memory cannot be shared reads each prompt from its beginning
                single += [(i, j) for i in rows for j in range(len(prompts[i].endings))]
                continue
            for i, one in zip(rows, shared, strict=True):
                found[i] = one
            progress.advance(sum(prompts[i].tokens for i in rows))
        wholes = [prompts[i].wholes[j] for i, j in single]
        for batch in plan_batches([len(ids) for ids in wholes], batch_tokens):
            logits = _last(model, [wholes[k] for k in batch], words)
            for k, one in zip(batch, logits, strict=True):
                i, j = single[k]
                found[i][j] = one
            progress.advance(sum(len(wholes[k]) for k in batch))
    return found


def _of_one_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows of exactly one length together, the longest first: what is behind them begins at one position."""
    of_length: dict[int, list[int]] = {}
    for row in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        of_length.setdefault(lengths[row], []).append(row)
    batches = []
    for length, rows in of_length.items():
        size = max(1, batch_tokens // max(1, length))
        batches += [rows[start : start + size] for start in range(0, len(rows), size)]
    return batches


def _shared(model: Any, prompts: Sequence[Prompt], words: np.ndarray) -> list[np.ndarray] | None:
    """Logits ``[endings, k]`` of texts of one length with equal endings; None if the model's memory cannot be repeated."""
    device = next(model.parameters()).device
    endings = prompts[0].endings
    ids = torch.from_numpy(np.stack([prompt.shared for prompt in prompts])).to(device)
    out = model(input_ids=ids, use_cache=True, **_keeping(model, torch.tensor([ids.shape[1] - 1], device=device)))
    name = memory_name(model)
    memory = out.get(name)
    if not hasattr(memory, "batch_repeat_interleave"):
        return None
    memory.batch_repeat_interleave(len(endings))
    behind, last = _padded(endings)
    behind = behind.repeat(len(prompts), 1).to(device)
    last = last.repeat(len(prompts)).to(device)
    logits = _picked(model, {"input_ids": behind, name: memory, "use_cache": True}, last, words)
    return list(logits.reshape(len(prompts), len(endings), len(words)))


def _last(model: Any, wholes: Sequence[np.ndarray], words: np.ndarray) -> np.ndarray:
    """Logits ``[n, k]`` behind each sequence."""
    ids, last = _padded(wholes)
    device = next(model.parameters()).device
    return _picked(model, {"input_ids": ids.to(device), "use_cache": False}, last.to(device), words)


def _padded(rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids padded on the right (no token attends to tokens on its right), and each row's last position."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return torch.from_numpy(ids), torch.tensor([len(row) - 1 for row in rows])


def _picked(model: Any, given: dict[str, Any], last: torch.Tensor, words: np.ndarray) -> np.ndarray:
    """Logits of the words at one position of each row, float64."""
    kept, at = torch.unique(last, return_inverse=True)
    keeping = _keeping(model, kept)
    logits = model(**given, **keeping).logits
    at = (at if keeping else last).to(logits.device)
    rows = torch.arange(len(last), device=logits.device)
    return logits[rows, at][:, torch.from_numpy(words).to(logits.device)].double().cpu().numpy()


def _keeping(model: Any, positions: torch.Tensor) -> dict[str, Any]:
    """Ask for the logits of some positions alone, where the model can."""
    return {"logits_to_keep": positions} if "logits_to_keep" in _arguments(model) else {}


def memory_name(model: Any) -> str:
    """What the model's keys and values are called among its arguments: ``cache`` in transformers since 5.24."""
    return "cache" if "cache" in _arguments(model) else "past_key_values"


def _arguments(model: Any) -> Mapping[str, Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base.forward).parameters


def word_ids(tokenizer: Any, words: Sequence[str], behind: str, *, option: str, value: str) -> np.ndarray:
    """The id of each word as the one token that follows a text: int64 ``[k]``.

    Raises:
        NeuronSelectError: a word is no single token of the tokenizer.
    """
    before = tokenizer(behind, add_special_tokens=False)["input_ids"]
    found, missing = [], []
    for word in words:
        ids = tokenizer(behind + word, add_special_tokens=False)["input_ids"]
        alone = tokenizer(word, add_special_tokens=False)["input_ids"]
        if ids[:-1] == before and len(ids) == len(before) + 1:
            found.append(ids[-1])
        elif len(alone) == 1 and tokenizer.decode(alone).strip() == word:
            found.append(alone[0])
        else:
            missing.append(word)
    if not missing and (unknown := tokenizer.unk_token_id) is not None and unknown in found:
        missing = [word for word, number in zip(words, found, strict=True) if number == unknown]
    if missing:
        raise NeuronSelectError(
            f"its tokenizer has no single token for {', '.join(missing)}, which rate a row: name another model",
            option=option, value=value,
        )  # fmt: skip
    return np.asarray(found, dtype=np.int64)
