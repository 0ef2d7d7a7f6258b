"""To the Hub: any folder the package wrote, as ONE commit of the files that belong to its kind.

Not ``upload_folder`` (several commits with Xet on), not ``Trainer.push_to_hub`` (uploads a pickle).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..core.errors import NeuronSelectError
from ..core.sources import hub_errors
from ..selection.selection import check_selection
from .cards import PLACE, merge_card, read_text

README = "README.md"
_ANYONES = (".gitattributes", README)


@dataclass(frozen=True)
class Kind:
    """A folder the package writes.

    Attributes:
        marker: the file (a glob) that tells the kind. proof: a file and a text that stands in it, where many others
            have such a file. repo_type: where it is pushed to.
        files: globs of what belongs to it; nothing else is pushed, and what is theirs in a repository
            but not in the folder is deleted by the same commit.
    """

    name: str
    marker: str
    repo_type: str
    files: tuple[str, ...]
    proof: tuple[str, str] | None = None

    def owns(self, name: str) -> bool:
        return any(_matches(name, pattern) for pattern in (README, *self.files))

    def marks(self, names: Iterable[str], read: Callable[[str], Path]) -> bool:
        """Whether these files are of this kind; ``read`` gives one of them."""
        names = list(names)
        if not any(_matches(name, self.marker) for name in names):
            return False
        if self.proof is None:
            return True
        file, text = self.proof
        return file in names and text.encode() in read(file).read_bytes()


KINDS = (
    Kind("selection", "selection.json", "dataset",
         ("selection.json", "scores.parquet", "report.html", "data/*.parquet")),
    Kind("feature library", "library.json", "model",
         ("library.json", "capabilities/*/config.json", "capabilities/*/capability.safetensors")),
    Kind("capability", "capability.safetensors", "model", ("config.json", "capability.safetensors")),
    Kind("adapter", "adapter_config.json", "model",
         ("adapter_config.json", "adapter_model*.safetensors", "training.json", "tokenizer.json",
          "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json",
          "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/*.jinja")),
    Kind("SAE", "*/sae.safetensors", "model", ("*/sae.safetensors", "*/cfg.json", "*/training.json")),
    Kind("feature store", "manifest.json", "dataset", ("manifest.json", "shard-*.parquet"),
         proof=("manifest.json", '"shard_rows"')),
    Kind("metric", "app.py", "space", ("*.py", "requirements.txt"), proof=(README, "- neuronselect")),
)  # fmt: skip


def _matches(name: str, pattern: str) -> bool:
    """Glob by path parts: ``*`` never crosses a slash."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def folder_kind(folder: Path) -> Kind:
    """What the package wrote there.

    Raises:
        NeuronSelectError: not a folder, or nothing the package writes.
    """
    if not folder.is_dir():
        raise NeuronSelectError("no such folder", option="folder", value=folder.name)
    names = _names(folder)
    for kind in KINDS:
        if kind.marks(names, lambda name: folder / name):
            return kind
    raise NeuronSelectError(
        f"nothing that neuronselect writes ({', '.join(kind.name for kind in KINDS)}): "
        f"none of {', '.join(kind.marker for kind in KINDS)} is in it",
        option="folder", value=folder.name,
    )  # fmt: skip


def restricted_sources(folder: Path, api: HfApi) -> list[str]:
    """Private or gated sources whose rows or features, or an adapter trained on them, lie in a folder."""
    found = []
    for name in ("selection.json", "training.json", "manifest.json"):
        if (folder / name).is_file():
            try:
                made = json.loads((folder / name).read_text(encoding="utf-8"))
                pool = (made.get("selection") or made).get("pool") or {}
            except (ValueError, AttributeError) as cause:
                raise NeuronSelectError(f"{name} cannot be read: it is not what the package wrote", option="folder",
                                        value=folder.name) from cause  # fmt: skip
            why = pool.get("restricted") or _restriction(pool.get("derived_from") or pool, api)
            if why:
                found.append(f"{(pool.get('derived_from') or pool).get('id', 'the pool')} ({why})")
    return found


