"""Progress of a pass over rows: a bar on a terminal, a line now and then in a log, nothing unless it is asked for.

A pass is opened by :func:`track`. The loops deep inside it only call :func:`advance` once a batch: the pass that they
belong to is found by a context variable. Importing this is cheap.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TextIO

from .text import shown

LINE_EVERY = 15.0  # seconds between lines in a log
BAR_EVERY = 0.2
SOON = 0.1  # seconds before a rate says something
WIDTH, HEIGHT = 100, 40  # of a terminal that does not tell
SWITCHES = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")

_current: ContextVar[Progress | None] = ContextVar("progress", default=None)


@dataclass(frozen=True)
class _Asked:
    file: TextIO
    clock: Callable[[], float]


_asked: _Asked | None = None
_bar: Any = None  # the one on the terminal
_table: LiveTable | None = None  # the one above it


def show_progress(on: bool = True, *, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
    """Show how far passes over rows are, from now on: tokens done, tokens a second and the time left.

    A terminal gets a bar; any other file a line at the start, every 15 seconds and at the end. Nothing is shown where
    the user switched the bars of ``datasets`` or of the Hub off.

    Args:
        on: False shows nothing any more.
        file: default stderr.
    """
    global _asked
    _asked = _Asked(file or sys.stderr, clock) if on and not _switched_off() else None


def _switched_off() -> bool:
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in SWITCHES):
        return True
    datasets = sys.modules.get("datasets")  # not imported: its function was not called
    return datasets is not None and bool(datasets.are_progress_bars_disabled())


@contextmanager
def track(what: str, total: int | None, *, unit: str = "rows", brief: bool = False) -> Iterator[Progress]:
    """Show the progress of the work in the ``with`` block.

    Args:
        what: names the pass.
        total: its rows, or what else is counted; None where that is not known.
        unit: what is counted besides tokens.
        brief: usually short: nothing is shown in a log before the first 15 seconds are over.
    """
    asked, outer = _asked, _current.get()
    progress = Progress(what, total, unit, time.monotonic if asked is None else asked.clock)
    if asked is None or outer is _UNTRACKED:
        yield progress
        return
    progress.view = _Bar(asked.file, brief) if asked.file.isatty() else _Lines(asked.file, brief)
    progress.view.start(progress)
    _current.set(progress)
    try:
        yield progress
        progress.view.end(progress)
    finally:
        progress.view.close()
        _current.set(outer)


@contextmanager
def untracked() -> Iterator[None]:
    """Show and count nothing that runs in the ``with`` block, such as a sample of rows that are run again later."""
    outer = _current.get()
    _current.set(_UNTRACKED)
    try:
        yield
    finally:
        _current.set(outer)


def read(rows: int, tokens: int) -> None:
    """Tell the current pass that rows were read, and how many tokens will run for them."""
    if (progress := _current.get()) is not None:
        progress.read(rows, tokens)


def advance(tokens: int) -> None:
    """Tell the current pass that tokens were run. Called once a batch."""
    if (progress := _current.get()) is not None:
        progress.advance(tokens)


@contextmanager
def aside() -> Iterator[None]:
    """Take the bar, and the table above it, off the terminal while something else is printed."""
    bar, live = _bar, _table
    if bar is not None:
        bar.clear()
    if live is not None:
        live.clear()
    try:
        yield
    finally:
        if live is not None:
            live.draw()
        if bar is not None:
            bar.refresh()


class LiveTable:
    """Lines at the bottom of a terminal, above the bar; what is shown next takes their place."""

    HEAD = 2  # lines that are always shown

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.lines: list[str] = []
        self.near = self._drawn = 0

    def show(self, lines: Sequence[str], near: int) -> None:
        """Show lines, of which as many as the terminal has room for: the first two, and those around one of the others."""
        with aside():
            self.lines, self.near = list(lines), near

    def draw(self) -> None:
        size = _terminal(self.file)
        head, rest = self.lines[: self.HEAD], self.lines[self.HEAD :]
        if len(rest) > (room := max(1, size.lines - self.HEAD - 3)):  # the bar, and how many are not shown
            first = min(max(0, self.near - self.HEAD - room // 2), len(rest) - room)
            rest = [*rest[first : first + room], f"... {len(rest) - room} more lines"]
        cut = [line[: size.columns - 1] for line in [*head, *rest]]
        self._write("".join(f"{line}\n" for line in cut))
        self._drawn = len(cut)

    def clear(self) -> None:
        if self._drawn:
            self._write(f"\x1b[{self._drawn}F\x1b[J")
        self._drawn = 0

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a closed terminal ends nothing
            self.file.write(text)
            self.file.flush()


@contextmanager
def live_table() -> Iterator[LiveTable | None]:
    """A table for the ``with`` block, taken away at its end; None where progress is not shown on a terminal."""
    global _table
    if _asked is None or not _asked.file.isatty():
        yield None
        return
    _table = table = LiveTable(_asked.file)
    try:
        yield table
    finally:
        with aside():
            _table = None
            table.lines = []
        table.clear()


class Progress:
    """Counts of one pass.

    Attributes:
        rows: done. tokens: run.
    """

    def __init__(self, what: str, total: int | None, unit: str, clock: Callable[[], float]) -> None:
        self.what, self.total, self.unit, self.clock = shown(what), total, unit, clock
        self.view: _View | None = None
        self.rows = self.tokens = 0
        self._read_rows = self._read_tokens = self._waiting = 0
        self._began = clock()
        self._ran: float | None = None  # when the first tokens were there to run
        self._next = 0.0

    def read(self, rows: int, tokens: int) -> None:
        """Rows were read, for which so many tokens will run."""
        self._ran = self.clock() if self._ran is None else self._ran
        self._read_rows += rows
        self._waiting += rows
        self._read_tokens += tokens

    def advance(self, tokens: int) -> None:
        """Tokens were run."""
        self.tokens += tokens
        self._show()

    def done(self, rows: int) -> None:
        """Rows are done."""
        self.rows += rows
        self._waiting = max(0, self._waiting - rows)
        self._show()

    def _show(self) -> None:
        if self.view is not None and (now := self.clock()) >= self._next:
            self._next = now + self.view.every
            self.view.update(self)

    # -------------------------------------------------------------------------------------- in words
    @property
    def seconds(self) -> float:
        return self.clock() - self._began

    @property
    def all_tokens(self) -> tuple[float, bool] | None:
        """Tokens of the whole pass, and whether all its rows were read; of the others the mean is taken."""
        if not self._read_tokens or self.total is None:
            return None
        unread = max(0, self.total - self.rows - self._waiting)
        mean = self._read_tokens / self._read_rows
        return max(float(self.tokens), self._read_tokens + unread * mean), unread == 0

    @property
    def share(self) -> float | None:
        """How much of the pass is done, from 0 to 1; None where its length is not known."""
        if self.total is None:
            return None
        if (known := self.all_tokens) is not None:
            return self.tokens / known[0]
        return min(1.0, self.rows / self.total) if self.total else 1.0

    @property
    def rate(self) -> float:
        """Tokens a second, or rows where no tokens run."""
        if not self._read_tokens:
            return self.rows / self.seconds if self.seconds >= SOON else 0.0
        assert self._ran is not None
        running = self.clock() - self._ran
        return self.tokens / running if running >= SOON else 0.0

    @property
    def counts(self) -> str:
        """E.g. ``1.23 M of about 4.56 M tokens, 6,400 tokens/s, 12 min left``."""
        unit = "tokens" if self._read_tokens else self.unit
        if (known := self.all_tokens) is not None:
            done, left = counted(self.tokens), known[0] - self.tokens
            text = f"{done} of {'' if known[1] else 'about '}{counted(known[0])} tokens"
        elif self.total is not None:
            left = max(0, self.total - self.rows)
            text = f"{self.rows:,} of {self.total:,} {self.unit}"
        else:
            left = 0.0
            text = f"{self.rows:,} {self.unit}" + (f", {counted(self.tokens)} tokens" if self.tokens else "")
        if not (rate := self.rate):
            return text
        text += f", {rate:,.0f} {unit}/s" if rate >= 10 else f", {rate:.2g} {unit}/s"
        return text + (f", {span(left / rate)} left" if left else "")

    @property
    def result(self) -> str:
        """E.g. ``4,000 rows, 1.36 M tokens in 152 s, 8,900 tokens/s``."""
        tokens = f", {counted(self.tokens)} tokens" if self.tokens else ""
        rate = f", {self.rate:,.0f} tokens/s" if self.tokens and self.rate else ""
        return f"{self.rows:,} {self.unit}{tokens} in {span(self.seconds)}{rate}"


_UNTRACKED = Progress("", None, "rows", time.monotonic)


def counted(number: float) -> str:
    """A count in at most a few digits: ``950``, ``12.3 k``, ``4.56 M``."""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number / 1e3:.1f} k" if number >= 10_000 else f"{number:,.0f}"


def span(seconds: float) -> str:
    """A time in one unit: ``42 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --------------------------------------------------------------------------------------------- views
