"""Every SAE file format against golden numbers worked out outside the package, and every refusal."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import GOLDENS

from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.models.sae import Site, SparseAutoencoder
from hf_neuronselect.models.sae_formats import load_sae

GOLDEN: dict[str, Any] = GOLDENS
SPARSIFY, SAELENS, LLAMA = GOLDEN["sparsify_topk"], GOLDEN["saelens_weights"], GOLDEN["llama_scope"]
GATES = GOLDEN["saelens_gated"]
LLAMA_NAME = "Llama3_1-8B-Base-L15R-8x"
TOKENS = np.random.default_rng(0).normal(size=(200, 3))
TOLERANCE = {torch.float32: {"rtol": 1e-6, "atol": 2e-6}, torch.float64: {"rtol": 0, "atol": 1e-8}}


# ---------------------------------------------------------------------------------------- helpers
def dense(sae: SparseAutoencoder, x: Any, k: int | None = None, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The kept latents as ``[N, m]``, zeros elsewhere."""
    values, indices = sae.to("cpu", dtype).encode(torch.as_tensor(x, dtype=dtype), k)
    if indices is not None:
        values = torch.zeros(len(values), sae.num_latents, dtype=values.dtype).scatter(1, indices, values)
    return values.numpy()


def pick(source: dict[str, Any], names: str, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(source[name], dtype=dtype) for name in names.split()}


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor], config: str, cfg: dict[str, Any]) -> Path:
    """One SAE folder: its tensors and its JSON config."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    (folder / config).write_text(json.dumps(cfg), encoding="utf-8")
    return folder


def sparsify(folder: Path, change: dict[str, torch.Tensor | None] | None = None, **cfg: Any) -> Path:
    """An eai-sparsify folder of the golden weights; ``change`` replaces tensors, or drops them with None."""
    tensors = {**pick(SPARSIFY, "encoder.weight encoder.bias b_dec"), **(change or {})}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    base = {"expansion_factor": 2, "normalize_decoder": True, "k": SPARSIFY["k"], "d_in": 3}
    return write(folder, "sae.safetensors", tensors, "cfg.json", base | cfg)


def saelens(folder: Path, names: str = "W_enc b_enc b_dec W_dec", hook: str | None = None, **cfg: Any) -> Path:
    """A SAELens folder of the golden weights, residual output of block 4 unless a hook is named."""
    tensors = pick({**SAELENS, **GATES}, names)
    base = {"d_in": 3, "d_sae": 6, "metadata": {"hook_name": hook or "blocks.4.hook_resid_post", "model_name": "toy"}}
    return write(folder, "sae_weights.safetensors", tensors, "cfg.json", base | cfg)


def gemma(folder: Path, **arrays: Any) -> Path:
    """A Gemma Scope folder of the golden weights."""
    folder.mkdir(parents=True)
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    np.savez(folder / "params.npz", **({name: np.array(SAELENS[name]) for name in names} | arrays))
    return folder


def llama(folder: Path, **cfg: Any) -> Path:
    """A Llama Scope folder of the golden weights."""
    base = {
        "jump_relu_threshold": LLAMA["jump_relu_threshold"],
        "dataset_average_activation_norm": {"in": LLAMA["dataset_average_activation_norm_in"], "out": 9.0},
        "sparsity_include_decoder_norm": LLAMA["sparsity_include_decoder_norm"],
    }
    tensors = pick(LLAMA, "encoder.weight encoder.bias decoder.weight decoder.bias")
    return write(folder, "checkpoints/final.safetensors", tensors, "hyperparams.json", base | cfg)


# ------------------------------------------------------------------------------------ the goldens
STANDARD: dict[str, Any] = {"architecture": "standard", "apply_b_dec_to_input": True, "normalize_activations": "none"}
WRITERS: dict[str, Callable[[Path], Path]] = {
    "sparsify_topk": lambda p: sparsify(p / "layers.10", activation="topk"),
    "sparsify_groupmax": lambda p: sparsify(p / "layers.10", activation="groupmax"),
    "sparsify_transcoder_topk": lambda p: sparsify(p / "layers.10.mlp", activation="topk", transcode=True),
    "saelens_standard": lambda p: saelens(p, **STANDARD),
    "saelens_topk": lambda p: saelens(p, **STANDARD | {"architecture": "topk"}, k=3),
    "saelens_topk_rescaled": lambda p: saelens(
        p, **STANDARD | {"architecture": "topk"}, k=3, rescale_acts_by_decoder_norm=True
    ),
    "saelens_jumprelu": lambda p: saelens(
        p, "W_enc b_enc b_dec W_dec threshold", architecture="jumprelu", apply_b_dec_to_input=False
    ),
    "saelens_gated": lambda p: saelens(
        p, "W_enc b_dec W_dec b_gate b_mag r_mag", architecture="gated", apply_b_dec_to_input=True
    ),
    "saelens_layer_norm_input": lambda p: saelens(p, **STANDARD | {"normalize_activations": "layer_norm"}),
    "saelens_constant_norm_rescale": lambda p: saelens(
        p, **STANDARD | {"normalize_activations": "constant_norm_rescale"}
    ),
    "gemma_scope": lambda p: gemma(p / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"),
    "llama_scope": lambda p: llama(p / LLAMA_NAME),
}


def golden(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The input and the expected latents of a golden case."""
    case = GOLDEN[name]
    source = SPARSIFY if name.startswith("sparsify") else LLAMA if name == "llama_scope" else SAELENS
    return np.array(source["x"]), np.array(case.get("expected", case.get("expected_standard")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", WRITERS)
def test_golden_latents(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A wrong sign, transpose, scale or order of operations in a reader would pool the wrong latents."""
    x, expected = golden(name)
    sae = load_sae(WRITERS[name](tmp_path))
    np.testing.assert_allclose(dense(sae, x, dtype=dtype), expected, **TOLERANCE[dtype])
    assert (sae.num_latents, sae.d_in) == (6, 3)


@pytest.mark.parametrize("name", WRITERS)
def test_more_tokens(name: str, tmp_path: Path) -> None:
    """The four golden tokens leave much untried: there topk is groupmax, and Llama Scope's threshold cuts nothing."""
    got = dense(load_sae(WRITERS[name](tmp_path)), TOKENS, dtype=torch.float64)
    np.testing.assert_allclose(got, reference(name, x=TOKENS), rtol=1e-9, atol=1e-9)


def decoded(name: str, x: np.ndarray) -> np.ndarray:
    """What each format's own decoder makes of each latent of one token, ``[m, d]``, by its own code's steps."""
    z = reference(name, x=x[None])[0]
    if name == "llama_scope":
        decoder = np.array(LLAMA["decoder.weight"])  # [d, m]
        return (z / np.linalg.norm(decoder, axis=0))[:, None] * decoder.T
    w_dec = np.array(SAELENS["W_dec"])
    if name == "saelens_topk_rescaled":
        z = z / np.linalg.norm(w_dec, axis=-1)
    scale = 1.0
    if name == "saelens_layer_norm_input":
        scale = x.std(ddof=1)
    if name == "saelens_constant_norm_rescale":
        scale = np.linalg.norm(x) / 3**0.5
    return z[:, None] * w_dec * scale


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.startswith("sparsify")])
def test_directions(name: str, tmp_path: Path) -> None:
    """A latent's activation times its direction is its part of the reconstruction, whatever a format folds and scales."""
    sae = load_sae(WRITERS[name](tmp_path))
    for x in TOKENS[:20]:
        given = torch.from_numpy(x)
        latents = torch.arange(6)
        values = torch.from_numpy(dense(sae, x[None], dtype=torch.float64)[0])
        got = values[:, None] * sae.directions(latents, given)
        np.testing.assert_allclose(got.numpy(), decoded(name, x), rtol=1e-5, atol=1e-6)
    few = sae.directions(torch.tensor([4, 1]), given)
    torch.testing.assert_close(few, sae.directions(latents, given)[[4, 1]])


def test_directions_of_sparsify_and_of_a_scaled_dataset(tmp_path: Path) -> None:
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sae = load_sae(sparsify(tmp_path / "layers.10", {"W_dec": rows}))
    torch.testing.assert_close(sae.directions(torch.arange(6), torch.ones(3)), rows.float())
    folder = saelens(tmp_path / "s", architecture="standard", normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}), encoding="utf-8")
    got = load_sae(folder).directions(torch.arange(6), torch.ones(3))
    np.testing.assert_allclose(got, np.array(SAELENS["W_dec"]) / 0.25, rtol=1e-6)


