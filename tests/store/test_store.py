"""A store survives kill -9, full disks, damage and several writers, and refuses what does not belong to it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from stores import ABOUT, files, shard
from stores import shards as shards_of
from tiny import make_extractor, rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector
from hf_neuronselect.cli import main as cli
from hf_neuronselect.store import shards, store

FEATURES = ("mona", "hidden")
SIGNALS = ("tokens", *FEATURES)  # as stored, in the order they are written
N, STEP = 40, 4  # ten shards a signal


def write(folder: Path, pool: Dataset, extractor: NeuronFeatureExtractor, **options: Any) -> dict[str, Any]:
    return store.write_store(pool, extractor, folder, **{"pool_about": ABOUT, "shard_rows": STEP} | options)


def parts(folder: Path) -> list[Path]:
    """Unfinished files, of ``costs/`` too."""
    return list(folder.rglob("*.part"))


@pytest.fixture(scope="module")
def extractor(tiny_folder: Path) -> NeuronFeatureExtractor:
    return make_extractor(tiny_folder, features=FEATURES)


@pytest.fixture(scope="module")
def forty() -> Dataset:
    return rows(N)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, forty: Dataset, extractor: NeuronFeatureExtractor) -> Path:
    """An undisturbed store."""
    folder = tmp_path_factory.mktemp("stores") / "whole"
    write(folder, forty, extractor)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s"))


# ---------------------------------------------------------------------------------- child processes
@pytest.fixture
def spawn(tiny_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts ``child`` in a process of its own, forked from a server that has imported everything and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["hf_neuronselect", "datasets", "transformers.models.llama.modeling_llama", "hf_neuronselect.cli.main"]
    )
    started = []

    def start(folder: Path, what: str = "", nth: int = 1, **options: Any) -> Any:
        process = context.Process(target=child, args=(tiny_folder, folder, what, nth, options))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join(60)


class Torn:
    """A file whose n-th write, of all such files, is cut short by SIGKILL."""

    left = 0

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, data: Any) -> None:
        Torn.left -= 1
        if Torn.left == 0:
            self.stream.write(bytes(data)[: random.Random(len(data)).randrange(len(data))])
            self.stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.stream.write(data)


def child(tiny: Path, folder: Path, what: str, nth: int, options: dict[str, Any]) -> None:
    """Writes the store of ``forty``; dies by SIGKILL at the n-th of the events named ``what``."""
    barrier = options.pop("barrier", None)
    extractor = make_extractor(tiny, features=FEATURES)
    extractor.extract([])
    pool = rows(N)
    calls = 0

    def dies(call: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        def wrapped(*words: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*words, **named)
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    opened = Path.open
    if what == "in a write":
        Torn.left = nth
        Path.open = lambda self, *words, **named: (  # type: ignore
            Torn(opened(self, *words)) if self.suffix == ".part" else opened(self, *words, **named)
        )
    elif what in ("before fsync", "after fsync"):
        os.fsync = dies(os.fsync, before=what == "before fsync")
    elif what in ("before rename", "after rename"):
        Path.replace = dies(Path.replace, before=what == "before rename")  # type: ignore[method-assign]
    elif what in ("before the manifest", "after the manifest"):
        os.link = dies(os.link, before=what == "before the manifest")
    elif what == "small disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (nth, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if what == "slowly":  # so that a kill from outside meets writes too
        fsync = os.fsync
        os.fsync = lambda handle: (time.sleep(0.01), fsync(handle))[1]
        compute = NeuronFeatureExtractor.compute
        NeuronFeatureExtractor.compute = lambda *words, **rest: (compute(*words, **rest), time.sleep(0.01))[0]  # type: ignore
    if barrier is not None:
        barrier.wait(60)
    try:
        write(folder, pool, extractor, **options)
    except NeuronSelectError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
        (folder.parent / f"{folder.name}.error").write_text(error.as_command_line())
        sys.exit(2)


# Writes: the manifest, three signal.json, then thirty shards in three pieces, and what it cost. Each file has two fsyncs,
# its own and its folder's; the manifest is linked, the others are renamed.
FAULTS = [
    *[("in a write", nth) for nth in (1, 2, 5, 6, 7, 50, 94, 95)],
    *[("before fsync", nth) for nth in (1, 3, 9, 10, 69)],
    *[("after fsync", nth) for nth in (1, 3, 41)],
    *[("before rename", nth) for nth in (1, 4, 33, 34)],
    *[("after rename", nth) for nth in (3, 5, 33)],
    ("before the manifest", 1),
    ("after the manifest", 1),
]


def test_kills_at_every_step_of_a_write(
    whole: Path, forty: Dataset, extractor: NeuronFeatureExtractor, spawn: Any, tmp_path: Path
) -> None:
    expected, torn, short = files(whole), 0, 0
    for i, (what, nth) in enumerate(FAULTS):
        folder = tmp_path / str(i)
        process = spawn(folder, what, nth)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, (what, nth)
        left = files(folder)
        torn += bool(parts(folder))
        short += not expected.keys() <= left.keys()
        # A file with a final name is whole, at any moment.
        assert all(data == expected[name] for name, data in left.items() if not name.endswith(".part"))
        there = sum(len(shards_of(folder, number)) == len(SIGNALS) for number in range(N // STEP))
        done = write(folder, forty, extractor)
        assert (done["skipped_shards"], done["healed_shards"], done["missing_shards"]) == (there, 0, 0), (what, nth)
        assert files(folder) == expected and not parts(folder), (what, nth)
    assert torn >= 18 and short >= 20


def test_kills_at_random_moments(
    whole: Path, forty: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, spawn: Any, tmp_path: Path
) -> None:
    folder, draw, partial, kills = tmp_path / "s", random.Random(7), 0, 0
    while kills < 10:
        process = spawn(folder, "slowly")
        began = time.monotonic()
        before = set(folder.rglob("*"))
        # From its first trace in the folder on, and at once where the store was almost done.
        while process.is_alive() and time.monotonic() - began < 60:
            if set(folder.rglob("*")) != before:
                break
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.12))
        process.kill()
        process.join(60)
        if process.exitcode == 0:  # it was faster: the next one starts from nothing
            assert files(folder) == files(whole)
            shutil.rmtree(folder)
            continue
        kills += 1
        partial += not files(whole).keys() <= files(folder).keys()
    assert partial >= 5
    write(folder, forty, extractor)
    assert files(folder) == files(whole)
    healed, undisturbed = store.FeatureStore(folder), store.FeatureStore(whole)
    assert len(healed) == N and healed.dataset().with_format("arrow")[:].equals(
        undisturbed.dataset().with_format("arrow")[:]
    )
    fitted = NeuronSelector("mona").fit(target, extractor=extractor)
    one, two, direct = (
        np.asarray(fitted.select(forty, k=5, features=features).scores["score"])
        for features in (healed, undisturbed, None)
    )
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(one, direct, rtol=1e-6)  # other batches: not bit for bit


def test_a_stop_by_hand_leaves_no_part(
    forty: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def stop(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 19:  # in the third shard of the second number
            raise KeyboardInterrupt
        real(handle)

    monkeypatch.setattr(shards.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", forty, extractor)
    monkeypatch.undo()
    assert not parts(tmp_path / "s")
    names = [path.name for number in range(3) for path in shards_of(tmp_path / "s", number)]
    assert names == ["shard-00000.parquet"] * 3 + ["shard-00001.parquet"] * 2
    assert write(tmp_path / "s", forty, extractor)["skipped_shards"] == 1


def test_parts_of_the_living_stay(
    whole: Path, forty: Dataset, extractor: NeuronFeatureExtractor, copy: Path, spawn: Any
) -> None:
    living, dead = spawn(copy.parent / "other", "slowly"), spawn(copy.parent / "third", "before fsync")
    dead.join(60)
    here, old = shards.host_name(), time.time() - 2 * shards.DAY
    places = [shard(copy, "mona", 0), copy / store.MANIFEST, shard(copy, "mona", 0).parent / store.SIGNAL,
              next((copy / store.COSTS).iterdir())]  # fmt: skip
    gone, kept = [], [copy / "notes.part"]
    for place in places:
        name = f".{place.name}.{{}}.{{}}.part".format
        for host, pid, its in ((here, living.pid, kept), (here, dead.pid, gone), (here, os.getpid(), gone),
                               ("far", 5, kept), ("old", 5, gone)):  # fmt: skip
            its.append(place.with_name(name(host, pid)))
            its[-1].write_bytes(b"PAR1")
        os.utime(place.with_name(name("old", 5)), (old, old))
    kept[0].write_text("mine")
    os.kill(living.pid, signal.SIGSTOP)
    write(copy, forty, extractor)
    os.kill(living.pid, signal.SIGCONT)
    assert set(parts(copy)) == set(kept) and len(gone) == 12
    assert files(whole).items() <= files(copy).items()


# ---------------------------------------------------------------------------------------- full disk
@pytest.mark.parametrize("left", [0, 3, 12])
def test_a_full_disk_is_one_clear_line(
    left: int,
    whole: Path,
    forty: Dataset,
    extractor: NeuronFeatureExtractor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full:
        def __init__(self) -> None:
            self.left = left

        def __call__(self, handle: int) -> None:
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", Full())
    with pytest.raises(NeuronSelectError, match="cannot be written: No space left on device.*goes on") as caught:
        write(tmp_path / "s", forty, extractor)
    assert caught.value.option == "out" and "\n" not in str(caught.value)
    monkeypatch.undo()
    write(tmp_path / "s", forty, extractor)
    assert files(tmp_path / "s") == files(whole)


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.5, 0.999])
def test_a_file_that_cannot_grow(
    limit: float, whole: Path, forty: Dataset, extractor: NeuronFeatureExtractor, spawn: Any, tmp_path: Path
) -> None:
    """A real limit of the operating system, met in the middle of a file."""
    largest = max(map(len, files(whole).values()))
    process = spawn(tmp_path / "s", "small disk", int(limit * largest))
    process.join(60)
    assert process.exitcode == 2
    assert (tmp_path / "s.error").read_text().startswith("--out s: cannot be written: File too large; mend it")
    assert not parts(tmp_path / "s")
    write(tmp_path / "s", forty, extractor)
    assert files(tmp_path / "s") == files(whole)


# ------------------------------------------------------------------------------------------- damage
def test_damaged_and_missing_shards_are_redone(
    whole: Path, forty: Dataset, extractor: NeuronFeatureExtractor, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged, missing = shard(copy, "mona", 1), shard(copy, "hidden", 3)
    for size in (0, 3, 8, 500, damaged.stat().st_size - 1):
        os.truncate(damaged, size)
        missing.unlink()
        with pytest.raises(NeuronSelectError, match="1 of 10 shards of hidden are missing, first shard-00003.*tract`"):
            store.FeatureStore(copy).dataset()
        store.FeatureStore(copy).dataset("tokens")  # what is not asked for may be missing
        shutil.copy(shard(whole, "hidden", 3), missing)
        with pytest.raises(NeuronSelectError, match="mona shard-00001.parquet is damaged: run `neuronselect extract`"):
            store.FeatureStore(copy).dataset()
        missing.unlink()
        done = write(copy, forty, extractor)
        assert (done["skipped_shards"], done["healed_shards"]) == (8, 1)
        assert "shard-00001.parquet is damaged: it is computed again" in caplog.text
        assert files(copy) == files(whole)
        # The shards of other signals are kept.
        assert last_cost(copy) == {("mona",): STEP, ("hidden",): STEP}


def test_a_shard_that_vanishes_while_it_is_read(copy: Path) -> None:
    features = store.FeatureStore(copy)
    batches = features.batches({"mona": features.identity_of("mona")})
    next(batches)
    shard(copy, "mona", 7).unlink()
    with pytest.raises(
        NeuronSelectError, match="mona shard-00007.parquet is missing: run `neuronselect extract` again"
    ):
        list(batches)


@pytest.mark.parametrize("name", SIGNALS)
def test_any_flipped_bit_is_noticed(
    name: str, whole: Path, forty: Dataset, extractor: NeuronFeatureExtractor, copy: Path
) -> None:
    path = shard(copy, name, 2)
    right = path.read_bytes()
    assert isinstance(shards.read_stamp(path), shards.Stamp)
    for at in [*range(0, len(right), 7), *range(len(right) - 12, len(right))]:
        for bit in (0, 7):
            wrong = bytearray(right)
            wrong[at] ^= 1 << bit
            path.write_bytes(wrong)
            assert shards.read_stamp(path) == "damaged", (at, bit)
    with pytest.raises(NeuronSelectError, match=f"{name} shard-00002.parquet is damaged"):
        store.FeatureStore(copy).dataset()
    assert write(copy, forty, extractor)["healed_shards"] == 1 and files(copy) == files(whole)


def test_a_shard_of_another_store_is_noticed(
    whole: Path, forty: Dataset, tiny_folder: Path, extractor: NeuronFeatureExtractor, copy: Path, tmp_path: Path
) -> None:
    """Of another extraction, another signal, another place or other ranges of rows."""
    write(tmp_path / "k", forty, make_extractor(tiny_folder, features=["mona"], top_k_features=3))
    write(tmp_path / "steps", forty, extractor, shard_rows=5)
    for source, number in (
        (shard(tmp_path / "k", "mona", 1), 1), (shard(copy, "hidden", 1), 1), (shard(copy, "mona", 1), 2),
        (shard(tmp_path / "steps", "mona", 0), 0), (shard(tmp_path / "steps", "mona", 1), 1),
    ):  # fmt: skip
        shutil.copy(source, shard(copy, "mona", number))
        with pytest.raises(NeuronSelectError, match=f"mona shard-0000{number}.parquet is of another store: run"):
            store.FeatureStore(copy).dataset()
        assert write(copy, forty, extractor)["healed_shards"] == 1 and files(copy) == files(whole), source


def test_a_shard_of_other_rows_is_refused(
    whole: Path, forty: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, copy: Path, tmp_path: Path
) -> None:
    """Everything else about it is right: only its rows say so."""
    write(tmp_path / "pool", rows(N, seed=3), extractor)
    shutil.copy(shard(tmp_path / "pool", "mona", 1), shard(copy, "mona", 1))
    before = files(copy)
    with pytest.raises(
        NeuronSelectError, match="shard-00001.parquet was computed from other rows than rows 4 to 7"
    ) as e:
        write(copy, forty, extractor)
    assert (e.value.option, e.value.value) == ("out", "s")
    fitted = NeuronSelector("mona").fit(target, extractor=extractor)
    with pytest.raises(NeuronSelectError, match="mona shard-00001.parquet was computed from other rows than ") as e:
        fitted.select(forty, k=5, features=store.FeatureStore(copy))
    assert (e.value.option, e.value.value) == ("features", "s")
    assert files(copy) == before
    shard(copy, "mona", 1).unlink()
    write(copy, forty, extractor)
    assert files(copy) == files(whole)


def test_a_damaged_manifest_comes_back_from_the_shards(
    whole: Path, forty: Dataset, extractor: NeuronFeatureExtractor, copy: Path
) -> None:
    right = (copy / store.MANIFEST).read_bytes()
    flipped = right.replace(b'"rows": 40', b'"rows": 44')
    assert flipped != right
    os.truncate(shard(copy, "hidden", 9), 99)  # the first that is looked at for it
    for wrong in (b"", right[:100], right[: len(right) // 2], b"[]", b"\xff\x00", flipped, None):
        (copy / store.MANIFEST).unlink()
        if wrong is not None:
            (copy / store.MANIFEST).write_bytes(wrong)
        with pytest.raises(NeuronSelectError, match="no readable manifest.json.*run `neuronselect extract` again"):
            store.FeatureStore(copy)
        with pytest.raises(NeuronSelectError, match="the store has 40 rows, the pool 30: they are not the same rows"):
            write(copy, forty.select(range(30)), extractor)
        (copy / store.MANIFEST).write_bytes(wrong or b"")
        done = write(copy, forty, extractor, shard_rows=9)
        assert done["skipped_shards"] == 10 - done["healed_shards"] and done["missing_shards"] == 0
        assert files(copy) == files(whole)
    # Without an undamaged shard nothing says that the folder is a store: it is left as it is.
    for path in copy.glob("*/shard-*"):
        os.truncate(path, 99)
    (copy / store.MANIFEST).write_text('{"name": "an app"}')
    before = files(copy)
    with pytest.raises(NeuronSelectError, match="exists and is not a feature store"):
        write(copy, forty, extractor)
    assert files(copy) == before


@pytest.mark.parametrize("wrong", [b"", b"{", None])
def test_what_is_said_of_a_signal_is_written_again(
    wrong: bytes | None, whole: Path, forty: Dataset, extractor: NeuronFeatureExtractor, copy: Path
) -> None:
    path = shard(copy, "mona", 0).parent / store.SIGNAL
    path.unlink()
    if wrong is not None:
        path.write_bytes(wrong)
    assert write(copy, forty, extractor)["skipped_shards"] == 10
    assert files(copy) == files(whole)
    about = json.loads(path.read_text())
    assert (about["signal"], about["identity"]) == ("mona", extractor.identity("mona"))
    assert about["state"]["max_length"] == extractor.extraction.options.max_length


def last_cost(folder: Path) -> dict[tuple[str, ...], int]:
    """Signals -> rows, of each pass of the last run that computed something."""
    passes = json.loads(max((folder / store.COSTS).iterdir()).read_text())["passes"].values()
    return {tuple(key.rpartition("-")[0] for key in one["signals"]): one["rows"] for one in passes}


# ---------------------------------------------------------------------------------- several at once
def test_two_processes_at_once(whole: Path, spawn: Any, tmp_path: Path) -> None:
    for attempt in range(3):
        folder, barrier = tmp_path / str(attempt), multiprocessing.get_context("forkserver").Barrier(2)
        both = [spawn(folder, shard=(i, 2), barrier=barrier) for i in range(2)]
        for process in both:
            process.join(120)
            assert process.exitcode == 0
        assert files(folder) == files(whole)


def test_the_same_shards_by_three_processes(
    forty: Dataset, extractor: NeuronFeatureExtractor, spawn: Any, tmp_path: Path
) -> None:
    """Who comes first says how many rows a shard has; the others follow."""
    folder, barrier = tmp_path / "s", multiprocessing.get_context("forkserver").Barrier(3)
    all_three = [spawn(folder, shard_rows=step, barrier=barrier) for step in (4, 5, 8)]
    for process in all_three:
        process.join(120)
        assert process.exitcode == 0
    step = store._read_manifest(folder)["shard_rows"]
    write(tmp_path / "t", forty, extractor, shard_rows=step)
    assert files(folder) == files(tmp_path / "t")


def test_shard_of_the_command_line(
    forty: Dataset, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any
) -> None:
    forty.to_json(tmp_path / "pool.jsonl")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["neuronselect", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    same = ["--pool", str(tmp_path / "pool.jsonl"), "--model", str(tiny_folder / "model"), "--sae",
            str(tiny_folder / "sae")]  # fmt: skip
    words = ["extract", *same, "--shard-rows", "8", "--out", str(tmp_path / "s")]
    code, out, err = run(*words, "--shard", "1/2")
    assert code == 0 and out.startswith("16 rows, ") and "3 shards are still missing" in err
    assert "bytes a row" in err and "for 16 rows" in err
    select = [
        "select",
        *same,
        "--target",
        f"t={tmp_path / 'pool.jsonl'}",
        "--k",
        "3",
        "--features",
        str(tmp_path / "s"),
    ]
    code, _, err = run(*select, "--out", str(tmp_path / "o"))
    assert code == 2 and "3 of 5 shards of mona are missing, first shard-00000.parquet" in err
    assert err.count("\n") == 1
    code, out, err = run(*words)
    assert code == 0 and "2 shards were there already" in out and "missing" not in err
    os.truncate(shard(tmp_path / "s", "mona", 4), 99)
    code, out, err = run(*words)
    assert code == 0 and "shard-00004.parquet is damaged" in caplog.text and "1 damaged shards were done again" in err
    code, out, err = run(*words)
    assert code == 0 and "5 shards were there already" in out and "bytes a row" not in err
    for wrong in ("2/2", "1", "-1/2", "0/0", "a/b", "1/2/3"):
        code, _, err = run(*words, f"--shard={wrong}")
        assert code == 2 and err.startswith(f"error: --shard {wrong}: I/N is needed"), err


# ------------------------------------------------------------------------------ formats and identity
@pytest.mark.parametrize("value_dtype", ["float16", "float32"])
def test_values_come_back_bit_for_bit(value_dtype: str, forty: Dataset, tiny_folder: Path, tmp_path: Path) -> None:
    extractor = make_extractor(tiny_folder, value_dtype=value_dtype)
    write(tmp_path / "s", forty, extractor, shard_rows=64)
    features = store.FeatureStore(tmp_path / "s")
    data = features.dataset()
    expected = forty.map(extractor, batched=True, remove_columns=forty.column_names)
    assert data.features == expected.features == extractor.column_types
    assert data.with_format("arrow")[:].select(expected.column_names).equals(expected.with_format("arrow")[:])
    assert {name: [identity] for name, identity in extractor.identities.items()} == features.identities
    for name, encoding in (
        ("mona", "DELTA_BINARY_PACKED"),
        *((name, "BYTE_STREAM_SPLIT") for name in ("mona", "nait", "hidden")),
    ):
        group = pq.read_metadata(shard(tmp_path / "s", name, 0)).row_group(0)
        columns = [group.column(i) for i in range(group.num_columns)]
        assert encoding in {used for column in columns for used in column.encodings}, name
        assert {column.compression for column in columns} == {"ZSTD"}


def test_wide_rows_make_small_row_groups(
    forty: Dataset, extractor: NeuronFeatureExtractor, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP", 1024)
    write(tmp_path / "s", forty, extractor, shard_rows=20)
    assert pq.read_metadata(shard(tmp_path / "s", "hidden", 0)).num_row_groups > 2
    small, large = (store.FeatureStore(folder).dataset().with_format("arrow")[:] for folder in (tmp_path / "s", whole))
    assert small.num_rows == N and small.column("n_tokens") == large.column("n_tokens")


def test_why_a_row_has_no_signal_is_kept(tiny_folder: Path, target: Dataset, tmp_path: Path) -> None:
    pool = rows(6).to_list()
    pool[2]["messages"] = [{"role": "user", "content": " "}]
    pool[4]["messages"] = [{"role": "nobody", "content": "x"}]
    extractor = make_extractor(tiny_folder, features=["mona"])
    write(tmp_path / "s", Dataset.from_list(pool), extractor)
    features = store.FeatureStore(tmp_path / "s")
    skips = [
        skip
        for tables in features.batches({"mona": features.identity_of("mona")})
        for skip in tables["mona"].column("skip").to_pylist()
    ]
    assert skips == [None, None, "empty", None, "error: messages[0] has the unknown role 'nobody'", None]
    fitted = NeuronSelector("mona").fit(target, extractor=extractor)
    selection = fitted.select(Dataset.from_list(pool), k=4, features=features)
    assert selection.scores["excluded"][2].as_py() == "empty" and selection.scores["excluded"][4].as_py() == "error"


def test_what_is_no_store_is_refused(
    forty: Dataset, extractor: NeuronFeatureExtractor, copy: Path, tmp_path: Path
) -> None:
    for part in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(NeuronSelectError, match="I/N is needed"):
            write(copy, forty, extractor, shard=part)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a")
    with pytest.raises(NeuronSelectError, match="not a feature store"):
        write(tmp_path / "mine", forty, extractor)
    with pytest.raises(NeuronSelectError, match="cannot be written"):
        write(tmp_path / "mine" / "a.txt", forty, extractor)
    assert files(tmp_path / "mine") == {"a.txt": b"a"}
