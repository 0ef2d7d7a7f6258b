"""Let a chat model rate the picks of selections against one exemplar, side by side, beside random rows of the pool."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..core import bundled, progress
from ..core.errors import NeuronSelectError
from ..core.folders import JUDGED, JUDGED_ROWS, JUDGEMENT
from ..core.judging import JudgeConfig
from ..core.provenance import SourceRecord
from ..core.text import replaced
from ..core.writing import check_folder, put, writing
from ..explain.judged import ASPECTS, BEGIN, RANDOM, Check, Group, Judgement, asked, read_aspects, read_prompt
from ..models.chat import JudgeSpec
from ..models.judge import Judge
from ..rows.formats import row_format
from ..rows.load import BUNDLED, conversations_of, load_rows
from ..selection.reader import own_columns
from ..selection.selection import Selection
from .explain import rows_like
from .parts import Say, quiet

LOCAL_TOKENS, API_TOKENS = 160, 512
NO_MARKS = "error: the judge's answer has not the three marks"


@dataclass(frozen=True)
class Texts:
    """Rows to be rated: what they are, their numbers where they came from, and their texts."""

    name: str
    rows: tuple[int, ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, name: str, found: Sequence[tuple[int, str]]) -> Texts:
        return cls(name, tuple(number for number, _ in found), tuple(text for _, text in found))


def judge(config: JudgeConfig, *, say: Say = quiet) -> Judgement:
    """Rate picks, and write what was said into ``config.out`` if it is named.

    Raises:
        NeuronSelectError: bad input; no exemplars or no judge at hand.
    """
    spec = JudgeSpec.of(config, begin=BEGIN, local_tokens=LOCAL_TOKENS, max_tokens=API_TOKENS)
    spec.check()
    prompt = read_prompt(config.prompt)
    if config.out is not None:
        check_folder(config.out, JUDGEMENT)
    selections = {name: Selection.from_pretrained(folder) for name, folder in zip(*_named(config), strict=True)}
    target = _target_of(config, selections)
    exemplars = _exemplars(config, target, selections)
    draw = np.random.default_rng(config.seed)
    chosen = int(draw.integers(len(exemplars)))
    number, exemplar = exemplars[chosen]
    others = [exemplars[i] for i in draw.permutation(len(exemplars)) if i != chosen]
    notes: list[str] = []
    picks = [_sampled(name, one, config, notes) for name, one in selections.items()]
    random = _random_rows(config, list(selections.values()), max(len(one.rows) for one in picks), notes)
    known = _known(target, others[: config.checks], config, notes) if config.checks else []
    groups = [*picks, *([random] if random else []), *known]
    found = iter(_rated(Judge(spec), prompt, exemplar, groups))
    judgement = Judgement(
        spec.name, target, number, tuple(next(found) for _ in picks), next(found) if random else None,
        Check(spec.name, next(found), tuple(found)) if known else None, tuple(notes),
    )  # fmt: skip
    say(str(judgement))
    if config.out is not None:
        _write(config, spec, prompt, judgement)
        say(f"-> {config.out / JUDGED}, {config.out / JUDGED_ROWS}")
    return judgement


def _rated(judge: Judge, prompt: str, exemplar: str, groups: Sequence[Texts]) -> Iterator[Group]:
    """Every pair is asked about in one go, so that the cost is said once."""
    pairs = [asked(prompt, exemplar, text) for group in groups for text in group.texts]
    with progress.track("judge", judge.estimate(pairs).requests, unit="pairs") as told:
        ratings = iter(judge.rate(pairs, read_aspects, what="pairs", unread=NO_MARKS, done=lambda _: told.done(1)))
    for group in groups:
        yield Group(group.name, group.rows, tuple(next(ratings) for _ in group.rows))


# ------------------------------------------------------------------------------------------ what is rated
def _named(config: JudgeConfig) -> tuple[list[str], list[str]]:
    """The selections' names, by the ends of their folders' paths that tell them apart; and where they are."""
    places = {os.path.abspath(folder): folder for folder in config.folder}  # "." has no name of its own
    folders, parts = list(places.values()), [Path(place).parts for place in places]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names, folders


def _target_of(config: JudgeConfig, selections: Mapping[str, Selection]) -> str:
    """The target's name.

    Raises:
        NeuronSelectError: it must be named, or a selection was not made for it.
    """
    asked_for = (config.target or "").partition("=")[0]
    for name, selection in selections.items():
        known = selection.provenance.targets
        if asked_for and known and asked_for not in known:
            raise NeuronSelectError(f"{name} was selected for {', '.join(known)}", option="target", value=asked_for)
    targets = list(dict.fromkeys(one for selection in selections.values() for one in selection.provenance.targets))
    if asked_for:
        return asked_for
    if len(targets) == 1:
        return targets[0]
    raise NeuronSelectError(
        f"the picks are for {', '.join(targets)}: name the one they are rated for" if targets
        else "no selection says what it is for: give the exemplars that picks are rated against, NAME=ROWS", option="target",
    )  # fmt: skip


def _exemplars(config: JudgeConfig, target: str, selections: Mapping[str, Selection]) -> list[tuple[int, str]]:
    """Numbers and texts of the target's exemplars.

    Raises:
        NeuronSelectError: they are not at hand, are others than a selection's, or none can be read.
    """
    records = [one.provenance.targets[target] for one in selections.values() if target in one.provenance.targets]
    sources = [record.source for record in records if record.source is not None]
    given = (config.target or "").partition("=")[2] or next((s for one in sources if (s := _at_hand(one))), "")
    if not given:
        was = next((f" {one.id}" for one in sources if one.id), "")
        raise NeuronSelectError(
            f"its exemplars{was} are not at hand: give them, --target {target}=ROWS", option="target", value=target
        )
    for source in {one.commit: one for one in sources or [SourceRecord()]}.values():  # selections mostly share one
        data = rows_like(given, "target", source)
    found = _texts(data, next(iter(selections.values())), own=True)
    if not found:
        raise NeuronSelectError("has no row that can be read", option="target", value=target)
    return found


def _at_hand(source: SourceRecord) -> str:
    """How rows are loaded again; "" of rows that were a local file or in memory."""
    if source.id is None or source.id.startswith(BUNDLED):
        return source.id or ""
    if not source.commit or ":" in source.commit or source.derived_from is not None:
        return ""
    return ":".join(
        filter(None, (f"{source.id}@{source.commit}", source.config, source.split if source.config else None))
    )


def _texts(data: Dataset, selection: Selection, *, own: bool) -> list[tuple[int, str]]:
    """Number and text of each row that can be read, as the selection reads its rows; ``own`` rows may be of another format."""
    names = own_columns(data.column_names)
    made = selection.provenance.extractor
    options = made.options if made else None
    renames = options.columns if options and set(options.columns.values()) <= set(names) else None
    fmt = row_format(names, "auto" if own or options is None else options.row_format, renames)
    rows = conversations_of(data, fmt)
    return [(i, text) for i, row in enumerate(rows) if not row.skip and (text := row.content()).strip()]


def _sampled(name: str, selection: Selection, config: JudgeConfig, notes: list[str]) -> Texts:
    """Random picks, as many as asked for or all.

    Raises:
        NeuronSelectError: no pick can be read.
    """
    texts = [(i, row.content()) for i, row in enumerate(selection.conversations()) if not row.skip]
    texts = [(int(selection.indices[i]), text) for i, text in texts if text.strip()]
    if not texts:
        raise NeuronSelectError("has no pick that can be read", option="folder", value=name)
    if len(texts) < config.samples:
        notes.append(f"{name} has {len(texts)} picks that can be read: all of them are rated, not {config.samples}")
    drawn = np.random.default_rng(config.seed).permutation(len(texts))[: config.samples]
    return Texts.of(name, [texts[i] for i in drawn])


def _random_rows(config: JudgeConfig, selections: Sequence[Selection], rows: int, notes: list[str]) -> Texts | None:
    """So many rows of the pool that could have been picked; None where the pool is not at hand.

    Raises:
        NeuronSelectError: a pool that a selection was not made from.
    """
    sources = [one.provenance.pool for one in selections]
    if len({one.commit for one in sources}) > 1:
        raise NeuronSelectError(
            f"were picked from different pools ({', '.join(sorted({str(one.id) for one in sources}))}): judge each by itself",
            option="folder",
        )
    spec = config.pool or _at_hand(sources[0])
    if not spec:
        notes.append(
            f"no random rows are beside the picks, since the pool {sources[0].id} is not at hand: give it (--pool)"
        )
        return None
    scores = selections[0].scores
    free = scores.filter(scores.column("excluded").is_null()).column("source_index").to_numpy()
    data = rows_like(spec, "pool", sources[0])
    order = np.random.default_rng([config.seed, 1]).permutation(free[free < len(data)])
    # read a few more than are wanted, since some may have no text
    found = [(int(order[i]), text) for i, text in _texts(data.select(order[: 2 * rows]), selections[0], own=False)]
    return Texts.of(RANDOM, found[:rows])


def _known(target: str, others: Sequence[tuple[int, str]], config: JudgeConfig, notes: list[str]) -> list[Texts]:
    """Pairs whose answer is known: other exemplars; rows of another task; the exemplars with their words shuffled."""
    if not others:
        notes.append("the judge was not checked: that needs more than one exemplar (--target NAME=ROWS)")
        return []
    words = Counter(" ".join(text for _, text in others).lower().split())
    tasks = {name: _texts_of_task(name) for name in bundled.TARGETS}
    other = min(tasks, key=lambda name: _likeness(words, tasks[name]))
    drawn = np.random.default_rng([config.seed, 2])
    rows = [(int(i), tasks[other][i]) for i in drawn.permutation(len(tasks[other]))[: len(others)]]
    shuffled = [(number, " ".join(drawn.permutation(np.asarray(text.split(), object)))) for number, text in others]
    return [
        Texts.of(f"other exemplars of {target}", others),
        Texts.of(f"rows of another task ({BUNDLED}{other})", rows),
        Texts.of("exemplars, words shuffled", shuffled),
    ]


def _texts_of_task(name: str) -> list[str]:
    data = load_rows(f"{BUNDLED}{name}").data
    assert isinstance(data, Dataset)
    return [row.content() for row in conversations_of(data) if not row.skip]


def _likeness(words: Counter[str], texts: Sequence[str]) -> float:
    """Share of the words that the texts have, too."""
    return (words & Counter(" ".join(texts).lower().split())).total() / max(1, words.total())


# -------------------------------------------------------------------------------------------- what is kept
def _write(config: JudgeConfig, spec: JudgeSpec, prompt: str, judgement: Judgement) -> None:
    made = {
        "at": spec.at, "model": spec.model.commit if spec.model else None, "seed": config.seed, "samples": config.samples,
        "prompt": prompt,
    }  # fmt: skip
    assert config.out is not None
    with writing(config.out, JUDGEMENT) as new:
        pq.write_table(_table(judgement), new / JUDGED_ROWS)
        put(new / JUDGED, json.dumps({**judgement.record(), **made}, indent=1) + "\n")


def _table(judgement: Judgement) -> pa.Table:
    """A line for each pair: the group, the row's number, three marks and reasons, what the judge said, and what was wrong."""
    lines = []
    for group in judgement.groups:
        for number, rating in zip(group.rows, group.ratings, strict=True):
            line = {
                "group": group.name,
                "row": number,
                "answer": replaced(rating.said) or None,
                "problem": rating.problem or None,
            }
            for i, aspect in enumerate(ASPECTS):
                marked = None if rating.value is None else rating.value[i]
                line |= {aspect: marked and marked.mark, f"{aspect}_reason": marked and replaced(marked.reason)}
            lines.append(line)
    numbers = {name: pa.float64() for name in ASPECTS}
    texts = {name: pa.string() for name in ("answer", "problem", *(f"{one}_reason" for one in ASPECTS))}
    kinds = {"group": pa.string(), "row": pa.int64(), **numbers, **texts}
    return pa.Table.from_pylist(lines, schema=pa.schema(list(kinds.items())))