@pytest.mark.parametrize("kind", ["sparsify", "saelens"])
def test_a_transcoder_and_a_file_without_a_decoder_have_no_directions(kind: str, tmp_path: Path) -> None:
    rows = torch.zeros(6, 3, dtype=torch.float64)
    if kind == "sparsify":
        across = sparsify(tmp_path / "layers.10.mlp", {"W_dec": rows}, transcode=True)
        bare = sparsify(tmp_path / "layers.10")
    else:
        across = saelens(tmp_path / "a", architecture="transcoder", hook="blocks.4.hook_resid_pre")
        bare = saelens(tmp_path / "b", "W_enc b_enc b_dec", **STANDARD)
    with pytest.raises(NeuronSelectError, match="is a transcoder: its latents write elsewhere than layers"):
        load_sae(across).directions(torch.arange(2), torch.ones(3))
    with pytest.raises(NeuronSelectError, match=r"no decoder \(W_dec\)"):
        load_sae(bare).directions(torch.arange(2), torch.ones(3))


def test_rescale_comes_before_the_choice(tmp_path: Path) -> None:
    """Choosing before the decoder norms are multiplied in would keep latent 2 of the first token."""
    x, expected = golden("saelens_topk_rescaled")
    got = dense(load_sae(WRITERS["saelens_topk_rescaled"](tmp_path)), x, k=1)
    np.testing.assert_allclose(got, keep(expected, 1), rtol=1e-6, atol=2e-6)
    assert np.argmax(got[0]) == 5 and np.argmax(golden("saelens_standard")[1][0]) == 2


