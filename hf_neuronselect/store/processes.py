"""Worker processes that compute a store's shards: one extractor each, and one GPU each where there are GPUs.

A worker holds the numbers of at most two shards: the one it computes and the next. When a worker dies (out of memory, a
kill, a crash of the driver), a new one gets its shards. No worker outlives the process that started it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import datasets
import pyarrow as pa
import torch
import transformers

from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..models.loading import forget
from .shard_maker import Events, Shard, ShardMaker, Size

START = "spawn"  # CUDA cannot be used in a fork
AHEAD = 2  # shards given to a worker at a time
PATIENCE = 10.0  # seconds that a worker gets to end


def gpu_count(device: str) -> int:
    """Number of GPUs that extraction on this ``device`` can use: 1 on a CPU, or unless it is ``auto`` or ``cuda``."""
    return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1


def run_workers(maker: ShardMaker, numbers: Iterable[int], num_workers: int) -> Events:
    """As ``maker.work(numbers)``, in worker processes; shards are yielded in the order in which they end.

    The workers are ranks 0 to ``num_workers - 1``; on a CPU they share this process's threads. Their
    :class:`NeuronSelectWarning` are repeated here. Close the generator to stop them.

    Raises:
        NeuronSelectError: what a worker raised; or a shard whose workers died three times in a row.
    """
    forget()  # worker 0 has the same GPU
    waiting, deaths = deque(numbers), Counter[int]()
    count = min(num_workers, len(waiting))
    threads = max(1, torch.get_num_threads() // max(1, count))
    workers: dict[Connection, _Worker] = {}
    try:
        for rank in range(count):
            worker = _Worker(maker, rank, threads)
            workers[worker.pipe] = worker
            worker.give(waiting, count)
        while workers:
            for pipe in wait(list(workers)):
                worker = workers[pipe]  # type: ignore[index]
                event = worker.receive()
                if isinstance(event, NeuronSelectError):
                    raise event
                elif isinstance(event, NeuronSelectWarning):
                    warnings.warn(event, stacklevel=3)
                elif event is not None:
                    if isinstance(event, Shard):
                        worker.numbers.remove(event.number)
                        worker.give(waiting, count)
                    yield event
                else:
                    del workers[worker.pipe]
                    cause = worker.end()
                    if worker.numbers:
                        number = worker.numbers[0]
                        deaths[number] += 1
                        maker.after_death(number, cause, deaths[number], num_workers)
                        waiting.extendleft(reversed(worker.numbers))
                        worker = _Worker(maker, worker.rank, threads)
                        workers[worker.pipe] = worker
                        worker.give(waiting, count)
    finally:
        for worker in workers.values():
            worker.process.terminate()
        for worker in workers.values():
            worker.end()


class _Worker:
    """A process and the ``numbers`` of its shards: the current one and the next."""

    def __init__(self, maker: ShardMaker, rank: int, threads: int) -> None:
        context: Any = multiprocessing.get_context(START)
        self.rank = rank
        self.pipe, end = context.Pipe()
        self.process = context.Process(
            target=_work, args=(end, rank, threads), name=f"neuronselect-{rank}", daemon=True
        )
        with _no_interrupts():
            self.process.start()
        end.close()  # the worker alone holds that end, so its death closes the pipe
        self.numbers: list[int] = []
        self._send(maker)

    def give(self, waiting: deque[int], count: int) -> None:
        """Send the worker its shard, and the next one while enough are left for the other workers."""
        while waiting and (not self.numbers or (len(self.numbers) < AHEAD and len(waiting) >= count)):
            self.numbers.append(waiting.popleft())
            self._send(self.numbers[-1])
        if not waiting and not self.numbers:
            self._send(None)

    def _send(self, value: Any) -> None:
        with contextlib.suppress(OSError):  # the worker is dead; `receive` notices
            self.pipe.send(value)

    def receive(self) -> Size | Shard | NeuronSelectError | NeuronSelectWarning | None:
        """Return the next message, or None once the worker has closed its pipe."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def end(self) -> str:
        """Wait until the process ends and return how it ended."""
        self.pipe.close()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back while a worker is started: it inherits that, from its first import on."""
    if os.name == "nt":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ----------------------------------------------------------------------------------- in the worker
def _work(pipe: Connection, rank: int, threads: int) -> None:
    """Main function of a worker: compute shards by number until None arrives."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that half-written files are removed
    torch.set_num_threads(threads)
    pa.set_cpu_count(threads)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if isinstance(message, NeuronSelectWarning):  # the parent gives other libraries' warnings itself
            pipe.send(message)

    warnings.showwarning = show
    try:
        maker: ShardMaker = pipe.recv()
        for event in maker.work(iter(pipe.recv, None), rank):
            pipe.send(event)
    except NeuronSelectError as error:
        pipe.send(error)
    except Exception:  # some CUDA errors need a new process
        traceback.print_exc()
        os._exit(1)  # not sys.exit: the thread that waits for the next number would keep the process alive


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
