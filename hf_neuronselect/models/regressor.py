"""A text encoder with one number as its output, trained to predict what a row does to a model (MATES)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup

from ..core import progress
from ..core.errors import NeuronSelectError
from ..core.ranks import spearman
from ..core.sources import Source, hub_errors
from .batching import plan_batches

WINDOW, PIECES = 512, 4
"""Tokens of a piece of a text, and pieces read of a text at most: its first 2,048 tokens."""
RATE, BATCH, DECAY, DROPOUT = 5e-5, 32, 0.01, 0.1
SEED = 1234
_BATCH_TOKENS = 4096

Cut = tuple[tuple[int, ...], ...]
"""A text as the encoder reads it: token ids of its pieces."""


class Regressor(nn.Module):
    """Predicts a number from the mean of an encoder's last states over all tokens of a text.

    Args:
        encoder: a transformers model with ``last_hidden_state``. tokenizer: its fast tokenizer.
    """

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        config = encoder.config
        self.window = min(WINDOW, tokenizer.model_max_length, getattr(config, "max_position_embeddings", WINDOW))
        self.dropout = nn.Dropout(DROPOUT)
        self.head = nn.Linear(config.hidden_size, 1)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def load(cls, source: Source, option: str) -> Regressor:
        """An untrained one, always with the same head.

        Args:
            option: that names the encoder.

        Raises:
            NeuronSelectError: the encoder cannot be loaded, or lacks weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            try:
                with hub_errors(option, source.id):
                    more: dict[str, Any] = {"revision": source.revision, "trust_remote_code": False}
                    tokenizer = AutoTokenizer.from_pretrained(source.location, **more)
                    encoder, info = AutoModel.from_pretrained(
                        source.location, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **more
                    )
            except NeuronSelectError:
                raise
            except Exception as cause:  # transformers raises errors of many kinds
                reason = " ".join(str(cause).replace(source.location, source.id).split())[:240]
                raise NeuronSelectError(f"cannot be loaded: {reason}", option=option, value=source.id) from cause
            if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):  # it is not used
                raise NeuronSelectError(f"lacks {missing[0]}; name another encoder", option=option, value=source.id)
            if not tokenizer.is_fast or tokenizer.pad_token_id is None:
                raise NeuronSelectError(
                    "needs a fast tokenizer with a padding token; name another encoder", option=option, value=source.id
                )
            return cls(encoder, tokenizer)

    def cut(self, texts: Sequence[str]) -> list[Cut]:
        """Texts as pieces of at most one window each, without the rest of texts that are longer than all pieces."""
        encoded = self.tokenizer(
            list(texts), truncation=True, max_length=self.window, return_overflowing_tokens=True, verbose=False
        )
        pieces: list[list[tuple[int, ...]]] = [[] for _ in texts]
        for row, ids in zip(encoded["overflow_to_sample_mapping"], encoded["input_ids"], strict=True):
            if len(pieces[row]) < PIECES:
                pieces[row].append(tuple(ids))
        return [tuple(one) for one in pieces]

    def forward(self, texts: Sequence[Cut]) -> torch.Tensor:
        """One number a text, float32 ``[n]``."""
        device = self.head.weight.device
        pieces = [piece for text in texts for piece in text]
        width = max(map(len, pieces))
        ids = torch.full((len(pieces), width), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, piece in enumerate(pieces):
            ids[i, : len(piece)] = torch.tensor(piece)
            mask[i, : len(piece)] = 1
        ids, mask = ids.to(device), mask.to(device)
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[:, :, None]
        of_text = torch.tensor([i for i, text in enumerate(texts) for _ in text], device=device)
        sums = torch.zeros(len(texts), states.shape[-1], device=device).index_add(0, of_text, states.sum(dim=1))
        counts = torch.zeros(len(texts), device=device).index_add(0, of_text, mask.sum(dim=1).float())
        return self.head(self.dropout(sums / counts[:, None]))[:, 0]

    @torch.no_grad()
    def predict(self, texts: Sequence[Cut]) -> np.ndarray:
        """One number a text, float64 ``[n]``."""
        self.eval()
        found = np.zeros(len(texts))
        for rows in plan_batches([sum(map(len, text)) for text in texts], _BATCH_TOKENS):
            found[rows] = self([texts[i] for i in rows]).double().cpu().numpy()
            progress.advance(sum(len(piece) for i in rows for piece in texts[i]))
        return found

    def learn(self, texts: Sequence[Cut], values: np.ndarray, *, epochs: int) -> float:
        """Train on nine tenths of the texts: squared error of z-scores, AdamW, a rate that falls to 0.

        The state after the epoch with the best rank correlation on the other tenth is kept, the last of equal ones.

        Args:
            values: float64 ``[n]``; predicted are their z-scores, by mean and deviation of the nine tenths.

        Returns:
            That correlation (Spearman).
        """
        order = np.random.default_rng(SEED).permutation(len(texts))
        held, used = np.split(order, [max(1, len(order) // 10)])
        scores = (values - values[used].mean()) / (values[used].std() or 1.0)
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=DECAY)
        steps = epochs * -(-len(used) // BATCH)
        schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
        best, kept = -2.0, {name: value.clone() for name, value in self.state_dict().items()}
        devices = [self.head.weight.device] if self.head.weight.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            progress.track("regressor", steps, unit="steps", brief=True) as done,
        ):
            torch.manual_seed(SEED)
            for epoch in range(epochs):
                for rows in _batches(used, epoch):
                    self._step([texts[i] for i in rows], scores[rows], optimizer)
                    schedule.step()
                    done.done(1)
                with progress.untracked():
                    found = spearman(self.predict([texts[i] for i in held]), values[held])
                if found >= best:
                    best, kept = found, {name: value.clone() for name, value in self.state_dict().items()}
        self.load_state_dict(kept)
        return best

    def _step(self, texts: Sequence[Cut], values: np.ndarray, optimizer: torch.optim.Optimizer) -> None:
        """One step on a batch, whose texts run by and by: its memory is that of a few texts."""
        self.train()
        optimizer.zero_grad()
        for rows in plan_batches([sum(map(len, text)) for text in texts], _BATCH_TOKENS):
            wanted = torch.tensor(values[rows], dtype=torch.float32, device=self.head.weight.device)
            loss = ((self([texts[i] for i in rows]) - wanted) ** 2).sum() / len(texts)
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        optimizer.step()

    # ------------------------------------------------------------------------------------- on disk
    def save(self, path: Path, correlation: float) -> None:
        """Write the weights, and what :meth:`learn` returned: all at once or not at all."""
        part = path.with_name(f".{path.name}.part")
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, part, metadata={"spearman": repr(correlation)})
        part.replace(path)

    def restore(self, path: Path) -> float:
        """Read what :meth:`save` has written; returns the correlation."""
        self.load_state_dict(load_file(path))
        with safe_open(path, "pt") as file:
            return float(file.metadata()["spearman"])


def _batches(rows: np.ndarray, epoch: int) -> Iterator[np.ndarray]:
    order = np.random.default_rng([SEED, epoch]).permutation(rows)
    return iter(np.split(order, range(BATCH, len(order), BATCH)))
