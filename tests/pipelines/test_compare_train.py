"""Training on every method's picks: the arms, their losses, and what is said of them."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tiny import chat, rows

from hf_neuronselect import NeuronSelectError, NeuronSelector
from hf_neuronselect.core.configs import CompareConfig
from hf_neuronselect.core.intervals import RESAMPLES
from hf_neuronselect.models.loss import answer_losses
from hf_neuronselect.pipelines import compare_train
from hf_neuronselect.pipelines.accuracy import kind_of
from hf_neuronselect.pipelines.compare import compare
from hf_neuronselect.pipelines.comparison import Comparison, Line
from hf_neuronselect.pipelines.trained import (
    RowLosses,
    Trained,
    Transfer,
    ends_of,
    own_gains,
    resampled_changes,
    transfer_matrix,
)
from hf_neuronselect.rows.load import conversations_of
from hf_neuronselect.training.config import TrainConfig
from hf_neuronselect.training.evaluation import evaluate_models
from hf_neuronselect.training.models import base_source
from hf_neuronselect.training.sft import train_adapter

TRAIN = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01}


def held_out() -> Dataset:
    """Five rows; the answers of two can be checked."""
    found = rows(5, seed=2).to_list()
    for row, answer in zip(found, ("7", "(B)"), strict=False):
        row["messages"] = chat(row["messages"][0]["content"], answer)
    return Dataset.from_list(found)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compare")
    rows(40).to_json(folder / "pool.jsonl")
    rows(6, seed=1).to_json(folder / "a.jsonl")
    held_out().to_json(folder / "held.jsonl")
    return {
        "pool": str(folder / "pool.jsonl"), "target": (f"a={folder / 'a.jsonl'}",), "model": str(tiny_folder / "model"),
        "sae": str(tiny_folder / "sae"), "k": 6, "methods": "mona,hidden", "held_out": (f"a={folder / 'held.jsonl'}",),
        "train": TRAIN,
    }  # fmt: skip


def test_every_methods_picks_are_trained_on_beside_the_controls(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompareConfig(**options, out=tmp_path / "out", train_seeds=2)
    said: list[str] = []
    found = compare(config, say=said.append)
    arms = ["mona", "hidden", "random", "longest", "matched-random (mona)", "lowest (mona)"]
    assert [(one.arm, one.seed, one.rows) for one in found.trained] == [(arm, s, 6) for s in (0, 1) for arm in arms]
    # one arm by hand
    pool, held = rows(40), held_out()
    talks = conversations_of(pool.select(found.selections["hidden", "a"].indices))
    settings = TrainConfig.from_section({**TRAIN, "seed": 1, "model": options["model"]})
    train_adapter(talks, tmp_path / "adapter", settings)
    losses = {row.model: row.value for row in evaluate_models(
        base_source(options["model"]), {"run": tmp_path / "adapter"}, {"a": held}, trained=[talks])}  # fmt: skip
    (made,) = (one for one in found.trained if (one.arm, one.seed) == ("hidden", 1))
    assert made.loss == pytest.approx(losses["run"], rel=1e-4) != made.untouched == pytest.approx(losses["base"])
    # the lowest rows are those that mona scores least
    scores = NeuronSelector("mona").fit({"a": rows(6, seed=1)}, extractor=found.extractor).select(pool, k=6).scores
    lowest = np.argsort(scores.column("score").to_numpy(), kind="stable")[:6]
    job = dict(compare_train._arms(found, config, "a", 0))
    assert sorted(job["lowest (mona)"].tolist()) == sorted(lowest.tolist())
    assert set(job["random"].tolist()) != set(dict(compare_train._arms(found, config, "a", 1))["random"].tolist())
    text = "\n".join(said)
    assert "(untouched model)" in text and "matched-random (mona)" in text
    table = list(csv.DictReader((tmp_path / "out" / "training.csv").open()))
    assert [float(line["loss"]) for line in table] == [one.loss for one in found.trained]
    checked = sum(kind_of(row["messages"][-1]["content"]) is not None for row in held)
    assert checked == 2 and {one.checked for one in found.trained} == {checked}
    assert all(0 <= one.accuracy <= 1 and one.accuracy_untouched is not None for one in found.trained)
    assert [line["accuracy"] for line in table] == [str(one.accuracy) for one in found.trained]
    arrow = pq.read_table(tmp_path / "out" / "training.parquet").to_pylist()
    assert [one["accuracy_untouched"] for one in arrow] == [one.accuracy_untouched for one in found.trained]
    for shown in (text, *((tmp_path / "out" / f"compare.{kind}").read_text() for kind in ("md", "html"))):
        assert "accuracy" in shown and "checked" in shown
    assert "After training on the picks" in (tmp_path / "out" / "compare.html").read_text()
    assert not (tmp_path / "out" / "trained" / "adapter").exists()
    # again: nothing is trained; with another key, everything
    monkeypatch.setattr(compare_train, "train_adapter", lambda *a, **b: pytest.fail("trained again"))
    assert compare(config).trained == found.trained
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        compare(CompareConfig(**options | {"train": TRAIN | {"max_steps": 3}}, out=tmp_path / "out"))


def test_picks_are_trained_on_as_they_were_read(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns that the user named, here of questions and answers in columns of other names."""
    for name, seed, count in (("pool", 0, 30), ("a", 1, 6)):
        turns = [row["messages"] for row in rows(count, seed=seed)]
        named = [{"q": said[0]["content"], "a": said[-1]["content"]} for said in turns]
        Dataset.from_list(named).to_json(tmp_path / f"{name}.jsonl")
    given = options | {
        "pool": str(tmp_path / "pool.jsonl"),
        "target": (f"a={tmp_path / 'a.jsonl'}",),
        "methods": "hidden",
    }
    trained: list[Any] = []

    def stop(talks: Any, *_: Any) -> None:
        trained.extend(talks)
        raise NeuronSelectError("enough")

    monkeypatch.setattr(compare_train, "train_adapter", stop)
    with pytest.raises(NeuronSelectError, match="enough"):
        compare(CompareConfig(**given, columns={"prompt": "q", "completion": "a"}, out=tmp_path / "out"))
    assert len(trained) == 6 and [turn["role"] for turn in trained[0].messages] == ["user", "assistant"]


