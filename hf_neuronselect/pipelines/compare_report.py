"""A comparison as a page: what is first on it, and in what order the rest follows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..core.configs import CompareConfig
from ..core.options import flag_words
from ..explain.charts import in_both_widths
from ..explain.compare_charts import Point, dot_chart, heat_map, upset_plot
from ..explain.compare_page import ComparePage, Figure, Part, Section, Table, compare_page
from ..explain.shared_picks import SharedPicks
from ..hub.cards import source_name
from ..selection.cosines import Cosines
from .comparison import BOOTSTRAP, HIGH, LEGEND, LOW, RANKS, Comparison, Line, Rank, number, rank_cells
from .core_rows import CORE, CoreLine, core_cells, core_texts
from .trained import TRAINED, own_gains, transfer_matrix

_FOLDERS = re.compile(r"(?<![\w.:/-])(?:~|\.{1,2})?/[^\s,()=]*/(?=[^\s,()=/])|(?<![\w:/-])[A-Za-z]:\\[^\s,()=]*\\")
TEXTS_SHOWN = 6
DONE_BEFORE = 0.1
"""A shared pass of fewer seconds read its signals from a store."""
_TEXTS = ("chat_template", "encoder_prompt")
"""Options whose text may have slashes that are no folders."""


def page_of(
    found: Comparison, shared: Mapping[str, SharedPicks], cores: Sequence[CoreLine], cosines: Mapping[str, Cosines]
) -> str:
    """The page, as HTML.

    Args:
        shared, cores: what each method's picks for several targets have in common. cosines: method -> of its targets' directions.
    """
    ranks = found.ranks()
    sections = [
        *([_ranks(ranks)] if ranks else []),
        *([_targets(found)] if found.lines else []),
        *([_shared(found, shared, cores, cosines)] if shared else []),
        *([_transfer(found)] if found.transfers else []),
        *([_costs(found)] if found.lines else []),
        *([_failed(found)] if found.failed else []),
    ]
    first, headline, lead = _headline(found, ranks)
    page = ComparePage(
        first, headline, lead, _chips(found), [*_doubts(found, ranks), *found.warnings(found.targets)],
        _first_figures(found), _numbers(found, ranks), sections, _command(found.config),
    )  # fmt: skip
    return compare_page(page)


# ------------------------------------------------------------------------------------------ first screen
def _headline(found: Comparison, ranks: Sequence[Rank]) -> tuple[str, str, str]:
    methods, targets = len(dict.fromkeys(line.method for line in found.lines)), len(found.targets)
    size = f"{_count(methods, 'method')} on {_count(targets, 'target')}"
    if not ranks:
        lead = (
            "Nothing says which picks are right: name the sources that are, with --related, to rank methods."
            if not any(line.precision is not None for line in found.lines)
            else "Ranks need two methods that ran on every target whose right sources are known."
        )
        return "", size, lead
    best = ranks[0]
    lead = f"By precision, the share of picks from sources that count as right, its mean rank over targets is {best.mean:.1f}"
    lead += f" (5–95 %: {best.low:.1f} to {best.high:.1f}); 1 is best."
    near = [one.method for one in ranks[1:] if one.low <= best.high]
    if near:
        whose = f"interval of {near[0]} reaches" if len(near) == 1 else f"intervals of {_listed(near)} reach"
        lead += f" The {whose} into its own: the order between them is not settled."
    ranked = f"{_count(len(ranks), 'method')} on {_count(targets, 'target')}"  # those that ran
    return best.method, f"is first of {ranked}", lead


def _chips(found: Comparison) -> list[tuple[str, str]]:
    config, extraction = found.config, getattr(found.extractor, "extraction", None)
    first = next(iter(found.selections.values()), None)
    chips: dict[str, object] = {"pool": f"{len(found.pool):,} rows" if found.pool is not None else ""}
    if first is not None:
        chips["picks"] = f"{len(first):,} rows for each target"
    if extraction is not None:
        chips |= {"model": source_name(extraction.model), "SAE": source_name(extraction.sae)}
    if config is not None:
        chips |= {"draws": config.draws if config.draws > 1 else "", "refits": config.resamples or ""}
    if found.pass_seconds >= DONE_BEFORE:
        chips["the pool was read in"] = f"{found.pass_seconds:,.1f} s"
    return [(name, str(value)) for name, value in chips.items() if value]


def _doubts(found: Comparison, ranks: Sequence[Rank]) -> list[str]:
    """Why the first place may say nothing about the method."""
    if ranks and _is_control(found, ranks[0].method):
        return [f"{ranks[0].method} is a control: no method beats it here, so nothing on this page speaks for one"]
    return []


def _is_control(found: Comparison, method: str) -> bool:
    job = next((job for (of, _), job in found.jobs.items() if of == method), None)
    return job is not None and not job.chosen.method.grades


def _numbers(found: Comparison, ranks: Sequence[Rank]) -> list[tuple[str, str, str]]:
    numbers = []
    if ranks:
        best = ranks[0]
        numbers.append(("mean rank of the first", f"{best.mean:.1f}", f"{best.low:.1f} to {best.high:.1f} of {len(ranks)}"))  # fmt: skip
        points = {one.name: one.value for one in _mean_points(found)}
        beside = [f"{name} {value:.2f}" for name, value in points.items() if _is_control(found, name) and name != best.method]  # fmt: skip
        base = _base(found.lines)
        if base is not None:
            beside.append(f"the pool {base:.2f}")
        numbers.append(("its mean precision", f"{points[best.method]:.2f}", ", ".join(beside)))
    seconds = sum(line.seconds or 0.0 for line in found.lines)
    if found.lines:
        shared = (
            f"the pass: {found.pass_seconds:,.1f} s"
            if found.pass_seconds >= DONE_BEFORE
            else "the pass was done before"
        )
        numbers.append(("seconds of all methods, beside the pass they share", f"{seconds:,.1f}", shared))
    return numbers


def _mean_points(found: Comparison, seed: int = 0) -> list[Point]:
    """Mean precision over targets of methods that ran on all of them; the interval draws one of each target's samples."""
    targets = [name for name in found.targets if any(line.precision is not None for line in found.of(name))]
    values = {(line.method, line.target): line.precision for line in found.lines if line.precision is not None}
    draw, points = np.random.default_rng(seed), []
    for method in dict.fromkeys(line.method for line in found.lines):
        if not targets or not all((method, target) in values for target in targets):
            continue
        own = [values[method, target] or 0.0 for target in targets]
        samples = [found.samples.get((method, target), np.empty(0)) for target in targets]
        low = high = None
        if any(len(sample) > 1 for sample in samples):
            drawn = [draw.choice(sample, BOOTSTRAP) if len(sample) > 1 else np.full(BOOTSTRAP, value)
                     for sample, value in zip(samples, own, strict=True)]  # fmt: skip
            low, high = np.percentile(np.mean(drawn, axis=0), [LOW, HIGH]).tolist()
        marks = tuple(own) if len(own) > 1 else ()
        points.append(Point(method, float(np.mean(own)), low, high, _is_control(found, method), marks))
    return sorted(points, key=lambda one: -one.value)


