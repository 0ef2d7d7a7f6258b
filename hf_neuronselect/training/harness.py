"""Task accuracy of a model and of its LoRA adapters, through lm-evaluation-harness (the extra ``lm-eval``)."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import NeuronSelectError, near_names, one_of
from ..core.sources import Source, resolve
from ..models.checkpoint import read_tokenizer
from ..models.dtypes import DTYPES
from .models import adapted, adapter_source, base_source, load_for_evaluation

# Metrics that are a share of right answers; they are shown in percent and can be averaged with each other.
_SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "pass@1", "pass_at_1")
_BOOTSTRAP = 1000  # draws for standard errors without a formula; lm-eval's default of 100,000 takes minutes


@dataclass(frozen=True)
class HarnessRow:
    """One metric of one model on one task.

    Attributes:
        model: the name given to ``run_tasks``. task: a task, or a group that aggregates its tasks.
        metric: lm-eval's name, with the filter if there is one: ``acc``, ``exact_match,last-number``.
        value: in the metric's own unit (``acc`` is 0 to 1). stderr: its standard error, or None.
        samples: number of answered rows.
    """

    model: str
    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int


@dataclass(frozen=True)
class HarnessResults:
    """Results of ``run_tasks``.

    Attributes:
        rows: every metric, with models and tasks in the order they were given.
        about: versions, the pinned model and adapters, limit, seed, and for each task its version, its few-shot count
            and whether higher is better for each metric.
    """

    rows: list[HarnessRow]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All results, ready for ``json.dumps``; numbers that are not finite become None."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            for key in ("value", "stderr"):
                if row[key] is not None and not math.isfinite(row[key]):
                    row[key] = None
        return {**self.about, "results": rows}

    def table(self, style: str = "text", *, metrics: Mapping[str, str] | None = None, stderr: bool = False) -> str:
        """A table with a line for each model and a column for each task.

        Shares of right answers are in percent. If there are several tasks with comparable metrics (all of them shares
        of right answers, or all the same metric), the last column is the mean over the tasks. A group that has results
        of its own replaces its tasks.

        Args:
            style: ``text``, or ``markdown``, where the best of each column is bold.
            metrics: task -> metric to show; default the first metric of each task.
            stderr: whether to show standard errors.

        Raises:
            NeuronSelectError: an unknown style, or a metric that was not measured.
        """
        one_of(style, ("text", "markdown"), "style")
        columns = self._columns(metrics or {})
        header, cells = ["model"], [[name] for name in dict.fromkeys(row.model for row in self.rows)]
        found = {(row.model, row.task, row.metric): row for row in self.rows}
        values: list[list[float]] = []  # [column][model]
        bases = [metric.split(",")[0] for _, metric in columns]
        for (task, metric), base in zip(columns, bases, strict=True):
            down = self.about["tasks"].get(task, {}).get("higher_is_better", {}).get(metric) is False
            header.append(f"{task} ({base}{' %' if base in _SHARES else ''}{', lower is better' if down else ''})")
            measured = [found.get((line[0], task, metric)) for line in cells]
            scores = [row.value if row else math.nan for row in measured]
            values.append(scores)
            texts = [_number(score, base) for score in scores]
            if stderr:
                texts = [
                    f"{text} ± {_number(row.stderr, base)}" if row and row.stderr is not None else text
                    for text, row in zip(texts, measured, strict=True)
                ]
            _put(cells, texts, scores, down, bold=style == "markdown")
        if len(columns) > 1 and (all(base in _SHARES for base in bases) or len(set(bases)) == 1):
            means = [sum(line) / len(line) for line in zip(*values, strict=True)]
            header.append(f"average{' (%)' if bases[0] in _SHARES else ''}")
            _put(cells, [_number(mean, bases[0]) for mean in means], means, down, bold=style == "markdown")
        return _markdown(header, cells) if style == "markdown" else _text(header, cells)

    def _columns(self, metrics: Mapping[str, str]) -> list[tuple[str, str]]:
        """(task, metric) of each column."""
        measured: dict[str, list[str]] = {}
        for row in self.rows:
            measured.setdefault(row.task, []).append(row.metric)
        for task, metric in metrics.items():
            if metric not in measured.get(task, []):
                known = ", ".join(dict.fromkeys(measured.get(task, []))) or f"no task {task}"
                raise NeuronSelectError(
                    f"not measured for {task}; measured are: {known}", option="metrics", value=metric
                )
        hidden = {child for info in self.about["tasks"].values() for child in info.get("sums_up", [])}
        return [(task, metrics.get(task, known[0])) for task, known in measured.items() if task not in hidden]


def run_tasks(
    model: str,
    adapters: Mapping[str, str | None],
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    apply_chat_template: bool = True,
    seed: int = 0,
    tokenizer: str | None = None,
    token: str | bool | None = None,
) -> HarnessResults:
    """Evaluate a model and its LoRA adapters on the same tasks, in this process.

    Adapters must be safetensors; ``trust_remote_code`` is never set. A task file with ``!function`` runs the Python file
    it names, so only give an ``include_path`` that you trust. Tasks that run model-written code are refused unless the
    environment sets ``HF_ALLOW_CODE_EVAL=1``.

    Args:
        model: folder or Hub id of the base model, which is loaded once.
        adapters: name -> folder or Hub id of a LoRA adapter; None is the base model itself.
        tasks: names of lm-eval tasks, groups or tags.
        include_path: folder of additional task files. Data files relative to a task file are found from any working
            directory, unless the task file uses ``!function`` or ``include``.
        limit: rows per task; None is all. num_fewshot: examples per prompt; None is the task's own number.
        dtype: ``auto`` is float32 on a CPU, else the checkpoint's dtype. device: ``auto`` is CUDA if there is one.
        apply_chat_template: ask as chat turns, with few-shot examples as earlier turns, which suits models tuned on
            chats. False asks in plain text, which suits base models and comparison with published numbers.
        tokenizer: folder or Hub id of the tokenizer for all models; default the base model's. Name an adapter's folder
            if the adapters were trained with a chat template that the base model lacks.

    Raises:
        NeuronSelectError: lm-eval is not installed, a task, model or adapter cannot be loaded, an adapter does not fit
            the model, or there is no chat template.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    _check(adapters, names, limit, batch_size)
    one_of(dtype, ("auto", *DTYPES), "dtype")  # before the tasks are read
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as cause:
        raise NeuronSelectError(
            "needs lm-evaluation-harness: pip install 'hf-neuronselect[lm-eval]'", option="tasks", value=names
        ) from cause

    manager, loaded = _load_tasks(names, None if include_path is None else Path(include_path))
    base = base_source(model, revision, token)
    sources = {
        name: None if path is None else adapter_source(path, token, option="adapters")
        for name, path in adapters.items()
    }
    words = _tokenizer(base, tokenizer, token)
    if apply_chat_template and not words.chat_template:
        raise NeuronSelectError(
            "the model has no chat template: set it to False, or pass tokenizer= with a folder that has one",
            option="apply_chat_template", value=True,
        )  # fmt: skip
    lm = load_for_evaluation(base, dtype, device, token)

    rows: list[HarnessRow] = []
    about: dict[str, Any] = {}
    for name, source in sources.items():
        with adapted(lm, source, name, token) as tuned:
            with _quiet("lm_eval.models.huggingface"):  # it warns about every model it did not load itself
                harness = HFLM(pretrained=tuned, tokenizer=words, batch_size=batch_size, backend="causal")
            with _quiet("lm_eval.evaluator"):  # it warns about every num_fewshot that is passed
                results = lm_eval.simple_evaluate(
                    model=harness,
                    tasks=loaded,
                    task_manager=manager,  # otherwise all of lm-eval's task files are read again
                    num_fewshot=num_fewshot,
                    batch_size=batch_size,
                    limit=limit,
                    bootstrap_iters=_BOOTSTRAP,
                    log_samples=False,
                    apply_chat_template=apply_chat_template,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                    confirm_run_unsafe_code=_allows_code(),
                )
        rows += _rows(name, results)
        about = about or _about_tasks(results)
    return HarnessResults(
        rows,
        {
            "lm_eval": lm_eval.__version__,
            "model": {"id": base.id, "commit": base.commit},
            "adapters": {n: s and {"id": s.id, "commit": s.commit} for n, s in sources.items()},
            "limit": limit,
            "num_fewshot": num_fewshot,
            "apply_chat_template": apply_chat_template,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "batch_size": batch_size,
            "seed": seed,
            "tasks": about,
        },
    )


