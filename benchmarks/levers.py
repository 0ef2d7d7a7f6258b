"""How much each optimisation of extraction speeds it up, changed one at a time, from alternating runs.

Each line compares a run with one optimisation to the same run without it, on the same token ids, threads and dtype: how
rows are batched, the token budget, the attention mask and kernel, where the forward stops, bf16, torch.compile, how many
tokens the SAE encodes at once, top-k and pooling without a dense table, and tokenising ahead in a thread.

    python benchmarks/levers.py --model FOLDER --sae FOLDER --pool pool.jsonl.gz --out benchmarks/levers.json
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
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
    usable_rows,
    write_json,
)
from extraction import cut, dense_mona, pad
from transformers import AutoModelForCausalLM

from hf_neuronselect import NeuronFeatureExtractor
from hf_neuronselect.core.prefetch import ahead
from hf_neuronselect.models.batching import plan_batches
from hf_neuronselect.models.sae import SparseAutoencoder
from hf_neuronselect.rows.encode import Sample
from hf_neuronselect.rows.formats import Conversation

logger = logging.getLogger("levers")

BUDGETS = (256, 512, 1024, 2048, 4096, 8192)
CHUNKS = (128, 512, 2048, 8192)
PIECES = 4


class Forward:
    """Runs the prefix forward over the sample, in one of several ways."""

    def __init__(self, model: Any, decoder: torch.nn.Module, samples: Sequence[Sample], device: torch.device) -> None:
        self.model, self.decoder, self.samples, self.device = model, decoder, samples, device

    def batches(self, plan: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [pad([self.samples[i] for i in rows], self.device) for rows in plan]

    def sorted(self, budget: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self.batches(plan_batches([len(sample.input_ids) for sample in self.samples], budget))

    def given(self, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        numbers = range(len(self.samples))
        return self.batches([numbers[start : start + rows] for start in range(0, len(numbers), rows)])

    @torch.inference_mode()
    def run(
        self, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], mask: bool = False, whole: bool = False
    ) -> torch.Tensor:
        """Run all batches and return the last one's hidden states."""
        hidden = torch.zeros(0)
        for ids, attention_mask in batches:
            given = {"attention_mask": attention_mask} if mask else {}
            if whole:
                self.model(input_ids=ids, use_cache=False, **given)
            else:
                hidden = self.decoder(input_ids=ids, use_cache=False, **given).last_hidden_state
        return hidden

    @torch.inference_mode()
    def attention(self, kernel: str, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        before = self.decoder.config._attn_implementation
        self.decoder.config._attn_implementation = kernel
        try:
            self.run(batches)
        finally:
            self.decoder.config._attn_implementation = before


class Encode:
    """Turns the sample's hidden states into pooled latents, in one of several ways."""

    def __init__(self, sae: SparseAutoencoder, k: int, hidden: torch.Tensor, lengths: Sequence[int]) -> None:
        self.sae, self.k, self.hidden, self.lengths = sae, k, hidden, lengths
        self.row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(hidden.device)

    @torch.inference_mode()
    def chunked(self, chunk: int | None = None) -> torch.Tensor:
        """The extractor's way: `chunk` tokens at a time, summed from (values, indices)."""
        return self.sae.sum_rows(self.hidden, self.row, len(self.lengths), self.k, chunk)

    @torch.inference_mode()
    def dense(self) -> torch.Tensor:
        """All tokens of a row at once, their top-k scattered into [tokens, latents], then summed."""
        rows = []
        for part in self.hidden.split(list(self.lengths)):
            ones = torch.ones(1, len(part), device=part.device)
            rows.append(dense_mona(self.sae, self.k, part[None], ones) * len(part))
        return torch.cat(rows)


def whole_extract(extractor: NeuronFeatureExtractor, pieces: Sequence[Sequence[Conversation]], threaded: bool) -> None:
    ready = ahead(pieces, extractor.prepare) if threaded else map(extractor.prepare, pieces)
    deque(map(extractor.compute, ready), maxlen=0)


def equal(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-3) -> None:
    gap = float((one - other).abs().max() / other.abs().max())
    if not gap <= tolerance:
        raise SystemExit(f"a lever moves the numbers by {gap:.1e} of the largest")


def contenders(
    forward: Forward, encode: Encode, extractor: NeuronFeatureExtractor, pieces: Any, budget: int, compiled: Any
) -> dict[str, Callable[[], Any]]:
    ours = forward.sorted(budget)
    runs: dict[str, Callable[[], Any]] = {"prefix: as the extractor batches": partial(forward.run, ours)}
    runs |= {f"prefix: budget {b}": partial(forward.run, forward.sorted(b)) for b in BUDGETS}
    for rows in (1, 8, 32):
        runs[f"prefix: {rows} rows a batch, given order"] = partial(forward.run, forward.given(rows))
    runs["prefix: with attention masks"] = partial(forward.run, ours, mask=True)
    runs["prefix: eager attention"] = partial(forward.attention, "eager", ours)
    runs["whole model and its lm_head"] = partial(forward.run, ours, whole=True)
    if compiled is not None:
        runs["prefix: torch.compile(dynamic=True)"] = partial(compiled.run, ours)
    runs["encode: as the extractor does"] = encode.chunked
    runs |= {f"encode: {chunk} tokens at once": partial(encode.chunked, chunk) for chunk in CHUNKS}
    runs["encode: dense table of a row's tokens x latents"] = encode.dense
    runs["extract: tokenised ahead in a thread"] = partial(whole_extract, extractor, pieces, True)
    runs["extract: tokenised in between"] = partial(whole_extract, extractor, pieces, False)
    return runs


BASES = {"prefix": "prefix: as the extractor batches", "whole": "prefix: as the extractor batches",
         "encode": "encode: as the extractor does", "extract": "extract: tokenised ahead in a thread"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal LM")
    parser.add_argument("--sae", required=True, help="folder of a top-k SAE")
    parser.add_argument("--pool", required=True, type=Path, help=".jsonl.gz or .parquet")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plain_logging(logger)
    extractor = NeuronFeatureExtractor.from_pretrained(args.model, sae=args.sae, device=args.device)
    backbone, sae = extractor.forward.loaded(extractor.signals)
    device = backbone.device
    conversations = usable_rows(extractor, read_pool(args.pool, args.rows, args.seed))
    samples = tokenize(extractor, conversations)
    tokens, budget = count(samples), extractor.forward.token_budget(backbone)
    about, settings = machine(device), {"rows": len(samples), "tokens": tokens, "budget": budget, "seed": args.seed}
    logger.info("%s", described(about, settings))

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().to(device)
    decoder = cut(backbone, len(backbone.blocks))
    forward = Forward(model, decoder, samples, device)
    one_by_one = forward.batches([[i] for i in range(len(samples))])
    with torch.inference_mode():
        hidden = torch.cat([decoder(input_ids=ids, use_cache=False).last_hidden_state[0] for ids, _ in one_by_one])
    encode = Encode(sae, sae.resolve_k(None), hidden, [len(sample.input_ids) for sample in samples])
    compiled = None
    if not args.no_compile and shutil.which("c++"):
        compiled = Forward(model, torch.compile(decoder, dynamic=True), samples, device)
        equal(compiled.run(forward.sorted(budget)), forward.run(forward.sorted(budget)))
    equal(encode.dense(), encode.chunked().cpu())
    pieces = [list(part) for part in np.array_split(np.asarray(conversations, dtype=object), PIECES)]
    runs = contenders(forward, encode, extractor, pieces, budget, compiled)
    for run in runs.values():
        run()
    timed = alternate(runs, args.repeats, device)
    lines = ["| run | tokens/s | its time / the extractor's way |", "|---|--:|--:|"]
    table: dict[str, Any] = {}
    for name, times in timed.items():
        over = ratio(times, timed[BASES[name.split(":")[0].split()[0]]])
        table[name] = {"tokens_per_s": spread([tokens / t for t in times]), "time_over_ours": over}
        lines.append(f"| {name} | {tokens / median(times):,.0f} | {RATIO.format(**over)} |")
    logger.info("\n%s", "\n".join(lines))
    if args.out is not None:
        write_json(args.out, {"machine": about, "settings": settings, "seconds": timed, "table": table})


if __name__ == "__main__":
    main()
