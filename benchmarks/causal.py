r"""Are the features that explain picks the ones that the task uses? Their zeroing against random features, on held-out rows.

For each target the method selects 5 % of a sample of the pool, with half of the target's exemplars. The 16 features that explain
the picks (the largest mean share of the sums that the scores are made from) are zeroed, at every token, and the rise of the loss
on the answers of the other half is read, and that on the held-out half of each other target. Ten draws of random features of
like activity that add as much to the activation are zeroed on the same rows.

What counts was written before the first run:

- used: the 95 % interval of (rise without the features - rise without random ones), over rows and draws, is above 0, and the
  features take off less than 1.5 times as much of the activation as the random ones.
- the task's own: that difference, on the target's rows, is above that on each other target's rows, intervals apart. A feature
  may be used without being the task's own: by all texts.
- MoNA's ``centre=pool``, which counts only what lies above the pool's mean, should name more of the task's own features than MoNA
  alone; if it does not, that is said.

    python benchmarks/causal.py --data DATA --out benchmarks/causal_bundled.json
    python benchmarks/causal.py --data DATA --model SMOLLM2 --sae auto --dtype bfloat16 --rows 300 \
        --targets gsm8k,mbpp --out benchmarks/causal_smollm2.json
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import described, machine, plain_logging, write_json
from datasets import Dataset, disable_progress_bars

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelector, NeuronSelectWarning
from hf_neuronselect.core.intervals import Interval
from hf_neuronselect.core.options import ExtractionOptions
from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.selection.causal import CausalOptions, causal_check

logger = logging.getLogger("causal")

METHODS: dict[str, dict[str, Any]] = {"mona": {}, "mona, centre=pool": {"centre": "pool"}}
K, DRAWS, RATIO = 16, 10, 0.05


def halves(rows: Dataset, most: int | None) -> tuple[Dataset, Dataset]:
    """Rows to fit on, and held-out ones."""
    order = np.random.default_rng(0).permutation(len(rows))
    middle = len(rows) // 2
    one, other = order[:middle], order[middle:]
    return rows.select(one[:most]), rows.select(other[:most])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pool.jsonl and targets/")
    parser.add_argument("--model", help="default the bundled one")
    parser.add_argument("--sae")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=1000, help="size of a random sample of the pool")
    parser.add_argument("--targets", default="gsm8k,mbpp,xquad", help="names of files in targets/")
    parser.add_argument("--exemplars", type=int, help="at most so many in each half")
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plain_logging(logger)
    disable_progress_bars()
    warnings.simplefilter("ignore", NeuronSelectWarning)
    started = time.perf_counter()
    pool = load_rows(str(args.data / "pool.jsonl")).data.shuffle(seed=0).select(range(args.rows))
    targets = {
        name: halves(load_rows(str(args.data / "targets" / f"{name}.jsonl")).data, args.exemplars)
        for name in args.targets.split(",")
    }
    options = ExtractionOptions(
        model=args.model, sae=args.sae, dtype=args.dtype, max_length=args.max_length, device="cpu"
    )
    extractor = NeuronFeatureExtractor.from_options(options, ("mona",))
    read = pool.map(extractor, batched=True)
    logger.info("read the pool: %.0f s", time.perf_counter() - started)
    result: dict[str, Any] = {
        "machine": machine(torch.device("cpu")), "model": extractor.extraction.model.id if args.model else "bundled",
        "dtype": args.dtype, "rows": args.rows, "max_length": args.max_length, "k": K, "draws": DRAWS, "checks": {},
    }  # fmt: skip
    for label, given in METHODS.items():
        for name, (fitted, _held_out) in targets.items():
            selector = NeuronSelector("mona", **given).fit({name: fitted}, extractor=extractor)
            selection = selector.select(read, extractor=extractor, ratio=RATIO)
            explainer = selection.explainer(extractor=extractor, exemplars=fitted, pool=read)
            result["checks"].setdefault(label, {})[name] = {
                of: causal_check(explainer, CausalOptions(K, DRAWS), held_out).record()
                for of, (_, held_out) in targets.items()
            }
            logger.info("%s, %s: %.0f s", label, name, time.perf_counter() - started)
    for line in as_markdown(result):
        logger.info("%s", line)
    logger.info("%s", described(result["machine"]))
    if args.out is not None:
        write_json(args.out, result)


def told(values: Sequence[float]) -> str:
    return Interval(*values).told("+.3f")


def as_markdown(result: Mapping[str, Any]) -> list[str]:
    """Format the check on each target's own rows, and the difference on the other targets' rows."""
    lines = ["| features of | rise without them | without random ones | difference | of the activation | outcome | difference on other tasks |",
             "|---|--:|--:|--:|--:|---|---|"]  # fmt: skip
    for label, checks in result["checks"].items():
        for name, on in checks.items():
            own = on[name]
            others = ", ".join(f"{of} {told(one['above'])}" for of, one in on.items() if of != name)
            lines.append(
                f"| {label}: {name}, {own['rows']} rows | {told(own['rise'])} | {told(own['random_rise'])} | {told(own['above'])} | "
                f"{own['taken']:.0%} / {own['random_taken']:.0%} | {own['outcome']} | {others} |"
            )
    return lines


if __name__ == "__main__":
    main()
