"""Load pools and targets by name: a local file or folder, bundled rows, or a Hub id."""

from __future__ import annotations

import glob
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset, List, ReadInstruction, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import DatasetInfo, HfApi, constants

from ..core import bundled
from ..core.digests import contents_hash, files_below
from ..core.errors import NeuronSelectError, near_names, unknown
from ..core.folders import SELECTION_RECORD, read_selection
from ..core.provenance import SourceRecord, record_of
from ..core.seals import json_object
from ..core.sources import hub_errors
from .files import PACKED, read_files, stream_files
from .formats import Conversation, RowFormat, read_row, row_format, selection_columns
from .identity import pool_digest

BUNDLED = "bundled:"
"""Prefix of rows that come with the package."""

_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# Files that describe data, beside the data.
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", SELECTION_RECORD}
# Words in the names of files and folders that say of which split they are.
_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
# Where `datasets` caches rows from the Hub: org___name_in_snake_case/config/version/commit/.
_CACHED = re.compile(r"/(?P<org>[^/]+?)___[^/]+/(?P<config>[^/]+)/\d+\.\d+\.\d+/(?P<commit>[0-9a-f]{40})/[^/]+$")
_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[^:]+))?(:(?P<rest>.+))?")


@dataclass(frozen=True)
class Rows:
    """A loaded pool or target.

    Attributes:
        data: the rows. about: their source for the provenance: id, commit or content hash, config, split.
    """

    data: Dataset | IterableDataset
    about: dict[str, Any]

    @property
    def source(self) -> SourceRecord:
        """``about`` as a record."""
        return record_of(self.about, SourceRecord)


def rows_name(spec: str) -> str:
    """A short name for rows: ``folder/b.v2.jsonl`` is ``b``, ``org/c@main:config`` is ``c``."""
    name = spec.removeprefix(BUNDLED) if spec.startswith(BUNDLED) else spec.split(":")[0].split("@")[0]
    return Path(name).name.split(".")[0]


def _bundled_file(spec: str, option: str) -> Path:
    files = {"pool": bundled.POOL, **bundled.TARGETS}
    name = spec.removeprefix(BUNDLED)
    if name not in files:
        raise unknown("bundled rows", spec, [f"{BUNDLED}{known}" for known in files], option)
    return files[name]


def _near(path: Path) -> str:
    """Names beside a path that does not exist, if one of them was probably meant."""
    try:
        near = near_names(path.name, [one.name for one in path.parent.iterdir()])
    except (OSError, ValueError):
        return ""
    return f" (did you mean {' or '.join(str(path.parent / name) for name in near)}?)" if near else ""


def _split_outside_brackets(text: str) -> list[str]:
    """``config:train[:100]`` -> ``["config", "train[:100]"]``: brackets protect their colon."""
    return re.split(r":(?![^\[]*\])", text)


def load_rows(
    spec: str,
    *,
    option: str = "pool",
    streaming: bool = False,
    token: str | bool | None = None,
    texts: Iterable[str] = (),
) -> Rows:
    """Load rows.

    Args:
        spec: an existing path wins (.jsonl, .json, .csv, .parquet, also .gz, .xz, .zst; a ``save_to_disk`` folder; a
            folder of files of one kind, ``FOLDER:SPLIT`` for another split than ``train``), else ``bundled:pool`` or
            ``bundled:TARGET``, else ``org/name[@revision][:config[:split]]``; the default split is ``train``.
        option: name of the argument, for errors. streaming: give an IterableDataset and download as it is read.
        texts: columns of JSON files that are texts, besides those of the row formats.

    Raises:
        NeuronSelectError: the rows do not exist, cannot be read, or have several splits.
    """
    if not spec.strip():  # Path("") is the folder one is in
        raise NeuronSelectError("no rows are named; give a file, a folder or a Hub id", option=option, value=spec)
    path, split = Path(spec), None
    folder, _, word = spec.rpartition(":")
    if not path.exists() and folder and Path(folder).is_dir():
        path, split = Path(folder), word
    if path.exists():
        return _load_local(path, option, streaming, split=split, texts=texts)
    if spec.startswith(BUNDLED):
        rows = _load_local(_bundled_file(spec, option), option, streaming)
        return Rows(rows.data, rows.about | {"id": spec})
    match = _HUB.fullmatch(spec)
    if match is None or spec.startswith((".", "/", "~")):
        raise NeuronSelectError(
            f"no such file or folder{_near(path)}, and not a Hub id (org/name[@revision][:config[:split]])",
            option=option, value=spec,
        )  # fmt: skip
    parts = _split_outside_brackets(match["rest"]) if match["rest"] else []
    if len(parts) > 2:
        raise NeuronSelectError("more than config:split after the id", option=option, value=spec)
    split = parts[1] if len(parts) == 2 else "train"
    config = parts[0] if parts else None
    revision = match["revision"]
    with hub_errors(option, spec):
        try:
            commit, terms = None, {"restricted": "its terms were not asked for, offline"}
            if not constants.HF_HUB_OFFLINE:
                info = HfApi(token=token).dataset_info(match["id"], revision=revision)
                commit, terms = info.sha, _terms(info)
            data = load_dataset(
                match["id"], config, split=split, revision=commit or revision, streaming=streaming, token=token
            )
        except (DatasetNotFoundError, DatasetGenerationError, ValueError) as cause:
            reason = " ".join(str(cause).split())[:300]
            raise NeuronSelectError(f"cannot be loaded: {reason}", option=option, value=spec) from cause
    cached = source_of(data)
    commit = commit or (cached.origin.commit if cached else None) or revision
    return Rows(data, {"id": match["id"], "commit": commit, "config": config, "split": split} | terms)