@pytest.mark.parametrize(
    "flat",
    [
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "hook_point": "blocks.7.hook_resid_post"},
        {"architecture": "standard", "activation_fn_str": "relu", "hook_name": "blocks.7.hook_resid_post"},
    ],
    ids=["topk", "standard"],
)
def test_saelens_flat_keys(flat: dict[str, Any], tmp_path: Path) -> None:
    """Files of before SAELens 6 keep K and the hook at the top level; missing them means another SAE."""
    sae = load_sae(saelens(tmp_path, metadata=None, model_name="gpt2-small", **flat))
    x, expected = golden("saelens_topk")
    np.testing.assert_allclose(dense(sae, x), expected, rtol=1e-6, atol=2e-6)
    topk = flat["activation_fn_str"] == "topk"
    assert (sae.activation, sae.k) == (("topk", 3) if topk else ("relu", None))
    assert (sae.site, sae.model_name) == (Site("layers.7"), "gpt2-small")


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_expected_average_only_in(factor: float, tmp_path: Path) -> None:
    """The dataset factor s scales x: unfolded, every latent would be computed on inputs of another norm."""
    saelens(tmp_path, architecture="standard", normalize_activations="expected_average_only_in")
    with pytest.raises(NeuronSelectError, match="without its scaling factor"):
        load_sae(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}), encoding="utf-8")
    x, expected = golden("saelens_standard")
    sae = load_sae(tmp_path)
    np.testing.assert_allclose(dense(sae, x / factor, dtype=torch.float64), expected, rtol=0, atol=1e-8)
    assert np.abs(dense(sae, x) - expected).max() > 1e-3


def test_oldest_sparsify_config(tmp_path: Path) -> None:
    """June 2024 configs name no activation and no transcode; they are top-k autoencoders."""
    sae = load_sae(sparsify(tmp_path / "layers.2", signed=False))
    x, expected = golden("sparsify_topk")
    np.testing.assert_allclose(dense(sae, x), expected, rtol=1e-6, atol=2e-6)
    assert (sae.activation, sae.k, sae.W_dec) == ("topk", 2, None)
    with pytest.raises(NeuronSelectError, match="has no decoder"):
        sae.decode(*sae.encode(torch.tensor(x)))


