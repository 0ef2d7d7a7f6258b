"""What all representation methods cost in one pass, as a multiple of the dearest of them alone.

    python benchmarks/one_pass.py --model MODEL --sae SAE --pool pool.jsonl.gz --dtype bfloat16 --out one_pass_smollm2.json

Each method's signals, and all of them together, over the same prepared rows in alternating runs of one process.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from statistics import median

import torch
from common import RATIO, alternate, count, described, machine, plain_logging, ratio, read_pool, usable_rows, write_json

from hf_neuronselect import NeuronFeatureExtractor

logger = logging.getLogger("one_pass")
SIGNALS = {
    "mona": ["mona"],
    "hidden": ["hidden"],
    "polysemantic": ["polysemantic"],
    "rds-plus": ["rds_plus"],
    "nag": ["strongest_neurons"],
    "nait": ["nait"],
    "nait-contrast": ["content_mean", "answer_mean"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sae", required=True)
    parser.add_argument("--pool", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plain_logging(logger)
    every = list(dict.fromkeys(name for names in SIGNALS.values() for name in names))
    extractor = NeuronFeatureExtractor.from_pretrained(args.model, sae=args.sae, dtype=args.dtype, features=every)
    prepared = extractor.prepare(usable_rows(extractor, read_pool(args.pool, args.rows, 0)))
    about, tokens = machine(torch.device("cpu")), count(prepared.given["forward"])
    settings = {"model": extractor.extraction.model.id, "rows": args.rows, "tokens": tokens, "dtype": args.dtype}
    logger.info("%s", described(about, settings))
    runs = {name: partial(extractor.with_features(names).compute, prepared) for name, names in SIGNALS.items()}
    runs["all"] = partial(extractor.compute, prepared)
    timed = alternate(runs, args.repeats, torch.device("cpu"))
    dearest = max(SIGNALS, key=lambda name: median(timed[name]))
    found = {f"time of all / {name}": ratio(timed["all"], timed[name]) for name in SIGNALS}
    for name, one in found.items():
        logger.info("%s: %s", name, RATIO.format(**one))
    logger.info("dearest: %s", dearest)
    if args.out is not None:
        result = {"machine": about, "settings": settings, "seconds": timed, "ratios": found, "dearest": dearest}
        write_json(args.out, result)


if __name__ == "__main__":
    main()
