"""Steps of a run: done once, skipped when the run is started again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.folders import RUN
from ..core.seals import encode, read
from ..core.writing import put
from .parts import Say

STATE = "run.json"


@dataclass(frozen=True)
class Done:
    """A finished step.

    Attributes:
        key: hash of its inputs. finished: UTC time. result: JSON values it returned.
    """

    key: str
    seconds: float
    finished: str
    result: Any = None


@dataclass(frozen=True)
class _Record:
    """``run.json``."""

    steps: dict[str, Done]


@dataclass
class Steps:
    """Finished steps by name, kept in ``run.json`` of a folder that is reserved for them."""

    out: Path
    say: Say
    done: dict[str, Done] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (file := self.out / STATE).exists():
            self.done = read(file, _Record, what=RUN.what, again=RUN.again, option="out", value=self.out.name).steps
        else:
            self._write()

    def _write(self) -> None:
        put(self.out / STATE, encode(_Record(self.done)))

    def is_done(self, name: str, inputs: Any, result: Path | None = None) -> bool:
        """Whether a step was done with the same inputs and its result still exists."""
        before = self.done.get(name)
        return before is not None and before.key == _key(inputs) and (result is None or result.exists())

    def run(self, name: str, inputs: Any, work: Callable[[], Any], result: Path | None = None) -> str:
        """Do a step unless it was done.

        Args:
            inputs: JSON values that decide the result. result: a file that must still exist.

        Returns:
            A text that changes when the step is done again: an input of later steps.
        """
        if self.is_done(name, inputs, result):
            self.say(f"{name}: done before ({self.done[name].seconds:.0f} s then)")
        else:
            self.say(f"{name} ...")
            started = time.perf_counter()
            value = work()
            seconds = round(time.perf_counter() - started, 1)
            self.done[name] = Done(_key(inputs), seconds, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), value)
            self._write()
        return f"{self.done[name].key} {self.done[name].finished}"


def _key(inputs: Any) -> str:
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