# ------------------------------------------------------------------------------------------ sites
@pytest.mark.parametrize(
    ("folder", "layer", "cfg", "site"),
    [
        ("layers.10", None, {}, Site("layers.10")),
        ("layers.10", 3, {}, Site("layers.10")),
        ("layers.20.mlp", None, {}, Site("layers.20.mlp")),
        ("layers.20.mlp", None, {"transcode": True}, Site("layers.20.mlp", "input")),
        ("h.3.attn", None, {}, Site("h.3.attn")),
        ("embed_tokens", None, {}, Site("embed_tokens")),
        ("layer_5", None, {}, Site("layers.4")),
        ("layer_0", None, {}, Site("embed_tokens")),
        ("layers.7/seed12", None, {}, Site("layers.7")),
        ("layer_8/seed0", None, {}, Site("layers.7")),
        ("my-sae", 6, {}, Site("layers.6")),
    ],
)
def test_sparsify_sites(folder: str, layer: int | None, cfg: dict[str, Any], site: Site, tmp_path: Path) -> None:
    """An off-by-one here reads another layer's activations and still returns plausible scores."""
    assert load_sae(sparsify(tmp_path / folder, **cfg), layer=layer).site == site


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.11.hook_resid_post", Site("layers.11")),
        ("blocks.11.hook_resid_pre", Site("layers.11", "input")),
        ("blocks.0.hook_mlp_out", Site("layers.0.mlp")),
    ],
)
def test_saelens_sites(hook: str, site: Site, tmp_path: Path) -> None:
    """resid_pre read as an output would be one layer too late."""
    assert load_sae(saelens(tmp_path, hook=hook)).site == site


def test_saelens_without_a_hook_needs_layer(tmp_path: Path) -> None:
    """Without a hook name the layer is the user's to give, never guessed."""
    saelens(tmp_path, metadata={})
    assert load_sae(tmp_path, layer=9).site == Site("layers.9")
    with pytest.raises(NeuronSelectError, match="layer="):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("folder", "site", "model"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", Site("layers.20"), "google/gemma-2-2b"),
        (
            "gemma-scope-9b-it-mlp/layer_3/width_131k/average_l0_5",
            Site("layers.3.post_feedforward_layernorm"),
            "google/gemma-2-9b",
        ),
        (
            "models--google--gemma-scope-27b-pt-att/snapshots/0a1b/layer_0/width_1m/average_l0_40",
            Site("layers.0.self_attn.o_proj", "input"),
            "google/gemma-2-27b",
        ),
    ],
)
def test_gemma_scope_sites(folder: str, site: Site, model: str, tmp_path: Path) -> None:
    """Gemma Scope says where it reads in its path only; its layer_i is block i."""
    sae = load_sae(gemma(tmp_path / folder))
    assert (sae.site, sae.model_name) == (site, model)


def test_gemma_scope_2_is_gemma_scope_in_other_files(tmp_path: Path) -> None:
    """The same encoder with lower-case names in safetensors; block and base model are told by the path."""
    one = gemma(tmp_path / "one" / "layer_1")
    with np.load(one / "params.npz") as archive:
        tensors = {name.replace("W_", "w_"): torch.from_numpy(archive[name]) for name in archive.files}
    root = tmp_path / "gemma-scope-2-1b-it"
    for layer in (1, 11, 17):
        folder = root / "resid_post_all" / f"layer_{layer}_width_16k_l0_big"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "params.safetensors")
    sae, x = load_sae(root, layer=1), golden("gemma_scope")[0]
    assert (sae.site, sae.model_name, sae.format) == (Site("layers.1"), "google/gemma-3-1b-it", "gemma_scope_2")
    np.testing.assert_array_equal(dense(sae, x), dense(load_sae(one), x))
    assert load_sae(root, layer=17).site == Site("layers.17")
    small = tmp_path / "gemma-scope-2-270m-pt" / "attn_out" / "layer_1_width_16k_l0_big"
    shutil.copytree(root / "resid_post_all" / "layer_1_width_16k_l0_big", small)
    with pytest.raises(NeuronSelectError, match="site attn_out is not supported"):
        load_sae(small)
    assert (
        load_sae(small.rename(tmp_path / "gemma-scope-2-270m-pt" / "renamed"), layer=4).model_name
        == "google/gemma-3-270m"
    )