def _first_figures(found: Comparison) -> list[Figure]:
    points = _mean_points(found)
    if not points:
        return []
    several = bool(points[0].marks)
    title = f"Precision{', the mean over targets' if several else ''}."
    said = "The line is the 5–95 % interval over draws or refits." if any(one.low is not None for one in points) else (
        "Without --draws and --resamples no interval is known.")  # fmt: skip
    if several:
        said += " Thin strokes are single targets."
    base = _base(found.lines)
    return [Figure(title, said, _dots(points, base, "precision", title))]


def _base(lines: Sequence[Line]) -> float | None:
    """Mean over targets of the pool's share of right rows."""
    shares = {line.target: line.base_rate for line in lines if line.base_rate is not None}
    return float(np.mean(list(shares.values()))) if shares else None


def _dots(points: Sequence[Point], base: float | None, axis: str, title: str) -> str:
    alt = f"{title} " + "; ".join(
        f"{one.name} {one.value:.2f}" + ("" if one.low is None else f" ({one.low:.2f} to {one.high:.2f})")
        for one in points
    ) + ("" if base is None else f"; the pool {base:.2f}")  # fmt: skip
    return in_both_widths(partial(dot_chart, points, base, axis, alt))


# ------------------------------------------------------------------------------------------------ sections
def _ranks(ranks: Sequence[Rank]) -> Section:
    said = "The mean place over the targets whose right sources are known. The interval resamples targets, and precision within its draws or refits."  # fmt: skip
    return Section("ranks", "Ranks by precision", said, [Part("", tables=[Table(RANKS, [rank_cells(one) for one in ranks], (2,))])])  # fmt: skip


