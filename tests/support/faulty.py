"""An extractor that does harm in the processes it is sent to: a deed at a row's shard, a number of times."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelectWarning
from hf_neuronselect.signals.engine import Computed
from hf_neuronselect.signals.extractor import Asked, Prepared

N, STEP = 24, 4  # rows of the pool and of its six shards; batches of other sizes are not shards


class Faulty(NeuronFeatureExtractor):
    """Does a row's deed when it computes the shard of that row in another process than ``home``.

    Attributes:
        deeds: row -> (what :func:`do` does, times). counted: a folder of marks, ``row.tried.rank.pid`` each.
    """

    deeds: dict[int, tuple[str, int]] = {}
    counted = ""
    home = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return faulty, (super().__reduce__()[1], self.deeds, self.counted, self.home)

    def with_features(self, features: Asked) -> Faulty:
        return harm(super().with_features(features), self.deeds, self.counted, self.home)

    def compute(self, prepared: Prepared, rank: int | None = None, **rest: Any) -> Computed:
        for row, (deed, times) in self.deeds.items():
            if len(prepared) == STEP and any(f"#0.{row}?" in str(c.messages) for c in prepared.conversations):
                tried = len(list(Path(self.counted).glob(f"{row}.*")))
                if tried < times and os.getpid() != self.home:
                    (Path(self.counted) / f"{row}.{tried}.{rank}.{os.getpid()}").touch()
                    do(deed)
        return super().compute(prepared, rank, **rest)


def harm(extractor: Any, deeds: dict[int, tuple[str, int]], counted: str, home: int) -> Faulty:
    extractor.deeds, extractor.counted, extractor.home = deeds, counted, home
    return extractor


def faulty(words: tuple[Any, ...], deeds: dict[int, tuple[str, int]], counted: str, home: int) -> Faulty:
    return harm(Faulty(*words), deeds, counted, home)


def make_faulty(extractor: NeuronFeatureExtractor, deeds: dict[int, tuple[str, int]], counted: Path) -> Faulty:
    """Like ``extractor``; makes ``counted``."""
    counted.mkdir()
    return faulty((extractor.extraction, extractor.signals), deeds, str(counted), os.getpid())


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
