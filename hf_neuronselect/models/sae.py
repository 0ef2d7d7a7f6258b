"""One internal form for sparse autoencoders of every format, and fast pooling of their latents.

The readers in :mod:`.sae_formats` return a :class:`SparseAutoencoder`; other modules never see a file format.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from ..core.errors import NeuronSelectError
from ..core.sae_record import SaeRecord

ACTIVATIONS = ("relu", "topk", "groupmax", "jumprelu", "gated")
INPUT_NORMS = ("none", "constant_norm_rescale", "layer_norm")
# Pre-activations computed at once, in elements: 4 M float32 take 16 MB, which fits caches.
CHUNK_ELEMENTS = 1 << 22
# A wide encoder would get few tokens a chunk and read all its weights for each chunk (with 131,072 latents, 64 tokens
# took nearly twice the time): so at least this many tokens, unless they take more than 64 M elements.
CHUNK_TOKENS, CHUNK_MOST = 512, 1 << 26
ROW_MULTIPLE = 64


@dataclass(frozen=True)
class Site:
    """A place in the base model where an activation is read.

    Attributes:
        module: dotted name inside the base model, e.g. ``layers.30`` or ``layers.10.mlp``.
        io: ``output`` or ``input`` of that module.
    """

    module: str
    io: str = "output"

    @property
    def block(self) -> int | None:
        """Number of the decoder block, 0-based; None before the first block."""
        return next((int(part) for part in self.module.split(".") if part.isdigit()), None)


def top_k(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row of nonnegative ``values``; ties go to the lower index.

    ``torch.topk`` breaks ties arbitrarily, so with equal values (frequent in bf16) the choice could depend on the shape
    of the batch. Asking for one value more shows rows where the k-th is tied; only those are repeated, with keys that
    make every element distinct.

    Args:
        values: ``[N, m]``, float32, bfloat16 or float16, >= 0.
        k: values kept of a row; all m if k is larger.

    Returns:
        values ``[N, min(k, m)]`` and int64 indices, in no particular order. A row of fewer than k positive values is
        filled with arbitrary zeros, which add nothing to a sum.
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
    # Nonnegative floats sort like their bit patterns read as integers. NaNs of either sign sort first, so they are kept
    # and noticed (the sign bit is masked: -0.0 is 0, and x86 produces negative NaNs).
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
    """The encoder of an SAE or transcoder.

    Computes ``z = W_enc (x - b_pre) + b_enc`` after the input norm, then the nonlinearity. A format's scale factors
    (decoder norms, dataset norms) are folded into ``W_enc`` and ``b_enc`` when it is loaded.

    Attributes:
        W_enc: ``[m, d]``. b_enc: ``[m]``. b_pre: ``[d]`` or None (not subtracted).
        activation: one of :data:`ACTIVATIONS`; ``topk`` and ``groupmax`` with ``k``.
        threshold: ``[m]`` or scalar tensor, for ``jumprelu``.
        gate: ``(b_gate, r_mag, b_mag)``, each ``[m]``, for ``gated``.
        input_norm: one of :data:`INPUT_NORMS`.
        W_dec: ``[m, d]`` or None, one row for a unit of each latent as :meth:`encode` gives it; b_dec: ``[d]`` or None.
        site: where its input is read. model_name: the base model it was trained on, if the file says so.
        record: what is known of its training, if its folder says so.
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
    record: SaeRecord | None = None

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
        """Copy the encoder to a device and dtype, without the decoder."""

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
        """Latents kept of a token: ``k``, else the SAE's own k, else None for every latent the nonlinearity leaves.

        Raises:
            NeuronSelectError: k is below 1, or differs from the k of a groupmax SAE.
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
        """Latents after the nonlinearity, before top-k: ``[N, d]`` -> ``[N, m]``, >= 0."""
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
        """Compute the latents kept of each token.

        Args:
            x: ``[N, d]``, cast to the weights' dtype.
            k: see :meth:`resolve_k`.

        Returns:
            ``(values [N, K], indices int64 [N, K])`` in no particular order; ``(values [N, m], None)`` without a top-k.
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
        """Sum the kept latents over each row's tokens, a chunk of tokens at a time.

        Args:
            x: ``[T, d]``, tokens of all rows. row: int64 ``[T]``, each token's row. rows: number of rows.
            k: see :meth:`resolve_k`.

        Returns:
            float32 ``[rows, m]``. Tokens are added in order, so a row's sum does not depend on the rest of its batch.
        """
        total = torch.zeros(rows * self.num_latents, device=x.device)
        step = chunk or self.chunk_tokens
        for start in range(0, len(x), step):
            part = x[start : start + step]
            # A matrix product of few rows takes another code path and rounds differently: pad to a multiple.
            whole = F.pad(part, (0, 0, 0, -len(part) % ROW_MULTIPLE))
            values, indices = self.encode(whole, k)
            values, indices = values[: len(part)], None if indices is None else indices[: len(part)]
            owner = row[start : start + step]
            if indices is None:
                total.view(rows, -1).index_add_(0, owner, values.float())
            else:
                total.scatter_add_(0, (indices + owner[:, None] * self.num_latents).flatten(), values.float().flatten())
        return total.view(rows, self.num_latents)

    def directions(self, latents: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Vectors that one unit of each latent adds to the activation ``x`` in the reconstruction of it.

        Args:
            latents: int64 ``[F]``. x: ``[d]``; an input norm's scale is undone as it is of this activation.

        Returns:
            float32 ``[F, d]``.

        Raises:
            NeuronSelectError: the file has no decoder, or it decodes another activation than it reads (a transcoder).
        """
        self.check_decodes()
        assert self.W_dec is not None
        return self.W_dec[latents.to(self.W_dec.device)].to(x.device).float() * self.scale(x.float()[None])

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """What undoes the input norm of activations: float32 ``[N, d]`` -> ``[N]``."""
        if self.input_norm == "constant_norm_rescale":
            return x.norm(dim=-1) / x.shape[-1] ** 0.5
        return x.std(dim=-1) if self.input_norm == "layer_norm" else torch.ones(len(x), device=x.device)

    def check_decodes(self) -> None:
        """Refuse an SAE that cannot reconstruct the activation it reads.

        Raises:
            NeuronSelectError: the file has no decoder, or it is a transcoder.
        """
        if self.W_dec is None:
            raise NeuronSelectError("this SAE file has no decoder (W_dec); name an SAE that has one", option="sae")
        if self.notes.get("transcode"):
            raise NeuronSelectError(
                f"is a transcoder: its latents write elsewhere than {self.site.module}, which they read; name an SAE",
                option="sae",
            )

    def decode(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Reconstruct ``[N, d]`` from ``[N, K]`` values and indices (for inspection only; an input norm is not undone).

        Raises:
            NeuronSelectError: the file has no decoder.
        """
        if self.W_dec is None:
            raise NeuronSelectError("this SAE file has no decoder (W_dec)", option="sae")
        out = (self.W_dec[indices].float() * values[..., None].float()).sum(dim=1)
        return out if self.b_dec is None else out + self.b_dec.float()
