"""Worker processes make the same store as one process, whatever dies; none outlives the process that started it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import tiny_model, tiny_tokenizer
from faulty import STEP, N
from stores import ABOUT, files, shard
from stores import shards as shards_of
from tiny import rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError
from hf_neuronselect.core.errors import NeuronSelectWarning
from hf_neuronselect.models import loading, lora
from hf_neuronselect.store import processes as workers
from hf_neuronselect.store import store
from hf_neuronselect.store.shard_maker import TRIES


def write(folder: Path, pool: Dataset, extractor: NeuronFeatureExtractor, **options: Any) -> dict[str, Any]:
    return store.write_store(pool, extractor, folder, **{"pool_about": ABOUT, "shard_rows": STEP} | options)


def parts(folder: Path) -> list[Path]:
    """Unfinished files."""
    return list(folder.rglob("*.part"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pool24: Dataset, extractor: NeuronFeatureExtractor) -> Path:
    """One process's store."""
    folder = tmp_path_factory.mktemp("stores") / "whole"
    write(folder, pool24, extractor)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers forked from a server that has imported everything: seconds less each."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["hf_neuronselect", "datasets", "transformers.models.llama.modeling_llama", "hf_neuronselect.cli.main"]
    )
    monkeypatch.setattr(workers, "START", "forkserver")
    yield
    assert not multiprocessing.active_children()


def once_marked(folder: Path, act: Callable[[Path], None]) -> threading.Thread:
    """Act in a thread on the first mark that a deed leaves; where none is left, end: no test may wait for ever."""

    def wait() -> None:
        until = time.monotonic() + 120
        while not (marks := list(folder.iterdir())) and time.monotonic() < until:
            time.sleep(0.01)
        if marks:
            act(marks[0])

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


# ------------------------------------------------------------------------------------- the same store
def test_a_model_that_was_used_before_leaves_the_gpu_to_the_workers(
    pool24: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path, quick: None
) -> None:
    write(tmp_path / "alone", pool24.select(range(2)), extractor)
    assert loading._BACKBONES and loading._sae.cache_info().currsize
    lora.lora_model_of(extractor.extraction.spec, torch.device("cpu"), lora.LoraShape(rank=2))
    write(tmp_path / "s", pool24, extractor, num_workers=2)
    assert not lora._MODELS
    assert not loading._BACKBONES and not loading._WHOLE and not loading._sae.cache_info().currsize


def test_workers_make_the_same_store(
    whole: Path, pool24: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path, quick: None, caplog: Any
) -> None:
    said: list[str] = []
    done = write(tmp_path / "s", pool24, extractor, num_workers=3, say=said.append)
    assert files(tmp_path / "s") == files(whole)
    assert (done["rows"], done["skipped_shards"], done["missing_shards"]) == (N, 0, 0)
    assert done["bytes"] == sum(p.stat().st_size for p in whole.glob("*/*.parquet"))
    assert done["tokens"] == sum(store.FeatureStore(whole).dataset("tokens")["n_tokens"])
    assert len(said) == 1 and f"for {N} rows" in said[0]
    # What is there is left, what is damaged or missing is made; --shard is shared out among the workers.
    (cost,) = store.FeatureStore(tmp_path / "s").cost({"mona": extractor.identity("mona")}).passes.values()
    assert (cost.rows, cost.tokens, len(cost.signals)) == (N, done["tokens"], 4)
    for path in (*shards_of(tmp_path / "s", 1), shard(tmp_path / "s", "mona", 2)):
        path.unlink()
    os.truncate(shard(tmp_path / "s", "hidden", 3), 100)
    done = write(tmp_path / "s", pool24, extractor, num_workers=2, shard=(1, 2))
    assert (done["skipped_shards"], done["healed_shards"], done["missing_shards"]) == (1, 1, 1)
    assert "shard-00003.parquet is damaged: it is computed again" in caplog.text
    assert write(tmp_path / "s", pool24, extractor, num_workers=9)["skipped_shards"] == 5
    assert files(tmp_path / "s") == files(whole)
    assert write(tmp_path / "s", pool24, extractor, num_workers=2)["skipped_shards"] == 6