def test_gemma_and_llama_scope_without_a_path_need_layer(tmp_path: Path) -> None:
    """A renamed folder no longer says its layer."""
    for folder in (gemma(tmp_path / "g"), llama(tmp_path / "l")):
        assert load_sae(folder, layer=2).site == Site("layers.2")
        with pytest.raises(NeuronSelectError, match="layer="):
            load_sae(folder)


def test_llama_scope_site(tmp_path: Path) -> None:
    """L15R is the output of block 15; a plain number as the dataset's norm means the same as its ``in``."""
    sae = load_sae(llama(tmp_path / LLAMA_NAME, dataset_average_activation_norm=2.5))
    assert (sae.site, sae.model_name) == (Site("layers.15"), "meta-llama/Llama-3.1-8B")
    x, expected = golden("llama_scope")
    np.testing.assert_allclose(dense(sae, x), expected, rtol=1e-6, atol=2e-6)


# ---------------------------------------------------------------------------- repositories, refusals
def test_layer_picks_one_of_several(tmp_path: Path) -> None:
    """The MLP's SAE of the same block, or layer_4 of the old naming, must not be taken for layers.4."""
    for name in ("layers.3", "layers.4", "layers.4.mlp", "layers.14"):
        sparsify(tmp_path / "new" / name)
    for name in ("layer_4", "layer_5"):
        sparsify(tmp_path / "old" / name)
    for root in ("new", "old"):
        assert load_sae(tmp_path / root, layer=4).site == Site("layers.4")
        with pytest.raises(NeuronSelectError, match="several SAEs: layer.*; name one folder"):
            load_sae(tmp_path / root)
    with pytest.raises(NeuronSelectError, match="several SAEs"):
        load_sae(tmp_path / "new", layer=5)


def test_two_seeds_are_not_chosen_between(tmp_path: Path) -> None:
    """Which of two seeds is meant is the user's to say; one seed alone is taken."""
    sparsify(tmp_path / "layers.1/seed0")
    sparsify(tmp_path / "layers.2/seed0")
    assert load_sae(tmp_path, layer=1).site == Site("layers.1")
    sparsify(tmp_path / "layers.1/seed1")
    with pytest.raises(NeuronSelectError, match="layers.1/seed0, layers.1/seed1"):
        load_sae(tmp_path, layer=1)


def cut(folder: Path, name: str, size: int) -> Path:
    """A download that broke off."""
    (folder / name).write_bytes((folder / name).read_bytes()[:size])
    return folder


