"""A causal LM's loss on answers while features of an SAE are taken out of its activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..core import progress
from ..rows.encode import Sample
from .backbone import Backbone
from .batching import plan_batches
from .loss import evaluating, token_losses
from .sae import ROW_MULTIPLE, SparseAutoencoder
from .steering import activation_set, blocks_before, watched


@dataclass(frozen=True, eq=False)
class Activity:
    """How active features are on tokens.

    Attributes:
        size: float64 ``[m]``, the mean norm of what a feature adds to the activation. rate: float64 ``[m]``, the share of tokens on
            which it is active.
    """

    size: np.ndarray
    rate: np.ndarray


@dataclass(frozen=True, eq=False)
class AblatedLosses:
    """Losses without sets of features.

    Attributes:
        losses: float64 ``[1 + sets, n]``, nats an answer token; the first are of the model as it is.
        taken: float64 ``[sets]``, the mean over tokens of the norm of what is taken off, as a share of the activation's norm.
    """

    losses: np.ndarray
    taken: np.ndarray


class Ablation:
    """Takes what features add to the activation at an SAE's site off it, at every token: ``h - sum_f a_f(h) W_dec[f]``.

    ``a_f`` is the latent as the SAE keeps it (after top-k). What the SAE does not reconstruct stays as it is. The blocks
    before the site run once for all sets of features.

    Args:
        model: a causal LM. encoder: an SAE on the model's device. decoder: the same with its decoder. k: latents a token keeps.

    Raises:
        NeuronSelectError: the SAE cannot be decoded, or the model has no such site.
    """

    def __init__(self, model: Any, encoder: SparseAutoencoder, decoder: SparseAutoencoder, k: int | None) -> None:
        decoder.check_decodes()
        assert decoder.W_dec is not None
        self.model, self.encoder, self.k, self.site = model, encoder, k, decoder.site
        self.backbone = Backbone(model)
        self.module = self.backbone.resolve(self.site)
        self.before = blocks_before(self.backbone, self.module, self.site)
        self.W_dec = decoder.W_dec.to(encoder.W_enc.device).float()
        self._in_tuple = False  # whether blocks return tuples; seen when they first run

    def activity(self, samples: Sequence[Sample], batch_tokens: int) -> Activity:
        """How active each feature is on all tokens of rows."""
        m, total = self.encoder.num_latents, 0
        size, rate, norms = np.zeros(m), np.zeros(m), self.W_dec.norm(dim=1).double().cpu().numpy()
        for _, rows, hidden, _ in self._read(samples, batch_tokens):
            for x in self._tokens(hidden, rows):
                token, latent, value = self._active(x)
                adds = (value * self.encoder.scale(x)[token]).double().cpu().numpy()
                size += np.bincount(latent.cpu().numpy(), weights=adds, minlength=m)
                rate += np.bincount(latent.cpu().numpy(), minlength=m)
                total += len(x)
        return Activity(size * norms / max(total, 1), rate / max(total, 1))

    def losses(self, samples: Sequence[Sample], sets: Sequence[np.ndarray], batch_tokens: int) -> AblatedLosses:
        """The losses of rows' ``pooled`` tokens without each set of features.

        Args:
            sets: int64, features each. batch_tokens: padded tokens a batch; changes memory, not the result.
        """
        found = np.zeros((1 + len(sets), len(samples)))
        taken, total = np.zeros(len(sets)), 0
        members = [self._member(one) for one in sets]
        for batch, rows, hidden, base in self._read(samples, batch_tokens):
            found[0, batch] = base
            shape = (len(rows), -1, hidden.shape[-1])  # a site may have its tokens in one row
            removed = [torch.zeros_like(hidden, dtype=torch.float32).reshape(shape) for _ in sets]
            for i, x in enumerate(self._tokens(hidden, rows)):
                active, scale, norm = self._active(x), self.encoder.scale(x), x.norm(dim=-1).clamp_min(1e-30)
                for nth, member in enumerate(members):
                    off = self._added(active, member, scale)
                    removed[nth][i, : len(x)] = off
                    taken[nth] += float((off.norm(dim=-1) / norm).double().sum())
                total += len(x)
            for nth, off in enumerate(removed):
                without = (hidden.float() - off.reshape(hidden.shape)).to(hidden.dtype)
                with activation_set(self.before, self.module, self.site, without, self._in_tuple):
                    found[1 + nth, batch] = _means(*token_losses(self.model, rows), len(rows))
                progress.advance(sum(len(row.input_ids) for row in rows))
        return AblatedLosses(found, taken / max(total, 1))

    def _read(
        self, samples: Sequence[Sample], batch_tokens: int
    ) -> Iterator[tuple[list[int], list[Sample], torch.Tensor, np.ndarray]]:
        """Batches: numbers of the rows, the rows, the site's activation ``[B, L, d]``, the rows' losses ``[B]``."""
        with evaluating(self.model):
            for batch in plan_batches([len(sample.input_ids) for sample in samples], batch_tokens):
                rows = [samples[i] for i in batch]
                with watched(self.backbone, self.module, self.site) as seen:
                    losses = _means(*token_losses(self.model, rows), len(rows))
                progress.advance(sum(len(row.input_ids) for row in rows))
                self._in_tuple = seen.in_tuple
                yield list(batch), rows, seen.hidden, losses

    def _tokens(self, hidden: torch.Tensor, rows: Sequence[Sample]) -> Iterator[torch.Tensor]:
        """The activation at each row's own tokens, float32 ``[n, d]``."""
        whole = hidden.reshape(len(rows), -1, hidden.shape[-1])
        for i, row in enumerate(rows):
            yield whole[i, : len(row.input_ids)].to(self.W_dec.device).float()

    def _active(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token, latent and value of each latent that is active, token by token."""
        parts = []
        for start in range(0, len(x), self.encoder.chunk_tokens):
            part = x[start : start + self.encoder.chunk_tokens]
            # A matrix product of few rows rounds differently: pad to a multiple, as the signals do.
            values, indices = self.encoder.encode(F.pad(part, (0, 0, 0, -len(part) % ROW_MULTIPLE)), self.k)
            token, place = (values[: len(part)] > 0).nonzero(as_tuple=True)
            latent = place if indices is None else indices[token, place]
            parts.append((token + start, latent, values[token, place].float()))
        token, latent, value = (torch.cat(one) for one in zip(*parts, strict=True))
        return token, latent, value

    def _added(
        self, active: tuple[torch.Tensor, torch.Tensor, torch.Tensor], member: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """What features add at each token, float32 ``[n, d]``."""
        token, latent, value = active
        own = member[latent]
        token, latent, value = token[own], latent[own], value[own]
        found = torch.zeros(len(scale), self.W_dec.shape[1], device=self.W_dec.device)
        return found.index_add_(0, token, self.W_dec[latent] * (value * scale[token])[:, None])

    def _member(self, features: np.ndarray) -> torch.Tensor:
        found = torch.zeros(self.encoder.num_latents, dtype=torch.bool, device=self.W_dec.device)
        found[torch.as_tensor(features, dtype=torch.int64, device=found.device)] = True
        return found


def _means(losses: torch.Tensor, row_of: np.ndarray, rows: int) -> np.ndarray:
    """Nats an answer token of each row: float64 ``[rows]``."""
    return np.bincount(row_of, weights=losses.double().cpu().numpy(), minlength=rows) / np.bincount(
        row_of, minlength=rows
    )
