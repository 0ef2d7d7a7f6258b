"""How number formats change a selection: rank correlation and top 5 % overlap with float32, on a real pool.

- model dtype: the forward pass and the SAE in float32 or bfloat16, at the extractor's default token budget; and bfloat16
  at four times that budget on the pool's first rows, which shows how much a score depends on its batch.
- the time of each, on some of the rows, in alternating runs.
- value dtype: MoNA values stored in float32 or float16. Exemplars always have the pool's format.

Writing the stores to ``--work`` takes most of the time; a second run continues with the stores found there.

    python benchmarks/dtypes.py --data DATA --work FOLDER --out benchmarks/dtypes.json
    python benchmarks/dtypes.py --data DATA --work FOLDER --model SMOLLM2 --methods mona,nait,hidden --rows 300 \
        --out benchmarks/dtypes_smollm2.json
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from common import RATIO, alternate, count, described, machine, plain_logging, ratio, read_pool, write_json
from datasets import Dataset, disable_progress_bars

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelector, NeuronSelectWarning
from hf_neuronselect.core import bundled
from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.store.store import FeatureStore, write_store

logger = logging.getLogger("dtypes")

PART = 6000
WIDER = 4
TIMED = 64


def extractor_of(model: str, methods: Sequence[str], dtype: str, **options: Any) -> NeuronFeatureExtractor:
    return NeuronFeatureExtractor.from_pretrained(
        model, sae="auto", features=methods, dtype=dtype, value_dtype="float32", **options
    )


def stored(extractor: NeuronFeatureExtractor, rows: Dataset, about: Mapping[str, Any], folder: Path) -> FeatureStore:
    done = write_store(rows, extractor, folder, pool_about=about)
    logger.info("%s: %s", folder.name, done)
    return FeatureStore(folder)


def scores(
    store: FeatureStore, extractor: NeuronFeatureExtractor, targets: Mapping[str, Dataset], value_dtype: str
) -> dict[str, np.ndarray]:
    """``method, target`` -> float64 ``[rows]``, NaN where a row has no features."""
    options = replace(extractor.extraction.options, value_dtype=value_dtype)
    methods = [signal.name for signal in extractor.signals]
    same = NeuronFeatureExtractor(replace(extractor.extraction, options=options), methods)
    exemplars = {name: rows.map(same, batched=True) for name, rows in targets.items()}
    selectors = {name: NeuronSelector(name).fit(exemplars) for name in methods}
    scorers = {name: selector.method.scorer(selector.targets) for name, selector in selectors.items()}
    found: dict[str, list[np.ndarray]] = {}
    for tables in store.batches({name: store.identity_of(name) for name in methods}):
        batch, usable = batch_of(tables)
        if value_dtype == "float16" and "mona" in methods:
            rounded = batch.sparse("mona").values.astype(np.float16).astype(np.float32)
            batch = with_values(batch, rounded)
        for method, scorer in scorers.items():
            for target, one in scorer(batch).items():
                full = np.full(len(usable), np.nan)
                full[usable] = one
                found.setdefault(f"{method}, {target}", []).append(full)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def batch_of(tables: Mapping[str, pa.Table]) -> tuple[RowBatch, np.ndarray]:
    """The usable rows among a store's next ones, and which they are: bool ``[n]``."""
    usable = np.all([table["skip"].is_null().to_numpy() for table in tables.values()], axis=0)
    columns = {name: table[name] for table in tables.values() for name in table.column_names}
    return RowBatch(np.arange(len(usable)), usable, columns).only_usable(), usable


def with_values(batch: RowBatch, values: np.ndarray) -> RowBatch:
    rows = batch.sparse("mona")
    parts = np.split(values, rows.indptr[1:-1])
    indices = np.split(rows.indices, rows.indptr[1:-1])
    return replace(batch, columns={**batch.columns, "mona_indices": indices, "mona_values": parts})


