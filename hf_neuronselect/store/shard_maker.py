"""Making a store's shards: the work of one process, whoever hands it their numbers (a loop, a worker, a Ray actor)."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..core.cost import Cost, Meter
from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.prefetch import ahead
from ..core.progress import untracked
from ..rows.formats import RowFormat, read_row, row_format, rows_of
from ..rows.identity import rows_digest
from ..signals.base import Signal
from ..signals.engine import Computed
from ..signals.extractor import NeuronFeatureExtractor, Prepared
from .shards import Stamp, disk_errors, encode_shard, open_shard, read_stamp, shard_name, shard_ranges, write_shard

TRIES = 3  # workers a shard may cost


class Size(NamedTuple):
    """Compressed bytes a row, measured on at most 16 rows before a process makes its first shard."""

    row_bytes: float


class Shard(NamedTuple):
    """A finished shard: the shards of one number, one for each signal.

    ``tokens`` were run for it now, at ``cost``; ``bytes`` is the size of all its files; ``flaw`` is what was wrong with
    it before ("": nothing).
    """

    number: int
    rows: int
    tokens: int
    bytes: int
    flaw: str
    cost: Cost


Events = Generator[Size | Shard, None, None]


@dataclass(frozen=True)
class Todo:
    """What is left to do for a shard: signals by the first row they lack."""

    number: int
    rows: range
    digest: str
    missing: dict[Signal, int]
    flaw: str
    prepared: dict[int, Prepared]


@dataclass(frozen=True)
class ShardMaker:
    """Makes shards of an open store; pickles without weights, so that it can be sent to other processes.

    Args:
        pool: the rows. extractor: computes their signals. folder: the store. shard_rows: rows of a full shard.
    """

    pool: Dataset
    extractor: NeuronFeatureExtractor
    folder: Path
    shard_rows: int

    @property
    def signals(self) -> tuple[Signal, ...]:
        """The signals that a store keeps."""
        return tuple(signal for signal in self.extractor.computed if signal.stored)

    @property
    def ranges(self) -> list[range]:
        """The rows of each shard."""
        return shard_ranges(len(self.pool), self.shard_rows)

    def work(self, numbers: Iterable[int], rank: int | None = None, *, sized: bool = False) -> Events:
        """Make what is missing or damaged among the shards of these numbers, one after another.

        Args:
            numbers: the rows of the next one are read and tokenised while the model computes the one before.
            rank: picks the GPU, as in the extractor's call.
            sized: measure no :class:`Size`.

        Raises:
            NeuronSelectError: a shard holds other rows, rows cannot be read or computed, or the disk is full.
        """
        for todo in ahead(numbers, self._look, wait=False):
            cost = Cost()
            if todo.missing:
                if not sized:
                    yield self._measure(todo, rank)
                    sized = True
                cost = self._make(todo, rank)
            size = sum((self._path(signal, todo.number)).stat().st_size for signal in self.signals)
            yield Shard(todo.number, len(todo.rows), cost.computed_tokens, size, todo.flaw, cost)

    def after_death(self, number: int, cause: str, deaths: int, num_workers: int) -> None:
        """Warn that a shard is done again, or give up on it.

        Raises:
            NeuronSelectError: as many workers died on it as may.
        """
        rows = self.ranges[number]
        if deaths >= TRIES:
            raise NeuronSelectError(
                f"{shard_name(number)} (rows {rows.start} to {rows.stop - 1}): {deaths} workers died on it, the last one "
                f"by {cause}; if memory ran out, use fewer workers or a smaller batch_tokens",
                option="num_workers", value=num_workers,
            )  # fmt: skip
        warnings.warn(
            f"a worker died by {cause}: {shard_name(number)} (rows {rows.start} to {rows.stop - 1}) is done again by a "
            "new one; if that happens often, use fewer workers or a smaller batch_tokens",
            NeuronSelectWarning,
            stacklevel=4,
        )

    # ------------------------------------------------------------------------------------- looking
    def key(self, signal: Signal) -> str:
        """The folder of a signal."""
        return self.extractor.key(signal)

    def _path(self, signal: Signal, number: int) -> Path:
        return self.folder / self.key(signal) / shard_name(number)

    def _look(self, number: int) -> Todo:
        """Find what a shard lacks, and read and tokenise the rows for it."""
        rows = self.ranges[number]
        digest = rows_digest(self.pool, self._format, rows)
        missing: dict[Signal, int] = {}
        flaws: dict[str, None] = {}
        for signal in self.signals:
            stamp = read_stamp(self._path(signal, number))
            flaw, start = ("", rows.stop) if not isinstance(stamp, str) else (stamp, rows.start)
            if isinstance(stamp, Stamp):
                flaw, start = self._judge(stamp, signal, number, rows, digest)
            if start < rows.stop:
                missing[signal] = start
                flaws[flaw] = None
        prepared = {
            start: self.extractor.with_features([s for s, at in missing.items() if at == start]).prepare(
                self._conversations(range(start, rows.stop))
            )
            for start in sorted(set(missing.values()))
        }
        flaw = next((flaw for flaw in flaws if flaw != "missing"), "missing" if flaws else "")
        return Todo(number, rows, digest, missing, flaw, prepared)

    def _judge(self, stamp: Stamp, signal: Signal, number: int, rows: range, digest: str) -> tuple[str, int]:
        """What is wrong with an undamaged shard, and the first row that it lacks."""
        found = (stamp.signal, stamp.identity, stamp.number, stamp.start, stamp.shard_rows)
        if found != (signal.name, self.extractor.identity(signal), number, rows.start, self.shard_rows):
            return "of another store", rows.start
        if stamp.rows == len(rows) and stamp.rows_digest == digest:
            return "", rows.stop
        kept = range(rows.start, rows.start + stamp.rows)
        if stamp.rows < len(rows) and stamp.rows_digest == rows_digest(self.pool, self._format, kept):
            return "missing", kept.stop  # the pool has grown
        raise other_rows(self.folder, shard_name(number), kept, "out")

    @property
    def _format(self) -> RowFormat:
        options = self.extractor.extraction.options
        return row_format(self.pool.column_names, options.row_format, options.columns)

    def _conversations(self, rows: range) -> list[Any]:
        fmt = self._format
        texts = self.pool.with_format(None).select_columns(fmt.used).select(rows)[:]
        return [read_row(row, fmt) for row in rows_of(texts)]

    # -------------------------------------------------------------------------------------- making
    def _measure(self, todo: Todo, rank: int | None) -> Size:
        """The size of a row, from a sample of the rows that are left; of a few appended ones no others run."""
        first, end = min(todo.missing.values()), len(self.pool)
        rows = range(first, end, max(1, (end - first) // 16))[:16]
        extractor = self.extractor.with_features(todo.missing)
        with untracked():
            found = extractor.compute(extractor.prepare(self._conversations(rows)), rank)
        return Size(sum(_row_bytes(self._table(signal, found)) for signal in todo.missing))

    def _make(self, todo: Todo, rank: int | None) -> Cost:
        """Compute what a shard lacks, and write it."""
        cost = Cost()
        for start, prepared in todo.prepared.items():
            signals = [signal for signal, at in todo.missing.items() if at == start]
            meters: dict[str, Meter] = {}
            found = self.extractor.with_features(signals).compute(prepared, rank, meters=meters)
            for meter in meters.values():
                cost = cost.merge(meter.cost())
            for signal in signals:
                table, path = self._table(signal, found), self._path(signal, todo.number)
                if start > todo.rows.start:
                    with open_shard(path) as file:  # another process may have added the new rows already
                        kept = pq.read_table(file).slice(0, start - todo.rows.start).cast(table.schema)
                    table = pa.concat_tables([kept, table]).combine_chunks()
                stamp = Stamp(
                    signal.name, self.extractor.identity(signal), todo.number, todo.rows.start, len(todo.rows),
                    todo.digest, self.shard_rows,
                )  # fmt: skip
                with disk_errors(self.folder):
                    path.parent.mkdir(exist_ok=True)
                    write_shard(path, table, stamp)
        return cost

    def _table(self, signal: Signal, found: Computed) -> pa.Table:
        types = signal.types(self.extractor.extraction)
        skips = pa.array([skip or None for skip in found.skips[signal.name]], pa.string())
        return pa.table({name: _array(found.columns[name], kind) for name, kind in types.items()} | {"skip": skips})


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    """A column as Arrow: numpy rows without a detour over Python lists."""
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    rows: Sequence[np.ndarray] = values
    if pa.types.is_list(kind.value_type):
        inner = _array([block for row in rows for block in row], kind.value_type)
        return pa.ListArray.from_arrays(_offsets([len(row) for row in rows]), inner)
    flat = np.concatenate(rows) if len(rows) else np.zeros(0)
    return pa.ListArray.from_arrays(
        _offsets([len(row) for row in rows]), pa.array(flat.astype(kind.value_type.to_pandas_dtype()), kind.value_type)
    )


def _offsets(lengths: Sequence[int]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise NeuronSelectError("a shard holds more numbers than Arrow's lists can; lower it", option="shard_rows")
    return pa.array(offsets.astype(np.int32), pa.int32())


def other_rows(folder: Path, name: str, rows: range, option: str) -> NeuronSelectError:
    """The error for a shard that does not belong to the pool's rows."""
    return NeuronSelectError(
        f"{name} was computed from other rows than rows {rows.start} to {rows.stop - 1} of this pool: the pool has "
        "changed or is in another order; name another folder, or delete this one and extract again",
        option=option, value=folder.name,
    )  # fmt: skip


def _row_bytes(sample: pa.Table) -> float:
    meta = pq.read_metadata(pa.BufferReader(encode_shard(sample, Stamp("", "", 0, 0, 0, "", 0))))
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    size = sum(group.column(i).total_compressed_size for group in groups for i in range(group.num_columns))
    return size / max(1, len(sample))
