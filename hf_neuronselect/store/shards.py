"""Files of a feature store: written whole or not at all, and parquet shards that show what happened to them since."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from ..core.errors import NeuronSelectError

MANIFEST = "manifest.json"
STAMP = b"neuron_shard"  # the parquet key of what a shard says of itself
HEX = 32
# Of all of a shard's bytes but the digest's own, against damage: what is written now, and what was before.
DIGESTS: dict[str, Callable[..., Any]] = {
    "shard_xxh3": xxhash.xxh3_128,
    "shard_blake2b": partial(hashlib.blake2b, digest_size=HEX // 2),
}
DIGEST = "shard_xxh3"
ROW_GROUP = 64 << 20  # bytes in memory, so that a reader never holds a whole shard of wide rows
PIECE = 4 << 20  # bytes hashed at a time
DAY = 86400.0
PART = re.compile(r"\.(?:shard-\d+\.parquet|manifest\.json)\.(?:(?P<host>.+)\.)?(?P<pid>\d+)\.part")


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
    """The pieces as one file, whole or not at all; ``claim``: only where no such file is yet."""
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
    """Of several processes that start a store at once the first one's manifest stands."""
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            part.replace(path)


def remove_dead_parts(folder: Path) -> None:
    """What killed runs left: of dead processes of this machine, and of any machine after a day."""
    for path in folder.iterdir():
        if found := PART.fullmatch(path.name):
            with contextlib.suppress(OSError):  # another process was first, or it is another user's
                here = found["host"] in (None, host_name()) and not _alive(int(found["pid"]))
                if here or time.time() - path.stat().st_mtime > DAY:
                    path.unlink()


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # an earlier process of this number: this one writes nothing yet
    if os.name == "nt":
        return True  # there, signal 0 would not only ask
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


# ------------------------------------------------------------------------------------------ shards
def shard_ranges(manifest: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """File name and row range of each shard."""
    step, rows = manifest["shard_rows"], manifest["rows"]
    return [(f"shard-{i:05d}.parquet", start, min(start + step, rows)) for i, start in enumerate(range(0, rows, step))]


def encode_shard(table: pa.Table, stamp: Mapping[str, Any]) -> pa.Buffer:
    """Parquet: ascending indices as differences, numbers' bytes apart (they compress better), all zstd."""
    encodings, words = {}, []
    for field in table.schema:
        path, kind = field.name, field.type
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
        writer.add_key_value_metadata({STAMP.decode(): json.dumps({**stamp, DIGEST: "0" * HEX})})
    return sink.getvalue()


def _mark_in(footer: bytes) -> tuple[int, Callable[..., Any] | None]:
    """Where a shard's digest stands in its footer, and what makes one."""
    for name, make in DIGESTS.items():
        mark = f'"{name}": "'.encode()
        if (found := footer.rfind(mark)) >= 0:
            return found + len(mark), make
    return -1, None


def seal(raw: memoryview) -> tuple[int, bytes]:
    """Where a shard's digest stands and what it must be; (0, b"") if it bears none."""
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    if raw[-4:] != b"PAR1" or footer < 0:
        raise ValueError("the end of a parquet file is missing")
    found, make = _mark_in(bytes(raw[footer:]))
    if make is None:
        return 0, b""
    at = footer + found
    digest = make(raw[:at])
    digest.update(raw[at + HEX :])
    return at, digest.hexdigest().encode()


def stamp_of(file: pa.NativeFile) -> dict[str, Any] | None:
    """What a whole shard says of itself; None if it was made before shards did. Reads every byte, in pieces.

    Raises:
        OSError, ValueError: missing or damaged.
    """
    size = file.size()
    end = file.read_at(8, max(0, size - 8))
    footer = size - 8 - int.from_bytes(end[:4], "little")
    if end[4:] != b"PAR1" or footer < 0:
        raise ValueError("the end of a parquet file is missing")
    found, make = _mark_in(file.read_at(size - footer, footer))
    if make is None:
        return None
    at, digest = footer + found, make()
    for start, stop in ((0, at), (at + HEX, size)):
        for piece in range(start, stop, PIECE):
            file.seek(piece)
            digest.update(file.read_buffer(min(PIECE, stop - piece)))
    if file.read_at(HEX, at) != digest.hexdigest().encode():
        raise ValueError("its bytes are not those written")
    return dict(json.loads(pq.read_metadata(file).metadata[STAMP]))


def read_stamp(path: Path) -> dict[str, Any] | None:
    """As :func:`stamp_of`."""
    with pa.OSFile(str(path)) as file:
        return stamp_of(file)


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[pa.NativeFile]:
    """A shard to be checked and then decoded: the same bytes, of the file that bore the name when it was opened."""
    with pa.OSFile(str(path)) as file:
        # The usual shard is read once; one of wide rows, which memory may not hold, twice.
        yield pa.BufferReader(file.read_buffer()) if file.size() <= ROW_GROUP else file


def flaw_of(path: Path, manifest: Mapping[str, Any], number: int, rows: int) -> str:
    """What is wrong with a shard, in words; empty if nothing is. Reads it whole, once."""
    if not path.exists():
        return "missing"
    try:
        with open_shard(path) as file:
            return flaw_in(file, manifest, number, rows)
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return "damaged"


def flaw_in(file: pa.NativeFile, manifest: Mapping[str, Any], number: int, rows: int) -> str:
    """As :func:`flaw_of`, of an open shard.

    Raises:
        OSError, ValueError, KeyError, ArrowException: damaged.
    """
    stamp = stamp_of(file)
    if stamp is not None:
        return "" if stamp["shard"] == number and same_store(stamp, manifest) else "of another store"
    if "blake2b" in manifest:
        return "damaged"
    found = pq.ParquetFile(file)
    makers = set()
    for group in range(found.num_row_groups):
        makers |= set(found.read_row_group(group)["neuron_extractor"].unique().to_pylist())
    if makers != {manifest["extractor_hash"]}:
        return "of another store"
    return "" if found.metadata.num_rows == rows else "damaged"


def identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two pools the same rows; terms of use, asked for online alone, do not."""
    return {name: about.get(name) for name in ("id", "commit", "config", "split")}


def same_store(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    names = ("extractor_hash", "features", "rows", "shard_rows")
    return all(one[name] == other[name] for name in names) and identity(one["pool"]) == identity(other["pool"])
