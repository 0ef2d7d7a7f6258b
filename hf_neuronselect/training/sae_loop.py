"""Train one or several SAEs on one stream of activations; a killed training goes on at its last block."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core.errors import NeuronSelectError
from ..core.progress import span
from .token_rows import Activations, Counts
from .topk import TopK, TopKPlan

SAVE_EVERY = 60.0  # seconds between checkpoints
SAY_EVERY = 10.0
SAMPLE = 100_000  # activations that give the centre and scale


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        seen: tokens trained on, of ``tokens``. fvu, dead: of the SAE that sees most tokens, since the last report; None
            while the first activations are read.
        rate: tokens read and trained on in a second. left: seconds.
    """

    seen: int
    tokens: int
    fvu: float | None
    dead: int
    latents: int
    rate: float
    left: float

    def __str__(self) -> str:
        figures = (
            "reading" if self.fvu is None else f"FVU {self.fvu:.3f}, {self.dead:,} of {self.latents:,} latents dead"
        )
        return (f"{self.seen:,} of {self.tokens:,} tokens, {figures}, {self.rate:,.0f} tokens/s, "
                f"{span(self.left)} left")  # fmt: skip


def fit_saes(
    stream: Activations,
    plans: Sequence[tuple[int, TopKPlan]],
    *,
    checkpoint: Path | None = None,
    identity: str = "",
    report: Callable[[Progress], None] = lambda progress: None,
) -> list[TopK]:
    """Train SAEs.

    Args:
        plans: for each SAE the number of its site in the stream, and what is trained.
        checkpoint: a file that is written every minute, and read if it is there; it is removed by the caller.
        identity: what the stream depends on (model, rows); a checkpoint of another identity is refused.
        report: told how far the training is, about every ten seconds.

    Raises:
        NeuronSelectError: a checkpoint of another training, or a disk that is full.
    """
    identity = hashlib.sha256(
        json.dumps([identity, stream.block, stream.seed, [[i, asdict(plan)] for i, plan in plans]]).encode()
    ).hexdigest()
    saes: list[TopK] = []
    start = 0
    saved = _read(checkpoint, identity) if checkpoint is not None else None
    if saved is not None:
        start, stream.limits, stream.counts, states = saved
        for (_, plan), state in zip(plans, states, strict=True):
            saes.append(TopK(plan, state["centre"].to(stream.backbone.device)[None]))
            saes[-1].restore(state)
    longest = max(range(len(plans)), key=lambda i: plans[i][1].tokens)
    clock = _Clock(report, plans[longest][1], saes[longest].seen if saes else 0)
    stream.on_read = clock.read
    last_saved = time.monotonic()
    for number, block in enumerate(stream.blocks(start), start):
        if not saes:
            first = [next(block.parts(site, SAMPLE)).to(stream.backbone.device) for site, _ in plans]
            saes = [TopK(plan, sample) for (_, plan), sample in zip(plans, first, strict=True)]
        for i, (site, plan) in enumerate(plans):
            for part in block.parts(site, plan.batch):
                # A short rest of a block would be a noisy step.
                if saes[i].seen >= plan.tokens or (len(part) < plan.batch // 2 and saes[i].seen):
                    break
                saes[i].step(part.to(stream.backbone.device))
                clock.trained(saes[longest], len(part) if i == longest else 0)
        if all(sae.seen >= sae.plan.tokens for sae in saes):
            break
        if checkpoint is not None and time.monotonic() - last_saved > SAVE_EVERY:
            _write(checkpoint, identity, number + 1, stream, saes)
            last_saved = time.monotonic()
    clock.say(saes[longest])
    return saes


class _Clock:
    """Times reading and training, which take turns, and reports about every :data:`SAY_EVERY` seconds."""

    def __init__(self, report: Callable[[Progress], None], plan: TopKPlan, seen: int) -> None:
        self.report, self.plan = report, plan
        self.tokens = {"read": 0, "trained": 0}
        self.seconds = {"read": 0.0, "trained": 0.0}
        self.before = seen
        self.sae: TopK | None = None
        self.fvu: float | None = None
        self.now = self.said = time.monotonic()

    def read(self, tokens: int) -> None:
        self._count("read", tokens)

    def trained(self, sae: TopK, tokens: int) -> None:
        self.sae = sae
        self._count("trained", tokens)

    def _count(self, what: str, tokens: int) -> None:
        now = time.monotonic()
        self.tokens[what] += tokens
        self.seconds[what] += now - self.now
        self.now = now
        if now - self.said >= SAY_EVERY:
            self.say(self.sae)

    def say(self, sae: TopK | None) -> None:
        """Report now."""
        left = 0.0
        for what, tokens in self.tokens.items():
            rest = max(0, self.plan.tokens - self.before - tokens)
            left += rest * self.seconds[what] / tokens if tokens else 0.0
        spent = sum(self.seconds[what] / tokens for what, tokens in self.tokens.items() if tokens)
        seen = self.before if sae is None else sae.seen
        if sae is not None and not math.isnan(sae.fvu):
            self.fvu = sae.fvu
        self.report(Progress(seen, self.plan.tokens, self.fvu, 0 if sae is None else sae.dead, self.plan.latents,
                             1 / spent if spent else 0.0, left))  # fmt: skip
        if sae is not None:
            sae.zero_figures()
        self.said = time.monotonic()


def _write(path: Path, identity: str, block: int, stream: Activations, saes: Sequence[TopK]) -> None:
    tensors = {f"{i}/{name}": tensor for i, sae in enumerate(saes) for name, tensor in sae.state().items()}
    facts = {"identity": identity, "block": str(block), "limits": json.dumps(stream.limits),
             "counts": json.dumps(asdict(stream.counts)), "saes": str(len(saes))}  # fmt: skip
    new = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, new, metadata=facts)
        os.replace(new, path)
    except (OSError, SafetensorError) as cause:
        new.unlink(missing_ok=True)
        raise NeuronSelectError(
            f"the checkpoint cannot be written ({cause}); make room, then run the same command again", option="out",
            value=str(path.parent),
        ) from cause  # fmt: skip


def _read(path: Path, identity: str) -> tuple[int, list[float], Counts, list[dict[str, torch.Tensor]]] | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("identity") != identity:
                raise NeuronSelectError(
                    "holds an unfinished training of another model, pool or options: name another folder, or delete it",
                    option="out", value=str(path.parent),
                )  # fmt: skip
            states: list[dict[str, torch.Tensor]] = [{} for _ in range(int(facts["saes"]))]
            for key in file.keys():  # noqa: SIM118 (no mapping)
                number, name = key.split("/", 1)
                states[int(number)][name] = file.get_tensor(key)
            counts = Counts(**json.loads(facts["counts"]))
            return int(facts["block"]), json.loads(facts["limits"]), counts, states
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as cause:
        if isinstance(cause, NeuronSelectError):
            raise
        raise NeuronSelectError(
            f"the checkpoint of the unfinished training is damaged ({cause}); delete it", option="out", value=str(path)
        ) from cause
