"""Feature store: the signals of a pool, side by side, in parquet shards; a rerun does what is missing or damaged.

A store is a folder with ``manifest.json`` and a folder for each signal, ``<name>-<identity>/``, with one shard for each
row range and ``signal.json``. A file is written to a temporary name, fsynced and renamed, so a shard is always whole;
later damage is noticed by its checksum. Each shard also holds a hash of the pool rows it was computed from: numbers of
other rows are never used, and rows appended to the pool are the only ones computed. Several processes may fill one
folder at once, on one machine or on many. ``costs/`` holds what each run cost.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..core.cost import Cost, PassCost
from ..core.errors import NeuronSelectError, NeuronSelectWarning, one_of
from ..core.prefetch import ahead
from ..core.progress import track
from ..core.seals import encode, read, unseal
from ..rows.formats import RowFormat, row_format
from ..rows.identity import rows_digest
from ..signals.base import BOOKKEEPING, pack_identities
from ..signals.extractor import NeuronFeatureExtractor
from .processes import gpu_count, run_workers
from .shard_maker import ShardMaker, Size, other_rows
from .shards import (
    MANIFEST,
    PART,
    Stamp,
    disk_errors,
    open_shard,
    read_stamp,
    remove_dead_parts,
    shard_name,
    shard_number,
    shard_ranges,
    stamp_of,
    write_whole,
)

logger = logging.getLogger(__name__)

FORMAT = 2
SIGNAL = "signal.json"
COSTS = "costs"
STEP = 2000  # rows read at once


# ---------------------------------------------------------------------------------------- manifest
def _manifest(pool_about: Mapping[str, Any], rows: int, shard_rows: int) -> dict[str, Any]:
    return {"format": FORMAT, "pool": dict(pool_about), "rows": rows, "shard_rows": shard_rows}


def _text(record: Mapping[str, Any]) -> bytes:
    return encode(record).encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        found = unseal((folder / MANIFEST).read_bytes())
        rows, shard_rows = found["rows"], found["shard_rows"]
        if not (isinstance(found["pool"], dict) and type(rows) is type(shard_rows) is int and rows >= 0 < shard_rows):
            raise ValueError("not the values of a store")
        return found
    except (OSError, ValueError, KeyError) as seen:
        cause = seen
    mend = ": run `neuronselect extract` again, it mends that" if any(folder.glob("*/shard-*.parquet")) else ""
    raise NeuronSelectError(
        f"not a feature store (no readable {MANIFEST}){mend}", option="features", value=folder.name
    ) from cause


def _from_shards(folder: Path, pool_about: Mapping[str, Any], cause: NeuronSelectError) -> dict[str, Any]:
    """A lost manifest of a store of this pool: rows as far as the last undamaged shard goes."""
    for path in sorted(folder.glob("*/shard-*.parquet"), key=lambda path: path.name, reverse=True):
        if isinstance(stamp := read_stamp(path), Stamp):
            return _manifest(pool_about, stamp.start + stamp.rows, stamp.shard_rows)
    raise NeuronSelectError(
        "exists and is not a feature store; name another", option="out", value=folder.name
    ) from cause


def _open_store(folder: Path, pool: Dataset, pool_about: Mapping[str, Any], shard_rows: int) -> dict[str, Any]:
    """The manifest of the store in ``folder``, made where there is none.

    That of an older, shorter pool stays as it is until the rows of its shards were compared, see :func:`_record_pool`.
    """
    path = folder / MANIFEST
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_dead_parts(folder)
        # Listed before the manifest is read: a shard that is seen has its manifest by then.
        taken = any(not PART.fullmatch(file.name) for file in folder.iterdir())
        try:
            found = _read_manifest(folder)
        except NeuronSelectError as cause:
            if taken:
                write_whole(path, [_text(_from_shards(folder, pool_about, cause))])
                logger.warning("%s was missing or damaged: restored from a shard", MANIFEST)
            else:
                write_whole(path, [_text(_manifest(pool_about, len(pool), shard_rows))], claim=True)
            found = _read_manifest(folder)  # another process may have been first
    if found["rows"] > len(pool):
        raise NeuronSelectError(
            f"the store has {found['rows']} rows, the pool {len(pool)}: they are not the same rows; name another folder",
            option="out", value=folder.name,
        )  # fmt: skip
    return found


def _record_pool(folder: Path, pool_about: Mapping[str, Any], rows: int) -> None:
    """Name the pool that the shards were compared with; never a shorter one than another process did."""
    found = _read_manifest(folder)
    now = _manifest(pool_about, rows, found["shard_rows"])
    if now != found and found["rows"] <= rows:
        with disk_errors(folder):
            write_whole(folder / MANIFEST, [_text(now)])


# ----------------------------------------------------------------------------------------- writing
def write_store(
    pool: Dataset,
    extractor: NeuronFeatureExtractor,
    folder: str | Path,
    *,
    pool_about: Mapping[str, Any],
    shard_rows: int = 4096,
    shard: tuple[int, int] = (0, 1),
    num_workers: int | None = 1,
    backend: str = "local",
    load_pool: Callable[[], Dataset] | None = None,
    say: Callable[[str], None] | None = logger.info,
    what: str = "signals",
) -> dict[str, Any]:
    """Compute the extractor's signals of every row of ``pool`` into a store; resumes an unfinished one.

    Signals that the store has are kept; shards are read once and checked, a damaged one is computed again. Where the
    pool has grown since, only the new rows are computed.

    Args:
        pool_about: where the pool comes from, kept in the manifest.
        shard_rows: rows of a shard; a store begun keeps its own.
        shard: ``(i, n)``: only every n-th shard, from the i-th (0-based); for n processes at once.
        num_workers: processes with an extractor each, on GPU 0, 1, ...; 1 is this process itself, None as many as there
            are GPUs. They are spawned: a script that asks for several needs ``if __name__ == "__main__"``.
        backend: ``local``, or ``ray``: ``num_workers`` are actors of a Ray cluster (see :mod:`.ray`).
        load_pool: for ``ray``: loads the pool on another machine; without it the pool itself is sent.
        say: is told the bytes a row, measured on at most 16 rows, before the first shard is computed; None: of few rows,
            nothing is measured.
        what: names the pass to the user.

    Returns:
        ``{"rows", "tokens", "seconds", "bytes", "skipped_shards", "healed_shards", "missing_shards"}``: rows and
        bytes of this process's part; ``missing_shards``, those of the whole store that are not there yet.

    Raises:
        NeuronSelectError: the folder holds something else or signals of other rows, the disk is full, or a shard's
            workers keep dying.
    """
    if not 0 <= shard[0] < shard[1]:
        raise NeuronSelectError("I/N is needed, I from 0 to N - 1", option="shard", value=f"{shard[0]}/{shard[1]}")
    if num_workers is not None and num_workers < 1:
        raise NeuronSelectError("must be at least 1", option="num_workers", value=num_workers)
    if one_of(backend, ("local", "ray"), "backend") == "ray" and shard != (0, 1):
        raise NeuronSelectError(
            "Ray shares all shards out itself; leave it out", option="shard", value=f"{shard[0]}/{shard[1]}"
        )
    folder = Path(folder)
    row_format(pool.column_names, extractor.extraction.options.row_format, extractor.extraction.options.columns)
    manifest = _open_store(folder, pool, pool_about, shard_rows)
    maker = ShardMaker(pool, extractor, folder, manifest["shard_rows"])
    for signal in maker.signals:
        path = folder / maker.key(signal) / SIGNAL
        about = _text({"signal": signal.name, "identity": extractor.identity(signal), **extractor.about(signal)})
        with disk_errors(folder):
            path.parent.mkdir(exist_ok=True)
            if not path.exists() or path.read_bytes() != about:
                write_whole(path, [about])
    ranges = maker.ranges
    mine = range(len(ranges))[shard[0] :: shard[1]]
    device = extractor.extraction.options.device
    elsewhere = True
    if backend == "ray":
        from .ray import run_ray

        events = run_ray(maker, mine, num_workers, load_pool)
    elif (count := num_workers or (1 if extractor.extraction.options.device_map else gpu_count(device))) > 1:
        events = run_workers(maker, mine, count)
    else:
        events, elsewhere = maker.work(mine, sized=say is None), False
    started = time.perf_counter()
    done = {"rows": 0, "tokens": 0, "bytes": 0, "skipped_shards": 0, "healed_shards": 0}
    passes: dict[tuple[str, ...], PassCost] = {}
    total, told = sum(len(ranges[i]) for i in mine), False
    with (
        track(what, total, brief=say is None) as progress,
        contextlib.closing(events),
        contextlib.ExitStack() as last,
    ):
        last.callback(lambda: _write_cost(folder, passes.values()))
        for event in events:
            if isinstance(event, Size):
                if say is not None and not told:  # every worker measures it
                    say(_size_line(event.row_bytes, total - done["rows"], folder))
                told = True
                continue
            if event.flaw not in ("", "missing"):
                logger.warning("%s is %s: it is computed again", shard_name(event.number), event.flaw)
                done["healed_shards"] += 1
            done["skipped_shards"] += not event.flaw
            for name in ("rows", "tokens", "bytes"):
                done[name] += getattr(event, name)
            for one in event.cost.passes.values():
                known = passes.get(key := (one.engine, *one.signals))
                passes[key] = known.plus(one) if known else one
            if elsewhere and event.tokens:  # in this process, every batch has told already
                progress.read(event.rows, event.tokens)
                progress.advance(event.tokens)
            progress.done(event.rows)
    _record_pool(folder, pool_about, len(pool))
    missing = sum(
        not all((folder / maker.key(signal) / shard_name(i)).exists() for signal in maker.signals)
        for i in range(len(ranges))
    )
    return {**done, "seconds": time.perf_counter() - started, "missing_shards": missing}


def _size_line(row_bytes: float, rows: int, folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    size = row_bytes * rows / 1e6
    return f"about {row_bytes:,.0f} bytes a row, {size:,.1f} MB for {rows:,} rows ({free / 1e9:,.1f} GB free)"


def _write_cost(folder: Path, passes: Iterable[PassCost]) -> None:
    """Write what this run cost to a file of its own. Its name goes into records, so it names no machine."""
    run = f"{time.time_ns()}-{uuid.uuid4().hex[:12]}"
    if found := {f"{run}-{i}": cost for i, cost in enumerate(passes)}:
        path = folder / COSTS / f"{run}.json"
        with contextlib.suppress(OSError):  # a full disk is reported elsewhere
            path.parent.mkdir(exist_ok=True)
            write_whole(path, [encode(Cost(passes=found)).encode()])


# ----------------------------------------------------------------------------------------- reading
class FeatureStore:
    """A finished store, read shard after shard: memory does not grow with its rows, and nothing is copied to disk.

    Args:
        folder: of the store.

    Attributes:
        manifest: ``pool``, ``rows``, ``shard_rows``. identities: signal -> identities under which it is stored.

    Raises:
        NeuronSelectError: not a store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.identities: dict[str, list[str]] = {}
        for place in sorted(path.parent for path in self.folder.glob(f"*/{SIGNAL}")):
            name, _, identity = place.name.rpartition("-")
            self.identities.setdefault(name, []).append(identity)

    def __len__(self) -> int:
        return int(self.manifest["rows"])

    def __repr__(self) -> str:
        return f"FeatureStore({self.folder.name!r}, {', '.join(self.identities)}, {len(self)} rows)"

    def check(self, wanted: Mapping[str, str]) -> None:
        """Refuse an unfinished store.

        Args:
            wanted: signal -> identity.

        Raises:
            NeuronSelectError: shards are missing.
        """
        number = -(-len(self) // self.manifest["shard_rows"])
        for name, identity in wanted.items():
            place = self.folder / f"{name}-{identity}"
            # Counted by the files that are there: a manifest may state any number.
            there = {i for path in place.glob("shard-*.parquet") if (i := shard_number(path.name)) is not None}
            first = next(i for i in range(len(there) + 1) if i not in there)
            if first < number:
                missing = number - sum(i < number for i in there)
                raise self._error(
                    f"{missing} of {number} shards of {name} are missing, first {shard_name(first)}: run "
                    "`neuronselect extract` again with the same options (without --shard), it makes what is missing"
                )

    def batches(
        self, wanted: Mapping[str, str], pool: Dataset | None = None, fmt: RowFormat | None = None, step: int = STEP
    ) -> Iterator[dict[str, pa.Table]]:
        """Signals of consecutive rows, in order, at most ``step`` rows at a time.

        A shard is checked before its first row is given out: its bytes by their checksum, its rows against the pool's.
        The next rows are read in another thread while the last ones are used.

        Args:
            wanted: signal -> identity. pool, fmt: the rows whose signals they must be.

        Yields:
            signal -> its columns, and ``skip``: why a row has none of it, or null.

        Raises:
            NeuronSelectError: a shard is damaged, missing, or of other rows.
        """
        self.check(wanted)
        with contextlib.closing(self._read(wanted, pool, fmt, step)) as found:
            yield from ahead(found, lambda tables: tables)

    def _read(
        self, wanted: Mapping[str, str], pool: Dataset | None, fmt: RowFormat | None, step: int
    ) -> Generator[dict[str, pa.Table]]:
        for number, rows in enumerate(shard_ranges(len(self), self.manifest["shard_rows"])):
            digest = rows_digest(pool, fmt, rows) if pool is not None and fmt is not None else None
            with contextlib.ExitStack() as open_files:
                cursors = {
                    name: _Cursor(self.checked(open_files, name, identity, number, rows, digest))
                    for name, identity in wanted.items()
                }
                for start in range(0, len(rows), step):
                    take = min(step, len(rows) - start)
                    try:
                        tables = {name: cursor.take(take) for name, cursor in cursors.items()}
                    except (OSError, ValueError, pa.ArrowException) as cause:
                        raise self._flawed(shard_name(number), "damaged") from cause
                    yield tables

    def checked(
        self, open_files: contextlib.ExitStack, name: str, identity: str, number: int, rows: range, digest: str | None
    ) -> pq.ParquetFile:
        path = self.folder / f"{name}-{identity}" / shard_name(number)
        label = f"{name} {shard_name(number)}"
        try:
            file = open_files.enter_context(open_shard(path))
            stamp, found = stamp_of(file), pq.ParquetFile(file)
        except FileNotFoundError as cause:
            raise self._flawed(label, "missing") from cause
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as cause:
            raise self._flawed(label, "damaged") from cause
        shard_rows = self.manifest["shard_rows"]
        if (stamp.signal, stamp.identity, stamp.start, stamp.shard_rows) != (name, identity, rows.start, shard_rows):
            raise self._flawed(label, "of another store")
        if stamp.rows != len(rows) or found.metadata.num_rows != len(rows):
            raise self._flawed(label, "unfinished")
        if digest is not None and stamp.rows_digest != digest:
            raise other_rows(self.folder, label, rows, "features")
        return found

    def dataset(self, *names: str, identities: Mapping[str, str] | None = None) -> Dataset:
        """The columns of signals (default all) in memory, in the pool's order, as the extractor adds them to rows.

        Args:
            identities: signal -> identity, of those that are stored under several.

        Raises:
            NeuronSelectError: as :meth:`batches`; a signal is stored under several identities.
        """
        expected = identities or {}
        wanted = {name: self.identity_of(name, expected.get(name)) for name in names or self.identities}
        parts = []
        for tables in self.batches(wanted):
            skips = skips_of(tables)
            bookkeeping = dict(zip(BOOKKEEPING, (skips, [pack_identities(wanted)] * len(skips)), strict=True))
            parts.append(pa.table(columns_of(tables) | bookkeeping))
        return Dataset(pa.concat_tables(parts))

    def identity_of(self, name: str, expected: str | None = None) -> str:
        """Under which identity to read a signal.

        Raises:
            NeuronSelectError: it is not there, not under the one expected, or under several.
        """
        found = self.identities.get(name, [])
        if expected is not None and expected in found:
            return expected
        if not found:
            raise self._error(
                f"it has no signal {name}, only {', '.join(self.identities) or 'none'}: run `neuronselect extract` into "
                "it with the method you select by"
            )
        if expected is not None:
            raise self._error(
                f"its signal {name} comes from another extraction ({', '.join(found)}, wanted {expected}): model, SAE, "
                "layer, K, template and tokens must be the same; extract again with these options, it is added"
            )
        if len(found) > 1:
            raise self._error(f"it has the signal {name} of {len(found)} extractions: name the model and its options")
        return found[0]

    def cost(self, wanted: Mapping[str, str]) -> Cost:
        """What computing signals cost when they were computed; a pass over several of them counts once."""
        keys = {f"{name}-{identity}" for name, identity in wanted.items()}
        found = Cost()
        for path in sorted((self.folder / COSTS).glob("*.json")):
            try:
                cost = read(path, Cost, what="a cost", option="features", value=self.folder.name, again="extract again")
                used = {name: one for name, one in cost.passes.items() if keys & set(one.signals)}
                found = found.merge(Cost(passes=used))
            except NeuronSelectError as cause:
                warnings.warn(f"what a pass cost is left out: {cause.message}", NeuronSelectWarning, stacklevel=3)
        return found.as_reused()

    def _flawed(self, name: str, flaw: str) -> NeuronSelectError:
        return self._error(f"{name} is {flaw}: run `neuronselect extract` again, it redoes that shard")

    def _error(self, message: str) -> NeuronSelectError:
        return NeuronSelectError(message, option="features", value=self.folder.name)


def columns_of(tables: Mapping[str, pa.Table]) -> dict[str, pa.ChunkedArray]:
    """The signals' own columns among what :meth:`FeatureStore.batches` yields."""
    return {name: table.column(name) for table in tables.values() for name in table.column_names if name != "skip"}


def skips_of(tables: Mapping[str, pa.Table]) -> list[str]:
    """Why each row has not all the signals that :meth:`FeatureStore.batches` yields, else ``""``."""
    skips = (table.column("skip").to_pylist() for table in tables.values())
    return [next((skip for skip in of_row if skip), "") for of_row in zip(*skips, strict=True)]


class _Cursor:
    """Reads a parquet file's row groups and gives them out in pieces of any size."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self.file, self.group = file, 0
        self.rest: pa.Table | None = None

    def take(self, rows: int) -> pa.Table:
        while self.rest is None or len(self.rest) < rows:
            more = self.file.read_row_group(self.group)
            self.group += 1
            self.rest = more if self.rest is None or not len(self.rest) else pa.concat_tables([self.rest, more])
        found, self.rest = self.rest.slice(0, rows), self.rest.slice(rows)
        return found
