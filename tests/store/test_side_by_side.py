"""A store keeps signals side by side and grows with its pool: only what is missing is computed, and each cost is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from stores import ABOUT, files, shard
from tiny import make_extractor, rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector
from hf_neuronselect.core.errors import NeuronSelectWarning
from hf_neuronselect.signals.base import BOOKKEEPING
from hf_neuronselect.signals.forward import ForwardEngine
from hf_neuronselect.signals.loss import LossEngine
from hf_neuronselect.store import shards, store
from hf_neuronselect.store.shard_maker import ShardMaker

N, STEP, SAMPLE = 20, 8, 16  # shards of 8, 8 and 4 rows; rows that a shard's size is measured on
MORE = 30


def write(folder: Path, pool: Dataset, extractor: NeuronFeatureExtractor, **options: Any) -> dict[str, Any]:
    return store.write_store(pool, extractor, folder, **{"pool_about": ABOUT, "shard_rows": STEP} | options)


def table(folder: Path, *names: str) -> pa.Table:
    return store.FeatureStore(folder).dataset(*names).with_format("arrow")[:]


@pytest.fixture(scope="module")
def long_pool() -> Dataset:
    return rows(MORE)


@pytest.fixture(scope="module")
def pool20(long_pool: Dataset) -> Dataset:
    return long_pool.select(range(N))


@pytest.fixture(scope="module")
def both(tiny_folder: Path) -> NeuronFeatureExtractor:
    return make_extractor(tiny_folder, features=["mona", "hidden"])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(signals, rows) of every batch that a model was run over."""
    seen: list[tuple[str, int]] = []
    forward, losses = ForwardEngine._forward, LossEngine.compute

    def run(self: ForwardEngine, samples: Any, signals: Any, *rest: Any) -> Any:
        seen.append(("+".join(signal.name for signal in signals), len(samples)))
        return forward(self, samples, signals, *rest)

    def lose(self: LossEngine, given: Any, signals: Any, rank: int | None = None) -> Any:
        seen.append(("+".join(signal.name for signal in signals), len(given["answer_loss"])))
        return losses(self, given, signals, rank)

    monkeypatch.setattr(ForwardEngine, "_forward", run)
    monkeypatch.setattr(LossEngine, "compute", lose)
    return seen


def rows_run(ran: list[tuple[str, int]]) -> dict[str, int]:
    """Signals computed together -> rows they were computed of; forgets them."""
    found: dict[str, int] = {}
    for names, n in ran:
        found[names] = found.get(names, 0) + n
    ran.clear()
    return found


