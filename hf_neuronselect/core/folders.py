"""The folders this package writes: their files, and how a selection is checked before it is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .digests import checksum
from .errors import NeuronSelectError
from .provenance import Provenance, decode
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
    "a selection folder", (SELECTION_RECORD,), '"budget"', (SCORES_FILE, "report.html", DATA_FILE, *FITTED)
)
CAPABILITY = FolderKind("a capability folder", (CAPABILITY_RECORD,), '"exemplars"', (CAPABILITY_FILE,))
LIBRARY = FolderKind(
    "a feature library", (LIBRARY_RECORD,), '"capabilities"',
    (f"capabilities/*/{CAPABILITY_RECORD}", f"capabilities/*/{CAPABILITY_FILE}"),
)  # fmt: skip
ADAPTER_FILES = (
    "adapter_config.json", "adapter_model*.safetensors", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
ADAPTER = FolderKind("an adapter folder", (TRAINING_RECORD,), '"base_model"', ADAPTER_FILES, begun="checkpoints/key")
SAE = FolderKind("an SAE folder", ("*/sae.safetensors",))  # of other blocks, too: they stay
COMPARISON = FolderKind("a comparison's folder", ("compare.csv",), "method,target,rows", ("compare.md",))
DEMO = FolderKind("a demo folder", ("report.html",), "<title>neuronselect demo", ("profiles.png",))
RUN = FolderKind("a run's folder", ("run.json",), '"steps"')
# A store whose manifest was lost is restored from its shards.
STORE = FolderKind("a feature store", ("manifest.json", "*/signal.json", "*/shard-*.parquet", ".*.part"))
EVALUATION = FolderKind("an evaluation's folder", ("evaluation.json",), '"base"')


def checksums(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Checksums of some files of a folder."""
    return {name: checksum(folder / name) for name in files}


def read_selection(folder: Path, name: str) -> Provenance:
    """Read ``selection.json`` of a folder and check the files it lists.

    Raises:
        NeuronSelectError: not a selection folder, or one that was edited.
    """
    settle(folder, SELECTION, "selection")
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
