"""Progress: lines in a log, one bar on a terminal, nothing unless it is asked for or where it is switched off."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from tiny import rows
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelector, show_progress
from hf_neuronselect.core import progress
from hf_neuronselect.core.progress import SWITCHES, advance, aside, live_table, read, track, untracked
from hf_neuronselect.store.store import write_store
from hf_neuronselect.training.callback import StepCallback


class Clock:
    """Time that passes by itself, a second a look, or when it is told to."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the switches of the suite, and silent again afterwards."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(datasets, "are_progress_bars_disabled", lambda: False)
    yield
    show_progress(False)


def test_a_log_has_a_line_at_the_start_every_15_seconds_and_at_the_end() -> None:
    log, clock = io.StringIO(), Clock()
    show_progress(file=log, clock=clock)
    with track("mona", 2000) as found:
        for _ in range(2):
            read(1000, 40_000)
            for _ in range(10):
                clock.now += 4
                advance(4000)
            found.done(1000)
    assert log.getvalue().splitlines() == [
        "mona: 2,000 rows",
        "mona: 20 %, 16.0 k of about 80.0 k tokens, 1,000 tokens/s, 64 s left",
        "mona: 40 %, 32.0 k of about 80.0 k tokens, 1,000 tokens/s, 48 s left",
        "mona: 60 %, 48.0 k of 80.0 k tokens, 1,000 tokens/s, 32 s left",
        "mona: 80 %, 64.0 k of 80.0 k tokens, 1,000 tokens/s, 16 s left",
        "mona: 2,000 rows, 80.0 k tokens in 80 s, 1,000 tokens/s",
    ]


def test_rows_are_counted_where_no_tokens_run_and_where_the_end_is_not_known() -> None:
    log, clock = io.StringIO(), Clock()
    show_progress(file=log, clock=clock)
    with track("longest", 90) as found:
        for _ in range(3):
            clock.now += 10
            found.done(30)
    with track("stream", None) as found:
        for _ in range(2):
            read(100, 5000)
            clock.now += 20
            advance(5000)
            found.done(100)
    assert log.getvalue().splitlines() == [
        "longest: 90 rows",
        "longest: 67 %, 60 of 90 rows, 3 rows/s, 10 s left",
        "longest: 90 rows in 30 s",
        "stream: started",
        "stream: 0 rows, 5,000 tokens, 250 tokens/s",
        "stream: 100 rows, 10.0 k tokens, 250 tokens/s",
        "stream: 200 rows, 10.0 k tokens in 40 s, 250 tokens/s",
    ]


def test_a_short_pass_leaves_no_line_and_a_failed_one_no_last_line() -> None:
    log, clock = io.StringIO(), Clock()
    show_progress(file=log, clock=clock)
    with track("exemplars of t", 9, brief=True) as found:
        clock.now += 14
        found.done(9)
    assert log.getvalue() == ""
    with pytest.raises(ZeroDivisionError), track("mona", 5):
        raise ZeroDivisionError
    assert log.getvalue() == "mona: 5 rows\n"
    advance(7)  # of no pass any more


def test_a_terminal_has_one_bar_that_moves_from_the_first_batch_on() -> None:
    screen, clock = Screen(), Clock()
    show_progress(file=screen, clock=clock)
    with track("mona", 10) as found:
        read(10, 1000)
        for _ in range(4):
            clock.now += 1
            advance(250)
        with aside():
            screen.write("a remark\n")
        found.done(10)
    frames = [frame.strip() for frame in screen.getvalue().split("\r") if frame.strip()]
    shares = [int(share) for frame in frames for share in re.findall(r"mona: +(\d+)%\|", frame)]
    assert shares == sorted(shares) and set(shares) == {25, 50, 75, 100}
    assert "250 of 1,000 tokens, 250 tokens/s, 3 s left" in frames[1]
    assert "a remark" in frames  # on a line of its own
    assert frames[-1].endswith("10 rows, 1,000 tokens in 4 s, 250 tokens/s")


def test_a_real_terminal_shows_the_bar() -> None:
    """A pseudo-terminal, which tells no width: tqdm alone would draw a bar of no width."""
    pty = pytest.importorskip("pty")
    code = (
        "from hf_neuronselect.core.progress import *; show_progress()\n"
        "with track('mona', 2) as p: read(2, 30); advance(30); p.done(2)"
    )
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, env=env)
    os.close(theirs)
    assert b"mona: 100%" in os.read(ours, 10_000)
    os.close(ours)


