"""LESS's warm-up (arXiv 2402.04333, sec. 4.1): a short LoRA training whose checkpoints and Adam moments are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core import progress
from ..core.digests import file_hash
from ..core.errors import NeuronSelectError
from ..rows.encode import Sample
from .batching import plan_batches
from .loading import ModelSpec, Place
from .lora import LoraModel, LoraShape, batch_tokens, lora_model_of
from .loss import token_losses

logger = logging.getLogger(__name__)

FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8
"""Adam's decay of the first and the second moment, and its eps."""
CLIP = 1.0
_KINDS = ("weight", "first", "second")
Moments = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Factor -> first and second moment, float32 and flat."""


@dataclass(frozen=True)
class Checkpoint:
    """The end of one epoch.

    Attributes:
        path: factors and moments as safetensors. rate: mean learning rate of the epoch. digest: 16 hex digits of the file.
        shape: of the LoRA factors.
    """

    path: Path
    rate: float
    digest: str
    shape: LoraShape

    def weights(self) -> dict[str, torch.Tensor]:
        """Factor -> weight, float32."""
        return self._read("weight")

    def moments(self, device: torch.device) -> Moments:
        first, second = self._read("first"), self._read("second")
        return {name: (first[name].flatten().to(device), second[name].flatten().to(device)) for name in first}

    def _read(self, kind: str) -> dict[str, torch.Tensor]:
        try:
            with safe_open(self.path, "pt") as file:
                keys = [key for key in file.keys() if key.startswith(f"{kind}/")]  # noqa: SIM118
                return {key.partition("/")[2]: file.get_tensor(key) for key in keys}
        except (OSError, SafetensorError) as cause:
            raise NeuronSelectError(
                f"a checkpoint of the warm-up cannot be read ({cause}); run the same again where it was made",
                option="method",
            ) from cause


@dataclass(frozen=True)
class WarmUp:
    """How a warm-up trains; the values are LESS's own.

    Attributes:
        share: of the pool's rows. epochs, batch (rows a step), rate (peak; linear to 0), ramp (share of the steps before
            the peak), seed (of the rows, their order and dropout).
    """

    shape: LoraShape = field(default_factory=LoraShape)
    share: float = 0.05
    epochs: int = 4
    batch: int = 32
    rate: float = 2e-5
    ramp: float = 0.03
    seed: int = 0

    def rates(self, rows: int) -> np.ndarray:
        """Learning rate of each step: float64 ``[epochs, steps an epoch]``; linear up, then linear to 0."""
        steps = math.ceil(rows / self.batch)
        total = steps * self.epochs
        ramp = math.ceil(self.ramp * total)
        at = np.arange(total)
        up = at / max(1, ramp)
        down = (total - at) / max(1, total - ramp)
        return (self.rate * np.where(at < ramp, up, down)).reshape(self.epochs, steps)

    def draw(self, rows: int) -> np.ndarray:
        """The pool's rows in the order in which they are taken for the warm-up."""
        return np.random.default_rng(self.seed).permutation(rows)

    def count(self, rows: int) -> int:
        """Rows that are trained on."""
        return max(1, math.floor(self.share * rows + 0.5))