def compared(one: np.ndarray, other: np.ndarray, ratio: float) -> dict[str, float]:
    """Spearman's correlation, overlap of the two top ``ratio``, and the largest change of a score over their spread."""
    ok = np.isfinite(one) & np.isfinite(other)
    a, b, k = one[ok], other[ok], max(1, int(ratio * len(one) + 0.5))
    ranks = [np.argsort(np.argsort(-x, kind="stable"), kind="stable") for x in (a, b)]
    return {
        "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
        "top_overlap": float(((ranks[0] < k) & (ranks[1] < k)).sum() / k),
        "largest_move": float(np.abs(a - b).max() / a.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="pool.jsonl.gz and targets/")
    parser.add_argument("--work", type=Path, required=True, help="folder for the stores")
    parser.add_argument("--model", default=str(bundled.MODEL), help="folder of a model whose SAE is found")
    parser.add_argument("--methods", default="mona,nait")
    parser.add_argument("--rows", type=int, help="size of a random sample of the pool; default all rows")
    parser.add_argument("--ratio", type=float, default=0.05)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plain_logging(logger)
    disable_progress_bars()
    warnings.simplefilter("ignore", NeuronSelectWarning)
    pool = load_rows(str(args.data / "pool.jsonl.gz"))
    rows = pool.data.shuffle(seed=0).select(range(args.rows)) if args.rows else pool.data
    sample_about = pool.about | {"split": f"{len(rows)} rows"}
    part = rows.select(range(min(PART, len(rows))))
    targets = {
        path.name.split(".")[0]: load_rows(str(path)).data for path in sorted(args.data.glob("targets/*.jsonl.gz"))
    }

    methods = args.methods.split(",")
    extractors = {dtype: extractor_of(args.model, methods, dtype) for dtype in ("float32", "bfloat16")}
    stores = {dtype: stored(one, rows, sample_about, args.work / dtype) for dtype, one in extractors.items()}
    forward = extractors["bfloat16"].forward
    budget = WIDER * forward.token_budget(forward.loaded(extractors["bfloat16"].signals)[0])
    wide = extractor_of(args.model, methods, "bfloat16", batch_tokens=budget)
    wide_store = stored(wide, part, sample_about, args.work / "bfloat16-wide")

    prepared = extractors["float32"].prepare(read_pool(args.data / "pool.jsonl.gz", TIMED))
    samples = prepared.given["forward"]
    timed = alternate(
        {name: partial(one.compute, prepared) for name, one in extractors.items()}, 5, torch.device("cpu")
    )
    faster = ratio(timed["float32"], timed["bfloat16"])
    logger.info("%s; time of float32 / bfloat16: %s", described(machine(torch.device("cpu"))), RATIO.format(**faster))

    reference = scores(stores["float32"], extractors["float32"], targets, "float32")
    result: dict[str, Any] = {
        "machine": machine(torch.device("cpu")), "model": extractors["float32"].extraction.model.id, "rows": len(rows), "ratio": args.ratio, "timed_tokens": count(samples),
        "time of float32 / bfloat16": faster, "against float32": {},
    }  # fmt: skip
    found = {}
    for dtype, values in (("float32", "float16"), ("bfloat16", "float32"), ("bfloat16", "float16")):
        name = f"model {dtype}, values {values}"
        found[name] = scores(stores[dtype], extractors[dtype], targets, values)
        compare = {label: compared(one, found[name][label], args.ratio) for label, one in reference.items()}
        result["against float32"][name] = compare
    own = found["model bfloat16, values float32"]
    other = scores(wide_store, extractors["bfloat16"], targets, "float32")
    result[f"bfloat16, budget {budget} against its own, first {len(part)} rows"] = {
        name: compared(own[name][: len(part)], other[name], args.ratio) for name in own
    }
    for line in as_markdown(result):
        logger.info("%s", line)
    if args.out is not None:
        write_json(args.out, result)


def as_markdown(result: Mapping[str, Any]) -> list[str]:
    """Format the worst and the median target of each method and format."""
    lines = [
        "| against | method | rank correlation: median (worst) | overlap of the top: median (worst) |",
        "|---|---|--:|--:|",
    ]
    parts = {f"float32: {name}": part for name, part in result["against float32"].items()}
    parts |= {name: part for name, part in result.items() if name.startswith("bfloat16, budget")}
    for name, part in parts.items():
        for method in dict.fromkeys(label.split(", ")[0] for label in part):
            rows = [found for label, found in part.items() if label.startswith(f"{method}, ")]
            cells = [[row[key] for row in rows] for key in ("rank_correlation", "top_overlap")]
            lines.append(
                f"| {name} | {method} | " + " | ".join(f"{np.median(c):.4f} ({min(c):.4f})" for c in cells) + " |"
            )
    return lines


if __name__ == "__main__":
    main()
