"""Read SAEs in the formats of eai-sparsify, SAELens, Gemma Scope (1 and 2) and Llama Scope.

Each reader turns a folder into the internal :class:`~.sae.SparseAutoencoder`. Files from a Hub are not trusted: weights
are only read from safetensors and npz (``allow_pickle=False``), configs from plain JSON.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..core.digests import SAE_FILES
from ..core.errors import NeuronSelectError
from ..core.folders import SAE
from ..core.sae_record import SAE_RECORD, read_record
from ..core.seals import CHECKSUMS, check_files
from ..core.writing import settle
from .npz import check_npz
from .sae import Site, SparseAutoencoder

MOST_BLOCKS = 512


def _refuse(path: Path, message: str) -> NeuronSelectError:
    return NeuronSelectError(message, option="sae", value=path.name)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _refuse(path, "is missing; download the SAE again") from error
    except (ValueError, RecursionError, OSError) as error:
        raise _refuse(path, f"not valid JSON ({error}); download the SAE again") from error
    if not isinstance(found, dict):
        raise _refuse(path, "a JSON object was expected")
    return found


def _tensors(path: Path, needed: tuple[str, ...]) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".npz":
            check_npz(path)
            with np.load(path, allow_pickle=False) as archive:
                tensors = {name: torch.from_numpy(archive[name]) for name in archive.files}
        else:
            tensors = load_file(path)
    except (
        SafetensorError,
        ValueError,
        TypeError,
        EOFError,
        OSError,
        RuntimeError,  # zip: encrypted, packed in a way that is not known
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
    ) as error:
        raise _refuse(path, f"the file cannot be read ({error}); download the SAE again") from error
    if absent := [name for name in needed if name not in tensors]:
        raise _refuse(path, f"tensors missing: {', '.join(absent)}; it has {', '.join(sorted(tensors))}")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise _refuse(path, f"tensor {name} has NaN or infinite values; download the SAE again")
    return tensors


def _positive(folder: Path, name: str, value: Any, kind: type = int) -> Any:
    """Check a config value that must be a number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or kind(value) != value:
        raise _refuse(
            folder, f"{name} is {value!r}; {'a whole number' if kind is int else 'a number'} above 0 is needed"
        )
    return kind(value)


def _unit(decoder: torch.Tensor) -> torch.Tensor:
    """Decoder rows ``[m, d]`` of norm 1, for latents that are multiplied by the norms; a latent without a row is always 0."""
    return decoder / decoder.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(decoder.dtype).tiny)


def _layer(folder: Path, layer: int | None) -> int:
    if layer is None:
        raise NeuronSelectError(
            "the file does not say which layer it reads; name it with layer=", option="sae", value=folder.name
        )
    return layer


# --------------------------------------------------------------------------------------- sparsify
def _sparsify(folder: Path, layer: int | None) -> SparseAutoencoder:
    cfg = _json(folder / "cfg.json")
    if cfg.get("signed"):
        raise _refuse(folder, "signed=true (no ReLU, top-k by magnitude) is a June 2024 format that is not supported")
    activation = cfg.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise _refuse(folder, f"unknown sparsify activation {activation!r}; topk and groupmax are supported")
    tensors = _tensors(folder / "sae.safetensors", ("encoder.weight", "encoder.bias", "b_dec"))
    transcode = bool(cfg.get("transcode", False))
    weight, k = tensors["encoder.weight"], _positive(folder, "k", cfg.get("k"))
    if activation == "groupmax" and weight.shape[0] % k:
        raise _refuse(folder, f"groupmax needs a latent count divisible by k; {weight.shape[0]} is not by {k}")
    return SparseAutoencoder(
        W_enc=weight,
        b_enc=tensors["encoder.bias"],
        b_pre=None if transcode else tensors["b_dec"],
        activation=activation,
        k=k,
        W_dec=tensors.get("W_dec"),
        b_dec=tensors["b_dec"],
        site=_sparsify_site(folder, transcode, layer),
        format="sparsify",
        notes={"transcode": transcode, "skip_connection": bool(cfg.get("skip_connection", False))},
    )