def _check(adapters: Mapping[str, str | None], names: list[str], limit: int | None, batch_size: int) -> None:
    if not names:
        raise NeuronSelectError("name at least one task", option="tasks", value=names)
    if not adapters:
        raise NeuronSelectError("name at least one; None is the model itself", option="adapters", value=dict(adapters))
    for option, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise NeuronSelectError("must be a whole number of at least 1", option=option, value=number)


def _tokenizer(base: Source, name: str | None, token: str | bool | None) -> Any:
    if name is None:
        return read_tokenizer(base)
    source = resolve(name, revision=None, token=token, option="tokenizer", probe=("tokenizer_config.json",))
    try:
        return read_tokenizer(source)
    except NeuronSelectError as cause:
        raise NeuronSelectError(cause.message, option="tokenizer", value=name) from cause


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Silence a logger below errors."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


# ---------------------------------------------------------------------------------------------- tasks
def _load_tasks(names: list[str], folder: Path | None) -> tuple[Any, list[Any]]:
    """Load lm-eval's manager and its task and group objects; a tag becomes its tasks."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise NeuronSelectError("no such folder; check the path", option="include_path", value=str(folder))
    manager, own = None, []
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        own = manager.all_tasks
    if manager is None or not set(names) <= set(own):  # lm-eval's own 14,000 files take seconds to read
        manager = TaskManager(include_path=None if folder is None else str(folder))
    index = manager.task_index
    for name in names:
        if name not in index:
            raise _unknown_task(name, manager.all_tasks, own, folder)
        if (index[name].cfg or {}).get("unsafe_code") and not _allows_code():
            raise NeuronSelectError(
                "the task runs code that the model writes: set HF_ALLOW_CODE_EVAL=1 where that is safe",
                option="tasks", value=name,
            )  # fmt: skip
    for name, entry in index.items():
        config = _found_from_anywhere(entry)
        if config is not None:
            index[name] = replace(entry, yaml_path=None, cfg=config)
    try:
        loaded = manager.load(list(names))
    except OSError as cause:  # from datasets: a missing file, an unknown data set, or no network
        reason = str(cause).splitlines()[0][:200]
        raise NeuronSelectError(f"a task's data cannot be loaded: {reason}", option="tasks", value=names) from cause
    groups = loaded.get("groups", {})
    inner = {name for children in loaded.get("group_map", {}).values() for name in children}
    inner |= {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    return manager, [item for found in (groups, loaded["tasks"]) for name, item in found.items() if name not in inner]


def _allows_code() -> bool:
    return os.environ.get("HF_ALLOW_CODE_EVAL") == "1"


def _unknown_task(name: str, known: Sequence[str], own: Sequence[str], folder: Path | None) -> NeuronSelectError:
    near = near_names(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists the tasks of lm-eval"
    if folder is None:
        hint += "; your own tasks need include_path"
    else:
        hint += f"; include_path has {', '.join(own[:20]) or 'no task files'}"
    return NeuronSelectError(f"unknown task; {hint}", option="tasks", value=name)


def _found_from_anywhere(entry: Any) -> dict[str, Any] | None:
    """A task's configuration with absolute paths of the data files beside its YAML; None if nothing changes.

    lm-eval passes ``data_files`` unchanged to ``load_dataset``, which resolves them from the working directory.
    """
    config = entry.cfg or {}
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if not files or entry.yaml_path is None:
        return None
    text = entry.yaml_path.read_text(encoding="utf-8")
    if "!function" in text or "\ninclude:" in f"\n{text}":  # the index has only part of such a task
        return None
    folder = entry.yaml_path.resolve().parent

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: absolute(one) for key, one in value.items()}
        if isinstance(value, list):
            return [absolute(one) for one in value]
        return str(folder / value) if (folder / value).is_file() else value

    return {**config, "dataset_kwargs": {**config["dataset_kwargs"], "data_files": absolute(files)}}


# ---------------------------------------------------------------------------------------------- results
def _rows(model: str, results: Mapping[str, Any]) -> list[HarnessRow]:
    found = []
    for task, scores in results["results"].items():
        for key, value in scores.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = scores.get(f"{metric}_stderr,{kind}")
            found.append(
                HarnessRow(
                    model,
                    task,
                    metric if kind == "none" else key,
                    float(value),
                    float(stderr) if isinstance(stderr, (int, float)) else None,
                    int(scores["sample_len"]),
                )
            )
    return found


def _about_tasks(results: Mapping[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {}
    for row in _rows("", results):
        info = about.setdefault(row.task, {
            "version": results["versions"].get(row.task),
            "num_fewshot": results["n-shot"].get(row.task),
            "higher_is_better": {},
        })  # fmt: skip
        up = results["higher_is_better"].get(row.task, {}).get(row.metric.split(",")[0])
        info["higher_is_better"][row.metric] = up
        if row.task in results["group_subtasks"]:
            info["sums_up"] = list(results["group_subtasks"][row.task])
    return about


def _number(value: float | None, metric: str) -> str:
    if value is None or math.isnan(value):
        return "n/a"
    return f"{100 * value:.1f}" if metric in _SHARES else f"{value:.4g}"


def _put(cells: list[list[str]], texts: list[str], values: list[float], down: bool, *, bold: bool) -> None:
    """Add a column, with the best values in bold unless all are equal."""
    finite = [value for value in values if not math.isnan(value)]
    best = (min if down else max)(finite, default=math.nan)
    for line, text, value in zip(cells, texts, values, strict=True):
        line.append(f"**{text}**" if bold and value == best and min(finite) != max(finite) else text)


def _text(header: list[str], lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in (header, *lines)
    )


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [[cell.replace("|", "\\|") for cell in line] for line in (header, *lines)]
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (rows[0], marks, *rows[1:]))
