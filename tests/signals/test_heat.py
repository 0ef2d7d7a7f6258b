"""What tokens add to a row's signals: the same numbers as the row's, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import chat, make_extractor

from hf_neuronselect import NeuronSelectError
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.signals import heat

ROW = Conversation(messages=chat("add two numbers, 7 + 5 is", "the list is blue def add why 7 + 5 print"))
READINGS: list[dict[str, Any]] = [
    {}, {"pool_tokens": "assistant"}, {"max_length": 9}, {"max_length": 9, "truncation_side": "left"},
    {"top_k_features": 3}, {"chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}"},
]  # fmt: skip


@pytest.mark.parametrize("options", READINGS, ids=str)
@pytest.mark.parametrize("signal", ["mona", "polysemantic"])
def test_the_mean_over_tokens_is_the_rows_value(
    signal: str, options: dict[str, Any], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heat, "STEP", 4)
    extractor = make_extractor(tiny_folder, features=[signal], **options)
    row = extractor.extract([ROW])
    units, values = row[f"{signal}_indices"][0].tolist(), row[f"{signal}_values"][0]
    absent = next(i for i in range(96) if i not in units) if signal == "mona" else None
    asked = [*units[::-1], *([absent] if absent is not None else [])]
    found = heat.unit_values(extractor, ROW, signal, asked)
    np.testing.assert_allclose(found.values.mean(axis=0)[: len(units)], values[::-1], rtol=1e-5, atol=1e-7)
    if absent is not None:
        assert not found.values[:, -1].any()
    sample = extractor.forward.read([ROW], ())[0]
    np.testing.assert_array_equal(found.input_ids, sample.input_ids)
    np.testing.assert_array_equal(found.places, np.flatnonzero(sample.pooled))


@pytest.mark.parametrize("drift", ["endpoints", "mean", "per_token"])
@pytest.mark.parametrize(
    "signal", ["nait", "nait_answer", "nait_template", "nait_last", "nait_mean", "content_mean", "answer_mean"]
)
@pytest.mark.parametrize("site", ["residual", "mlp"])
def test_moves_add_up_to_the_projection(signal: str, drift: str, site: str, tiny_folder: Path) -> None:
    extractor = make_extractor(tiny_folder, features=[signal], drift=drift, site=site)
    vectors = np.asarray(extractor.extract([ROW])[signal][0], np.float64)
    draw = np.random.default_rng(0)
    weights, offset = draw.normal(size=vectors.shape), draw.normal(size=vectors.shape)
    found = heat.moved_values(extractor, ROW, signal, weights)
    assert found.values.sum() == pytest.approx((vectors * weights).sum(), rel=1e-4, abs=1e-6)
    if "mean" in signal:
        found = heat.moved_values(extractor, ROW, signal, weights, offset)
        assert found.values.sum() == pytest.approx(((vectors - offset) * weights).sum(), rel=1e-4, abs=1e-6)


def test_rows_of_one_token_and_of_none(tiny_folder: Path) -> None:
    extractor = make_extractor(tiny_folder, max_length=1)
    found = heat.unit_values(extractor, ROW, "mona", [0, 1])
    assert found.values.shape == (1, 2) and len(found.input_ids) == 1
    weights = np.ones((4, 32))
    assert heat.moved_values(extractor, ROW, "nait_template", weights).values.tolist() == [[0.0]]
    with pytest.raises(NeuronSelectError, match=r"no tokens \(empty\)"):
        heat.unit_values(extractor, Conversation(skip="empty"), "mona", [0])
    with pytest.raises(NeuronSelectError, match="no content token"):
        heat.moved_values(extractor, ROW, "nait", weights)
