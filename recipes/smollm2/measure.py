"""Measure SAEs of SmolLM2-135M-Instruct on pool rows: reconstruction, loss recovered, MoNA's precision, single latents.

    python recipes/smollm2/measure.py --model SMOLLM2 --work WORK --out figures.json OUT/*/layers.*

Reconstruction and loss are measured on permissive rows that were not trained on. Precision is the share of a target's
related sources among the best 5 % of rows, pooled without the template's beginning (rows cut at 384 tokens).
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train import load_lm

from hf_neuronselect.core.sae_record import verdict_of
from hf_neuronselect.models.backbone import Backbone
from hf_neuronselect.models.sae import SparseAutoencoder
from hf_neuronselect.models.sae_formats import load_sae
from hf_neuronselect.training.sae_measure import measure_saes
from hf_neuronselect.training.token_rows import TokenRows, read_sites

logger = logging.getLogger("smollm2.measure")

RATIO, DRAWS, SAMPLE = 0.05, 20, 9896


class Bench:
    """Pool rows and exemplars, and the three sets of rows that precision is measured on."""

    def __init__(self, path: Path, rows: int | None = None) -> None:
        archive = np.load(path)
        starts, prefix = archive["starts"], int(archive["prefix"])
        lengths = np.diff(starts)
        self.rows = TokenRows(archive["ids"], starts, np.minimum(prefix, lengths - 1))
        self.labels = archive["source"]
        self.pool = len(self.labels)
        self.names = [str(name) for name in archive["sources"]]
        related = json.loads(str(archive["related"]))
        self.targets: dict[str, tuple[slice, np.ndarray]] = {}
        at = self.pool
        for entry in archive["targets"]:
            name, count = str(entry).split("=")
            right = np.isin(self.labels, [self.names.index(source) for source in related[name]])
            self.targets[name] = slice(at, at + int(count)), right
            at += int(count)
        random = np.random.default_rng(0)
        everything = np.arange(self.pool)
        self.sets = {
            "sample": np.sort(random.permutation(self.pool)[: min(SAMPLE, rows or SAMPLE)]),
            "pool": everything,
            "unseen": everything[~archive["trained"]],
        }
        if rows:  # a quick look
            self.sets = {"sample": self.sets["sample"]}
        held_out = everything[archive["permissive"] & ~archive["trained"]]
        self.held_out = self.rows.take(random.permutation(held_out)[: min(4000, rows or 4000)])

    @property
    def needed(self) -> np.ndarray:
        """The rows whose features are read."""
        exemplars = np.arange(self.pool, len(self.rows))
        return np.concatenate([np.unique(np.concatenate(list(self.sets.values()))), exemplars])


@torch.inference_mode()
def features(
    backbone: Backbone, saes: list[SparseAutoencoder], bench: Bench, batch: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Mean latents (float16) and mean hidden states of each SAE's site: ``[rows, m]`` and ``[rows, d]`` each."""
    device, needed = backbone.device, bench.needed
    encoders = [sae.to(device, torch.float32) for sae in saes]
    latents = [torch.zeros(len(bench.rows), sae.num_latents, dtype=torch.float16, device=device) for sae in saes]
    hidden = [torch.zeros(len(bench.rows), sae.d_in, device=device) for sae in saes]
    for numbers, tokens in bench.rows.take(needed).batches(batch, device):
        at = torch.from_numpy(needed[numbers]).to(device)
        seen = read_sites(backbone, tokens, [sae.site for sae in saes])
        for encoder, x, into, mean in zip(encoders, seen, latents, hidden, strict=True):
            into[at] = (
                encoder.sum_rows(x, tokens.pooled.row, tokens.size, chunk=4096) / tokens.pooled.count[:, None]
            ).half()
            total = torch.zeros(tokens.size, x.shape[1], device=device).index_add_(0, tokens.pooled.row, x)
            mean[at] = total / tokens.pooled.count[:, None]
    return latents, hidden


