"""The tokens that an SAE is trained on, and those it is measured on, from rows of any format."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, IterableDataset

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..rows.encode import SampleEncoder
from ..selection.reader import Reader
from .token_rows import TokenRows

HELD_OUT, HELD_TOKENS = 10, 200_000  # every tenth row is kept to measure on, up to so many tokens
# Different tokens that a latent needs: with so many, the SAE of recipes/smollm2 leaves 0.3 of the variance unexplained.
PER_LATENT = 200


@dataclass
class SaeRows:
    """Rows as token ids.

    Attributes:
        train, held_out: cut into pieces. rows: how many were used. left_out: reasons of the others, with their numbers.
    """

    train: TokenRows
    held_out: TokenRows
    rows: int
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def digest(self) -> str:
        """32 hex digits of the tokens that are trained on."""
        hashed = hashlib.blake2b(digest_size=16)
        for part in (self.train.ids, self.train.starts):
            hashed.update(np.ascontiguousarray(part).tobytes())
        return hashed.hexdigest()


def gather_rows(
    data: Dataset | IterableDataset, encoder: SampleEncoder, *, tokens: int, context: int, seed: int = 0,
    name: str | None = None,
) -> SaeRows:  # fmt: skip
    """Read rows until there are as many tokens as are trained on, or no more rows.

    A data set is read in an order drawn by the seed, a stream as it comes. Equal rows count once, so that none is both
    trained on and measured on.

    Args:
        encoder: without a limit of length. context: tokens of a piece. name: of the pool, in errors.

    Raises:
        NeuronSelectError: fewer than two different rows can be used, or a stream that breaks off.
    """
    if isinstance(data, Dataset):
        data = data.select(np.random.default_rng(seed).permutation(len(data)))
    kept: list[list[np.ndarray]] = [[], []]  # trained on, measured on
    counts = [0, 0]
    left_out: Counter[str] = Counter()
    seen: set[bytes] = set()
    for ids in _ids(data, encoder, left_out, name):
        digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
        if digest in seen:
            left_out["the same as another row"] += 1
            continue
        seen.add(digest)
        held = len(seen) % HELD_OUT == 2 and counts[1] < HELD_TOKENS
        kept[held].append(ids)
        counts[held] += len(ids)
        if counts[0] >= tokens and counts[1]:
            break
    train, held_out = (TokenRows.of(part, context) for part in kept)
    if not (train.usable and held_out.usable):
        reasons = _listed(left_out)
        raise NeuronSelectError(
            f"has too few rows: one to train on and one to measure on are needed{f'; left out: {reasons}' if reasons else ''}",
            option="pool", value=name,
        )  # fmt: skip
    return SaeRows(train, held_out, len(seen), left_out)


def foresee(rows: SaeRows, latents: int, k: int, tokens: int) -> str:
    """What will be trained on, in words; warns where it is too little for so many latents."""
    there = min(rows.train.usable, tokens)
    needed = PER_LATENT * latents
    if there < needed:
        mends = ["more rows, or --streaming" if there < tokens else "more --tokens"]
        if there // PER_LATENT > 2 * k:
            mends.append(f"fewer latents (--latents {there // PER_LATENT})")
        dead = 100 * dead_share(there, latents, k)
        expected = f"{dead:.0f} % of them dead and " if dead >= 1 else ""
        warnings.warn(
            f"{there:,} different tokens are few for {latents:,} latents, which need about {needed:,}: expect {expected}an "
            f"SAE that knows these rows only; mend: {', or '.join(mends)}",
            NeuronSelectWarning, stacklevel=3,
        )  # fmt: skip
    left = f", {rows.left_out.total():,} left out ({_listed(rows.left_out)})" if rows.left_out else ""
    return f"{rows.rows:,} rows{left}: {rows.train.usable:,} tokens to train on, each seen {tokens / rows.train.usable:.3g} times"


def dead_share(tokens: int, latents: int, k: int) -> float:
    """Share of latents that are expected never to fire: each token gives k of them a chance, and most go to some of them.

    On the bundled model, 5 chances a latent left 20 % of 20,480 latents dead, 19 left 0.1 %.
    """
    return math.exp(-tokens * k / latents / 3)


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(3))


def _ids(
    data: Dataset | IterableDataset, encoder: SampleEncoder, left_out: Counter[str], name: str | None
) -> Iterator[np.ndarray]:
    for batch in Reader((), None, {}, name=name).read(data):
        for sample in encoder.encode(batch.conversations):
            if sample.skip:
                left_out[sample.skip.removeprefix("error: ")] += 1
            else:
                yield sample.input_ids.astype(np.int32)
