"""Shared by the benchmark scripts: random samples of a pool, alternating timed runs, machine details, tables."""

from __future__ import annotations

import gzip
import json
import logging
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers

from hf_neuronselect import NeuronFeatureExtractor
from hf_neuronselect.rows.encode import Sample
from hf_neuronselect.rows.formats import Conversation, read_row, row_format

RATIO = "{median:.2f} ({min:.2f} to {max:.2f})"


def plain_logging(logger: logging.Logger) -> None:
    """Log the script's own lines plainly on stderr, and only warnings of other libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)


def read_pool(path: Path, rows: int | None = None, seed: int = 0) -> list[Conversation]:
    """Read a random sample of the rows in random order, or all rows in file order without ``rows``."""
    table = pq.read_table(path) if path.suffix == ".parquet" else gzip.open(path).readlines()
    chosen = np.arange(len(table)) if rows is None else np.random.default_rng(seed).permutation(len(table))[:rows]
    records = [json.loads(table[i]) for i in chosen] if isinstance(table, list) else table.take(chosen).to_pylist()
    fmt = row_format(records[0])
    return [read_row(record, fmt) for record in records]


def tokenize(extractor: NeuronFeatureExtractor, conversations: Sequence[Conversation]) -> list[Sample]:
    """Rows as token ids, as the forward engine reads them."""
    found: list[Sample] = extractor.prepare(conversations).given["forward"]
    return found


def usable_rows(extractor: NeuronFeatureExtractor, conversations: Sequence[Conversation]) -> list[Conversation]:
    """The rows that the forward engine does not skip."""
    samples = tokenize(extractor, conversations)
    return [row for row, sample in zip(conversations, samples, strict=True) if not sample.skip]


def count(samples: Sequence[Sample]) -> int:
    """Number of tokens, without padding."""
    return sum(len(sample.input_ids) for sample in samples)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    sync()
    started = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - started


def alternate(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, progress: logging.Logger | None = None
) -> dict[str, list[float]]:
    """Time all runs in turn, repeatedly; each repeat starts with a different run. Returns seconds."""
    timed: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        shift = repeat * len(runs) // repeats
        for name in [*runs][shift:] + [*runs][:shift]:
            timed[name].append(seconds(runs[name], device))
        if progress is not None:
            progress.info("repeat %d of %d: %.0f s", repeat + 1, repeats, sum(times[-1] for times in timed.values()))
    return timed


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Ratio of two runs within each repeat."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def cpu_name() -> str:
    found = platform.system() == "Linux" and re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine and library versions of a result."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"cpu": cpu_name(), "device": gpu, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version()}  # fmt: skip


def described(*parts: Mapping[str, Any]) -> str:
    """Format machine and settings on one line."""
    return ", ".join(f"{key} {value}" for part in parts for key, value in part.items())


def speed_table(table: Mapping[str, Mapping[str, dict[str, float]]]) -> list[str]:
    """Format contenders' ``tokens_per_s`` and ``time_over_ours`` as a Markdown table."""
    lines = ["| contender | tokens/s: median (min to max) | its time / ours |", "|---|--:|--:|"]
    for name, row in table.items():
        speed = "{median:,.0f} ({min:,.0f} to {max:,.0f})".format(**row["tokens_per_s"])
        lines.append(f"| {name} | {speed} | {RATIO.format(**row['time_over_ours'])} |")
    return lines


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
