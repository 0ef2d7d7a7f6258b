"""A recipe from end to end: select, train, evaluate, push. Finished steps are skipped, a half-finished one goes on.

What a run leaves in its folder::

    selection/           the rows (of the section `select`)
    controls/<name>/     selections of the baselines it is compared with
    adapters/<name>/     a LoRA adapter each
    evaluation.json, evaluation.png
    run.json             what each step was made of, and its result
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from datasets import Dataset
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..core.errors import NeuronSelectError, unknown
from ..core.folders import SELECTION_RECORD, TRAINING_RECORD
from ..core.provenance import EvaluationRecord, EvaluationRow, SelectionSummary, SourceRecord, plain
from ..core.sources import Source, content_hash, hub_errors
from ..explain.report import text_table
from ..hub.push import check_write_access, push_folder
from ..rows.load import load_rows
from ..selection.selection import Selection
from ..selection.selector import TARGET_NAME
from ..training.config import TrainConfig
from ..training.evaluation import (
    BASE,
    METRIC,
    evaluate_models,
    evaluation_table,
    read_evaluation,
    write_evaluation,
)
from ..training.models import base_source
from ..training.sft import read_record, train_adapter, write_record

if TYPE_CHECKING:
    from ..training.harness import HarnessResults

STATE = "run.json"
_EVALUATE = {
    "data", "max_rows", "max_length", "dtype", "device",
    "tasks", "include_path", "limit", "num_fewshot", "batch_size", "apply_chat_template",
}  # fmt: skip
_PUSH = {
    "selection", "adapter", "private", "revision", "create_pr", "commit_message", "allow_public", "examples",
}  # fmt: skip


# --------------------------------------------------------------------------------------- the sections
@dataclass(frozen=True)
class Recipe:
    """The YAML, checked."""

    select: Mapping[str, Any] | None
    train: TrainConfig
    evaluate: Mapping[str, Any]
    push: Mapping[str, Any]
    data: Mapping[str, str] = field(default_factory=dict)  # name -> rows, of the section evaluate

    @classmethod
    def read(cls, path: Path, *, select_options: Iterable[str] | None = None) -> Recipe:
        """Read and check a recipe, before anything is computed.

        Args:
            select_options: options of ``neuronselect select``, to check its section too.

        Raises:
            NeuronSelectError: it cannot be read, or has sections, keys or values that are not known.
        """
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as cause:
            reason = " ".join(str(cause).split())[:200]
            raise NeuronSelectError(f"cannot be read: {reason}", option="config", value=path.name) from cause
        if not isinstance(found, dict) or "train" not in found:
            raise NeuronSelectError("needs a section train: (TRL's keys)", option="config", value=path.name)
        for name, section in found.items():
            if name not in ("select", "train", "evaluate", "push"):
                raise unknown("section", name, ("select", "train", "evaluate", "push"), "config")
            if not isinstance(section, dict):
                raise NeuronSelectError(f"section {name} needs key: value lines", option="config", value=path.name)
        sections = {
            name: {str(key).replace("-", "_"): value for key, value in (found.get(name) or {}).items()}
            for name in ("select", "evaluate", "push")
        }
        options = set(sections["select"] if select_options is None else select_options) | {"out"}
        for name, known in (("select", options), ("evaluate", _EVALUATE), ("push", _PUSH)):
            for key in sections[name]:
                if key not in known:
                    raise unknown(f"key of section {name}", key, known, "config")
        if "out" in sections["select"]:
            raise NeuronSelectError("belongs to the command, not into a recipe's select", option="out",
                                    value=sections["select"]["out"])  # fmt: skip
        return cls(
            select=sections["select"] if "select" in found else None,
            train=TrainConfig.from_section(found["train"]),
            evaluate=sections["evaluate"],
            push=sections["push"],
            data=named_specs(sections["evaluate"].get("data")),
        )


def named_specs(value: Any) -> dict[str, str]:
    """``{name: rows}``, or a list of ``[NAME=]rows``, as of ``--data``."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return {str(name): str(spec) for name, spec in value.items()}
    found: dict[str, str] = {}
    for text in [value] if isinstance(value, str) else value:
        name, equals, spec = str(text).partition("=")
        if not (equals and TARGET_NAME.fullmatch(name)):
            name, spec = Path(str(text).split(":")[0].split("@")[0]).name.split(".")[0], str(text)
        if name in found:
            raise NeuronSelectError("two data sets of this name", option="data", value=name)
        found[name] = spec
    return found