def test_held_out_rows_are_read_by_the_names_that_were_given(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed, count in (("pool", 0, 30), ("a", 1, 6), ("held", 2, 5)):
        turns = [row["messages"] for row in rows(count, seed=seed)]
        named = [{"q": said[0]["content"], "a": said[-1]["content"], "question": "other words"} for said in turns]
        Dataset.from_list(named).to_json(tmp_path / f"{name}.jsonl")
    given = options | {
        "pool": str(tmp_path / "pool.jsonl"), "target": (f"a={tmp_path / 'a.jsonl'}",), "methods": "hidden",
        "held_out": (f"a={tmp_path / 'held.jsonl'}",),
    }  # fmt: skip
    columns = {"prompt": "q", "completion": "a"}
    held = compare_train.check_training(CompareConfig(**given, columns=columns, out=tmp_path / "o"), {"a": None})["a"]
    assert [talk.messages for talk in conversations_of(held)] == [
        [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]
        for row in Dataset.from_json(str(tmp_path / "held.jsonl"))
    ]
    rows(5, seed=2).to_json(tmp_path / "held.jsonl")  # of another format, with other columns
    held = compare_train.check_training(CompareConfig(**given, columns=columns, out=tmp_path / "o"), {"a": None})["a"]
    assert held["messages"] == rows(5, seed=2)["messages"]
    Dataset.from_list([{"x": "1"}]).to_json(tmp_path / "held.jsonl")
    with pytest.raises(NeuronSelectError, match="the held-out data has x"):
        compare(CompareConfig(**given, columns=columns, out=tmp_path / "o"))


def test_a_control_that_cannot_be_drawn_is_left_out(options: dict[str, Any], tmp_path: Path) -> None:
    """Of most of the pool no other rows are left to draw as many; the other arms are trained all the same."""
    said: list[str] = []
    found = compare(CompareConfig(**options | {"methods": "hidden", "k": 22}, out=tmp_path / "out"), note=said.append)
    assert [one.arm for one in found.trained] == ["hidden", "random", "longest", "lowest (hidden)"]
    assert (tmp_path / "out" / "training.csv").is_file()
    assert sum("matched-random (hidden) is not trained on for a: 22 picks leave" in text for text in said) == 1


def test_a_target_that_no_method_ran_for_is_not_trained_for(options: dict[str, Any], tmp_path: Path) -> None:
    rows(1, seed=3).to_json(tmp_path / "one.jsonl")
    one = str(tmp_path / "one.jsonl")
    given = options | {
        "methods": "nait",
        "target": (*options["target"], f"one={one}"),
        "held_out": (f"one={options['held_out'][0][2:]}",),
    }
    said: list[str] = []
    found = compare(CompareConfig(**given, out=tmp_path / "out"), note=said.append)
    assert not found.trained and "no method ran for one: nothing is trained for it" in said


def test_each_model_is_measured_at_every_target(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("b", 3), ("c", 4)):
        rows(6, seed=seed).to_json(tmp_path / f"{name}.jsonl")
    rows(4, seed=5).to_json(tmp_path / "held_b.jsonl")
    two = options | {
        "target": (*options["target"], *(f"{name}={tmp_path / name}.jsonl" for name in "bc")),
        "held_out": (*options["held_out"], f"b={tmp_path / 'held_b.jsonl'}"), "methods": "mona", "transfer": True,
    }  # fmt: skip
    notes: list[str] = []
    read: list[tuple[str, ...]] = []

    def losses_of(model: Any, tokenizer: Any, talks: Any, **more: Any) -> Any:
        read.append((type(model).__name__, *(one.exact() for one in talks)))
        return answer_losses(model, tokenizer, talks, **more)

    monkeypatch.setattr("hf_neuronselect.training.evaluation.answer_losses", losses_of)
    config = CompareConfig(**two, out=tmp_path / "out", train_seeds=2)
    found = compare(config, note=notes.append)
    monkeypatch.undo()
    untouched = [one for one in read if not one[0].startswith("Peft")]
    assert len(untouched) == len(set(untouched)) and len(read) - len(untouched) == 5 * 2 * 2 * 2, "once for all arms"
    assert any(
        note.startswith("--transfer: after each training the loss on all 9 held-out rows of 2 targets")
        for note in notes
    )
    arms = ["mona", "random", "longest", "matched-random (mona)", "lowest (mona)"]
    keys = [(one.arm, one.picked_for, one.target, one.seed) for one in found.transfers]
    assert sorted(keys) == sorted((arm, a, b, s) for arm in arms for a in "ab" for b in "ab" for s in (0, 1))
    own = {(one.arm, one.target, one.seed): (one.loss, one.untouched) for one in found.trained}
    for one in found.transfers:
        if one.picked_for == one.target:
            assert (one.loss, one.untouched) == own[one.arm, one.target, one.seed]
    # picks for a, measured at b, by hand
    talks = conversations_of(rows(40).select(found.selections["mona", "a"].indices))
    train_adapter(
        talks, tmp_path / "adapter", TrainConfig.from_section({**TRAIN, "seed": 1, "model": options["model"]})
    )
    losses = {row.model: row.value for row in evaluate_models(
        base_source(options["model"]), {"run": tmp_path / "adapter"}, {"b": rows(4, seed=5)}, trained=[talks])}  # fmt: skip
    (made,) = (
        one for one in found.transfers if (one.arm, one.picked_for, one.target, one.seed) == ("mona", "a", "b", 1)
    )
    assert made.loss == pytest.approx(losses["run"], rel=1e-4) != made.untouched == pytest.approx(losses["base"])
    table = list(csv.DictReader((tmp_path / "out" / "transfer.csv").open()))
    assert [float(line["loss"]) for line in table] == [one.loss for one in found.transfers]
    names, changes = transfer_matrix(found.transfers, "mona")
    both = [
        one.loss - one.untouched
        for one in found.transfers
        if (one.arm, one.picked_for, one.target) == ("mona", "a", "b")
    ]
    assert names == ["a", "b"] and changes[0, 1] == pytest.approx(np.mean(both)) and len(both) == 2
    for one in found.transfers:
        run = found.by_row[one.arm, one.picked_for, one.target, one.seed]
        assert len(run.tokens) == 5 - (one.target == "b") and run.tokens.min() > 0
        assert run.change == pytest.approx(one.loss - one.untouched, abs=1e-5) and one.low <= run.change <= one.high
    page = (tmp_path / "out" / "compare.html").read_text()
    assert f"<title>for a, b: {changes[0, 1]:.3f}</title>" in page and 'id="transfer"' in page
    # again nothing is trained
    monkeypatch.setattr(compare_train, "train_adapter", lambda *a, **b: pytest.fail("trained again"))
    assert compare(config).transfers == found.transfers


def test_a_pair_that_was_not_measured_is_no_number() -> None:
    names, changes = transfer_matrix(
        [Transfer("x", "a", "b", 0, 1.0, 2.0, -1, -1), Transfer("y", "b", "b", 0, 3.0, 2.0, 1, 1)], "x"
    )
    assert names == ["a", "b"] and changes[0, 1] == -1 and np.isnan(changes[[0, 1, 1], [0, 0, 1]]).all()


def constant(change: float, rows: int = 3) -> RowLosses:
    """Rows of two answer tokens, of which each costs so much more."""
    return RowLosses(np.full(rows, 4.0), np.full(rows, 4.0 + 2 * change), np.full(rows, 2))


def drawn(change: float, rows: int, seed: int, noise: float = 0.5) -> RowLosses:
    """Rows whose change of loss a token is spread around a mean."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 9, rows)
    before = rng.random(rows) * tokens
    return RowLosses(before, before + tokens * (change + noise * rng.standard_normal(rows)), tokens)


def test_an_interval_is_that_of_a_plain_bootstrap() -> None:
    runs = [drawn(-0.3, 40, 0), drawn(-0.2, 40, 1)]
    rng, slow = np.random.default_rng(5), []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, 40, 40)
        seeds = [runs[i] for i in rng.integers(0, 2, 2)]
        changes = [sum(run.after[rows] - run.before[rows]) / sum(run.tokens[rows]) for run in seeds]
        slow.append(sum(changes) / 2)
    fast = resampled_changes(runs)
    assert fast.shape == (RESAMPLES,) and fast.std() == pytest.approx(np.std(slow), rel=0.1)
    assert ends_of(fast) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.1 * np.std(slow) * 4)
    assert fast.mean() == pytest.approx(np.mean([run.change for run in runs]), abs=0.02)
    # a single row, and runs on different numbers of rows
    assert ends_of(resampled_changes([constant(-1.0, rows=1)])) == (-1, -1)
    assert ends_of(resampled_changes([constant(-1.0, 2), constant(-1.0, 5)])) == (-1, -1)


def test_arms_are_compared_on_the_same_draws_of_rows() -> None:
    one = drawn(-0.3, 30, 0)
    other = RowLosses(one.before, one.after - 0.1 * one.tokens, one.tokens)
    low, high = ends_of(resampled_changes([other]) - resampled_changes([one]))
    assert (low, high) == pytest.approx((-0.1, -0.1))
    assert np.subtract(*ends_of(resampled_changes([one]))) < -0.2, "each alone is far less sure"


def test_what_picks_do_for_their_own_target_is_told_from_what_they_do_for_all() -> None:
    changes = {("a", "a"): -0.5, ("a", "b"): -0.1, ("b", "a"): -0.2, ("b", "b"): -0.4}  # -0.5 + 0.2, -0.4 + 0.1
    by_row = {("x", *pair, seed): constant(change) for pair, change in changes.items() for seed in (0, 1)}
    by_row["y", "a", "b", 0] = constant(9.0)
    gains = own_gains(by_row, "x")
    assert gains == {"a": pytest.approx((-0.3, -0.3, -0.3)), "b": pytest.approx((-0.3, -0.3, -0.3))}
    assert own_gains(by_row, "y") == {}, "not measured at its own target"
    # rows of a target are the same for both picks: what both share does not widen the interval
    shared = drawn(-0.3, 30, 0)
    less = RowLosses(shared.before, shared.after - 0.2 * shared.tokens, shared.tokens)
    by_row = {("x", a, b, 0): less if a == b else shared for a in "abc" for b in "ab"}
    assert own_gains(by_row, "x")["b"] == pytest.approx((-0.2, -0.2, -0.2))


@pytest.mark.parametrize(
    ("own", "random", "said"),
    [
        (drawn(-0.1, 20, 1), constant(0.2), r"whether training on mona helped a is not sure: -0.\d+ \(-0.\d+ to \+0.\d+\)"),
        (drawn(-1.0, 20, 1), drawn(-0.9, 20, 2), r"helped a more than random rows is not sure: -0.\d+ \(-0.\d+ to \+0.\d+\)"),
        (drawn(-1.0, 20, 1), drawn(-0.1, 20, 2), ""),
    ],
)  # fmt: skip
def test_a_gain_that_is_not_sure_is_said(own: RowLosses, random: RowLosses, said: str) -> None:
    found = Comparison(None, None)  # type: ignore[arg-type]
    found.lines = [Line("mona", "a", rows=5, seconds=0.0)]
    for arm, run in (("mona", own), ("random", random)):
        found.by_row[arm, "a", "a", 0] = run
        found.trained.append(Trained(arm, "a", 0, 5, 2 + run.change, 2.0, 0.0, 0.0, 0.5, 1.0))
    warned = [one for one in found.warnings(["a"]) if "on mona" in one]
    assert len(warned) == bool(said)
    assert all(re.search(f"{said}; more held-out rows would tell$", one) for one in warned)


def test_losses_are_said_in_words() -> None:
    def one(arm: str, *losses: float) -> list[Trained]:
        for i, loss in enumerate(losses):
            found.by_row[arm, "a", "a", i] = constant(loss - 2.0)
        return [Trained(arm, "a", i, 5, loss, 2.0, loss - 2, loss - 2, 0.5, 1.0) for i, loss in enumerate(losses)]

    found = Comparison(None, None)  # type: ignore[arg-type]
    found.lines = [Line("mona", "a", rows=5, seconds=0.0)]
    found.trained = [
        *one("mona", 1.0, 1.2),
        *one("random", 1.5, 1.7),
        *one("hidden", 1.65, 1.75),
        *one("longest", 2.5, 2.1),
    ]
    assert found.warnings(["a"]) == [
        "training on hidden helped a no more than random rows: 1.700 against 1.600",
        "training on longest made a worse than the untouched model: 2.300 against 2.000",
    ]
    cells = found.of_training("a")
    assert [line[0] for line in cells] == ["(untouched model)", "mona", "random", "hidden", "longest"]
    # rows are alike, so what remains are the seeds: both the one, both the other, or one of each
    assert cells[1] == ("mona", "a", "5", "1.100", "1.000–1.200", "-0.900", "-1.000 to -0.800", "", "", "0.50")
    assert found.of_training("b") == []


def test_accuracy_is_shown_or_why_it_is_not() -> None:
    def one(arm: str, seed: int, accuracy: float | None, why: str = "", target: str = "a") -> Trained:
        found.by_row[arm, target, target, seed] = constant(-1.0)
        more = (accuracy, None if why else 0.25, 0 if why else 8, why)
        return Trained(arm, target, seed, 5, 1.0, 2.0, -1.0, -1.0, 0.5, 1.0, *more)

    found = Comparison(None, None)  # type: ignore[arg-type]
    found.lines = [Line("mona", name, rows=5, seconds=0.0) for name in "ab"]
    found.trained = [one("mona", 0, 0.5), one("mona", 1, 0.75), one("mona", 0, None, "no answer is short", "b")]
    assert [line[7:9] for line in found.of_training("a")] == [("0.250", "8"), ("0.625", "8")]
    assert [line[7:9] for line in found.of_training("b")] == [("", ""), ("", "")]
    assert found.warnings(["a", "b"]) == ["b has no accuracy: no answer is short"]
    assert "b has no accuracy: no answer is short" in found.table()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": ()}, "train='max_steps': is for training on the picks: add --held-out NAME=ROWS"),
        ({"held_out": ("b=x.jsonl",)}, "held_out='b': is no target; targets: a"),
        ({"transfer": True}, "transfer='a': needs held-out rows of at least two targets: add --held-out NAME=ROWS"),
        (
            {"transfer": True, "held_out": (), "train": {}},
            "transfer='none': needs held-out rows of at least two targets",
        ),
        ({"train": {"max_stepz": 3}}, "unknown key of section train; did you mean max_steps"),
        ({"held_out": ("a=nowhere.jsonl",)}, "nowhere.jsonl"),
    ],
)
def test_bad_input_is_refused_before_a_selection(
    change: dict[str, Any], message: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_neuronselect.pipelines.compare.compare_in", lambda *a, **b: pytest.fail("compared"))
    with pytest.raises(NeuronSelectError, match=message):
        compare(CompareConfig(**options | change, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
