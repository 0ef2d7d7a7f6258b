"""The store survives: kill -9, full disks, damage and several writers; what is not this store's is refused."""

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
from datasets import Dataset, concatenate_datasets
from tiny import make_extractor, rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector
from hf_neuronselect.cli import main as cli
from hf_neuronselect.store import shards, store

ABOUT = {"id": "pool", "commit": "content:1"}
N, STEP = 40, 4  # ten shards


def write(folder: Path, pool: Dataset, extractor: NeuronFeatureExtractor, **options: Any) -> dict[str, Any]:
    return store.write_store(pool, extractor, folder, **{"pool_about": ABOUT, "shard_rows": STEP} | options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    extractor = make_extractor(tiny)
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
        NeuronFeatureExtractor.compute = lambda *words: (compute(*words), time.sleep(0.01))[0]  # type: ignore
    if barrier is not None:
        barrier.wait(60)
    try:
        write(folder, pool, extractor, **options)
    except NeuronSelectError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
        (folder.parent / f"{folder.name}.error").write_text(error.as_command_line())
        sys.exit(2)


# Ten shards: per file one fsync of the file and one of the folder, the manifest first.
FAULTS = [
    *[("in a write", nth) for nth in (1, 2, 3, 7, 13, 22)],
    *[("before fsync", nth) for nth in (1, 2, 3, 8, 9)],
    *[("after fsync", nth) for nth in (1, 3, 6)],
    *[("before rename", nth) for nth in (1, 5, 10)],
    *[("after rename", nth) for nth in (1, 5, 10)],
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
        names = {path.name for path in folder.iterdir()}
        torn += any(name.endswith(".part") for name in names)
        short += not expected.keys() <= names
        # What bears a final name is whole, at any moment.
        assert all(data == expected[name] for name, data in files(folder).items() if not name.endswith(".part"))
        there = len(names & expected.keys() - {store.MANIFEST})
        done = write(folder, forty, extractor)
        assert (done["skipped_shards"], done["healed_shards"], done["missing_shards"]) == (there, 0, 0), (what, nth)
        assert files(folder) == expected, (what, nth)
    assert torn >= 10 and short >= 15


def test_kills_at_random_moments(
    whole: Path, forty: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, spawn: Any, tmp_path: Path
) -> None:
    folder, draw, partial, kills = tmp_path / "s", random.Random(7), 0, 0
    while kills < 10:
        process = spawn(folder, "slowly")
        began = time.monotonic()
        before = set(folder.iterdir()) if folder.exists() else set()
        # From its first trace in the folder on, and at once where the store was almost done.
        while process.is_alive() and time.monotonic() - began < 60:
            if folder.exists() and set(folder.iterdir()) != before:
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
        partial += not files(whole).keys() <= {path.name for path in folder.iterdir()}
    assert partial >= 5
    write(folder, forty, extractor)
    assert files(folder) == files(whole)
    healed, undisturbed = (store.FeatureStore(path, pool_about=ABOUT).dataset() for path in (folder, whole))
    assert len(healed) == N and healed.with_format("arrow")[:].equals(undisturbed.with_format("arrow")[:])
    fitted = NeuronSelector("mona").fit(target, extractor=extractor)
    pools = [*(concatenate_datasets([forty, data], axis=1) for data in (healed, undisturbed)), forty]
    one, two, direct = (np.asarray(fitted.select(pool, k=5).scores["score"]) for pool in pools)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(one, direct, rtol=1e-6)  # other batches: not bit for bit


def test_a_stop_by_hand_leaves_no_part(
    forty: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, []

    def stop(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 7:
            raise KeyboardInterrupt
        real(handle)

    monkeypatch.setattr(shards.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", forty, extractor)
    monkeypatch.undo()
    assert sorted(files(tmp_path / "s")) == [store.MANIFEST, "shard-00000.parquet", "shard-00001.parquet"]
    assert write(tmp_path / "s", forty, extractor)["skipped_shards"] == 2


def test_parts_of_the_living_stay(
    whole: Path, forty: Dataset, extractor: NeuronFeatureExtractor, copy: Path, spawn: Any
) -> None:
    living, dead = spawn(copy.parent / "other", "slowly"), spawn(copy.parent / "third", "before fsync")
    dead.join(60)
    name = ".shard-00000.parquet.{}.{}.part".format
    here, old = shards.host_name(), time.time() - 2 * shards.DAY
    for host, pid in ((here, living.pid), (here, dead.pid), (here, os.getpid()), ("far", 5), ("gone", 5)):
        (copy / name(host, pid)).write_bytes(b"PAR1")
    os.utime(copy / name("gone", 5), (old, old))
    (copy / "notes.part").write_text("mine")
    os.kill(living.pid, signal.SIGSTOP)
    write(copy, forty, extractor)
    os.kill(living.pid, signal.SIGCONT)
    assert files(copy).keys() - files(whole).keys() == {name(here, living.pid), name("far", 5), "notes.part"}


# ---------------------------------------------------------------------------------------- full disk
def test_a_full_disk_is_one_clear_line(
    whole: Path, forty: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        left = 3

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
    assert not [name for name in files(tmp_path / "s") if name.endswith(".part")]
    write(tmp_path / "s", forty, extractor)
    assert files(tmp_path / "s") == files(whole)


# ------------------------------------------------------------------------------------------- damage
def test_damaged_and_missing_shards_are_redone(
    whole: Path, forty: Dataset, extractor: NeuronFeatureExtractor, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = copy / "shard-00001.parquet"
    for size in (0, 3, 8, 500, shard.stat().st_size - 1):
        os.truncate(shard, size)
        (copy / "shard-00003.parquet").unlink()
        with pytest.raises(NeuronSelectError, match="1 of 10 shards are missing, first shard-00003.*neuronselect extr"):
            store.FeatureStore(copy, pool_about=ABOUT).dataset()
        shutil.copy(whole / "shard-00003.parquet", copy)
        with pytest.raises(NeuronSelectError, match="shard-00001.parquet is damaged: run `neuronselect extract` again"):
            store.FeatureStore(copy, pool_about=ABOUT).dataset()
        (copy / "shard-00003.parquet").unlink()
        done = write(copy, forty, extractor)
        assert (done["skipped_shards"], done["healed_shards"]) == (8, 1)
        assert "shard-00001.parquet is damaged: it is done again" in caplog.text
        assert files(copy) == files(whole)


def test_any_flipped_bit_is_noticed(whole: Path, forty: Dataset, extractor: NeuronFeatureExtractor, copy: Path) -> None:
    manifest, shard = store._read_manifest(copy), copy / "shard-00002.parquet"
    right = shard.read_bytes()
    assert shards.flaw_of(shard, manifest, 2, STEP) == ""
    for at in [*range(0, len(right), 7), *range(len(right) - 12, len(right))]:
        for bit in (0, 7):
            wrong = bytearray(right)
            wrong[at] ^= 1 << bit
            shard.write_bytes(wrong)
            assert shards.flaw_of(shard, manifest, 2, STEP) == "damaged", (at, bit)
    with pytest.raises(NeuronSelectError, match="shard-00002.parquet is damaged"):
        store.FeatureStore(copy).dataset()
    assert write(copy, forty, extractor)["healed_shards"] == 1 and files(copy) == files(whole)


def test_a_shard_of_another_store_is_noticed(
    whole: Path, forty: Dataset, tiny_folder: Path, extractor: NeuronFeatureExtractor, copy: Path, tmp_path: Path
) -> None:
    write(tmp_path / "extractor", forty, make_extractor(tiny_folder, top_k_features=3))
    write(tmp_path / "features", forty, extractor.with_features(["mona"]))
    write(tmp_path / "pool", rows(N, seed=3), extractor, pool_about={"id": "pool", "commit": "content:2"})
    write(tmp_path / "steps", forty, extractor, shard_rows=5)
    for name in ("extractor", "features", "pool", "steps"):
        shutil.copy(tmp_path / name / "shard-00001.parquet", copy)
        with pytest.raises(NeuronSelectError, match="shard-00001.parquet is of another store: run"):
            store.FeatureStore(copy).dataset()
        assert write(copy, forty, extractor)["healed_shards"] == 1 and files(copy) == files(whole)
    shutil.copy(copy / "shard-00001.parquet", copy / "shard-00002.parquet")  # of this store, but of other rows
    with pytest.raises(NeuronSelectError, match="shard-00002.parquet is of another store"):
        store.FeatureStore(copy).dataset()
    assert write(copy, forty, extractor)["healed_shards"] == 1 and files(copy) == files(whole)


def test_a_damaged_manifest_comes_back_from_the_shards(
    whole: Path, forty: Dataset, tiny_folder: Path, extractor: NeuronFeatureExtractor, copy: Path
) -> None:
    right = (copy / store.MANIFEST).read_bytes()
    flipped = right.replace(b'"rows": 40', b'"rows": 44')
    assert flipped != right
    for wrong in (b"", right[:100], right[: len(right) // 2], b"[]", b"\xff\x00", flipped, None):
        (copy / store.MANIFEST).unlink()
        if wrong is not None:
            (copy / store.MANIFEST).write_bytes(wrong)
        with pytest.raises(NeuronSelectError, match="no readable manifest.json.*run `neuronselect extract` again"):
            store.FeatureStore(copy).dataset()
        with pytest.raises(NeuronSelectError, match="another extractor"):
            write(copy, forty, make_extractor(tiny_folder, top_k_features=3))
        assert write(copy, forty, extractor, shard_rows=9)["skipped_shards"] == 10
        assert files(copy) == files(whole)
    # Without a whole shard nothing says that the folder is a store: it is left as it is.
    for path in copy.glob("shard-*"):
        path.unlink()
    (copy / store.MANIFEST).write_text('{"name": "an app"}')
    with pytest.raises(NeuronSelectError, match="exists and is not a feature store"):
        write(copy, forty, extractor)
    assert files(copy) == {store.MANIFEST: b'{"name": "an app"}'}


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
    assert code == 2 and "3 of 5 shards are missing, first shard-00000.parquet" in err and err.count("\n") == 1
    code, out, err = run(*words)
    assert code == 0 and "2 shards were there already" in out and "missing" not in err
    os.truncate(tmp_path / "s" / "shard-00004.parquet", 99)
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
    data = store.FeatureStore(tmp_path / "s").dataset()
    expected = forty.map(extractor, batched=True, remove_columns=forty.column_names)
    assert data.features == expected.features == extractor.column_types
    assert data.with_format("arrow")[:].equals(expected.with_format("arrow")[:].select(data.column_names))
    group = pq.read_metadata(tmp_path / "s" / "shard-00000.parquet").row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    encodings = {column.path_in_schema.split(".")[0]: column.encodings for column in columns}
    assert "DELTA_BINARY_PACKED" in encodings["mona_indices"]
    assert all("BYTE_STREAM_SPLIT" in encodings[name] for name in ("mona_values", "nait", "hidden"))
    assert {column.compression for column in columns} == {"ZSTD"}


def test_wide_rows_make_small_row_groups(
    forty: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP", 4096)
    write(tmp_path / "s", forty, extractor, shard_rows=20)
    assert pq.read_metadata(tmp_path / "s" / "shard-00000.parquet").num_row_groups > 3
    assert len(store.FeatureStore(tmp_path / "s").dataset()) == N


def test_a_store_without_checksums_is_still_read(
    whole: Path, forty: Dataset, tiny_folder: Path, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    """As the first version wrote it: plain shards, and the manifest without its digest."""
    folder = tmp_path / "s"
    folder.mkdir()
    manifest = {name: value for name, value in store._read_manifest(whole).items() if name != "blake2b"}
    (folder / store.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    data = store.FeatureStore(whole).dataset()
    for name, start, stop in shards.shard_ranges(manifest):
        data.select(range(start, stop)).to_parquet(folder / name)
    again = store.FeatureStore(folder, pool_about=ABOUT).dataset()
    assert again.with_format("arrow")[:].equals(data.with_format("arrow")[:])
    assert write(folder, forty, extractor)["skipped_shards"] == 10
    os.truncate(folder / "shard-00000.parquet", 500)
    write(tmp_path / "t", forty, make_extractor(tiny_folder, top_k_features=3))
    data = Dataset.from_parquet(str(tmp_path / "t" / "shard-00001.parquet"))
    data.to_parquet(folder / "shard-00001.parquet")
    for wrong in ("shard-00000.parquet is damaged", "shard-00001.parquet is of another store"):
        with pytest.raises(NeuronSelectError, match=wrong):
            store.FeatureStore(folder).dataset()
        shutil.copy(whole / wrong.split()[0], folder)
    assert write(folder, forty, extractor)["healed_shards"] == 0
    # Plain shards have no place in a store that says it has checksums.
    shutil.copytree(whole, tmp_path / "new")
    Dataset.from_parquet(str(whole / "shard-00000.parquet")).to_parquet(tmp_path / "new" / "shard-00000.parquet")
    with pytest.raises(NeuronSelectError, match="shard-00000.parquet is damaged"):
        store.FeatureStore(tmp_path / "new").dataset()


def test_a_store_with_the_first_digests_is_still_read(
    whole: Path, forty: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "DIGEST", "shard_blake2b")
        write(folder, forty, extractor)
    shard = folder / "shard-00001.parquet"
    right = shard.read_bytes()
    assert b"shard_blake2b" in right and b"shard_blake2b" not in (whole / shard.name).read_bytes()
    data = [store.FeatureStore(path, pool_about=ABOUT).dataset().with_format("arrow")[:] for path in (folder, whole)]
    assert data[0].equals(data[1])
    wrong = bytearray(right)
    wrong[len(wrong) // 2] ^= 1
    shard.write_bytes(wrong)
    with pytest.raises(NeuronSelectError, match="shard-00001.parquet is damaged"):
        store.FeatureStore(folder).dataset()
    (folder / store.MANIFEST).unlink()
    assert write(folder, forty, extractor)["healed_shards"] == 1
    assert store._read_manifest(folder) == store._read_manifest(whole)


def test_another_store_is_refused(
    forty: Dataset, tiny_folder: Path, extractor: NeuronFeatureExtractor, copy: Path, tmp_path: Path
) -> None:
    before = files(copy)
    other = make_extractor(tiny_folder, top_k_features=3)
    with pytest.raises(NeuronSelectError, match=f"another extractor: {extractor.hash}, now {other.hash}"):
        write(copy, forty, other)
    with pytest.raises(NeuronSelectError, match="another features"):
        write(copy, forty, extractor.with_features(["mona"]))
    with pytest.raises(NeuronSelectError, match="another pool"):
        write(copy, forty, extractor, pool_about={"id": "x"})
    with pytest.raises(NeuronSelectError, match="another rows: 40, now 30"):
        write(copy, rows(30), extractor)
    with pytest.raises(NeuronSelectError, match="the store is of the pool"):
        store.FeatureStore(copy, pool_about={"id": "x"}).dataset()
    assert files(copy) == before
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(NeuronSelectError, match="I/N is needed"):
            write(copy, forty, extractor, shard=shard)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a")
    with pytest.raises(NeuronSelectError, match="not a feature store"):
        write(tmp_path / "mine", forty, extractor)
    with pytest.raises(NeuronSelectError, match="cannot be written"):
        write(tmp_path / "mine" / "a.txt", forty, extractor)
    assert files(tmp_path / "mine") == {"a.txt": b"a"}
