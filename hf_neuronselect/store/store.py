"""Feature store: parquet shards of a fixed row range and a manifest; a rerun does what is missing or damaged.

A file is written to a temporary name, fsynced and renamed, so what bears a shard's name was written whole. What
happens to it later is noticed: each shard bears the manifest, its own number and a digest of all its other bytes.
Several processes may fill one folder at once, on one machine or on many.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.utils import tqdm

from ..core.errors import NeuronSelectError, one_of
from ..core.prefetch import ahead
from ..rows.formats import row_format
from ..signals.extractor import NeuronFeatureExtractor
from .processes import gpu_count, run_workers
from .shard_maker import ShardMaker, Size
from .shards import (
    DIGESTS,
    HEX,
    MANIFEST,
    PART,
    disk_errors,
    flaw_in,
    identity,
    open_shard,
    read_stamp,
    remove_dead_parts,
    shard_ranges,
    write_whole,
)

logger = logging.getLogger(__name__)

FORMAT = 1


# ---------------------------------------------------------------------------------------- manifest
def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "blake2b"}
    return hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=HEX // 2).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        found = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        needed = {"extractor_hash", "features", "pool", "rows", "shard_rows"}
        if not needed <= found.keys() or found.get("blake2b") not in (None, _digest(found)):
            raise ValueError("not what was written")
        return found
    except (OSError, ValueError, TypeError) as seen:
        cause = seen
    mend = ": run `neuronselect extract` again, it mends that" if any(folder.glob("shard-*.parquet")) else ""
    raise NeuronSelectError(
        f"not a feature store (no readable {MANIFEST}){mend}", option="features", value=folder.name
    ) from cause


def _from_shards(folder: Path, cause: NeuronSelectError) -> dict[str, Any]:
    """A lost manifest, as the first whole shard bears it."""
    for path in sorted(folder.glob("shard-*.parquet")):
        with contextlib.suppress(OSError, ValueError, KeyError, pa.ArrowException):
            if (stamp := read_stamp(path)) is not None:
                return {name: value for name, value in stamp.items() if name not in ("shard", *DIGESTS)}
    raise NeuronSelectError(
        "exists and is not a feature store; name another", option="out", value=folder.name
    ) from cause


def _open_store(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of the store in ``folder``, made where there is none; another store's is refused."""
    path = folder / MANIFEST
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_dead_parts(folder)
        # Listed before the manifest is asked for: a shard that is seen has its manifest by then.
        taken = any(not PART.fullmatch(file.name) for file in folder.iterdir())
        try:
            found, lost = _read_manifest(folder), False
        except NeuronSelectError as cause:
            if lost := taken:
                found = _from_shards(folder, cause)
            else:
                write_whole(path, [_text({**wanted, "blake2b": _digest(wanted)})], claim=True)
                found = _read_manifest(folder)  # another process may have been first
    for name in ("extractor_hash", "features", "pool", "rows"):
        there, now = (identity(one[name]) if name == "pool" else one[name] for one in (found, wanted))
        if there != now:
            raise NeuronSelectError(
                f"the store is of another {name.removesuffix('_hash')}: {found[name]}, now {wanted[name]}; name another "
                "folder",
                option="out", value=folder.name,
            )  # fmt: skip
    if lost:
        logger.warning("%s was missing or damaged: made again from a shard", MANIFEST)
        with disk_errors(folder):
            write_whole(path, [_text(found)])
    return found


