"""``training.json`` beside an SAE: what it was trained on, how good it is, and what that means in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .errors import NeuronSelectError
from .folders import SAE
from .provenance import Value
from .seals import CHECKSUMS, read

SAE_RECORD = "training.json"
GOOD_FVU, USABLE_FVU = 0.3, 0.5
GOOD_DEAD, USABLE_DEAD = 0.1, 0.2
Quality = Literal["good", "usable", "poor"]


@dataclass(frozen=True, kw_only=True)
class SaeRecord:
    """What is known of an SAE, as :func:`read_record` finds it.

    Figures are measured on rows that it was not trained on, without attention sinks.

    Attributes:
        model, commit: the model it was trained on. norms: a hash of that model's norms. layer: the block whose output it reads.
        fvu: fraction of variance unexplained. dead: share of latents that never fire. tokens: it was measured on.
        l0: mean active latents. loss: of the model on the next tokens, in nats; with_sae: with the block's output
            replaced by the reconstruction; without: by zeros.
        verdict: the figures in plain words.
        training: tokens, batch, learning rate and so on.
    """

    model: str | None = None
    commit: str | None = None
    layer: int | None = None
    license: str | None = None
    norms: str | None = None
    fvu: float
    dead: float
    latents: int
    tokens: int
    l0: float | None = None
    loss: float | None = None
    loss_with_sae: float | None = None
    loss_without: float | None = None
    loss_recovered: float | None = None
    verdict: str = ""
    training: dict[str, Value] = field(default_factory=dict)

    @property
    def doubt(self) -> str:
        """What a user must know before the SAE is used, in one sentence; "" if it is good enough."""
        if quality_of(self.fvu, self.dead) != "poor":
            return ""
        return (
            f"the SAE is poor (FVU {self.fvu:.2f}, {_percent(self.dead)} of its latents dead), and so are scores by its latents: "
            "train one on more tokens (neuronselect sae train), or compare with --method hidden, which needs none"
        )


def quality_of(fvu: float, dead: float) -> Quality:
    """How good an SAE is, by its unexplained variance and its share of dead latents."""
    if fvu <= GOOD_FVU and dead <= GOOD_DEAD:
        return "good"
    return "usable" if fvu <= USABLE_FVU and dead <= USABLE_DEAD else "poor"


def verdict_of(fvu: float, dead: float) -> str:
    """The quality, with its reasons and what to do, in plain words."""
    quality = quality_of(fvu, dead)
    said = f"{quality}: it explains {_percent(max(0.0, 1 - fvu))} of the activations' variance, and {_percent(dead)} of its latents never fire"
    if quality == "good":
        return said
    mends = [
        *(["more tokens, or a larger k"] if fvu > GOOD_FVU else []),
        *(["more tokens, or fewer latents"] if dead > GOOD_DEAD else []),
    ]
    return f"{said}; what helps: {', and '.join(dict.fromkeys(mends))}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def read_record(folder: Path, name: str) -> SaeRecord | None:
    """The record of an SAE trained here; None of one made elsewhere, which has no checksums.

    Raises:
        NeuronSelectError: it was damaged.
    """
    if not all((folder / file).is_file() for file in (CHECKSUMS, SAE_RECORD)):
        return None
    record = read(folder / SAE_RECORD, SaeRecord, what=SAE.what, again=SAE.again, option="sae", value=name)
    if not (math.isfinite(record.fvu) and 0 <= record.dead <= 1):
        raise NeuronSelectError(f"its {SAE_RECORD} has figures that cannot be; {SAE.again}", option="sae", value=name)
    return record