def test_workers_on_a_pool_of_no_rows(extractor: NeuronFeatureExtractor, tmp_path: Path, pool24: Dataset) -> None:
    assert write(tmp_path / "s", pool24.select(range(0)), extractor, num_workers=2)["rows"] == 0


# ------------------------------------------------------------------------------------ workers that die
def test_a_worker_killed_from_outside(
    whole: Path, pool24: Dataset, make_faulty: Any, tmp_path: Path, quick: None
) -> None:
    """kill -9 while it computes a shard: that one is done again, by a new worker of the same rank."""
    slow, killed = make_faulty({9: ("slow", 1)}), []

    def kill(mark: Path) -> None:
        rank = mark.name.split(".")[2]
        process = next(p for p in multiprocessing.active_children() if p.name == f"neuronselect-{rank}")
        os.kill(process.pid, signal.SIGKILL)
        killed.append(rank)

    killer = once_marked(tmp_path / "counted", kill)
    with pytest.warns(NeuronSelectWarning, match=r"died by signal SIGKILL: shard-00002.parquet \(rows 8 to 11\) is do"):
        done = write(tmp_path / "s", pool24, slow, num_workers=2)
    killer.join()
    assert killed and (done["rows"], done["skipped_shards"]) == (N, 0)
    assert files(tmp_path / "s") == files(whole)


def test_deaths_of_every_kind(whole: Path, pool24: Dataset, make_faulty: Any, tmp_path: Path, quick: None) -> None:
    """Two in a row on one shard are survived as well; a third one is not."""
    extractor = make_faulty({1: ("SIGKILL", 2), 9: ("SIGSEGV", 1), 14: ("exit", 1), 22: ("raise", 1)})
    with pytest.warns(NeuronSelectWarning) as warned:
        done = write(tmp_path / "s", pool24, extractor, num_workers=2)
    said = " ".join(str(w.message) for w in warned)
    for cause, name in (
        ("signal SIGKILL", "shard-00000"), ("signal SIGSEGV", "shard-00002"), ("exit status 7", "shard-00003"),
        ("exit status 1", "shard-00005"),
    ):  # fmt: skip
        assert f"a worker died by {cause}: {name}.parquet" in said
    assert len(list((tmp_path / "counted").iterdir())) == 5
    assert done["missing_shards"] == 0 and files(tmp_path / "s") == files(whole)
    for path in shards_of(tmp_path / "s", 0):
        path.unlink()
    extractor.deeds[1] = ("SIGKILL", 99)
    with pytest.warns(NeuronSelectWarning), pytest.raises(NeuronSelectError) as caught:
        write(tmp_path / "s", pool24, extractor, num_workers=2)
    assert caught.value.as_command_line().startswith(
        "--num-workers 2: shard-00000.parquet (rows 0 to 3): 3 workers died on it, the last one by signal SIGKILL;"
    )
    assert len(list((tmp_path / "counted").iterdir())) == 5 + TRIES
    assert files(tmp_path / "s").keys() == {name for name in files(whole) if "shard-00000" not in name}


# ----------------------------------------------------------------------------- what workers have to say
def test_what_a_worker_raises_is_raised(
    whole: Path, pool24: Dataset, make_faulty: Any, extractor: NeuronFeatureExtractor, tmp_path: Path, quick: None
) -> None:
    refusing = make_faulty({9: ("refuse", 1)})
    with pytest.raises(NeuronSelectError) as caught:
        write(tmp_path / "s", pool24, refusing, num_workers=2)
    assert caught.value.as_command_line() == "--max-length 9: too long a row"
    assert not multiprocessing.active_children()
    refusing.deeds[9] = ("full disk", 2)
    with pytest.raises(NeuronSelectError, match="cannot be written: No space left on device.*goes on") as caught:
        write(tmp_path / "s", pool24, refusing, num_workers=2)
    assert caught.value.option == "out" and not parts(tmp_path / "s")
    write(tmp_path / "s", pool24, extractor, num_workers=2)
    assert files(tmp_path / "s") == files(whole)


