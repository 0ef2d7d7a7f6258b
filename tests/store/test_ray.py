"""Ray actors make the same store as one process, whatever dies; a cluster that ran before is left as it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import faulty
import pyarrow as pa
import pytest
from datasets import Dataset
from faulty import STEP, N
from stores import ABOUT, files, shard
from stores import shards as shards_of

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelectWarning
from hf_neuronselect.cli import main as cli
from hf_neuronselect.store import ray as ray_backend
from hf_neuronselect.store import store
from hf_neuronselect.store.shard_maker import TRIES, ShardMaker

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

DEADLINE = 600  # seconds a test may take, on cores that have other work


def write(folder: Path, pool: Dataset, extractor: NeuronFeatureExtractor, **options: Any) -> dict[str, Any]:
    options = {"pool_about": ABOUT, "shard_rows": STEP, "backend": "ray"} | options
    return store.write_store(pool, extractor, folder, **options)


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """Ray waits for what may never come: no test may wait for ever."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {DEADLINE} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(DEADLINE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """Ray of this machine alone, that tells nobody; actors get the tests' classes sent, they cannot import them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ADDRESS", "local")  # not a cluster that happens to run here
        ray.cloudpickle.register_pickle_by_value(faulty)
        yield
        ray.cloudpickle.unregister_pickle_by_value(faulty)
        ray.shutdown()


@pytest.fixture
def cluster(environment: None) -> None:
    """One of two CPUs; most tests share it."""
    if not ray.is_initialized():
        ray.init(
            "local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            object_store_memory=100 << 20,
        )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pool24: Dataset, extractor: NeuronFeatureExtractor) -> Path:
    """One process's store."""
    folder = tmp_path_factory.mktemp("stores") / "whole"
    write(folder, pool24, extractor, backend="local")
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s"))


# ------------------------------------------------------------------------------------- the same store
@pytest.mark.slow
def test_actors_make_the_same_store(
    whole: Path, pool24: Dataset, make_faulty: Any, tmp_path: Path, cluster: None
) -> None:
    """And what one of them warns of is heard here."""
    said: list[str] = []
    with pytest.warns(NeuronSelectWarning, match="^out of memory: a smaller batch$") as heard:
        done = write(tmp_path / "s", pool24, make_faulty({9: ("warn", 1)}), num_workers=2, say=said.append)
    assert len([w for w in heard if issubclass(w.category, NeuronSelectWarning)]) == 1
    assert files(tmp_path / "s") == files(whole)
    assert (done["rows"], done["skipped_shards"], done["healed_shards"], done["missing_shards"]) == (N, 0, 0, 0)
    assert done["bytes"] == sum(p.stat().st_size for p in whole.glob("*/*.parquet"))
    assert done["tokens"] == sum(store.FeatureStore(whole).dataset("tokens")["n_tokens"])
    assert len(said) == 1 and f"for {N:,} rows" in said[0]
    features = store.FeatureStore(tmp_path / "s")
    (cost,) = features.cost({"mona": features.identity_of("mona")}).passes.values()
    assert (cost.rows, cost.tokens, len(cost.signals)) == (N, done["tokens"], 4)


def test_no_rows_need_no_cluster(
    extractor: NeuronFeatureExtractor, tmp_path: Path, pool24: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_backend, "_cluster", None)
    assert write(tmp_path / "s", pool24.select(range(0)), extractor, num_workers=2)["rows"] == 0


# ---------------------------------------------------------------------------------- actors that die
@pytest.mark.slow
def test_a_store_is_resumed_and_an_actor_dies(
    whole: Path, pool24: Dataset, make_faulty: Any, copy: Path, tmp_path: Path, cluster: None, caplog: Any
) -> None:
    """Missing and damaged shards alone are made, and that of a dead actor once more."""
    for path in (*shards_of(copy, 0), shard(copy, "mona", 2)):
        path.unlink()
    os.truncate(shard(copy, "mona", 3), 100)
    others = [shard(copy, "hidden", number) for number in (2, 3)]
    kept = {path: path.stat() for number in (1, 4, 5) for path in (*shards_of(copy, number), *others)}
    extractor = make_faulty({1: ("SIGKILL", 1), 14: ("warn", 9), 17: ("SIGKILL", 9)})
    with pytest.warns(NeuronSelectWarning) as warned:
        done = write(copy, pool24, extractor, num_workers=2)
    heard = [str(w.message) for w in warned if issubclass(w.category, NeuronSelectWarning)]
    assert sorted(heard) == [
        "a worker died by a kill or a crash: shard-00000.parquet (rows 0 to 3) is done again by a new one; if that happens "
        "often, use fewer workers or a smaller batch_tokens",
        "out of memory: a smaller batch",
    ]
    assert (done["rows"], done["skipped_shards"], done["healed_shards"], done["missing_shards"]) == (N, 3, 1, 0)
    assert "shard-00003.parquet is damaged: it is computed again" in caplog.text
    marks = [mark.name.split(".") for mark in (tmp_path / "counted").iterdir()]
    assert sorted(int(row) for row, *_ in marks) == [1, 14]  # whole shards are computed by nobody
    assert files(copy) == files(whole)
    for path, before in kept.items():
        now = path.stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.slow