def _targets(found: Comparison) -> Section:
    parts = []
    for target in found.targets:
        lines = [line for line in found.of(target) if line.precision is not None]
        figures = []
        if lines:
            points = [Point(line.method, line.precision or 0.0, line.low, line.high, _is_control(found, line.method)) for line in lines]  # fmt: skip
            points.sort(key=lambda one: -one.value)
            figures.append(Figure("Precision", f"for {target}.", _dots(points, lines[0].base_rate, "precision", f"Precision for {target}."), "precision"))  # fmt: skip
        figures += _method_overlaps(found, target)
        head, rows = found.shown(target)
        head, rows = [head[0], *head[2:]], [(row[0], *row[2:]) for row in rows]  # the target is the heading
        text = tuple(i for i, name in enumerate(head) if name == "5–95 %")
        tables = [Table(head, rows, text)]
        if trained := found.of_training(target):
            note = "After training on the picks: loss and accuracy on held-out answers."
            tables.append(Table([TRAINED[0], *TRAINED[2:]], [(row[0], *row[2:]) for row in trained], (3, 5), note))
        tables += _mixes(found, target)
        parts.append(Part(target, figures=figures, tables=tables))
    return Section("targets", "Target by target", f"{LEGEND[0].upper()}{LEGEND[1:]}.", parts)


def _method_overlaps(found: Comparison, target: str) -> Iterator[Figure]:
    methods, matrix = found.overlaps(target)
    if len(methods) > 1:
        title = "How much the methods' picks overlap."
        said = "Jaccard index: rows picked by both over rows picked by either."
        yield Figure(title, said, _heat(methods, matrix, f"Overlap of picks for {target}."), "overlap of methods")


def _heat(names: Sequence[str], matrix: np.ndarray, title: str) -> str:
    pairs = [(float(matrix[i, k]), f"{names[i]} and {names[k]}") for i in range(len(names)) for k in range(i)]
    alt = f"{title} Most: {max(pairs)[1]}, {max(pairs)[0]:.2f}; least: {min(pairs)[1]}, {min(pairs)[0]:.2f}."
    return in_both_widths(partial(heat_map, names, names, matrix, 1.0, alt))


def _mixes(found: Comparison, target: str, most: int = 4) -> list[Table]:
    """The largest sources of each selection; without examples none is told."""
    mixes = {method: mix for (method, of), mix in found.sources.items() if of == target and method}
    if not mixes or (found.config is not None and not found.config.examples):
        return []
    pool = found.sources.get(("", ""), {})
    rows = [(name, ", ".join(f"{source} {share:.0%}" for source, share in list(mix.items())[:most]))
            for name, mix in {"(the pool)": pool, **mixes}.items()]  # fmt: skip
    return [Table(("method", "sources"), rows, (1,), "Where picks come from: the largest sources.")]


