"""Sparse autoencoders in one internal form, and the fast way from activations to pooled latents.

Every format of :mod:`.sae_formats` becomes a :class:`SparseAutoencoder`; nothing outside that
module knows where the weights came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from ..core.errors import NeuronSelectError

ACTIVATIONS = ("relu", "topk", "groupmax", "jumprelu", "gated")
INPUT_NORMS = ("none", "constant_norm_rescale", "layer_norm")
# Pre-activations held at once, in elements: 4 M float32 = 16 MB, which stays near the caches.
CHUNK_ELEMENTS = 1 << 22
# Of a wide encoder that is few tokens, and its weights are read once a chunk: so many tokens then (131,072 latents: 64 took
# nearly twice the time), as long as they take no more than 64 M elements.
CHUNK_TOKENS, CHUNK_MOST = 512, 1 << 26
ROW_MULTIPLE = 64


@dataclass(frozen=True)
class Site:
    """A place in the base model an activation is read from.

    Attributes:
        module: dotted name inside the base model, e.g. ``layers.30`` or ``layers.10.mlp``.
        io: ``output`` or ``input`` of that module.
    """

    module: str
    io: str = "output"

    @property
    def block(self) -> int | None:
        """The decoder block it lies in, 0-based; None before the first."""
        return next((int(part) for part in self.module.split(".") if part.isdigit()), None)


def top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row of nonnegative ``values``, exactly, ties to the lower index.

    ``torch.topk`` breaks ties arbitrarily, so equal values (frequent in bf16) could be chosen by the
    batch's shape. One value more tells where the k-th is tied; only those rows are done again, with
    keys that make every element distinct.

    Args:
        values: ``[N, m]``, float32, bfloat16 or float16, >= 0.
        k: at most m are returned.

    Returns:
        values ``[N, min(k, m)]`` and int64 indices, in no particular order. Which zeros fill up a row
        of fewer than k positive values is not defined: they add nothing.
    """
    n, m = values.shape
    if k >= m:
        return values, torch.arange(m, device=values.device).expand(n, m)
    found, indices = torch.topk(values, k + 1, dim=-1)
    tied = ((found[:, k - 1] == found[:, k]) & (found[:, k] > 0)).nonzero().flatten()
    found, indices = found[:, :k], indices[:, :k]
    if len(tied):
        again = _top_k_keys(values[tied], k)
        found, indices = found.clone(), indices.clone()
        indices[tied] = again
        found[tied] = values[tied].gather(1, again)
    return found, indices


