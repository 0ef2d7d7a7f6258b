"""What single tokens of a row add to its signals, computed by the code that computes the signals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..core.errors import NeuronSelectError
from ..models.backbone import Observer
from ..models.batching import MarkedTokens, TokenBatch
from ..models.sae import Site
from ..rows.encode import Sample
from ..rows.formats import Conversation
from .activations import EveryBlock
from .base import SIGNALS
from .columns import RowBatch
from .extractor import NeuronFeatureExtractor
from .forward import ForwardSignal

STEP = 256
"""Tokens whose units are in memory at once: 134 MB with 131,072 latents."""


@dataclass(frozen=True)
class TokenValues:
    """Numbers of a row's tokens.

    Attributes:
        input_ids: int64 ``[n]``, all tokens of the row, as far as the model reads it.
        places: int64 ``[t]``, those that have a number. values: float64 ``[t, columns]``.
    """

    input_ids: np.ndarray
    places: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class _EachToken(TokenBatch):
    """A batch of one row in which every pooled token is pooled by itself."""

    @property
    def size(self) -> int:
        return len(self.pooled.token)


def unit_values(
    extractor: NeuronFeatureExtractor, conversation: Conversation, signal: str, units: Sequence[int]
) -> TokenValues:
    """How strong units of a sparse signal are on each pooled token; their mean over tokens is the row's value.

    Args:
        signal: ``mona`` or another sparse signal. units: latents or neurons, the columns of the result.

    Raises:
        NeuronSelectError: the row has no tokens.
    """
    reader = SIGNALS[signal]()
    assert isinstance(reader, ForwardSignal)
    sample, batch = _read(extractor, conversation, reader)
    backbone, sae = extractor.forward.loaded([reader])
    places = np.flatnonzero(sample.pooled)
    found = np.zeros((len(places), len(units)))
    order = np.argsort(np.asarray(units, np.int64), kind="stable")
    sought = np.asarray(units, np.int64)[order]
    observers: list[tuple[Site, Observer]] = []

    def add(rows: slice) -> None:
        """Observe some of the tokens; their dense values are reduced at once, so that few are ever in memory."""
        own = _each(batch, places[rows])
        ((site, observe),), reduce = reader.start(own, backbone, sae, extractor.extraction)

        def seen(hidden: torch.Tensor) -> None:
            observe(hidden)
            sparse = RowBatch(np.arange(own.size), np.ones(own.size, bool), reduce()).sparse(signal)
            token = np.repeat(np.arange(own.size), np.diff(sparse.indptr))
            at = np.flatnonzero(np.isin(sparse.indices, sought))
            found[rows][token[at], order[np.searchsorted(sought, sparse.indices[at])]] = sparse.values[at]

        observers.append((site, seen))

    for start in range(0, len(places), STEP):
        add(slice(start, start + STEP))
    backbone.run(batch, observers)
    return TokenValues(sample.input_ids, places, found)


def moved_values(
    extractor: NeuronFeatureExtractor, conversation: Conversation, signal: str, weights: np.ndarray,
    offset: np.ndarray | None = None,
) -> TokenValues:  # fmt: skip
    """What each token adds to ``sum_l (x_l - o_l) . w_l``, where ``x_l`` is a signal with a vector per block.

    Args:
        weights, offset: float64 ``[blocks, width]``.

    Raises:
        NeuronSelectError: the row has no tokens, or none that the signal reads.
    """
    reader = SIGNALS[signal]()
    assert isinstance(reader, EveryBlock)
    sample, batch = _read(extractor, conversation, reader)
    backbone, _ = extractor.forward.loaded([reader])
    places, total = reader.read_tokens(sample), np.zeros(len(sample.input_ids))
    if not len(places):
        raise NeuronSelectError(f"the row has no {', '.join(reader.marks)} token", option="row")

    def observer(weight: np.ndarray) -> Observer:
        along = torch.from_numpy(np.ascontiguousarray(weight)).to(backbone.device)
        wide = along.double() if backbone.device.type != "mps" else along.float()  # it has no float64

        def observe(hidden: torch.Tensor) -> None:
            total[:] += (hidden[0].to(wide.dtype) @ wide).double().cpu().numpy()

        return observe

    sites = [reader.site(backbone, layer, extractor.extraction) for layer in range(backbone.num_layers)]
    backbone.run(batch, [(site, observer(weights[layer])) for layer, site in enumerate(sites)])
    projected = total[places] - (0.0 if offset is None else float((offset * weights).sum()))
    return TokenValues(sample.input_ids, places, reader.token_parts(projected, extractor.extraction)[:, None])


def _read(
    extractor: NeuronFeatureExtractor, conversation: Conversation, reader: ForwardSignal
) -> tuple[Sample, TokenBatch]:
    """The row's tokens, as the score reads them, and a batch of it alone."""
    sample = extractor.forward.read([conversation], [reader])[0]
    if sample.skip:
        raise NeuronSelectError(f"the row has no tokens ({sample.skip})", option="row")
    backbone, _ = extractor.forward.loaded([reader])
    return sample, TokenBatch.of([sample], 0, backbone.device)


def _each(batch: TokenBatch, places: np.ndarray) -> _EachToken:
    device = batch.input_ids.device
    token = torch.from_numpy(places).to(device)
    row, one = torch.arange(len(places), device=device), torch.ones(len(places), device=device)
    return _EachToken(batch.input_ids, batch.last, MarkedTokens(token, row, one, token, token), batch.marks)
