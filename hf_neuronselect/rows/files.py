"""Rows of JSON and CSV files as they are written, whole or as a stream: no type is guessed for a text.

Dates, numbers and words like ``NA`` in the place of a text are texts, and every column of a CSV file is one. A file
that cannot be read is refused in one line that names the file and the line.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset

from ..core.digests import cache_dir, file_hash
from ..core.errors import NeuronSelectError
from .formats import TEXTS, Row, selection_columns
from .table import Columns, as_dataset, chunks
from .turns import as_text, is_missing

PACKED = (".gz", ".xz", ".zst")
_VERSION = 1  # of the way files are read: a change of it makes rows kept in the cache be read again
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, pa.ArrowInvalid)
_SPACE = re.compile(r"\s*")
_OTHER_TEXT = (b"\xff\xfe", b"\xfe\xff", b"\0")  # how UTF-16 and UTF-32 begin


def read_files(files: Sequence[Path], *, option: str, texts: Iterable[str] = ()) -> Dataset:
    """All rows of JSON or CSV files, kept as Arrow in the cache and read from there.

    Args:
        option: name of the argument, for errors. texts: columns that are texts, besides those of the formats.

    Raises:
        NeuronSelectError: a file cannot be read, or there are no rows.
    """
    names = tuple(sorted(TEXTS | set(texts)))
    state = json.dumps([_VERSION, names, [file_hash(file) for file in files]])
    kept = cache_dir() / "rows" / f"{hashlib.blake2b(state.encode(), digest_size=16).hexdigest()}.arrow"
    if not kept.is_file():
        paths = [os.fspath(file) for file in files]
        part = kept.with_name(f"{kept.name}.{os.getpid()}")
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            _write(lambda: read_stream(paths, option, names), part)
            part.replace(kept)
        except OSError:  # no room in the cache, or a home that is read-only
            return as_dataset(list(read_stream(paths, option, names)))
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
    return Dataset.from_file(os.fspath(kept))


def stream_files(files: Sequence[Path], *, option: str, texts: Iterable[str] = ()) -> IterableDataset:
    """The same as :func:`read_files`, read as it is used; the first row is looked at here.

    Raises:
        NeuronSelectError: the first row cannot be read, or there is none.
    """
    paths, names = [os.fspath(file) for file in files], tuple(sorted(TEXTS | set(texts)))
    first = next(read_stream(paths, option, names))
    drop = tuple(selection_columns(first))
    given = {"files": paths, "option": option, "texts": names, "drop": drop}
    return IterableDataset.from_generator(read_stream, gen_kwargs=given)


def _write(read: Callable[[], Iterator[Row]], path: Path) -> None:
    """Write rows as an Arrow stream; once more if later rows had other types than the first."""
    columns = Columns()
    while True:
        columns.widened, writer = False, None
        with pa.OSFile(os.fspath(path), "wb") as sink:
            for rows in chunks(read()):
                batch = columns.batch(rows)
                if not columns.widened:
                    writer = writer or pa.ipc.new_stream(sink, batch.schema)
                    writer.write_batch(batch)
            if writer is not None:
                writer.close()
        if not columns.widened:
            return


# ------------------------------------------------------------------------------------------ one file
def read_stream(files: Sequence[str], option: str, texts: Sequence[str], drop: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of files, one after another, without the columns to ``drop``.

    Raises:
        NeuronSelectError: a file cannot be read, or there are no rows.
    """
    some = False
    for file in files:
        for row in _read(Path(file), option):
            for name in texts:
                if name in row and not isinstance(value := row[name], str):
                    text = as_text(value)
                    row[name] = None if is_missing(value) else value if text is None else text
            for name in drop:
                row.pop(name, None)
            yield row
            some = True
    if not some:
        raise NeuronSelectError(
            "there are no rows; give a file that has some",
            option=option,
            value=", ".join(Path(f).name for f in files[:3]),
        )


