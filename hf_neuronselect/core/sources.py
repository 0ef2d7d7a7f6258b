"""Local paths and Hub ids: find what a name means, pin it, and give clear errors when that fails."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from .errors import NeuronSelectError

logger = logging.getLogger(__name__)

_HASHED = (".safetensors", ".json", ".jinja", ".npz", ".model", ".txt", ".jsonl", ".parquet")


def cache_dir() -> Path:
    """``$HF_HOME/neuronselect``."""
    return Path(constants.HF_HOME) / "neuronselect"


@dataclass(frozen=True)
class Source:
    """A pinned model, SAE, adapter or dataset.

    Attributes:
        id: the Hub id, or the last part of a local path (never a whole path: it goes into cards).
        commit: Hub commit hash, or ``content:<hash>`` of a local folder, or ``state:<hash>`` of a
            model that lives in memory.
        location: the argument of ``from_pretrained``: the Hub id or the local folder.
    """

    id: str
    commit: str
    location: str

    @property
    def revision(self) -> str | None:
        """The commit to load from the Hub; None for a local folder."""
        return None if ":" in self.commit else self.commit


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


def _unreached(cause: BaseException, writing: bool) -> str | None:
    """Message when the Hub was not reached; None for any other error."""
    offline = constants.HF_HUB_OFFLINE
    inner = cause.__cause__ if isinstance(cause, RuntimeError) else cause
    if "client has been closed" in str(cause):  # huggingface_hub < 1.28 tries again with the client that failed
        inner = ConnectionError()
    if isinstance(inner, (LocalEntryNotFoundError, OfflineModeIsEnabled)) and not writing:
        return (f"no such path here; {'HF_HUB_OFFLINE is set' if offline else 'the Hub cannot be reached'} and nothing "
                "of that name is in the cache")  # fmt: skip
    if not isinstance(inner, (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError)):
        return None
    if offline:
        return "HF_HUB_OFFLINE is set: nothing can be pushed" if writing else (
            "no such path here; HF_HUB_OFFLINE is set and nothing of that name is in the cache")  # fmt: skip
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
            probe: Iterable[str] = ("config.json", "adapter_config.json")) -> Source:  # fmt: skip
    """Pin a model: an existing local folder wins, else a Hub id.

    Args:
        name: folder or Hub id. probe: files of which the repository must have one. option: its name in errors.

    Raises:
        NeuronSelectError: it cannot be found or read; the message says why.
    """
    if os.path.isdir(name):
        return Source(Path(name).resolve().name, f"content:{content_hash(Path(name))}", str(Path(name).resolve()))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise NeuronSelectError("no such folder", option=option, value=name)
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
            return Source(name, commit_of(path), name)
        assert missing is not None
        raise missing


def commit_of(path: str | os.PathLike[str]) -> str:
    """The commit hash in a Hub cache path (``…/snapshots/<commit>/…``)."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(/|$)", Path(path).as_posix())
    return found[1] if found else f"content:{content_hash(Path(path))}"


def bundled_folder(commit: str | None) -> Path | None:
    """Folder of the bundled model or SAE with this content hash; None for anything else."""
    if not (commit or "").startswith("content:"):
        return None
    own = (bundled.MODEL, *bundled.SAE.iterdir())
    return next((path for path in own if f"content:{content_hash(path)}" == commit), None)


def content_hash(path: Path) -> str:
    """Hash of a file, or of the weight, config and tokenizer files of a folder; memoised by size and mtime.

    Returns:
        32 hex digits. They depend on file names but not on absolute paths.
    """
    root = path if path.is_dir() else path.parent
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _HASHED)
    stamp = [(p.relative_to(root).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.blake2b(json.dumps([str(path.resolve()), stamp]).encode(), digest_size=16).hexdigest()
    memo = cache_dir() / "content_hashes" / key
    if memo.is_file():
        return memo.read_text()
    digest = hashlib.blake2b(digest_size=16)
    for file, (name, size, _) in zip(files, stamp, strict=True):
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        part = memo.with_name(f"{memo.name}.{os.getpid()}")
        part.write_text(digest.hexdigest())
        part.replace(memo)
    except OSError as error:  # with a read-only home, hash again next time
        logger.debug("content hash not memoised: %s", error)
    return digest.hexdigest()