def _restriction(pool: Mapping[str, Any], api: HfApi) -> str | None:
    """What the Hub says today of a source that stands in a record without its terms (selected from Python)."""
    if not pool.get("id") or ":" in (pool.get("commit") or ":"):
        return None  # a local file
    try:
        info = api.dataset_info(pool["id"])
    except RepositoryNotFoundError:
        return "not public"
    return "private" if info.private else "gated" if info.gated else None


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    allow_public: bool = False,
) -> str:
    """Push a folder the package wrote, in one commit; the repository is created where it is missing.

    A text of its own in the repository's README is kept (see :func:`hf_neuronselect.hub.cards.merge_card`).
    Files of this kind that the folder no longer has are deleted; files of other kinds are left alone.

    Args:
        folder: selection, capability, feature library, adapter, SAE, feature store or metric.
        repo_id: ``org/name``, or ``name`` in the token's own namespace.
        private: of a repository that is created; what comes from a private or gated source is private
            by itself. revision: a branch, created where it is missing. create_pr: propose instead.
        allow_public: push what comes from a private or gated source to a public repository.

    Returns:
        The repository's URL, or the pull request's.

    Raises:
        NeuronSelectError: the Hub refuses, the repository holds something else or is public where it
            must not be, the folder is not the package's or was edited.
    """
    folder = Path(folder)
    kind = folder_kind(folder)
    if kind.name == "selection":
        check_selection(folder, folder.name)
    if kind.name == "metric" and not (folder / f"{repo_id.split('/')[-1]}.py").is_file():
        module = next((p.stem for p in sorted(folder.glob("*.py")) if p.stem == folder.resolve().name), "the module")
        raise NeuronSelectError(f"evaluate looks for a script named like the repository; name it {module}",
                                option="repo", value=repo_id)  # fmt: skip
    api = HfApi(token=token)
    with hub_errors("repo", repo_id, writing=True):
        if not allow_public and (sources := restricted_sources(folder, api)):
            if private is False:
                raise NeuronSelectError(
                    f"the rows come from {', '.join(sources)}; leave private away, or say allow_public (--allow-public)",
                    option="private", value=False,
                )  # fmt: skip
            private = True
        # A metric's Space is a Gradio page, as `evaluate` has them.
        space_sdk = "gradio" if kind.repo_type == "space" else None
        made = api.create_repo(repo_id, repo_type=kind.repo_type, private=private, exist_ok=True, space_sdk=space_sdk)
        repo_id = made.repo_id
        info = _look(api, repo_id, kind, revision, private)
        there = [sibling.rfilename for sibling in info.siblings or []]
        operations = _operations(folder, kind, there, repo_id, info.sha, token)
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"{kind.name} by hf_neuronselect",
            repo_type=kind.repo_type,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,  # a push between our look and ours is refused (412), not overwritten
        )
    if commit.pr_url:
        return str(commit.pr_url)
    return f"{made}/tree/{revision}" if revision else str(made)


def _look(api: HfApi, repo_id: str, kind: Kind, revision: str | None, private: bool | None) -> Any:
    """The repository as it is, on a branch that is made where it is missing; refused if it is not for us."""

    def info(revision: str | None) -> Any:
        found: Any = api.repo_info(repo_id, repo_type=kind.repo_type, revision=revision)
        if private and not found.private:
            raise NeuronSelectError(
                "the repository is public already; make it private in its settings, or name another",
                option="repo", value=repo_id,
            )  # fmt: skip
        there = [sibling.rfilename for sibling in found.siblings or []]
        foreign = sorted(name for name in there if name not in _ANYONES)

        def read(file: str) -> Path:
            return Path(hf_hub_download(repo_id, file, repo_type=kind.repo_type, revision=found.sha, token=api.token))

        if foreign and not kind.marks(there, read):
            raise NeuronSelectError(
                f"the repository holds something else ({', '.join(foreign[:3])}), not a {kind.name}; name another",
                option="repo", value=repo_id,
            )  # fmt: skip
        return found

    try:
        return info(revision)
    except RevisionNotFoundError:
        assert revision is not None
        info(None)
        api.create_branch(repo_id, branch=revision, repo_type=kind.repo_type, exist_ok=True)
        return info(revision)


def _operations(
    folder: Path, kind: Kind, there: list[str], repo_id: str, commit: str | None, token: str | bool | None
) -> list[CommitOperationAdd | CommitOperationDelete]:
    ours = [name for name in _names(folder) if kind.owns(name)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for name in ours:
        content: str | bytes = str(folder / name)
        if name == README:
            text = read_text(folder / name).replace(PLACE, repo_id)
            if README in there:
                path = hf_hub_download(repo_id, README, repo_type=kind.repo_type, revision=commit, token=token)
                text = merge_card(read_text(Path(path)), text)
            content = text.encode()
        operations.append(CommitOperationAdd(name, content))
    stale = [name for name in there if name not in ours and name != README and kind.owns(name)]
    return operations + [CommitOperationDelete(name) for name in stale]


def check_write_access(token: str | bool | None = None) -> str:
    """The user a token stands for: asked before hours of work that end with a push.

    Raises:
        NeuronSelectError: no token, or one the Hub does not know or that cannot write.
    """
    with hub_errors("push", "", writing=True):
        who = HfApi(token=token).whoami()
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise NeuronSelectError("the token can only read; make one that can write", option="push")
    return str(who["name"])
