"""The change of exemplars' losses by steps on probes: kept line by line, and not measured again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import tiny_model
from tiny import chat, rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError
from hf_neuronselect.models.loading import causal_lm_of
from hf_neuronselect.models.probe import Prober
from hf_neuronselect.rows.encode import Sample
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.rows.load import conversations_of
from hf_neuronselect.signals.probe import ProbeEngine, ProbeLosses, Probes


@pytest.fixture
def model(tiny_folder: Path) -> str:
    return str(tiny_folder / "model")


@pytest.fixture
def probes(tmp_path: Path) -> Probes:
    pool = conversations_of(rows(9, seed=4))
    return Probes(pool[:5], pool[5:], 1e-3, tmp_path / "kept")


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sample, int]]:
    """The rows that steps were taken on, with how many rows were measured."""
    found = []
    usual = Prober.losses_after

    def noted(self: Prober, sample: Sample) -> np.ndarray:
        found.append((sample, len(self.reference)))
        return usual(self, sample)

    monkeypatch.setattr(Prober, "losses_after", noted)
    return found


def changes(model: str, probes: Probes, data: Dataset, **options: Any) -> np.ndarray:
    """``[rows, probes]``."""
    signal = ProbeLosses(probes)
    made = NeuronFeatureExtractor.from_pretrained(model, features=[signal], **options)(data[:])
    assert set(made["neuron_skip"]) == {""}
    return np.stack(made[signal.name])


def test_changes_are_those_of_single_steps(model: str, probes: Probes) -> None:
    data = rows(4, seed=1)
    extractor = NeuronFeatureExtractor.from_pretrained(model, features=[ProbeLosses(probes)])
    engine = ProbeEngine(extractor.extraction)
    samples, filling = engine.read(probes.rows, ()), engine.read(probes.filling, ())
    lm, wanted = causal_lm_of(extractor.extraction.spec, torch.device("cpu")), []
    for row in engine.read(conversations_of(data), ()):
        prober = Prober(lm, learning_rate=1e-3, batch_tokens=1)
        prober.fill(filling)
        prober.reference = [row]
        wanted.append([(prober.losses_after(sample) - prober.losses())[0] for sample in samples])
    found = changes(model, probes, data)
    assert found.dtype == np.float32 and found.shape == (4, 5) and np.abs(found).min() > 1e-6
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(changes(model, replace(probes, folder=None), data, batch_tokens=1), wanted, rtol=1e-3,
                               atol=1e-6)  # fmt: skip
    empty = changes(model, replace(probes, filling=()), data)
    assert np.abs(empty - found).max() > 1e-3


def test_what_was_measured_is_not_measured_again(model: str, probes: Probes, stepped: list[tuple[Sample, int]]) -> None:
    data = rows(4, seed=1)
    found = changes(model, probes, data)
    assert [count for _, count in stepped] == [4] * 5
    np.testing.assert_array_equal(changes(model, probes, data.select([2, 0, 2])), found[[2, 0, 2]])
    np.testing.assert_array_equal(changes(model, replace(probes, rows=probes.rows[:2]), data), found[:, :2])
    assert len(stepped) == 5
    more = replace(probes, rows=conversations_of(rows(7, seed=4))[::-1])  # two new ones
    assert changes(model, more, data).shape == (4, 7) and len(stepped) == 7
    changes(model, probes, rows(5, seed=1))  # a new row
    assert [count for _, count in stepped[7:]] == [1] * 5
    others = [
        (model, replace(probes, learning_rate=1e-2), {}),
        (model, replace(probes, filling=()), {}),
        (model, probes, {"max_length": 400}),
        (model, probes, {"dtype": "bfloat16"}),
    ]
    for name, other, options in others:
        before = len(stepped)
        changes(name, other, data, **options)
        assert len(stepped) == before + 5, options


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_run_that_was_killed_between_probes_goes_on(
    cut: int, model: str, probes: Probes, stepped: list[tuple[Sample, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows(4, seed=1)
    whole = changes(model, replace(probes, folder=None), data)
    stepped.clear()
    usual = Prober.losses_after

    def killed(self: Prober, sample: Sample) -> np.ndarray:
        if len(stepped) == 3:
            raise KeyboardInterrupt
        return usual(self, sample)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Prober, "losses_after", killed)
        changes(model, probes, data)
    (file,) = probes.folder.iterdir()  # type: ignore[union-attr]
    content = file.read_bytes()
    lines = [json.loads(line) for line in content.splitlines() if line]
    assert [line["probe"] for line in lines] == ["before", *probes.keys[:3]]
    if cut:  # in the middle of a line
        file.write_bytes(content[:-cut])
    stepped.clear()
    np.testing.assert_array_equal(changes(model, probes, data), whole)
    assert len(stepped) == (3 if cut > 1 else 2)
    stepped.clear()
    np.testing.assert_array_equal(changes(model, probes, data), whole)
    assert not stepped


def test_a_probe_without_an_answer_has_no_change(model: str, probes: Probes) -> None:
    odd = Conversation(messages=chat("a", "b")[:1])
    found = changes(model, replace(probes, rows=[*probes.rows[:2], odd]), rows(3, seed=1))
    assert np.isnan(found[:, 2]).all() and np.isfinite(found[:, :2]).all()


def test_a_row_that_cannot_be_measured_says_why(model: str, probes: Probes) -> None:
    data = Dataset.from_list([{"messages": chat("a", "b")[:1]}, {"messages": chat("a", "b")}, {"messages": []}])
    signal = ProbeLosses(probes)
    made = NeuronFeatureExtractor.from_pretrained(model, features=[signal])(data[:])
    assert made["neuron_skip"] == ["error: no assistant turn with an answer", "", "empty"]
    assert [len(one) for one in made[signal.name]] == [0, 5, 0]


def test_a_loss_that_is_not_finite_is_a_reason(probes: Probes, tiny_folder: Path, tmp_path: Path) -> None:
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    broken.save_pretrained(tmp_path / "model")
    for file in (tiny_folder / "model").glob("*token*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    signal = ProbeLosses(probes)
    made = NeuronFeatureExtractor.from_pretrained(str(tmp_path / "model"), features=[signal])(rows(2)[:])
    assert made["neuron_skip"] == ["error: the loss is not finite; try dtype float32"] * 2


def test_the_name_tells_what_the_numbers_depend_on(probes: Probes) -> None:
    others = [
        replace(probes, rows=probes.rows[:4]),
        replace(probes, rows=probes.rows[::-1]),
        replace(probes, filling=()),
        replace(probes, learning_rate=1e-4),
    ]
    names = [ProbeLosses(one).name for one in (probes, *others)]
    assert len(set(names)) == 5 and ProbeLosses(replace(probes, folder=None)).name == names[0]


def test_packed_weights_are_refused(model: str, probes: Probes) -> None:
    with pytest.raises(
        NeuronSelectError, match="quantize='4bit': a step cannot be taken on packed weights: leave it out"
    ):
        NeuronFeatureExtractor.from_pretrained(model, features=[ProbeLosses(probes)], quantize="4bit")


def test_rows_read_in_any_order_give_the_same(model: str, probes: Probes) -> None:
    data: Sequence[int] = [3, 1, 0, 2]
    one = changes(model, replace(probes, folder=None), rows(4, seed=1))
    other = changes(model, replace(probes, folder=None), rows(4, seed=1).select(data))
    np.testing.assert_allclose(one[data], other, rtol=1e-4, atol=1e-6)