def _shared(
    found: Comparison, shared: Mapping[str, SharedPicks], cores: Sequence[CoreLine], cosines: Mapping[str, Cosines]
) -> Section:
    overlaps, sets, texts = [], [], dict[tuple[int, str], list[str]]()
    examples = found.config is not None and found.config.examples
    for method, one in shared.items():
        title = f"Overlap of {method}'s picks for the targets."
        overlaps.append(Figure(title, "Jaccard index.", _heat(one.targets, one.overlap, title), method))
        title = f"For which targets {method} picks a row."
        counts = one.sets
        alt = f"{title} " + "; ".join(f"{' and '.join(of)}: {count} rows" for of, count in counts[:8])
        svg = in_both_widths(partial(upset_plot, one.targets, np.diag(one.common).tolist(), counts, alt))
        sets.append(Figure(title, "Each row counts once, in the column of exactly its targets.", svg, method))
        if examples and found.config is not None:
            for text in core_texts(one, found.pool, found.config):
                texts.setdefault((text.row, text.text), []).append(f"{method} for {text.targets} targets")
    note = (
        "By chance: the share expected if each target's picks were random rows. A core that is no larger tells nothing."
    )
    shown = [(f"row {row}, picked by {_listed(by)}", text) for (row, text), by in list(texts.items())[:TEXTS_SHOWN]]
    parts = [
        Part("Overlap of targets", figures=overlaps),
        Part("Sets of targets", figures=sets),
        Part("The core: rows picked for several targets", note, tables=[_core_table(cores)], texts=shown),
    ]
    parts[:0] = _cosine_parts(cosines)
    said = "What a method picks for one target beside what it picks for another. picks.parquet has every row with its targets."
    return Section("shared", "Several targets", said, parts)


def _cosine_parts(cosines: Mapping[str, Cosines]) -> list[Part]:
    """Heat maps of the targets' directions: all pairs, and where in the model they are alike."""
    pairs, layers = [], []
    for method, one in cosines.items():
        title = f"Cosines between what {method} keeps of the targets."
        said = f"Mean over {len(one.by_layer)} blocks." if len(one.by_layer) > 1 else ""
        pairs.append(Figure(title, said, _heat(one.names, one.matrix, title), method))
        if len(one.by_layer) > 1:
            layers.append(_over_layers(method, one))
    said = "At 1 two targets point the same way: the method can hardly tell them apart."
    found = [Part("Directions of the targets", said, figures=pairs)] if pairs else []
    return [*found, *([Part("Directions over the blocks of the model", figures=layers)] if layers else [])]


def _over_layers(method: str, one: Cosines) -> Figure:
    title, values = f"Where {method}'s directions of a target are like those of the others.", one.to_others
    blocks = [str(i) for i in range(values.shape[1])]
    least, most = values.mean(axis=0).argmin(), values.mean(axis=0).argmax()
    said = f"Mean cosine with the other targets; most alike in block {most}, least in block {least}."
    draw = partial(heat_map, one.names, blocks, values, float(np.abs(values).max()) or 1.0, f"{title} {said}")
    return Figure(title, said, in_both_widths(draw), method)


def _core_table(cores: Sequence[CoreLine]) -> Table:
    head, rows = list(CORE), [core_cells(line) for line in cores if line.rows or line.least == 2]
    if not any(row[-1] for row in rows):
        return Table(head[:-1], [row[:-1] for row in rows])
    return Table(head, rows, (6,))


