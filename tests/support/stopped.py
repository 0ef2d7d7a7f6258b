"""Stops a piece of work at its n-th step on the disk, in a forked child: a kill, or a full disk."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

STEPS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"}
DONE, REFUSED, KILLED, BROKEN = 0, 2, 9, 1


def stop_at(n: int, work: Callable[[], object], place: str, *, full: bool = False) -> int:
    """How a child ended that did the work until it touched ``place`` for the n-th time.

    Args:
        full: the n-th step and those after it that make something say that the disk is full; else the child dies there.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0

    def look(event: str, given: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in STEPS or not any(isinstance(one, (str, os.PathLike)) and place in str(one) for one in given):
            return
        seen += 1
        if seen >= n and not full:
            os._exit(KILLED)
        if seen >= n and (event in ("os.mkdir", "os.rename") or (event == "open" and int(given[2]) & os.O_CREAT)):  # type: ignore[call-overload]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    from hf_neuronselect import NeuronSelectError

    status = BROKEN
    try:
        sys.addaudithook(look)
        work()
        status = DONE
    except NeuronSelectError:
        status = REFUSED
    finally:
        os._exit(status)
