"""Which sources the picked 5 % of a labelled pool come from: a table of methods and controls by target.

    neuronselect extract --pool DATA/pool.jsonl.gz --method 'mona,nait(reading=paper),polysemantic,hidden' --out STORE
    python benchmarks/precision.py --data DATA --store STORE --out results.json

``related_sources.json`` says which sources count as right for a target; it was fixed before the first run.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import numpy as np
from datasets import disable_progress_bars

from hf_neuronselect import NeuronSelector, NeuronSelectWarning
from hf_neuronselect.pipelines import bundled
from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.store.store import FeatureStore

METHODS = {
    "mona": {},
    "nait": {"reading": "paper"},  # to the letter; benchmarks/nait.py has all readings
    "nait, mean drift": {"reading": "paper", "direction": "mean"},
    "polysemantic": {},
    "hidden": {},
    "longest": {},
}
DRAWS = 20


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="pool.jsonl.gz and targets/")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.05)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--selections", type=Path, default=None, help="folder to which every selection is written, too")
    args = parser.parse_args()
    disable_progress_bars()
    warnings.simplefilter("ignore", NeuronSelectWarning)

    related = json.loads((Path(__file__).parent / "related_sources.json").read_text())
    pool = load_rows(str(args.data / "pool.jsonl.gz"))
    rows, store = pool.data, FeatureStore(args.store)
    source, lengths = np.asarray(rows["source"]), np.asarray(store.dataset("tokens")["n_tokens"])
    extractor = bundled.extractor(features=("mona", "nait_template", "polysemantic", "hidden"))
    record: dict = {"signals": extractor.identities, "ratio": args.ratio, "rows": len(rows), "related": related,
                    "pool_mean_tokens": float(lengths.mean()), "targets": {}}  # fmt: skip
    random = [
        NeuronSelector("random", seed=seed).select(rows, ratio=args.ratio, features=store).indices
        for seed in range(DRAWS)
    ]
    for target, sources in related.items():
        right = np.isin(source, sources)
        draws = [float(right[indices].mean()) for indices in random]
        exemplars = load_rows(str(args.data / "targets" / f"{target}.jsonl.gz"), option="target").data
        found = {
            "base rate": float(right.mean()),
            "random": {"mean": float(np.mean(draws)), "95th percentile": float(np.percentile(draws, 95))},
        }
        for label, params in METHODS.items():
            started = time.perf_counter()
            name = label.split(",")[0]
            selector = NeuronSelector(name, **params).fit({target: exemplars}, extractor=extractor)
            selection = selector.select(rows, ratio=args.ratio, features=store, source=pool.source)
            found[label] = {
                "precision": float(right[selection.indices].mean()),
                "mean_tokens": float(lengths[selection.indices].mean()),
                "seconds": round(time.perf_counter() - started, 2),
                "left_out": selection.provenance.counts.left_out,
            }
            if args.selections is not None:
                selection.save_pretrained(args.selections / f"{target}-{label.replace(', ', '-').replace(' ', '-')}")
        record["targets"][target] = found
        logging.info("%s: %s", target, {k: v["precision"] for k, v in found.items() if k in METHODS})
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    for line in as_markdown(record):
        logging.info("%s", line)


def as_markdown(record: dict) -> list[str]:
    """Format precision, and the mean tokens of the picked rows, as a Markdown table."""
    names = list(METHODS)
    lines = [
        f"Share of a target's own sources in the picked {record['ratio']:.0%} of {record['rows']:,} rows "
        f"(mean tokens of the picked rows in brackets; the pool's mean is {record['pool_mean_tokens']:.0f}).",
        "",
        "| target | base rate | random, 95th pct | " + " | ".join(names) + " |",
        "|---|--:|--:|" + "--:|" * len(names),
    ]
    for target, found in record["targets"].items():
        cells = [f"{found[n]['precision']:.2f} ({found[n]['mean_tokens']:.0f})" for n in names]
        shown = [target, f"{found['base rate']:.3f}", f"{found['random']['95th percentile']:.3f}", *cells]
        lines.append("| " + " | ".join(shown) + " |")
    return lines


if __name__ == "__main__":
    main()
