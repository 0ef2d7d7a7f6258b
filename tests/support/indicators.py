"""Tiny stand-ins for a reward model and for UniEval."""

from __future__ import annotations

from pathlib import Path

import torch
from families import tiny_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration

SMALL = {
    "vocab_size": 128,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def write_reward(folder: Path, seed: int = 0) -> Path:
    """A sequence classifier with one output; its tokenizer joins two texts."""
    torch.manual_seed(seed)
    config = LlamaConfig(**SMALL, num_labels=1, pad_token_id=0, initializer_range=0.3)
    return _save(LlamaForSequenceClassification(config), folder)


def write_unieval(folder: Path, seed: int = 0) -> Path:
    """An encoder-decoder that says one of its 128 tokens first."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=128, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, initializer_factor=3.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return _save(T5ForConditionalGeneration(config), folder)


def _save(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder
