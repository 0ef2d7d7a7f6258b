"""MoNA extraction compared with other tools, on the bundled model and SAE with the same rows, dtype and threads.

- ours: `extractor.compute(rows)`, with values in float32. All contenders use its token ids.
- sparsify: the forward shown in its README (the causal LM, `output_hidden_states`, a mask) on padded batches, then its
  own `Sae.encode` on every position; the latents of real tokens are summed row by row and averaged.
- SAELens: the same forward, then its own `TopKSAE.encode` (dense) with the same tensors, since it cannot read these
  files; masked mean.
- RDS+: the same forward, then the position-weighted mean of the last hidden states, normalised. No SAE.
- sentence-transformers: `encode` of the same rows' rendered text, with the bundled LM as embedding model (mean pooling),
  since no embedding model is available offline. It tokenises and sorts by length, so it is compared with `extract()`.
- LESS: for each row, one backward pass of the response's loss through LoRA (r 128, alpha 512, q/k/v/o), Adam's moments,
  and a Rademacher projection to 8192, 16 rows at a time. One checkpoint, float32, on `--less-rows` rows. The moments
  come from one pass of AdamW over these rows, which is not timed.

Forwards run in batches of 1, 8 and 32 rows, in given order and sorted by length. Numbers are checked before timing:
mona of all contenders against sparsify row by row, RDS+ and the embeddings against float64 row by row, and LESS' cosines
before and after projection. CPU only. Needs eai-sparsify, sae-lens and sentence-transformers.

    python benchmarks/peers.py --pool pool.jsonl.gz --out benchmarks/peers.json
"""

from __future__ import annotations

import argparse
import importlib
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
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
    tokenize,
    usable_rows,
    write_json,
)
from extraction import difference, pad, run_ours
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

from hf_neuronselect.core import bundled as paths
from hf_neuronselect.pipelines import bundled
from hf_neuronselect.rows.encode import Sample

logger = logging.getLogger("peers")

CPU = torch.device("cpu")
BATCHES, ORDERS = (1, 8, 32), ("given", "sorted")
TOLERANCE, CHECKED_ROWS = 1e-3, 16
OURS, EXTRACT, SUBSET = "ours", "ours, whole extract() with tokenisation", "ours, on LESS' rows"
PACKAGES = {"sparsify": "eai-sparsify", "sae_lens": "sae-lens", "sentence_transformers": "sentence-transformers"}
WANTED = {"eai-sparsify": ">=1.3.3", "sae-lens": ">=6.18", "sentence-transformers": ">=6"}
PROJECTED, AT_ONCE, BLOCK = 8192, 16, 256  # LESS: width, rows per projection, weights per block of signs


