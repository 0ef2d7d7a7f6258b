"""Losses without features, against one row and one set at a time in float64; batches, padding, and what is left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import HIDDEN, blocks_of, tiny_model
from test_steering import widened

from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.models.ablation import Ablation
from hf_neuronselect.models.backbone import Backbone
from hf_neuronselect.models.sae import Site, SparseAutoencoder
from hf_neuronselect.rows.encode import Sample

M, K = 48, 5
SITES = {"block": Site("layers.1"), "mlp": Site("layers.1.mlp"), "input": Site("layers.2", "input")}
SETS = [np.arange(0, 20), np.asarray([7]), np.arange(M)]


def sae_at(site: Site, activation: str = "topk", norm: str = "none") -> SparseAutoencoder:
    draw = torch.Generator().manual_seed(4)
    weight = torch.randn(M, HIDDEN, generator=draw) / HIDDEN**0.5
    bias = 0.1 * torch.randn(M, generator=draw)
    more: dict[str, Any] = {"k": K} if activation == "topk" else {}
    if activation == "jumprelu":
        more = {"threshold": torch.full((M,), 0.3)}
    return SparseAutoencoder(
        weight, bias, site, activation, b_pre=0.1 * torch.randn(HIDDEN, generator=draw), input_norm=norm,
        W_dec=torch.randn(M, HIDDEN, generator=draw) * 0.4, **more,
    )  # fmt: skip


def samples() -> list[Sample]:
    """Rows of different lengths; the answers are not at the end of all of them."""
    draw, found = np.random.default_rng(2), []
    for n, first, last in ((9, 4, 9), (14, 2, 5), (5, 1, 2), (23, 10, 20), (9, 8, 9)):
        pooled = np.zeros(n, bool)
        pooled[first:last] = True
        found.append(Sample(draw.integers(3, 120, n), pooled, {}, n, ""))
    return found


def latents(sae: SparseAutoencoder, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents of tokens ``[n, m]``, and what undoes the input norm ``[n]``, in float64."""
    x, scale = h, np.ones(len(h))
    if sae.input_norm == "constant_norm_rescale":
        scale = np.linalg.norm(h, axis=1) / HIDDEN**0.5
        x = h / scale[:, None]
    elif sae.input_norm == "layer_norm":
        scale = h.std(axis=1, ddof=1)
        x = (h - h.mean(axis=1, keepdims=True)) / (scale[:, None] + 1e-5)
    z = (x - sae.b_pre.double().numpy()) @ sae.W_enc.double().numpy().T + sae.b_enc.double().numpy()  # type: ignore[union-attr]
    if sae.activation == "jumprelu":
        return np.where(z > 0.3, z, 0), scale
    z = np.maximum(z, 0)
    if sae.activation == "topk":
        z = np.where(np.argsort(np.argsort(-z, axis=1, kind="stable"), axis=1, kind="stable") < K, z, 0)
    return z, scale


@torch.no_grad()
def by_hand(model: Any, sae: SparseAutoencoder, row: Sample, features: np.ndarray) -> tuple[float, float]:
    """The mean loss of a row's answer without features, and the mean share of the norm that is taken off."""
    wide, taken = widened(model), []
    module = Backbone(wide).resolve(sae.site)

    def without(hidden: torch.Tensor) -> torch.Tensor:
        h = hidden.reshape(-1, HIDDEN).double().numpy()
        z, scale = latents(sae, h)
        off = (z * scale[:, None])[:, features] @ sae.W_dec.double().numpy()[features]  # type: ignore[union-attr]
        taken.append((np.linalg.norm(off, axis=1) / np.linalg.norm(h, axis=1)).mean())
        return (torch.from_numpy(h - off).to(hidden.dtype)).reshape(hidden.shape)

    if sae.site.io == "output":
        module.register_forward_hook(
            lambda _m, _a, out: (without(out[0]), *out[1:]) if isinstance(out, tuple) else without(out)
        )
    else:
        module.register_forward_pre_hook(lambda _m, args: (without(args[0]), *args[1:]))
    logits = wide(torch.from_numpy(row.input_ids)[None], use_cache=False).logits[0].log_softmax(-1)
    at = np.flatnonzero(row.pooled)
    return -float(np.mean([logits[i - 1, row.input_ids[i]].item() for i in at])), float(taken[0])


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_losses_are_the_references(family: str, site: Site) -> None:
    model, sae, rows = tiny_model(family), sae_at(site), samples()
    expected = [[by_hand(model, sae, row, one) for row in rows] for one in [np.zeros(0, int), *SETS]]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for batch_tokens in (1, 30, 4096):
        found = Ablation(model, sae, sae, None).losses(rows, SETS, batch_tokens)
        np.testing.assert_allclose(found.losses, [[loss for loss, _ in one] for one in expected], rtol=2e-4, atol=2e-5)
        lengths = [len(row.input_ids) for row in rows]
        shares = [np.average([share for _, share in one], weights=lengths) for one in expected[1:]]
        np.testing.assert_allclose(found.taken, shares, rtol=1e-4)
    assert np.ptp(found.losses, axis=0).min() > 1e-3, "the features do something"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any("forward" in block.__dict__ or block._forward_hooks for block in blocks_of(model))


@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_every_form_of_sae(activation: str, norm: str) -> None:
    model, sae, rows = tiny_model("llama"), sae_at(Site("layers.2"), activation, norm), samples()
    expected = [[by_hand(model, sae, row, one)[0] for row in rows] for one in SETS]
    ablation = Ablation(model, sae, sae, None)
    np.testing.assert_allclose(ablation.losses(rows, SETS, 40).losses[1:], expected, rtol=2e-4, atol=2e-5)
    # activity: mean norm of what a latent adds, share of the tokens on which it is active
    states: list[np.ndarray] = []
    handle = Backbone(model).resolve(sae.site).register_forward_hook(lambda _m, _a, out: states.append(out[0].numpy()))
    with torch.no_grad():
        for row in rows:
            model(torch.from_numpy(row.input_ids)[None], use_cache=False)
    handle.remove()
    z, scale = latents(sae, np.concatenate(states).astype(np.float64))
    for batch_tokens in (1, 4096):
        found = ablation.activity(rows, batch_tokens)
        norms = np.linalg.norm(sae.W_dec.double().numpy(), axis=1)  # type: ignore[union-attr]
        np.testing.assert_allclose(found.size, (z * scale[:, None]).mean(axis=0) * norms, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.rate, (z > 0).mean(axis=0), atol=1e-12)


def test_blocks_before_the_site_run_once() -> None:
    model, ran = tiny_model("llama"), []
    for i, block in enumerate(blocks_of(model)):
        block.self_attn.register_forward_hook(lambda *_, i=i: ran.append(i))
    Ablation(model, sae_at(Site("layers.2")), sae_at(Site("layers.2")), None).losses(samples(), SETS, 4096)
    assert ran == [0, 1, 2, 3, 3, 3, 3]


def test_an_sae_that_cannot_be_decoded_is_refused() -> None:
    model, sae = tiny_model("llama"), sae_at(Site("layers.1"))
    with pytest.raises(NeuronSelectError, match="has no decoder"):
        Ablation(model, sae, replace(sae, W_dec=None), None)
    with pytest.raises(NeuronSelectError, match="is a transcoder"):
        Ablation(model, sae, replace(sae, notes={"transcode": True}), None)
    with pytest.raises(NeuronSelectError, match="no module 'layers.9'"):
        Ablation(model, sae, replace(sae, site=Site("layers.9")), None)
