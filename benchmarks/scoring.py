"""Score several targets over a store of sparse rows, compared with decoding it, scipy.sparse and torch.

Rows are random: sorted uniform latents with half-normal values, in shards as `extract` writes them (float16).

- decode: only read the same columns of the same files with pyarrow, row group by row group.
- ours: check the shards (a digest of all bytes), decode ahead in a thread, score all targets in one sweep.
- in memory, on the first rows: ours, scipy.sparse (one minimum and one sum per target over the CSR arrays) and dense
  torch (``torch.minimum(rows, prototype).sum(1)``, not counting the conversion to dense rows).
- peak memory of a process that scores part of the store, and all of it.

Results are compared with each other first. Files are read from the page cache, which an uncounted first pass fills.

    python benchmarks/scoring.py --work FOLDER --rows 1000000 --out benchmarks/scoring.json      # needs scipy, 5 GB of disk
"""

from __future__ import annotations

import argparse
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse
import torch
from common import RATIO, alternate, described, machine, plain_logging, ratio, spread, write_json
from datasets import Dataset

from hf_neuronselect.methods import make_method
from hf_neuronselect.rows.formats import row_format
from hf_neuronselect.rows.identity import rows_digest
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.store import store as stores
from hf_neuronselect.store.shards import Stamp, shard_name, shard_ranges, write_shard
from hf_neuronselect.store.store import FeatureStore

logger = logging.getLogger("scoring")

LATENTS, SHARD_ROWS = 131_072, 4096
COLUMNS = ["mona_indices", "mona_values", "skip"]
WANTED = {"mona": "0" * 16}
FORMAT = row_format(["text"])
IN_MEMORY, DENSE = 20_000, 1000
TOLERANCE = 1e-5


def random_table(rows: int, nonzeros: int, seed: int) -> pa.Table:
    draw = np.random.default_rng(seed)
    # Draw steps whose sum stays below the number of latents.
    steps = draw.integers(1, int(1.8 * LATENTS) // nonzeros, size=(rows, nonzeros), dtype=np.int32)
    latents = np.cumsum(steps, axis=1, dtype=np.int32)
    assert latents.max() < LATENTS
    values = np.abs(draw.standard_normal((rows, nonzeros), dtype=np.float32)).astype(np.float16)
    offsets = np.arange(0, rows * nonzeros + 1, nonzeros, dtype=np.int32)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(part.ravel())) for part in (latents, values)]
    return pa.table([*lists, pa.nulls(rows, pa.string())], names=COLUMNS)


@cache
def pool_of(rows: int) -> Dataset:
    """The pool that the store is of: a store is checked against its rows."""
    return Dataset(pa.table({"text": [f"row {i}" for i in range(rows)]}))


def make_store(folder: Path, rows: int, nonzeros: int, seed: int) -> None:
    """Shards that are there already stay."""
    pool = pool_of(rows)
    ((signal, identity),) = WANTED.items()
    about = {"id": f"random-{seed}", "commit": f"{rows}x{nonzeros}"}
    stores._open_store(folder, pool, about, SHARD_ROWS)
    place = folder / f"{signal}-{identity}"
    place.mkdir(exist_ok=True)
    (place / stores.SIGNAL).write_text("{}\n")
    for number, part in enumerate(shard_ranges(rows, SHARD_ROWS)):
        if not (place / shard_name(number)).exists():
            table = random_table(len(part), nonzeros, seed + number)
            digest = rows_digest(pool, FORMAT, part)
            stamp = Stamp(signal, identity, number, part.start, len(part), digest, SHARD_ROWS)
            write_shard(place / shard_name(number), table, stamp)


def batch_of(table: pa.Table) -> RowBatch:
    n = len(table)
    return RowBatch(np.arange(n), np.ones(n, bool), {name: table[name] for name in COLUMNS})


def tables(folder: Path) -> Iterator[pa.Table]:
    """The store, checked against its pool, read as a selection reads it."""
    store = FeatureStore(folder)
    for found in store.batches(WANTED, pool_of(len(store)), FORMAT):
        yield found["mona"]


def sweep(folder: Path, targets: Mapping[str, Any], rows: int | None = None) -> np.ndarray:
    """Score the store's first rows (default all): float64 ``[rows, targets]``."""
    score = make_method("mona", {}).scorer(targets)
    found: list[np.ndarray] = []
    done = 0
    for table in tables(folder):
        found.append(np.stack([*score(batch_of(table)).values()], axis=1))
        done += len(table)
        if rows is not None and done >= rows:
            break
    return np.concatenate(found)


