"""Files of a store: written whole or not at all, and parquet shards that carry a checksum and what they are of."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from ..core.errors import NeuronSelectError

MANIFEST = "manifest.json"
STAMP = b"neuron_shard"  # parquet key of a shard's stamp
HEX = 32
DIGEST = "xxh3"  # checksum over the shard, without the checksum field itself
ROW_GROUP = 64 << 20  # bytes in memory, so that a reader never holds a whole shard of wide rows
PIECE = 4 << 20  # bytes hashed at a time
DAY = 86400.0
PART = re.compile(
    r"\.(?:shard-\d+\.parquet|manifest\.json|signal\.json|\d+-[\w-]+\.json)\.(?P<host>[\w-]+)\.(?P<pid>\d+)\.part"
)


# ------------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        raise NeuronSelectError(
            f"cannot be written: {cause.strerror or cause}; mend it and run the same again, it goes on where it stopped",
            option="out", value=folder.name,
        ) from cause  # fmt: skip


def host_name() -> str:
    return re.sub(r"[^\w-]", "_", platform.node()) or "host"


def write_whole(path: Path, pieces: Iterable[Any], *, claim: bool = False) -> None:
    """Write the pieces as one file, whole or not at all.

    Args:
        claim: only where there is no such file yet.
    """
    part = path.with_name(f".{path.name}.{host_name()}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        if claim:
            _claim(part, path)
        else:
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    if os.name != "nt":  # Windows opens no folder
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _claim(part: Path, path: Path) -> None:
    """Keep the manifest of the first of several processes that start a store at once."""
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            part.replace(path)


def remove_dead_parts(folder: Path) -> None:
    """Remove unfinished files of killed runs: of dead processes on this machine, and of any machine after a day."""
    for path in (*folder.glob(".*.part"), *folder.glob("*/.*.part")):
        if found := PART.fullmatch(path.name):
            with contextlib.suppress(OSError):  # another process was first, or it is another user's
                here = found["host"] == host_name() and not _alive(int(found["pid"]))
                if here or time.time() - path.stat().st_mtime > DAY:
                    path.unlink()


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # an earlier process had this number: this one has written nothing yet
    if os.name == "nt":
        return True  # signal 0 would end it there
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


# ------------------------------------------------------------------------------------------ shards
@dataclass(frozen=True)
class Stamp:
    """What a shard says about itself.

    Attributes:
        signal, identity: what it holds. number: its place among the signal's shards. start: its first row.
        rows: how many. rows_digest: hash of these rows of the pool, see :func:`~hf_neuronselect.rows.identity.rows_digest`.
        shard_rows: rows of a full shard of the store, so that a lost manifest can be restored.
    """

    signal: str
    identity: str
    number: int
    start: int
    rows: int
    rows_digest: str
    shard_rows: int


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def shard_number(name: str) -> int | None:
    """The number of a shard by its file's name; None of any other file."""
    found = re.fullmatch(r"shard-(\d{5,12})\.parquet", name)
    return int(found[1]) if found and shard_name(int(found[1])) == name else None


def shard_ranges(rows: int, shard_rows: int) -> list[range]:
    """The rows of each shard."""
    return [range(start, min(start + shard_rows, rows)) for start in range(0, rows, shard_rows)]


def encode_shard(table: pa.Table, stamp: Stamp) -> pa.Buffer:
    """Parquet: ascending indices as differences, the bytes of numbers apart (they compress better), all zstd."""
    encodings, words = {}, []
    for column in table.schema:
        path, kind = column.name, column.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        if pa.types.is_integer(kind):
            encodings[path] = "DELTA_BINARY_PACKED"
        elif pa.types.is_floating(kind):
            encodings[path] = "BYTE_STREAM_SPLIT"
        else:
            words.append(path)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", compression_level=3, use_dictionary=words, column_encoding=encodings,
        write_statistics=False,
    ) as writer:  # fmt: skip
        writer.write_table(table, row_group_size=max(1, ROW_GROUP * len(table) // max(1, table.nbytes)))
        writer.add_key_value_metadata({STAMP.decode(): json.dumps({**asdict(stamp), DIGEST: "0" * HEX})})
    return sink.getvalue()


def _mark_in(footer: bytes) -> int:
    """Position of the checksum in a shard's footer.

    Raises:
        ValueError: there is none.
    """
    mark = f'"{DIGEST}": "'.encode()
    found = footer.rfind(mark)
    if found < 0:
        raise ValueError("no checksum")
    return found + len(mark)


def write_shard(path: Path, table: pa.Table, stamp: Stamp) -> int:
    """Write a shard with its stamp and checksum; returns its size in bytes."""
    raw = memoryview(encode_shard(table, stamp))
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    at = footer + _mark_in(bytes(raw[footer:]))
    digest = xxhash.xxh3_128(raw[:at])
    digest.update(raw[at + HEX :])
    write_whole(path, (raw[:at], digest.hexdigest().encode(), raw[at + HEX :]))
    return len(raw)


def stamp_of(file: pa.NativeFile) -> Stamp:
    """The stamp of a shard, after its checksum was compared. Reads every byte, in pieces.

    Raises:
        OSError, ValueError, KeyError, TypeError: missing or damaged.
    """
    size = file.size()
    end = file.read_at(8, max(0, size - 8))
    footer = size - 8 - int.from_bytes(end[:4], "little")
    if end[4:] != b"PAR1" or footer < 0:
        raise ValueError("the end of a parquet file is missing")
    at, digest = footer + _mark_in(file.read_at(size - footer, footer)), xxhash.xxh3_128()
    for start, stop in ((0, at), (at + HEX, size)):
        for piece in range(start, stop, PIECE):
            file.seek(piece)
            digest.update(file.read_buffer(min(PIECE, stop - piece)))
    if file.read_at(HEX, at) != digest.hexdigest().encode():
        raise ValueError("its bytes are not those written")
    found = json.loads(pq.read_metadata(file).metadata[STAMP])
    del found[DIGEST]
    return Stamp(**found)


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[pa.NativeFile]:
    """Open a shard to be checked and then decoded: the same bytes, even if the file is replaced in between."""
    with pa.OSFile(str(path)) as file:
        # A usual shard is read once; one of wide rows, which memory may not hold, twice.
        yield pa.BufferReader(file.read_buffer()) if file.size() <= ROW_GROUP else file


def read_stamp(path: Path) -> Stamp | str:
    """The stamp of a shard, or what is wrong with it: ``missing`` or ``damaged``. Reads the file once."""
    if not path.exists():
        return "missing"
    try:
        with open_shard(path) as file:
            return stamp_of(file)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return "damaged"