NAN = {"b_dec": torch.tensor([0.0, float("nan"), 0.0])}
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "signed": (lambda p: sparsify(p / "layers.1", signed=True), "signed=true"),
    "activation": (lambda p: sparsify(p / "layers.1", activation="relu6"), "unknown sparsify activation 'relu6'"),
    "groups": (lambda p: sparsify(p / "layers.1", activation="groupmax", k=4), "divisible by k; 6 is not by 4"),
    "missing": (lambda p: sparsify(p / "layers.1", {"b_dec": None}), "tensors missing: b_dec; it has encoder.bias"),
    "nan": (lambda p: sparsify(p / "layers.1", NAN), "tensor b_dec has NaN"),
    "infinite": (lambda p: gemma(p / "layer_1", b_enc=np.full(6, np.inf)), "tensor b_enc has NaN or infinite"),
    "bias shape": (lambda p: sparsify(p / "layers.1", {"encoder.bias": torch.zeros(5)}), r"bias has shape \(5,\)"),
    "b_dec shape": (lambda p: sparsify(p / "layers.1", {"b_dec": torch.zeros(6)}), r"b_dec has shape \(6,\)"),
    "hookpoint": (lambda p: sparsify(p / "my-sae"), "does not say which layer it reads; name it with layer="),
    "truncated": (lambda p: cut(sparsify(p / "layers.1"), "sae.safetensors", 200), "cannot be read"),
    "truncated npz": (lambda p: cut(gemma(p / "layer_1"), "params.npz", 200), "cannot be read"),
    "truncated JSON": (lambda p: cut(sparsify(p / "layers.1"), "cfg.json", 9), "not valid JSON"),
    "architecture": (lambda p: saelens(p, architecture="spline"), "unknown SAELens architecture 'spline'"),
    "threshold": (lambda p: saelens(p, architecture="jumprelu"), "tensors missing: threshold"),
    "gates": (lambda p: saelens(p, architecture="gated"), "tensors missing: b_gate, b_mag, r_mag"),
    "norm": (lambda p: saelens(p, normalize_activations="rms"), "unknown normalize_activations 'rms'"),
    "hook": (lambda p: saelens(p, hook="blocks.1.attn.hook_z"), "hook 'blocks.1.attn.hook_z' is not supported"),
    "no decoder": (
        lambda p: saelens(p, "W_enc b_enc b_dec", architecture="topk", k=3, rescale_acts_by_decoder_norm=True),
        "needs W_dec",
    ),
    "MLP Llama Scope": (lambda p: llama(p / "Llama3_1-8B-Base-L15M-8x"), "site M is not supported"),
    "hyperparams": (lambda p: llama(p / LLAMA_NAME, dataset_average_activation_norm={}), "hyperparams.json lacks 'in'"),
    "no folder": (lambda p: p / "nowhere", "no such folder"),
    "empty": (lambda p: p, "no SAE found: needs one of sae.safetensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_message(name: str, tmp_path: Path) -> None:
    """Loaded anyway, these give wrong latents; refused without a name, a search of an hour."""
    build, message = REFUSED[name]
    with pytest.raises(NeuronSelectError, match=message) as caught:
        load_sae(build(tmp_path))
    assert caught.value.option == "sae"


def without(path: Path) -> Path:
    """A folder from which one file went missing."""
    path.unlink()
    return path.parent


DAMAGED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no config": (lambda p: without(sparsify(p / "layers.1") / "cfg.json"), "cfg.json"),
    "no k": (lambda p: sparsify(p / "layers.1", k=None), "k"),
    "k of zero": (lambda p: sparsify(p / "layers.1", k=0, activation="groupmax"), "k"),
    "SAELens topk without k": (lambda p: saelens(p, architecture="topk"), "k"),
    "old activation": (lambda p: saelens(p, activation_fn_str="tanh-relu"), "tanh-relu"),
    "empty npz": (lambda p: cut(gemma(p / "layer_1"), "params.npz", 0), "cannot be read"),
    "npz of text": (lambda p: gemma(p / "layer_1", b_dec=np.array(["a"])), "b_dec|cannot be read"),
    "threshold shape": (lambda p: gemma(p / "layer_1", threshold=np.zeros(1)), "threshold"),
    "flat weight": (lambda p: sparsify(p / "layers.1", {"encoder.weight": torch.zeros(18)}), "two dimensions"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_or_incomplete_files_are_refused(name: str, tmp_path: Path) -> None:
    """Neither a traceback, nor another SAE than the one trained."""
    build, message = DAMAGED[name]
    with pytest.raises(NeuronSelectError, match=message):
        load_sae(build(tmp_path))


def test_layer_of_a_gemma_scope_repository(tmp_path: Path) -> None:
    """Gemma Scope's layer_20 is block 20: layer=20 must not load block 21's SAE."""
    for number in (20, 21):
        gemma(tmp_path / f"gemma-scope-2b-pt-res/layer_{number}/width_16k/average_l0_71")
    assert load_sae(tmp_path / "gemma-scope-2b-pt-res", layer=20).site == Site("layers.20")


def test_groupmax_has_its_own_k(tmp_path: Path) -> None:
    """Another K is not what the SAE was trained for and cannot be cut into its groups."""
    sae = load_sae(WRITERS["sparsify_groupmax"](tmp_path))
    x, expected = golden("sparsify_groupmax")
    np.testing.assert_allclose(dense(sae, x, k=2), expected, rtol=1e-6, atol=2e-6)
    with pytest.raises(NeuronSelectError, match="one latent of each of its 2 groups"):
        dense(sae, x, k=3)


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    """A pickle from a Hub runs its author's code."""
    marker = tmp_path / "ran"
    folder = gemma(tmp_path / "layer_1", W_enc=np.array([Bomb(marker)], dtype=object))
    with pytest.raises(NeuronSelectError, match="cannot be read.*allow_pickle"):
        load_sae(folder)
    (tmp_path / "pt").mkdir()
    (tmp_path / "pt" / "ae.pt").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(NeuronSelectError, match="ae.pt is a pickle, which is never opened"):
        load_sae(tmp_path / "pt")
    assert not marker.exists()


# ----------------------------------------------------------------------- files by eai-sparsify itself
@pytest.mark.parametrize("transcode", [False, True], ids=["sae", "transcoder"])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_files_by_sparsify(activation: str, transcode: bool, tmp_path: Path) -> None:
    """What its own library writes and computes is the meaning of the format."""
    library = pytest.importorskip("sparsify")
    torch.manual_seed(0)
    cfg = library.SparseCoderConfig(
        activation=activation, num_latents=64, k=8, transcode=transcode, skip_connection=transcode
    )
    coder = library.SparseCoder(16, cfg)
    for parameter in coder.parameters():
        torch.nn.init.normal_(parameter)
    coder.save_to_disk(tmp_path / "layers.3.mlp")
    x = torch.randn(40, 16)
    with torch.no_grad():
        values, indices, _ = coder.encode(x)
    sae = load_sae(tmp_path / "layers.3.mlp")
    expected = torch.zeros(40, 64).scatter(1, indices, values).numpy()
    np.testing.assert_allclose(dense(sae, x), expected, rtol=1e-5, atol=1e-5)
    assert sae.site == Site("layers.3.mlp", "input" if transcode else "output")
    assert sae.notes == {"transcode": transcode, "skip_connection": transcode}


# ---------------------------------------------------------------------------------------- mutants
def relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0)


def keep(z: np.ndarray, k: int, by: np.ndarray | None = None) -> np.ndarray:
    """z where it is among its row's k largest of ``by`` (of z), 0 elsewhere."""
    ranks = np.argsort(np.argsort(-(z if by is None else by), axis=-1, kind="stable"), axis=-1)
    return np.where(ranks < k, z, 0)


def preactivations(weights: dict[str, Any], x: np.ndarray, b_pre: float = 1.0) -> np.ndarray:
    """``W (x - b_pre * b_dec) + b`` of the sparsify or SAELens weights."""
    ours = "encoder.weight" in weights
    weight = np.array(weights["encoder.weight"]).T if ours else np.array(weights["W_enc"])
    bias = np.array(weights["encoder.bias" if ours else "b_enc"])
    return (x - b_pre * np.array(weights.get("b_dec", 0.0))) @ weight + bias


def reference(name: str, mutant: str = "", x: np.ndarray | None = None) -> np.ndarray:
    """A format in plain numpy (of the golden tokens by default), with one thing broken where ``mutant`` names it."""
    x = golden(name)[0] if x is None else x
    if name == "llama_scope":
        decoder = np.array(LLAMA["decoder.weight"])
        if mutant == "W_dec transposed":
            decoder = decoder.reshape(6, 3).T
        n = 1.0 if mutant == "n_j dropped" else np.linalg.norm(decoder, axis=0)
        s = 1.0 if mutant == "dataset norm dropped" else 3**0.5 / LLAMA["dataset_average_activation_norm_in"]
        z = x @ np.array(LLAMA["encoder.weight"]).T + np.array(LLAMA["encoder.bias"]) / s
        threshold = 0 if mutant == "threshold dropped" else LLAMA["jump_relu_threshold"]
        return z * n * ((z if mutant == "threshold before n_j" else z * n) > threshold)
    subtracts = name not in ("sparsify_transcoder_topk", "saelens_jumprelu", "gemma_scope")
    b_pre = {"b_dec sign flipped": -1.0, "b_dec subtracted": 1.0, "b_dec dropped": 0.0}.get(mutant, float(subtracts))
    if name == "saelens_layer_norm_input":
        std = x.std(-1, ddof=0 if mutant == "biased std" else 1, keepdims=True)
        x = (x - x.mean(-1, keepdims=True)) / (std + 1e-5)
    if name == "saelens_constant_norm_rescale" and mutant != "norm dropped":
        x = x * 3**0.5 / np.linalg.norm(x, axis=-1, keepdims=True)
    z = preactivations(SPARSIFY if name.startswith("sparsify") else SAELENS, x, b_pre)
    if name == "sparsify_groupmax" and mutant != "top-k of the row":
        blocks = relu(z).reshape(-1, 2, 3)
        return np.where(blocks == blocks.max(-1, keepdims=True), blocks, 0).reshape(-1, 6)
    if name.startswith("sparsify"):
        if mutant == "ReLU dropped":
            return keep(z, 2)
        return relu(keep(z, 2, np.abs(z))) if mutant == "top-k by magnitude, then ReLU" else keep(relu(z), 2)
    if name.startswith("saelens_topk"):
        w_dec = np.array(SAELENS["W_dec"])
        w_dec = w_dec.reshape(3, 6).T if mutant == "W_dec transposed" else w_dec
        rescaled = name.endswith("rescaled") and mutant != "rescale dropped"
        scaled = z * (np.linalg.norm(w_dec, axis=-1) if rescaled else 1.0)
        return scaled * (keep(relu(z if mutant == "rescale after top-k" else scaled), 3) > 0)
    if name in ("saelens_jumprelu", "gemma_scope"):
        return relu(z) * (z > (0 if mutant == "threshold dropped" else np.array(SAELENS["threshold"])))
    if name == "saelens_gated":
        product = z - np.array(SAELENS["b_enc"])
        gate = product + np.array(GATES["b_gate"]) > 0
        scale = 1.0 if mutant == "r_mag dropped" else np.exp(GATES["r_mag"])
        return relu(product * scale + np.array(GATES["b_mag"])) * (1 if mutant == "gate dropped" else gate)
    return relu(z)


MUTANTS = {
    "sparsify_topk": ("b_dec sign flipped", "b_dec dropped", "ReLU dropped", "top-k by magnitude, then ReLU"),
    "sparsify_transcoder_topk": ("b_dec subtracted", "ReLU dropped"),
    "saelens_standard": ("b_dec sign flipped", "b_dec dropped"),
    "saelens_topk_rescaled": ("W_dec transposed", "rescale dropped", "b_dec sign flipped"),
    "saelens_jumprelu": ("threshold dropped", "b_dec subtracted"),
    "saelens_gated": ("b_dec sign flipped", "gate dropped", "r_mag dropped"),
    "saelens_layer_norm_input": ("b_dec sign flipped", "biased std"),
    "saelens_constant_norm_rescale": ("b_dec sign flipped", "norm dropped"),
    "gemma_scope": ("threshold dropped", "b_dec subtracted"),
    "llama_scope": ("n_j dropped", "dataset norm dropped", "W_dec transposed", "threshold before n_j"),
}
# Mutants the four golden tokens cannot tell from the right computation; TOKENS can.
UNSEEN = {
    "sparsify_groupmax": ("top-k of the row",),
    "saelens_topk_rescaled": ("rescale after top-k",),
    "llama_scope": ("threshold dropped",),
}


def pairs(mutants: dict[str, tuple[str, ...]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "mutant"), [(name, one) for name, all_ in mutants.items() for one in all_])


@pairs(MUTANTS)
def test_golden_numbers_tell_mutants_apart(name: str, mutant: str) -> None:
    """If a broken computation met the goldens too, passing them would show nothing."""
    expected = golden(name)[1]
    np.testing.assert_allclose(reference(name), expected, rtol=0, atol=1e-8)
    assert np.abs(reference(name, mutant) - expected).max() > 1e-2


@pairs(UNSEEN)
def test_more_tokens_tell_mutants_apart(name: str, mutant: str) -> None:
    """The same for what only :func:`test_more_tokens` would notice."""
    np.testing.assert_allclose(reference(name, mutant), golden(name)[1], rtol=0, atol=1e-8)
    assert np.abs(reference(name, mutant, TOKENS) - reference(name, x=TOKENS)).max() > 1e-2


def test_relu_and_top_k_swapped_changes_only_the_rejects() -> None:
    """ReLU before or after the choice is the same sum, so only a missing ReLU or |z| needs a mutant."""
    z = preactivations(SPARSIFY, golden("sparsify_topk")[0])
    for k in range(1, 7):
        np.testing.assert_array_equal(relu(keep(z, k)), keep(relu(z), k))
