"""Local paths and Hub ids: find what a name means, pin it, and give clear errors when that fails."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from . import bundled
from .digests import model_hash, sae_hash
from .errors import NeuronSelectError


@dataclass(frozen=True)
class Source:
    """A pinned model, SAE, adapter or dataset.

    Attributes:
        id: the Hub id, or the last part of a local path (never a whole path: it goes into cards).
        commit: Hub commit hash, or ``content:<hash>`` of a local folder, or ``state:<hash>`` of a
            model that lives in memory.
        location: the argument of ``from_pretrained``: the Hub id or the local folder.
        base: of an adapter, the model that it changes.
    """

    id: str
    commit: str
    location: str
    base: Source | None = None

    @property
    def revision(self) -> str | None:
        """The commit to load from the Hub; None for a local folder."""
        return None if ":" in self.commit else self.commit

    @property
    def key(self) -> str:
        """All that pins it. A content hash says it all: the same files under another name are the same."""
        own = self.commit if ":" in self.commit else f"{self.id}@{self.commit}"
        return own if self.base is None else f"{own} on {self.base.key}"


@contextmanager
def hub_errors(option: str, value: str, *, writing: bool = False) -> Iterator[None]:
    """Turn errors of the Hub clients into one clear line that names the option and the mend.

    Args:
        writing: the call is a push, for which nothing cached can stand in.
    """
    try:
        yield
    except NeuronSelectError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as cause:
        if "Invalid metadata in README.md" in str(cause):  # the client asks the Hub before it commits
            reason = " ".join(str(cause).split())[-200:]
            raise NeuronSelectError(f"the Hub refuses its metadata: {reason}", option="README.md") from cause
        page = f"{constants.ENDPOINT}/{'/'.join(value.split('@')[0].split(':')[0].split('/')[:2])}"
        message = _refused(cause, page, writing) or _unreached(cause, writing)
        if message is None:
            raise
        raise NeuronSelectError(message, option=option, value=value or None) from cause


def _refused(cause: BaseException, page: str, writing: bool) -> str | None:
    """Message for an answer of the Hub; None if there was no answer."""
    if isinstance(cause, GatedRepoError):
        return f"the repository is gated: accept its terms at {page}, then run `hf auth login`"
    if isinstance(cause, RevisionNotFoundError):
        return "the repository has no such revision; look at its branches and tags on the Hub"
    if isinstance(cause, LocalTokenNotFoundError):
        return "no token: run `hf auth login` or set HF_TOKEN"
    if isinstance(cause, RepositoryNotFoundError):
        if writing:
            return "no such repository, or the token may not see it"
        return ("no such path here and no such repository on the Hub, or it is private and needs "
                "`hf auth login` (or HF_TOKEN)")  # fmt: skip
    if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
        return f"a file is missing in the repository ({str(cause).splitlines()[0][:120]})"
    if isinstance(cause, HFValidationError):
        return "not a Hub id (org/name)" if writing else "neither a path that exists nor a Hub id (org/name)"
    if isinstance(cause, HfHubHTTPError):
        return _answered(cause, writing)
    # The client hides the Hub's answer behind an error of its own: nothing cached, or a failed upload.
    return _answered(cause.__cause__, writing) if isinstance(cause.__cause__, HfHubHTTPError) else None


_NOT_CACHED = ("no such path here; HF_HUB_OFFLINE is set and nothing of that name is in the cache: check the name, or "
               "unset HF_HUB_OFFLINE to download it")  # fmt: skip


def _unreached(cause: BaseException, writing: bool) -> str | None:
    """Message when the Hub was not reached; None for any other error."""
    offline = constants.HF_HUB_OFFLINE
    inner = cause.__cause__ if isinstance(cause, RuntimeError) else cause
    if "client has been closed" in str(cause):  # huggingface_hub < 1.28 tries again with the client that failed
        inner = ConnectionError()
    if isinstance(inner, (LocalEntryNotFoundError, OfflineModeIsEnabled)) and not writing:
        return _NOT_CACHED if offline else (
            "no such path here, the Hub cannot be reached and nothing of that name is in the cache: check the name, or "
            "try again with a network")  # fmt: skip
    if not isinstance(inner, (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError)):
        return None
    if offline:
        return "HF_HUB_OFFLINE is set: nothing can be pushed; unset it" if writing else (
            _NOT_CACHED)  # fmt: skip
    mend = "try again" if writing else "try again, or work offline with HF_HUB_OFFLINE=1 and what is cached"
    return f"the Hub cannot be reached ({type(inner).__name__}); {mend}"


def _answered(cause: HfHubHTTPError, writing: bool) -> str:
    status = getattr(cause.response, "status_code", "?")
    mends: dict[Any, str] = {
        401: "log in with `hf auth login` or set HF_TOKEN to a token it knows",
        403: f"the token may not {'write' if writing else 'read'} it",
        409: "the repository is being changed; try again",
        412: "somebody pushed in the meantime; push again",
    }
    if status == 400:  # the Hub says what is wrong
        return f"the Hub refused it: {' '.join(str(cause).split())[-200:]}"
    return f"the Hub answered {status}; {mends.get(status, 'try again later')}"


def resolve(name: str, *, revision: str | None, token: str | bool | None, option: str,
            probe: Iterable[str] = ("config.json", "adapter_config.json"),
            hashed: Callable[[Path], str] = model_hash) -> Source:  # fmt: skip
    """Pin a model: an existing local folder wins, else a Hub id.

    Args:
        name: folder or Hub id. probe: files of which the repository must have one. option: its name in errors.
        hashed: the hash of a local folder.

    Raises:
        NeuronSelectError: it cannot be found or read; the message says why.
    """
    if os.path.isdir(name):
        return Source(Path(name).resolve().name, f"content:{hashed(Path(name))}", str(Path(name).resolve()))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise NeuronSelectError("no such folder; check the path", option=option, value=name)
    with hub_errors(option, name):
        missing: EntryNotFoundError | None = None
        for filename in probe:
            try:
                path = hf_hub_download(name, filename, revision=revision, token=token)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError as error:
                missing = error
                continue
            return Source(name, hub_commit(path), name)
        assert missing is not None
        raise missing


def hub_commit(path: str | os.PathLike[str]) -> str:
    """The commit hash in a path of the Hub's cache (``…/snapshots/<commit>/…``)."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", Path(path).as_posix())
    assert found is not None
    return found[1]


def bundled_folder(commit: str | None) -> Path | None:
    """Folder in the package of the model or SAE with this content hash; None for anything else."""
    return _hashed(bundled.MODEL, bundled.SAES).get(commit) if commit else None


@cache
def _hashed(model: Path, saes: tuple[Path, ...]) -> dict[str, Path]:
    """Content hash -> folder, of the model and of the SAEs in these folders; read once a process."""
    found = {f"content:{sae_hash(path)}": path for root in saes for path in root.iterdir() if path.is_dir()}
    return {f"content:{model_hash(model)}": model, **found}
