"""The one way in which this package writes a folder: nobody else's, one command at a time, old or new at any moment.

New files are written into a hidden folder inside the one they belong to. When all are whole, that folder is renamed,
and from then on the new files count: each is moved to its place, the record last. Whoever opens the folder after a
kill finishes the moves. ``flock`` keeps a second command out; the kernel frees it when a process dies.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from .errors import NeuronSelectError, NeuronSelectWarning

LOCK = ".neuronselect.lock"
_NAMES = ".names"  # in a finished hidden folder: the files it brought
_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that this package writes.

    Attributes:
        what: its name in errors, e.g. ``a selection folder``.
        records: the file (a glob) that every whole folder has; several: one of them.
        proof: a text in that file, since other programs have files of that name, too.
        files: its files (globs) that a new version may lack: they are removed with the old one.
        begun: files or folders (globs), one of which shows unfinished work of this kind.
        again: how one that was changed or damaged is made again.
    """

    what: str
    records: tuple[str, ...]
    proof: str = ""
    files: tuple[str, ...] = ()
    begun: tuple[str, ...] = ()
    again: str = "make it again"

    @property
    def _slug(self) -> str:
        return self.records[0].replace("*", "any").replace("/", "-")

    def part(self, folder: Path) -> Path:
        """Where new files are written."""
        return folder / f".{self._slug}.part"

    def new(self, folder: Path) -> Path:
        """Where finished new files wait for their moves."""
        return folder / f".{self._slug}.new"

    def is_in(self, folder: Path) -> bool:
        """Whether a folder is of this kind, whole or begun."""
        if any(path.is_dir() for path in (self.part(folder), self.new(folder))):
            return True
        if any(path for name in self.begun for path in folder.glob(name)):
            return True
        return any(_holds(path, self.proof) for name in self.records for path in folder.glob(name))


def _holds(path: Path, text: str) -> bool:
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return not text or text.encode() in file.read(1 << 20)
    return False


# ------------------------------------------------------------------------------------------ before work
def check_folder(folder: Path, kind: FolderKind, option: str = "out") -> None:
    """Refuse a folder that cannot be written, or that holds something else.

    Raises:
        NeuronSelectError: it cannot be used.
    """
    try:
        if folder.is_file():
            raise NeuronSelectError("is a file; name a folder", option=option, value=folder.name)
        foreign = folder.exists() and not (kind.is_in(folder) or _is_empty(folder))
    except OSError as cause:
        raise _unwritable(folder, cause, option) from cause
    if foreign:
        raise NeuronSelectError(f"exists and is not {kind.what}; name another", option=option, value=folder.name)
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise NeuronSelectError(f"cannot be written: {above.name or above} is read-only or no folder; name another folder", option=option,
                                value=folder.name)  # fmt: skip


def _is_empty(folder: Path) -> bool:
    return all(path.name == LOCK for path in folder.iterdir())


@contextlib.contextmanager
def reserve(folder: Path, kind: FolderKind, option: str = "out") -> Iterator[None]:
    """Keep other commands out of a folder for a ``with`` block; it is made, and removed again if it stays empty.

    Raises:
        NeuronSelectError: another command writes into it, it holds something else, or it cannot be written.
    """
    check_folder(folder, kind, option)
    made: list[Path] = []
    try:
        try:
            above = folder.absolute()
            while not above.exists():
                made.append(above)
                above = above.parent
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder, option)
        except OSError as cause:
            raise _unwritable(folder, cause, option) from cause
        with lock:
            check_folder(folder, kind, option)  # another command may have been faster
            _finish_moves(folder, kind)
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # not empty any more
                path.rmdir()


# ----------------------------------------------------------------------------------------------- writing
@contextlib.contextmanager
def writing(folder: Path, kind: FolderKind, option: str = "out") -> Iterator[Path]:
    """Write a folder, or write it again: yields an empty folder, whose files replace the old ones at the end.

    Until then nothing changes; an error or a kill leaves the old files. Files of other names stay.

    Raises:
        NeuronSelectError: as :func:`reserve`, or the disk is full.
    """
    with reserve(folder, kind, option):
        part = kind.part(folder)
        try:
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
            part.mkdir()
            yield part
            _commit(folder, kind, part)
        except (OSError, SafetensorError) as cause:
            raise _unwritable(folder, cause, option) from cause
        finally:
            shutil.rmtree(part, ignore_errors=True)


