"""Ray actors, one extractor each (one GPU each, where there are some): they make a store's shards on many nodes.

The store's folder lies on a file system that all nodes share; so do the model and the SAE, or the Hub cache that holds
them. Ray Data hands out the shards' numbers; an actor reads the rows of its shard and writes its file itself: nothing
but counts goes through Ray's object store. An actor that dies is replaced by Ray, and its shard done again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import transformers
from datasets import Dataset

from ..core.cost import Cost
from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.provenance import plain, record_of
from ..signals.extractor import NeuronFeatureExtractor
from .shard_maker import TRIES, Events, Shard, ShardMaker, Size
from .shards import MANIFEST, shard_name


def run_ray(
    maker: ShardMaker, numbers: Sequence[int], num_workers: int | None, load_pool: Callable[[], Dataset] | None = None
) -> Events:
    """As ``maker.work(numbers)``, by actors of a Ray cluster: shards come as they are done.

    The cluster is the one this process is connected to, else that of ``RAY_ADDRESS``, else one that runs on this
    machine, else a new one on it. This package is installed on its nodes.

    Args:
        num_workers: actors; None: one a GPU of the cluster, or one a node where there are none.
        load_pool: loads the pool on a node; None: the pool is sent (of a memory-mapped one, the files' paths).

    Raises:
        NeuronSelectError: Ray is not installed or not reached, or has nothing to run an actor on; what an actor
            raised; a shard whose actors died three times; files that the actors wrote and that are not seen from here.
    """
    ray, options = _import_ray(), maker.extractor.extraction.options
    device = options.device
    if device not in ("auto", "cuda", "cpu"):
        raise NeuronSelectError(
            "Ray gives each actor a GPU of its own: auto, cuda or cpu", option="device", value=device
        )
    if options.device_map is not None:
        raise NeuronSelectError(
            "spreads one model over several GPUs, and Ray gives each actor one: leave it away",
            option="device_map", value=options.device_map,
        )  # fmt: skip
    if not numbers:
        return
    with _cluster(ray):
        # A head is often given no CPUs, so that it takes no work.
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        gpus, cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
        on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
        if not (gpus if on_gpu else nodes):  # Ray would wait for one for ever
            raise NeuronSelectError(
                f"the Ray cluster has no {'GPU' if on_gpu else 'CPU'} to give to an actor",
                option="device",
                value=device,
            )
        count = min(len(numbers), num_workers or (gpus if on_gpu else len(nodes)))
        # On CPUs they share them: Ray sets an actor's threads to its share, which no node may be too small for.
        share = 1 if on_gpu else max(1, min(cpus // count, *(int(node["CPU"]) for node in nodes)))
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = -1  # a shard takes as long as it takes
        with ray.data.DataContext.current(context):
            reports = ray.data.from_items(
                [{"number": number} for number in numbers], override_num_blocks=len(numbers)
            ).map_batches(
                _ShardActor,
                fn_constructor_args=(
                    maker.extractor, maker.folder.resolve(), maker.shard_rows, load_pool or (lambda: maker.pool),
                    _count_deaths(ray),
                ),
                batch_size=1, batch_format="pyarrow", num_cpus=share, num_gpus=int(on_gpu),
                compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
            )  # fmt: skip
            # Nothing prefetched: else a report would wait for the next shard's. Closed, so that no actor goes on with
            # the shards that are left when one's error is raised here.
            blocks = reports.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
            with contextlib.closing(iter(blocks)) as tables:
                for table in tables:
                    for report in table["report"].to_pylist():
                        yield from _events(json.loads(report), maker, count)
    _check_seen(maker, numbers)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as cause:
        raise NeuronSelectError(
            "needs Ray: pip install 'hf-neuronselect[ray]'", option="backend", value="ray"
        ) from cause
    for handler in logging.getLogger("ray.data").handlers:
        own = type(handler).__module__.startswith("ray.")  # others' handlers may be there as well
        if own and isinstance(handler, logging.StreamHandler):  # Ray's log files keep everything
            handler.setLevel(logging.ERROR)
    return ray


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as cause:
        raise NeuronSelectError(
            f"no Ray cluster: {' '.join(str(cause).split())[:240]}; look at RAY_ADDRESS", option="backend", value="ray"
        ) from cause
    try:
        yield
    finally:
        ray.shutdown()


def _events(report: dict[str, Any], maker: ShardMaker, num_workers: int) -> Events:
    """What an actor's report says, as if it had happened here."""
    for text in report["warnings"]:
        warnings.warn(text, NeuronSelectWarning, stacklevel=4)
    if report["deaths"]:
        maker.after_death(report["number"], report["cause"], report["deaths"], num_workers)
    if report["error"]:
        raise NeuronSelectError(report["error"], option=report["option"], value=report["value"])
    if report["row_bytes"] is not None:
        yield Size(report["row_bytes"])
    number, rows, tokens, size, flaw, cost = report["shard"]
    yield Shard(number, rows, tokens, size, flaw, record_of(cost, Cost))


def _check_seen(maker: ShardMaker, numbers: Sequence[int]) -> None:
    # A listing: whether one file is there may be remembered by the file system.
    there = {f"{path.parent.name}/{path.name}" for path in maker.folder.glob("*/*")}
    wanted = [f"{maker.key(signal)}/{shard_name(number)}" for number in numbers for signal in maker.signals]
    if unseen := [name for name in wanted if name not in there]:
        raise NeuronSelectError(
            f"{len(unseen)} shards, first {unseen[0]}, were written by actors and are not seen from here: it needs to be "
            "a folder that all nodes share",
            option="out", value=maker.folder.name,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------- in actors
def _count_deaths(ray: Any) -> Any:
    """An actor that no GPU and no row can kill: how often each shard was begun, and what ended it."""

    class Deaths:  # in here, so that it is sent whole: its process imports no torch
        def __init__(self) -> None:
            self.begun, self.causes = Counter[int](), dict[int, str]()

        def before(self, number: int) -> tuple[int, str]:
            """Deaths so far and the last one's cause, of a shard that is begun now."""
            self.begun[number] += 1
            return self.begun[number] - 1, self.causes.get(number, "a kill or a crash")

        def name_cause(self, number: int, cause: str) -> None:
            self.causes[number] = cause

    return ray.remote(num_cpus=0)(Deaths).remote()


class _ShardActor:
    """Makes the shard of each number it is given. What goes wrong is said in the report, one JSON text a shard."""

    def __init__(
        self, extractor: NeuronFeatureExtractor, folder: Path, shard_rows: int,
        load_pool: Callable[[], Dataset], deaths: Any,
    ) -> None:  # fmt: skip
        self.extractor, self.folder, self.shard_rows = extractor, folder, shard_rows
        self.load_pool, self.deaths = load_pool, deaths
        self.maker: ShardMaker | None = None
        self.sized = False
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()

    def __call__(self, batch: pa.Table) -> pa.Table:
        import ray

        number = batch["number"][0].as_py()
        deaths, cause = ray.get(self.deaths.before.remote(number))
        report = {"number": number, "deaths": deaths, "cause": cause, "row_bytes": None, "error": None}
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", NeuronSelectWarning)
            try:
                if deaths < TRIES:
                    self._work(number, report)
            except NeuronSelectError as error:
                report |= {"error": error.message, "option": error.option, "value": error.value}
            except Exception as error:  # after some of CUDA's only a new process can go on
                ray.get(self.deaths.name_cause.remote(number, f"{type(error).__name__}: {str(error)[:300]}"))
                traceback.print_exc()
                os._exit(1)
        report["warnings"] = [str(w.message) for w in heard if issubclass(w.category, NeuronSelectWarning)]
        return pa.table({"report": [json.dumps(report, default=str)]})

    def _work(self, number: int, report: dict[str, Any]) -> None:
        if not (self.folder / MANIFEST).is_file():
            raise NeuronSelectError(
                f"the node {platform.node()} does not see it; it needs to be a folder that all nodes share",
                option="out", value=self.folder.name,
            )  # fmt: skip
        self.maker = self.maker or ShardMaker(self.load_pool(), self.extractor, self.folder, self.shard_rows)
        for event in self.maker.work([number], sized=self.sized):
            if isinstance(event, Shard):
                report["shard"] = [*event[:-1], plain(event.cost)]
            else:
                report["row_bytes"], self.sized = event.row_bytes, True
