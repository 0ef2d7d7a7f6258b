"""What computing something cost: one entry for each pass of an engine, measured while it runs."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import add
from typing import TypeVar

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Cost of one pass of an engine over rows, or of a part of one.

    Attributes:
        engine: name of the engine. signals: all signals it computed in this pass.
        seconds: stage (``load``, ``read``, ``compute``) -> seconds. ``read`` runs in a thread beside ``compute``.
        peak_bytes: most memory the process held. peak_device_bytes: the same of the GPU; None without one.
        requests, money: of engines that call an API; money in US dollars.
        reused: whether the pass ran before this selection, so that its result was only read from a store.
    """

    engine: str
    signals: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    rows: int = 0
    peak_bytes: int | None = None
    peak_device_bytes: int | None = None
    requests: int | None = None
    money: float | None = None
    reused: bool = False

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def plus(self, other: PassCost) -> PassCost:
        """Add another part of the same pass: sums, but the larger of two peaks."""
        return PassCost(
            engine=self.engine,
            signals=tuple(dict.fromkeys((*self.signals, *other.signals))),
            seconds={
                stage: round(self.seconds.get(stage, 0.0) + other.seconds.get(stage, 0.0), 3)
                for stage in dict.fromkeys((*self.seconds, *other.seconds))
            },
            tokens=self.tokens + other.tokens,
            rows=self.rows + other.rows,
            peak_bytes=_over(max, self.peak_bytes, other.peak_bytes),
            peak_device_bytes=_over(max, self.peak_device_bytes, other.peak_device_bytes),
            requests=_over(add, self.requests, other.requests),
            money=_over(_add, self.money, other.money),
            reused=self.reused and other.reused,
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A ledger: passes by their ids, and the selection's own seconds.

    Attributes:
        passes: ``PASS`` or ``PASS.PART`` (a shard of a store, say) -> its cost.
        fit_seconds: of all exemplars, without the passes over them; None for a saved capability.
        score_seconds: of the pool, without the passes over it.
    """

    passes: dict[str, PassCost] = field(default_factory=dict)
    fit_seconds: float | None = None
    score_seconds: float | None = None

    def merge(self, other: Cost) -> Cost:
        """Both ledgers as one; a pass that is in both counts once.

        A pass of this run wins over the same pass read from a store.
        """
        passes = dict(self.passes)
        for name, cost in other.passes.items():
            if name not in passes or (passes[name].reused and not cost.reused):
                passes[name] = cost
        return Cost(
            passes=passes,
            fit_seconds=_over(_add, self.fit_seconds, other.fit_seconds),
            score_seconds=_over(_add, self.score_seconds, other.score_seconds),
        )

    def as_reused(self) -> Cost:
        """The ledger of something that is only read now."""
        return replace(self, passes={name: replace(cost, reused=True) for name, cost in self.passes.items()})

    def folded(self) -> Cost:
        """The parts of each pass as one entry. Merge first: a folded pass and one of its parts have different ids."""
        passes: dict[str, PassCost] = {}
        for name, cost in self.passes.items():
            whole = name.partition(".")[0]
            passes[whole] = passes[whole].plus(cost) if whole in passes else cost
        return replace(self, passes=passes)

    @property
    def computed_tokens(self) -> int:
        """Tokens that ran through a model in this run."""
        return sum(cost.tokens for cost in self.passes.values() if not cost.reused)

    def tokens_per_second(self) -> float | None:
        """Rate at which this run's own passes computed; None where all of the work was done before."""
        passes = [cost for cost in self.passes.values() if not cost.reused and cost.tokens]
        seconds = sum(cost.seconds.get("compute", 0.0) for cost in passes)
        return sum(cost.tokens for cost in passes) / seconds if seconds else None


class Meter:
    """Measures one pass of an engine.

    Args:
        engine: name of the engine. signals: what it computes.
        part: which part of the pass this is, e.g. a shard's number.
        name: id of the pass; default a new one. The parts of a pass share it.

    Example:
        >>> meter = Meter("forward", ["mona", "hidden"])
        >>> with meter.stage("load"):
        ...     model = load()
        >>> with meter.stage("compute"):
        ...     model(batch)
        >>> meter.add_tokens(2048)
        >>> ledger = Cost().merge(meter.cost())
    """

    def __init__(self, engine: str, signals: Iterable[str] = (), *, part: str = "", name: str = "") -> None:
        self.engine, self.signals, self.part = engine, tuple(signals), part
        self.name = name or uuid.uuid4().hex[:12]
        self.seconds: dict[str, float] = {}
        self.tokens = self.rows = self.requests = 0
        self.money = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds of a ``with`` block to a stage, also where it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, time.perf_counter() - started)

    def add_seconds(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def add_tokens(self, tokens: int) -> None:
        self.tokens += int(tokens)

    def add_rows(self, rows: int) -> None:
        self.rows += int(rows)

    def add_requests(self, requests: int, money: float = 0.0) -> None:
        """Calls of an API, and their price in US dollars."""
        self.requests += requests
        self.money += money

    def cost(self) -> Cost:
        """A ledger of this pass alone; empty if nothing was done."""
        if not (self.rows or self.tokens or self.requests):
            return Cost()
        measured = PassCost(
            engine=self.engine,
            signals=self.signals,
            seconds={stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            tokens=self.tokens,
            rows=self.rows,
            peak_bytes=peak_bytes(),
            peak_device_bytes=peak_device_bytes(),
            requests=self.requests or None,
            money=round(self.money, 6) if self.requests else None,
        )
        return Cost(passes={f"{self.name}.{self.part}" if self.part else self.name: measured})


def peak_bytes() -> int | None:
    """Most memory this process ever held; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def peak_device_bytes() -> int | None:
    """Most memory torch ever held on any GPU; None without torch or a GPU."""
    torch = sys.modules.get("torch")  # never imported for this alone
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def _over(function: Callable[[Number, Number], Number], one: Number | None, other: Number | None) -> Number | None:
    """``function`` of two numbers, of which one or both may be missing."""
    if one is None or other is None:
        return other if one is None else one
    return function(one, other)


def _add(one: float, other: float) -> float:
    return round(one + other, 6)