def _sparsify_site(folder: Path, transcode: bool, layer: int | None) -> Site:
    name = folder.name if not re.fullmatch(r"seed\d+", folder.name) else folder.parent.name
    if old := re.fullmatch(r"layer_(\d+)", name):
        # July 2024: layer_{i} = hidden_states[i] = the OUTPUT of block i - 1.
        number = int(old[1])
        name = f"layers.{number - 1}" if number else "embed_tokens"
    elif not re.fullmatch(r"(embed_tokens|wte|embed_in|(layers|h)\.\d+(\.[A-Za-z_]\w*)*)", name):
        name = f"layers.{_layer(folder, layer)}"
    return Site(name, "input" if transcode else "output")


# ---------------------------------------------------------------------------------------- SAELens
_HOOKS = {
    "hook_resid_post": ("", "output"),
    "hook_resid_pre": ("", "input"),
    "hook_mlp_out": (".mlp", "output"),
}


def _saelens_site(folder: Path, hook: str | None, layer: int | None) -> Site:
    if hook is None:
        return Site(f"layers.{_layer(folder, layer)}")
    match = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", hook)
    if not match or match[2] not in _HOOKS:
        raise _refuse(folder, f"hook {hook!r} is not supported; supported are blocks.N.{{{', '.join(_HOOKS)}}}")
    suffix, io = _HOOKS[match[2]]
    return Site(f"layers.{match[1]}{suffix}", io)


def _saelens(folder: Path, layer: int | None) -> SparseAutoencoder:
    cfg = _json(folder / "cfg.json")
    metadata = cfg.get("metadata") or {}
    architecture = cfg.get("architecture", "standard")
    k = cfg.get("k")
    if cfg.get("activation_fn_str") == "topk":  # flat keys, before version 6
        architecture, k = "topk", (cfg.get("activation_fn_kwargs") or {}).get("k")
    elif cfg.get("activation_fn_str", "relu") != "relu":
        raise _refuse(folder, f"unknown SAELens activation {cfg['activation_fn_str']!r}; relu and topk are supported")
    if architecture not in ("standard", "gated", "topk", "jumprelu", "transcoder"):
        raise _refuse(folder, f"unknown SAELens architecture {architecture!r}")
    needed: tuple[str, ...] = ("W_enc", "b_dec") if architecture == "gated" else ("W_enc", "b_enc", "b_dec")
    needed += {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("threshold",)}.get(architecture, ())
    tensors = _tensors(folder / "sae_weights.safetensors", needed)
    weight, w_dec = tensors["W_enc"].T.contiguous(), tensors.get("W_dec")
    bias = tensors.get("b_enc", torch.zeros(weight.shape[0], dtype=weight.dtype))
    b_dec = tensors["b_dec"]

    norm = cfg.get("normalize_activations") or "none"
    if norm == "expected_average_only_in":
        # x is scaled by s. Fold s into W_enc * s and b_dec / s; b_enc stays the same.
        scaler = folder / "activation_scaler.json"
        factor = _json(scaler).get("scaling_factor") if scaler.exists() else None
        factor = None if factor is None else _positive(folder, "scaling_factor", factor, float)
        if factor is None:
            raise _refuse(folder, "normalize_activations=expected_average_only_in without its scaling factor; fold it "
                                  "with SAELens (fold_activation_norm_scaling_factor) and save again")  # fmt: skip
        weight, b_dec = weight * factor, b_dec / factor
        w_dec = None if w_dec is None else w_dec / factor
        norm = "none"
    if norm not in ("none", "constant_norm_rescale", "layer_norm"):
        raise _refuse(folder, f"unknown normalize_activations {norm!r}")
    if architecture == "topk" and cfg.get("rescale_acts_by_decoder_norm"):
        if w_dec is None:
            raise _refuse(folder, "rescale_acts_by_decoder_norm needs W_dec, which is missing")
        scale = w_dec.norm(dim=-1)
        weight, bias, w_dec = weight * scale[:, None], bias * scale, _unit(w_dec)
    transcoder = architecture == "transcoder"
    subtract = cfg.get("apply_b_dec_to_input", not transcoder)
    activation = {"standard": "relu", "transcoder": "relu"}.get(architecture, architecture)
    return SparseAutoencoder(
        W_enc=weight,
        b_enc=bias,
        b_pre=b_dec if subtract else None,
        activation=activation,
        k=_positive(folder, "k", k) if activation == "topk" else None,
        threshold=tensors.get("threshold"),
        gate=(tensors["b_gate"], tensors["r_mag"], tensors["b_mag"]) if activation == "gated" else None,
        input_norm=norm,
        W_dec=w_dec,
        b_dec=b_dec,
        site=_saelens_site(folder, metadata.get("hook_name") or cfg.get("hook_name") or cfg.get("hook_point"), layer),
        model_name=metadata.get("model_name") or cfg.get("model_name"),
        format="saelens",
        notes={"transcode": transcoder},
    )


