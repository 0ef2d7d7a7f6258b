"""Speed of per-row LoRA gradients: ours beside the plain loop, vmap, and the training pass that LESS needs anyway.

python benchmarks/gradients.py --model FOLDER --pool DATA/pool.jsonl.gz --rows 16 --out benchmarks/gradients.json

All contenders run on the same rows, threads, weights and dtype, in alternating runs of one process; before they are timed,
their gradients are compared. LESS at one checkpoint, its answers' mean loss at r 128, alpha 512, q/k/v/o:

- ours: gradients of whole batches, sketched to 8,192 numbers; `adam` also as Adam's steps, from the same backward pass
- row by row: `loss.backward()` for each row, gradients concatenated, nothing projected (transformers and PEFT as they are)
- row by row, projected: the same and a Rademacher matrix made block by block, 16 rows at a time, as LESS does it; the
  projection is timed on a part of the coordinates and scaled, since it is linear in them
- vmap: torch.func.vmap(grad) over rows of one length, as attribution libraries do it; not where the model cannot be traced
- training pass: batches of the same rows, forward and backward for the factors' summed gradient, as training runs it
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import alternate, count, described, machine, plain_logging, ratio, read_pool, spread, write_json

from hf_neuronselect import NeuronFeatureExtractor
from hf_neuronselect.models.batching import plan_batches
from hf_neuronselect.models.gradients import row_gradients
from hf_neuronselect.models.lora import LoraModel, LoraShape, batch_tokens, lora_model_of
from hf_neuronselect.models.loss import token_losses
from hf_neuronselect.models.sketch import CountSketch
from hf_neuronselect.rows.encode import Sample
from hf_neuronselect.signals.gradient import DIM, adam_steps, answers_of

logger = logging.getLogger("gradients")
CPU, AT_ONCE, BLOCK, PART = torch.device("cpu"), 16, 256, 60


def moved(lora: LoraModel) -> None:
    """Factors as after some training: both have a gradient."""
    draw = torch.Generator().manual_seed(0)
    lora.set({name: 0.01 * torch.randn(w.shape, generator=draw) for name, w in lora.factors.items()})


class Contenders:
    """The ways, on the same rows and weights."""

    def __init__(self, lora: LoraModel, samples: list[Sample]) -> None:
        self.lora, self.samples = lora, samples
        self.length = sum(weight.numel() for weight in lora.factors.values())
        draw = torch.Generator().manual_seed(1)
        self.moments = {
            name: (1e-4 * torch.randn(w.numel(), generator=draw), 1e-7 * torch.rand(w.numel(), generator=draw))
            for name, w in lora.factors.items()
        }
        self.sketch = CountSketch(DIM, seed=0)

    def ours(self, *, adam: bool) -> None:
        for plan in plan_batches([len(one.input_ids) for one in self.samples], batch_tokens(CPU)):
            plain, steps = torch.zeros(len(plan), DIM), torch.zeros(len(plan), DIM)

            def sink(name: str, values: torch.Tensor, plain: Any = plain, steps: Any = steps) -> None:
                self.sketch.add(plain, name, values)
                if adam:
                    self.sketch.add(steps, name, adam_steps(values, *self.moments[name]))

            row_gradients(self.lora, [self.samples[i] for i in plan], sink)

    def asked(self, on: bool) -> None:
        for weight in self.lora.factors.values():
            weight.requires_grad_(on)

    def one(self, sample: Sample) -> torch.Tensor:
        ids = torch.from_numpy(np.asarray(sample.input_ids))[None]
        labels = ids.masked_fill(~torch.from_numpy(sample.pooled)[None], -100)
        self.lora.model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        found = torch.cat([weight.grad.flatten().float() for weight in self.lora.factors.values()])
        for weight in self.lora.factors.values():
            weight.grad = None
        return found

    def row_by_row(self) -> None:
        self.asked(True)
        for sample in self.samples:
            self.one(sample)
        self.asked(False)

    def project(self) -> None:
        """A part of the projection of 16 rows: :data:`PART` blocks of coordinates."""
        rng, gradients = np.random.Generator(np.random.SFC64(0)), torch.ones(AT_ONCE, PART * BLOCK)
        found = torch.zeros(AT_ONCE, DIM)
        for part in gradients.split(BLOCK, dim=1):
            bits = np.frombuffer(rng.bytes(BLOCK * DIM // 8), dtype=np.uint8)
            ones = torch.from_numpy(np.unpackbits(bits)).view(-1, DIM)
            found.addmm_(part, ones.float(), alpha=2).sub_(part.sum(dim=1, keepdim=True))

    def training(self) -> None:
        self.asked(True)
        for plan in plan_batches([len(one.input_ids) for one in self.samples], batch_tokens(CPU)):
            losses, row_of = token_losses(self.lora.model, [self.samples[i] for i in plan])
            weights = torch.from_numpy(1.0 / np.bincount(row_of)[row_of])
            (losses * weights).sum().backward()
            for weight in self.lora.factors.values():
                weight.grad = None
        self.asked(False)

    def vmap(self) -> None:
        self.lora.model.disable_input_require_grads()
        try:
            self._vmap()
        finally:
            self.lora.model.enable_input_require_grads()

    def _vmap(self) -> None:
        names = {id(weight): name for name, weight in self.lora.model.named_parameters()}
        keys = [names[id(weight)] for weight in self.lora.factors.values()]
        values = {key: weight.detach() for key, weight in zip(keys, self.lora.factors.values(), strict=True)}

        def loss(factors: dict[str, torch.Tensor], ids: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
            given = {"input_ids": ids[None], "use_cache": False}
            logits = torch.func.functional_call(self.lora.model, factors, (), given).logits[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            return (nll * answer[1:]).sum() / answer[1:].sum()

        slopes = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")
        for plan in plan_batches([len(one.input_ids) for one in self.samples], batch_tokens(CPU)):
            rows = [self.samples[i] for i in plan]
            width = max(len(row.input_ids) for row in rows)
            ids = torch.tensor([[*row.input_ids, *[0] * (width - len(row.input_ids))] for row in rows])
            answer = torch.tensor([[*row.pooled, *[False] * (width - len(row.pooled))] for row in rows]).float()
            total = torch.zeros(len(rows), DIM)
            for key, values_of in slopes(values, ids, answer).items():
                self.sketch.add(total, key, values_of.flatten(1).float())

    def check(self) -> float:
        """Largest relative difference of a row's gradient between ours and row by row."""
        found: dict[str, torch.Tensor] = {}
        row_gradients(self.lora, self.samples[:2], lambda name, values: found.__setitem__(name, values.clone()))
        whole = torch.cat([found[name] for name in self.lora.factors], dim=1)
        self.asked(True)
        apart = torch.stack([self.one(sample) for sample in self.samples[:2]])
        self.asked(False)
        return float(((whole - apart).norm(dim=1) / apart.norm(dim=1)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=str)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plain_logging(logger)
    extractor = NeuronFeatureExtractor.from_pretrained(
        args.model, features=["gradient"], dtype=args.dtype, device="cpu", max_length=args.max_length
    )
    rows = answers_of(extractor.extraction, read_pool(args.pool, 2 * args.rows, args.seed))
    samples = [row for row in rows if not row.skip][: args.rows]
    lora = lora_model_of(extractor.extraction.spec, CPU, LoraShape())
    moved(lora)
    made = Contenders(lora, samples)
    difference = made.check()
    if difference > (0.1 if args.dtype == "bfloat16" else 1e-3):
        raise SystemExit(f"gradients differ by {difference}")
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: made.ours(adam=False),
        "ours, Adam's steps too": lambda: made.ours(adam=True),
        "row by row": made.row_by_row,
        "projection, a part": made.project,
        "training pass": made.training,
        "vmap": made.vmap,
    }
    reasons = {}
    for name, run in list(runs.items()):
        try:
            run()
        except Exception as cause:  # what a library cannot do is a result
            reasons[name] = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
            del runs[name]
            made.asked(False)
    timed = alternate(runs, args.repeats, CPU, logger)
    scale = made.length / (PART * BLOCK) * len(samples) / AT_ONCE
    part = timed.pop("projection, a part")
    timed["row by row, projected"] = [
        loop + scale * own for loop, own in zip(timed["row by row"], part, strict=True)
    ]  # fmt: skip
    tokens = count(samples)
    write_json(args.out, {
        "machine": machine(CPU),
        "settings": {
            "model": extractor.extraction.spec.source.id, "dtype": args.dtype, "rows": len(samples), "tokens": tokens,
            "coordinates": made.length, "max_length": args.max_length, "repeats": args.repeats, "seed": args.seed,
        },
        "relative_difference": difference,
        "seconds": timed,
        "tokens_per_s": {name: spread([tokens / one for one in own]) for name, own in timed.items()},
        "time_over_ours": {name: ratio(own, timed["ours"]) for name, own in timed.items()},
        "less_over_training": ratio(timed["ours, Adam's steps too"], timed["training pass"]),
        "cannot": reasons,
    })  # fmt: skip
    logger.info("%s", described(machine(CPU)))
    for name, own in timed.items():
        logger.info("%-28s %8.1f tokens/s, %.2f times ours", name, tokens / np.median(own),
                    ratio(own, timed["ours"])["median"])  # fmt: skip


if __name__ == "__main__":
    main()
