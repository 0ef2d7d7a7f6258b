"""A recipe from end to end: select, train, evaluate, push. Finished steps are skipped, a half-finished one goes on.

A run's folder::

    selection/           rows selected by the section `select`
    controls/<name>/     selections of the controls it is compared with
    adapters/<name>/     a LoRA adapter each
    evaluation.json, evaluation.png
    run.json             finished steps, what they were made from, their results
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset, IterableDataset
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..core.configs import CAPABILITY, RunConfig, SelectConfig
from ..core.digests import tree_hash
from ..core.errors import NeuronSelectError
from ..core.folders import RUN, SELECTION_RECORD, TRAINING_RECORD, read_adapter
from ..core.provenance import SelectionSummary, SourceRecord, plain
from ..core.sources import Source, bundled_folder, hub_errors
from ..core.writing import reserve
from ..hub.push import check_write_access
from ..models.pin import pin_model
from ..rows.formats import Conversation
from ..rows.identity import pool_digest
from ..rows.load import conversations_of, load_rows
from ..selection.library import load_capability
from ..selection.reader import Reader
from ..selection.selection import Selection
from ..signals.extractor import NeuronFeatureExtractor
from ..training.data import check_trainable
from ..training.evaluation import EVALUATION_RECORD, read_evaluation, write_evaluation
from ..training.models import base_source
from ..training.sft import train_adapter, write_record
from .evaluate import check_tasks, evaluation_text, load_held_out, measure
from .job import Job, share_pass
from .parts import Say, named_specs, quiet
from .push import commit
from .recipe import Recipe, control_config
from .select import extractor_for, finish, prepare
from .steps import Steps

STORE = "features"
_TRIED = 500  # rows of the pool that are tried before the pass


def run(config: RunConfig, *, say: Say = quiet, note: Say = quiet) -> int:
    """Run a recipe.

    Returns:
        Exit status: 3 if a part that was asked for was left out, and said so, else 0.

    Raises:
        NeuronSelectError: bad input; recipe, rows, models and Hub access are checked before anything is computed.
    """
    recipe = Recipe.read(config.recipe)
    data = config.data or recipe.train.data
    if recipe.select is None and data is None:
        raise NeuronSelectError("name a selection or rows to train on, or add a section select", option="data")
    if recipe.train.controls and (recipe.select is None or data is not None):
        raise NeuronSelectError("controls need the section select: they are drawn from its pool", option="controls",
                                value=", ".join(recipe.train.controls))  # fmt: skip
    wants_push = bool(recipe.push.selection or recipe.push.adapter) and config.push
    if wants_push and data is not None and recipe.push.selection:
        raise NeuronSelectError("the rows are not selected by this run; push their folder with `neuronselect push`, "
                                "and remove selection: from the section push", option="push",
                                value=recipe.push.selection)  # fmt: skip
    check_tasks(recipe.evaluate)
    offline = wants_push and constants.HF_HUB_OFFLINE
    user = check_write_access() if wants_push and not offline else ""
    given = None if data is None else load_training_rows(data)
    if recipe.train.model is None:
        model, revision = _scoring_model(recipe.select, given)
        recipe = replace(recipe, train=replace(recipe.train, model=model, revision=revision))
    base = base_source(recipe.train.model, recipe.train.revision, to_train=True)
    held_out = load_held_out(recipe.evaluate)
    with reserve(config.out, RUN):
        steps = _Run(recipe, config.out, Steps(config.out, say), base, user, held_out, say, note)
        if given is None:
            assert recipe.select is not None
            steps.select(recipe.select)
        else:
            steps.take(given)
        steps.train()
        if held_out or recipe.evaluate.tasks:
            steps.evaluate()
        if wants_push and not offline:
            steps.push()
    if offline:
        say("push: left out, HF_HUB_OFFLINE is set; run again without it")
        return 3
    return 0


@dataclass
class _Run:
    """The steps of one run, in order; each fills in what the next one needs."""

    recipe: Recipe
    out: Path
    steps: Steps
    base: Source
    user: str
    held_out: Mapping[str, Dataset]
    say: Say
    note: Say
    rows: dict[str, tuple[list[Conversation], SelectionSummary]] = field(default_factory=dict)  # by adapter
    keys: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the run's own adapter: the first one."""
        return next(iter(self.rows))

    def adapter(self, name: str) -> Path:
        return self.out / "adapters" / name

    # ------------------------------------------------------------------------------------- select
    def select(self, config: SelectConfig) -> None:
        """The recipe's own selection, then those of its controls, in one pass over the pool."""
        main = self.recipe.train.name or config.method
        if main in self.recipe.train.controls:
            raise NeuronSelectError("a control has the adapter's name; set name: in the section train", option="name",
                                    value=main)  # fmt: skip
        folders = {main: self.out / "selection"}
        folders |= {name: self.out / "controls" / name for name in self.recipe.train.controls}
        read = _read_by(config)
        inputs = {
            name: [replace(config, out=Path("selection")).values(), read, None if name == main else name]
            for name in folders
        }
        waiting = [name for name, folder in folders.items()
                   if not self.steps.is_done(f"select {name}", inputs[name], folder / SELECTION_RECORD)]  # fmt: skip

        def config_of(name: str) -> SelectConfig:
            if name == main:
                return replace(config, out=folders[name])
            return control_config(config, name, folders[name], len(self.rows[main][0]) if main in self.rows else 1)

        jobs = self._jobs({name: config_of(name) for name in waiting})
        for name, folder in folders.items():

            def work(name: str = name) -> None:
                finish(config_of(name), jobs[name], say=self.say, note=self.note)

            self.steps.run(f"select {name}", inputs[name], work, folder / SELECTION_RECORD)
            selection = Selection.from_pretrained(folder)
            self.rows[name] = selection.conversations(), selection.provenance.summary()
        shutil.rmtree(self.out / STORE, ignore_errors=True)

    def _jobs(self, configs: Mapping[str, SelectConfig]) -> dict[str, Job]:
        """A job for each selection, on the same pool, exemplars and extractor."""
        jobs: dict[str, Job] = {}
        for name, config in configs.items():
            first = next(iter(jobs.values()), None)
            jobs[name] = prepare(config, like=first)
        signals = [signal for job in jobs.values() for signal in job.chosen.signals]
        if jobs:
            config, job = next(iter(configs.values())), next(iter(jobs.values()))
            self._check_trainable(job.rows.data, config)
            extractor = extractor_for(config, job, list(dict.fromkeys(signals)), self.note)
            for job in jobs.values():
                job.prepare(extractor)
            share_pass(list(jobs.values()), self.out / STORE, say=self.note)
        return jobs

    def _check_trainable(self, pool: Dataset | IterableDataset, config: SelectConfig) -> None:
        """Try rows from all over the pool, or a stream's first, with the base's chat template, before the pass."""
        if isinstance(pool, Dataset):
            pool = pool.select(range(0, len(pool), len(pool) // _TRIED + 1))
        else:
            pool = pool.take(_TRIED)
        extractor = NeuronFeatureExtractor.without_model(config, ())
        rows = [row for batch in Reader((), extractor, {}).read(pool) for row in batch.conversations]
        if reasons := check_trainable(rows, self.base, self.recipe.train):
            self.note(f"Of {len(rows)} rows tried, some cannot be trained on and would be left out: {reasons}")

    def take(self, given: TrainingRows) -> None:
        """Rows that were selected before, or elsewhere."""
        method = given.summary.method
        name = self.recipe.train.name or (method.name if method else "adapter")
        self.rows[name] = given.rows, given.summary

    # -------------------------------------------------------------------------------------- train
    def train(self) -> None:
        train = self.recipe.train
        for name, (rows, record) in self.rows.items():
            folder = self.adapter(name)
            read = {file: known for file, known in (record.files or {}).items() if file.startswith("data/")}
            inputs = [
                train.about(),
                train.chat_template(),
                self.base.commit,
                read or plain(record.pool),
            ]

            def work(
                rows: list[Conversation] = rows,
                record: SelectionSummary = record,
                folder: Path = folder,
                name: str = name,
            ) -> None:
                train_adapter(rows, folder, train, selection=record, name=name)

            self.keys.append(self.steps.run(f"train {name}", inputs, work, folder / TRAINING_RECORD))

    # ----------------------------------------------------------------------------------- evaluate
    def evaluate(self) -> None:
        options = self.recipe.evaluate
        read = [pool_digest(rows) for rows in self.held_out.values()]
        read += [_place(options.include_path)] if options.include_path else []
        inputs = [options.values(), self.keys, read]

        def work() -> None:
            found = measure(
                self.base,
                {name: str(self.adapter(name)) for name in self.rows},
                options,
                self.held_out,
                trained=[data for data, _ in self.rows.values()],
                chat_template=self.recipe.train.chat_template(),
            )
            for name in self.rows:
                record = replace(read_adapter(self.adapter(name), name), evaluation=found.rows)
                write_record(self.adapter(name), record)
            write_evaluation(self.out, found)

        file = self.out / EVALUATION_RECORD
        self.keys.append(self.steps.run("evaluate", inputs, work, file))
        for line in evaluation_text(read_evaluation(self.out)):
            self.say(line)
        self.say(f"-> {file}, {self.out / 'evaluation.png'}\n")

    # --------------------------------------------------------------------------------------- push
    def push(self) -> None:
        section = self.recipe.push

        def full(repo: str) -> str:
            return repo if "/" in repo else f"{self.user}/{repo}"

        def work() -> dict[str, str]:
            urls = {}
            record = read_adapter(self.adapter(self.name), self.name)
            if section.selection:
                folder, repo = self.out / "selection", full(section.selection)
                if not section.examples:
                    Selection.from_pretrained(folder).write_pages(folder, examples=False)
                urls["selection"] = commit(folder, repo, section)
                assert record.selection is not None
                record = replace(record, selection=replace(record.selection, repo_id=repo))
            if section.adapter:
                write_record(self.adapter(self.name), record)
                urls["adapter"] = commit(self.adapter(self.name), full(section.adapter), section)
            return urls

        self.steps.run("push", [section.values(), self.keys, constants.ENDPOINT], work)
        for kind, url in self.steps.done["push"].result.items():
            self.say(f"{kind}: {url}")


# ------------------------------------------------------------------------------------------- helpers
@dataclass(frozen=True)
class TrainingRows:
    """Rows, where they come from, and the model that they were selected with, if that is known."""

    rows: list[Conversation]
    summary: SelectionSummary
    model: SourceRecord | None = None


def load_training_rows(spec: str, token: str | bool | None = None) -> TrainingRows:
    """Rows and where they come from: a selection (folder or Hub id) or any rows ``--pool`` takes."""
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
        made = selection.provenance
        summary = made.summary(None if path.exists() else spec)
        return TrainingRows(selection.conversations(), summary, made.extractor.model if made.extractor else None)
    rows = load_rows(spec, option="data", token=token)
    assert isinstance(rows.data, Dataset)
    return TrainingRows(conversations_of(rows.data), SelectionSummary(pool=rows.source))


def _scoring_model(select: SelectConfig | None, given: TrainingRows | None) -> tuple[str | None, str | None]:
    """The model that rows are, or were, selected with: id or folder, and revision; None for the bundled one.

    Raises:
        NeuronSelectError: a folder whose place is not known.
    """
    if given is None:
        return (select.model, select.revision) if select else (None, None)
    model = given.model
    if model is None or bundled_folder(model.commit):
        return None, None
    if not model.on_hub:
        raise NeuronSelectError(
            f"name the model to fine-tune (model: in the section train): the rows were selected with {model.id}, which is "
            "no model of the Hub", option="model",
        )  # fmt: skip
    return model.id, model.commit


def _read_by(config: SelectConfig) -> list[str]:
    """The content of all that decides a selection: rows, models, stored signals, saved capabilities."""
    found = [_rows(config.pool, config.streaming), *([_rows(config.held_out)] if config.held_out else [])]
    named = [*named_specs(config.target, "target").values(), *named_specs(config.avoid, "avoid").values()]
    for spec in named:
        if spec.startswith(CAPABILITY):
            capability = load_capability(spec.removeprefix(CAPABILITY)).capability
            found.append(str(capability and capability.commit))
        else:
            found.append(_rows(spec))
    if config.model:
        found.append(pin_model(config.model, revision=config.revision, token=None).key)
    places = (config.sae, config.encoder, config.mntp_adapter, config.features)
    found += [_place(place) for place in places if place]
    return found


def _rows(spec: str, streaming: bool = False) -> str:
    return str(load_rows(spec, streaming=streaming).about["commit"])


def _place(name: str | Path) -> str:
    """A folder's content, or the name of what is on the Hub."""
    return tree_hash(Path(name)) if Path(name).exists() else str(name)