def test_an_error_of_an_actor_is_raised_and_ends_the_others(
    pool24: Dataset, make_faulty: Any, tmp_path: Path, cluster: None
) -> None:
    """As it was, and at once; the cluster, which was there before, goes on."""
    refusing = make_faulty({1: ("refuse", 1), 5: ("slow", 1)})
    with pytest.raises(NeuronSelectError) as caught:
        write(tmp_path / "s", pool24, refusing, num_workers=1)
    assert (caught.value.message, caught.value.option, caught.value.value) == ("too long a row", "max_length", 9)
    assert caught.value.as_command_line() == "--max-length 9: too long a row"
    actor = int(next(iter((tmp_path / "counted").glob("1.*"))).name.split(".")[3])
    # `caught` still holds the frames of the call: what they hold must not keep the actor at the next shard.
    until = time.monotonic() + 20
    while alive(actor) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(actor)
    assert {Path(name).name for name in files(tmp_path / "s")} == {store.MANIFEST, store.SIGNAL}
    assert ray.is_initialized() and ray.cluster_resources()["CPU"] == 2


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ----------------------------------------------------------------------------- how many actors, and where
def on(extractor: NeuronFeatureExtractor, device: str) -> NeuronFeatureExtractor:
    options = replace(extractor.extraction.options, device=device)
    return NeuronFeatureExtractor(replace(extractor.extraction, options=options), extractor.signals)


class Planned:
    """In place of a Ray Dataset: keeps how its actors are asked for and gives made-up reports."""

    def __init__(self, *reports: dict[str, Any]) -> None:
        self.reports, self.asked = reports, dict[str, Any]()

    def map_batches(self, actor: type, **asked: Any) -> Planned:
        self.asked = asked
        return self

    def iter_batches(self, **options: Any) -> Iterator[pa.Table]:
        return (pa.table({"report": [json.dumps(report)]}) for report in self.reports)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, cluster: None) -> Callable[..., Planned]:
    def make(*reports: dict[str, Any], nodes: list[dict[str, float]] | None = None) -> Planned:
        planned = Planned(*reports)
        monkeypatch.setattr(ray.data, "from_items", lambda items, **options: planned)
        if nodes is not None:
            dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
            there = [dead, *({"Alive": True, "Resources": node} for node in nodes)]
            monkeypatch.setattr(ray, "nodes", lambda: there)
        return planned

    return make


@pytest.mark.parametrize(
    "device, num_workers, nodes, actors, cpus, gpus",
    [
        ("auto", None, [{"CPU": 8.0}], 1, 8, 0),
        ("auto", 2, [{"CPU": 8.0}], 2, 4, 0),
        ("auto", 9, [{"CPU": 2.0}], 6, 1, 0),  # no more than there are shards
        ("cpu", None, [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}], 2, 4, 0),  # as many as the smaller node has
        ("cpu", None, [{}, {"CPU": 0.0}, {"CPU": 8.0}, {"CPU": 8.0}], 2, 8, 0),  # a head that takes no work
        ("auto", None, [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}], 3, 1, 1),
        ("cuda", 2, [{"CPU": 8.0, "GPU": 4.0}], 2, 1, 1),
    ],
)
def test_actors_share_the_cluster(
    device: str, num_workers: int | None, nodes: Any, actors: int, cpus: int, gpus: int,
    whole: Path, pool24: Dataset, extractor: NeuronFeatureExtractor, plan: Any,
) -> None:  # fmt: skip
    """A GPU each, or their part of the CPUs of the nodes that have some."""
    planned = plan(nodes=nodes)
    write(whole, pool24, on(extractor, device), num_workers=num_workers)
    asked = planned.asked
    assert (asked["compute"].min_size, asked["compute"].max_size) == (actors, actors)
    assert (asked["num_cpus"], asked["num_gpus"]) == (cpus, gpus)


# ------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "device, nodes, lacking", [("cuda", [{"CPU": 8.0}], "GPU"), ("auto", [{"memory": 9.0}], "CPU")]
)
def test_a_cluster_without_what_an_actor_needs(
    device: str, nodes: Any, lacking: str, whole: Path, pool24: Dataset, extractor: NeuronFeatureExtractor, plan: Any
) -> None:
    """Is refused: Ray would wait for it for ever."""
    plan(nodes=nodes)
    with pytest.raises(NeuronSelectError, match=f"the Ray cluster has no {lacking} to give to an actor") as caught:
        write(whole, pool24, on(extractor, device))
    assert (caught.value.option, caught.value.value) == ("device", device)