def _read(path: Path, option: str) -> Iterator[Row]:
    is_csv = [suffix for suffix in path.suffixes if suffix not in PACKED][-1:] == [".csv"]
    line = 0

    def lines(stream: Iterable[bytes]) -> Iterator[str]:
        nonlocal line
        for line, raw in enumerate(stream, 1):  # noqa: B007 (line is for errors)
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
                if any(mark in raw[:4] for mark in _OTHER_TEXT):
                    raise _Unreadable("it is not UTF-8 but UTF-16 or no text at all; save it as UTF-8")
            yield raw.decode("utf-8")

    def refused(reason: str) -> NeuronSelectError:
        return NeuronSelectError(f"cannot be read: {reason}", option=option, value=path.name)

    try:
        with _opened(path) as stream:
            yield from (_csv_rows if is_csv else _json_rows)(lines(stream))
    except UnicodeDecodeError as cause:
        byte = cause.object[cause.start]
        raise refused(f"line {line} is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from cause
    except _DAMAGED as cause:
        reason = " ".join(str(cause).split())[:120]
        raise refused(f"it is damaged or cut off after line {line} ({reason})") from cause
    except OSError as cause:  # Arrow's, of a .zst, and those of the disk
        raise refused(str(cause.strerror or cause)) from cause
    except csv.Error as cause:
        raise refused(f"line {line}: {cause}") from cause
    except json.JSONDecodeError as cause:
        raise refused(f"line {line} is no JSON ({cause.msg} at character {cause.pos + 1})") from cause
    except RecursionError as cause:
        raise refused(f"line {line} is nested too deeply") from cause
    except _Unreadable as cause:
        raise refused(str(cause).replace("{line}", str(line))) from None


class _Unreadable(Exception):
    """What is wrong with a file; ``{line}`` stands for the line that was read last."""


@contextmanager
def _opened(path: Path) -> Iterator[Iterable[bytes]]:
    """The lines of a file, unpacked."""
    if path.suffix == ".gz":
        with gzip.open(path) as stream:
            yield stream
    elif path.suffix == ".xz":
        with lzma.open(path) as stream:
            yield stream
    elif path.suffix == ".zst":
        with pa.OSFile(os.fspath(path)) as packed, pa.CompressedInputStream(packed, "zstd") as stream:
            yield io.BufferedReader(stream)
    else:
        with path.open("rb") as stream:
            yield stream


def _json_rows(lines: Iterator[str]) -> Iterator[Row]:
    """Objects one a line, or one after another over several lines, or in one list."""
    first = next((line for line in lines if line.strip()), "")
    if not first:
        return
    if first.lstrip().startswith("["):
        text = first + "".join(lines)
        (found,) = _values(text, one=True)
        for i, row in enumerate(found):
            yield _object(row, f"row {i}", text)
        return
    decoder = json.JSONDecoder(strict=False)  # a raw tab in a text does no harm
    try:
        yield _object(decoder.decode(first), "line {line}", first)
    except json.JSONDecodeError:  # not one a line
        text = first + "".join(lines)
        for i, row in enumerate(_values(text)):
            yield _object(row, f"row {i}", text)
        return
    for line in lines:
        if line.strip():
            yield _object(decoder.decode(line), "line {line}", line)


def _values(text: str, *, one: bool = False) -> Iterator[Any]:
    """JSON values over several lines, one after another; ``one``: there must be no other behind the first."""
    decoder, position = json.JSONDecoder(), 0
    try:
        while (position := _SPACE.match(text, position).end()) < len(text):  # type: ignore[union-attr]
            if one and position:
                raise json.JSONDecodeError("more behind the end of the list", text, position)
            value, position = decoder.raw_decode(text, position)
            yield value
    except json.JSONDecodeError as cause:
        raise _Unreadable(f"line {cause.lineno} is no JSON ({cause.msg} at character {cause.colno})") from cause


def _object(row: Any, where: str, text: str) -> Row:
    """A row that was read from ``text``."""
    if not isinstance(row, dict):
        raise _Unreadable(f"{where} is {type(row).__name__}, not an object with columns")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _Unreadable(f"{where} has half of a surrogate pair, which is no character") from None
    return row


def _csv_rows(lines: Iterator[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, strict=True)
    names = next(reader, [])
    names = [name or f"Unnamed: {i}" for i, name in enumerate(names)]  # a table's index, as pandas writes it
    if twice := [name for name in names if names.count(name) > 1]:
        raise _Unreadable(f"two columns have the name {twice[0]!r}")
    for cells in reader:
        if cells and len(cells) != len(names):
            raise _Unreadable(f"line {{line}} has {len(cells)} cells, the first line {len(names)}")
        if cells:
            yield dict(zip(names, cells, strict=True))