def load_again(spec: str, about: Mapping[str, Any], texts: Sequence[str] = ()) -> Dataset:
    """Load a spec's rows on another machine.

    Raises:
        NeuronSelectError: they cannot be loaded there, or are not the rows described by ``about``.
    """
    rows = load_rows(spec, texts=texts)
    if any(rows.about.get(name) != about.get(name) for name in ("id", "commit", "config", "split")):
        raise NeuronSelectError(
            f"the node {platform.node()} has other rows there: {rows.about}, not {dict(about)}", option="pool",
            value=Path(spec).name,
        )  # fmt: skip
    assert isinstance(rows.data, Dataset)
    return rows.data


def _terms(info: DatasetInfo) -> dict[str, Any]:
    """Terms of use: ``license`` as the source states it, ``restricted`` (private or gated)."""
    stated = info.card_data.get("license") if info.card_data else None
    restricted = "private" if info.private else "gated" if info.gated else None
    return {name: value for name, value in (("license", stated), ("restricted", restricted)) if value}


def source_of(data: Dataset | IterableDataset) -> SourceRecord | None:
    """The Hub dataset that rows come from, as far as their cache files tell.

    Returns:
        The data set itself for a whole split; a record with ``derived_from`` for rows that were taken from one; None
        where nothing is known.
    """
    files = getattr(data, "cache_files", None) or []
    found = next((m for f in files if (m := _CACHED.search(Path(f["filename"]).as_posix()))), None)
    if found is None:
        return None
    # That folder's name is in snake case; the Hub's own cache has the real name, under the same commit.
    kept = Path(constants.HF_HUB_CACHE).glob(f"datasets--{found['org']}--*/snapshots/{found['commit']}")
    names = {path.parent.parent.name.split("--", 2)[2] for path in kept}
    if len(names) != 1:
        return None
    about = SourceRecord(
        id=f"{found['org']}/{names.pop()}", commit=found["commit"], config=found["config"], split=str(data.split)
    )
    lengths = {name: split.num_examples for name, split in (data.info.splits or {}).items()}
    try:
        parts = ReadInstruction.from_spec(str(data.split)).to_absolute(lengths)
        rows = sum((p.to or lengths[p.splitname]) - (p.from_ or 0) for p in parts)
    except (AssertionError, ValueError, KeyError):  # a split of another name
        rows = -1
    whole = rows == len(data) and data._indices is None
    return about if whole else SourceRecord(derived_from=about)


def _pinned(data: Dataset | IterableDataset, about: Mapping[str, Any], files: Iterable[Path]) -> Rows:
    """Local rows with their identity: their content as read; of a stream, the bytes of its files."""
    found = pool_digest(data) if isinstance(data, Dataset) else contents_hash(files)
    return Rows(data, {**about, "commit": f"content:{found}"})