def test_a_folder_that_not_all_nodes_share(
    copy: Path, pool24: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path, plan: Any
) -> None:
    """A node that does not see it says so; so does this machine, where it does not see what a node wrote."""
    maker = ShardMaker(pool24, extractor, copy, STEP)
    actor = ray_backend._ShardActor(
        extractor, tmp_path / "elsewhere" / "s", maker.shard_rows, lambda: pool24, ray_backend._count_deaths(ray)
    )
    report = json.loads(actor(pa.table({"number": [2]}))["report"][0].as_py())
    plan(report)
    with pytest.raises(
        NeuronSelectError, match="the node .* does not see it; .* a folder that all nodes share"
    ) as caught:
        write(copy, pool24, extractor)
    assert (caught.value.option, caught.value.value) == ("out", "s")

    shard(copy, "mona", 2).unlink()
    shard(copy, "mona", 4).unlink()
    made = [2, 4, 9, 9, "missing", {}]
    plan({"number": 2, "warnings": [], "deaths": 0, "error": None, "row_bytes": None, "shard": made})
    with pytest.raises(
        NeuronSelectError, match="^out='s': 2 shards, first mona-.*/shard-00002.parquet, were .* cannot be seen from"
    ):
        write(copy, pool24, extractor)


@pytest.mark.parametrize(
    "words, error",
    [
        (["--shard", "0/2"], "--shard 0/2: Ray shares all shards out itself; leave it out"),
        (["--device", "mps"], "--device mps: Ray gives each actor a GPU of its own: auto, cuda or cpu"),
        (["--device", "cuda:1"], "--device cuda:1: Ray gives each actor a GPU of its own: auto, cuda or cpu"),
        (["--device-map", "auto"], "--device-map auto: spreads one model over several GPUs, and Ray gives each actor one: "
         "leave it out"),
        (["no ray"], "--backend ray: needs Ray: pip install 'hf-neuronselect[ray]'"),
        (["no cluster"], "--backend ray: no Ray cluster: nobody answers there; look at RAY_ADDRESS"),
    ],
)  # fmt: skip
def test_bad_input_on_the_command_line(
    words: list[str], error: str, command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def nobody(**options: Any) -> None:
        raise ConnectionError("nobody answers\n  there")

    if words == ["no ray"]:
        monkeypatch.setitem(sys.modules, "ray", None)
    else:  # and nothing is started for what is refused
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", nobody)
    monkeypatch.setattr(sys, "argv", ["neuronselect", *command(*(word for word in words if "no " not in word))])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


# ------------------------------------------------------------------------------------ the command line
@pytest.fixture
def command(
    tiny_folder: Path, tmp_path: Path, pool24: Dataset, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Words of `extract`; pool and store are named as seen from where this process, and it alone, now is."""
    pool24.to_parquet(tmp_path / "pool.parquet")
    monkeypatch.chdir(tmp_path)

    def words(*more: str, backend: str = "ray", out: str = "s") -> list[str]:
        return ["extract", "--pool", "pool.parquet", "--model", str(tiny_folder / "model"), "--sae",
                str(tiny_folder / "sae"), "--shard-rows", str(STEP), "--backend", backend, "--out", out, *more]  # fmt: skip

    return words


@pytest.mark.slow
def test_the_command_in_a_cluster_that_runs(
    cluster: None, command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It joins that of RAY_ADDRESS; its actors load the pool themselves, from a path that is relative here alone."""
    monkeypatch.setattr(sys, "argv", ["neuronselect", *command(backend="local", out="local")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    done = subprocess.run(
        [sys.executable, "-m", "hf_neuronselect.cli.main", *command("--num-workers", "2")],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        capture_output=True, text=True, timeout=DEADLINE - 20,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{N} rows, ") and done.stdout.endswith("0 shards were there already -> s\n")
    assert done.stderr.count("bytes a row") == 1 and "still missing" not in done.stderr
    assert len(list((tmp_path / "s").glob("mona-*/shard-*"))) == N // STEP
    assert files(tmp_path / "s") == files(tmp_path / "local")
    assert ray.cluster_resources()["CPU"] == 2  # it is still there


# ------------------------------------------------------------------------------- a cluster of its own
@pytest.mark.slow
def test_a_shard_that_kills_every_actor(
    whole: Path, pool24: Dataset, make_faulty: Any, copy: Path, tmp_path: Path
) -> None:
    """Is given up after three, in one error; the cluster that was started for it does not stay."""
    ray.shutdown()
    for path in shards_of(copy, 5):
        path.unlink()
    with warnings.catch_warnings(), pytest.raises(NeuronSelectError) as caught:
        warnings.simplefilter("error", NeuronSelectWarning)
        write(copy, pool24, make_faulty({22: ("raise", 99)}), num_workers=1)
    assert caught.value.as_command_line().startswith(
        "--num-workers 1: shard-00005.parquet (rows 20 to 23): 3 workers died on it, the last one by RuntimeError: CUDA "
        "error: an illegal memory access was encountered;"
    )
    assert len(list((tmp_path / "counted").iterdir())) == TRIES == 3
    assert files(copy).keys() == {name for name in files(whole) if "shard-00005" not in name}
    assert not ray.is_initialized()
