"""Gradients of single rows: against autograd one row at a time, Adam by hand, and a dense projection."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, MOE, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_neuronselect.models.gradients import row_gradients
from hf_neuronselect.models.lora import LoraModel, LoraShape
from hf_neuronselect.models.sketch import CountSketch
from hf_neuronselect.models.warm_up import WarmUp
from hf_neuronselect.rows.encode import Sample
from hf_neuronselect.signals.gradient import adam_steps

SHAPE = LoraShape(rank=3, alpha=6, dropout=0.1, seed=1)


def samples(lengths: list[tuple[int, int]], seed: int = 0) -> list[Sample]:
    """Rows of so many tokens, of which the last ones are answers."""
    draw = np.random.default_rng(seed)
    found = []
    for length, answers in lengths:
        pooled = np.zeros(length, dtype=bool)
        pooled[length - answers :] = True
        found.append(Sample(draw.integers(3, 100, length), pooled, {}, length, ""))
    return found


def moved(lora: LoraModel, seed: int = 3) -> LoraModel:
    """Factors that are not zero, so that both have a gradient."""
    draw = torch.Generator().manual_seed(seed)
    lora.set({n: 0.2 * torch.randn(w.shape, generator=draw) for n, w in lora.factors.items()})
    return lora


def by_autograd(lora: LoraModel, sample: Sample) -> tuple[float, dict[str, np.ndarray]]:
    """One row's loss and gradients, written out: float64, no hooks, no padding."""
    weights = lora.factors
    for weight in weights.values():
        weight.requires_grad_(True)
    ids = torch.from_numpy(sample.input_ids)[None]
    logits = lora.model(input_ids=ids, use_cache=False).logits[0]
    at = np.flatnonzero(sample.pooled)
    loss = -torch.log_softmax(logits[at - 1].double(), dim=-1)[range(len(at)), ids[0, at]].mean()
    slopes = torch.autograd.grad(loss, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return float(loss.detach()), {n: s.flatten().numpy().copy() for n, s in zip(weights, slopes, strict=True)}


def batched(lora: LoraModel, rows: list[Sample]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    found: dict[str, np.ndarray] = {}
    losses = row_gradients(lora, rows, lambda name, values: found.__setitem__(name, values.numpy().copy()))
    return losses.numpy(), found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_has_the_gradient_that_autograd_finds_for_it_alone(family: str) -> None:
    single = family in MOE  # their kernel has no float64
    lora = moved(LoraModel(tiny_model(family) if single else tiny_model(family).double(), SHAPE))
    rows, close = samples([(9, 3), (4, 2), (12, 11), (7, 1)]), 1e-3 if single else 1e-5
    losses, found = batched(lora, rows)
    assert set(found) == set(lora.factors)
    for i, row in enumerate(rows):
        loss, slopes = by_autograd(lora, row)
        assert losses[i] == pytest.approx(loss, rel=1e-5)
        for name, slope in slopes.items():
            np.testing.assert_allclose(found[name][i], slope, rtol=close, atol=close * np.abs(slope).max())


def test_untouched_factors_leave_the_model_as_it_is() -> None:
    plain = tiny_model("llama")
    ids = torch.arange(3, 12)[None]
    before = plain(input_ids=ids).logits
    lora = LoraModel(plain, SHAPE)
    moved(lora).set(None)
    assert torch.equal(lora.model(input_ids=ids).logits, before)
    _, found = batched(lora, samples([(9, 3)]))
    assert all(not values.any() for name, values in found.items() if "lora_A" in name), "the other factor is zero"
    assert all(values.any() for name, values in found.items() if "lora_B" in name)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(5)), cut=st.integers(1, 4))
def test_neighbours_and_padding_change_nothing(order: list[int], cut: int) -> None:
    lora = moved(LoraModel(tiny_model("llama").double(), SHAPE))
    rows = samples([(9, 3), (4, 2), (12, 11), (7, 1), (5, 4)])
    _, whole = batched(lora, rows)
    parts = [batched(lora, [rows[i] for i in own])[1] for own in (order[:cut], order[cut:])]
    for name, values in whole.items():
        apart = np.concatenate([part[name] for part in parts])
        np.testing.assert_allclose(apart, values[order], rtol=1e-5, atol=1e-7 * np.abs(values).max())


def test_a_sketch_is_a_sparse_sign_matrix_and_keeps_inner_products() -> None:
    sketch, draw = CountSketch(64, seed=5), np.random.default_rng(0)
    sizes = {"a": 10_000, "b": 3}
    matrix = {}
    for name, size in sizes.items():
        columns = torch.zeros(size, 64)
        sketch.add(columns, name, torch.eye(size))
        matrix[name] = columns.numpy()
        assert (np.abs(matrix[name]).sum(axis=1) == 1).all(), "one bucket and a sign"
    x = {name: draw.normal(size=(4, size)).astype(np.float32) for name, size in sizes.items()}
    total = torch.zeros(4, 64)
    for name, values in x.items():
        sketch.add(total, name, torch.from_numpy(values))
    dense = sum(x[name].astype(np.float64) @ matrix[name] for name in sizes)
    np.testing.assert_allclose(total.numpy(), dense, rtol=1e-4, atol=1e-3)
    again = torch.zeros(4, 64)
    other = CountSketch(64, seed=5)  # the same buckets, in another order of names
    for name in reversed(sizes):
        other.add(again, name, torch.from_numpy(x[name]))
    np.testing.assert_allclose(again.numpy(), total.numpy(), rtol=1e-4, atol=1e-4)
    assert not np.allclose(sketched(CountSketch(64, seed=6), x["a"]), sketched(sketch, x["a"]))


def sketched(sketch: CountSketch, values: np.ndarray) -> np.ndarray:
    total = torch.zeros(len(values), sketch.dim)
    sketch.add(total, "a", torch.from_numpy(values))
    return total.numpy()


def test_inner_products_of_sketches_are_right_on_average() -> None:
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(2, 500)).astype(np.float32)
    y = (y + 0.5 * x).astype(np.float32)
    products = []
    for seed in range(400):
        one, two = sketched(CountSketch(32, seed), np.stack([x, y]))
        products.append(float(one @ two))
    spread = np.std(products) / np.sqrt(len(products))
    assert abs(np.mean(products) - float(x @ y)) < 4 * spread
    assert np.var(products) < 2 * float(x @ x) * float(y @ y) / 32 * 1.3


def test_adam_by_hand() -> None:
    draw = np.random.default_rng(2)
    slopes = draw.normal(size=(3, 20_000)) * 1e-3
    first, second = draw.normal(size=20_000) * 1e-4, draw.random(20_000) * 1e-7
    second[:5] = 0.0
    slopes[:, :5] = 0.0
    by_hand = (0.9 * first + 0.1 * slopes) / np.sqrt(0.999 * second + 0.001 * slopes**2 + 1e-8)
    found = adam_steps(*(torch.from_numpy(one).float() for one in (slopes, first, second)))
    np.testing.assert_allclose(found.numpy(), by_hand, rtol=2e-4, atol=1e-7)


def test_learning_rates_are_those_of_a_linear_schedule() -> None:
    how = WarmUp(epochs=4, batch=32, ramp=0.03)
    rates = how.rates(1000)
    assert rates.shape == (4, 32)
    ours = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([ours], lr=how.rate)
    from transformers import get_linear_schedule_with_warmup

    schedule = get_linear_schedule_with_warmup(optimizer, int(np.ceil(0.03 * 128)), 128)
    theirs = []
    for _ in range(128):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates.ravel(), theirs, rtol=1e-12)
