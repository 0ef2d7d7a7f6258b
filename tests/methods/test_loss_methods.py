"""Methods by losses and by models that rate rows, against slow float64 references."""

from __future__ import annotations

import math

import numpy as np
import pytest
from datasets import Dataset, Split
from datasets.splits import SplitDict, SplitInfo
from tiny import chat

from hf_neuronselect import NeuronSelector
from hf_neuronselect.methods import make_method
from hf_neuronselect.signals.columns import RowBatch


def losses(given: list[float], alone: list[float]) -> RowBatch:
    columns = {"answer_loss": np.asarray(given, np.float32), "answer_alone_loss": np.asarray(alone, np.float32)}
    return RowBatch(np.arange(len(given)), np.ones(len(given), bool), columns)


# -------------------------------------------------------------------------------------------- ifd
def test_superfiltering_ranks_by_another_ratio() -> None:
    given, alone = [0.5, 3.0, 2.0, 1.0, 800.0], [1.0, 4.0, 1.5, 1.0, 1.0]
    rows = losses(given, alone)
    loss, ppl = (make_method("ifd", {"ratio": ratio}).score(rows, {}) for ratio in ("loss", "ppl"))
    for i, (a, b) in enumerate(zip(given, alone, strict=True)):
        assert loss[i] == pytest.approx(a / b) if a <= b else math.isnan(loss[i])
        assert ppl[i] == pytest.approx(math.exp(a) / math.exp(b)) if a <= b else math.isnan(ppl[i])
    assert loss[0] < loss[1] and ppl[0] > ppl[1]


@pytest.mark.parametrize("stream", [False, True])
def test_the_share_of_ifd_is_of_the_rows_that_are_left(stream: bool) -> None:
    """100 rows, 60 of them dropped: 5 % of the other 40, best first; an explicit share is of all."""
    ratios = [1.5] * 60 + [0.01 * i for i in range(1, 41)]
    pool = Dataset.from_dict(
        {
            "messages": [chat(f"q{i}", f"a{i}") for i in range(100)],
            "answer_loss": ratios,
            "answer_alone_loss": [1.0] * 100,
            "neuron_skip": [""] * 100,
            "neuron_signals": ["answer_alone_loss=x,answer_loss=x"] * 100,
        }
    )
    given = pool
    if stream:
        given = pool.to_iterable_dataset()
        given.info.splits = SplitDict({"train": SplitInfo("train", num_examples=100)})
        given._split = Split.TRAIN
    found = NeuronSelector("ifd").select(given)
    assert found.indices.tolist() == [99, 98]
    assert found.provenance.budget.given() == {"k": 2}
    assert len(NeuronSelector("ifd").select(given, ratio=0.05)) == 5
