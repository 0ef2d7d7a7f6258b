"""Does fine-tuning on a selection beat fine-tuning on other rows? Same base, steps and tokens, three seeds.

    neuronselect extract --pool POOL --method 'mona,nait(reading=paper)' --out STORE
    python benchmarks/sft.py POOL STORE TARGETS EVAL --slice 12000 --out benchmarks/sft.json

The learning rate is chosen on random subsets only (with seeds not used again), by the loss on held-out rows of the POOL,
not of the target. The loss is on answers; evaluation rows that are also in a subset are removed. Each finished run is
added to the output, and is not repeated when the script is started again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import cpu_name
from datasets import Dataset, concatenate_datasets

from hf_neuronselect import NeuronSelector
from hf_neuronselect.pipelines import bundled
from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.store.store import FeatureStore
from hf_neuronselect.training.config import TrainConfig
from hf_neuronselect.training.evaluation import evaluate_models, without_trained
from hf_neuronselect.training.models import base_source
from hf_neuronselect.training.sft import train_adapter

RATIO = 0.05
SEEDS = (0, 1, 2)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
RATE_SEEDS = (100, 101)
SETTINGS = {
    # Rows are packed to one length, so every step has the same number of tokens for all arms.
    "packing": True, "max_length": 512, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
    "attn_implementation": "eager", "lora_dropout": 0.0, "lora_r": 16, "lora_alpha": 32, "save_strategy": "no",
    "logging_steps": 10, "disable_tqdm": True,
}  # fmt: skip


def subsets(pool: Dataset, featured: Dataset, exemplars: Dataset, seed: int) -> dict[str, np.ndarray]:
    """Row numbers of each arm. Only `random` and `full` depend on the seed (`full` by its training order)."""
    extractor = bundled.extractor(features=("mona", "nait_template"))
    found: dict[str, np.ndarray] = {}
    for method, options in {"mona": {}, "nait": {"reading": "paper"}}.items():
        selector = NeuronSelector(method, **options).fit({"target": exemplars}, extractor=extractor)
        selection = selector.select(featured, ratio=RATIO)
        found[method] = selection.indices
        if method == "mona":
            table = selection.scores
            usable = np.flatnonzero([why is None for why in table.column("excluded").to_pylist()])
            scores = table.column("score").to_numpy()[usable]
            found["mona, lowest"] = usable[np.argsort(scores, kind="stable")[: len(selection)]]
            leaked = {i for i, why in enumerate(table.column("excluded").to_pylist()) if why == "leak"}
    longest = NeuronSelector("longest")
    longest.extractor = extractor  # used to count tokens
    found["longest"] = np.asarray([i for i in longest.select(featured, ratio=RATIO).indices if i not in leaked])
    draw = NeuronSelector("random", seed=seed).select(pool, ratio=RATIO)
    found["random"] = np.asarray([i for i in draw.indices if i not in leaked])
    found["full"] = np.asarray([i for i in range(len(pool)) if i not in leaked])
    return found


def one_run(rows: Dataset, held_out: dict[str, Dataset], rate: float, steps: int, seed: int) -> dict[str, Any]:
    """Train and evaluate one arm; return its numbers."""
    folder = Path(tempfile.mkdtemp(prefix="sft-"))
    config = TrainConfig.from_section(SETTINGS | {"learning_rate": rate, "max_steps": steps, "seed": seed})
    started = time.perf_counter()
    record = train_adapter(rows, folder / "adapter", config)
    found = evaluate_models(base_source(None), {"run": folder / "adapter"}, held_out, trained=[rows])
    shutil.rmtree(folder)
    share = record.results["answer_tokens"] / record.results["tokens"]
    return {
        "losses": {row.data: row.value for row in found if row.model == "run"},
        "base": {row.data: row.value for row in found if row.model == "base"},
        "taken_out": {row.data: row.taken_out for row in found if row.model == "run"},
        "rows": len(rows),
        "tokens_a_pass": record.results["tokens"],
        "answer_share": round(share, 4),
        "last_training_loss": record.losses[-1][1] if record.losses else None,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pool", "store", "targets", "eval"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--slice", type=int, default=12000, help="rows drawn from the pool, once for all arms")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--eval-rows", type=int, default=300)
    parser.add_argument("--names", default="gsm8k,mbpp")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "sft.json")
    args = parser.parse_args()

    whole = load_rows(str(args.pool))
    drawn = np.sort(np.random.default_rng(0).permutation(len(whole.data))[: args.slice + 300])
    held = np.random.default_rng(1).permutation(len(drawn))[:300]  # held out to choose the learning rate
    kept = np.setdiff1d(np.arange(len(drawn)), held)
    store = FeatureStore(args.store).dataset("mona", "nait_template", "tokens")
    pool = whole.data.select(drawn[kept]).flatten_indices()
    featured = concatenate_datasets([pool, store.select(drawn[kept]).flatten_indices()], axis=1)
    general = whole.data.select(drawn[held]).flatten_indices()

    state: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"runs": {}}
    state |= {
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "slice": len(pool), "ratio": RATIO, "steps": args.steps, "tokens_a_step": 8 * 512, "settings": SETTINGS,
        "eval_rows": args.eval_rows, "pool": whole.about,
    }  # fmt: skip

    def run(key: str, rows: Dataset, held_out: dict[str, Dataset], rate: float, seed: int) -> dict[str, Any]:
        if key not in state["runs"]:
            state["runs"][key] = one_run(rows, held_out, rate, args.steps, seed)
            args.out.write_text(json.dumps(state, indent=1) + "\n")
        return state["runs"][key]

    for rate in RATES:
        for seed in RATE_SEEDS:
            rows = pool.select(NeuronSelector("random", seed=seed).select(pool, ratio=RATIO).indices)
            clean, _ = without_trained(general, [rows])
            run(f"rate {rate:g} seed {seed}", rows.flatten_indices(), {"pool": clean}, rate, seed)
    rate = min(
        RATES,
        key=lambda r: np.mean([state["runs"][f"rate {r:g} seed {s}"]["losses"]["pool"] for s in RATE_SEEDS]),
    )
    state["learning_rate"] = rate

    for name in args.names.split(","):
        exemplars = load_rows(str(args.targets / f"{name}.jsonl.gz")).data
        questions = load_rows(str(args.eval / f"{name}.jsonl.gz")).data
        held_out = {name: questions.select(range(min(args.eval_rows, len(questions))))}
        for seed in SEEDS:
            for arm, indices in subsets(pool, featured, exemplars, seed).items():
                run(f"{name} {arm} seed {seed}", pool.select(indices).flatten_indices(), held_out, rate, seed)
    args.out.write_text(json.dumps(state, indent=1) + "\n")


if __name__ == "__main__":
    main()
