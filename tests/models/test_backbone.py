"""The prefix of every family, padded and batched, against the unmodified model run a row at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import BLOCKS, DENSE, FAMILIES, HIDDEN, MOE, VOCAB, blocks_of, norm_of, record, router_weights, tiny_model

from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.models.backbone import Backbone, resolve_layer
from hf_neuronselect.models.batching import TokenBatch, plan_batches
from hf_neuronselect.models.sae import Site
from hf_neuronselect.rows.encode import Sample

LENGTHS = (5, 33, 1, 17)
BUDGETS = (1, 70, 4096)  # every row alone; pairs; all in one


def _samples() -> list[Sample]:
    rng = np.random.default_rng(3)
    samples = []
    for n in LENGTHS:
        pooled = rng.random(n) < 0.6
        pooled[rng.integers(n)] = True
        samples.append(Sample(rng.integers(4, VOCAB, n), pooled, {}, n))
    return samples


SAMPLES = _samples()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A model as a user has it, and what a copy of it says about each row alone."""
    model = tiny_model(request.param)
    whole = deepcopy(model)
    rows = [record(whole, sample.input_ids) for sample in SAMPLES]
    return SimpleNamespace(family=request.param, model=model, whole=whole, rows=rows, moe=request.param in MOE)


def _read(
    backbone: Backbone,
    sites: Sequence[Site],
    budget: int = 4096,
    then: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> list[list[torch.Tensor]]:
    """Each row's pooled tokens at each site: ``[row][site] -> [pooled, width]``."""
    got: list[list[torch.Tensor]] = [[] for _ in SAMPLES]
    for plan in plan_batches(LENGTHS, budget):
        batch = TokenBatch.of([SAMPLES[i] for i in plan], 0, backbone.device)
        found: dict[int, torch.Tensor] = {}

        def observe(hidden: torch.Tensor, at: int, batch: TokenBatch = batch, found: Any = found) -> None:
            found[at] = batch.pooled.vectors(then(hidden)).clone()

        backbone.run(batch, [(site, lambda h, at=at: observe(h, at)) for at, site in enumerate(sites)])
        for place, i in enumerate(plan):
            got[i] = [found[at][batch.pooled.row == place] for at in range(len(sites))]
    return got


def _assert_rows(got: list[list[torch.Tensor]], want: Sequence[torch.Tensor], layers: Sequence[int]) -> None:
    for sample, ours, theirs in zip(SAMPLES, got, want, strict=True):
        pooled = torch.from_numpy(sample.pooled)
        for value, layer in zip(ours, layers, strict=True):
            torch.testing.assert_close(value, theirs[layer][pooled], atol=1e-5, rtol=1e-5)


def _differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-3)


@pytest.mark.parametrize("budget", BUDGETS)
def test_residual_is_the_block_output_of_the_row_alone(case: SimpleNamespace, budget: int) -> None:
    backbone = Backbone(case.model)
    assert (backbone.num_layers, backbone.hidden_size) == (BLOCKS, HIDDEN)
    got = _read(backbone, [backbone.residual(layer) for layer in range(BLOCKS)], budget)
    _assert_rows(got, [row["residual"] for row in case.rows], range(BLOCKS))