def test_what_a_worker_warns_of_is_heard(
    whole: Path, pool24: Dataset, make_faulty: Any, tmp_path: Path, quick: None
) -> None:
    with pytest.warns(NeuronSelectWarning, match="out of memory: a smaller batch"):
        write(tmp_path / "s", pool24, make_faulty({9: ("warn", 1)}), num_workers=2)
    assert files(tmp_path / "s") == files(whole)


def test_a_stop_by_hand_ends_the_workers(
    whole: Path, pool24: Dataset, make_faulty: Any, tmp_path: Path, quick: None
) -> None:
    """In the middle of a shard, and of another one's compute."""

    def stop(*words: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    slow = make_faulty({9: ("slow", 1)})

    thread = once_marked(tmp_path / "counted", lambda _: os.kill(os.getpid(), signal.SIGALRM))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", pool24, slow, num_workers=2)
    thread.join()
    assert not multiprocessing.active_children()
    assert not parts(tmp_path / "s")
    write(tmp_path / "s", pool24, slow, num_workers=2)
    assert files(tmp_path / "s") == files(whole)


def test_a_model_in_memory_is_refused(pool24: Dataset, tiny_folder: Path, tmp_path: Path, quick: None) -> None:
    ours = NeuronFeatureExtractor.from_model(tiny_model("llama"), tiny_tokenizer(), features=["hidden"])
    with pytest.raises(NeuronSelectError, match="has an in-memory model, which cannot be sent to another process"):
        write(tmp_path / "s", pool24, ours, num_workers=2)


# ------------------------------------------------------------------------------------ the command line
def children(pid: int) -> set[int]:
    """All processes below one."""
    try:
        own = {
            int(word)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for word in (task / "children").read_text().split()
        }
    except OSError:
        return set()
    return own.union(*(children(child) for child in own))


def alive(pids: set[int]) -> set[int]:
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.add(pid)
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_the_command(stop: signal.Signals, tiny_folder: Path, tmp_path: Path) -> None:
    """Really spawned; the parent gets kill -9 and can do nothing for them, or Ctrl-C, which they get as well."""
    rows(4000).to_parquet(tmp_path / "pool.parquet")
    words = ["extract", "--pool", str(tmp_path / "pool.parquet"), "--model", str(tiny_folder / "model"), "--sae",
             str(tiny_folder / "sae"), "--shard-rows", "8", "--num-workers", "2", "--out", str(tmp_path / "s")]  # fmt: skip
    with (tmp_path / "err").open("w") as err:
        parent = subprocess.Popen(
            [sys.executable, "-m", "hf_neuronselect.cli.main", *words], stderr=err, stdout=err, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
    try:
        started = time.monotonic()
        while (
            not list((tmp_path / "s").glob("mona-*/shard-*"))
            and parent.poll() is None
            and time.monotonic() < started + 90
        ):
            time.sleep(0.05)
        below = children(parent.pid)
        assert parent.poll() is None and len(below) >= 2, (tmp_path / "err").read_text()[-2000:]
        (os.killpg if stop == signal.SIGINT else os.kill)(parent.pid, stop)
        parent.wait(60)
        ended = time.monotonic()
        while alive(below) and time.monotonic() < ended + 30:
            time.sleep(0.05)
        assert not alive(below)
    finally:
        parent.kill()
    assert json.loads((tmp_path / "s" / store.MANIFEST).read_text())["rows"] == 4000
    assert len(list((tmp_path / "s").glob("mona-*/shard-*"))) < 500
    if stop == signal.SIGINT:
        assert not parts(tmp_path / "s")
