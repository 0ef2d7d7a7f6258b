"""Folders with a record: it is written last, removed first, and lists checksums of the other files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import NeuronSelectError
from .provenance import Provenance, decode
from .sources import content_hash

SELECTION_RECORD = "selection.json"
TRAINING_RECORD = "training.json"
DATA_FILE = "data/train-00000-of-00001.parquet"
SCORES_FILE = "scores.parquet"
CAPABILITY_FOLDER = "capability"
CAPABILITY_RECORD, CAPABILITY_FILE = "config.json", "capability.safetensors"
FITTED = (f"{CAPABILITY_FOLDER}/{CAPABILITY_RECORD}", f"{CAPABILITY_FOLDER}/{CAPABILITY_FILE}")


def _part(folder: Path, record: str) -> Path:
    return folder / f".{record}.part"


def check_free(folder: Path, record: str, what: str) -> None:
    """Refuse a folder that holds anything else than ``what``, whole or half-written.

    Raises:
        NeuronSelectError: a file, or a folder without such a record.
    """
    ours = (folder / record).exists() or _part(folder, record).exists()
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not ours)):
        raise NeuronSelectError(f"exists and is not {what}; name another", option="out", value=folder.name)


def begin(folder: Path, record: str, what: str) -> None:
    """Make a folder ready to be written: without its record it does not pass as whole.

    Raises:
        NeuronSelectError: it holds something else.
    """
    check_free(folder, record, what)
    folder.mkdir(parents=True, exist_ok=True)
    _part(folder, record).touch()
    (folder / record).unlink(missing_ok=True)


def finish(folder: Path, record: str, text: str) -> None:
    """Write the record, in one step: all other files are whole."""
    part = _part(folder, record)
    part.write_text(text, encoding="utf-8")
    part.replace(folder / record)


def checksums(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Content hashes of some files of a folder."""
    return {name: content_hash(folder / name) for name in files}


def read_selection(folder: Path, name: str) -> Provenance:
    """Read ``selection.json`` of a folder and check the files it lists.

    Raises:
        NeuronSelectError: not a selection folder, or one that was edited.
    """
    try:
        text = (folder / SELECTION_RECORD).read_bytes()
        made = decode(text, Provenance, what="a selection folder", option="selection", value=name)
        files = made.files or {}
        if not {DATA_FILE, SCORES_FILE} <= files.keys() <= {DATA_FILE, SCORES_FILE, *FITTED}:
            raise NeuronSelectError("not a selection folder (its record lists other files)", option="selection",
                                    value=name)  # fmt: skip
        rows = pq.read_metadata(folder / DATA_FILE).num_rows
        now = checksums(folder, files)
    except (OSError, pa.ArrowInvalid) as cause:
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:160]
        raise NeuronSelectError(f"not a selection folder ({reason})", option="selection", value=name) from cause
    for file, before in files.items():
        if now[file] != before:
            raise NeuronSelectError(
                f"{file} was changed after {SELECTION_RECORD} was written ({rows} rows in data/, "
                f"{made.counts.selected} by {SELECTION_RECORD}); select again, or use the file itself as rows",
                option="selection", value=name,
            )  # fmt: skip
    return made