def test_last_block_is_read_before_the_final_norm(case: SimpleNamespace) -> None:
    for row in case.rows:
        inner = slice(0, BLOCKS - 1)
        torch.testing.assert_close(row["residual"][inner], row["hidden_states"][1:BLOCKS], atol=1e-6, rtol=1e-6)
        assert _differs(row["residual"][-1], row["hidden_states"][-1])
        with torch.no_grad():
            normed = norm_of(case.whole)(row["residual"][-1])
        torch.testing.assert_close(normed, row["hidden_states"][-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("depth", range(1, BLOCKS + 1))
def test_prefix_gives_the_same_numbers(case: SimpleNamespace, depth: int, bare: bool) -> None:
    model = deepcopy(case.model)
    backbone = Backbone(Backbone(model).decoder if bare else model, depth=depth)
    assert (len(backbone.blocks), len(blocks_of(model)), backbone.num_layers) == (depth, depth, BLOCKS)
    got = _read(backbone, [backbone.residual(layer) for layer in range(depth)])
    _assert_rows(got, [row["residual"] for row in case.rows], range(depth))


def test_neurons(case: SimpleNamespace) -> None:
    backbone = Backbone(case.model)
    if case.moe:
        for layer in range(BLOCKS):
            with pytest.raises(NeuronSelectError, match="mixture of experts"):
                backbone.neurons(layer)
            with pytest.raises(NeuronSelectError, match="mixture of experts"):
                backbone.gate(layer)
        return
    got = _read(backbone, [backbone.neurons(layer) for layer in range(BLOCKS)])
    _assert_rows(got, [row["neurons"] for row in case.rows], range(BLOCKS))
    for layer in range(BLOCKS):
        site, activate = backbone.gate(layer)
        _assert_rows(_read(backbone, [site], then=activate), [row["gate"] for row in case.rows], [layer])


def test_router(case: SimpleNamespace) -> None:
    backbone = Backbone(case.model)
    if not case.moe:
        assert all(backbone.router(layer) is None for layer in range(BLOCKS))
        return
    logits = [
        case.whole.base_model(torch.from_numpy(sample.input_ids)[None], output_router_logits=True).router_logits
        for sample in SAMPLES
    ]
    for layer in range(BLOCKS):
        found = backbone.router(layer)
        assert found is not None
        got = _read(backbone, [found[0]], then=found[1])
        _assert_rows(got, [[router_weights(row[layer])] for row in logits], [0])
        _assert_rows(got, [row["router"] for row in case.rows], [layer])
        weights = torch.cat([row[0] for row in got])
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(len(weights)))
        assert weights.shape[1] == 6 and weights.std(dim=-1).max() > 0.01


def test_model_with_dense_and_moe_blocks() -> None:
    backbone = Backbone(tiny_model("qwen3_moe", mlp_only_layers=[0]))
    assert [backbone.router(layer) is None for layer in range(BLOCKS)] == [True, False, False, False]
    assert backbone.neurons(0) == Site("layers.0.mlp.down_proj", "input")


def test_all_kinds_of_sites_in_one_run(case: SimpleNamespace) -> None:
    backbone = Backbone(case.model)
    second = backbone.router(2)[0] if case.moe else backbone.neurons(2)
    sites = [backbone.residual(3), second, backbone.residual(1), backbone.residual(1)]
    for together, *alone in zip(_read(backbone, sites), *(_read(backbone, [site]) for site in sites), strict=True):
        assert all(torch.equal(a, b[0]) for a, b in zip(together, alone, strict=True))


def test_mutants_would_be_seen(case: SimpleNamespace) -> None:
    """Layer off by one, final norm applied, padding pooled: each moves the numbers."""
    longest = int(np.argmax(LENGTHS))
    h = case.rows[longest]["residual"]
    assert all(_differs(h[layer], h[layer - 1]) for layer in range(1, BLOCKS))
    with torch.no_grad():
        assert all(_differs(h[layer], norm_of(case.whole)(h[layer])) for layer in range(BLOCKS))
    backbone, short = Backbone(case.model), LENGTHS.index(5)
    batch = TokenBatch.of([SAMPLES[longest], SAMPLES[short]], 0, backbone.device)
    kept: list[torch.Tensor] = []
    backbone.run(batch, [(backbone.residual(2), lambda x: kept.extend([x.clone(), batch.pooled.mean(x)]))])
    want = case.rows[short]["residual"][2][torch.from_numpy(SAMPLES[short].pooled)].mean(dim=0)
    torch.testing.assert_close(kept[1][1], want, atol=1e-5, rtol=1e-5)
    assert _differs(kept[0][1].mean(dim=0), want)


def test_deeper_blocks_and_the_norm_never_run(case: SimpleNamespace) -> None:
    model = deepcopy(case.model)

    def fail(*_: Any) -> None:
        raise AssertionError("ran too deep")

    backbone = Backbone(model)
    for deepest in range(BLOCKS - 1, -1, -1):
        (blocks_of(model)[deepest + 1] if deepest + 1 < BLOCKS else norm_of(model)).register_forward_pre_hook(fail)
        _assert_rows(
            _read(backbone, [backbone.residual(deepest), backbone.residual(0)]),
            [row["residual"] for row in case.rows],
            [deepest, 0],
        )


def test_the_users_model_is_left_as_it_is(case: SimpleNamespace) -> None:
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    backbone = Backbone(case.model)
    _read(backbone, [backbone.residual(1)])

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("observer")

    with pytest.raises(RuntimeError, match="observer"):
        backbone.run(TokenBatch.of(SAMPLES, 0, backbone.device), [(backbone.residual(1), fail)])
    assert len(blocks_of(case.model)) == BLOCKS
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())
    after = case.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_sae_site_named_layers_fits_every_family(case: SimpleNamespace) -> None:
    backbone = Backbone(case.model)
    assert backbone.resolve(Site("layers.2")) is blocks_of(case.model)[2]
    with pytest.raises(NeuronSelectError, match="4 blocks"):
        backbone.resolve(Site("layers.9"))


@pytest.mark.parametrize(("given", "layer"), [(0, 0), (3, 3), (-1, 3), (-2, 2), (-4, 0)])
def test_layers_count_from_either_end(given: int, layer: int) -> None:
    assert Backbone(tiny_model("llama")).layer(given) == resolve_layer(given, BLOCKS) == layer


@pytest.mark.parametrize("given", [4, -5, 99])
def test_layer_out_of_range(given: int) -> None:
    with pytest.raises(NeuronSelectError, match="0 to 3") as raised:
        Backbone(tiny_model("llama")).layer(given)
    assert (raised.value.option, raised.value.value) == ("layer", given)


def test_no_decoder_blocks() -> None:
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(num_hidden_layers=1, hidden_size=2)
    with pytest.raises(NeuronSelectError, match="no list of decoder blocks"):
        Backbone(model)


def test_a_site_that_is_never_reached() -> None:
    backbone = Backbone(tiny_model("llama"))
    site = Site("layers.1.self_attn.k_proj.nothing")
    with pytest.raises(NeuronSelectError, match="no module"):
        backbone.run(TokenBatch.of(SAMPLES, 0, backbone.device), [(site, lambda x: None)])
    backbone.decoder.unused = torch.nn.Identity()
    with pytest.raises(NeuronSelectError, match="never reached"):
        backbone.run(TokenBatch.of(SAMPLES, 0, backbone.device), [(Site("unused"), lambda x: None)])


def test_plan_batches_covers_every_row_once() -> None:
    lengths = [3, 50, 1, 7, 7, 120, 2]
    for budget in (1, 10, 64, 10_000):
        plans = plan_batches(lengths, budget)
        assert sorted(np.concatenate(plans)) == list(range(len(lengths)))
        assert all(len(plan) == 1 or len(plan) * max(lengths[i] for i in plan) <= budget for plan in plans)


def test_family_lists() -> None:
    assert set(DENSE) | set(MOE) == set(FAMILIES) and not set(DENSE) & set(MOE)