def select_words(section: Mapping[str, Any], out: Path, control: str | None = None) -> list[str]:
    """The words of ``neuronselect select`` that a section stands for; with ``control``, of that baseline."""
    words = ["select", "--out", str(out)]
    for key, value in section.items():
        if control and key in ("method", "method_option", "aggregate", "weight", "features"):
            continue
        if control == "full" and key in ("ratio", "k", "threshold", "max_tokens"):
            continue
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False and value is not None:
            for one in value if isinstance(value, list) else [value]:
                words += [flag, str(one)]
    return words + (["--method", control] if control else [])


# ---------------------------------------------------------------------------------------------- steps
@dataclass
class _Steps:
    """What was done, by name, in ``run.json``; a step is skipped if it was made of the same things."""

    out: Path
    say: Callable[[str], None]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        foreign = NeuronSelectError("exists and is not a run's folder; name another", option="out", value=self.out.name)
        try:
            self.done = json.loads((self.out / STATE).read_text(encoding="utf-8"))["steps"]
        except FileNotFoundError:
            if self.out.exists() and any(self.out.iterdir()):
                raise foreign from None
            self.out.mkdir(parents=True, exist_ok=True)
            self._write()
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise foreign from cause

    def _write(self) -> None:
        part = self.out / f".{STATE}.part"
        part.write_text(json.dumps({"steps": self.done}, indent=1) + "\n", encoding="utf-8")
        part.replace(self.out / STATE)

    def run(self, name: str, made_of: Any, work: Callable[[], Any], result: Path | None = None) -> str:
        """Do a step unless it was done; returns what later steps are made of: its key, and when it was done.

        Args:
            made_of: JSON values that decide its result. result: a file that must still be there.
        """
        key = hashlib.blake2b(json.dumps(made_of, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
        before = self.done.get(name)
        if before and before["key"] == key and (result is None or result.exists()):
            self.say(f"{name}: done before ({before['seconds']:.0f} s then)")
            return f"{key} {before['finished']}"
        self.say(f"{name} ...")
        started = time.perf_counter()
        value = work()
        self.done[name] = {
            "key": key,
            "seconds": round(time.perf_counter() - started, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **({"result": value} if value is not None else {}),
        }
        self._write()
        return f"{key} {self.done[name]['finished']}"


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    select: Callable[[Sequence[str]], None],
    say: Callable[[str], None],
    data: str | None = None,
    push: bool = True,
) -> int:
    """Run a recipe; returns an exit status: 3 if a requested part was skipped, and said so, else 0.

    Args:
        out: the run's folder, new or one of an earlier run. select: runs ``neuronselect select`` words.
        data: train on these rows (a selection or any rows) instead of selecting.
        push: False leaves the section ``push`` out.
    """
    data = data or recipe.train.data
    if recipe.select is None and data is None:
        raise NeuronSelectError("name a selection or rows to train on, or add a section select", option="data")
    if recipe.train.controls and (recipe.select is None or data is not None):
        raise NeuronSelectError("baselines need the section select: they are drawn from its pool", option="controls",
                                value=", ".join(recipe.train.controls))  # fmt: skip
    wants_push = bool(recipe.push.get("selection") or recipe.push.get("adapter")) and push
    if wants_push and data is not None and recipe.push.get("selection"):
        raise NeuronSelectError("the rows are not selected by this run; push their folder with `neuronselect push`, "
                                "and leave selection: away in the section push", option="push",
                                value=recipe.push["selection"])  # fmt: skip
    offline = wants_push and constants.HF_HUB_OFFLINE
    user = check_write_access() if wants_push and not offline else ""
    if recipe.evaluate.get("tasks") and find_spec("lm_eval") is None:
        raise NeuronSelectError("needs lm-evaluation-harness: pip install 'hf-neuronselect[lm-eval]'", option="tasks",
                                value=recipe.evaluate["tasks"])  # fmt: skip
    base = base_source(recipe.train.model, recipe.train.revision)
    held_out = {name: _dataset(spec, "data") for name, spec in recipe.data.items()}  # missing ones are said now
    run = _Run(recipe, out, _Steps(out, say), base.commit, user, held_out)
    if data is None:
        assert recipe.select is not None
        run.select(recipe.select, select)
    else:
        run.take(data)
    run.train()
    if recipe.data or recipe.evaluate.get("tasks"):
        run.evaluate(base, say)
    if wants_push and not offline:
        run.push()
        for what, url in run.steps.done["push"]["result"].items():
            say(f"{what}: {url}")
    if offline:
        say("push: left out, HF_HUB_OFFLINE is set; run again without it")
        return 3
    return 0


@dataclass
class _Run:
    """The steps of one run, in order; each fills what the next one needs."""

    recipe: Recipe
    out: Path
    steps: _Steps
    base_commit: str
    user: str
    held_out: Mapping[str, Dataset]
    rows: dict[str, tuple[Dataset, SelectionSummary]] = field(default_factory=dict)  # name -> rows, their record
    keys: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the adapter that all this is about: the first one."""
        return next(iter(self.rows))

    def adapter(self, name: str) -> Path:
        return self.out / "adapters" / name

    # ------------------------------------------------------------------------------------- select
    def select(self, section: Mapping[str, Any], run: Callable[[Sequence[str]], None]) -> None:
        read = [*map(section.get, ("pool", "features", "model", "sae")), *_rows_named(section.get("target"))]
        made_of = [section, [_identity(spec) for spec in read if spec]]
        main = self.recipe.train.name or str(section.get("method", "mona"))
        for name, control in ((main, None), *((name, name) for name in self.recipe.train.controls)):
            if name in self.rows:
                raise NeuronSelectError("a baseline has the adapter's name; set name: in the section train",
                                        option="name", value=name)  # fmt: skip
            folder = self.out / "selection" if control is None else self.out / "controls" / name

            def work(folder: Path = folder, control: str | None = control) -> None:
                if not (folder / SELECTION_RECORD).exists():
                    shutil.rmtree(folder, ignore_errors=True)  # half written by a run that was stopped
                run(select_words(section, folder, control))

            self.steps.run(f"select {name}", [made_of, control], work, folder / SELECTION_RECORD)
            selection = Selection.from_pretrained(folder)
            self.rows[name] = selection.dataset, selection.provenance.summary()

    def take(self, data: str) -> None:
        """Rows that were selected before, or elsewhere."""
        rows, record = load_training_rows(data)
        self.rows[self.recipe.train.name or (record.method.name if record.method else "adapter")] = rows, record

    # -------------------------------------------------------------------------------------- train
    def train(self) -> None:
        for name, (rows, record) in self.rows.items():
            folder = self.adapter(name)
            train = self.recipe.train
            made_of = [
                train.about(),
                train.chat_template(),
                self.base_commit,
                record.files or plain(record.pool),
            ]

            def work(rows: Dataset = rows, record: Any = record, folder: Path = folder, name: str = name) -> None:
                if (folder / TRAINING_RECORD).exists():  # of other rows or settings
                    shutil.rmtree(folder)
                train_adapter(rows, folder, self.recipe.train, selection=record, name=name)

            self.keys.append(self.steps.run(f"train {name}", made_of, work, folder / TRAINING_RECORD))

    # ----------------------------------------------------------------------------------- evaluate
    def evaluate(self, base: Source, say: Callable[[str], None]) -> None:
        section = self.recipe.evaluate
        read = [*self.recipe.data.values(), *filter(None, [section.get("include_path")])]
        made_of = [section, self.keys, [_identity(spec) for spec in read]]

        def work() -> None:
            found = EvaluationRecord(base=SourceRecord.of(base))
            adapters = {name: str(self.adapter(name)) for name in self.rows}
            if self.held_out:
                rows = evaluate_models(
                    base,
                    adapters,
                    self.held_out,
                    trained=[data for data, _ in self.rows.values()],
                    chat_template=self.recipe.train.chat_template(),
                    **{key: section[key] for key in ("max_rows", "max_length", "dtype", "device") if key in section},
                )
                found = replace(found, rows=tuple(rows))
            if section.get("tasks"):
                results = run_harness(base, adapters, section)
                found = replace(
                    found,
                    rows=(*found.rows, *task_rows(results)),
                    tasks=results.to_dict(),
                    tasks_table=results.table(),
                )
            for name in self.rows:
                record = read_record(self.adapter(name))
                write_record(self.adapter(name), replace(record, evaluation=found.rows))
            write_evaluation(self.out, found)

        self.keys.append(self.steps.run("evaluate", made_of, work, self.out / "evaluation.json"))
        for line in evaluation_text(read_evaluation(self.out)):
            say(line)
        say(f"-> {self.out / 'evaluation.json'}, {self.out / 'evaluation.png'}\n")

    # --------------------------------------------------------------------------------------- push
    def push(self) -> None:
        section = self.recipe.push
        options = {key: section[key] for key in ("private", "revision", "create_pr", "commit_message", "allow_public")
                   if key in section}  # fmt: skip

        def full(repo: str) -> str:
            return repo if "/" in repo else f"{self.user}/{repo}"

        def work() -> dict[str, str]:
            urls = {}
            record = read_record(self.adapter(self.name))
            if repo := section.get("selection"):
                folder = self.out / "selection"
                if section.get("examples") is False:
                    Selection.from_pretrained(folder).write_pages(folder, examples=False)
                urls["selection"] = push_folder(folder, full(repo), **options)
                assert record.selection is not None  # this run selected its rows
                record = replace(record, selection=replace(record.selection, repo_id=full(repo)))
            if repo := section.get("adapter"):
                write_record(self.adapter(self.name), record)
                urls["adapter"] = push_folder(self.adapter(self.name), full(repo), **options)
            return urls

        self.steps.run("push", [section, self.keys, constants.ENDPOINT], work)


# ------------------------------------------------------------------------------------------- helpers
def evaluation_text(found: EvaluationRecord) -> list[str]:
    """Lines of an evaluation: the losses, then the tasks as papers print them."""
    lines = []
    losses = [row for row in found.rows if row.metric == METRIC]
    if losses:
        lines += [
            "",
            text_table(*evaluation_table(losses)),
            f"({METRIC}: nats a token of held-out answers, lower is better)",
        ]
    return [*lines, "", found.tasks_table] if found.tasks_table else lines


def load_training_rows(spec: str, token: str | bool | None = None) -> tuple[Dataset, SelectionSummary]:
    """Load rows and where they come from: a selection (folder or Hub id) or any rows ``--pool`` takes."""
    path = Path(spec)
    is_selection = (path / SELECTION_RECORD).is_file()
    if not path.exists() and "@" not in spec and ":" not in spec:
        with hub_errors("data", spec):
            try:
                hf_hub_download(spec, SELECTION_RECORD, repo_type="dataset", token=token)
                is_selection = True
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                is_selection = False
    if is_selection:
        selection = Selection.from_pretrained(spec, token=token)
        return selection.dataset, selection.provenance.summary(None if path.exists() else spec)
    rows = load_rows(spec, option="data", token=token)
    assert isinstance(rows.data, Dataset)
    return rows.data, SelectionSummary(pool=rows.source)


def run_harness(base: Source, adapters: Mapping[str, str], section: Mapping[str, Any]) -> HarnessResults:
    """lm-evaluation-harness on the base and its adapters, by the keys of the section ``evaluate``."""
    from ..training.harness import run_tasks

    tasks = section["tasks"]
    options = ("include_path", "limit", "num_fewshot", "batch_size", "apply_chat_template", "dtype", "device")
    return run_tasks(
        base.location,
        {BASE: None, **adapters},
        [tasks] if isinstance(tasks, str) else list(tasks),
        revision=base.revision,
        # An adapter's tokenizer has a chat template, which a base model may lack.
        tokenizer=next(iter(adapters.values()), None),
        **{key: section[key] for key in options if section.get(key) is not None},
    )


def task_rows(results: HarnessResults) -> list[EvaluationRow]:
    """The harness's numbers as rows of ``evaluate_models``."""
    return [
        EvaluationRow(model=row.model, data=row.task, metric=row.metric, value=row.value, rows=row.samples)
        for row in results.rows
    ]


def _dataset(spec: str, option: str) -> Dataset:
    rows = load_rows(spec, option=option).data
    assert isinstance(rows, Dataset)
    return rows


def _rows_named(targets: Any) -> list[str]:
    """The rows' part of ``[NAME=]rows``."""
    found = []
    for text in [targets] if isinstance(targets, str) else targets or []:
        name, equals, rest = str(text).partition("=")
        found.append(rest if equals and TARGET_NAME.fullmatch(name) else str(text))
    return [spec.removeprefix("capability:") for spec in found]


def _identity(spec: Any) -> str:
    """What rows are: the content of a local file or folder, the name of what is on the Hub."""
    path = Path(str(spec))
    return content_hash(path) if path.exists() else str(spec)