def _transfer(found: Comparison) -> Section:
    """What training on picks for one target does to the others."""
    figures, rows = [], []
    arms = list(dict.fromkeys(one.arm for one in found.transfers))
    matrices = {arm: transfer_matrix(found.transfers, arm) for arm in arms}
    # Changes of a target are like each other, those of targets are not: each column has its own scale, the same for all arms.
    most = np.nanmax([np.nanmax(np.abs(changes), axis=0) for _, changes in matrices.values()], axis=0)
    for arm, (names, changes) in matrices.items():
        gains = own_gains(found.by_row, arm)
        told = {name: "{:+.3f} ({:+.3f} to {:+.3f})".format(*gains[name]) for name in names if name in gains}
        rows.append((arm, *(told.get(name, "") for name in names)))
        title = f"Training on what {arm} picks for a target (row), measured at a target (column)."
        pairs = ((f"{one} at {other}", changes[i, k]) for i, one in enumerate(names) for k, other in enumerate(names))
        alt = f"{title} " + "; ".join(f"picks for {what} {value:+.3f}" for what, value in pairs)
        draw = partial(heat_map, [f"for {name}" for name in names], names, changes, most, alt, places=3)
        figures.append(Figure(title, "", in_both_widths(draw), arm))
    said = (
        "Change of the loss on held-out answers against the untouched model, in nats a token: below 0, in orange, training helped. "
        "Colours compare within a column. "
        f"Means over {_count(len({one.seed for one in found.transfers}), 'seed')}; intervals (95 %) are over held-out rows and seeds."
    )
    note = "The change by a target's own picks minus the mean change by those for the others: below 0, picks help their own target most."
    table = Table(("trained on", *names), rows, tuple(range(1, len(names) + 1)), note)
    return Section("transfer", "Transfer", said, [Part("", figures=figures, tables=[table])])


def _costs(found: Comparison) -> Section:
    """What each method cost on all its targets; a pass that methods share is in each one's column."""
    head = ("method", "seconds", "fitting", "scoring", "passes it reads", "tokens a second", "most memory, GB", "requests", "US dollars")  # fmt: skip
    rows = []
    for method in dict.fromkeys(line.method for line in found.lines if not line.reason):
        lines = [line for line in found.lines if line.method == method and not line.reason]
        peak = max((line.peak_bytes or 0 for line in lines), default=0)
        rows.append((
            method, _sum(lines, "seconds"), _sum(lines, "fit_seconds"), _sum(lines, "score_seconds"),
            number(max((line.pass_seconds or 0.0 for line in lines), default=0.0) or None, 1),
            number(max((line.tokens_per_second or 0.0 for line in lines), default=0.0) or None, 0),
            f"{peak / 1e9:.2f}" if peak else "", _sum(lines, "requests", 0), _sum(lines, "money", 2),
        ))  # fmt: skip
    kept = [i for i in range(len(head)) if i < 2 or any(row[i] for row in rows)]
    table = Table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])
    said = "Seconds of all targets together, without the pass over the pool that methods share."
    return Section("costs", "What it cost", said, [Part("", tables=[table])])


def _sum(lines: Sequence[Line], name: str, places: int = 2) -> str:
    known = [value for line in lines if (value := getattr(line, name)) is not None]
    return number(float(sum(known)), places) if known else ""


def _failed(found: Comparison) -> Section:
    reasons: dict[tuple[str, str], list[str]] = {}
    for line in found.failed:
        reasons.setdefault((line.method, line.reason), []).append(line.target)
    rows = [(method, ", ".join(targets), reason) for (method, reason), targets in reasons.items()]
    return Section("failed", "Did not run", "", [Part("", tables=[Table(("method", "targets", "why"), rows, (1, 2))])])


# ------------------------------------------------------------------------------------------------- command
def _command(config: CompareConfig | None) -> str:
    """What was typed, one option a line; files without their folders."""
    if config is None:
        return ""
    values = config.changed()
    values = {name: value if name in _TEXTS else _without_folders(value) for name, value in values.items()}
    words = flag_words(CompareConfig, values)
    return "neuronselect compare" + "".join(
        (" \\\n    " if word.startswith("--") else " ") + shlex.quote(word) for word in words
    )


def _without_folders(value: Any) -> Any:
    """An option's value; files in it without their folders."""
    if isinstance(value, Mapping):
        return {name: _without_folders(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_without_folders, value))
    return _FOLDERS.sub("", str(value)) if isinstance(value, str | Path) else value


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} others"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