@pytest.mark.parametrize("switch", [*SWITCHES, "datasets"])
def test_the_libraries_switches_are_honoured(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if switch == "datasets":
        monkeypatch.setattr(datasets, "are_progress_bars_disabled", lambda: True)
    else:
        monkeypatch.setenv(switch, "true")
    log = io.StringIO()
    show_progress(file=log)
    with track("mona", 5) as found:
        found.done(5)
    assert log.getvalue() == ""


def test_what_runs_untracked_is_neither_shown_nor_counted() -> None:
    log = io.StringIO()
    show_progress(file=log, clock=Clock())
    with track("mona", 5) as found:
        with untracked(), track("inner", 3) as inner:
            advance(9)
            inner.done(3)
        advance(2)
    assert found.tokens == 2 and "inner" not in log.getvalue()


# ------------------------------------------------------------------------------- in what users call
def test_a_training_counts_the_steps_that_are_left() -> None:
    log, clock = io.StringIO(), Clock()
    show_progress(file=log, clock=clock)
    state, control = TrainerState(max_steps=60, global_step=20), TrainerControl()
    with track("train", None, unit="steps") as found:
        watching = StepCallback(found)
        watching.on_train_begin(TrainingArguments("unused"), state, control)
        for _ in range(8):
            clock.now += 2
            watching.on_step_end(TrainingArguments("unused"), state, control)
    assert log.getvalue().splitlines()[1] == "train: 20 %, 8 of 40 steps, 0.5 steps/s, 64 s left"


def test_a_selection_tells_every_batch_and_python_users_see_nothing(
    extractor: NeuronFeatureExtractor, pool: Dataset, target: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    selector = NeuronSelector("mona").fit(target, extractor=extractor)
    selector.select(pool, k=5)
    assert capsys.readouterr() == ("", "")
    log = io.StringIO()
    show_progress(file=log, clock=Clock(step=20.0))
    selector.select(pool, k=5)
    lines = log.getvalue().splitlines()
    assert lines[0] == "mona: 60 rows" and lines[-1].startswith("mona: 60 rows, ")
    assert any(re.match(r"mona: \d+ %, [\d,]+ of [\d,]+ tokens, [\d.]+ tokens/s, .* left", line) for line in lines)
    capsys.readouterr()
    log.seek(log.truncate(0))
    pool.select(range(6)).map(extractor, batched=True).filter(selector.above(0.0), batched=True)
    assert log.getvalue() == ""  # datasets shows how far its own passes are


@pytest.mark.parametrize("workers", [None, 2])
def test_a_store_counts_each_token_once(
    workers: int | None, extractor: NeuronFeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By batches in this process, by shards in others."""
    log, pool = io.StringIO(), rows(24)
    show_progress(file=log, clock=Clock())
    if workers:  # what they would send
        monkeypatch.setattr("hf_neuronselect.store.store.run_workers", lambda maker, mine, n: _elsewhere(maker, mine))
    done = write_store(pool, extractor, tmp_path / "s", pool_about={}, shard_rows=6, num_workers=workers)
    assert log.getvalue().splitlines() == [
        "signals: 24 rows",
        f"signals: 24 rows, {done['tokens']:,} tokens in 0 s",
    ]


def _elsewhere(maker, mine):  # type: ignore[no-untyped-def]
    with untracked():
        events = list(maker.work(mine))
    yield from events


def test_the_command_shows_it_and_the_switch_silences_it(
    pool: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_neuronselect.cli import main as cli

    pool.to_json(tmp_path / "pool.jsonl")
    for name in SWITCHES:
        monkeypatch.setenv(name, "0")  # the command sets those that are not set
    stopped = partial(progress.show_progress, clock=lambda: 0.0)  # how long it takes here is not asked
    monkeypatch.setattr("hf_neuronselect.cli.run_app.show_progress", stopped)

    def run(out: str) -> str:
        capsys.readouterr()
        words = ["select", "--pool", str(tmp_path / "pool.jsonl"), "--method", "longest", "--k", "3"]
        monkeypatch.setattr(sys, "argv", ["neuronselect", *words, "--out", str(tmp_path / out)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return capsys.readouterr().err

    assert re.search(r"^longest: 60 rows\nlongest: 60 rows in 0 s$", run("shown"), re.MULTILINE)
    assert progress._asked is None
    monkeypatch.setenv(SWITCHES[0], "1")
    assert "longest: 60 rows" not in run("silent")


# ------------------------------------------------------------------------------------------ live tables
def on_screen(text: str) -> list[str]:
    """What a terminal shows: moves of the cursor are made, and what they overwrite is gone."""
    lines = [""]
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|\n|\r|[^\x1b\n\r]+", text):
        if part == "\n":
            lines.append("")
        elif part == "\r":
            lines[-1] = ""
        elif part.startswith("\x1b") and part.endswith("F"):
            lines = [*lines[: len(lines) - 1 - int(part[2:-1])], ""]
        elif not part.startswith("\x1b"):
            lines[-1] += part
    return lines


def test_a_table_is_drawn_again_in_its_place_below_what_is_printed() -> None:
    screen = Screen()
    show_progress(file=screen)
    with live_table() as table:
        assert table is not None
        table.show(["head", "----", "a"], 2)
        table.show(["head", "----", "a 1"], 2)
        assert on_screen(screen.getvalue()) == ["head", "----", "a 1", ""]
        with aside():
            screen.write("a warning\n")
        with track("mona", 100):  # a bar that was below is gone
            advance(1)
        table.show(["head", "----", "a 1", "b 2"], 3)
        assert [one.strip() for one in on_screen(screen.getvalue())] == [
            "a warning", "head", "----", "a 1", "b 2", "",
        ]  # fmt: skip
    assert [one.strip() for one in on_screen(screen.getvalue())] == ["a warning", ""]


def test_of_a_long_table_the_lines_around_the_last_one_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_terminal", lambda file: os.terminal_size((8, 10)))
    screen = Screen()
    show_progress(file=screen)
    rest = [f"{i} is a long line" for i in range(30)]
    with live_table() as table:
        assert table is not None
        for near, first in ((2, 0), (2 + 15, 13), (2 + 29, 25)):
            table.show(["head", "----", *rest], near)
            shown = [line[:7] for line in rest[first : first + 5]]
            assert on_screen(screen.getvalue()) == ["head", "----", *shown, "... 25 ", ""]


def test_a_log_and_silence_have_no_table() -> None:
    show_progress(file=io.StringIO())
    with live_table() as table:
        assert table is None
    show_progress(False)
    with live_table() as table:
        assert table is None
