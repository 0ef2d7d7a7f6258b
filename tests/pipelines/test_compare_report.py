"""What a comparison's page says: who is first and whether that is settled, controls, costs, and the command."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hf_neuronselect.core.configs import CompareConfig
from hf_neuronselect.explain.shared_picks import SharedPicks
from hf_neuronselect.pipelines import compare_report
from hf_neuronselect.pipelines.compare_report import page_of
from hf_neuronselect.pipelines.comparison import Comparison, Line
from hf_neuronselect.selection.cosines import Cosines

CONTROLS = ("random", "longest")


def found(*precisions: tuple[str, float, float], samples: bool = True, **more: object) -> Comparison:
    """Methods with their precision on two targets."""
    made = Comparison(None, None, **more)  # type: ignore[arg-type]
    made.pool = range(90)  # type: ignore[assignment]
    for name, *values in precisions:
        for target, value in zip("ab", values, strict=True):
            line = Line(name, target, 5, value, value - 0.05, value + 0.05, base_rate=0.1, seconds=1.5, fit_seconds=0.5)
            made.add(line, ["a", "b"])
            method = SimpleNamespace(grades=name not in CONTROLS)
            made.jobs[name, target] = SimpleNamespace(chosen=SimpleNamespace(method=method))  # type: ignore[assignment]
            if samples:
                made.samples[name, target] = np.asarray([value - 0.05, value + 0.05])
    return made


def text(made: Comparison) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(style|script).*?</\1>", "", page_of(made, {}, [], {})))).split())  # fmt: skip


def test_the_first_screen_names_the_first_and_says_whether_it_is_settled() -> None:
    made = found(("mona", 0.8, 0.9), ("random", 0.1, 0.1), pass_seconds=0.01)
    made.add(Line("gist", "a", reason="no gradients"), ["a", "b"])
    settled = text(made)
    assert "the pass was done before" in settled
    assert "mona is first of 2 methods on 2 targets" in settled and "5–95 %: 1.0 to 1.0" in settled
    assert "not settled" not in settled and "is a control" not in settled
    assert "its mean precision 0.85 random 0.10, the pool 0.10" in settled
    close = text(found(("mona", 0.8, 0.3), ("nait", 0.3, 0.8), ("random", 0.1, 0.1)))
    assert "The interval of nait reaches into its own: the order between them is not settled." in close


def test_a_control_in_the_first_place_is_a_warning() -> None:
    made = found(("mona", 0.2, 0.2), ("longest", 0.7, 0.7))
    assert "longest is a control: no method beats it here" in text(made)
    assert 'class="doubts"' in page_of(made, {}, [], {})


def test_without_right_sources_or_methods() -> None:
    made = Comparison(None, None)  # type: ignore[arg-type]
    made.pool = range(3)  # type: ignore[assignment]
    assert "0 methods on 0 targets" in text(made)
    made.add(Line("mona", "a", 5, seconds=1.0), ["a"])
    assert "1 method on 1 target Nothing says which picks are right" in text(made)
    made.add(Line("gist", "a", reason="no <b>gradient</b>"), ["a"])
    said = text(made)
    assert "Did not run" in said and "no <b>gradient</b>" in said and "<b>gradient" not in page_of(made, {}, [], {})


def test_intervals_of_means_are_of_draws_within_targets() -> None:
    made = found(("mona", 0.8, 0.6))
    (point,) = compare_report._mean_points(made)
    assert point.value == pytest.approx(0.7) and point.marks == (0.8, 0.6)
    assert (point.low, point.high) == pytest.approx((0.65, 0.75))  # a quarter of the means are at either end
    (alone,) = compare_report._mean_points(found(("mona", 0.8, 0.6), samples=False))
    assert alone.low is None
    made.lines[0] = replace(made.lines[0], precision=None, reason="no")
    assert compare_report._mean_points(made)[0].marks == ()


def test_the_command_names_files_without_their_folders(tmp_path: Path) -> None:
    config = CompareConfig(
        pool=str(tmp_path / "my pool.jsonl"), target=(f"a={tmp_path}/a.jsonl", "b=me/rows@main:c:test", "c=bundled:x"),
        methods=f"mona,matched-random(selection={tmp_path}/one/two),dsir", out=tmp_path / "out", examples=False, draws=3,
        train={"learning_rate": 0.1, "model": f"{tmp_path}/base"}, held_out=(f"a={tmp_path}/h.jsonl",), columns={"messages": "m"}, model="org/model",
        sae="../saes/one",
    )  # fmt: skip
    command = compare_report._command(config)
    assert str(tmp_path) not in command and "saes" not in command
    for part in ("--pool 'my pool.jsonl'", "--target a=a.jsonl", "b=me/rows@main:c:test", "c=bundled:x", "--out out",
                 "matched-random(selection=two)", "--no-examples", "--draws 3", "--model org/model", "--sae one", "model=base"):  # fmt: skip
        assert part in command, (part, command)


def test_costs_are_sums_over_targets() -> None:
    said = text(found(("mona", 0.8, 0.9), ("random", 0.1, 0.1)))
    assert "method seconds fitting mona 3.00 1.00 random 3.00 1.00" in said


def test_directions_of_targets_are_shown_over_blocks() -> None:
    by_layer = np.asarray([[[1.0, 0.5], [0.5, 1.0]], [[1.0, -0.25], [-0.25, 1.0]]])
    picks = {"mona": SharedPicks.of({"a": np.arange(3), "b": np.arange(2, 5)}, 90)}
    html = page_of(found(("mona", 0.8, 0.9)), picks, [], {"mona": Cosines(("a", "b"), by_layer)})
    assert "<title>a, b: 0.125</title>" in html and "Mean over 2 blocks." in html
    assert "most alike in block 0, least in block 1" in html
    assert "<title>a, 0: 0.500</title>" in html and "<title>b, 1: -0.250</title>" in html
