"""Tiny text encoders: a random BERT in the format of sentence-transformers, and an adapter as MNTP trains one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, BertConfig, BertModel, PreTrainedTokenizerFast

from hf_neuronselect.models.loading import quiet_peft

WINDOW = 16
WIDTH = 24


def write_encoder(
    folder: Path, *, seed: int = 0, window: int = WINDOW, normalised: bool = True, default_prompt: str = ""
) -> Path:
    """Save an encoder that reads ``window`` tokens: words are single letters' pieces, so every text has tokens."""
    torch.manual_seed(seed)
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "apple", *letters, *(f"##{letter}" for letter in letters)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"} | ({"2_Normalize": "Normalize"} if normalised else {})
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": window, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True},
        "config_sentence_transformers.json": {
            "prompts": {"own": default_prompt}, "default_prompt_name": "own" if default_prompt else None,
        },
    }  # fmt: skip
    for path in kinds:
        (folder / path).mkdir(exist_ok=True)
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return folder


def write_mntp(folder: Path, model: Path, seed: int = 3) -> Path:
    """Save a LoRA adapter of a causal LM with random weights."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with quiet_peft():
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder
