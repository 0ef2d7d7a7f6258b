"""Answers and losses of a steered model against whole sequences in float64, without keys and values that are shared."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from families import HIDDEN, blocks_of, tiny_model

from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.models.backbone import Backbone
from hf_neuronselect.models.sae import Site
from hf_neuronselect.models.steering import SteeredModel

PROMPT = np.asarray([1, 45, 17, 99, 60, 33, 72, 21, 64], dtype=np.int64)
ANSWER = np.asarray([12, 80, 41, 55, 23, 90, 34], dtype=np.int64)
FAMILIES = ("llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "qwen3_moe")
SITES = {
    "block": Site("layers.1"),
    "last block": Site("layers.3"),
    "mlp": Site("layers.1.mlp"),
    "input": Site("layers.2", "input"),
}


def vectors(rows: int = 5, size: float = 2.0) -> torch.Tensor:
    """A zero vector and random ones."""
    drawn = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(3)) * size
    drawn[0] = 0
    return drawn


@contextmanager
def added(model: Any, site: Site, vector: torch.Tensor, first: int) -> Any:
    """Add a vector to a site's activation from a position on."""
    module = Backbone(model).resolve(site)
    seen = []

    def add(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden[0, first].clone())
        hidden = hidden.clone()
        hidden[:, first:] += vector
        return hidden

    if site.io == "output":
        handle = module.register_forward_hook(
            lambda _m, _a, out: (add(out[0]), *out[1:]) if isinstance(out, tuple) else add(out)
        )
    else:
        handle = module.register_forward_pre_hook(lambda _m, args: (add(args[0]), *args[1:]))
    try:
        yield seen
    finally:
        handle.remove()


def widened(model: Any) -> Any:
    """A copy in float64; experts have no product in it, and stay in float32."""
    return copy.deepcopy(model) if model.config.model_type == "qwen3_moe" else copy.deepcopy(model).double()


@torch.no_grad()
def loss_by_hand(model: Any, site: Site, prompt: np.ndarray, answer: np.ndarray, vector: torch.Tensor) -> float:
    """Mean loss of the answer's tokens, one sequence, in float64."""
    wide = widened(model)
    ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
    with added(wide, site, vector.to(wide.dtype), len(prompt) - 1):
        logits = wide(ids, use_cache=False).logits[0]
    picked = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return -float(picked[torch.arange(len(answer)), torch.from_numpy(answer)].mean())


@torch.no_grad()
def answer_by_hand(
    model: Any, site: Site, prompt: np.ndarray, vector: torch.Tensor, most: int, ends: set[int]
) -> list[int]:
    """The likeliest token after the other, each from the whole sequence, in float64."""
    wide, said = widened(model), []
    while len(said) < most:
        with added(wide, site, vector.to(wide.dtype), len(prompt) - 1):
            ids = torch.tensor([[*prompt.tolist(), *said]])
            token = int(wide(ids, use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        said.append(token)
    return said


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_losses(family: str, site: Site) -> None:
    model = tiny_model(family)
    expected = [loss_by_hand(model, site, PROMPT, ANSWER, vector) for vector in vectors()]
    assert np.ptp(expected) > 0.05, "the vectors do something"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steered = SteeredModel(model, site, PROMPT)
    for batch_tokens in (1, 17, 4096):
        np.testing.assert_allclose(steered.losses(vectors(), ANSWER, batch_tokens), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any("forward" in block.__dict__ for block in blocks_of(model)), "the blocks are as they were"
    ids = torch.from_numpy(PROMPT)[None]
    with torch.no_grad(), added(model, site, torch.zeros(HIDDEN), len(PROMPT) - 1) as seen:
        model(ids, use_cache=False)
    torch.testing.assert_close(steered.state, seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_answers(family: str, site: Site) -> None:
    model, most = tiny_model(family), 12
    whole = [answer_by_hand(model, site, PROMPT, vector, most, set()) for vector in vectors(5, 4.0)]
    assert len({tuple(one) for one in whole}) > 1, "the vectors do something"
    ends = {whole[0][5], whole[1][3]}
    expected = [answer_by_hand(model, site, PROMPT, vector, most, ends) for vector in vectors(5, 4.0)]
    assert len({len(one) for one in expected}) > 1, "answers end at different places"
    steered = SteeredModel(model, site, PROMPT)
    for batch_tokens in (1, 50, 4096):
        got = steered.answers(vectors(5, 4.0), most, np.asarray(sorted(ends)), batch_tokens)
        assert [one.tolist() for one in got] == expected


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_a_prompt_of_one_token_and_an_answer_of_one(site: Site) -> None:
    model = tiny_model("llama")
    steered = SteeredModel(model, site, PROMPT[:1])
    expected = [loss_by_hand(model, site, PROMPT[:1], ANSWER[:1], vector) for vector in vectors()]
    np.testing.assert_allclose(steered.losses(vectors(), ANSWER[:1], 4096), expected, rtol=1e-4, atol=1e-5)
    got = steered.answers(vectors(), 4, np.zeros(0, np.int64), 4096)
    assert [one.tolist() for one in got] == [
        answer_by_hand(model, site, PROMPT[:1], vector, 4, set()) for vector in vectors()
    ]


def test_blocks_before_the_site_do_not_run_again() -> None:
    model, ran = tiny_model("llama"), []
    for i, block in enumerate(blocks_of(model)):
        block.self_attn.register_forward_hook(lambda *_, i=i: ran.append(i))
    steered = SteeredModel(model, Site("layers.2"), PROMPT)
    ran.clear()
    steered.losses(vectors(), ANSWER, 4096)
    assert ran == [0, 1, 2, 3, 3]  # once to the site and on, and the last block once more for all vectors


def test_training_mode_is_kept_and_a_site_must_exist() -> None:
    model = tiny_model("llama")
    model.train()
    SteeredModel(model, Site("layers.1"), PROMPT).losses(vectors(), ANSWER, 4096)
    assert model.training and all(module.training for module in model.modules())
    with pytest.raises(NeuronSelectError, match=r"no module 'layers\.9'"):
        SteeredModel(model, Site("layers.9"), PROMPT)


def test_logits_that_are_not_finite() -> None:
    model = tiny_model("llama")
    steered = SteeredModel(model, Site("layers.1"), PROMPT)
    with pytest.raises(FloatingPointError):
        steered.answers(torch.full((1, HIDDEN), float("nan")), 3, np.zeros(0, np.int64), 4096)