# ------------------------------------------------------------------------------------ Gemma Scope
def _gemma_scope(folder: Path, layer: int | None) -> SparseAutoencoder:
    """Gemma Scope: of Gemma 2."""
    tensors = _tensors(folder / "params.npz", ("W_enc", "b_enc", "threshold"))
    # .../gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71, in the Hub cache with a snapshot folder in between.
    # The innermost match counts, since folders above the repository have names of the user's choice.
    path = folder.absolute().as_posix()
    number = (re.findall(r"/layer_(\d+)(?=/|$)", path) or [None])[-1]
    kind = (re.findall(r"gemma-scope-[^/]*?-(res|mlp|att)(?=-|/|$)", path) or ["res"])[-1]
    index = int(number) if number else _layer(folder, layer)
    site = {
        "mlp": Site(f"layers.{index}.post_feedforward_layernorm"),
        "att": Site(f"layers.{index}.self_attn.o_proj", "input"),
    }.get(kind, Site(f"layers.{index}"))
    model = (re.findall(r"gemma-scope-(\d+b)", path) or [None])[-1]
    return SparseAutoencoder(
        W_enc=tensors["W_enc"].T.contiguous(),
        b_enc=tensors["b_enc"],
        activation="jumprelu",
        threshold=tensors["threshold"],
        W_dec=tensors.get("W_dec"),
        b_dec=tensors.get("b_dec"),
        site=site,
        model_name=f"google/gemma-2-{model}" if model else None,
        format="gemma_scope",
    )


def _gemma_scope_2(folder: Path, layer: int | None) -> SparseAutoencoder:
    """Gemma Scope 2: of Gemma 3, ``.../gemma-scope-2-1b-it/resid_post/layer_22_width_16k_l0_medium``."""
    path = folder.absolute().as_posix()
    kind = (re.findall(r"/(resid_post|attn_out|mlp_out|transcoder|crosscoder|clt)[^/]*/", path) or ["resid_post"])[-1]
    if kind != "resid_post":
        raise _refuse(folder, f"Gemma Scope 2 site {kind} is not supported; use one of resid_post or resid_post_all")
    tensors = _tensors(folder / "params.safetensors", ("w_enc", "b_enc", "threshold"))
    number = re.match(r"layer_(\d+)_width", folder.name)
    size, trained = (re.findall(r"gemma-scope-2-(\d+[mb])-(pt|it)", path) or [("", "")])[-1]
    name = f"google/gemma-3-{size}" + ("" if (size, trained) == ("270m", "pt") else f"-{trained}")
    return SparseAutoencoder(
        W_enc=tensors["w_enc"].T.contiguous(),
        b_enc=tensors["b_enc"],
        activation="jumprelu",
        threshold=tensors["threshold"],
        W_dec=tensors.get("w_dec"),
        b_dec=tensors.get("b_dec"),
        site=Site(f"layers.{int(number[1]) if number else _layer(folder, layer)}"),
        model_name=name if size else None,
        format="gemma_scope_2",
    )


