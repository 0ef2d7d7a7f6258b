"""Where the features of an SAE fire, token by token, in rows that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..core.errors import NeuronSelectError
from ..core.progress import track
from ..models.batching import TokenBatch, plan_batches
from ..rows.formats import Conversation
from ..signals.activations import Mona
from ..signals.extractor import NeuronFeatureExtractor

_BATCH = 64


@dataclass(frozen=True)
class Firings:
    """Where features fire.

    Attributes:
        token, row: int64 ``[n]``, each token's id and row, in order. rows: how many rows.
        place, latent: int64 ``[f]``, the tokens' places in these, and the features that fire there; strength: float32 ``[f]``.
    """

    token: np.ndarray
    row: np.ndarray
    place: np.ndarray
    latent: np.ndarray
    strength: np.ndarray

    @property
    def rows(self) -> int:
        return int(self.row[-1]) + 1 if len(self.row) else 0


def firings_of(
    extractor: NeuronFeatureExtractor, rows: Iterable[Conversation], tokens: int, only: Sequence[int] | None = None
) -> Firings:
    """Run the model over rows until there are enough tokens.

    Args:
        only: features whose firings are kept; default all.

    Raises:
        NeuronSelectError: no row can be read.
    """
    engine = extractor.forward
    backbone, sae = engine.loaded([Mona()])
    assert sae is not None
    asked = None if only is None else torch.as_tensor(only, device=backbone.device)
    parts: list[list[np.ndarray]] = [[], [], [], [], []]
    done = number = 0
    left = iter(rows)
    with track("labels", None) as progress:
        while done < tokens and (read := list(islice(left, _BATCH))):
            samples = [one for one in engine.read(read, ()) if not one.skip]
            found: dict[int, list[np.ndarray]] = {}
            for chosen in plan_batches([len(one.input_ids) for one in samples], engine.token_budget(backbone)):
                batch = TokenBatch.of([samples[i] for i in chosen], 0, backbone.device)
                seen: list[tuple[np.ndarray, ...]] = []

                def observe(hidden: torch.Tensor, batch: TokenBatch = batch, seen: list[Any] = seen) -> None:
                    vectors = batch.pooled.vectors(hidden)
                    for at in range(0, len(vectors), sae.chunk_tokens):
                        values, indices = sae.encode(
                            vectors[at : at + sae.chunk_tokens], extractor.extraction.options.top_k_features
                        )
                        token, column = (values > 0).nonzero(as_tuple=True)
                        latent = column if indices is None else indices[token, column]
                        fires = (token + at, latent, values[token, column].float())
                        if asked is not None:
                            kept = torch.isin(latent, asked)
                            fires = (fires[0][kept], fires[1][kept], fires[2][kept])
                        seen.append(tuple(one.cpu().numpy() for one in fires))

                backbone.run(batch, [(sae.site, observe)])
                token, latent, strength = (np.concatenate(one) for one in zip(*seen, strict=True))
                owner = batch.pooled.row.cpu().numpy()
                first = np.searchsorted(owner, np.arange(len(chosen)))
                ends = np.searchsorted(token, np.append(first, len(owner)))
                for j, i in enumerate(chosen.tolist()):
                    span = slice(ends[j], ends[j + 1])
                    found[i] = [token[span] - first[j], latent[span], strength[span]]
            for i, sample in enumerate(samples):
                if done >= tokens:
                    break
                ids = sample.input_ids[sample.pooled]
                token, latent, strength = found[i]
                new = (ids, np.full(len(ids), number), token + done, latent, strength)
                for part, one in zip(parts, new, strict=True):
                    part.append(one)
                done, number = done + len(ids), number + 1
            progress.done(len(samples))
    if not done:
        raise NeuronSelectError("no row can be read; give others", option="pool")
    token, row, place, latent, strength = (np.concatenate(part) for part in parts)
    return Firings(token, row, place, latent.astype(np.int64), strength.astype(np.float32))


def terms_of(tokenizer: Any) -> list[str]:
    """Token id -> its text as a word of a label, without case and spaces; "" for a part of a character."""
    found = []
    for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))]):
        word = "" if "\ufffd" in text else text.strip().casefold()
        found.append(word or ("" if "\ufffd" in text or not text else "⏎" if "\n" in text else "␣"))
    return found
