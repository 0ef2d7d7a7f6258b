"""Load pools and targets by name: a local file or folder, bundled rows, or a Hub id."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, List, ReadInstruction, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import DatasetInfo, HfApi, constants

from ..core import bundled
from ..core.errors import NeuronSelectError, unknown
from ..core.provenance import SourceRecord, record_of
from ..core.sources import content_hash, hub_errors
from .formats import RowFormat, read_row, row_format

BUNDLED = "bundled:"
"""Prefix of rows that come with the package."""

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_PACKED = (".gz", ".xz", ".zst")
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


def _split_outside_brackets(text: str) -> list[str]:
    """``config:train[:100]`` -> ``["config", "train[:100]"]``: brackets protect their colon."""
    return re.split(r":(?![^\[]*\])", text)


def load_rows(spec: str, *, option: str = "pool", streaming: bool = False, token: str | bool | None = None) -> Rows:
    """Load rows.

    Args:
        spec: an existing path wins (.jsonl, .json, .csv, .parquet, also .gz, .xz, .zst; a
            ``save_to_disk`` folder; a folder of parquet or JSON), else ``bundled:pool`` or ``bundled:TARGET``, else
            ``org/name[@revision][:config[:split]]``; the default split is ``train``.
        option: name of the argument, for errors. streaming: give an IterableDataset and download as it is read.

    Raises:
        NeuronSelectError: the rows do not exist, cannot be read, or have several splits.
    """
    path = Path(spec)
    if path.exists():
        return _load_local(path, option, streaming)
    if spec.startswith(BUNDLED):
        rows = _load_local(_bundled_file(spec, option), option, streaming)
        return Rows(rows.data, rows.about | {"id": spec})
    match = _HUB.fullmatch(spec)
    if match is None or spec.startswith((".", "/", "~")):
        raise NeuronSelectError(
            "no such file or folder, and not a Hub id (org/name[@revision][:config[:split]])", option=option, value=spec
        )
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


def load_again(spec: str, about: Mapping[str, Any]) -> Dataset:
    """Load a spec's rows on another machine.

    Raises:
        NeuronSelectError: they cannot be loaded there, or are not the rows described by ``about``.
    """
    rows = load_rows(spec)
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


def _load_local(path: Path, option: str, streaming: bool) -> Rows:
    about: dict[str, Any] = {"id": path.resolve().name, "commit": f"content:{content_hash(path)}"}
    try:
        if path.is_dir() and (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = load_from_disk(str(path))
            if isinstance(loaded, DatasetDict):
                raise NeuronSelectError(
                    f"holds the splits {', '.join(loaded)}; name one of their folders", option=option, value=path.name
                )
            return Rows(loaded.to_iterable_dataset() if streaming else loaded, about)
        files = [path]
        if path.is_dir():
            root = path
            if (path / "selection.json").is_file():  # rows selected before: the first source's terms still apply
                root = path / "data"
                first = json.loads((path / "selection.json").read_text(encoding="utf-8")).get("pool", {})
                about |= {name: first[name] for name in ("license", "restricted") if first.get(name)}
            files = sorted(p for p in root.rglob("*") if _builder(p) and p.is_file() and p.name != "selection.json")
        builders = {_builder(file) for file in files}
        if not files or None in builders or len(builders) > 1:
            raise NeuronSelectError(
                f"needs {', '.join(_BUILDERS)} (also {', '.join(_PACKED)}), a save_to_disk folder, or a folder of one kind",
                option=option, value=path.name,
            )  # fmt: skip
        data = load_dataset(
            str(builders.pop()), data_files=[os.fspath(file) for file in files], split="train", streaming=streaming
        )
    except NeuronSelectError:
        raise
    except StopIteration as cause:  # the JSON reader raises it for an empty file
        raise NeuronSelectError("there are no rows", option=option, value=path.name) from cause
    except (DatasetGenerationError, ValueError, OSError, TypeError) as cause:
        reason = " ".join(str(cause.__cause__ or cause).split())[:240]
        raise NeuronSelectError(f"cannot be read: {reason}", option=option, value=path.name) from cause
    return Rows(data, about)


def with_messages(data: Dataset, fmt: RowFormat | None = None) -> Dataset:
    """Rows of any format with a ``messages`` column (roles and contents); an existing one is kept.

    Raises:
        NeuronSelectError: columns missing, or plain texts, which have no turns.
    """
    if "messages" in data.column_names:
        return data
    fmt = fmt or row_format(data.column_names)
    if fmt.name == "text":
        raise NeuronSelectError("plain texts have no turns; name columns with messages, or prompt and completion",
                                option="row_format", value="text")  # fmt: skip
    turns = [
        [{"role": m["role"], "content": m["content"]} for m in read_row(row, fmt).messages]
        for row in data.select_columns(fmt.used)
    ]
    return data.add_column("messages", turns, feature=List({"role": Value("string"), "content": Value("string")}))


def _builder(path: Path) -> str | None:
    suffixes = [s for s in path.suffixes if s not in _PACKED]
    return _BUILDERS.get(suffixes[-1]) if suffixes else None
