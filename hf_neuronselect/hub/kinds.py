"""The kinds of folders this package writes, and the files that belong to each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..core.errors import NeuronSelectError
from ..core.folders import FITTED
from ..core.seals import CHECKSUMS
from .markdown import README


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Attributes:
        marker: the file (a glob) by which the kind is known. proof: a file and a text in it, where the marker is a
            common name. repo_type: type of the repository it is pushed to.
        files: globs of its files. Only these are pushed; a repository's file that matches but is missing from the
            folder is deleted in the same commit.
    """

    name: str
    marker: str
    repo_type: str
    files: tuple[str, ...]
    proof: tuple[str, str] | None = None

    def owns(self, name: str) -> bool:
        return any(_matches(name, pattern) for pattern in (README, *self.files))

    def marks(self, names: Iterable[str], read: Callable[[str], Path]) -> bool:
        """Whether files of these names are of this kind; ``read`` fetches one of them."""
        names = list(names)
        if not any(_matches(name, self.marker) for name in names):
            return False
        if self.proof is None:
            return True
        file, text = self.proof
        return file in names and text.encode() in read(file).read_bytes()


KINDS = (
    Kind("selection", "selection.json", "dataset",
         ("selection.json", "scores.parquet", "report.html", "data/*.parquet", *FITTED)),
    Kind("feature library", "library.json", "model",
         ("library.json", "capabilities/*/config.json", "capabilities/*/capability.safetensors")),
    Kind("capability", "capability.safetensors", "model", ("config.json", "capability.safetensors")),
    Kind("adapter", "adapter_config.json", "model",
         ("adapter_config.json", "adapter_model*.safetensors", "training.json", "tokenizer.json",
          "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
          "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/*.jinja")),
    Kind("SAE", "*/sae.safetensors", "model", ("*/sae.safetensors", "*/cfg.json", "*/training.json", f"*/{CHECKSUMS}")),
    Kind("feature store", "manifest.json", "dataset",
         ("manifest.json", "*/signal.json", "*/shard-*.parquet", "costs/*.json"),
         proof=("manifest.json", '"shard_rows"')),
    Kind("metric", "app.py", "space", ("*.py", "requirements.txt"), proof=(README, "- neuronselect")),
)  # fmt: skip


def _matches(name: str, pattern: str) -> bool:
    """Glob by path parts: ``*`` never crosses a slash."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def names_in(folder: Path) -> list[str]:
    """All files of a folder, relative to it."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def folder_kind(folder: Path) -> Kind:
    """Recognise a folder that this package wrote.

    Raises:
        NeuronSelectError: not a folder, or none of the known kinds.
    """
    if not folder.is_dir():
        raise NeuronSelectError("no such folder; check the path", option="folder", value=folder.name)
    names = names_in(folder)
    for kind in KINDS:
        if kind.marks(names, lambda name: folder / name):
            return kind
    raise NeuronSelectError(
        f"nothing that neuronselect writes ({', '.join(kind.name for kind in KINDS)}): "
        f"none of {', '.join(kind.marker for kind in KINDS)} is in it",
        option="folder", value=folder.name,
    )  # fmt: skip
