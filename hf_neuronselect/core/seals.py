"""Seals and checksums: nothing is read that is not as this package wrote it.

A record holds a seal, a hash of its own values, and the checksums of the files beside it. They show damage and edits,
not forgery: anyone can make a seal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from .digests import checksum
from .errors import NeuronSelectError
from .provenance import plain

SEAL = "seal"
CHECKSUMS = "neuronselect-checksums.json"
"""Beside files whose own format has no room for checksums."""

Record = TypeVar("Record")


@dataclass(frozen=True)
class Checksums:
    """``neuronselect-checksums.json``: checksums of files beside it."""

    files: dict[str, str]


class Broken(ValueError):
    """A record that was changed after it was sealed."""


def _seal(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def encode(record: Any) -> str:
    """A record (a dataclass or a mapping) as indented JSON, sealed, with a final line end."""
    values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(plain(record)))  # as it will be read
    text = msgspec.json.encode({**values, SEAL: _seal(values)})
    return msgspec.json.format(text, indent=2).decode() + "\n"


def unseal(text: str | bytes) -> dict[str, Any]:
    """The values of a sealed JSON object, checked.

    Raises:
        Broken: they are not those that were sealed.
        ValueError: no JSON object, or no seal.
    """
    try:
        values = msgspec.json.decode(text, type=dict[str, Any])
        seal = values.pop(SEAL, None)
        whole = seal == _seal(values)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as cause:
        raise ValueError(" ".join(str(cause).split())[:160]) from cause
    if seal is None:
        raise ValueError("it has no seal")
    if not whole:
        raise Broken("was changed after it was written")
    return values


def decode(
    text: str | bytes, kind: type[Record], *, what: str, option: str, value: object, file: str = "its record",
    again: str = "make it again",
) -> Record:  # fmt: skip
    """A record read from JSON, its seal checked.

    Args:
        what: the thing it should be, for the error: ``a selection folder``. option, value: what errors name.
        file: the record's name. again: how a changed one is made again.

    Raises:
        NeuronSelectError: no record, one that was changed, or other types than the record has.
    """
    try:
        unseal(text)
        return msgspec.json.decode(text, type=kind)
    except Broken as cause:
        raise NeuronSelectError(
            f"{file} was changed after it was written; {again}", option=option, value=value
        ) from cause
    except (ValueError, msgspec.MsgspecError, RecursionError) as cause:
        reason = " ".join(str(cause).split())[:160]
        raise NeuronSelectError(f"not {what} ({reason}, in {file})", option=option, value=value) from cause


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object that others wrote.

    Raises:
        ValueError: it cannot be read, or is something else; in one line.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as cause:
        reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())[:160]
        raise ValueError(f"{path.name} cannot be read as JSON ({reason})") from cause
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return found


def read(path: Path, kind: type[Record], *, what: str, again: str, option: str, value: object) -> Record:
    """A record's file, read as :func:`decode` does.

    Raises:
        NeuronSelectError: no such file, or no whole record.
    """
    try:
        text = path.read_bytes()
    except OSError as cause:
        reason = f"{path.name}: {cause.strerror or type(cause).__name__}"
        raise NeuronSelectError(f"not {what} ({reason})", option=option, value=value) from cause
    return decode(text, kind, what=what, option=option, value=value, file=path.name, again=again)


# ------------------------------------------------------------------------------------------ files beside
def checksums(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Checksums of some files of a folder."""
    return {name: checksum(folder / name) for name in files}


def write_checksums(folder: Path, files: Iterable[str]) -> None:
    """Write checksums of those files that the folder has."""
    found = [name for name in files if (folder / name).is_file()]
    (folder / CHECKSUMS).write_text(encode(Checksums(checksums(folder, found))), encoding="utf-8")


def check_files(folder: Path, *, what: str, again: str, option: str, value: object) -> None:
    """Check the files whose checksums lie beside them; a folder made elsewhere has none.

    Raises:
        NeuronSelectError: one was changed.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return
    found = read(path, Checksums, what=what, again=again, option=option, value=value)
    try:
        changed = first_changed(folder, found.files)
    except OSError as cause:
        raise NeuronSelectError(f"cannot be read: {cause.strerror or cause}", option=option, value=value) from cause
    if changed:
        raise NeuronSelectError(f"{changed} was changed after {CHECKSUMS} was written; {again}", option=option,
                                value=value)  # fmt: skip


def first_changed(folder: Path, files: Mapping[str, str]) -> str | None:
    """The first of the listed files that is missing or has other bytes."""
    for name, before in files.items():
        path = folder / name
        if not path.is_file() or checksum(path) != before:
            return name
    return None
