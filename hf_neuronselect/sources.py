"""Local paths and Hub ids: what a name stands for, its identity, and clear errors when it cannot be had."""

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

from .errors import NeuronSelectError

logger = logging.getLogger(__name__)

_HASHED = (".safetensors", ".json", ".jinja", ".npz", ".model", ".txt", ".jsonl", ".parquet")


def cache_dir() -> Path:
    """``$HF_HOME/neuronselect``."""
    return Path(constants.HF_HOME) / "neuronselect"


@dataclass(frozen=True)
class Source:
    """Something with weights or rows, pinned.

    Attributes:
        id: the Hub id, or the last part of a local path (never a whole path: it goes into cards).
        commit: Hub commit hash, or ``content:<hash>`` of a local folder, or ``state:<hash>`` of a
            model that lives in memory.
        location: what the libraries' ``from_pretrained`` take: the Hub id or the local folder.
    """

    id: str
    commit: str
    location: str

    @property
    def revision(self) -> str | None:
        """The commit to load from the Hub; None for what is local."""
        return None if ":" in self.commit else self.commit


@contextmanager
def hub_errors(option: str, value: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what Hub clients raise into one clear line naming the option and the mend."""

    def error(message: str) -> NeuronSelectError:
        return NeuronSelectError(message, option=option, value=value or None)

    page = f"{constants.ENDPOINT}/{'/'.join(value.split('@')[0].split(':')[0].split('/')[:2])}"
    try:
        yield
    except GatedRepoError as cause:
        raise error(f"the repository is gated: accept its terms at {page}, then run `hf auth login`") from cause
    except RevisionNotFoundError as cause:
        raise error("the repository has no such revision; look at its branches and tags on the Hub") from cause
    except LocalTokenNotFoundError as cause:
        raise error("no token: run `hf auth login` or set HF_TOKEN") from cause
    except RepositoryNotFoundError as cause:
        if writing:
            raise error("no such repository, or the token may not see it") from cause
        raise error("no such path here and no such repository on the Hub, or it is private and needs "
                    "`hf auth login` (or HF_TOKEN)") from cause  # fmt: skip
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as cause:
        if isinstance(cause.__cause__, HfHubHTTPError):  # the Hub did answer, and nothing is cached
            raise error(_answered(cause.__cause__, writing)) from cause
        offline = "HF_HUB_OFFLINE is set and" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached and"
        raise error(f"no such path here; {offline} nothing of that name is in the cache") from cause
    except EntryNotFoundError as cause:
        raise error(f"a file is missing in the repository ({str(cause).splitlines()[0][:120]})") from cause
    except HFValidationError as cause:
        raise error("neither a path that exists nor a Hub id (org/name)") from cause
    except HfHubHTTPError as cause:
        raise error(_answered(cause, writing)) from cause
    except (HTTPError, ConnectionError, TimeoutError) as cause:
        if constants.HF_HUB_OFFLINE:
            raise error("no such path here; HF_HUB_OFFLINE is set and nothing of that name is in the cache") from cause
        raise error(f"the Hub cannot be reached ({type(cause).__name__}); try again, or work offline with "
                    "HF_HUB_OFFLINE=1 and what is cached") from cause  # fmt: skip


def _answered(cause: HfHubHTTPError, writing: bool) -> str:
    status = getattr(cause.response, "status_code", "?")
    mends: dict[Any, str] = {
        401: "log in with `hf auth login` or set HF_TOKEN to a token it knows",
        403: f"the token may not {'write' if writing else 'read'} it",
        409: "the repository is being changed; try again",
        412: "somebody pushed in the meantime; push again",
    }
    if status == 400:  # the Hub's own words say what it does not like
        return f"the Hub refused it: {' '.join(str(cause).split())[-200:]}"
    return f"the Hub answered {status}; {mends.get(status, 'try again later')}"


def resolve(name: str, *, revision: str | None, token: str | bool | None, option: str,
            probe: Iterable[str] = ("config.json", "adapter_config.json")) -> Source:  # fmt: skip
    """Pin a model: an existing local folder wins, else a Hub id.

    Args:
        name: folder or Hub id. probe: files one of which the repository has.
        option: what errors call it.

    Raises:
        NeuronSelectError: it cannot be had, and why.
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


def content_hash(path: Path) -> str:
    """Hash of a file, or of the weight, config and tokenizer files of a folder; memoised by size and mtime.

    Returns:
        32 hex digits. File names count, absolute paths do not.
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
    except OSError as error:  # a read-only home costs a rehash, nothing more
        logger.debug("content hash not memoised: %s", error)
    return digest.hexdigest()
