"""Ray actors that compute a store's shards on many nodes: one extractor each, and one GPU each where there are GPUs.

All nodes must see the store's folder, the model and the SAE (or the Hub cache that holds them) on a shared file system.
Ray Data hands out the shards' numbers. An actor reads its rows and writes its file itself, so only counts pass through
Ray's object store. Ray replaces an actor that dies, and its shard is computed again.
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
    """As ``maker.work(numbers)``, in actors of a Ray cluster; shards are yielded in the order in which they end.

    The cluster is the one this process is connected to, else that of ``RAY_ADDRESS``, else one already running on this
    machine, else a new one here. This package must be installed on every node.

    Args:
        num_workers: number of actors; None: one per GPU of the cluster, or one per node without GPUs.
        load_pool: loads the pool on a node; None: the pool is sent (if it is memory-mapped, the paths of its files).

    Raises:
        NeuronSelectError: Ray is not installed, cannot be reached or has no device for an actor; an actor raised it; a
            shard's actors died three times; files written by actors cannot be seen from here.
    """
    ray, options = _import_ray(), maker.extractor.extraction.options
    device = options.device
    if device not in ("auto", "cuda", "cpu"):
        raise NeuronSelectError(
            "Ray gives each actor a GPU of its own: auto, cuda or cpu", option="device", value=device
        )
    if options.device_map is not None:
        raise NeuronSelectError(
            "spreads one model over several GPUs, and Ray gives each actor one: leave it out",
            option="device_map", value=options.device_map,
        )  # fmt: skip
    if not numbers:
        return
    with _cluster(ray):
        # A head is often given no CPUs, so that it takes no work.
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        gpus, cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
        on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
        if not (gpus if on_gpu else nodes):  # Ray would wait for it forever
            raise NeuronSelectError(
                f"the Ray cluster has no {'GPU' if on_gpu else 'CPU'} to give to an actor",
                option="device",
                value=device,
            )
        count = min(len(numbers), num_workers or (gpus if on_gpu else len(nodes)))
        # Actors on CPUs share them. Ray sets an actor's threads to its share, which must fit on the smallest node.
        share = 1 if on_gpu else max(1, min(cpus // count, *(int(node["CPU"]) for node in nodes)))
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = -1  # no limit on the time of a shard
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
            # No prefetch: a report would wait for the next one. Closed, so that no actor goes on with the remaining
            # shards after an error is raised here.
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
        own = type(handler).__module__.startswith("ray.")  # leave other libraries' handlers alone
        if own and isinstance(handler, logging.StreamHandler):  # Ray's log files still hold everything
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
    """Turn an actor's report into the events, warnings and errors that a local worker gives."""
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
    # List the folder: a network file system may cache that a single file does not exist.
    there = {f"{path.parent.name}/{path.name}" for path in maker.folder.glob("*/*")}
    wanted = [f"{maker.key(signal)}/{shard_name(number)}" for number in numbers for signal in maker.signals]
    if unseen := [name for name in wanted if name not in there]:
        raise NeuronSelectError(
            f"{len(unseen)} shards, first {unseen[0]}, were written by actors and cannot be seen from here; give "
            "a folder that all nodes share",
            option="out", value=maker.folder.name,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------- in actors
def _count_deaths(ray: Any) -> Any:
    """Create an actor that counts how often each shard was begun and keeps what ended it."""

    class Deaths:  # defined here, so that Ray sends its code and its process imports no torch
        def __init__(self) -> None:
            self.begun, self.causes = Counter[int](), dict[int, str]()

        def before(self, number: int) -> tuple[int, str]:
            """Count a start of the shard; return how many of its actors died so far and what the last one died of."""
            self.begun[number] += 1
            return self.begun[number] - 1, self.causes.get(number, "a kill or a crash")

        def name_cause(self, number: int, cause: str) -> None:
            self.causes[number] = cause

    return ray.remote(num_cpus=0)(Deaths).remote()


class _ShardActor:
    """Computes the shard of each number it gets and returns one report a shard, as JSON, with any error."""

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
            except Exception as error:  # some CUDA errors need a new process
                ray.get(self.deaths.name_cause.remote(number, f"{type(error).__name__}: {str(error)[:300]}"))
                traceback.print_exc()
                os._exit(1)
        report["warnings"] = [str(w.message) for w in heard if issubclass(w.category, NeuronSelectWarning)]
        return pa.table({"report": [json.dumps(report, default=str)]})

    def _work(self, number: int, report: dict[str, Any]) -> None:
        if not (self.folder / MANIFEST).is_file():
            raise NeuronSelectError(
                f"the node {platform.node()} does not see it; give a folder that all nodes share",
                option="out", value=self.folder.name,
            )  # fmt: skip
        self.maker = self.maker or ShardMaker(self.load_pool(), self.extractor, self.folder, self.shard_rows)
        for event in self.maker.work([number], sized=self.sized):
            if isinstance(event, Shard):
                report["shard"] = [*event[:-1], plain(event.cost)]
            else:
                report["row_bytes"], self.sized = event.row_bytes, True
