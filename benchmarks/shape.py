"""MoNA extraction and its floor at the block shape of Llama 3.1 8B: random weights, real row lengths, K = 192.

Width 4,096, MLP 14,336, 32 heads with 8 key-value heads, an SAE of 131,072 latents. A CPU runs only a few blocks, which
are compared with the floor of the same blocks. For the real 31 blocks the floor's prefix is scaled up, and the time above
the floor stays the same, since it does not grow with the number of blocks.

    python benchmarks/shape.py --pool hf_neuronselect/assets/demo/pool.parquet --blocks 4 --out benchmarks/shape_8b.json
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from statistics import median

import torch
from common import (
    RATIO,
    alternate,
    count,
    described,
    machine,
    plain_logging,
    ratio,
    read_pool,
    spread,
    tokenize,
    write_json,
)
from extraction import PREFIX, Floor
from scale import SHAPES
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_neuronselect import NeuronFeatureExtractor
from hf_neuronselect.core import bundled
from hf_neuronselect.models.sae import Site, SparseAutoencoder, top_k
from hf_neuronselect.rows.encode import Sample
from hf_neuronselect.rows.formats import Conversation

logger = logging.getLogger("shape")

SHAPE, REAL_BLOCKS, K = SHAPES["8B"], 31, 192
BUDGETS, CHUNKS = (512,), (512, 1024)


def random_model(blocks: int, vocabulary: int, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=SHAPE.d, intermediate_size=SHAPE.mlp, num_hidden_layers=blocks, vocab_size=vocabulary,
        num_attention_heads=SHAPE.d // 128, num_key_value_heads=SHAPE.kv // 128, max_position_embeddings=4096,
        tie_word_embeddings=True,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a float32 copy of all blocks would not fit into memory as well
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def random_sae(layer: int, dtype: torch.dtype, device: str) -> SparseAutoencoder:
    weight = torch.randn(SHAPE.latents, SHAPE.d) / SHAPE.d**0.5
    made = SparseAutoencoder(weight, torch.zeros(SHAPE.latents), Site(f"layers.{layer}"), "topk", k=K)
    return made.to(device, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=Path, required=True, help=".jsonl.gz or .parquet, for real token lengths")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the model; the SAE reads the last one")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plain_logging(logger)
    torch.manual_seed(0)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    sae = random_sae(args.blocks - 1, dtype, args.device)
    model = random_model(args.blocks, len(tokenizer), dtype, args.device)
    extractor = NeuronFeatureExtractor.from_model(model, tokenizer, sae=sae, layer=args.blocks - 1)
    backbone, _ = extractor.forward.loaded(extractor.signals)
    rows, samples = read_pool(args.pool, 200), list[Sample]()
    kept: list[Conversation] = []
    for row, sample in zip(rows, tokenize(extractor, rows), strict=True):
        if not sample.skip and count([*samples, sample]) <= args.tokens:
            samples.append(sample)
            kept.append(row)
    prepared = extractor.prepare(kept)
    settings = {"blocks": args.blocks, "rows": len(samples), "tokens": count(samples), "k": K, "latents": SHAPE.latents,
                "dtype": args.dtype, "budget": extractor.forward.token_budget(backbone), "repeats": args.repeats}  # fmt: skip
    about = machine(device)
    logger.info("%s", described(about, settings))
    floor = Floor(backbone, args.blocks, sae, samples, BUDGETS)
    runs = {
        "ours": partial(extractor.compute, prepared),
        "ours, mona+nait+hidden": partial(extractor.with_features(["mona", "nait", "hidden"]).compute, prepared),
        "ours, nait": partial(extractor.with_features(["nait"]).compute, prepared),
        "top-k alone": partial(floor.top_k, top_k, K),
    }
    runs |= {f"{PREFIX}, budget {b}": partial(floor.run, b, PREFIX) for b in BUDGETS}
    runs |= {f"encoder product alone, chunk {c}": partial(floor.product, c) for c in CHUNKS}
    timed = alternate(runs, args.repeats, device, logger)

    def best(prefix: str) -> list[float]:
        return min((times for name, times in timed.items() if name.startswith(prefix)), key=median)

    prefix, product, ours = best(PREFIX), best("encoder product"), timed["ours"]
    floors = [a + b for a, b in zip(prefix, product, strict=True)]
    real = [a * REAL_BLOCKS / args.blocks + b for a, b in zip(prefix, product, strict=True)]
    over = [a - b for a, b in zip(ours, floors, strict=True)]
    headline = {
        "time of ours / floor": ratio(ours, floors),
        f"the same at {REAL_BLOCKS} blocks, scaled": ratio([a + b for a, b in zip(real, over, strict=True)], real),
        "time of ours, nait / the bare blocks": ratio(timed["ours, nait"], prefix),
        "time of ours, mona+nait+hidden / mona": ratio(timed["ours, mona+nait+hidden"], ours),
        "top-k's share of ours": ratio(timed["top-k alone"], ours),
    }
    for name, found in headline.items():
        logger.info("%s: %s", name, RATIO.format(**found))
    if args.out is not None:
        rates = {name: spread([settings["tokens"] / t for t in times]) for name, times in timed.items()}
        write_json(args.out, {"machine": about, "settings": settings, "seconds": timed, "tokens_per_s": rates,
                              "ratios": headline})  # fmt: skip


if __name__ == "__main__":
    main()