def jaccard(rows: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    parts = []
    for part in rows.split(1024):
        part = part.float() if weight is None else part.float() * weight
        shared = torch.minimum(part, target).sum(dim=1)
        parts.append(shared / (part.sum(dim=1) + target.sum() - shared))
    return torch.cat(parts)


def cosine(rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(rows, target[None], dim=1)


def precision(scores: Any, right: np.ndarray) -> float:
    scores = torch.as_tensor(scores).double().cpu().numpy()
    best = np.argsort(-scores, kind="stable")[: round(len(scores) * RATIO)]
    return float(right[best].mean())


def precisions(
    bench: Bench, latents: list[torch.Tensor], hidden: list[torch.Tensor], names: list[str]
) -> dict[str, Any]:
    """By set of rows, method and target."""
    found: dict[str, Any] = {}
    lengths = bench.rows.lengths
    for which, numbers in bench.sets.items():
        at = torch.from_numpy(numbers).to(hidden[0].device)
        table: dict[str, dict[str, float]] = {"rows": {"count": len(numbers)}}
        draws = [np.random.default_rng(seed).permutation(len(numbers)) for seed in range(DRAWS)]
        rare = []
        for rows in latents:
            share = torch.stack([(part > 0).float().sum(dim=0) for part in rows[at].split(1024)]).sum(dim=0) / len(at)
            rare.append(torch.log(1 / share.clamp_min(1 / len(at))))
        for target, (exemplars, right_of_pool) in bench.targets.items():
            right = right_of_pool[numbers]
            random = [right[draw[: round(len(numbers) * RATIO)]].mean() for draw in draws]

            def note(method: str, value: Any, target: str = target, table: dict[str, Any] = table) -> None:
                table.setdefault(method, {})[target] = round(float(value), 4)

            note("random", np.mean(random))
            note("random, 95th percentile", np.percentile(random, 95))
            note("longest", precision(lengths[numbers], right))
            for name, z, h, weight in zip(names, latents, hidden, rare, strict=True):
                mean = h[at].mean(dim=0)
                note(f"{name}: mona", precision(jaccard(z[at], z[exemplars].float().mean(dim=0)), right))
                note(f"{name}: mona, weighted by rarity",
                     precision(jaccard(z[at], (z[exemplars].float() * weight).mean(dim=0), weight), right))  # fmt: skip
                note(f"{name}: hidden", precision(cosine(h[at], h[exemplars].mean(dim=0)), right))
                note(f"{name}: hidden, pool mean taken off",
                     precision(cosine(h[at] - mean, h[exemplars].mean(dim=0) - mean), right))  # fmt: skip
        for method, values in table.items():
            if method != "rows":
                values["average"] = round(float(np.mean(list(values.values()))), 4)
        found[which] = table
    return found


def single_latents(bench: Bench, latents: torch.Tensor) -> dict[str, float]:
    """For each source, the area under the ROC curve of its best single latent.

    The latent is chosen on half of the sample and measured on the other half.
    """
    numbers = bench.sets["sample"]
    found = {}
    halves = [numbers[::2], numbers[1::2]]
    areas = [_areas(latents[torch.from_numpy(half).to(latents.device)], bench.labels[half]) for half in halves]
    for label, name in enumerate(bench.names):
        if label in areas[0] and label in areas[1]:
            found[name] = round(float(areas[1][label][areas[0][label].argmax()]), 4)
    return found


def _areas(rows: torch.Tensor, labels: np.ndarray) -> dict[int, torch.Tensor]:
    """For each label with 10 rows or more: float ``[m]``."""
    n = len(rows)
    of_label = torch.from_numpy(labels.astype(np.int64)).to(rows.device)
    sums: dict[int, list[torch.Tensor]] = {}
    wanted = [int(label) for label in np.unique(labels) if (labels == label).sum() >= 10]
    for part in rows.float().split(1024, dim=1):
        order = part.argsort(dim=0)
        ranks = torch.empty_like(part).scatter_(
            0, order, torch.arange(1, n + 1, device=part.device).float()[:, None].expand_as(part).contiguous()
        )
        zeros = (part == 0).sum(dim=0)
        ranks = torch.where(part == 0, (zeros + 1) / 2, ranks)  # rows where it never fires share their mean rank
        for label in wanted:
            sums.setdefault(label, []).append(ranks[of_label == label].double().sum(dim=0))
    areas = {}
    for label in wanted:
        count = int((labels == label).sum())
        areas[label] = (torch.cat(sums[label]) - count * (count + 1) / 2) / (count * (n - count))
    return areas


def measure(lm: torch.nn.Module, folders: list[Path], bench: Bench) -> dict[str, Any]:
    on_gpu = next(lm.parameters()).is_cuda
    saes = [load_sae(folder) for folder in folders]
    names = ["/".join(folder.parts[-2:]) for folder in folders]
    figures = measure_saes(lm, saes, bench.held_out, batch=1 << (14 if on_gpu else 11))
    found: dict[str, Any] = {"saes": {}}
    for name, folder, one in zip(names, folders, figures, strict=True):
        facts = folder / "facts.json"
        found["saes"][name] = {
            **{key: round(value, 5) for key, value in asdict(one).items()},
            "loss_recovered": round(one.loss_recovered, 5),
            "verdict": verdict_of(one.fvu, one.dead),
            **({"training": json.loads(facts.read_text())} if facts.exists() else {}),
        }
        logger.info("%s: %s", name, found["saes"][name])
    latents, hidden = features(Backbone(lm), saes, bench, 1 << (16 if on_gpu else 13))
    for name, rows in zip(names, latents, strict=True):
        single = single_latents(bench, rows)
        found["saes"][name] |= {
            "single_latents": single,
            "single_latents_mean": round(float(np.mean(list(single.values()))), 4),
        }
    found["precision"] = precisions(bench, latents, hidden, names)
    return found


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=None, help="only so many pool rows, for a quick look")
    args = parser.parse_args()
    found = measure(load_lm(args.model), args.folders, Bench(args.work / "measure.npz", args.rows))
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