def decode(folder: Path) -> None:
    """The columns that scoring reads, and nothing else."""
    for path in sorted(folder.glob("*/shard-*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            file.read_row_group(group, COLUMNS)


def csr_scores(rows: scipy.sparse.csr_array, targets: Mapping[str, Any]) -> np.ndarray:
    """Compute Jaccard with scipy: for each target the minimum at each nonzero, summed by row."""
    sums, scores = rows.sum(axis=1), []
    for target in targets.values():
        proto = target["prototype"]
        least = scipy.sparse.csr_array(
            (np.minimum(rows.data, proto[rows.indices]), rows.indices, rows.indptr), rows.shape
        )
        shared = least.sum(axis=1)
        scores.append(shared / (sums + proto.sum() - shared))
    return np.stack(scores, axis=1)


def dense_scores(rows: torch.Tensor, protos: torch.Tensor) -> np.ndarray:
    scores = []
    for proto in protos:
        shared = torch.minimum(rows, proto).sum(1)
        scores.append(shared / (rows.sum(1) + proto.sum() - shared))
    return torch.stack(scores, dim=1).numpy()


def some_targets(count: int, nonzeros: int) -> dict[str, Any]:
    """Make prototypes of ten random exemplars each."""
    method = make_method("mona", {})
    return {str(i): method.fit(batch_of(random_table(10, nonzeros, 10**6 + i))) for i in range(count)}


def peak_mb(folder: Path, targets: int, nonzeros: int, rows: int) -> float:
    """Measure the peak memory of a separate process that scores the store's first rows."""
    words = ["--work", str(folder.parent), "--targets", str(targets), "--nonzeros", str(nonzeros), "--peak", str(rows)]
    said = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return float(said.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the store; an existing store is used")
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--nonzeros", type=int, default=1000)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plain_logging(logger)
    folder, targets = args.work / "store", some_targets(args.targets, args.nonzeros)
    if args.peak is not None:
        sweep(folder, targets, args.peak)
        # Not ru_maxrss: a process inherits it from its parent.
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        sys.stdout.write(str(int(peak[1]) / 1024 if peak else "nan"))
        return
    device = torch.device("cpu")
    make_store(folder, args.rows, args.nonzeros, 0)
    about = machine(device) | {"numpy": np.__version__, "pyarrow": pa.__version__, "scipy": scipy.__version__}
    settings = {"rows": args.rows, "nonzeros": args.nonzeros, "targets": args.targets, "latents": LATENTS,
                "bytes": sum(path.stat().st_size for path in folder.glob("*/shard-*.parquet")), "repeats": args.repeats}  # fmt: skip
    logger.info("%s", described(about, settings))

    parts = []
    for table in tables(folder):
        parts.append(table)
        if sum(map(len, parts)) >= IN_MEMORY:
            break
    few = batch_of(pa.concat_tables(parts).combine_chunks())
    rows = few.sparse("mona")
    shape = (len(few), LATENTS)
    csr = scipy.sparse.csr_array((rows.values.astype(np.float32), rows.indices, rows.indptr), shape)
    dense = torch.from_numpy(csr[:DENSE].toarray())
    protos = torch.zeros(args.targets, LATENTS)
    padded = {}
    for i, (name, target) in enumerate(targets.items()):
        protos[i, : len(target["prototype"])] = torch.from_numpy(target["prototype"])
        padded[name] = {"prototype": protos[i].numpy()}
    score = make_method("mona", {}).scorer(targets)
    ours = np.stack([*score(few).values()], axis=1)
    gaps = {
        "scipy.sparse": float(np.abs(csr_scores(csr, padded) / ours - 1).max()),
        "dense torch": float(np.abs(dense_scores(dense, protos) / ours[:DENSE] - 1).max()),
        "ours, from the store": float(np.abs(sweep(folder, targets, len(few))[: len(few)] / ours - 1).max()),
    }
    logger.info("largest relative difference: %s", gaps)
    if not max(gaps.values()) <= TOLERANCE:
        raise SystemExit(f"contenders disagree by more than {TOLERANCE}")

    runs: dict[str, Callable[[], Any]] = {
        "store: pyarrow decodes": partial(decode, folder),
        f"store: ours scores {args.targets} targets": partial(sweep, folder, targets),
    }
    decode(folder)
    timed = alternate(runs, args.repeats, device, logger)
    first = {
        "in memory: ours": lambda: score(few),
        "in memory: scipy.sparse": partial(csr_scores, csr, padded),
        "in memory: dense torch": partial(dense_scores, dense, protos),
    }
    timed |= alternate(first, args.repeats, device)
    counts = dict.fromkeys(runs, args.rows) | dict.fromkeys(first, len(few)) | {"in memory: dense torch": DENSE}
    pace = {name: [t / counts[name] for t in times] for name, times in timed.items()}
    decoded, swept = runs
    headline = {
        "time of ours / decoding alone": ratio(pace[swept], pace[decoded]),
        "time of scipy.sparse / ours, in memory": ratio(pace["in memory: scipy.sparse"], pace["in memory: ours"]),
        "time of dense torch / ours, in memory": ratio(pace["in memory: dense torch"], pace["in memory: ours"]),
    }
    sizes = [size for size in (args.rows // 10, args.rows // 2, args.rows) if size]
    peaks = {str(size): peak_mb(folder, args.targets, args.nonzeros, size) for size in sizes}
    for name, times in pace.items():
        logger.info("| %s | %s rows/s |", name, f"{1 / median(times):,.0f}")
    for name, found in headline.items():
        logger.info("%s: %s", name, RATIO.format(**found))
    logger.info("peak MB by rows: %s", peaks)
    if args.out is not None:
        speeds = {name: spread([1 / p for p in times]) for name, times in pace.items()}
        write_json(args.out, {"machine": about, "settings": settings, "relative_difference": gaps, "seconds": timed,
                              "rows_per_s": speeds, "ratios": headline, "peak_mb_by_rows": peaks})  # fmt: skip


if __name__ == "__main__":
    main()
