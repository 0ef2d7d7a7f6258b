"""Estimate the cost of 1 M, 10 M and 100 M rows with models of 1B, 8B and 70B: bytes, GPU-hours, dollars.

Measured here: the time of one decoder block and of the SAE encoder's product at each model's exact shape (random
weights, real row lengths), the speed of a matrix product of that width on the same machine, the tokens and distinct
latents of the pool's rows, and the bytes of a stored row. Counted: the operations of every method, following its paper.
Assumed, and stated on the page: the sustained speed of a GPU, and its price. Nothing was run on a GPU.

    python benchmarks/scale.py --pool hf_neuronselect/assets/demo/pool.parquet --store STORE
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from common import described, machine, plain_logging, read_pool, tokenize, write_json
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from hf_neuronselect.core import bundled as paths
from hf_neuronselect.models.batching import plan_batches
from hf_neuronselect.models.sae_formats import load_sae
from hf_neuronselect.pipelines import bundled
from hf_neuronselect.store.shards import Stamp, encode_shard

logger = logging.getLogger("scale")

ROWS = (10**6, 10**7, 10**8)
K = 192
BLOCK_TOKENS = {"1B": 4096, "8B": 2048, "70B": 768}
REPEATS = 5
CHECKPOINTS, WARMUP_SHARE, LORA_RANK, PROJECTED = 4, 0.05, 128, 8192  # LESS, arXiv 2402.04333
SKETCH_BYTES, ADAM_BYTES, BANDWIDTH = 16, 12, 2e12  # moved for a coordinate: gradient, bucket, sign; moments and step
RATING_PROMPTS, RATING_TOKENS = 5, 120  # SelectIT, arXiv 2402.16705; the tokens of a rating prompt are our count


@dataclass(frozen=True)
class Shape:
    """A Llama 3 model: widths of the residual stream, of keys and values and of the MLP, blocks, SAE latents."""

    d: int
    kv: int
    mlp: int
    blocks: int
    latents: int

    @property
    def attention(self) -> int:
        """Weights of q, k, v, o."""
        return 2 * self.d * (self.d + self.kv)

    @property
    def block(self) -> int:
        return self.attention + 3 * self.d * self.mlp

    @property
    def lora(self) -> int:
        """Trained weights of LESS: rank 128 on q, k, v, o."""
        return LORA_RANK * self.blocks * (2 * (self.d + self.d) + 2 * (self.d + self.kv))


SHAPES = {
    "1B": Shape(2048, 512, 8192, 16, 65_536),
    "8B": Shape(4096, 1024, 14_336, 32, 131_072),
    "70B": Shape(8192, 1024, 28_672, 80, 262_144),
}


# --------------------------------------------------------------------------------------- measured
def timed(run: Callable[[], object]) -> float:
    """Median seconds, after one warm-up run."""
    run()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return median(times)


@torch.inference_mode()
def measure(shape: Shape, lengths: Sequence[int]) -> dict[str, float]:
    """Measure tokens/s of one block and of the SAE's product, and the flop/s of both and of a bare matrix product."""
    config = LlamaConfig(
        hidden_size=shape.d, intermediate_size=shape.mlp, num_hidden_layers=1, vocab_size=64,
        num_attention_heads=shape.d // 128, num_key_value_heads=shape.kv // 128, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaModel(config)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.uniform_(-0.02, 0.02)
    model.norm, model.rotary_emb = torch.nn.Identity(), type(model.rotary_emb)(config)
    rows = [np.arange(n) % 64 for n in lengths]
    batches = []
    for plan in plan_batches(lengths, 1024):
        ids = np.zeros((len(plan), max(lengths[i] for i in plan)), dtype=np.int64)
        for place, i in enumerate(plan):
            ids[place, : lengths[i]] = rows[i]
        batches.append(torch.from_numpy(ids))
    tokens = sum(lengths)
    block = timed(lambda: [model(input_ids=ids, use_cache=False) for ids in batches])
    hidden = torch.rand(1024, shape.d)
    weight = model.layers[0].mlp.gate_proj.weight
    product = timed(lambda: F.linear(hidden, weight))
    encoder = torch.rand(16_384, shape.d)  # only some of the latents: all of them would take 8.6 GB at 70B
    encode = timed(lambda: F.linear(hidden, encoder)) * shape.latents / len(encoder)
    return {
        "block_tokens_per_s": tokens / block,
        "encoder_tokens_per_s": len(hidden) / encode,
        "block_flops": 2 * shape.block * tokens / block,
        "product_flops": 2 * weight.numel() * len(hidden) / product,
    }


def first_shard(store: Path, signal: str) -> Path:
    return min(store.glob(f"{signal}-*/shard-*.parquet"))


def stored_bytes(store: Path, signal: str) -> float:
    """Bytes a row of a signal takes in a feature store's first shard."""
    meta = pq.read_metadata(first_shard(store, signal))
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    size = sum(
        group.column(i).total_compressed_size
        for group in groups for i in range(group.num_columns) if group.column(i).path_in_schema != "skip"
    )  # fmt: skip
    return size / meta.num_rows


def distinct_latents(store: Path) -> dict[str, float]:
    """Of the pool's rows in the bundled SAE: tokens, distinct latents, bytes of a stored nonzero."""
    latents = pq.read_table(first_shard(store, "mona"), columns=["mona_indices"])["mona_indices"]
    counts = pc.list_value_length(latents).to_numpy()
    n_tokens = pq.read_table(first_shard(store, "tokens"), columns=["n_tokens"])["n_tokens"]
    bytes_row = stored_bytes(store, "mona")
    return {
        "tokens": float(np.mean(n_tokens.to_numpy())), "nonzeros": float(counts.mean()),
        "bytes_a_nonzero": bytes_row / counts.mean(),
    }  # fmt: skip


def drift_ratio() -> float:
    """Compressed over raw bytes of NAIT drifts (bundled model, 256 demo rows)."""
    drifts = np.stack(bundled.extractor(features=("nait",))(bundled.pool()[:256])["nait"])
    table = pa.table({"nait": pa.array(list(drifts.reshape(len(drifts), -1)), type=pa.list_(pa.float32()))})
    return len(encode_shard(table, Stamp("nait", "", 0, 0, len(table), "", len(table)))) / drifts.nbytes


# ---------------------------------------------------------------------------------------- counted
def attention_flops(shape: Shape, length: float) -> float:
    """Operations of one token in one block: scores and weighted sum over, on average, half of the row."""
    return 2 * 2 * shape.d * length / 2


def flops_a_row(shape: Shape, tokens: float, length: float) -> dict[str, float]:
    """Operations of one row by each method; ``length``: the token-weighted mean length, for attention."""

    def forward(blocks: float, n: float = tokens, seen: float = length) -> float:
        return n * blocks * (2 * shape.block + attention_flops(shape, seen))

    whole = forward(shape.blocks)
    # The backward pass of a frozen weight is one product (the input's gradient), not two; LoRA's own are small.
    trained = 2 * whole + 3 * 2 * shape.lora * tokens
    rated = tokens + RATING_TOKENS
    less = WARMUP_SHARE * 4 * trained + CHECKPOINTS * trained
    return {
        "mona": forward(shape.blocks - 1) + tokens * 2 * shape.d * shape.latents,
        "nait": whole,
        "RDS+": whole,
        "LESS": less + CHECKPOINTS * 14 * shape.lora,
        "LESS, dense projection": less + CHECKPOINTS * 2 * shape.lora * PROJECTED,
        "GIST": WARMUP_SHARE * trained + trained + 4 * shape.lora,
        "SelectIT": RATING_PROMPTS * forward(shape.blocks, rated, length + RATING_TOKENS),
    }  # fmt: skip


def moving_seconds(shape: Shape) -> dict[str, float]:
    """Seconds a row that a GPU spends on memory for the sketch, which computes next to nothing."""
    return {
        "LESS": CHECKPOINTS * shape.lora * (SKETCH_BYTES + ADAM_BYTES) / BANDWIDTH,
        "GIST": shape.lora * SKETCH_BYTES / BANDWIDTH,
    }


def bytes_a_row(shape: Shape, found: dict[str, float], drift: float) -> dict[str, float]:
    """Bytes each method stores of a row to score any later target."""
    # Distinct latents grow more slowly than tokens times K; assume the share of n * k seen in the bundled SAE.
    share = found["nonzeros"] / (found["tokens"] * load_sae(paths.SAE, layer=3).k)
    nonzeros = min(share * found["tokens"] * K, shape.latents)
    return {
        "mona": nonzeros * found["bytes_a_nonzero"],
        "nait": 4 * shape.blocks * shape.d * drift,
        "nait, one capability": 4.0 * shape.blocks,
        "RDS+": 4.0 * shape.d,
        "LESS": (2.0 * PROJECTED + 4) * CHECKPOINTS,
        "LESS, dense projection": (2.0 * PROJECTED + 4) * CHECKPOINTS,
        "GIST": 2.0 * PROJECTED + 4,
        "SelectIT": 4.0,
    }


# ------------------------------------------------------------------------------------------- page
def human(size: float, units: Sequence[str], step: float = 1000.0) -> str:
    for unit in units[:-1]:
        if size < step:
            return f"{size:,.3g} {unit}".rstrip()
        size /= step
    return f"{size:,.3g} {units[-1]}"


def page(result: dict[str, Any]) -> str:
    measured, assumed, found = result["measured"], result["assumed"], result["rows"]
    rate, price, over = assumed["sustained_flops"], assumed["dollars_an_hour"], assumed["over_floor"]
    lines = [
        "# Estimated cost at scale",
        "",
        "Written by `benchmarks/scale.py`; all numbers are from `benchmarks/scale.json`. **Nothing here was run on a GPU.**",
        "",
        f"- *Measured* on 2 threads of {result['machine']['cpu']} (float32), at each model's exact shape with random "
        "weights and real row lengths:",
        "",
        "| model | one block, tokens/s | share of a bare product's flop/s | SAE product, tokens/s | floor of mona, tokens/s | 1 M rows on this machine, days |",
        "|---|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for name, rates in measured.items():
        floor = 1 / ((SHAPES[name].blocks - 1) / rates["block_tokens_per_s"] + 1 / rates["encoder_tokens_per_s"])
        days = 1e6 * found["tokens"] / floor * over["mona"] / 86400
        lines.append(
            f"| {name} | {rates['block_tokens_per_s']:,.0f} | {rates['block_flops'] / rates['product_flops']:.2f} | "
            f"{rates['encoder_tokens_per_s']:,.0f} | {floor:,.2f} | {days:,.0f} |"
        )
    lines += [
        "",
        f"- *Measured* on rows of the bundled demo pool: {found['tokens']:.0f} tokens per row ({found['length']:.0f} weighted by tokens), "
        f"{found['nonzeros']:.0f} distinct latents per row in the bundled SAE, {found['bytes_a_nonzero']:.2f} bytes per stored "
        f"nonzero; NAIT drifts compress to {result['drift_ratio']:.2f} of their float32 bytes. MoNA's nonzeros at K = {K} "
        "are estimated from the share of distinct latents in the bundled SAE.",
        "- *Counted*: operations of each method, following its paper, 2 per weight and token. LESS: a warm-up on 5 % for 4 epochs, then "
        f"one forward and backward pass per row at each of 4 checkpoints, and a CountSketch of the LoRA gradient to 8,192, which moves "
        f"{SKETCH_BYTES + ADAM_BYTES} bytes a coordinate with Adam's step and {SKETCH_BYTES} without; or the paper's dense projection, if it is not a sketch. GIST: one "
        "epoch, one checkpoint, no Adam. The warm-up is counted by row of the pool. SelectIT: 5 "
        f"rating prompts per row, {RATING_TOKENS} tokens each, one model (the paper uses several). RDS+ and NAIT: one forward pass.",
        f"- *Assumed*: a GPU sustains {rate / 1e12:,.0f} TFLOP/s in bf16 ({assumed['reason']}) and moves {BANDWIDTH / 1e12:.0f} TB/s, costs ${price:.2f} an hour, and extraction "
        f"takes {over['mona']:.2f} (mona) and {over['nait']:.2f} (nait) times its floor ({assumed['over_floor_reason']}). For your own figures: "
        "`python benchmarks/scale.py --flops 5e14 --dollars 2`.",
        "",
    ]  # fmt: skip
    for name in SHAPES:
        lines += [
            f"## {name}", "",
            "| method | flop per row | GPU-hours: 1 M | 10 M | 100 M rows | dollars: 1 M | 10 M | 100 M rows | stored per row | 1 M | 10 M | 100 M rows |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]  # fmt: skip
        kept = result["bytes_a_row"][name]
        for method, flops in result["flops_a_row"][name].items():
            each = flops * over.get(method, 1.0) / rate + moving_seconds(SHAPES[name]).get(method, 0.0)
            hours = [each * rows / 3600 for rows in ROWS]
            cells = [human(flops, ("flop", "kflop", "Mflop", "Gflop", "Tflop", "Pflop"))]
            cells += [f"{h:,.0f}" if h >= 100 else f"{h:.3g}" for h in hours] + [f"{h * price:,.0f}" for h in hours]
            cells += _sizes(kept[method])
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append(f"| nait, `extract --capability` |{' |' * 7} {' | '.join(_sizes(kept['nait, one capability']))} |")
        lines.append("")
    lines += _peers_lines(result)
    return "\n".join(lines) + "\n"


def _sizes(each: float) -> list[str]:
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    return [human(each, units)] + [human(each * rows, units) for rows in ROWS]


def _peers_lines(result: dict[str, Any]) -> list[str]:
    ours, less = result["flops_a_row"]["8B"]["mona"], result["flops_a_row"]["8B"]["LESS"]
    return [
        f"LESS needs {less / ours:.1f} times MoNA's operations at 8B, whatever the quality of either implementation, and "
        f"{result['flops_a_row']['8B']['LESS, dense projection'] / ours:.1f} times with a dense projection; "
        "`benchmarks/peers.json` has both timed on the bundled model. For a new target LESS needs the gradients of its "
        "exemplars, the other methods a forward pass over them; scoring stored rows is one sweep (`benchmarks/scoring.json`).",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", type=Path, help=".jsonl.gz or .parquet, for real row lengths")
    parser.add_argument("--store", type=Path, help="a feature store of that pool with mona")
    parser.add_argument("--flops", type=float, default=4e14, help="sustained flop/s of a GPU")
    parser.add_argument("--dollars", type=float, default=3.0, help="price of a GPU-hour")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--page", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    plain_logging(logger)
    if args.store is not None and args.pool is not None:
        result = measured_result(args.pool, args.store)
    else:
        result = json.loads(args.out.read_text())
        result |= counted(result["rows"], result["drift_ratio"])
    extraction = json.loads((Path(__file__).parent / "extraction_float32.json").read_text())
    result["assumed"] = {
        "sustained_flops": args.flops,
        "reason": "40 % of an H100's dense peak" if args.flops == 4e14 else "from --flops",
        "dollars_an_hour": args.dollars,
        "over_floor": {
            method: next(found["median"] for name, found in extraction["ratios"].items() if mark in name)
            for method, mark in (("mona", "(a)"), ("nait", "(c)"))
        },  # fmt: skip
        "over_floor_reason": "measured on the bundled model, extraction_float32.json",
    }
    write_json(args.out, result)
    args.page.write_text(page(result), encoding="utf-8")
    logger.info("-> %s, %s", args.out, args.page)


def measured_result(pool: Path, store: Path) -> dict[str, Any]:
    about = machine(torch.device("cpu"))
    logger.info("%s", described(about))
    samples = tokenize(bundled.extractor(features=()), read_pool(pool, 2000))
    lengths = np.asarray([len(sample.input_ids) for sample in samples if not sample.skip])
    found = distinct_latents(store) | {"length": float((lengths**2).sum() / lengths.sum())}
    found["tokens"] = float(lengths.mean())
    measured = {}
    for name, shape in SHAPES.items():
        few = lengths[: int(np.searchsorted(np.cumsum(lengths), BLOCK_TOKENS[name])) + 1].tolist()
        measured[name] = measure(shape, few)
        logger.info("%s: %s", name, measured[name])
    drift = drift_ratio()
    return {
        "machine": about, "rows": found, "measured": measured, "drift_ratio": drift, **counted(found, drift),
    }  # fmt: skip


def counted(found: dict[str, float], drift: float) -> dict[str, Any]:
    """Operations and bytes of each model and method."""
    return {
        "flops_a_row": {name: flops_a_row(s, found["tokens"], found["length"]) for name, s in SHAPES.items()},
        "bytes_a_row": {name: bytes_a_row(s, found, drift) for name, s in SHAPES.items()},
    }


if __name__ == "__main__":
    main()
