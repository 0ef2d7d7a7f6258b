"""Run the command line's app: what goes wrong becomes one line, and no text of the data reaches the terminal as it is."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.progress import SWITCHES, show_progress
from ..core.text import shown
from .app import app
from .flags import note

BAD_INPUT = 2


def run_app() -> int:
    """Run the command named on the command line; returns the exit status."""
    show_progress()  # before the switches below are set: the user's own say whether it is wanted
    if not sys.stderr.isatty():
        # The libraries read these when they are imported, which is after the flags are checked.
        for name in SWITCHES:
            os.environ.setdefault(name, "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        with _safe_output(), _plain_warnings():
            status = app(standalone_mode=False)
    except NeuronSelectError as error:
        note(f"error: {error.as_command_line()}")
        return BAD_INPUT
    except Exception as error:
        message = getattr(error, "format_message", None)  # typer's usage errors: an unknown flag, a missing value
        if message is None:
            raise
        note(f"error: {shown(message())}")
        return BAD_INPUT
    finally:
        show_progress(False)
    return status if isinstance(status, int) else 0


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """The package's own warnings as one line on stderr, each once; those of libraries are left out."""
    shown_before: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, NeuronSelectWarning) and str(message) not in shown_before:
            shown_before.add(str(message))
            note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _safe_output() -> Iterator[None]:
    """Logs of every library and tracebacks show hostile characters as escapes; no character is too rare to print."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    factory = logging.getLogRecordFactory()

    def record(*given: Any, **more: Any) -> logging.LogRecord:
        made = factory(*given, **more)
        made.getMessage = lambda: shown(logging.LogRecord.getMessage(made), lines=True)  # type: ignore[method-assign]
        return made

    def fail(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        sys.stderr.write(shown(text, lines=True))

    logging.setLogRecordFactory(record)
    sys.excepthook = fail  # stays: it is called after this function has ended
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
