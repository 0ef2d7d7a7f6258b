"""report.html of a selection: one page that needs nothing else, from the templates beside this file.

Its style and its script are allowed by their hashes, everything else is forbidden to it. Texts of the data lie in it as
JSON, which the script shows as text; what stands in the HTML itself comes from the record and is escaped.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from ..core.cost import Cost
from ..core.provenance import Provenance, aim
from ..core.text import replaced
from ..hub.cards import selection_facts, source_name
from ..hub.command import own_target, select_command
from ..hub.markdown import PLACE
from .charts import cut_of, in_both_widths, length_histogram, score_histogram, share_bars, top_shares
from .page_data import MOST_ROWS, PoolTable, Report, best_target, held_out_scores, page_data, spread_of
from .pages import rendered
from .pool_map import map_picture
from .profile import profile_panel, profile_said

_WHY = {
    "empty": "without any text",
    "error": "could not be read",
    "duplicate": "equal to an earlier row",
    "leak": "an exemplar, or holding the question of one",
    "null": "without a finite score",
}


def selection_page(report: Report) -> str:
    """The page, as HTML."""
    made, table = report.made, report.table
    command = select_command(made)
    pictures = _pictures(report)
    data = page_data(report)
    values = {
        "data": data,
        "selected": made.counts.selected,
        "total": made.counts.rows,
        "method": made.method.name,
        "targets": aim(made.targets, made.avoided) if made.targets else "",
        "lead": _lead(made),
        "chips": _chips(made),
        "doubts": made.doubts,
        "pictures": pictures,
        "numbers": _numbers(report)[:3],
        "cards": report.examples,
        "listed": _listed(report),
        "unexplained": report.unexplained,
        "explained": _explained(report),
        "features": list(report.features),
        "unsampled": report.unsampled,
        "estimated": report.estimated,
        "profile": _profile(report),
        "map": _map(report),
        "lengths": _lengths(table),
        "sources": _sources(report),
        "by_target": _by_target(report),
        "near": _near_said(report),
        "left_out": [(count, _WHY.get(name, name)) for name, count in made.counts.left_out.items()],
        "truncated": made.counts.truncated,
        "reasons": made.counts.reasons if report.examples else (),
        "command": command.text,
        "fill_in": command.fill_in,
        "own_target": own_target(made),
        "place": PLACE,
        "facts": [(name, value) for name, value in selection_facts(made).items() if value not in (None, "", {}, [])],
        "cost": _cost(made.cost),
    }
    return rendered("selection.html.jinja", ["selection.css"], "selection.js", values)


# ------------------------------------------------------------------------------------------------ first screen
def _lead(made: Provenance) -> str:
    """What was selected from what, by what, in a sentence."""
    model = source_name(made.extractor.model) if made.extractor else ""
    within = f" inside {'the bundled model' if model == 'bundled' else model}" if model else ""
    pool = made.pool.id or "a pool in memory"
    used = ", ".join(f"{one.used} exemplars of {name}" for name, one in made.targets.items() if one.used)
    chosen = f", for {used}" if used else ""
    paper = f" ({made.method.paper})" if made.method.paper else ""
    return f"Picked from {pool} by {made.method.name}{paper}{within}{chosen}."


def _chips(made: Provenance) -> list[tuple[str, str]]:
    extractor = made.extractor
    found = {
        "method": made.method.name,
        "model": extractor and source_name(extractor.model),
        "SAE": extractor and source_name(extractor.sae),
        "layer": extractor and extractor.options and extractor.signals and extractor.options.layer,
        "picker": made.method.picker,
        "several targets by": made.aggregate,
        **{name.replace("_", " "): f"{value:,}" for name, value in made.budget.given().items()},
        "estimated": made.auto and made.auto.line,
        "made": made.timing.finished and made.timing.finished[:10],
        "in": f"{made.timing.seconds:,.0f} s" if made.timing.seconds >= 1 else f"{made.timing.seconds:.1f} s",
    }
    return [(name, str(value)) for name, value in found.items() if value not in (None, "", False)]


def _above(scores: np.ndarray, picked: np.ndarray) -> float | None:
    """How far the mean of the picks is above that of all, in their standard deviations."""
    spread = spread_of(scores)
    return float(scores[picked].mean() - scores.mean()) / spread if spread and picked.any() else None


def _shortfall(total: int, drawn: int) -> float:
    """Standard error of a mean over ``drawn`` of ``total`` rows, drawn without putting back, in standard deviations."""
    return math.sqrt((total - drawn) / (max(1, total - 1) * max(1, drawn)))


def _numbers(report: Report) -> list[dict[str, str]]:
    """Numbers that say whether the selection differs from a random one, those that say most first."""
    made, table = report.made, report.table
    able = table.compared
    drawn, total = int(table.picked[able].sum()), int(able.sum())
    error = _shortfall(total, drawn)
    numbers = []
    gains = {name: _above(scores[able], table.picked[able]) for name, scores in _scores_shown(table).items()}
    known = {name: gain for name, gain in gains.items() if gain is not None}
    if known:
        least = min(known, key=lambda name: known[name])
        whose = f", for {least}, the target that gains least" if len(known) > 1 else ""
        numbers.append({"what": f"mean score of the picks above that of the pool, in standard deviations{whose}",
                        "value": f"{known[least]:+.2f}", "chance": f"random: 0 ± {error:.2f}"})  # fmt: skip
    hits = {name: one.hit for name, one in made.targets.items() if one.hit is not None}
    if hits:
        least = min(hits, key=lambda name: hits[name])
        whose = f" (of {least}, the least)" if len(hits) > 1 else ""
        numbers.append({"what": f"of the exemplars score in the pool's best 5 % when they are not fitted on{whose}",
                        "value": f"{hits[least]:.0%}", "chance": "by chance: 5%"})  # fmt: skip
    counted = able & (table.n_tokens >= 0)
    share = made.counts.selected / max(1, made.counts.rows)
    if (table.n_tokens[counted & table.picked]).size and table.n_tokens[counted].size:
        tokens, picks = table.n_tokens[counted], table.n_tokens[counted & table.picked]
        numbers.append({"what": "mean tokens of a pick", "value": f"{picks.mean():,.0f}",
                        "chance": f"random: {tokens.mean():,.0f} ± {error * tokens.std():,.0f}"})  # fmt: skip
        part = float(picks.sum()) / max(1.0, float(tokens.sum()))
        numbers.append({"what": "of the rows are kept", "value": f"{share:.1%}",
                        "chance": f"with {part:.1%} of the tokens; random: {drawn / max(1, total):.1%}"})  # fmt: skip
    else:
        numbers.append({"what": "of the rows are kept", "value": f"{share:.1%}", "chance": "tokens were not counted"})
    return numbers


def _scores_shown(table: PoolTable) -> dict[str, np.ndarray]:
    """The scores that pictures and numbers are about: of each target, where there are several."""
    return {name: scores for name, scores in table.targets.items()} or {"": table.score}


def _pictures(report: Report) -> list[dict[str, Any]]:
    """The histogram of each target's scores."""
    table = report.table
    able = table.compared
    pictures = []
    for name, every in _scores_shown(table).items():
        there = able & np.isfinite(every)
        scores, picked = every[there], table.picked[there]
        if not len(scores) or not spread_of(scores):
            continue
        drawn = np.zeros(len(scores), dtype=bool)
        drawn[np.random.default_rng(0).choice(len(scores), int(picked.sum()), replace=False)] = True
        cut = cut_of(scores, picked)
        better = f"{float((scores < np.median(scores[picked])).mean()):.1%}" if picked.any() else "0%"
        said = f"the median pick scores above {better} of {len(scores):,} rows."
        if cut is None and picked.any() and not picked.all():
            said += " No single score parts picks from the rest: the way rows were picked weighs more than one score."
        alt = (
            f"Histogram of {len(scores):,} scores{f' for {name}' if name else ''}, from {scores.min():.4g} to {scores.max():.4g}, "
            f"median {np.median(scores):.4g}. {int(picked.sum()):,} rows are picked"
            + (f", those from {cut:.4g} on." if cut is not None else f", their median is {_median(scores[picked])}.")
        )
        held = held_out_scores(report.made, name)
        if len(held):
            above = (
                f"{(held >= cut).mean():.0%} of them from the cut on" if cut is not None else f"median {_median(held)}"
            )
            alt += f" {len(held)} exemplars by what they score when they are not fitted on: {above}."
        svg = in_both_widths(partial(score_histogram, scores, picked, drawn, held, cut, alt))
        title = f"Scores for {name}:" if name else "Scores of the pool:"
        pictures.append({"name": name, "title": title, "said": said, "svg": svg, "held": len(held)})
    return pictures


