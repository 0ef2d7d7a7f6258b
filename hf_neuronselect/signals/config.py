"""What an extractor is made of: plain values, its identity, and nothing that is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..core.sources import Source
from .forward import Directions, FeatureOptions

VERSION = 1
"""Raised whenever a change moves a number: it is part of every extractor's hash."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ExtractorConfig:
    """Everything that changes a number; see the arguments of ``NeuronFeatureExtractor.from_pretrained``."""

    model: Source
    sae: Source | None
    features: tuple[str, ...]
    options: FeatureOptions
    pool_tokens: str
    max_length: int
    truncation_side: str
    row_format: str
    columns: tuple[tuple[str, str], ...]
    chat_template: str | None
    dtype: str
    quantize: str | None
    attn_implementation: str | None
    directions: Directions | None = None

    def numbers(self) -> dict[str, Any]:
        """What the hash is made of: identities instead of locations, in JSON's own types."""
        state = asdict(replace(self, directions=None)) | {"version": VERSION, "features": list(self.features)}
        del state["directions"]
        if self.directions is not None:
            state["directions"] = list(self.directions.vectors)  # the columns' names are hashes of the directions
        state["columns"] = [list(pair) for pair in self.columns]
        for key in ("model", "sae"):
            if state[key] is not None:
                del state[key]["location"]
                # A content hash says it all: the same files under another name give the same numbers.
                if ":" in state[key]["commit"]:
                    del state[key]["id"]
        return state

    @property
    def made(self) -> list[str]:
        """The features and projections whose columns are made."""
        return sorted(self.features) + list(self.directions.vectors if self.directions is not None else ())

    @property
    def computes(self) -> bool:
        """Whether any column needs the model."""
        return bool(self.features) or self.directions is not None

    def about(self) -> dict[str, Any]:
        """What provenance and cards say: :meth:`numbers` and, for what is local, its folder's name."""
        state = self.numbers()
        for key, source in (("model", self.model), ("sae", self.sae)):
            if source is not None:
                state[key] = {"id": source.id, "commit": source.commit}
        return state
