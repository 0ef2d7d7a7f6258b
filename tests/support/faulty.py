"""An extractor that does harm in the processes it is sent to: each deed at one row's shard, so many times."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelectWarning
from hf_neuronselect.rows.encode import Sample
from hf_neuronselect.rows.formats import Conversation

N, STEP = 24, 4  # rows of the pool, and of its six shards: other numbers of rows are no shard
DO = "deed:"  # what a sample is marked with, in place of a reason to skip it


class Faulty(NeuronFeatureExtractor):
    """Does the deed of a row when it computes that row's shard in another process than ``home``.

    Attributes:
        deeds: row -> (what :func:`do` does, times). counted: a folder of marks, ``row.tried.rank.pid`` each.
    """

    deeds: dict[int, tuple[str, int]] = {}
    counted = ""
    home = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return faulty, (super().__reduce__()[1], self.deeds, self.counted, self.home)

    def tokenize(self, conversations: Sequence[Conversation]) -> list[Sample]:
        samples = super().tokenize(conversations)
        for row in self.deeds:
            if len(samples) == STEP and any(f"#0.{row}?" in str(c.messages) for c in conversations):
                samples[0] = replace(samples[0], skip=f"{DO} {row}")
        return samples

    def compute(self, samples: Sequence[Sample], rank: int | None = None) -> dict[str, Any]:
        if samples and samples[0].skip.startswith(DO):
            row = int(samples[0].skip.removeprefix(DO))
            samples = [replace(samples[0], skip=""), *samples[1:]]
            deed, times = self.deeds[row]
            tried = len(list(Path(self.counted).glob(f"{row}.*")))
            if tried < times and os.getpid() != self.home:
                (Path(self.counted) / f"{row}.{tried}.{rank}.{os.getpid()}").touch()
                do(deed)
        return super().compute(samples, rank)


def faulty(words: tuple[Any, ...], deeds: dict[int, tuple[str, int]], counted: str, home: int) -> Faulty:
    config, device, device_map, batch_tokens = words
    made = Faulty(config, device=device, device_map=device_map, batch_tokens=batch_tokens)
    made.deeds, made.counted, made.home = deeds, counted, home
    return made


def make_faulty(extractor: NeuronFeatureExtractor, deeds: dict[int, tuple[str, int]], counted: Path) -> Faulty:
    """As ``extractor``, on the CPU; ``counted`` is made."""
    counted.mkdir()
    return faulty((extractor.config, "cpu", None, "auto"), deeds, str(counted), os.getpid())


def do(deed: str) -> None:
    if deed == "exit":
        os._exit(7)
    elif deed == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    elif deed == "refuse":
        raise NeuronSelectError("too long a row", option="max_length", value=9)
    elif deed == "warn":
        warnings.warn("out of memory: a smaller batch", NeuronSelectWarning, stacklevel=2)
    elif deed == "full disk":
        os.fsync = full
    elif deed == "slow":
        time.sleep(60)
    else:
        os.kill(os.getpid(), getattr(signal, deed))


def full(handle: int) -> None:
    raise OSError(28, "No space left on device")