def _top_k_keys(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest nonnegative values, ties to the lower index: ``[N, m]`` -> ``[N, k]``."""
    m = values.shape[1]
    # Nonnegative floats order like their bit patterns read as integers; NaNs of either sign come first, so that
    # they are kept and seen (the sign bit is masked: -0.0 is 0, and x86 makes negative NaNs).
    if values.dtype in (torch.bfloat16, torch.float16) and m <= 1 << 16:
        bits = (values.view(torch.int16).to(torch.int32) & 0x7FFF) << 16
        low = (1 << 16) - 1
    else:
        bits = (values.float().view(torch.int32).to(torch.int64) & 0x7FFFFFFF) << 32
        low = (1 << 32) - 1
    keys = bits | (low - torch.arange(m, device=values.device)).to(bits.dtype)
    return torch.topk(keys, k, dim=-1, sorted=False).indices


@dataclass(frozen=True)
class SparseAutoencoder:
    """An SAE (or transcoder) encoder, ready to use.

    ``z = W_enc (x - b_pre) + b_enc`` after the input norm; then the nonlinearity. Scale factors of
    a format (decoder norms, dataset norms) are folded into ``W_enc`` and ``b_enc`` at load.

    Attributes:
        W_enc: ``[m, d]``. b_enc: ``[m]``. b_pre: ``[d]`` or None (not subtracted).
        activation: one of :data:`ACTIVATIONS`; ``topk`` and ``groupmax`` with ``k``.
        threshold: ``[m]`` or scalar tensor, for ``jumprelu``.
        gate: ``(b_gate, r_mag, b_mag)``, each ``[m]``, for ``gated``.
        input_norm: one of :data:`INPUT_NORMS`.
        W_dec: ``[m, d]`` or None, b_dec ``[d]`` or None: only for inspection.
        site: what it reads. model_name: the base model it was trained on, where the file says so.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    site: Site
    activation: str
    k: int | None = None
    b_pre: torch.Tensor | None = None
    threshold: torch.Tensor | None = None
    gate: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    input_norm: str = "none"
    W_dec: torch.Tensor | None = None
    b_dec: torch.Tensor | None = None
    model_name: str | None = None
    format: str = ""
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def num_latents(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def chunk_tokens(self) -> int:
        """Tokens encoded at once."""
        m = self.num_latents
        return max(ROW_MULTIPLE, CHUNK_ELEMENTS // m, min(CHUNK_TOKENS, CHUNK_MOST // m))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> SparseAutoencoder:
        """The encoder on a device and in a dtype; the decoder stays behind."""

        def put(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, dtype)

        gate = None
        if self.gate is not None:
            b_gate, r_mag, b_mag = (tensor.to(device, dtype) for tensor in self.gate)
            gate = (b_gate, r_mag, b_mag)
        return replace(
            self,
            W_enc=self.W_enc.to(device, dtype).contiguous(),
            b_enc=self.b_enc.to(device, dtype),
            b_pre=put(self.b_pre),
            threshold=put(self.threshold),
            gate=gate,
            W_dec=None,
            b_dec=None,
        )

    def resolve_k(self, k: int | None) -> int | None:
        """How many latents a token keeps: explicit K, else the SAE's own, else all its nonlinearity leaves.

        Raises:
            NeuronSelectError: K below 1, or another K than a groupmax SAE's own.
        """
        if k is not None and k < 1:
            raise NeuronSelectError("must be at least 1", option="top_k_features", value=k)
        if self.activation == "groupmax":
            if k not in (None, self.k):
                raise NeuronSelectError(
                    f"a groupmax SAE keeps one latent of each of its {self.k} groups; leave K unset",
                    option="top_k_features",
                    value=k,
                )
            return self.k
        return k if k is not None else (self.k if self.activation == "topk" else None)

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        if self.input_norm == "constant_norm_rescale":
            x = x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True))
        elif self.input_norm == "layer_norm":
            x = (x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True) + 1e-5)
        return x if self.b_pre is None else x - self.b_pre

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """All latents after the nonlinearity, before any top-k: ``[N, d]`` -> ``[N, m]``, >= 0."""
        x = self._normalised(x.to(self.W_enc.dtype))
        if self.activation == "gated":
            assert self.gate is not None
            b_gate, r_mag, b_mag = self.gate
            product = F.linear(x, self.W_enc)
            return F.relu(product * r_mag.exp() + b_mag) * (product + b_gate > 0)
        z = F.linear(x, self.W_enc, self.b_enc)
        if self.activation == "jumprelu":
            assert self.threshold is not None
            return F.relu(z) * (z > self.threshold)
        return z.relu_()

    def encode(self, x: torch.Tensor, k: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Kept latents of each token.

        Args:
            x: ``[N, d]``, cast to the weights' dtype.
            k: see :meth:`resolve_k`.

        Returns:
            ``(values [N, K], indices int64 [N, K])``, in no order; or ``(values [N, m], None)`` when
            the nonlinearity alone decides what stays.
        """
        keep, acts = self.resolve_k(k), self.activations(x)
        if self.activation == "groupmax":
            groups = acts.unflatten(-1, (keep, -1))
            values, within = groups.max(dim=-1)
            offsets = torch.arange(groups.shape[1], device=acts.device) * groups.shape[2]
            return values, within + offsets
        if keep is None:
            return acts, None
        return top_k(acts, keep)

    def sum_rows(
        self, x: torch.Tensor, row: torch.Tensor, rows: int, k: int | None = None, chunk: int | None = None
    ) -> torch.Tensor:
        """Add the kept latents of each row's tokens up, a chunk of tokens at a time.

        Args:
            x: ``[T, d]``, tokens of all rows. row: int64 ``[T]``. rows: number of rows.
            k: see :meth:`resolve_k`.

        Returns:
            float32 ``[rows, m]``. Tokens are added in their order, so a row's sum does not depend
            on the batch it stood in.
        """
        total = torch.zeros(rows * self.num_latents, device=x.device)
        step = chunk or self.chunk_tokens
        for start in range(0, len(x), step):
            part = x[start : start + step]
            # A matrix product of few rows takes another path and rounds differently: fill up.
            whole = F.pad(part, (0, 0, 0, -len(part) % ROW_MULTIPLE))
            values, indices = self.encode(whole, k)
            values, indices = values[: len(part)], None if indices is None else indices[: len(part)]
            owner = row[start : start + step]
            if indices is None:
                total.view(rows, -1).index_add_(0, owner, values.float())
            else:
                total.scatter_add_(0, (indices + owner[:, None] * self.num_latents).flatten(), values.float().flatten())
        return total.view(rows, self.num_latents)

    def decode(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Reconstruction from ``[N, K]`` values and indices -> ``[N, d]`` (inspection only).

        Raises:
            NeuronSelectError: the file holds no decoder.
        """
        if self.W_dec is None:
            raise NeuronSelectError("this SAE file holds no decoder (W_dec)", option="sae")
        out = (self.W_dec[indices].float() * values[..., None].float()).sum(dim=1)
        return out if self.b_dec is None else out + self.b_dec.float()
