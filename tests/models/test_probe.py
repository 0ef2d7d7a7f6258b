"""One training step on a row, and the loss of others after it: against torch's AdamW in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCAB, tiny_model

from hf_neuronselect.models.probe import BETAS, CLIP, EPS, WEIGHT_DECAY, Prober
from hf_neuronselect.rows.encode import Sample


def sample(seed: int, length: int, scale: int = VOCAB) -> Sample:
    draw = np.random.default_rng(seed)
    answer = draw.random(length) < 0.6
    answer[0], answer[-1] = False, True
    return Sample(draw.integers(6, scale, length), answer, {}, length)


def loss(model: Any, row: Sample) -> torch.Tensor:
    """Mean loss of the answer's tokens, one at a time."""
    logits = model(torch.tensor(row.input_ids)[None]).logits[0]
    return torch.stack(
        [-torch.log_softmax(logits[i - 1], dim=-1)[row.input_ids[i]] for i in np.flatnonzero(row.pooled)]
    ).mean()


def gradients(model: Any, row: Sample) -> list[torch.Tensor | None]:
    model.zero_grad()
    loss(model, row).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    return [None if weight.grad is None else weight.grad.clone() for weight in model.parameters()]


def after_a_step(model: Any, row: Sample, others: list[Sample], rate: float, filling: list[Sample]) -> list[float]:
    """Losses of the others after a step of torch's AdamW in float64, whose state was set by hand."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    of_filling = [gradients(model, one) for one in filling]
    of_row = gradients(model, row)
    for place, weight in enumerate(model.parameters()):
        weight.grad = of_row[place]
        if filling and weight.grad is not None:
            parts = [torch.zeros_like(weight) if one[place] is None else one[place] for one in of_filling]
            optimizer.state[weight] = {
                "step": torch.tensor(1e9),  # so late that no correction for the start is left
                "exp_avg": torch.stack(parts).mean(dim=0),
                "exp_avg_sq": (torch.stack(parts) ** 2).mean(dim=0),
            }
    optimizer.step()
    with torch.no_grad():
        return [loss(model, one).item() for one in others]


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize(("family", "rate"), [("llama", 1e-3), ("gpt2", 1e-2), ("gpt_neox", 1e-3), ("gemma2", 1e-3)])
def test_a_probe_is_one_step_of_adamw(family: str, rate: float, filled: bool) -> None:
    model = tiny_model(family)
    others, filling = [sample(i, 5 + 4 * i) for i in range(3)], [sample(10 + i, 7 + i) for i in range(4)]
    prober = Prober(model, learning_rate=rate, batch_tokens=64)
    prober.reference = others
    before = prober.losses()
    np.testing.assert_allclose(before, [loss(copy.deepcopy(model).double(), one).item() for one in others], rtol=1e-5)
    if filled:
        prober.fill(filling)
    for seed, length in ((20, 9), (21, 30)):
        row = sample(seed, length)
        wanted = np.asarray(after_a_step(model, row, others, rate, filling if filled else []))
        found = prober.losses_after(row)
        assert np.abs(wanted - before).max() > 1e-3
        np.testing.assert_allclose(found - before, wanted - before, rtol=2e-3, atol=2e-5)
    np.testing.assert_array_equal(prober.losses(), before)


def test_large_gradients_are_clipped() -> None:
    model, row = tiny_model("llama"), sample(1, 12)
    whole = torch.stack([g.norm() for g in _unclipped(model, row)]).norm().item()
    assert whole > 2 * CLIP, "the test says nothing of clipping"
    prober = Prober(model, learning_rate=1e-3, batch_tokens=64)
    found = torch.stack([g.norm() for g in prober._gradients(row) if g is not None]).norm().item()
    assert found == pytest.approx(CLIP, rel=1e-4)


def _unclipped(model: Any, row: Sample) -> list[torch.Tensor]:
    model = copy.deepcopy(model).requires_grad_(True)
    return list(torch.autograd.grad(loss(model, row), list(model.parameters())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_are_taken_in_float32_and_the_model_stays(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    others, row = [sample(2, 9), sample(3, 17)], sample(4, 11)
    probers = [Prober(one, learning_rate=1e-4, batch_tokens=64) for one in (model, copy.deepcopy(model).float())]
    for prober in probers:
        prober.reference = others
        prober.fill([sample(5, 8)])
    np.testing.assert_array_equal(probers[0].losses_after(row), probers[1].losses_after(row))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_losses_after_a_step_do_not_depend_on_the_batch(batch_tokens: int) -> None:
    found = []
    for tokens in (40, batch_tokens):
        prober = Prober(tiny_model("llama"), learning_rate=1e-3, batch_tokens=tokens)
        prober.reference = [sample(i, 6 + 5 * i) for i in range(5)]
        found.append(prober.losses_after(sample(9, 20)))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_a_loss_that_is_not_finite_is_none() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.inf
    prober = Prober(model, learning_rate=1e-3, batch_tokens=64)
    prober.reference = [sample(1, 9)]
    assert np.isnan(prober.losses()).all() and np.isnan(prober.losses_after(sample(2, 9))).all()