def settle(folder: Path, kind: FolderKind, option: str) -> None:
    """Finish the moves of a command that was killed between them; call it before a folder is read.

    Raises:
        NeuronSelectError: another command is at it, or the folder cannot be written.
    """
    if kind.new(folder).is_dir():
        try:
            with _lock(folder, option):
                _finish_moves(folder, kind)
        except OSError as cause:
            raise _unwritable(folder, cause, option) from cause


def put(path: Path, content: str | bytes) -> None:
    """Write one file, or write it again: at any moment the old or the new is there."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        _sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _commit(folder: Path, kind: FolderKind, part: Path) -> None:
    files = _files(part)
    for name in files:
        at = folder / name
        if at.is_dir() or any(above.is_symlink() or above.is_file() for above in list(at.parents)[: name.count("/")]):
            raise OSError(errno.EEXIST, f"{name} is in the way of a file of that name")
    names = part / _NAMES
    names.write_text(json.dumps(files), encoding="utf-8")
    mode = names.stat().st_mode & 0o666  # as files are made here; libraries make some that only their owner can read
    for name in files:
        (part / name).chmod(mode)
        _sync(part / name)
    part.rename(kind.new(folder))
    _finish_moves(folder, kind)


def _finish_moves(folder: Path, kind: FolderKind) -> None:
    """Move finished new files to their places, the records last, and remove the old ones that have no successor."""
    new = kind.new(folder)
    if not new.is_dir():
        return
    for name in sorted(_files(new), key=lambda name: (_matches(name, kind.records), name)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).replace(folder / name)
    with contextlib.suppress(OSError, ValueError):  # without a list all was moved and removed already
        brought = set(json.loads((new / _NAMES).read_text(encoding="utf-8")))
        for pattern in kind.files:
            for path in folder.glob(pattern):
                if path.is_file() and path.relative_to(folder).as_posix() not in brought:
                    path.unlink()
                    with contextlib.suppress(OSError):  # not empty, or the folder itself
                        path.parent.rmdir()
    shutil.rmtree(new, ignore_errors=True)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(Path(name).match(pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(path.relative_to(folder).as_posix() for path in found if path != folder / _NAMES)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(folder: Path, cause: BaseException, option: str) -> NeuronSelectError:
    reason = getattr(cause, "strerror", None) or str(cause)
    return NeuronSelectError(f"cannot be written: {reason}", option=option, value=folder.name)


# ------------------------------------------------------------------------------------------------- lock
_HELD: dict[Path, tuple[int, int]] = {}  # folder -> thread that holds it, open lock file


@contextlib.contextmanager
def _held(folder: Path, handle: int) -> Iterator[None]:
    _HELD[folder] = threading.get_ident(), handle
    try:
        yield
    finally:
        if _HELD.pop(folder, None):  # else a forked child, which closed it
            (folder / LOCK).unlink(missing_ok=True)  # still held: nobody else is refused for this file
            os.close(handle)


def _lock(folder: Path, option: str) -> contextlib.AbstractContextManager[None]:
    """Lock a folder; steps of the command that holds it may lock it again.

    Raises:
        NeuronSelectError: another command holds it.
    """
    folder = folder.resolve()
    if _HELD.get(folder, (0, 0))[0] == threading.get_ident():
        return contextlib.nullcontext()
    while True:
        handle = _open(folder / LOCK)
        try:
            _flock(handle, folder)
            if _same(handle, folder / LOCK):
                return _held(folder, handle)
        except OSError as cause:
            os.close(handle)
            if cause.errno not in _TAKEN:
                raise
            raise NeuronSelectError("another command is writing into it; wait for it, or name another folder",
                                    option=option, value=folder.name) from cause  # fmt: skip
        os.close(handle)  # the command that held it has just removed it


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # left by another user's command
        return os.open(path, os.O_RDONLY)


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _flock(handle: int, folder: Path) -> None:
    try:
        import fcntl  # not on Windows

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as cause:
        if isinstance(cause, OSError) and cause.errno in _TAKEN:
            raise
        warnings.warn(
            f"{folder.name} cannot be locked here ({cause}): start no second command that writes into it",
            NeuronSelectWarning,
            stacklevel=5,
        )


def _forget() -> None:
    """In a forked child: the lock is its parent's, and ends with it."""
    while _HELD:
        os.close(_HELD.popitem()[1][1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