# --------------------------------------------------------------------------------- several signals
def test_a_signal_added_to_a_finished_store_is_computed_alone(
    pool20: Dataset, tiny_folder: Path, both: NeuronFeatureExtractor, ran: list[tuple[str, int]], tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    write(folder, pool20, both.with_features(["mona"]))
    assert rows_run(ran) == {"mona": N + SAMPLE}
    before = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    said: list[str] = []
    done = write(folder, pool20, both, say=said.append)
    assert rows_run(ran) == {"hidden": N + SAMPLE}
    assert (done["skipped_shards"], done["healed_shards"], done["missing_shards"]) == (0, 0, 0)
    size = sum(shard(folder, "hidden", number).stat().st_size for number in range(3)) / N
    assert (
        len(said) == 1 and 0 < float(said[0].split()[1].replace(",", "")) < size
    )  # of the new signal, without footers
    done = write(folder, pool20, both.with_features(["answer_loss"]))
    assert rows_run(ran) == {"answer_loss": N + SAMPLE}
    assert done["tokens"] == sum(store.FeatureStore(folder).dataset("tokens")["n_tokens"])
    for path, old in before.items():
        now = path.stat()
        assert (now.st_ino, now.st_mtime_ns) == (old.st_ino, old.st_mtime_ns), path.name
    everything = make_extractor(tiny_folder, features=["mona", "hidden", "answer_loss"])
    assert write(folder, pool20, everything)["skipped_shards"] == 3 and not ran
    write(tmp_path / "at once", pool20, everything)
    assert files(folder).keys() == files(tmp_path / "at once").keys()
    one, other = (
        table(folder, "mona", "hidden", "answer_loss"),
        table(tmp_path / "at once", "mona", "hidden", "answer_loss"),
    )
    assert one.equals(other)


@pytest.fixture(scope="module")
def two_extractions(tmp_path_factory: pytest.TempPathFactory, pool20: Dataset, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "two"
    for k in (6, 3):
        write(folder, pool20, make_extractor(tiny_folder, features=["mona"], top_k_features=k))
    return folder


def test_two_extractions_of_one_signal(
    two_extractions: Path, pool20: Dataset, target: Dataset, tiny_folder: Path
) -> None:
    """Selection reads the one that the target's exemplars were computed with."""
    features = store.FeatureStore(two_extractions)
    six, three, four = (make_extractor(tiny_folder, features=["mona"], top_k_features=k) for k in (6, 3, 4))
    assert len(features.identities["tokens"]) == 1
    assert sorted(features.identities["mona"]) == sorted([six.identity("mona"), three.identity("mona")])
    fitted = {k: NeuronSelector("mona").fit(target, extractor=e) for k, e in (("6", six), ("3", three), ("4", four))}
    scores = {}
    for k in "63":
        stored, direct = (
            np.asarray(fitted[k].select(pool20, k=5, features=given).scores["score"]) for given in (features, None)
        )
        np.testing.assert_allclose(stored, direct, rtol=1e-6)
        scores[k] = stored
    assert not np.allclose(scores["6"], scores["3"])
    with pytest.raises(NeuronSelectError, match=f"its signal mona .*{three.identity('mona')}.*, wanted") as caught:
        fitted["4"].select(pool20, k=5, features=features)
    assert (caught.value.option, caught.value.value) == ("features", "two")
    assert four.identity("mona") in str(caught.value) and "it is added" in str(caught.value)


def test_a_signal_by_name(two_extractions: Path, tiny_folder: Path) -> None:
    features = store.FeatureStore(two_extractions)
    three = make_extractor(tiny_folder, features=["mona"], top_k_features=3).identity("mona")
    assert features.identity_of("mona", three) == three
    assert features.dataset("tokens").column_names == ["n_tokens", "truncated", *BOOKKEEPING]
    with pytest.raises(NeuronSelectError, match="it has the signal mona of 2 extractions: name the model"):
        features.dataset("mona")
    with pytest.raises(NeuronSelectError, match="it has no signal nait, only mona, tokens: run `neuronselect extract`"):
        features.identity_of("nait")


def test_a_signal_that_is_not_there(
    two_extractions: Path, pool20: Dataset, target: Dataset, both: NeuronFeatureExtractor
) -> None:
    hidden = NeuronSelector("hidden").fit(target, extractor=both)
    hidden.extractor = None
    with pytest.raises(NeuronSelectError, match="the store has no signal hidden") as caught:
        hidden.select(pool20, k=5, features=store.FeatureStore(two_extractions))
    assert caught.value.option == "features"


# ----------------------------------------------------------------------------------- a pool that grows
def test_appended_rows_alone_are_computed(
    pool20: Dataset, long_pool: Dataset, both: NeuronFeatureExtractor, ran: list[tuple[str, int]], tmp_path: Path
) -> None:
    """Also in the middle of a shard: rows 16 to 19 of the last one are there."""
    folder = tmp_path / "s"
    first = write(folder, pool20, both)
    old = {path: path.stat().st_ino for path in folder.glob("*/shard-0000[01].parquet")}
    rows_run(ran)
    done = write(folder, long_pool, both, pool_about={"id": "pool", "commit": "content:2"})
    assert rows_run(ran) == {"mona+hidden": 2 * (MORE - N)}, "the new rows, and the sample of them"
    assert (done["rows"], done["skipped_shards"], done["healed_shards"], done["missing_shards"]) == (MORE, 2, 0, 0)
    lengths = store.FeatureStore(folder).dataset("tokens")["n_tokens"]
    assert len(lengths) == MORE and (first["tokens"], done["tokens"]) == (sum(lengths[:N]), sum(lengths[N:]))
    assert all(path.stat().st_ino == inode for path, inode in old.items()) and len(old) == 6
    assert store.FeatureStore(folder).manifest["pool"] == {"id": "pool", "commit": "content:2"}
    assert write(folder, long_pool, both)["skipped_shards"] == 4 and not ran


@pytest.mark.parametrize("sizes", [(N, MORE), (3, 8, 9, 24, MORE), (0, 1, MORE)])
def test_a_grown_store_is_that_of_the_whole_pool(
    sizes: tuple[int, ...], long_pool: Dataset, tiny_folder: Path, tmp_path: Path
) -> None:
    """Byte for byte, where a row's numbers do not depend on the rows that it shares a batch with."""
    alone = make_extractor(tiny_folder, features=["mona", "hidden"], batch_tokens=1)
    for size in sizes:
        write(tmp_path / "s", long_pool.select(range(size)), alone)
    write(tmp_path / "at once", long_pool, alone)
    assert files(tmp_path / "s") == files(tmp_path / "at once")


def test_a_lost_manifest_of_a_grown_store(
    pool20: Dataset, long_pool: Dataset, both: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    write(tmp_path / "s", pool20, both)
    write(tmp_path / "s", long_pool, both)
    before = files(tmp_path / "s")
    (tmp_path / "s" / store.MANIFEST).unlink()
    with pytest.raises(NeuronSelectError, match="the store has 30 rows, the pool 20"):
        write(tmp_path / "s", pool20, both)
    assert write(tmp_path / "s", long_pool, both)["skipped_shards"] == 4 and files(tmp_path / "s") == before


def test_two_processes_that_append_the_same_rows(
    pool20: Dataset, long_pool: Dataset, both: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    """The second one finds the shard finished that it saw half: it adds nothing twice."""
    folder = tmp_path / "s"
    write(folder, pool20, both)
    late = ShardMaker(long_pool, both, folder, STEP)
    todo = late._look(2)
    assert set(todo.missing.values()) == {N}
    write(folder, long_pool, both)
    expected = files(folder)
    late._make(todo, None)
    assert files(folder) == expected


def test_a_run_over_appended_rows_that_stops(
    pool20: Dataset, long_pool: Dataset, both: NeuronFeatureExtractor, tmp_path: Path, monkeypatch: Any
) -> None:
    """Nobody reads the store as one of the longer pool until it is."""
    folder, fsync, calls = tmp_path / "s", os.fsync, []

    def stop(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 5:  # of three shards, one is extended
            raise KeyboardInterrupt
        fsync(handle)

    write(folder, pool20, both)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", stop)
        write(folder, long_pool, both)
    with pytest.raises(
        NeuronSelectError, match="the store has 20 rows, the pool 30: .*run `neuronselect extract` again"
    ):
        NeuronSelector("random", seed=1).select(long_pool, k=3, features=store.FeatureStore(folder))
    with pytest.raises(NeuronSelectError, match="shard-00002.parquet is unfinished: run `neuronselect extract` again"):
        table(folder)
    done = write(folder, long_pool, both)
    assert done["missing_shards"] == 0 and len(table(folder)) == MORE


# ------------------------------------------------------------------------------------- another pool
def changed(pool: Dataset, row: int) -> Dataset:
    found = pool.to_list()
    found[row]["messages"][1]["content"] += "!"
    return Dataset.from_list(found)


def other_pools(long_pool: Dataset) -> Iterator[tuple[Dataset, str]]:
    pool20, elsewhere = long_pool.select(range(N)), "was computed from other rows than rows {} of this pool"
    yield changed(pool20, 0), elsewhere.format("0 to 7")
    yield changed(pool20, N - 1), elsewhere.format("16 to 19")  # one row of the last shard
    yield changed(long_pool, N - 1), elsewhere.format("16 to 19")  # and rows were appended
    yield pool20.shuffle(seed=3), elsewhere.format("0 to 7")
    yield pool20.select([*range(N - 2), N - 1, N - 2]), elsewhere.format("16 to 19")
    yield long_pool.select(range(1, MORE)), elsewhere.format("0 to 7")
    yield pool20.select(range(N - 1)), "the store has 20 rows, the pool 19: they are not the same rows"
    yield rows(N, seed=5), elsewhere.format("0 to 7")


def test_another_pool_is_refused_by_its_rows(
    pool20: Dataset, long_pool: Dataset, target: Dataset, both: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    """Whatever it is called; and the store stays the first pool's."""
    folder = tmp_path / "s"
    write(folder, pool20, both)
    before = files(folder)
    fitted = NeuronSelector("mona").fit(target, extractor=both)
    for other, message in other_pools(long_pool):
        with pytest.raises(NeuronSelectError, match=message) as caught:
            write(folder, other, both, pool_about={"id": "another"})
        assert (caught.value.option, caught.value.value) == ("out", "s")
        assert files(folder) == before, message
        message = message if len(other) == N else f"the store has 20 rows, the pool {len(other)}"
        with pytest.raises(NeuronSelectError, match=message) as caught:
            fitted.select(other, k=3, features=store.FeatureStore(folder))
        assert (caught.value.option, caught.value.value) == ("features", "s")
    assert write(folder, pool20, both)["skipped_shards"] == 3 and files(folder) == before


def test_the_same_rows_of_another_file(
    pool20: Dataset, both: NeuronFeatureExtractor, target: Dataset, tmp_path: Path
) -> None:
    """Columns that are not read, and the format, do not matter."""
    folder = tmp_path / "s"
    write(folder, pool20, both)
    pool20.to_json(tmp_path / "pool.jsonl")
    again = Dataset.from_json(str(tmp_path / "pool.jsonl"), cache_dir=str(tmp_path / "cache"))
    again = again.remove_columns("id").add_column("new", list(range(N)))
    about = {"id": "pool.jsonl", "commit": "content:2"}
    assert write(folder, again, both, pool_about=about)["skipped_shards"] == 3
    assert store.FeatureStore(folder).manifest["pool"] == about
    fitted = NeuronSelector("mona").fit(target, extractor=both)
    one, other = (fitted.select(data, k=3, features=store.FeatureStore(folder)) for data in (pool20, again))
    assert one.indices.tolist() == other.indices.tolist()


# -------------------------------------------------------------------------------------------- costs
def test_a_reused_signal_still_says_what_it_cost(
    pool20: Dataset, long_pool: Dataset, tiny_folder: Path, both: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    folder = tmp_path / "s"

    def costs(*names: str, of: NeuronFeatureExtractor = both) -> list[tuple[str, int, int]]:
        """(signals, rows, tokens) of each pass; ``tokens`` is always read along, and is no pass of its own."""
        cost = store.FeatureStore(folder).cost({name: of.identity(name) for name in ("tokens", *names)})
        assert all(one.reused and one.total_seconds > 0 for one in cost.passes.values())
        keys = [sorted(key.rpartition("-")[0] for key in one.signals) for one in cost.passes.values()]
        return [("+".join(k), one.rows, one.tokens) for k, one in zip(keys, cost.passes.values(), strict=True)]

    tokens = write(folder, pool20, both)["tokens"]
    (run,) = store.FeatureStore(folder).cost(both.identities).passes
    assert shards.host_name() not in run and shards.host_name() not in next((folder / store.COSTS).iterdir()).name
    first = ("hidden+mona", N, tokens)
    assert costs("mona") == costs("hidden") == costs("mona", "hidden") == [first]  # one pass: never counted twice
    assert write(folder, pool20, both)["skipped_shards"] == 3
    assert costs("mona", "hidden") == [first]  # a run that computed nothing cost nothing
    write(folder, pool20, both.with_features(["nait"]))
    second = ("nait", N, tokens)
    assert (costs("mona"), costs("nait"), costs("mona", "nait")) == ([first], [second], [first, second])
    more = write(folder, long_pool, both)["tokens"]
    third = ("hidden+mona", MORE - N, more)
    assert costs("mona") == [first, third] and costs("nait") == [second]
    # Another extraction's cost is its own.
    three = make_extractor(tiny_folder, features=["mona"], top_k_features=3)
    write(folder, long_pool, three)
    assert costs("mona", of=three) == [("mona", MORE, tokens + more)] and costs("mona") == [first, third]
    # Signals that a shard lacks from different rows on are computed, and counted, apart.
    shard(folder, "hidden", 2).unlink()
    write(folder, long_pool, both.with_features(["hidden", "nait"]))
    lengths = store.FeatureStore(folder).dataset("tokens")["n_tokens"]
    assert costs("nait") == [second, ("nait", MORE - N, more)]
    assert costs("hidden") == [first, third, ("hidden", STEP, sum(lengths[2 * STEP : 3 * STEP]))]
    # A cost file that cannot be read is left out; the signals do not depend on it.
    min((folder / store.COSTS).iterdir()).write_bytes(b"{")
    with pytest.warns(NeuronSelectWarning, match="what a pass cost is left out"):
        assert costs("mona") == [third] and costs("nait") == [second, ("nait", MORE - N, more)]
    shutil.rmtree(folder / store.COSTS)
    assert costs("hidden") == [] and len(table(folder, "hidden")) == MORE
