"""SAEs written by SAELens itself: our latents must be those of its own ``encode``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_neuronselect.models.sae import Site, SparseAutoencoder
from hf_neuronselect.models.sae_formats import load_sae

sae_lens = pytest.importorskip("sae_lens")

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("Standard", {}),
    "topk": ("TopK", {"k": 5}),
    "topk_rescaled": ("TopK", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("JumpReLU", {}),
    "gated": ("Gated", {}),
}
NORMS = ("none", "constant_norm_rescale", "layer_norm")


def build(kind: str, **more: Any) -> Any:
    """A SAELens SAE of random weights; thresholds positive."""
    name, extra = KINDS[kind]
    metadata = sae_lens.saes.sae.SAEMetadata(model_name="toy", hook_name="blocks.3.hook_resid_post")
    config = getattr(sae_lens, f"{name}SAEConfig")(d_in=16, d_sae=48, dtype="float32", device="cpu",
                                                  metadata=metadata, **extra, **more)  # fmt: skip
    sae = getattr(sae_lens, f"{name}SAE")(config)
    torch.manual_seed(1)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter.data, std=0.5)
    if hasattr(sae, "threshold"):
        sae.threshold.data.abs_()
    return sae


def check(sae: Any, loaded: SparseAutoencoder, scale: float = 1.0) -> None:
    """Our latents of random tokens against SAELens's own."""
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(2)) * 2
    with torch.no_grad():
        theirs = sae.encode(x * scale)
    theirs = theirs.to_dense() if theirs.is_sparse else theirs
    assert (theirs > 0).any() and (theirs == 0).any()
    ours = loaded.sum_rows(x, torch.arange(60), 60)
    np.testing.assert_allclose(ours.numpy(), theirs.float().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("subtract", [True, False], ids=["b_dec", "no_b_dec"])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_saelens(kind: str, subtract: bool, norm: str, tmp_path: Path) -> None:
    """A misread key of its config would pool other latents than the SAE was trained to have."""
    sae = build(kind, apply_b_dec_to_input=subtract, normalize_activations=norm)
    sae.save_model(tmp_path)
    loaded = load_sae(tmp_path)
    check(sae, loaded)
    assert (loaded.site, loaded.model_name, loaded.format) == (Site("layers.3"), "toy", "saelens")


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated"])
def test_dataset_norm_is_folded_as_saelens_folds_it(kind: str, tmp_path: Path) -> None:
    """Ours folds the factor beside the file, SAELens folds it in memory: one latent of both."""
    sae = build(kind, normalize_activations="expected_average_only_in")
    sae.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.3}', encoding="utf-8")
    loaded = load_sae(tmp_path)
    check(sae, loaded, scale=0.3)
    sae.fold_activation_norm_scaling_factor(0.3)
    check(sae, loaded)
    sae.save_model(tmp_path / "folded")
    check(sae, load_sae(tmp_path / "folded"))