def _median(values: np.ndarray) -> str:
    return f"{np.median(values):.4g}" if len(values) else "unknown"


# ------------------------------------------------------------------------------------------------ further parts
def _explained(report: Report) -> str:
    """How the cards with reasons are read."""
    if not report.reasons:
        return ""
    usual = any(part.usual is not None for one in report.reasons.values() for part in one.parts)
    first = "those first that set the row apart most from an average row of the pool" if usual else "largest first"
    said = f"Below a text: parts of its score, {first}, each with its share of the sum of all parts."
    if report.estimated:
        said += f" What is told of the pool is estimated from {report.estimated:,} random rows."
    heats = [one.heat for one in report.reasons.values() if one.heat is not None]
    if not heats:
        return said
    said += (
        " The stronger a token's shade, the more it adds to the score; press a part to see where it alone comes from."
    )
    if any((heat.values < 0).any() for heat in heats):
        said += " What is underlined lowers the score."
    return said


def _listed(report: Report) -> str:
    selected = report.made.counts.selected
    if selected > MOST_ROWS:
        return f"The first {MOST_ROWS:,} of {selected:,}; all are in the folder's data/."
    if not report.examples:
        return "The page was made without texts of the data; the rows themselves are in the folder's data/."
    return "Best first. A click, or Enter, opens a row. Long texts are cut; the search reads what is in this page."


