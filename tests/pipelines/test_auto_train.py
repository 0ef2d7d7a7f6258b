"""Ratio auto by short trainings: which ratios are trained how long, whose loss decides, and what is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import concatenate_datasets
from tiny import rows

from hf_neuronselect import NeuronSelectError, Selection
from hf_neuronselect.core.configs import SelectConfig
from hf_neuronselect.core.provenance import AutoRatio, Budget
from hf_neuronselect.pipelines import auto_train
from hf_neuronselect.pipelines.recipe import control_config
from hf_neuronselect.pipelines.select import select
from hf_neuronselect.rows.load import conversations_of, load_rows
from hf_neuronselect.training.config import TrainConfig
from hf_neuronselect.training.evaluation import evaluate_models
from hf_neuronselect.training.models import base_source
from hf_neuronselect.training.sft import train_adapter

pytestmark = pytest.mark.filterwarnings("ignore::hf_neuronselect.NeuronSelectWarning")
TRAIN = {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("auto")
    pool, held = rows(200), rows(5, seed=2)
    concatenate_datasets([pool, held.select([0])]).to_json(folder / "pool.jsonl")
    rows(6, seed=1).to_json(folder / "t.jsonl")
    held.to_json(folder / "held.jsonl")
    held.select([0]).to_json(folder / "known.jsonl")
    return {
        "pool": str(folder / "pool.jsonl"), "target": (f"t={folder / 't.jsonl'}",), "model": str(tiny_folder / "model"),
        "sae": str(tiny_folder / "sae"), "ratio": "auto", "held_out": str(folder / "held.jsonl"), "train": TRAIN,
    }  # fmt: skip


@pytest.mark.parametrize("best", [0.1, 0.5, 1.0])
def test_the_best_third_goes_on_and_the_smallest_loss_is_taken(
    best: float, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def loss(self: Any, given: list[Any], steps: int) -> float:
        asked.append((len(given), steps))
        return abs(len(given) - best * 201) / steps

    monkeypatch.setattr(auto_train._Trial, "loss", loss)
    said: list[str] = []
    config = SelectConfig(**options, out=tmp_path / "out")
    selection = select(config, say=said.append)
    made = selection.provenance
    assert made.auto is not None and made.auto.ratio == best and made.budget == Budget(ratio=best)
    tried = [round(run.share, 4) for run in made.auto.runs if run.steps == 2]
    assert set(tried) >= {0.1, 0.2, 0.5, 1.0} and tried == sorted(tried)  # 2 % and 5 % are fewer than 20 rows
    assert len(tried) in (4, 5)  # and the ratio that scores alone name
    assert len([run for run in made.auto.runs if run.steps == 8]) == 2
    assert asked == [(run.rows, run.steps) for run in made.auto.runs]
    nested = [selection.rethreshold(ratio=share).indices.tolist() for share in tried]
    assert all(set(one) < set(other) for one, other in zip(nested, nested[1:], strict=False))
    assert f"ratio {made.auto.line}" in said and made.auto.line.startswith(
        f"{best:g}, by the held-out loss of short trainings ("
    )
    assert Selection.from_pretrained(tmp_path / "out").provenance.auto == made.auto
    assert made.auto.settings == {**TRAIN, "seed": 0}
    selector = selection.selector
    assert selector is not None
    alone = selector.select(load_rows(config.pool).data, ratio=best)
    assert selection.indices.tolist() == alone.indices.tolist()


def test_equal_losses_go_to_the_smaller_share(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_train._Trial, "loss", lambda self, given, steps: 1.0)
    auto = select(SelectConfig(**options, out=tmp_path / "out")).provenance.auto
    assert auto is not None and auto.ratio == min(run.share for run in auto.runs)


def test_a_loss_is_that_of_a_training_by_hand(options: dict[str, Any], tmp_path: Path) -> None:
    """On held-out rows without the one that the pool holds."""
    selection = select(SelectConfig(**options, out=tmp_path / "out"))
    auto = selection.provenance.auto
    assert auto is not None
    run = auto.runs[-1]
    picked = selection.rethreshold(ratio=run.share)
    settings = TrainConfig.from_section({**TRAIN, "max_steps": run.steps, "seed": 0, "model": options["model"]})
    talks = conversations_of(picked.dataset, picked.row_format)
    assert len(talks) == run.rows
    train_adapter(talks, tmp_path / "adapter", settings)
    held = rows(5, seed=2).select(range(1, 5))
    found = evaluate_models(base_source(options["model"]), {"run": tmp_path / "adapter"}, {"t": held})
    assert run.loss == pytest.approx(next(row.value for row in found if row.model == "run"), rel=1e-4)
    assert auto.ratio == min((one for one in auto.runs if one.steps == 8), key=lambda one: (one.loss, one.share)).share


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.1}, "held_out=.*: chooses a ratio by training: add --ratio auto, or remove it"),
        ({"held_out": None}, "train='max_steps': is for trainings that choose the ratio: add --held-out ROWS"),
        (
            {"train": {"max_steps": 0}},
            "train=0: max_steps of at least 1 is needed: all ratios are trained equally long",
        ),
        ({"train": {"steps": 3}}, "config='steps': unknown key of section train"),
        ({"held_out": "nowhere.jsonl"}, "held_out='nowhere.jsonl': "),
        ({"held_out": "{folder}/known.jsonl"}, "the pool holds every row; give other held-out rows"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    changes: dict[str, Any], message: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(options["pool"]).parent
    changes = {
        name: value.replace("{folder}", str(folder)) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    with pytest.raises(NeuronSelectError, match=message):
        select(SelectConfig(**options | changes, out=tmp_path / "out"))


def test_a_capability_does_not_name_the_model_that_is_trained(options: dict[str, Any], tmp_path: Path) -> None:
    fitted = select(SelectConfig(**options | {"ratio": 0.1, "held_out": None, "train": {}}, out=tmp_path / "one"))
    assert fitted.selector is not None
    fitted.selector.save_pretrained(tmp_path / "capability")
    given = {**options, "target": (f"capability:{tmp_path / 'capability'}",), "model": None, "sae": None}
    with pytest.raises(NeuronSelectError, match="held_out=.*: name the model that is trained: --model"):
        select(SelectConfig(**given, out=tmp_path / "two"))


def test_a_control_keeps_as_many_rows_and_trains_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    control = control_config(SelectConfig(**options, out=tmp_path), "random", tmp_path / "random", 7)
    assert (control.k, control.ratio, control.held_out, control.train) == (7, None, None, {})


def test_the_line_of_trainings_names_the_last_ones() -> None:
    runs = tuple(auto_train.ShortRun(share=share, rows=1, steps=steps, loss=2 + share)
                 for share, steps in [(0.1, 1), (0.2, 1), (0.5, 1), (0.1, 4), (0.2, 4)])  # fmt: skip
    line = AutoRatio(ratio=0.1, estimates={"knee": 0.3}, runs=runs).line
    assert line == "0.1, by the held-out loss of short trainings (2.100 at 0.1, 2.200 at 0.2); scores alone: knee 0.3"