def need(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as cause:
        name = PACKAGES[module]
        raise SystemExit(f'{module} cannot be imported ({cause}): pip install "{name}{WANTED[name]}"') from cause


def load_model(kind: Any, dtype: torch.dtype) -> Any:
    return kind.from_pretrained(paths.MODEL, dtype=dtype).eval()


# ----------------------------------------------------------------------------------- padded forwards
Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Hidden states ``[B, L, d]`` and mask ``[B, L]`` -> ``[B, m]``."""


@torch.inference_mode()
def run_padded(
    model: Any, layer: int, pool: Pool, samples: Sequence[Sample], batch: int = 1, order: str = "given"
) -> torch.Tensor:
    """Run padded batches through the whole model and pool one entry of ``hidden_states``, in the given order."""
    rows = list(range(len(samples)))
    if order == "sorted":
        rows.sort(key=lambda i: -len(samples[i].input_ids))
    pooled = []
    for start in range(0, len(rows), batch):
        ids, mask = pad([samples[i] for i in rows[start : start + batch]], CPU)
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        pooled.append(pool(out.hidden_states[layer], mask).float())
    return torch.cat(pooled)[np.argsort(rows)]


def sparsify_pool(sae: Any, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows, width = mask.shape
    values, indices, _ = sae.encode(hidden.flatten(0, 1))
    real = mask.flatten().bool()
    place = indices + torch.arange(rows).repeat_interleave(width)[:, None] * sae.num_latents
    total = torch.zeros(rows * sae.num_latents)
    total.scatter_add_(0, place[real].flatten(), values[real].float().flatten())
    return total.view(rows, -1) / mask.sum(dim=1, keepdim=True)


def saelens_pool(sae: Any, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    latents = sae.encode(hidden)
    return (mask[:, None].to(latents.dtype) @ latents)[:, 0] / mask.sum(dim=1, keepdim=True)


def saelens_of(sae: Any, dtype: str) -> Any:
    """An SAE of SAELens with sparsify's tensors."""
    from sae_lens import TopKSAE, TopKSAEConfig

    options = {"apply_b_dec_to_input": True, "dtype": dtype, "device": "cpu"}
    theirs = TopKSAE(TopKSAEConfig(d_in=sae.d_in, d_sae=sae.num_latents, k=sae.cfg.k, **options))
    weights = {"W_enc": sae.encoder.weight.T, "b_enc": sae.encoder.bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    theirs.load_state_dict({name: tensor.detach().contiguous() for name, tensor in weights.items()})
    return theirs.eval()


def rds_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weight = mask * torch.arange(1, mask.shape[1] + 1)
    summed = (weight[:, None].to(hidden.dtype) @ hidden)[:, 0] / weight.sum(dim=1, keepdim=True)
    return F.normalize(summed, dim=-1)


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (hidden * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


# ---------------------------------------------------------------------------- sentence-transformers
class Embedder:
    """A SentenceTransformer of the bundled model; ``texts`` are rendered rows, to which its tokenizer adds BOS."""

    def __init__(self, texts: Sequence[str], width: int, dtype: str) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        # Without this it would use the chat template and read every text as a user turn.
        reads = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
        options = {"modality_config": reads, "module_output_name": "token_embeddings", "max_seq_length": 2048}
        lm = Transformer(str(paths.MODEL), model_kwargs={"dtype": dtype}, **options)
        self.model = SentenceTransformer(modules=[lm, Pooling(width, "mean")], device="cpu")
        self.texts = [text.removeprefix(self.model.tokenizer.bos_token) for text in texts]

    def run(self, batch: int) -> torch.Tensor:
        return self.model.encode(self.texts, batch_size=batch, show_progress_bar=False, convert_to_tensor=True).float()


# --------------------------------------------------------------------------------------------- LESS
class Less:
    """Projected LoRA gradients with Adam's moments; a row's ``pooled`` tokens are its response."""

    def __init__(self, samples: Sequence[Sample], seed: int) -> None:
        torch.manual_seed(seed)
        lora = LoraConfig(r=128, lora_alpha=512, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        self.model = get_peft_model(load_model(AutoModelForCausalLM, torch.float32), lora).eval()
        self.samples, self.seed = samples, seed
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(self.weights, lr=2e-5)
        for sample in samples:
            self.loss(sample).backward()
            optimizer.step()
            optimizer.zero_grad()
        states = [optimizer.state[weight] for weight in self.weights]
        self.first, self.second = (torch.cat([s[n].flatten() for s in states]) for n in ("exp_avg", "exp_avg_sq"))

    def loss(self, sample: Sample) -> torch.Tensor:
        ids, mask = pad([sample], CPU)
        labels = ids.masked_fill(~torch.from_numpy(sample.pooled)[None], -100)
        return self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss

    def gradients(self, samples: Sequence[Sample]) -> torch.Tensor:
        found = torch.empty(len(samples), len(self.first))
        for row, sample in zip(found, samples, strict=True):
            grads = torch.autograd.grad(self.loss(sample), self.weights)
            gradient = torch.cat([grad.flatten() for grad in grads])
            first = 0.9 * self.first + 0.1 * gradient
            second = 0.999 * self.second + 0.001 * gradient.square()
            row.copy_(first / (second + 1e-8).sqrt())
        return found

    def project(self, gradients: torch.Tensor) -> torch.Tensor:
        """Multiply by a matrix of random signs, generated from the seed a block of weights at a time."""
        rng = np.random.Generator(np.random.SFC64(self.seed))
        found = torch.zeros(len(gradients), PROJECTED)
        for part in gradients.split(BLOCK, dim=1):
            bits = np.frombuffer(rng.bytes(part.shape[1] * PROJECTED // 8), dtype=np.uint8)
            ones = torch.from_numpy(np.unpackbits(bits)).view(-1, PROJECTED)
            found.addmm_(part, ones.float(), alpha=2).sub_(part.sum(dim=1, keepdim=True))  # signs are 2 * ones - 1
        return found / PROJECTED**0.5

    def parts(self) -> list[Sequence[Sample]]:
        return [self.samples[start : start + AT_ONCE] for start in range(0, len(self.samples), AT_ONCE)]

    def run_gradients(self) -> None:
        for part in self.parts():
            self.gradients(part)

    def run(self) -> torch.Tensor:
        return torch.cat([self.project(self.gradients(part)) for part in self.parts()])

    def check(self) -> float:
        """How much projection changes the cosines between the first rows' gradients (about 1 / sqrt(8192))."""
        gradients = self.gradients(self.parts()[0])
        before, after = (F.normalize(x) @ F.normalize(x).T for x in (gradients, self.project(gradients)))
        return float((before - after).abs().max())


# ------------------------------------------------------------------------------------------ results
def summarise(timed: dict[str, list[float]], tokens: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the table of contenders and each peer's best ratio; ratios compare runs of the same repeat."""
    pace = {name: [t / tokens[name] for t in times] for name, times in timed.items()}

    def beside(name: str) -> str:
        return {"LESS": SUBSET, "sentence-transformers": EXTRACT}.get(name.split(",")[0], OURS)

    table = {}
    for name in sorted(pace, key=lambda name: median(pace[name])):
        over = ratio(pace[name], pace[beside(name)])
        table[name] = {"tokens_per_s": spread([1 / p for p in pace[name]]), "time_over_ours": over, "of": beside(name)}
    headline = {}
    for family in dict.fromkeys(name.rsplit(", batch", 1)[0] for name in pace if ", batch" in name):
        best = min((name for name in pace if name.startswith(f"{family}, batch")), key=lambda name: median(pace[name]))
        headline[f"time of {best} (the best) / {beside(best)}"] = table[best]["time_over_ours"]
    return table, headline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pool", required=True, type=Path, help=".jsonl.gz or .parquet")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--less-rows", type=int, default=16, help="rows for LESS, taken from the start of the sample")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plain_logging(logger)
    warnings.simplefilter("ignore", FutureWarning)  # raised by transformers, inside peft
    for module in PACKAGES:
        need(module)
    from sparsify import Sae

    dtype = getattr(torch, args.dtype)
    extractor = bundled.extractor(dtype=args.dtype, device="cpu", value_dtype="float32")
    backbone, ours = extractor.forward.loaded(extractor.signals)
    answers = bundled.extractor(device="cpu", pool_tokens="assistant")  # the same ids, their responses marked
    conversations = usable_rows(extractor, read_pool(args.pool, args.rows, args.seed))
    less_rows = usable_rows(answers, conversations)[: args.less_rows]
    prepared, less_prepared = extractor.prepare(conversations), extractor.prepare(less_rows)
    samples, subset = prepared.given["forward"], less_prepared.given["forward"]
    less_samples = tokenize(answers, less_rows)
    layer, width, blocks = ours.site.block + 1, backbone.hidden_size, backbone.num_layers
    settings = {"model": "bundled", "pool": args.pool.name, "k": ours.k, "latents": ours.num_latents,
                "width": width, "blocks": blocks, "sae_block": layer - 1, "dtype": args.dtype, "rows": len(samples),
                "tokens": count(samples), "longest": max(len(sample.input_ids) for sample in samples),
                "less_rows": len(subset), "less_tokens": count(subset), "repeats": args.repeats,
                "seed": args.seed}  # fmt: skip
    about = machine(CPU) | {name: version(name) for name in (*PACKAGES.values(), "peft")}
    logger.info("%s", described(about, settings))

    model = load_model(AutoModelForCausalLM, dtype)
    sae = Sae.load_from_disk(extractor.extraction.sae.location).to(dtype)
    sparsify = partial(run_padded, model, layer, partial(sparsify_pool, sae), samples)
    saelens = partial(run_padded, model, layer, partial(saelens_pool, saelens_of(sae, args.dtype)), samples)
    rds = partial(run_padded, model, -1, rds_pool, samples)
    embedder = Embedder([extractor.forward.encoder().render(row) for row in conversations], width, args.dtype)
    less = Less(less_samples, args.seed)
    runs: dict[str, Callable[[], Any]] = {
        OURS: partial(run_ours, extractor, prepared),
        EXTRACT: partial(extractor.extract, conversations),
        SUBSET: partial(run_ours, extractor, less_prepared),
    }
    for name, run in {"sparsify": sparsify, "SAELens": saelens, "RDS+": rds}.items():
        runs |= {f"{name}, {order} order, batch {b}": partial(run, b, order) for order in ORDERS for b in BATCHES}
    runs |= {f"sentence-transformers, batch {b}": partial(embedder.run, b) for b in BATCHES}
    runs |= {"LESS, gradients and projection": less.run, "LESS, gradients alone": less.run_gradients}
    tokens = {name: count(subset if name == SUBSET or name.startswith("LESS") else samples) for name in runs}

    exact = partial(run_padded, load_model(AutoModel, torch.float64), -1, samples=samples[:CHECKED_ROWS])
    references = {"sparsify": sparsify(), "RDS+": exact(rds_pool), "sentence-transformers": exact(mean_pool)}
    references |= {"SAELens": references["sparsify"], "ours": references["sparsify"]}
    checked = {name: difference(run(), references[name.split(",")[0]]) for name, run in runs.items()
               if name != SUBSET and not name.startswith("LESS")}  # fmt: skip
    worst, moved = float(np.max([*checked.values()])), less.check()  # NaN if any is NaN
    logger.info("max relative difference (L1) of a row's features: %.1e; LESS' cosines move by %.1e", worst, moved)
    if args.dtype == "float32" and not (worst <= TOLERANCE and moved <= 6 / PROJECTED**0.5):
        raise SystemExit(f"contenders disagree: {checked}, LESS' cosines by {moved}")
    timed = alternate(runs, args.repeats, CPU, logger)
    table, headline = summarise(timed, tokens)
    lines = speed_table(table) + ["", f"LESS runs on {len(subset)} of {len(samples)} rows, set against ours on those."]
    logger.info("\n%s", "\n".join(lines + [f"{name}: {RATIO.format(**found)}" for name, found in headline.items()]))
    if args.out is not None:
        result = {"contenders": __doc__.split("\n\n")[1].split("\n"), "machine": about, "settings": settings,
                  "relative_difference": checked, "less_cosine": moved, "tokens": tokens, "seconds": timed,
                  "table": table, "ratios": headline}  # fmt: skip
        write_json(args.out, result)


if __name__ == "__main__":
    main()
