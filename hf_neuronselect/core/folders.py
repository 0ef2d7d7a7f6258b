"""The folders this package writes: their files, and how a selection is checked before it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import NeuronSelectError
from .provenance import CapabilityRecord, LibraryRecord, Provenance, TrainingRecord
from .seals import first_changed, read
from .writing import FolderKind, settle

SELECTION_RECORD = "selection.json"
TRAINING_RECORD = "training.json"
DATA_FILE = "data/train-00000-of-00001.parquet"
SCORES_FILE = "scores.parquet"
LIBRARY_RECORD = "library.json"
CAPABILITY_FOLDER = "capability"
CAPABILITY_RECORD, CAPABILITY_FILE = "config.json", "capability.safetensors"
FITTED = (f"{CAPABILITY_FOLDER}/{CAPABILITY_RECORD}", f"{CAPABILITY_FOLDER}/{CAPABILITY_FILE}")


SELECTION = FolderKind(
    "a selection folder", (SELECTION_RECORD,), '"budget"', (SCORES_FILE, "report.html", DATA_FILE, *FITTED),
    again="select again, or use the file itself as rows",
)  # fmt: skip
CAPABILITY = FolderKind(
    "a capability folder", (CAPABILITY_RECORD,), '"exemplars"', (CAPABILITY_FILE,), again="fit it again"
)
LIBRARY = FolderKind(
    "a feature library", (LIBRARY_RECORD,), '"capabilities"',
    (f"capabilities/*/{CAPABILITY_RECORD}", f"capabilities/*/{CAPABILITY_FILE}"), again="save the library again",
)  # fmt: skip
ADAPTER_FILES = (
    "adapter_config.json", "adapter_model*.safetensors", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
ADAPTER = FolderKind(
    "an adapter trained here", (TRAINING_RECORD,), '"base_model"', ADAPTER_FILES, begun=("checkpoints/key",),
    again="train it again",
)  # fmt: skip
SAE_WORK = "unfinished"
SAE = FolderKind(  # of other blocks, too: they stay
    "an SAE folder", ("*/sae.safetensors",), begun=(SAE_WORK,), again="download or train it again"
)
COMPARISON_STORE, COMPARISON_EXEMPLARS = "signals", "exemplars"
COMPARISON = FolderKind(
    "a comparison's folder", ("compare.csv",), "method,target,rows", (
        "compare.md", "compare.html", "compare.parquet", "overlap.csv", "sources.csv", "training.csv", "training.parquet",
        "target_overlap.csv", "core.csv", "target_sets.csv", "picks.parquet", "cosines.csv", "transfer.csv",
    ), begun=(f"{COMPARISON_EXEMPLARS}/*/manifest.json", f"{COMPARISON_STORE}/manifest.json"),
)  # fmt: skip
DEMO = FolderKind("a demo folder", ("report.html",), "<title>neuronselect demo", ("profiles.png", "pool.parquet"))
RUN = FolderKind("a run's folder", ("run.json",), '"steps"', again="name another folder")
# A store whose manifest was lost is restored from its shards.
STORE = FolderKind("a feature store", ("manifest.json", "*/signal.json", "*/shard-*.parquet", ".*.part"))
JUDGED, JUDGED_ROWS = "judged.json", "judged.parquet"
JUDGEMENT = FolderKind("a judge's folder", (JUDGED,), '"judge"', (JUDGED_ROWS,), again="judge again")
EVALUATION = FolderKind("an evaluation's folder", ("evaluation.json",), '"base"')


Made = TypeVar("Made", Provenance, CapabilityRecord, LibraryRecord, TrainingRecord)


def read_selection(folder: Path, name: str, option: str = "selection") -> Provenance:
    """Read ``selection.json`` of a folder and check the files it lists.

    Raises:
        NeuronSelectError: not a selection folder, or one that was changed.
    """
    made = _record_in(folder, SELECTION, Provenance, name, option)
    files = made.files or {}
    if not {DATA_FILE, SCORES_FILE} <= files.keys() <= {DATA_FILE, SCORES_FILE, *FITTED}:
        raise NeuronSelectError(f"not {SELECTION.what} (its record lists other files)", option=option, value=name)
    try:
        rows = pq.read_metadata(folder / DATA_FILE).num_rows
        about = f" ({rows} rows in data/, {made.counts.selected} by {SELECTION_RECORD})"
    except (OSError, pa.ArrowException):
        about = ""
    _check_files(folder, SELECTION, files, name, option, about)
    return made


def fetch_selection(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None, option: str = "selection"
) -> tuple[Path, Provenance]:
    """The folder of a selection, local or from the Hub, and its record.

    Raises:
        NeuronSelectError: as :func:`read_selection`, or it cannot be had.
    """
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download  # heavy

        from .sources import hub_errors

        with hub_errors(option, str(source)):
            folder = Path(
                snapshot_download(
                    str(source), repo_type="dataset", revision=revision, token=token,
                    allow_patterns=[SELECTION_RECORD, DATA_FILE, SCORES_FILE, *FITTED],
                )
            )  # fmt: skip
    return folder, read_selection(folder, str(source), option)


def read_capability(folder: Path, name: str, option: str = "target") -> CapabilityRecord:
    """Read ``config.json`` of a capability's folder and check the file it lists.

    Raises:
        NeuronSelectError: not a capability, or one that was changed.
    """
    made = _record_in(folder, CAPABILITY, CapabilityRecord, name, option)
    if (made.files or {}).keys() != {CAPABILITY_FILE}:
        raise NeuronSelectError(f"not {CAPABILITY.what} (its record lists other files)", option=option, value=name)
    _check_files(folder, CAPABILITY, made.files or {}, name, option)
    return made


def read_library(folder: Path, name: str, option: str = "target") -> LibraryRecord:
    """Read ``library.json`` of a folder and check its capabilities.

    Raises:
        NeuronSelectError: not a feature library, or one that was changed.
    """
    made = _record_in(folder, LIBRARY, LibraryRecord, name, option)
    for entry, listed in made.capabilities.items():
        check_entry(entry, listed, read_capability(folder / "capabilities" / entry, name, option), name, option)
    return made


def check_entry(
    entry: str, listed: CapabilityRecord, found: CapabilityRecord, name: str, option: str = "target"
) -> None:  # fmt: skip
    """Compare a capability's record with the one that its library lists.

    Raises:
        NeuronSelectError: they differ.
    """
    if found != listed:
        raise NeuronSelectError(f"its capability {entry} is not the one that {LIBRARY_RECORD} lists; {LIBRARY.again}",
                                option=option, value=name)  # fmt: skip


def read_adapter(folder: Path, name: str, option: str = "adapter") -> TrainingRecord:
    """Read ``training.json`` of an adapter's folder and check the files it lists.

    Raises:
        NeuronSelectError: not an adapter trained here, or one that was changed.
    """
    made = _record_in(folder, ADAPTER, TrainingRecord, name, option)
    _check_files(folder, ADAPTER, made.files or {}, name, option)
    return made


def _record_in(folder: Path, kind: FolderKind, record: type[Made], name: str, option: str) -> Made:
    settle(folder, kind, option)
    file = folder / kind.records[0]
    return read(file, record, what=kind.what, again=kind.again, option=option, value=name)


def _check_files(
    folder: Path, kind: FolderKind, files: Mapping[str, str], name: str, option: str, about: str = ""
) -> None:
    try:
        changed = first_changed(folder, files)
    except OSError as cause:
        raise NeuronSelectError(f"cannot be read: {cause.strerror or cause}", option=option, value=name) from cause
    if changed is None:
        return
    how = f"was changed after {kind.records[0]} was written{about}"
    if not (folder / changed).is_file():
        how = f"is missing, which {kind.records[0]} lists"
    raise NeuronSelectError(f"{changed} {how}; {kind.again}", option=option, value=name)