# ------------------------------------------------------------------------------------ Llama Scope
def _llama_scope(folder: Path, layer: int | None) -> SparseAutoencoder:
    cfg = _json(folder / "hyperparams.json")
    tensors = _tensors(
        folder / "checkpoints" / "final.safetensors",
        ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"),
    )
    try:
        threshold = float(cfg["jump_relu_threshold"])
        average = cfg["dataset_average_activation_norm"]
        average = float(average["in"] if isinstance(average, dict) else average)
    except (KeyError, TypeError, ValueError) as error:
        raise _refuse(folder, f"hyperparams.json lacks {error}") from error
    weight, bias, decoder = tensors["encoder.weight"], tensors["encoder.bias"], tensors["decoder.weight"]
    factor = weight.shape[1] ** 0.5 / _positive(folder, "dataset_average_activation_norm.in", average, float)
    bias, w_dec = bias / factor, decoder.T.contiguous()
    if cfg.get("sparsity_include_decoder_norm", False):
        norms = decoder.norm(dim=0)
        weight, bias, w_dec = weight * norms[:, None], bias * norms, _unit(w_dec)
    match = re.search(r"L(\d+)([RAM])-\d+x", folder.name)
    if match and match[2] != "R":
        raise _refuse(folder, f"Llama Scope site {match[2]} is not supported; use an R (residual) SAE")
    index = int(match[1]) if match else _layer(folder, layer)
    return SparseAutoencoder(
        W_enc=weight,
        b_enc=bias,
        activation="jumprelu",
        threshold=torch.tensor(threshold),
        W_dec=w_dec,
        b_dec=tensors["decoder.bias"],
        site=Site(f"layers.{index}"),
        model_name="meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in folder.as_posix() else None,
        format="llama_scope",
    )


_READERS: dict[str, Callable[[Path, int | None], SparseAutoencoder]] = {
    "sae.safetensors": _sparsify,
    "sae_weights.safetensors": _saelens,
    "params.npz": _gemma_scope,
    "params.safetensors": _gemma_scope_2,
    "hyperparams.json": _llama_scope,
}


def _reader(folder: Path) -> Callable[[Path, int | None], SparseAutoencoder] | None:
    return next((reader for name, reader in _READERS.items() if (folder / name).is_file()), None)


def _is_layer(folder: Path, name: str, layer: int) -> bool:
    """Whether an SAE's folder name says that it reads block ``layer``; formats count blocks differently."""
    parts = name.split("/")
    if (folder / "params.npz").is_file():
        return f"layer_{layer}" in parts
    if (folder / "params.safetensors").is_file():
        return any(part.startswith(f"layer_{layer}_") for part in parts)
    if (folder / "hyperparams.json").is_file():
        return any(re.search(rf"L{layer}R-\d+x$", part) for part in parts)
    return bool({f"layers.{layer}", f"h.{layer}", f"layer_{layer + 1}", f"blocks.{layer}.hook_resid_post"} & set(parts))


def sae_folders(root: Path) -> list[tuple[Path, str, int | None]]:
    """The SAEs in or below a folder: folder, format and, if its name tells, the block it reads."""
    found = []
    for name, reader in _READERS.items():
        for folder in sorted(path.parent for path in (root.rglob(name) if root.is_dir() else ())):
            path = f"{root.name}/{folder.relative_to(root).as_posix()}"
            layer = next((number for number in range(MOST_BLOCKS) if _is_layer(folder, path, number)), None)
            found.append((folder, reader.__name__.removeprefix("_"), layer))
    return found


def find_folder(root: Path, layer: int | None) -> Path:
    """Find the SAE folder in or below ``root``, which may be a repository of several.

    Raises:
        NeuronSelectError: there is none, or several of which none is for that layer.
    """
    if not root.is_dir():
        raise NeuronSelectError("no such folder; check the path", option="sae", value=root.name)
    if _reader(root):
        return root
    found = sorted({p.parent for name in _READERS for p in root.rglob(name)}, key=lambda p: p.as_posix())
    if not found:
        pickled = sorted(p.name for pattern in ("*.pt", "*.pth", "*.bin", "*.pkl") for p in root.rglob(pattern))
        hint = f"; {pickled[0]} is a pickle, which is never opened" if pickled else ""
        raise NeuronSelectError(
            f"no SAE found: needs one of {', '.join(_READERS)}{hint}", option="sae", value=root.name
        )
    if len(found) == 1:
        return found[0]
    names = [p.relative_to(root).as_posix() for p in found]
    if layer is not None:
        exact = [p for p, name in zip(found, names, strict=True) if _is_layer(p, name, layer)]
        if len(exact) == 1:
            return exact[0]
    raise NeuronSelectError(
        f"several SAEs: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}; name one folder", option="sae",
        value=root.name,
    )  # fmt: skip


