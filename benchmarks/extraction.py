"""Tokens/s of MoNA extraction, of its floor and of the plain way, from alternating runs.

- ours: the extractor on tokenised rows: batching, prefix forward, SAE, pooling, columns.
- floor: the bare prefix forward (no hooks, no final norm, prepared batches) at its best token budget, plus the SAE
  encoder's bare matrix product over the same tokens at its best chunk size; timed separately and added.
- several features: `nait` against the bare forward of all blocks, and mona+nait+hidden in one pass against mona alone.
  In such a shallow model the extra blocks that nait needs are a large share, so a second figure leaves them out (it
  subtracts the difference of the two bare forwards).
- plain: the full causal LM with ``output_hidden_states`` and an attention mask on padded batches, then a dense SAE
  (linear, relu, ``torch.topk``, scatter into ``[tokens, latents]``, masked mean); rows in given and in sorted order.

All use the same token ids, dtype and threads. Only real tokens are counted, no padding. Before anything is timed, the
pooled features of all contenders are compared. ``python benchmarks/extraction.py --model FOLDER --sae FOLDER --pool pool.jsonl.gz``
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
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
    speed_table,
    spread,
    usable_rows,
    write_json,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_neuronselect import NeuronFeatureExtractor
from hf_neuronselect.models.backbone import Backbone
from hf_neuronselect.models.batching import plan_batches
from hf_neuronselect.models.sae import SparseAutoencoder, top_k
from hf_neuronselect.rows.encode import Sample
from hf_neuronselect.signals.extractor import Prepared

logger = logging.getLogger("extraction")

BUDGETS, CHUNKS, PLAIN_BATCHES = (512, 1024, 2048, 4096), (1024, 4096, 16384), (1, 8, 32)
CHECKED_ROWS, TOLERANCE = 32, 1e-3
PREFIX, ALL_BLOCKS = "prefix alone", "every block alone"
SEVERAL = ("mona", "nait", "hidden")
SUBSET = "ours, on the plain way's rows"
EXTRACT = "ours, whole extract() with tokenisation"


def pad(samples: Sequence[Sample], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[B, L]``, padded on the right, and the attention mask."""
    ids = np.zeros((len(samples), max(len(sample.input_ids) for sample in samples)), dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, sample in enumerate(samples):
        ids[i, : len(sample.input_ids)] = sample.input_ids
        mask[i, : len(sample.input_ids)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def run_ours(extractor: NeuronFeatureExtractor, prepared: Prepared) -> dict[str, Any]:
    """The extractor's model part."""
    return extractor.compute(prepared).columns


def dense_mona(sae: SparseAutoencoder, k: int, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pool MoNA's latents in the plain way: ``[B, L, d]``, ``[B, L]`` -> float32 ``[B, m]`` on the CPU."""
    x = hidden if sae.b_pre is None else hidden - sae.b_pre
    acts = F.relu(F.linear(x, sae.W_enc, sae.b_enc))
    values, indices = torch.topk(acts, k, dim=-1)
    latents = torch.zeros_like(acts).scatter_(-1, indices, values)
    weight = mask.to(latents.dtype)[:, :, None]
    return ((latents * weight).sum(dim=1) / weight.sum(dim=1)).float().cpu()


@torch.inference_mode()
def run_plain(
    model: Any, layer: int, sae: SparseAutoencoder, k: int, samples: Sequence[Sample], batch: int, order: str
) -> torch.Tensor:
    """Run the full model on padded batches, then a dense SAE: ``[rows, m]`` in the original row order."""
    rows = list(range(len(samples)))
    if order == "sorted":
        rows.sort(key=lambda i: -len(samples[i].input_ids))
    pooled = torch.zeros(len(samples), sae.num_latents)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        ids, mask = pad([samples[i] for i in part], sae.W_enc.device)
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        pooled[part] = dense_mona(sae, k, out.hidden_states[layer + 1], mask)
    return pooled


def cut(backbone: Backbone, depth: int | None) -> torch.nn.Module:
    """A copy of the decoder with only its first blocks and no final norm."""
    decoder = copy.copy(backbone.decoder)
    decoder._modules = dict(decoder._modules)
    setattr(decoder, backbone.blocks_name, backbone.blocks[:depth])
    for name in ("norm", "ln_f", "final_layernorm", "final_layer_norm"):  # names of the final norm
        setattr(decoder, name, torch.nn.Identity())
    return decoder


class Floor:
    """The work no implementation can avoid: the bare prefix forward and the encoder's bare matrix product.

    Uses the extractor's decoder, cut after the SAE's block and without its final norm (which the extractor never loads).
    """

    def __init__(
        self, backbone: Backbone, depth: int, sae: SparseAutoencoder, samples: Sequence[Sample],
        budgets: Sequence[int] = BUDGETS,
    ) -> None:  # fmt: skip
        self.prefixes = {part: cut(backbone, blocks) for part, blocks in ((PREFIX, depth), (ALL_BLOCKS, None))}
        self.sae, self.rows, self.tokens = sae, len(samples), count(samples)
        self.batches = {}
        for budget in budgets:
            plan = plan_batches([len(sample.input_ids) for sample in samples], budget)
            self.batches[budget] = [(rows, *pad([samples[i] for i in rows], sae.W_enc.device)) for rows in plan]
        self.hidden = torch.cat([hidden[mask.bool()] for _, hidden, mask in self.forward(max(budgets))])
        few = self.hidden[: 8 * sae.chunk_tokens].split(sae.chunk_tokens)
        with torch.inference_mode():
            self.activations = [sae.activations(chunk) for chunk in few]

    @torch.inference_mode()
    def forward(self, budget: int, part: str = PREFIX) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """Row numbers, hidden states and mask of each batch."""
        for rows, ids, mask in self.batches[budget]:
            yield rows, self.prefixes[part](input_ids=ids, use_cache=False).last_hidden_state, mask

    def run(self, budget: int, part: str) -> None:
        deque(self.forward(budget, part), maxlen=0)

    def mona(self, budget: int, k: int) -> torch.Tensor:
        """Compute features from the bare forward's hidden states, to check them."""
        pooled = torch.zeros(self.rows, self.sae.num_latents)
        for rows, hidden, mask in self.forward(budget):
            pooled[rows] = dense_mona(self.sae, k, hidden, mask)
        return pooled

    @torch.inference_mode()
    def product(self, chunk: int) -> None:
        for start in range(0, self.tokens, chunk):
            F.linear(self.hidden[start : start + chunk], self.sae.W_enc, self.sae.b_enc)

    @torch.inference_mode()
    def top_k(self, function: Callable[..., Any], k: int) -> None:
        """Take the top-k of the same number of tokens, cycling through 8 chunks."""
        left = self.tokens
        for chunk in cycle(self.activations):
            function(chunk[:left], k)
            left -= len(chunk)
            if left <= 0:
                return


def difference(got: torch.Tensor | dict[str, Any], reference: torch.Tensor) -> float:
    """Largest relative L1 difference of a row's features; ``got`` may have more rows."""
    if isinstance(got, dict):
        columns, got = got, torch.zeros_like(reference)
        for i in range(len(reference)):
            got[i, columns["mona_indices"][i].astype(np.int64)] = torch.from_numpy(columns["mona_values"][i])
    gap = (got[: len(reference)] - reference).abs().sum(dim=1) / reference.abs().sum(dim=1).clamp_min(1e-12)
    return float(gap.max())


def summarise(timed: dict[str, list[float]], tokens: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the table of contenders and the headline ratios; ratios compare runs of the same repeat."""
    pace = {name: [t / tokens[name] for t in times] for name, times in timed.items()}

    def best(prefix: str) -> str:
        return min((name for name in pace if name.startswith(prefix)), key=lambda name: median(pace[name]))

    prefix, product, whole = best(PREFIX), best("encoder product alone"), best(ALL_BLOCKS)
    floor = f"floor: {prefix} + {product}"
    pace[floor] = [a + b for a, b in zip(pace[prefix], pace[product], strict=True)]
    table: dict[str, Any] = {}
    for name in sorted(pace, key=lambda name: median(pace[name])):
        ours = SUBSET if name.startswith("plain") else "ours"
        table[name] = {
            "tokens_per_s": spread([1 / p for p in pace[name]]),
            "time_over_ours": ratio(pace[name], pace[ours]),
        }
    several = f"ours, {'+'.join(SEVERAL)}"
    alike = [p + max(0.0, a - b) for p, a, b in zip(pace["ours"], pace[whole], pace[prefix], strict=True)]
    headline = {
        "(a) time of ours / floor": ratio(pace["ours"], pace[floor]),
        f"(c) time of ours, nait / {whole}": ratio(pace["ours, nait"], pace[whole]),
        f"(d) time of {several} / ours (mona)": ratio(pace[several], pace["ours"]),
        f"(e) time of {several} / ours (mona) + the blocks mona need not run": ratio(pace[several], alike),
    }
    for order in ("given", "sorted"):
        name = best(f"plain, {order}")
        headline[f"(b) time of {name} (the best) / ours"] = ratio(pace[name], pace[SUBSET])
    return table, headline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal LM")
    parser.add_argument("--sae", required=True, help="folder of a top-k SAE of one of its blocks' outputs")
    parser.add_argument("--pool", required=True, type=Path, help=".jsonl.gz or .parquet")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument(
        "--plain-rows", type=int, default=128, help="rows for the plain way, taken from the start of the sample"
    )
    parser.add_argument("--top-k", type=int, help="default: the SAE's own k")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plain_logging(logger)
    options = {"top_k_features": args.top_k, "dtype": args.dtype, "device": args.device}
    extractor = NeuronFeatureExtractor.from_pretrained(args.model, sae=args.sae, **options)
    several = extractor.with_features(SEVERAL)
    backbone, sae = several.forward.loaded(several.signals)  # every block is kept, also for those who stop earlier
    device = backbone.device
    layer, k = sae.site.block, sae.resolve_k(args.top_k)
    a_block = sae.site.io == "output" and sae.site.module.count(".") == 1 and layer + 1 < backbone.num_layers
    if sae.activation not in ("topk", "relu") or sae.input_norm != "none" or k is None or not a_block:
        raise SystemExit("the plain way reads a block's output (not the last's) through a top-k SAE, no input norm")

    conversations = usable_rows(extractor, read_pool(args.pool, args.rows, args.seed))
    whole, part = (several.prepare(rows) for rows in (conversations, conversations[: args.plain_rows]))
    samples, subset = whole.given["forward"], part.given["forward"]
    extraction = extractor.extraction
    settings = {"model": extraction.model.id, "sae": extraction.sae.id, "pool": args.pool.name, "k": k,
                "latents": sae.num_latents, "width": sae.d_in, "layer": layer, "blocks": backbone.num_layers,
                "dtype": args.dtype, "rows": len(samples), "tokens": count(samples), "plain_rows": len(subset),
                "plain_tokens": count(subset), "batch_tokens": extraction.options.batch_tokens, "repeats": args.repeats,
                "seed": args.seed}  # fmt: skip
    about = machine(device)
    logger.info("%s", described(about, settings))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval().to(device)
    floor, plain = Floor(backbone, layer + 1, sae, samples), partial(run_plain, model, layer, sae, k)
    runs: dict[str, Callable[[], Any]] = {
        "ours": partial(run_ours, extractor, whole),
        SUBSET: partial(run_ours, extractor, part),
        EXTRACT: partial(extractor.extract, conversations),
        "ours, nait": partial(run_ours, extractor.with_features(["nait"]), whole),
        f"ours, {'+'.join(SEVERAL)}": partial(run_ours, several, whole),
        "top-k alone: ours": partial(floor.top_k, top_k, k),
        "top-k alone: torch.topk": partial(floor.top_k, torch.topk, k),
    }
    runs |= {f"{part}, budget {b}": partial(floor.run, b, part) for part in floor.prefixes for b in BUDGETS}
    runs |= {f"encoder product alone, chunk {c}": partial(floor.product, c) for c in CHUNKS}
    shapes = {f"plain, {order} order, batch {b}": (b, order) for order in ("given", "sorted") for b in PLAIN_BATCHES}
    runs |= {name: partial(plain, subset, *shape) for name, shape in shapes.items()}
    tokens = {name: count(subset if name == SUBSET or name in shapes else samples) for name in runs}

    # Features against the plain way row by row, which has no padding; ours without the rounding to float16.
    float32 = replace(extraction.options, value_dtype="float32")
    exact = NeuronFeatureExtractor(replace(extraction, options=float32), extractor.signals)
    few = subset[:CHECKED_ROWS]
    reference = plain(few, 1, "given")
    ours = {"ours": run_ours(exact, whole), SUBSET: run_ours(exact, part), EXTRACT: exact.extract(conversations)}
    checked = {name: difference(columns, reference) for name, columns in ours.items()}
    checked |= {f"prefix alone, budget {b}": difference(floor.mona(b, k), reference) for b in BUDGETS}
    checked |= {name: difference(plain(few, *shape), reference) for name, shape in shapes.items()}
    worst = float(np.max([*checked.values()]))  # NaN if any is NaN
    logger.info("max relative difference (L1) of a row's features, %d rows: %.1e", len(few), worst)
    if args.dtype == "float32" and not worst <= TOLERANCE:
        raise SystemExit(f"contenders disagree by more than {TOLERANCE}: {checked}")
    timed = alternate(runs, args.repeats, device)
    table, headline = summarise(timed, tokens)
    lines = speed_table(table)
    lines += ["", f"The plain way runs on the first {len(subset)} of {len(samples)} rows, set against ours on those."]
    logger.info("\n%s", "\n".join(lines + [f"{name}: {RATIO.format(**found)}" for name, found in headline.items()]))
    if args.out is not None:
        result = {"machine": about, "settings": settings, "relative_difference": checked, "tokens": tokens,
                  "seconds": timed, "table": table, "ratios": headline}  # fmt: skip
        write_json(args.out, result)


if __name__ == "__main__":
    main()
