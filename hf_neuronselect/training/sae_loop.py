"""Train one or several SAEs on one stream of activations; a killed training goes on at its last block."""

from __future__ import annotations

import hashlib
import json
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
from .token_rows import Activations
from .topk import TopK, TopKPlan

SAVE_EVERY = 60.0  # seconds between checkpoints
SAY_EVERY = 10.0


@dataclass(frozen=True)
class Progress:
    """How far a training is: of the SAE that sees most tokens, over the last block or since the last report."""

    seen: int
    tokens: int
    fvu: float
    dead: int
    latents: int
    rate: float

    def __str__(self) -> str:
        left = (self.tokens - self.seen) / self.rate if self.rate else 0.0
        return (f"{self.seen / 1e6:.2f} of {self.tokens / 1e6:.2f} M tokens, FVU {self.fvu:.3f}, {self.dead} of "
                f"{self.latents} latents dead, {self.rate:,.0f} tokens/s, {span(left)} left")  # fmt: skip


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
        start, stream.limits, states = saved
        for (_, plan), state in zip(plans, states, strict=True):
            saes.append(TopK(plan, state["centre"].to(stream.backbone.device)[None]))
            saes[-1].restore(state)
    longest = max(range(len(plans)), key=lambda i: plans[i][1].tokens)
    clock = _Clock(report, saes[longest].seen if saes else 0)
    last_saved = time.monotonic()
    for number, block in enumerate(stream.blocks(start), start):
        if not saes:
            saes = [TopK(plan, block[site][:100_000]) for site, plan in plans]
        for i, (site, plan) in enumerate(plans):
            for part in block[site].split(plan.batch):
                # A short rest of a block would be a noisy step.
                if saes[i].seen >= plan.tokens or (len(part) < plan.batch // 2 and saes[i].seen):
                    break
                saes[i].step(part)
                if i == longest:
                    clock.tick(saes[i])
        if all(sae.seen >= sae.plan.tokens for sae in saes):
            break
        if checkpoint is not None and time.monotonic() - last_saved > SAVE_EVERY:
            _write(checkpoint, identity, number + 1, stream.limits or [], saes)
            last_saved = time.monotonic()
    clock.tick(saes[longest], last=True)
    return saes


class _Clock:
    def __init__(self, report: Callable[[Progress], None], seen: int) -> None:
        self.report, self.start, self.seen_before = report, time.monotonic(), seen
        self.said = self.start

    def tick(self, sae: TopK, last: bool = False) -> None:
        now = time.monotonic()
        if now - self.said < SAY_EVERY and not last:
            return
        rate = (sae.seen - self.seen_before) / (now - self.start) if now > self.start else 0.0
        self.report(Progress(sae.seen, sae.plan.tokens, sae.fvu, sae.dead, sae.plan.latents, rate))
        sae.zero_figures()
        self.said = now


def _write(path: Path, identity: str, block: int, limits: Sequence[float], saes: Sequence[TopK]) -> None:
    tensors = {f"{i}/{name}": tensor for i, sae in enumerate(saes) for name, tensor in sae.state().items()}
    facts = {"identity": identity, "block": str(block), "limits": json.dumps(list(limits)), "saes": str(len(saes))}
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


def _read(path: Path, identity: str) -> tuple[int, list[float], list[dict[str, torch.Tensor]]] | None:
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
            return int(facts["block"]), json.loads(facts["limits"]), states
    except (SafetensorError, OSError, KeyError, ValueError) as cause:
        if isinstance(cause, NeuronSelectError):
            raise
        raise NeuronSelectError(
            f"the checkpoint of the unfinished training is damaged ({cause}); delete it", option="out", value=str(path)
        ) from cause