def _text(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()


# -------------------------------------------------------------------------------- writing, reading
def write_store(
    pool: Dataset,
    extractor: NeuronFeatureExtractor,
    folder: str | Path,
    *,
    pool_about: Mapping[str, Any],
    shard_rows: int = 4096,
    shard: tuple[int, int] = (0, 1),
    num_workers: int | None = 1,
    engine: str = "local",
    load_pool: Callable[[], Dataset] | None = None,
    say: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Compute the extractor's features of every row of ``pool`` into a store; resumes an unfinished one.

    Shards that are there are read once and checked; a damaged one, or one of another store, is done again.

    Args:
        pool_about: the pool's identity (id, commit), kept in the manifest.
        shard_rows: rows of a shard; a store begun keeps its own.
        shard: ``(i, n)``: of the shards only every n-th, from the i-th (0-based); for n processes at once.
        num_workers: processes with an extractor each, on GPU 0, 1, ...; 1 is this process itself, None as many as there
            are GPUs. They are spawned: a script that asks for several needs ``if __name__ == "__main__"``.
        engine: ``local``, or ``ray``: ``num_workers`` are actors of a Ray cluster (see :mod:`.ray_engine`).
        load_pool: for ``ray``: loads the pool on another machine; without it the pool itself is sent.
        say: is told the bytes a row, measured on 16 rows, before the first shard is computed.

    Returns:
        ``{"rows", "tokens", "seconds", "bytes", "skipped_shards", "healed_shards", "missing_shards"}``: rows and
        bytes of this process's part; ``missing_shards``, those of the whole store that are not there yet.

    Raises:
        NeuronSelectError: the folder holds a store of another extractor or pool, the disk is full, or a shard's
            workers keep dying.
    """
    if not 0 <= shard[0] < shard[1]:
        raise NeuronSelectError("I/N is needed, I from 0 to N - 1", option="shard", value=f"{shard[0]}/{shard[1]}")
    if num_workers is not None and num_workers < 1:
        raise NeuronSelectError("must be at least 1", option="num_workers", value=num_workers)
    if one_of(engine, ("local", "ray"), "engine") == "ray" and shard != (0, 1):
        raise NeuronSelectError(
            "Ray shares all shards out itself; leave it away", option="shard", value=f"{shard[0]}/{shard[1]}"
        )
    folder = Path(folder)
    row_format(pool.column_names, extractor.config.row_format, dict(extractor.config.columns))
    manifest = _open_store(folder, {
        "format": FORMAT, "extractor_hash": extractor.hash, "extractor": extractor.config.numbers(),
        "features": extractor.config.made, "pool": dict(pool_about), "rows": len(pool), "shard_rows": shard_rows,
    })  # fmt: skip
    ranges = shard_ranges(manifest)
    mine = range(len(ranges))[shard[0] :: shard[1]]
    maker = ShardMaker(pool, extractor, folder, manifest)
    if engine == "ray":
        from .ray import run_ray

        events = run_ray(maker, mine, num_workers, load_pool)
    elif (count := num_workers or (1 if extractor.device_map else gpu_count(extractor.device))) > 1:
        events = run_workers(maker, mine, count)
    else:
        events = maker.work(mine)
    started = time.perf_counter()
    done = {"rows": 0, "tokens": 0, "bytes": 0, "skipped_shards": 0, "healed_shards": 0}
    total, told = sum(stop - start for _, start, stop in (ranges[i] for i in mine)), False
    with (
        tqdm(total=total, unit=" rows", desc="extract", disable=None if sys.stderr.isatty() else True) as bar,
        contextlib.closing(events),
    ):
        for event in events:
            if isinstance(event, Size):
                if not told:  # every worker measures it
                    say(_size_line(event.row_bytes, total - done["rows"], folder))
                told = True
                continue
            if event.flaw not in ("", "missing"):
                logger.warning("%s is %s: it is done again", ranges[event.number][0], event.flaw)
                done["healed_shards"] += 1
            done["skipped_shards"] += not event.flaw
            for name in ("rows", "tokens", "bytes"):
                done[name] += getattr(event, name)
            bar.update(event.rows)
            if done["tokens"]:
                bar.set_postfix_str(f"{done['tokens'] / (time.perf_counter() - started):,.0f} tokens/s")
    missing = sum(not (folder / name).exists() for name, _, _ in ranges)
    return {**done, "seconds": time.perf_counter() - started, "missing_shards": missing}


def _size_line(row_bytes: float, rows: int, folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    size = row_bytes * rows / 1e6
    return f"about {row_bytes:,.0f} bytes a row, {size:,.1f} MB for {rows:,} rows ({free / 1e9:,.1f} GB free)"


class FeatureStore:
    """A finished store, read shard after shard: memory does not grow with its rows, and nothing is copied to disk.

    Args:
        folder: of the store. pool_about: the pool's identity, if the store must be that pool's.

    Attributes:
        manifest: what the store is of: ``extractor_hash``, ``extractor``, ``features``, ``pool``, ``rows``, ...

    Raises:
        NeuronSelectError: not a store, unfinished, or made from another pool.
    """

    def __init__(self, folder: str | Path, *, pool_about: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        if pool_about is not None and identity(self.manifest["pool"]) != identity(pool_about):
            raise self._error(
                f"the store is of the pool {self.manifest['pool']}, now {dict(pool_about)}: extract again"
            )
        shards = shard_ranges(self.manifest)
        if missing := [name for name, _, _ in shards if not (self.folder / name).exists()]:
            raise self._error(
                f"{len(missing)} of {len(shards)} shards are missing, first {missing[0]}: run `neuronselect extract` "
                "again with the same options (without --shard), it makes what is missing"
            )

    @functools.cached_property
    def column_names(self) -> list[str]:
        """Feature and bookkeeping columns.

        Raises:
            NeuronSelectError: the first shard is damaged.
        """
        name, _, _ = shard_ranges(self.manifest)[0]
        try:
            return list(pq.read_schema(self.folder / name).names)
        except (OSError, ValueError, pa.ArrowException) as cause:
            raise self._flawed(name, "damaged") from cause

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def __repr__(self) -> str:
        return f"FeatureStore({self.folder.name!r}, {', '.join(self.manifest['features'])}, {len(self)} rows)"

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows in order, a parquet row group (64 MB at most, 4,096 rows by default) a table.

        A shard is checked before its first row is given out; the next row group is read in another thread
        while the last one is used.

        Args:
            columns: those decoded; default all.

        Raises:
            NeuronSelectError: a shard is damaged, missing or of another store; no such column.
        """
        with contextlib.closing(self._decoded(columns)) as decoded:
            yield from ahead(decoded, lambda table: table)

    def _decoded(self, columns: Sequence[str] | None) -> Generator[pa.Table]:
        for number, (name, start, stop) in enumerate(shard_ranges(self.manifest)):
            try:
                with open_shard(self.folder / name) as file:
                    if flaw := flaw_in(file, self.manifest, number, stop - start):
                        raise self._flawed(name, flaw)
                    shard = pq.ParquetFile(file)
                    if absent := sorted(set(columns or ()) - set(shard.schema_arrow.names)):
                        raise self._error(
                            f"holds no {', '.join(absent)}, it is of {', '.join(self.manifest['features'])}: extract "
                            "with the method you select by"
                        )
                    for group in range(shard.num_row_groups):
                        yield shard.read_row_group(group, columns)
            except NeuronSelectError:
                raise
            except FileNotFoundError as cause:
                raise self._flawed(name, "missing") from cause
            except (OSError, ValueError, KeyError, pa.ArrowException) as cause:
                raise self._flawed(name, "damaged") from cause

    def dataset(self, columns: Sequence[str] | None = None) -> Dataset:
        """The columns (default all) in memory, beside the pool's row by row.

        Raises:
            NeuronSelectError: as :meth:`tables`.
        """
        return Dataset(pa.concat_tables(self.tables(columns)))

    def _flawed(self, name: str, flaw: str) -> NeuronSelectError:
        return self._error(f"{name} is {flaw}: run `neuronselect extract` again, it redoes that shard")

    def _error(self, message: str) -> NeuronSelectError:
        return NeuronSelectError(message, option="features", value=self.folder.name)
