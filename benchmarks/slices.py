"""Write the random samples that the records of ``neuronselect compare`` are about: rows of the pool, exemplars, held-out rows."""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

import numpy as np

POOL_ROWS = (1_000, 2_000, 5_000)
EXEMPLARS = 50
HELD_OUT = 50
OWN = ("gsm8k_train", "mbpp_train")


def write(path: Path, lines: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with pool.jsonl.gz, targets/ and eval/")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pool = gzip.open(args.data / "pool.jsonl.gz").readlines()
    order = np.random.default_rng(1).permutation(len(pool))  # smaller samples are the beginnings of larger ones
    for rows in POOL_ROWS:
        write(args.out / f"pool_{rows}.jsonl", [pool[i] for i in order[:rows]])
    write(args.out / "pool_out.jsonl", [line for line in pool if json.loads(line)["source"] not in OWN])
    for file in sorted((args.data / "targets").glob("*.jsonl.gz")):
        lines = gzip.open(file).readlines()
        few = lines if len(lines) <= EXEMPLARS else random.Random(1).sample(lines, EXEMPLARS)
        write(args.out / "targets" / file.name.removesuffix(".gz"), few)
    for file in sorted((args.data / "eval").glob("*.jsonl.gz")):
        lines = gzip.open(file).readlines()
        write(args.out / "held_out" / file.name.removesuffix(".gz"),
              [lines[i] for i in np.random.default_rng(0).permutation(len(lines))[:HELD_OUT]])  # fmt: skip


if __name__ == "__main__":
    main()