@dataclass(frozen=True)
class Trainer:
    """A warm-up on its rows, kept in a folder; what is there already is not trained again.

    Args:
        samples: rows to train on, all with answer tokens. state: what moved them, in JSON's own types. work: the folder;
            a warm-up's own folder in it has a name that tells the options, the rows and the model.
    """

    how: WarmUp
    samples: Sequence[Sample]
    spec: ModelSpec
    place: Place
    state: Mapping[str, Any]
    work: Path

    @cached_property
    def folder(self) -> Path:
        told = hashlib.blake2b(json.dumps([asdict(self.how), dict(self.state)], sort_keys=True).encode(), digest_size=8)
        for sample in self.samples:
            told.update(np.asarray(sample.input_ids, "<i8").tobytes() + np.packbits(sample.pooled).tobytes())
        return self.work / f"warm_up-{told.hexdigest()}"

    def checkpoints(self, epochs: int) -> list[Checkpoint]:
        """The first checkpoints, trained where they are not there yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [i for i in range(epochs) if not self._path(i).exists()]
        if missing:
            self._train(missing[0], epochs)
        rates = self.how.rates(len(self.samples)).mean(axis=1)
        return [
            Checkpoint(self._path(i), float(rates[i]), file_hash(self._path(i))[:16], self.how.shape)
            for i in range(epochs)
        ]

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch + 1}.safetensors"

    def _train(self, begin: int, end: int) -> None:
        lora = lora_model_of(self.spec, self.place, self.how.shape)
        lora.set(None)
        # Adam's steps are smaller than bfloat16 resolves: it moves float32 copies of the factors.
        masters = {name: weight.detach().float().clone() for name, weight in lora.factors.items()}
        optimizer = torch.optim.AdamW(
            masters.values(), lr=self.how.rate, betas=(FIRST, SECOND), eps=EPSILON, weight_decay=0.0
        )
        rates = self.how.rates(len(self.samples))
        if begin:
            self._resume(optimizer, masters, begin, begin * rates.shape[1])
        with progress.track("warm-up", len(self.samples) * (end - begin)) as told:
            for epoch in range(begin, end):
                order = np.random.default_rng([self.how.seed, epoch]).permutation(len(self.samples))
                with torch.random.fork_rng():
                    torch.manual_seed(self.how.seed * 1000 + epoch)  # dropout's, so that an epoch can be run again
                    for step, rate in enumerate(rates[epoch]):
                        rows = order[step * self.how.batch : (step + 1) * self.how.batch]
                        optimizer.param_groups[0]["lr"] = float(rate)
                        self._step(lora, masters, optimizer, [self.samples[i] for i in rows])
                        told.done(len(rows))
                self._save(optimizer, masters, epoch)

    def _step(
        self, lora: LoraModel, masters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, rows: list[Sample]
    ) -> None:
        """One step on the mean of the rows' mean losses."""
        lora.set(masters)
        lora.model.train()
        for weight in lora.factors.values():
            weight.requires_grad_(True)
        try:
            with torch.enable_grad():
                for plan in plan_batches([len(row.input_ids) for row in rows], batch_tokens(lora.device)):
                    chosen = [rows[i] for i in plan]
                    losses, row_of = token_losses(lora.model, chosen)
                    count = np.bincount(row_of, minlength=len(chosen))[row_of]
                    weights = torch.from_numpy(1.0 / (count * len(rows))).to(losses.device, losses.dtype)
                    (losses * weights).sum().backward()
                    progress.read(len(chosen), sum(len(row.input_ids) for row in chosen))
                    progress.advance(sum(len(row.input_ids) for row in chosen))
            for name, weight in lora.factors.items():
                masters[name].grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        finally:
            lora.model.eval().requires_grad_(False)
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), CLIP)
        if not torch.isfinite(norm):
            raise NeuronSelectError("the warm-up's gradient is not finite; use float32 or bfloat16", option="dtype",
                                    value=self.spec.dtype)  # fmt: skip
        optimizer.step()

    def _save(self, optimizer: torch.optim.Optimizer, masters: Mapping[str, torch.Tensor], epoch: int) -> None:
        kept = {}
        for name, weight in masters.items():
            moments = optimizer.state[weight]
            for kind, tensor in zip(_KINDS, (weight, moments["exp_avg"], moments["exp_avg_sq"]), strict=True):
                kept[f"{kind}/{name}"] = tensor.detach().cpu().contiguous()
        path = self._path(epoch)
        part = path.with_suffix(".part")
        save_file(kept, part)
        part.replace(path)

    def _resume(
        self, optimizer: torch.optim.Optimizer, masters: Mapping[str, torch.Tensor], begin: int, steps: int
    ) -> None:
        before = Checkpoint(self._path(begin - 1), 0.0, "", self.how.shape)
        weights, first, second = (before._read(kind) for kind in _KINDS)
        with torch.no_grad():
            for name, weight in masters.items():
                weight.copy_(weights[name])
                optimizer.state[weight] = {
                    "step": torch.tensor(float(steps)),
                    "exp_avg": first[name].to(weight.device),
                    "exp_avg_sq": second[name].to(weight.device),
                }