def _profile(report: Report) -> dict[str, Any] | None:
    if report.profile is None:
        return None
    panels = []
    for panel in report.profile.panels:
        what = "Features of the SAE" if panel.features else f"The model's own neurons ({panel.signal})"
        alt = (
            f"{what}: {len(panel.picks)} picks above {len(panel.pool)} random rows, a column for each of the {len(panel.units)} "
            f"units that vary most; {panel.apart:.1%} of their variance is between the two."
        )
        panels.append({"title": what, "svg": in_both_widths(partial(profile_panel, panel, alt))})
    return {"said": profile_said(report.profile.panels), "panels": panels}


def _map(report: Report) -> dict[str, Any] | None:
    found = report.map
    if found is None:
        return None
    exemplars = sum(map(len, found.exemplars.values()))
    share = sum(found.share)
    said = (
        f"{int((~found.picked).sum()):,} random rows of the pool, {int(found.picked.sum()):,} picks and {exemplars:,} exemplars by the "
        f"two main directions of {found.signal}, which hold {share:.0%} of the pool's variance"
        + ("; what is close here may be far apart in the rest." if share < 0.9 else ".")
    )
    alt = f"Map of {said}"
    return {"said": said, "svg": map_picture(found, alt), "exemplars": exemplars}


def _lengths(table: PoolTable) -> dict[str, Any] | None:
    known = table.able & (table.n_tokens > 0)
    pool, picked = table.n_tokens[known], table.n_tokens[known & table.picked]
    if not len(picked) or pool.min() == pool.max():
        return None
    means, medians = ([float(of(values)) for values in (picked, pool)] for of in (np.mean, np.median))
    said = (
        f"A pick has {means[0]:,.0f} tokens on average, a row of the pool {means[1]:,.0f}; "
        f"medians {medians[0]:,.0f} and {medians[1]:,.0f}."
    )
    if not 2 / 3 <= medians[0] / medians[1] <= 1.5 or not 2 / 3 <= means[0] / means[1] <= 1.5:
        said += " Part of the choice may be length alone: compare with --method matched-random."
    alt = f"Histogram of tokens a row. {said}"
    return {"said": said, "svg": in_both_widths(partial(length_histogram, pool, picked, alt))}


def _sources(report: Report) -> dict[str, Any] | None:
    if not report.sources:
        return None
    shares = top_shares(report.sources, report.pool_sources)
    first = shares[0]
    said = f"{first[1]:.0%} of the picks come from {replaced(first[0])}"
    said += (
        f", which is {first[2]:.1%} of the pool."
        if first[2] is not None
        else ". The pool was not at hand when this page was written, so its own mix is not shown."
    )
    alt = "Shares of the picks by source: " + ", ".join(
        f"{name} {picks:.0%}" + ("" if pool is None else f" (pool {pool:.0%})") for name, picks, pool in shares
    )
    svg = in_both_widths(partial(share_bars, shares, alt))
    return {"said": said, "svg": svg, "pool": report.pool_sources is not None}


def _by_target(report: Report) -> dict[str, Any] | None:
    """For several targets: what each gains, and how many picks serve it best."""
    made, table = report.made, report.table
    if len(table.targets) < 2:
        return None
    able = table.compared
    best = best_target(table)[table.picked]
    rows = []
    for i, (name, scores) in enumerate(table.targets.items()):
        gain = _above(scores[able], table.picked[able])
        record = made.targets.get(name)
        rows.append([
            name, record.used if record else "", f"{gain:+.2f} sd" if gain is not None else "",
            f"{record.hit:.0%}" if record and record.hit is not None else "", f"{int((best == i).sum()):,}",
        ])  # fmt: skip
    head = ["target", "exemplars used", "picks above the pool", "held-out exemplars found", "picks that suit it best"]
    return {"head": head, "rows": rows}


def _near_said(report: Report) -> str:
    if not report.near and (report.table.able & ~report.table.picked).any():
        return "A stream of several targets keeps no score by which the rows that were not picked could be ordered."
    if not report.near:
        return "None: every row that could be picked was picked."
    said = f"The {len(report.near)} rows with the highest scores of those that were not picked."
    if report.examples and not report.pool_at_hand:
        said += " The pool was not at hand when this page was written, so their texts are not shown."
    return said


def _cost(cost: Cost) -> list[list[str]]:
    rows = []
    for one in cost.folded().passes.values():
        seconds = one.total_seconds
        memory = f"{one.peak_bytes / 1e9:,.1f} GB" if one.peak_bytes else ""
        if one.peak_device_bytes:
            memory += f" + {one.peak_device_bytes / 1e9:,.1f} GB of the GPU"
        step = f"{one.engine} pass" + (", read from a store" if one.reused else "")
        if one.money:
            step += f", {one.money:,.2f} US dollars"
        rows.append([step, f"{seconds:,.1f}", f"{one.rows:,}", f"{one.tokens:,}" if one.tokens else "", memory])
    for step, taken in (("fitting the targets", cost.fit_seconds), ("scoring the pool", cost.score_seconds)):
        if taken is not None:
            rows.append([step, f"{taken:,.1f}", "", "", ""])
    return rows
