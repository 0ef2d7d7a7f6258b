"""Draw the demo's pool and targets from the labelled pool; only rows under permissive licences.

    python recipes/tiny/make_demo_data.py --data DIR --out hf_neuronselect/assets/demo

``DIR`` has ``pool.jsonl.gz``, ``pool_meta.jsonl.gz`` (``licence_class`` by ``id``) and ``targets/``.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset

# Sources that count as right, fixed before anything was selected.
RELATED = {
    "gsm8k": ["gsm8k_train", "flan_cot_aqua"],
    "mbpp": ["mbpp_train", "gpteacher_code"],
    "humaneval": ["mbpp_train", "gpteacher_code"],
    "tydiqa": ["arcd", "afriqa"],
}
# Each group is about 6 % of the pool, so that random picks score about 0.06.
SHARES = {"gsm8k_train": 160, "flan_cot_aqua": 80, "mbpp_train": 60, "gpteacher_code": 180, "arcd": 120, "afriqa": 120}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pool = load_dataset("json", data_files=str(args.data / "pool.jsonl.gz"), split="train")
    meta = load_dataset("json", data_files=str(args.data / "pool_meta.jsonl.gz"), split="train")
    permissive = {i for i, licence in zip(meta["id"], meta["licence_class"], strict=True) if licence == "permissive"}
    allowed = np.asarray([i in permissive for i in pool["id"]])
    source = np.asarray(pool["source"])
    draw = np.random.default_rng(args.seed)
    picked = [draw.choice(np.flatnonzero(allowed & (source == name)), n, replace=False) for name, n in SHARES.items()]
    others = np.flatnonzero(allowed & ~np.isin(source, list(SHARES)))
    picked.append(draw.choice(others, args.rows - sum(SHARES.values()), replace=False))
    rows = pool.select(draw.permutation(np.concatenate(picked)))
    (args.out / "targets").mkdir(parents=True, exist_ok=True)
    _write(rows, args.out / "pool.parquet")
    for name in RELATED:
        target = load_dataset("json", data_files=str(args.data / "targets" / f"{name}.jsonl.gz"), split="train")
        _write(target, args.out / "targets" / f"{name}.parquet")
    (args.out / "related_sources.json").write_text(json.dumps(RELATED, indent=1) + "\n")
    names, counts = np.unique(np.asarray(rows["source"]), return_counts=True)
    logging.info("%d rows: %s", len(rows), dict(zip(names.tolist(), counts.tolist(), strict=True)))


def _write(rows: Dataset, path: Path) -> None:
    rows.to_parquet(path)
    logging.info("%s: %d rows, %.2f MB", path.name, len(rows), path.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
