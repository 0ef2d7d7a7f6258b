"""Making a store's shards: what one process does, whoever hands it their numbers (a loop, a worker, a Ray actor)."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.prefetch import ahead
from ..rows.encode import Sample
from ..rows.formats import read_row, row_format, rows_of
from ..signals.extractor import NeuronFeatureExtractor
from .shards import HEX, disk_errors, encode_shard, flaw_of, seal, shard_ranges, write_whole

TRIES = 3  # workers a shard may cost


class Size(NamedTuple):
    """Compressed bytes a row, measured on 16 rows before a process makes its first shard."""

    row_bytes: float


class Shard(NamedTuple):
    """A shard that now stands in the store: its number, what it holds, and what was wrong with it before ("": nothing).

    ``tokens`` is 0 where nothing had to be made.
    """

    number: int
    rows: int
    tokens: int
    bytes: int
    flaw: str


Events = Generator[Size | Shard, None, None]


@dataclass(frozen=True)
class ShardMaker:
    """Makes shards of a store that is open; pickles without weights, so that it can be sent to other processes.

    Args:
        pool: the rows. extractor: what computes their features. folder: the store. manifest: the store's own.
    """

    pool: Dataset
    extractor: NeuronFeatureExtractor
    folder: Path
    manifest: Mapping[str, Any]

    def work(self, numbers: Iterable[int], rank: int | None = None, *, sized: bool = False) -> Events:
        """See to the shards of these numbers: what is missing or damaged is made, one after another.

        Args:
            numbers: one is taken ahead: its rows are read and tokenised while the model is at the shard before.
            rank: picks the GPU, as in the extractor's call.
            sized: no :class:`Size` is measured.

        Raises:
            NeuronSelectError: the rows cannot be read or computed, or the disk is full.
        """
        ranges = shard_ranges(self.manifest)

        def prepare(number: int) -> tuple[int, str, list[Sample]]:
            name, start, stop = ranges[number]
            flaw = flaw_of(self.folder / name, self.manifest, number, stop - start)
            return number, flaw, self._tokenized(range(start, stop)) if flaw else []

        for number, flaw, samples in ahead(numbers, prepare, wait=False):
            name, start, stop = ranges[number]
            path, tokens = self.folder / name, 0
            if flaw:
                if not sized:
                    few = self._tokenized(range(0, len(self.pool), max(1, len(self.pool) // 16))[:16])
                    yield Size(_row_bytes(self._features(few, rank)))
                    sized = True
                tokens = self._make(path, number, samples, rank)
            yield Shard(number, stop - start, tokens, path.stat().st_size, flaw)

    def after_death(self, number: int, cause: str, deaths: int, num_workers: int) -> None:
        """Warn that a shard is done again, or give up on it.

        Raises:
            NeuronSelectError: as many workers died on it as may.
        """
        name, start, stop = shard_ranges(self.manifest)[number]
        if deaths >= TRIES:
            raise NeuronSelectError(
                f"{name} (rows {start} to {stop - 1}): {deaths} workers died on it, the last one by {cause}; if memory "
                "ran out, use fewer workers or a smaller batch_tokens",
                option="num_workers", value=num_workers,
            )  # fmt: skip
        warnings.warn(
            f"a worker died by {cause}: {name} (rows {start} to {stop - 1}) is done again by a new one",
            NeuronSelectWarning,
            stacklevel=4,
        )

    def _make(self, path: Path, number: int, samples: Sequence[Sample], rank: int | None) -> int:
        table = self._features(samples, rank)
        raw = memoryview(encode_shard(table, {**self.manifest, "shard": number}))
        at, digest = seal(raw)
        with disk_errors(self.folder):
            write_whole(path, (raw[:at], digest, raw[at + HEX :]))
        return int(sum(table["n_tokens"].to_pylist()))

    def _tokenized(self, rows: range) -> list[Sample]:
        config = self.extractor.config
        fmt = row_format(self.pool.column_names, config.row_format, dict(config.columns))
        texts = self.pool.with_format(None).select_columns(fmt.used).select(rows)[:]
        return self.extractor.tokenize([read_row(row, fmt) for row in rows_of(texts)])

    def _features(self, samples: Sequence[Sample], rank: int | None) -> pa.Table:
        columns = self.extractor.compute(samples, rank)
        return Dataset.from_dict(columns, features=self.extractor.column_types).with_format("arrow")[:]


def _row_bytes(sample: pa.Table) -> float:
    meta = pq.read_metadata(pa.BufferReader(encode_shard(sample, {})))
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    size = sum(group.column(i).total_compressed_size for group in groups for i in range(group.num_columns))
    return size / max(1, len(sample))
