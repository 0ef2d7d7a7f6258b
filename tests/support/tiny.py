"""Small real things that tests make: a tiny SAE, extractors of the tiny model, rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file

from hf_neuronselect import NeuronFeatureExtractor

LATENTS, K = 96, 6
ALL = ("mona", "nait", "polysemantic", "hidden")
SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
GOLDENS = json.loads((SUPPORT / "goldens.json").read_text(encoding="utf-8"))


def write_sae(folder: Path, width: int, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(LATENTS, width, generator=generator) / width**0.5
    folder.mkdir(parents=True)
    tensors = {
        "encoder.weight": weight,
        "encoder.bias": 0.1 * torch.randn(LATENTS, generator=generator),
        "W_dec": weight.clone(),
        "b_dec": 0.1 * torch.randn(width, generator=generator),
    }
    save_file(tensors, folder / "sae.safetensors")
    config = {"activation": "topk", "k": K, "num_latents": LATENTS, "d_in": width, "expansion_factor": 3}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def make_extractor(folder: Path, **options: object) -> NeuronFeatureExtractor:
    options = {"features": ALL, "sae": str(folder / "sae"), "value_dtype": "float32"} | options
    return NeuronFeatureExtractor.from_pretrained(str(folder / "model"), **options)


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows(n: int, seed: int = 0) -> Dataset:
    """Random rows of different lengths; no two are the same."""
    draw = np.random.default_rng(seed)
    words = ["add", "two", "numbers", "print", "list", "def", "why", "is", "the", "sky", "blue", "7", "+", "5"]

    def text(most: int) -> str:
        return " ".join(draw.choice(words, size=draw.integers(1, most)))

    return Dataset.from_list(
        [{"messages": chat(f"{text(12)} #{seed}.{i}?", text(20)), "source": f"s{i % 3}", "id": i} for i in range(n)]
    )
