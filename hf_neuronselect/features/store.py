"""Feature store: parquet shards of a fixed row range and a manifest; a rerun does what is missing.

Each shard is written to a temporary name, fsynced and renamed, so a shard that is there is whole.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.utils import tqdm

from ..errors import NeuronSelectError
from ..samples import read_row, row_format, rows_of
from .extractor import NeuronFeatureExtractor

MANIFEST = "manifest.json"
FORMAT = 1


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as cause:
        raise NeuronSelectError("not a feature store (no readable manifest.json)", option="features",
                                value=folder.name) from cause  # fmt: skip
    return dict(found)


def _shards(manifest: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """File name and row range of each shard."""
    step, rows = manifest["shard_rows"], manifest["rows"]
    return [(f"shard-{i:05d}.parquet", start, min(start + step, rows)) for i, start in enumerate(range(0, rows, step))]


def _whole(path: Path, rows: int) -> bool:
    try:
        return bool(pq.read_metadata(path).num_rows == rows)
    except (OSError, pa.ArrowInvalid):
        return False


def _write(path: Path, table: Dataset) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("wb") as stream:
        table.to_parquet(stream)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


def identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two pools the same rows; terms of use, asked for online alone, do not."""
    return {name: about.get(name) for name in ("id", "commit", "config", "split")}


def write_store(
    pool: Dataset,
    extractor: NeuronFeatureExtractor,
    folder: str | Path,
    *,
    pool_about: Mapping[str, Any],
    shard_rows: int = 4096,
) -> dict[str, Any]:
    """Compute the extractor's features of every row of ``pool`` into a store; resumes an unfinished one.

    Args:
        pool_about: the pool's identity (id, commit), kept in the manifest.

    Returns:
        ``{"rows", "tokens", "seconds", "bytes", "skipped_shards"}`` of this run.

    Raises:
        NeuronSelectError: the folder holds a store of another extractor or pool, or the disk is full.
    """
    folder = Path(folder)
    manifest = {
        "format": FORMAT,
        "extractor_hash": extractor.hash,
        "extractor": extractor.config.numbers(),
        "features": sorted(extractor.features),
        "pool": dict(pool_about),
        "rows": len(pool),
        "shard_rows": shard_rows,
    }
    if (folder / MANIFEST).exists():
        there = _read_manifest(folder)
        for what, name in (
            ("extractor_hash", "extractor"),
            ("features", "features"),
            ("pool", "pool"),
            ("rows", "rows"),
        ):
            same = (
                identity(there["pool"]) == identity(pool_about) if what == "pool" else there.get(what) == manifest[what]
            )
            if not same:
                raise NeuronSelectError(
                    f"the store is of another {name}: {there.get(what)}, now {manifest[what]}; name another folder",
                    option="out", value=folder.name,
                )  # fmt: skip
        manifest = there
    elif folder.exists() and any(folder.iterdir()):
        raise NeuronSelectError("exists and is not a feature store; name another", option="out", value=folder.name)
    fmt = row_format(pool.column_names, extractor.config.row_format, dict(extractor.config.columns))
    texts = pool.with_format(None).select_columns(fmt.used)
    started, tokens, skipped = time.perf_counter(), 0, 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        shards = _shards(manifest)
        quiet = None if sys.stderr.isatty() else True
        with tqdm(total=len(pool), unit=" rows", desc="extract", disable=quiet) as bar:
            for name, start, stop in shards:
                if _whole(folder / name, stop - start):
                    skipped += 1
                    bar.update(stop - start)
                    continue
                columns = extractor.extract([read_row(row, fmt) for row in rows_of(texts[start:stop])])
                tokens += int(columns["n_tokens"].sum())
                _write(folder / name, Dataset.from_dict(columns, features=extractor.column_types))
                bar.update(stop - start)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s")
    except OSError as cause:
        raise NeuronSelectError(
            f"cannot be written: {cause.strerror or cause}", option="out", value=folder.name
        ) from cause
    size = sum(file.stat().st_size for file in folder.glob("shard-*.parquet"))
    seconds = time.perf_counter() - started
    return {"rows": len(pool), "tokens": tokens, "seconds": seconds, "bytes": size, "skipped_shards": skipped}


def read_store(folder: str | Path, *, pool_about: Mapping[str, Any] | None = None) -> tuple[Dataset, dict[str, Any]]:
    """The feature columns of a finished store, and its manifest.

    Raises:
        NeuronSelectError: unfinished or damaged, or made from another pool.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if pool_about is not None and identity(manifest["pool"]) != identity(pool_about):
        raise NeuronSelectError(
            f"the store is of the pool {manifest['pool']}, now {dict(pool_about)}: extract again", option="features",
            value=folder.name,
        )  # fmt: skip
    for name, start, stop in _shards(manifest):
        if not _whole(folder / name, stop - start):
            raise NeuronSelectError(
                f"{name} is missing or damaged: run `neuronselect extract` again, it redoes that shard", option="features",
                value=folder.name,
            )  # fmt: skip
    files = [str(folder / name) for name, _, _ in _shards(manifest)]
    data = Dataset.from_parquet(files)
    assert isinstance(data, Dataset)
    return data, manifest
