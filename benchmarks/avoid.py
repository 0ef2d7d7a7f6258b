"""Does ``--avoid`` keep a model from getting worse at another task? The demo's recipe, five sets of rows, three seeds.

    python benchmarks/avoid.py --work FOLDER --out benchmarks/avoid.json

Fine-tuning on rows picked for GSM8K makes MBPP worse (docs/benchmarks.md). ``recipes/tiny_mona.yaml`` is run, with 30 steps, on
rows picked for gsm8k (rows are read whole, as in the demo), for gsm8k with mbpp avoided at the default weight 1, for both as targets, at random (drawn anew for
each seed, without the exemplars of either task), and on the longest rows. Other things are equal: base, number of rows, steps, learning rate. Losses are on
the recipe's 200 held-out answers of each task; answers whose question is in any set of rows are removed for all.

What counts as right, written before the first run (``verdict``). All differences are within a seed; intervals are Student's t
over the three seeds, 95 %. They say how sure a difference is for these rows and answers, not for others.

- There is something to mend if the interval of (mbpp after gsm8k picks - mbpp before) lies above 0.
- A set of rows mends it if the interval of (mbpp after gsm8k picks - mbpp after these rows) lies above 0, and the mean gain on
  gsm8k is at least half of what gsm8k picks gain. If the gain is less, it mends at too high a price.
- It makes it worse if that interval lies below 0. Otherwise nothing is shown.

``picks`` compares the rule of ``--avoid`` with the plain difference of standardised scores: the share of picked rows
from sources that count as right for the target, and for the avoided target, by method, in both directions.

A run that was stopped goes on: signals and adapters stay in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, plain_logging, write_json
from datasets import Dataset

from hf_neuronselect import NeuronSelector
from hf_neuronselect.core import bundled as places
from hf_neuronselect.core.folders import TRAINING_RECORD
from hf_neuronselect.core.provenance import EvaluationRow
from hf_neuronselect.core.recipes import read_recipe
from hf_neuronselect.pipelines import bundled
from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.selection.avoid import standardised
from hf_neuronselect.store.store import FeatureStore, write_store
from hf_neuronselect.training.config import TrainConfig
from hf_neuronselect.training.evaluation import BASE, evaluate_models
from hf_neuronselect.training.models import base_source
from hf_neuronselect.training.sft import train_adapter

logger = logging.getLogger("avoid")
ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "tiny_mona.yaml"
WANTED, UNWANTED = "gsm8k", "mbpp"
PLAIN, AVOID, BOTH, RANDOM, LONGEST = "gsm8k", "gsm8k, avoiding mbpp", "gsm8k and mbpp", "random", "longest"
RATIO, STEPS, SEEDS = 0.05, 30, (0, 1, 2)
T95 = 4.303  # two-sided, 2 degrees of freedom
METHODS = ("mona", "hidden", "bm25")


def with_interval(values: np.ndarray) -> dict[str, float]:
    """Mean of the seeds and its 95 % interval."""
    mean, half = float(values.mean()), float(T95 * values.std(ddof=1) / np.sqrt(len(values)))
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def verdict(losses: Mapping[str, Mapping[str, np.ndarray]], base: Mapping[str, float], arm: str) -> dict[str, Any]:
    """Whether an arm's rows mend what gsm8k picks do to mbpp: see above.

    Args:
        losses: arm -> data -> loss by seed. base: data -> loss of the untouched model.
    """
    rise = with_interval(losses[PLAIN][UNWANTED] - base[UNWANTED])
    mended = with_interval(losses[PLAIN][UNWANTED] - losses[arm][UNWANTED])
    gain = with_interval(base[WANTED] - losses[arm][WANTED])
    kept = gain["mean"] / float(np.mean(base[WANTED] - losses[PLAIN][WANTED]))
    if rise["low"] <= 0:
        word = "nothing to mend"
    elif mended["low"] > 0:
        word = "mends" if kept >= 0.5 else "mends at too high a price"
    else:
        word = "makes it worse" if mended["high"] < 0 else "nothing is shown"
    return {"rise": rise, "mended": mended, "gain": gain, "gain_kept": round(kept, 3), "verdict": word}


def picks(pool: Dataset, targets: Mapping[str, Dataset], store: FeatureStore) -> list[dict[str, Any]]:
    """Sources of the picks: without ``--avoid``, with it, and by the plain difference."""
    related, source = places.related_sources(), np.asarray(pool["source"])
    found = []
    for method in METHODS:
        for one, other in ((WANTED, UNWANTED), (UNWANTED, WANTED)):

            def select(target: str, avoid: str | None, method: str = method) -> Any:
                avoided = None if avoid is None else {avoid: targets[avoid]}
                selector = NeuronSelector(method).fit({target: targets[target]}, avoid=avoided)
                return selector.select(pool, ratio=RATIO, features=store)

            plain, less = select(one, None), select(one, other)
            raw = plain.scores.column("score").to_numpy(zero_copy_only=False)
            lost = less.scores.column(f"avoided_{other}").to_numpy(zero_copy_only=False)
            free = np.asarray([why is None for why in less.scores.column("excluded").to_pylist()])
            difference = np.where(free, standardised(raw) - standardised(lost), -np.inf)
            rows = {"plain": plain.indices, "avoid": less.indices,
                    "difference": np.argsort(-difference, kind="stable")[: len(less)]}  # fmt: skip
            for rule, indices in rows.items():
                shares = {name: round(float(np.isin(source[indices], related[of]).mean()), 3)
                          for name, of in (("right", one), ("avoided", other))}  # fmt: skip
                found.append({"method": method, "target": one, "avoided_target": other, "rule": rule, **shares})
    return found


def arms(pool: Dataset, targets: Mapping[str, Dataset], store: FeatureStore, seed: int) -> dict[str, np.ndarray]:
    """Row numbers of each set of rows; only random ones depend on the seed."""
    wanted, both = {WANTED: targets[WANTED]}, {name: targets[name] for name in (WANTED, UNWANTED)}
    fitted = {
        PLAIN: NeuronSelector("mona").fit(wanted),
        AVOID: NeuronSelector("mona").fit(wanted, avoid={UNWANTED: targets[UNWANTED]}),
        BOTH: NeuronSelector("mona").fit(both),
    }
    found = {arm: one.select(pool, ratio=RATIO, features=store).indices for arm, one in fitted.items()}
    controls = {RANDOM: NeuronSelector("random", seed=seed), LONGEST: NeuronSelector("longest")}
    return found | {
        arm: one.fit(both).select(pool, ratio=RATIO, features=store if one.method.signals else None).indices
        for arm, one in controls.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for signals and adapters")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "avoid.json")
    args = parser.parse_args()
    plain_logging(logger)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    recipe = read_recipe(RECIPE)
    settings = {key: value for key, value in dict(recipe["train"]).items() if key not in ("controls", "save_steps")}
    settings |= {"max_steps": STEPS, "save_strategy": "no", "disable_tqdm": True}
    length = int(recipe["select"]["max_length"])
    pool, targets = bundled.pool(), bundled.targets()
    extractor = bundled.extractor(features=("mona", "hidden"))
    write_store(pool, extractor, args.work / "store", pool_about={})
    store = FeatureStore(args.work / "store")
    targets = {name: targets[name].map(extractor, batched=True) for name in (WANTED, UNWANTED)}
    rows = {seed: arms(pool, targets, store, seed) for seed in SEEDS}
    source = np.asarray(pool["source"])
    state: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"losses": {}, "verdicts": {}}
    state |= {
        "machine": machine(torch.device("cpu")), "recipe": RECIPE.name, "settings": settings, "ratio": RATIO, "seeds": SEEDS,
        "pool": len(pool), "rows": {arm: len(indices) for arm, indices in rows[0].items()},
        "common_rows": {arm: len(np.intersect1d(rows[0][PLAIN], indices)) for arm, indices in rows[0].items()},
        "sources": {arm: dict(Counter(source[indices].tolist()).most_common(6)) for arm, indices in rows[0].items()},
    }  # fmt: skip
    if "picks" not in state:
        state["picks"] = picks(pool, targets, store)
        write_json(args.out, state)
    logger.info("picks: %.0f s", time.perf_counter() - started)

    every = np.unique(np.concatenate([indices for of in rows.values() for indices in of.values()]))
    trained = pool.select(every).flatten_indices()
    held_out = {name: load_rows(str(ROOT / "recipes" / "data" / f"{name}_held_out.jsonl")).data
                for name in (WANTED, UNWANTED)}  # fmt: skip
    for arm in (PLAIN, AVOID, RANDOM, BOTH, LONGEST):
        if arm in state["losses"]:
            continue
        adapters: dict[str, Path] = {}
        for seed in SEEDS:
            folder = args.work / f"{arm}, seed {seed}".replace(", ", "-").replace(" ", "_")
            if not (folder / TRAINING_RECORD).is_file():
                picked = pool.select(rows[seed][arm]).flatten_indices()
                train_adapter(picked, folder, TrainConfig.from_section(settings | {"seed": seed}))
                logger.info("%s, seed %d: %.0f s", arm, seed, time.perf_counter() - started)
            adapters[str(seed)] = folder
        found = evaluate_models(base_source(None), adapters, held_out, trained=[trained], max_length=length)
        state["base"] = {row.data: row.value for row in found if row.model == BASE}
        state["held_out"] = {row.data: {"rows": row.rows, "taken_out": row.taken_out} for row in found}
        state["losses"][arm] = {name: by_seed(found, name) for name in held_out}
        if arm != PLAIN:
            losses = {one: {name: np.asarray(of["by_seed"]) for name, of in state["losses"][one].items()}
                      for one in (PLAIN, arm)}  # fmt: skip
            state["verdicts"][arm] = verdict(losses, state["base"], arm)
        write_json(args.out, state)
        logger.info("%s: %s", arm, state["verdicts"].get(arm, {}).get("verdict", ""))


def by_seed(found: Sequence[EvaluationRow], data: str) -> dict[str, Any]:
    """An arm's losses on one data set, with their mean and interval."""
    values = [row.value for seed in SEEDS for row in found if (row.model, row.data) == (str(seed), data)]
    return {"by_seed": values, **with_interval(np.asarray(values))}


if __name__ == "__main__":
    main()
