"""Pushing a folder that this package wrote to the Hub, as ONE commit.

Neither ``upload_folder`` (several commits with Xet on) nor ``Trainer.push_to_hub`` (uploads a pickle) is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.folders import (
    SAE,
    SELECTION_RECORD,
    TRAINING_RECORD,
    read_adapter,
    read_capability,
    read_library,
    read_selection,
)
from ..core.provenance import Origin, SourceRecord
from ..core.seals import check_files, read
from ..core.sources import hub_errors
from .kinds import Kind, folder_kind, names_in
from .markdown import PLACE, README, merge_card, read_text

_ANYONES = (".gitattributes", README)
_RECORDS = (SELECTION_RECORD, TRAINING_RECORD, "manifest.json")  # of folders with rows, or with what was made from rows


def restricted_sources(folder: Path, api: HfApi) -> list[str]:
    """Private or gated sources of a folder's rows or signals, or of the rows its adapter was trained on."""
    found = []
    for name in _RECORDS:
        if not (folder / name).is_file():
            continue
        what = f"what this package writes into {name}"
        made = read(folder / name, Origin, what=what, again="make it again", option="folder", value=folder.name)
        pool = (made.selection or made).pool or SourceRecord()
        if why := pool.restricted or _restriction(pool.origin, api):
            found.append(f"{pool.origin.id or 'the pool'} ({why})")
    return found


def _restriction(source: SourceRecord, api: HfApi) -> str | None:
    """Ask the Hub whether a source is restricted: one selected from in Python is recorded without its terms."""
    if not source.on_hub:
        return None
    try:
        info = api.dataset_info(str(source.id))
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

    The user's own text in the repository's README is kept (see :func:`hf_neuronselect.hub.markdown.merge_card`).
    Files of this kind that the folder no longer has are deleted; other files are left alone.

    Args:
        folder: selection, capability, feature library, adapter, SAE, feature store or metric.
        repo_id: ``org/name``, or ``name`` in the token's own namespace.
        private: visibility of a repository that is created; rows from a private or gated source make it private.
        revision: a branch, created where it is missing. create_pr: open a pull request instead.
        allow_public: push publicly although the rows come from a private or gated source.

    Returns:
        The repository's URL, or the pull request's.

    Raises:
        NeuronSelectError: the Hub refuses, the repository holds something else or must not be public, or the folder
            was not written by this package or was edited since.
    """
    folder = Path(folder)
    kind = folder_kind(folder)
    listed = _checked(folder, kind)
    ours = _own_files(folder, kind, listed)
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
        operations = _operations(folder, kind, ours, there, repo_id, info.sha, token)
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"{kind.name} by hf_neuronselect",
            repo_type=kind.repo_type,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,  # another push since our look: refused (412), not overwritten
        )
    if commit.pr_url:
        return str(commit.pr_url)
    return f"{made}/tree/{revision}" if revision else str(made)


def _checked(folder: Path, kind: Kind) -> Mapping[str, str] | None:
    """The files that a selection's record lists; of every folder with a record, its files are checked.

    Raises:
        NeuronSelectError: one was changed.
    """
    if kind.name == "selection":
        return read_selection(folder, folder.name).files
    if kind.name == "capability":
        read_capability(folder, folder.name, "folder")
    if kind.name == "feature library":
        read_library(folder, folder.name, "folder")
    if kind.name == "adapter" and (folder / TRAINING_RECORD).is_file():
        read_adapter(folder, folder.name, "folder")
    if kind.name == "SAE":
        for place in sorted(path.parent for path in folder.glob(kind.marker)):
            check_files(place, what=SAE.what, again=SAE.again, option="folder", value=f"{folder.name}/{place.name}")
    return None


def _look(api: HfApi, repo_id: str, kind: Kind, revision: str | None, private: bool | None) -> Any:
    """Look at a repository and check that it may be pushed to; a missing branch is created."""

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


def _own_files(folder: Path, kind: Kind, listed: Mapping[str, str] | None) -> list[str]:
    """Regular files inside the folder that belong to its kind; the others are left out, and said.

    Args:
        listed: the data files that the folder's record lists; None: it lists none.

    Raises:
        NeuronSelectError: one that belongs to it is a link.
    """
    ours: list[str] = []
    others: list[str] = []
    for name in names_in(folder):
        data = name.startswith("data/") and listed is not None
        (ours if kind.owns(name) and not (data and name not in (listed or ())) else others).append(name)
    root = folder.resolve()
    if links := [name for name in ours if (folder / name).resolve() != root / name]:
        raise NeuronSelectError(f"{links[0]} is a link, which could push any file of this machine; put the file itself "
                                "there", option="folder", value=folder.name)  # fmt: skip
    if seen := [name for name in others if not name.rpartition("/")[2].startswith(".")]:
        more = f" and {len(seen) - 5} more" if len(seen) > 5 else ""
        warnings.warn(
            f"not pushed, since the folder's record does not list them: {', '.join(seen[:5])}{more}; upload them yourself "
            "with `hf upload` if they belong there",
            NeuronSelectWarning,
            stacklevel=4,
        )
    return ours


def _operations(
    folder: Path, kind: Kind, ours: list[str], there: list[str], repo_id: str, commit: str | None,
    token: str | bool | None,
) -> list[CommitOperationAdd | CommitOperationDelete]:  # fmt: skip
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
    """Return the token's user. Call it before hours of work that end with a push.

    Raises:
        NeuronSelectError: no token, or one the Hub does not know or that cannot write.
    """
    with hub_errors("push", "", writing=True):
        who = HfApi(token=token).whoami()
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise NeuronSelectError("the token can only read; make one that can write", option="push")
    return str(who["name"])
