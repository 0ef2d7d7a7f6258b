"""Projections of a vector per block on fitted directions: one number a block instead of a vector."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..core.errors import NeuronSelectError
from ..models.backbone import Backbone, Observer
from ..models.batching import TokenBatch
from ..models.sae import Site, SparseAutoencoder
from .activations import EveryBlock
from .base import SIGNALS
from .extraction import Extraction
from .forward import ForwardSignal, Reducer


class Projection(ForwardSignal):
    """``x_l . v_l`` for every block l, float32 ``[blocks]``, in place of the vectors ``x_l``.

    A NAIT drift is ``blocks x width`` (512 kB a row at 8B); its score needs the products alone.

    Args:
        signal: which vectors are projected, e.g. ``nait``.
        directions: ``[blocks, width]``. normalize: divide each block's vector by its norm first.

    Attributes:
        name: the signal's and a hash of the directions, so a column cannot be taken for another capability's.
    """

    def __init__(self, signal: str, directions: np.ndarray, *, normalize: bool = False) -> None:
        of = SIGNALS[signal]()
        assert isinstance(of, EveryBlock)
        self.of, self.normalize = of, normalize
        self.marks = of.marks  # type: ignore[misc]
        self.directions = np.ascontiguousarray(directions, dtype=np.float64)
        hashed = hashlib.blake2b(f"{signal}\0{normalize}\0{self.directions.shape}\0".encode(), digest_size=8)
        hashed.update(self.directions.astype("<f8").tobytes())
        self.name = f"{signal}_on_{hashed.hexdigest()}"

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        return self.of.numbers(extraction)

    def start(
        self, batch: TokenBatch, backbone: Backbone, sae: SparseAutoencoder | None, extraction: Extraction
    ) -> tuple[list[tuple[Site, Observer]], Reducer]:
        if len(self.directions) != backbone.num_layers:
            raise NeuronSelectError(
                f"its directions are of {len(self.directions)} blocks, the model has {backbone.num_layers}: it belongs "
                "to another model", option="capability",
            )  # fmt: skip
        found: dict[int, torch.Tensor] = {}
        directions = torch.from_numpy(self.directions)

        def observer(layer: int) -> Observer:
            def observe(hidden: torch.Tensor) -> None:
                vector = self.of.vector(hidden, batch, extraction).cpu().double()
                if self.normalize:
                    vector = torch.nn.functional.normalize(vector, dim=-1, eps=1e-300)
                found[layer] = (vector @ directions[layer][None].T)[:, 0]

            return observe

        layers = range(backbone.num_layers)
        observers = [(self.of.site(backbone, layer, extraction), observer(layer)) for layer in layers]
        return observers, lambda: {
            self.name: list(torch.stack([found[layer] for layer in layers], dim=1).float().numpy())
        }
