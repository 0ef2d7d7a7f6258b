"""Train SAEs of SmolLM2-135M-Instruct on the tokens of corpus.py, all of them on one stream of activations.

    python recipes/smollm2/train.py --model SMOLLM2 --work WORK --out OUT --sae 28:9216:50e6

``--sae LAYER:LATENTS:TOKENS`` may be given several times. Each goes into ``OUT/<LATENTS>-<TOKENS>/layers.<LAYER>``,
in float16. A training that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from hf_neuronselect.core.digests import SAE_FILES
from hf_neuronselect.core.seals import write_checksums
from hf_neuronselect.models.backbone import Backbone
from hf_neuronselect.training.sae_loop import fit_saes
from hf_neuronselect.training.sae_train import write_sae
from hf_neuronselect.training.token_rows import Activations, TokenRows
from hf_neuronselect.training.topk import TopKPlan, default_batch

logger = logging.getLogger("smollm2.train")

K = 32


def load_lm(folder: str) -> torch.nn.Module:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().requires_grad_(False).to(device)
    torch.set_float32_matmul_precision("high")
    return lm


def load_rows(path: Path) -> TokenRows:
    archive = np.load(path)
    starts = archive["starts"].astype(np.int64)
    return TokenRows(archive["ids"], starts, np.ones(len(starts) - 1, np.int64))


def train(
    lm: torch.nn.Module, rows: TokenRows, wanted: list[tuple[int, int, int]], out: Path, *, lr: float = 4e-4,
    batch: int | None = None, seed: int = 0,
) -> list[Path]:  # fmt: skip
    """Train the SAEs ``(layer, latents, tokens)``; their folders."""
    backbone = Backbone(lm)
    on_gpu = backbone.device.type == "cuda"
    layers = sorted({layer for layer, _, _ in wanted})
    stream = Activations(
        backbone, [backbone.residual(layer) for layer in layers], rows, block=1 << (20 if on_gpu else 17),
        batch=1 << (17 if on_gpu else 13), seed=seed,
    )  # fmt: skip
    plans = [
        (
            layers.index(layer),
            TopKPlan(backbone.hidden_size, latents, K, tokens, batch or default_batch(tokens), lr, seed),
        )
        for layer, latents, tokens in wanted
    ]
    checkpoint = out / "checkpoint.safetensors"
    started = time.monotonic()
    saes = fit_saes(stream, plans, checkpoint=checkpoint, report=lambda progress: logger.info("%s", progress))
    seconds = time.monotonic() - started
    folders = []
    for (layer, latents, tokens), sae in zip(wanted, saes, strict=True):
        folder = out / f"{latents}-{tokens / 1e6:g}M" / f"layers.{layer}"
        write_sae(folder, sae)
        write_checksums(folder, SAE_FILES)
        facts = {"tokens": sae.seen, "batch": sae.plan.batch, "lr": lr, "seed": seed, "seconds": round(seconds),
                 "sinks_left_out": stream.counts.sinks, "not_finite": stream.counts.broken}  # fmt: skip
        (folder / "facts.json").write_text(json.dumps(facts) + "\n")
        folders.append(folder)
    checkpoint.unlink(missing_ok=True)
    return folders


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder written by corpus.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sae", action="append", metavar="LAYER:LATENTS:TOKENS", required=True)
    parser.add_argument("--lr", type=float, default=4e-4)
    args = parser.parse_args()
    wanted = [
        (int(layer), int(latents), int(float(tokens))) for layer, latents, tokens in (s.split(":") for s in args.sae)
    ]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    for folder in train(load_lm(args.model), load_rows(args.work / "corpus.npz"), wanted, args.out, lr=args.lr):
        logger.info("%s", folder)


if __name__ == "__main__":
    main()