def _load_local(
    path: Path, option: str, streaming: bool, *, split: str | None = None, texts: Iterable[str] = ()
) -> Rows:
    about: dict[str, Any] = {"id": path.resolve().name}
    if split is not None:
        about["split"] = split
    if (path / "dataset_dict.json").is_file():
        with _clear(option, path.name):
            splits = [str(name) for name in json_object(path / "dataset_dict.json")["splits"]]
        about["split"] = split = _choose(splits, split, path, option)
        path = path / split
    saved = (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    if (path / SELECTION_RECORD).is_file():  # rows selected before: the first source's terms still apply
        first = read_selection(path, path.name, option).pool
        about |= {name: term for name in ("license", "restricted") if (term := getattr(first, name))}
    with _clear(option, path.name):
        if saved:
            loaded = load_from_disk(str(path))
            assert isinstance(loaded, Dataset)
            loaded.data.table.validate(full=True)  # offsets beyond the file would end the process
            data: Dataset | IterableDataset = loaded.to_iterable_dataset() if streaming else loaded
            files = list(files_below(path))
        else:
            files = [path] if path.is_file() else _files_of(path, split, option)
            kinds = {_kind(file) for file in files}
            if not files or None in kinds or len(kinds) > 1:
                found = "is empty: it " if path.is_dir() and not files else ""
                raise NeuronSelectError(
                    f"{found}needs {', '.join(_KINDS)} (also {', '.join(PACKED)}), a save_to_disk folder, or a folder of one kind",
                    option=option, value=path.name,
                )  # fmt: skip
            if kinds == {"parquet"}:
                data = _read_parquet(files, streaming)
            else:
                data = (stream_files if streaming else read_files)(files, option=option, texts=texts)
        data = without_selection(data)
        if isinstance(data, Dataset) and not len(data):
            raise NeuronSelectError(
                "there are no rows; give a file or split that has some", option=option, value=path.name
            )
        return _pinned(data, about, files)


@contextmanager
def _clear(option: str, name: str) -> Iterator[None]:
    """Turn the libraries' errors about a file into one line."""
    try:
        yield
    except NeuronSelectError:
        raise
    except (DatasetGenerationError, ValueError, OSError, TypeError, AttributeError, LookupError, RecursionError,
            pa.ArrowException) as cause:  # fmt: skip
        reason = " ".join(str(cause.__cause__ or cause).split())[:240]
        raise NeuronSelectError(f"cannot be read: {reason}", option=option, value=name) from cause


def _files_of(folder: Path, split: str | None, option: str) -> list[Path]:
    """The data files of a folder, of one split where they are of several."""
    root = folder / "data" if (folder / SELECTION_RECORD).is_file() else folder
    files = sorted(p for p in root.rglob("*") if _kind(p) and p.is_file() and p.name not in _DESCRIPTIONS)
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    of: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.relative_to(root).as_posix().lower())
        of.setdefault(next((_SPLITS[word] for word in words if word in _SPLITS), ""), []).append(file)
    if split is None and of.keys() <= {"", "train"}:
        return files
    if "" in of and split is None:
        other = ", ".join(name for name in of if name)
        raise NeuronSelectError(
            f"holds files of the split {other} and {of[''][0].name}, which is of none; name a file or a split "
            f"(FOLDER:{next(name for name in of if name)})", option=option, value=folder.name,
        )  # fmt: skip
    return of[_choose([name for name in of if name], split, folder, option)]


def _choose(splits: Sequence[str], split: str | None, folder: Path, option: str) -> str:
    """The split asked for, else ``train``."""
    wanted = split or "train"
    chosen = wanted if wanted in splits else _SPLITS.get(wanted.lower(), wanted)
    if chosen not in splits:
        found = " and ".join(splits) or "no split by its files' names"
        raise NeuronSelectError(f"has {found}, not {wanted}; name one: FOLDER:SPLIT", option=option, value=folder.name)
    return chosen


def _read_parquet(files: Sequence[Path], streaming: bool) -> Dataset | IterableDataset:
    if not any(pq.read_metadata(file).num_rows for file in files):
        return Dataset(pq.read_schema(files[0]).empty_table())
    # The names are patterns to `datasets`: brackets in them stand for themselves.
    names = [glob.escape(os.fspath(file.absolute())) for file in files]
    # A configuration of its own: rows cached from these files while they had other bytes are not used.
    return load_dataset("parquet", contents_hash(files), data_files=names, split="train", streaming=streaming)


def without_selection(data: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Rows selected before, without the columns of that selection, as the rows of any pool.

    A column ``source_index`` alone comes from an export; it is left out with a warning.
    """
    drop = selection_columns(data.column_names or ())
    return data.remove_columns(drop) if drop else data


def conversations_of(data: Dataset | Sequence[Conversation], fmt: RowFormat | None = None) -> list[Conversation]:
    """Read all rows, of a format that is found by the column names unless it is given; read rows stay as they are."""
    if not isinstance(data, Dataset):
        return list(data)
    fmt = fmt or row_format(data.column_names)
    return [read_row(row, fmt) for row in data.with_format(None).select_columns(fmt.used)]


def with_messages(data: Dataset, fmt: RowFormat | None = None) -> Dataset:
    """Rows with a column ``messages`` (roles and contents), where that says all of each row.

    Rows that have one keep it. None is added to plain texts, nor to rows with tools or tool calls: their own columns
    say more.
    """
    fmt = fmt or row_format(data.column_names)
    if "messages" in data.column_names or fmt.name == "text":
        return data
    rows = conversations_of(data, fmt)
    if any(row.tools or any(set(m) != {"role", "content"} for m in row.messages) for row in rows):
        return data
    turns = [row.messages for row in rows]
    return data.add_column("messages", turns, feature=List({"role": Value("string"), "content": Value("string")}))


def _kind(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in PACKED]
    return _KINDS.get(suffixes[-1]) if suffixes else None


def single_split(data: Any, option: str) -> Dataset | IterableDataset:
    """The data, or the only split of a ``DatasetDict``.

    Raises:
        NeuronSelectError: it is something else.
    """
    if isinstance(data, DatasetDict) and len(data) == 1:
        data = next(iter(data.values()))
    if not isinstance(data, (Dataset, IterableDataset)):
        kind = f"the splits {', '.join(data)}" if isinstance(data, Mapping) else type(data).__name__
        raise NeuronSelectError(f"needs a datasets.Dataset or IterableDataset, got {kind}", option=option)
    return data