def load_sae(source: str | os.PathLike[str], *, layer: int | None = None) -> SparseAutoencoder:
    """Read an SAE from a local folder.

    Args:
        source: folder of one SAE, or of a repository from which ``layer`` picks one.
        layer: 0-based block; needed if the files do not name the layer they read.

    Raises:
        NeuronSelectError: no SAE or several, an unknown architecture, damaged or non-finite weights, files that are not
            those of its record.
    """
    root = Path(source)
    for place in (root, root.absolute().parent):
        settle(place, SAE, "sae")
    folder = find_folder(root, layer)
    check_files(folder, what=SAE.what, again=SAE.again, option="sae", value=folder.name)
    reader = _reader(folder)
    assert reader is not None
    try:
        sae = reader(folder, layer)
    except NeuronSelectError:
        raise
    except (AttributeError, TypeError, LookupError, ValueError, ArithmeticError, RuntimeError) as cause:
        reason = " ".join(str(cause).split())[:200]
        raise _refuse(folder, f"its configuration does not fit its weights ({reason}); download it again") from cause
    if sae.W_enc.ndim != 2:
        raise _refuse(folder, f"the encoder weight has shape {tuple(sae.W_enc.shape)}; two dimensions are needed")
    m, d = sae.W_enc.shape
    if sae.k is not None and sae.k > m:
        raise _refuse(folder, f"k is {sae.k} in its configuration; the SAE has {m} latents")
    for file in ("cfg.json", "hyperparams.json"):
        cfg = _json(folder / file) if (folder / file).is_file() else {}
        for name, size in (("d_sae", m), ("num_latents", m), ("d_in", d), ("d_model", d)):
            if cfg.get(name) not in (None, 0, size):  # 0: not said
                raise _refuse(folder, f"{name} is {cfg[name]!r} in its {file}; its encoder is [{m}, {d}]")
    shapes: list[tuple[str, torch.Tensor | None, set[tuple[int, ...]]]] = [
        ("encoder bias", sae.b_enc, {(m,)}),
        ("b_dec", sae.b_pre, {(d,)}),
        ("threshold", sae.threshold, {(), (m,)}),
    ]
    shapes += [("a gate tensor", gate, {(m,)}) for gate in sae.gate or ()]
    for name, tensor, allowed in shapes:
        if tensor is not None and tuple(tensor.shape) not in allowed:
            raise _refuse(folder, f"{name} has shape {tuple(tensor.shape)}; the encoder is [{m}, {d}]")
    return replace(sae, record=read_record(folder, folder.name))


def download_sae(source: str, *, revision: str | None, layer: int | None, token: str | bool | None) -> Path:
    """Download ``org/repo`` or ``org/repo/folder`` from the Hub, only the files an SAE needs."""
    parts = source.split("/")
    repo, folder = "/".join(parts[:2]), "/".join(parts[2:])
    if folder:
        prefixes = [f"{folder}/", f"{folder}/*/"]
    elif layer is not None:
        prefixes = ["", f"layers.{layer}/", f"h.{layer}/", f"layer_{layer + 1}/", f"layer_{layer}/*/",
                    f"blocks.{layer}.hook_resid_post/", f"*L{layer}R-*/"]  # fmt: skip
        prefixes += [f"{prefix}*/" for prefix in prefixes[1:4]]
    else:
        prefixes = ["", "*/"]
    patterns = [prefix + name for prefix in prefixes for name in (*SAE_FILES, CHECKSUMS, SAE_RECORD)]
    local = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, token=token))
    return local / folder if folder else local
