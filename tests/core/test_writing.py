"""The one writer: old or new at any moment, one command at a time, nobody else's folder."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import stopped

from hf_neuronselect import NeuronSelectError
from hf_neuronselect.core import writing as module
from hf_neuronselect.core.errors import NeuronSelectWarning
from hf_neuronselect.core.writing import LOCK, FolderKind, check_folder, put, reserve, settle, writing

KIND = FolderKind("a box", ("box.json",), '"box"', ("lid.txt", "in/*.txt"))


def write(folder: Path, version: str, *files: str) -> None:
    with writing(folder, KIND) as new:
        (new / "in").mkdir()
        for name in files:
            (new / name).write_text(version)
        (new / "box.json").write_text(f'{{"box": "{version}"}}')


def content(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


OLD = ("in/a.txt", "in/old.txt", "lid.txt")
NEW = ("in/a.txt", "in/b.txt")


def state(version: str, files: tuple[str, ...]) -> dict[str, str]:
    return dict.fromkeys(files, version) | {"box.json": f'{{"box": "{version}"}}'}


# ------------------------------------------------------------------------------------------ old or new
@pytest.mark.parametrize("full", [False, True], ids=["killed", "disk full"])
@pytest.mark.parametrize("first", [False, True], ids=["over an old one", "first"])
def test_at_every_step_the_folder_is_old_or_new(full: bool, first: bool, tmp_path: Path) -> None:
    """Then it opens as the one or the other, with the user's own file, and the same command goes on."""
    before: dict[str, str] = {} if first else state("old", OLD)
    own = {"notes.txt": "mine"}
    seen, n = set(), 0
    while "done" not in seen:
        n += 1
        folder = tmp_path / str(n)
        if not first:
            write(folder, "old", *OLD)
            (folder / "notes.txt").write_text("mine")
        status = stopped.stop_at(n, lambda folder=folder: write(folder, "new", *NEW), str(folder), full=full)
        assert status in (stopped.DONE, stopped.REFUSED if full else stopped.KILLED)
        if folder.exists():
            settle(folder, KIND, "box")
        left = content(folder) if folder.exists() else {}
        found = {name: text for name, text in left.items() if not name.startswith(".")}
        kept = {} if first else own
        assert found in (before | kept, state("new", NEW) | kept), n
        seen.add("done" if status == stopped.DONE else "old" if found == before | kept else "new")
        write(folder, "new", *NEW)
        assert content(folder) == state("new", NEW) | kept
    assert seen == {"old", "new", "done"} and n > 10


def test_an_error_in_the_middle_leaves_the_old(tmp_path: Path) -> None:
    write(tmp_path / "b", "old", *OLD)
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "b", KIND) as new:
        (new / "box.json").write_text("{")
        raise KeyboardInterrupt
    assert content(tmp_path / "b") == state("old", OLD)


def test_a_first_try_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NeuronSelectError, match="out='c': cannot be written: No space"):
        with writing(tmp_path / "a" / "b" / "c", KIND):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_one_file_is_old_or_new(tmp_path: Path) -> None:
    for n in range(1, 6):
        file = tmp_path / f"{n}.json"
        put(file, "old")
        stopped.stop_at(n, lambda file=file: put(file, "new"), file.name)
        assert file.read_text() in ("old", "new")
        put(file, "new")
        assert file.read_text() == "new"


def test_a_finished_folder_from_elsewhere_moves_and_deletes_nothing_outside(tmp_path: Path) -> None:
    """What waits for its moves may come from a stranger's archive."""
    write(tmp_path / "b", "old", *OLD)
    (tmp_path / "keep.txt").write_text("mine")
    new = KIND.new(tmp_path / "b")
    new.mkdir()
    (new / ".names").write_text('["../keep.txt"]')
    (new / "lid.txt").symlink_to(tmp_path / "keep.txt")
    settle(tmp_path / "b", KIND, "box")
    assert (tmp_path / "keep.txt").read_text() == "mine" and not new.exists()
    assert not (tmp_path / "b" / "lid.txt").is_symlink()


def test_something_in_the_way_is_said_before_anything_moves(tmp_path: Path) -> None:
    write(tmp_path / "b", "old", "lid.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "b" / "in").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NeuronSelectError, match="in/a.txt is in the way"):
        write(tmp_path / "b", "new", *NEW)
    assert (tmp_path / "b" / "lid.txt").read_text() == "old" and not list((tmp_path / "elsewhere").iterdir())


# -------------------------------------------------------------------------------------------- whose it is
@pytest.mark.parametrize("files", [{"thesis.txt": "x"}, {"box.json": '{"parcel": 1}'}, {"box.json": ""}])
def test_a_foreign_folder_is_refused_and_left_alone(files: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    for attempt in (lambda: check_folder(folder, KIND), lambda: write(folder, "new", *NEW)):
        with pytest.raises(NeuronSelectError, match="out='b': exists and is not a box; name another"):
            attempt()
    assert content(folder) == files


def test_files_get_the_mode_of_their_neighbours(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o002, 0o664), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            with writing(tmp_path / str(mask), KIND) as new:
                (new / "box.json").touch(mode=0o600)
            put(tmp_path / str(mask) / "lid.txt", "x")
        finally:
            os.umask(before)
        assert {p.stat().st_mode & 0o777 for p in (tmp_path / str(mask)).iterdir()} == {mode}


# ----------------------------------------------------------------------------------------------- the lock
def test_a_second_command_is_refused_at_once(tmp_path: Path) -> None:
    second = (
        "from pathlib import Path; from hf_neuronselect.core.writing import FolderKind, reserve\n"
        f"with reserve(Path({str(tmp_path / 'b')!r}), FolderKind('a box', ('box.json',))): pass"
    )
    failed: list[BaseException] = []

    def other_thread() -> None:
        try:
            write(tmp_path / "b", "new", *NEW)
        except NeuronSelectError as error:
            failed.append(error)

    with reserve(tmp_path / "b", KIND):
        done = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True, check=False)
        assert "another command is writing into it" in done.stderr
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        write(tmp_path / "b", "old", *OLD)  # a step of the command itself
    assert len(failed) == 1 and "another command is writing into it" in str(failed[0])
    assert content(tmp_path / "b") == state("old", OLD)
    assert not subprocess.run([sys.executable, "-c", second], capture_output=True, check=False).returncode


def test_a_dead_commands_lock_is_free(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / LOCK).touch()
    write(tmp_path / "b", "new", *NEW)
    assert content(tmp_path / "b") == state("new", NEW)


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    end, wait = os.pipe()
    with reserve(tmp_path / "b", KIND):
        if not (child := os.fork()):
            os.close(wait)
            os.read(end, 1)  # until the parent closes its end
            os._exit(0)
        assert not stopped.stop_at(1, lambda: None, "nothing")
    write(tmp_path / "b", "new", *NEW)
    os.close(wait)
    os.waitpid(child, 0)


def test_where_nothing_can_be_locked_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(NeuronSelectWarning, match="b cannot be locked here .*start no second command"):
        write(tmp_path / "b", "new", *NEW)
    assert content(tmp_path / "b") == state("new", NEW)
    assert not module._HELD
