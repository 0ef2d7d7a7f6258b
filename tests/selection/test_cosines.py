"""Cosines between targets: the formula by hand, a library on disk, and targets that cannot be compared."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from tiny import make_extractor, rows

from hf_neuronselect import FeatureLibrary, NeuronSelectError, NeuronSelector
from hf_neuronselect.core.provenance import SourceRecord
from hf_neuronselect.selection.cosines import cosines, cosines_of

TARGETS = {"a": rows(6, seed=1), "b": rows(5, seed=2), "c": rows(4, seed=3)}


def slow(one: np.ndarray, other: np.ndarray) -> float:
    dot = sum(float(x) * float(y) for x, y in zip_longest(one, other, fillvalue=0))
    return dot / (sum(float(x) ** 2 for x in one) * sum(float(y) ** 2 for y in other)) ** 0.5


def test_each_block_and_the_mean(tiny_folder: Path) -> None:
    selector = NeuronSelector("nait").fit(TARGETS, extractor=make_extractor(tiny_folder))
    found = cosines(selector)
    kept = [target["directions"] for target in selector.targets.values()]
    assert found.names == ("a", "b", "c") and found.by_layer.shape == (len(kept[0]), 3, 3)
    for block in range(len(kept[0])):
        expected = [[slow(one[block], other[block]) for other in kept] for one in kept]
        np.testing.assert_allclose(found.by_layer[block], expected, atol=1e-12)
    np.testing.assert_allclose(found.matrix, found.by_layer.mean(axis=0))
    np.testing.assert_allclose(np.diag(found.matrix), 1)
    others = [[np.mean([found.by_layer[b, i, k] for k in range(3) if k != i]) for b in range(len(kept[0]))] for i in range(3)]  # fmt: skip
    np.testing.assert_allclose(found.to_others, others)


@pytest.mark.parametrize("method", ["mona", "hidden", "polysemantic"])
def test_methods_with_one_vector(method: str, tiny_folder: Path) -> None:
    selector = NeuronSelector(method).fit(TARGETS, extractor=make_extractor(tiny_folder))
    found = cosines(selector)
    a, b = (selector.targets[name]["prototype"] for name in "ab")
    assert found.by_layer.shape == (1, 3, 3) and found.matrix[0, 1] == pytest.approx(slow(a, b))


def test_a_library_gives_the_same_after_it_was_saved(tiny_folder: Path, tmp_path: Path) -> None:
    extractor = make_extractor(tiny_folder)
    one = NeuronSelector("nait").fit({"a": TARGETS["a"]}, extractor=extractor)
    two = NeuronSelector("nait").fit({"b": TARGETS["b"], "c": TARGETS["c"]}, extractor=extractor)
    FeatureLibrary({"first": one, "second": two}).save_pretrained(tmp_path / "lib")
    found = FeatureLibrary.from_pretrained(tmp_path / "lib").cosines()
    assert found.names == ("first", "second:b", "second:c")
    every = cosines(NeuronSelector("nait").fit(TARGETS, extractor=extractor))
    np.testing.assert_allclose(found.by_layer, every.by_layer, atol=1e-6)


def test_zeros_and_widths() -> None:
    found = cosines_of({"a": np.asarray([[1.0, 0, 0]]), "b": np.asarray([[2.0, 0]]), "zero": np.zeros((1, 3))})
    assert found.matrix.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    with pytest.raises(NeuronSelectError, match="directions of 1 and 2 blocks; fit them with one model"):
        cosines_of({"a": np.ones((1, 3)), "b": np.ones((2, 3))})


def test_what_cannot_be_compared_is_refused(tiny_folder: Path) -> None:
    extractor = make_extractor(tiny_folder)
    a = NeuronSelector("nait").fit({"a": TARGETS["a"]}, extractor=extractor)
    with pytest.raises(NeuronSelectError, match="target='a': cosines need at least two targets"):
        cosines(a)
    with pytest.raises(NeuronSelectError, match="target='none': cosines need at least two targets"):
        cosines({})
    hidden = NeuronSelector("hidden").fit({"b": TARGETS["b"]}, extractor=extractor)
    with pytest.raises(NeuronSelectError, match="one was fitted by nait and two by hidden"):
        cosines({"one": a, "two": hidden})
    terms = NeuronSelector("bm25").fit({"a": TARGETS["a"], "b": TARGETS["b"]})
    with pytest.raises(NeuronSelectError, match="method='bm25': keeps no vector of a target"):
        cosines(terms)
    turns = NeuronSelector("hidden", picker="round-robin").fit(TARGETS, extractor=extractor)
    with pytest.raises(NeuronSelectError, match="picker='round-robin.*': keeps every exemplar by itself"):
        cosines(turns)
    b = NeuronSelector("nait").fit({"b": TARGETS["b"]}, extractor=extractor)
    b.extraction = type(b.extraction)(model=SourceRecord(id="me/other", commit="1" * 40), signals=b.extraction.signals)
    with pytest.raises(
        NeuronSelectError, match=r"one has directions in .* and two in me/other.*: fit both with one model"
    ):
        cosines({"one": a, "two": b})
    cut = NeuronSelector("nait").fit({"b": TARGETS["b"]}, extractor=make_extractor(tiny_folder, max_length=9))
    with pytest.raises(NeuronSelectError, match="the signal nait of one is .* and that of two .*"):
        cosines({"one": a, "two": cut})
