"""The TopK trainer: gradients by autograd, scaling folded away, resume, several blocks at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.models.backbone import Backbone
from hf_neuronselect.models.sae import SparseAutoencoder
from hf_neuronselect.models.sae_formats import load_sae
from hf_neuronselect.training.sae_loop import Progress, fit_saes
from hf_neuronselect.training.sae_measure import measure_saes
from hf_neuronselect.training.token_rows import Activations, Block, TokenRows
from hf_neuronselect.training.topk import AUX_WEIGHT, TopK, TopKPlan

WIDTH, LATENTS, K = 32, 96, 4


def plan(tokens: int = 4000, **options: int) -> TopKPlan:
    return TopKPlan(WIDTH, LATENTS, K, tokens, 256, lr=3e-3, **options)


def activations(n: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(24, WIDTH, generator=draw)
    z = torch.rand(n, 24, generator=draw) * (torch.rand(n, 24, generator=draw) < 0.15)
    return 7.0 * z @ directions + 3.0


@pytest.mark.parametrize("dead", [0, 10], ids=["all-alive", "some-dead"])
def test_gradients_are_those_of_the_loss(monkeypatch: pytest.MonkeyPatch, dead: int) -> None:
    x = activations(300)
    sae = TopK(plan(), x)
    sae.bias += torch.linspace(-0.2, 0.2, LATENTS)
    sae.offset += 0.1
    sae.encoder += 0.05 * torch.randn(LATENTS, WIDTH, generator=torch.Generator().manual_seed(3))
    sae.quiet[:dead] = 10**9
    sae.bias[:dead] = -50.0  # never among the k largest
    found: list[torch.Tensor] = []
    monkeypatch.setattr(sae, "_update", found.extend)
    sae.step(x)

    parameters = [p.clone().double().requires_grad_() for p in (sae.encoder, sae.decoder, sae.bias, sae.offset)]
    encoder, decoder, bias, offset = parameters
    y = ((x - sae.centre) / sae.scale).double()
    pre = y @ encoder.T + bias
    values, latents = pre.topk(K, dim=1)
    z = torch.zeros_like(pre).scatter(1, latents, values.relu())
    error = z @ decoder + offset - y
    loss = error.pow(2).sum(dim=1).mean()
    if dead:  # AuxK: dead latents reconstruct what is left over
        values, places = pre[:, :dead].topk(dead, dim=1)
        left = torch.zeros_like(pre[:, :dead]).scatter(1, places, values.relu()) @ decoder[:dead] + error.detach()
        loss = loss + AUX_WEIGHT * left.pow(2).sum(dim=1).mean()
    loss.backward()
    for ours, parameter in zip(found, parameters, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(ours.double(), parameter.grad, rtol=2e-4, atol=2e-5)


def written(folder: Path, sae: TopK) -> SparseAutoencoder:
    folder.mkdir(parents=True)
    save_file(sae.weights(), folder / "sae.safetensors")
    config = {"activation": "topk", "d_in": WIDTH, "num_latents": LATENTS, "k": K, "normalize_decoder": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    return load_sae(folder)


def test_training_learns_and_the_file_needs_no_scaling(tmp_path: Path) -> None:
    """What is loaded reconstructs raw activations as well as the trainer did its centred and scaled ones."""
    x = activations(4000)
    sae = TopK(plan(40_000), x)
    for epoch in range(10):
        if epoch == 9:
            sae.zero_figures()
        for part in x.split(256):
            sae.step(part)
    assert sae.fvu < 0.15
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(LATENTS))

    loaded = written(tmp_path / "layers.2", sae)
    values, indices = loaded.encode(x)
    assert indices is not None
    error = (x - loaded.decode(values, indices)).pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()
    assert float(error) == pytest.approx(sae.fvu, rel=0.2)


@pytest.fixture
def lm(tiny_folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_folder / "model").eval()


@pytest.fixture
def token_rows() -> TokenRows:
    draw = np.random.default_rng(0)
    return TokenRows.of([draw.integers(5, 60, size=draw.integers(6, 40)) for _ in range(60)], 32)


class Stop(Exception):
    pass


def stream(lm: torch.nn.Module, rows: TokenRows, sites: tuple[int, ...] = (1, 2)) -> Activations:
    backbone = Backbone(lm)
    return Activations(backbone, [backbone.residual(layer) for layer in sites], rows, block=300, batch=128)


def test_a_killed_training_goes_on_as_if_nothing_had_happened(
    lm: torch.nn.Module, token_rows: TokenRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_neuronselect.training.sae_loop.SAVE_EVERY", -1.0)
    plans = [(0, plan(1500)), (1, plan(1200))]
    whole = fit_saes(stream(lm, token_rows), plans)

    checkpoint, cut = tmp_path / "checkpoint.safetensors", stream(lm, token_rows)
    blocks = cut.blocks

    def three(start: int = 0) -> Iterator[Block]:
        for number, block in enumerate(blocks(start)):
            if number == 3:
                raise Stop
            yield block

    monkeypatch.setattr(cut, "blocks", three)
    with pytest.raises(Stop):
        fit_saes(cut, plans, checkpoint=checkpoint)
    again = fit_saes(stream(lm, token_rows), plans, checkpoint=checkpoint)
    for one, other in zip(whole, again, strict=True):
        assert one.seen == other.seen
        for name, tensor in one.weights().items():
            torch.testing.assert_close(other.weights()[name], tensor, rtol=0, atol=0)
    with pytest.raises(NeuronSelectError, match="another model, pool or options"):
        fit_saes(stream(lm, token_rows), [(0, plan(1600)), (1, plan(1200))], checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    with pytest.raises(NeuronSelectError, match="damaged"):
        fit_saes(stream(lm, token_rows), plans, checkpoint=checkpoint)


def test_each_sae_is_measured_on_its_own_block(lm: torch.nn.Module, token_rows: TokenRows, tmp_path: Path) -> None:
    """In whatever order they are named: blocks run in theirs."""
    trained = fit_saes(stream(lm, token_rows), [(0, plan(1500)), (1, plan(1500))])
    saes = [written(tmp_path / f"layers.{layer}", sae) for layer, sae in zip((1, 2), trained, strict=True)]
    forwards = measure_saes(lm, saes, token_rows, batch=200)
    backwards = measure_saes(lm, saes[::-1], token_rows, batch=200)
    assert forwards == backwards[::-1]
    assert forwards[0].fvu != forwards[1].fvu and 0 < forwards[0].l0 <= K
    assert forwards[0].loss == forwards[1].loss


def test_progress_says_what_is_left() -> None:
    said = str(Progress(2_000_000, 10_000_000, fvu=0.25, dead=3, latents=9216, rate=10_000.0, left=800.0))
    assert said == "2,000,000 of 10,000,000 tokens, FVU 0.250, 3 of 9,216 latents dead, 10,000 tokens/s, 13 min left"
    assert ", reading, " in str(Progress(0, 9, None, 0, 9, 1.0, 1.0))


def test_progress_is_told_while_activations_are_read(
    lm: torch.nn.Module, token_rows: TokenRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_neuronselect.training.sae_loop.SAY_EVERY", 0.0)
    said: list[Progress] = []
    fit_saes(stream(lm, token_rows), [(0, plan(1500))], report=said.append)
    assert said[0].fvu is None and said[0].seen == 0 and said[0].left > 0
    assert said[-1].fvu is not None and said[-1].seen >= 1500 and said[-1].left < said[0].left
    assert all(one.rate > 0 for one in said)
