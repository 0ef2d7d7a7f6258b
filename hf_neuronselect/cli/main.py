"""Start the command ``neuronselect``: one handler for every error, and for Ctrl-C from the first import on."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from . import STOPPED


def main() -> None:
    """Run the command line.

    Bad input is one line and exit status 2, Ctrl-C one line and 130; neither has a traceback.
    """
    interrupts = _Interrupts()
    try:
        from .run_app import run_app

        status = run_app()
    except BaseException as error:
        ours = isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == STOPPED)
        if not (interrupts.seen or ours or type(error).__name__ == "Abort"):  # typer's word for Ctrl-C
            raise
        status = STOPPED
    if interrupts.seen or status == STOPPED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends what still winds up
        sys.stderr.write("stopped\n")
        status = STOPPED
    sys.exit(status)


class _Interrupts:
    """Remembers Ctrl-C, which libraries may turn into errors of their own. A forked worker ends without a word."""

    def __init__(self) -> None:
        self.seen, self.pid = False, os.getpid()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody's own, or ignored
            signal.signal(signal.SIGINT, self._stop)

    def _stop(self, *_: Any) -> None:
        if os.getpid() != self.pid:
            os._exit(STOPPED)
        self.seen = True
        raise KeyboardInterrupt


if __name__ == "__main__":
    main()