class _View:
    every: float

    def __init__(self, file: TextIO, brief: bool) -> None:
        self.file, self.brief = file, brief

    def start(self, progress: Progress) -> None: ...
    def update(self, progress: Progress) -> None: ...
    def end(self, progress: Progress) -> None: ...
    def close(self) -> None: ...


class _Lines(_View):
    """Lines in a log."""

    every = LINE_EVERY

    def start(self, progress: Progress) -> None:
        progress._next = progress.clock() + self.every
        if not self.brief:
            self._line(progress, "started" if progress.total is None else f"{progress.total:,} {progress.unit}")

    def update(self, progress: Progress) -> None:
        share = progress.share
        if share == 1.0:  # the last line says it
            return
        self._line(progress, ("" if share is None else f"{share:.0%}, ".replace("%", " %")) + progress.counts)
        self.brief = False

    def end(self, progress: Progress) -> None:
        if not self.brief:
            self._line(progress, progress.result)

    def _line(self, progress: Progress, text: str) -> None:
        with suppress(OSError, ValueError):  # a closed pipe ends no pass
            self.file.write(f"{progress.what}: {text}\n")
            self.file.flush()


def _terminal(file: TextIO) -> os.terminal_size:
    with suppress(OSError, ValueError):
        found = os.get_terminal_size(file.fileno())
        return os.terminal_size((found.columns or WIDTH, found.lines or HEIGHT))
    return os.terminal_size((WIDTH, HEIGHT))


class _Bar(_View):
    """One bar on a terminal, drawn from the first count on: a library's bar may show how a model is loaded before."""

    every = BAR_EVERY
    bar: Any = None

    def update(self, progress: Progress) -> None:
        self._draw(progress, progress.counts)

    def end(self, progress: Progress) -> None:
        if self.bar is not None:
            self._draw(progress, progress.result)

    def _draw(self, progress: Progress, text: str) -> None:
        if self.bar is None:
            self._open(progress)
        self.bar.n = progress.share or 0.0
        self.bar.ncols = self._width()
        self.bar.bar_format = ("{desc}: " if progress.total is None else "{l_bar}{bar:20}| ") + text
        self.bar.refresh()

    def _open(self, progress: Progress) -> None:
        from tqdm.std import tqdm

        global _bar
        _bar = self.bar = tqdm(
            total=None if progress.total is None else 1.0, desc=progress.what, file=self.file, leave=not self.brief and _table is None,
            bar_format="{desc}", ncols=self._width(), nrows=20,
        )  # fmt: skip

    def _width(self) -> int:
        return _terminal(self.file).columns

    def close(self) -> None:
        global _bar
        if self.bar is not None:
            self.bar.close()
            _bar = None
