"""The whole main job on the bundled model, SAE and data, offline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..core import bundled as paths
from ..explain.pictures import activation_profiles, feature_tokens
from ..explain.report import excerpt, page, picture, table, text_table
from ..rows.formats import Conversation, read_row, row_format
from ..selection.selection import Selection
from ..selection.selector import NeuronSelector
from ..signals.columns import RowBatch, SparseRows
from ..signals.extractor import NeuronFeatureExtractor
from . import bundled

logger = logging.getLogger(__name__)

RATIO = 0.05
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mona": ("mona", {}),
    "nait": ("nait", {}),
    # The paper's projection is decided by norms where they differ much from row to row: long rows win.
    "nait, unit drifts, mean": ("nait", {"normalize": True, "direction": "mean"}),
    "polysemantic": ("polysemantic", {}),
    "hidden": ("hidden", {}),
    "longest": ("longest", {}),
    "random": ("random", {}),
}
RANDOM_DRAWS = 20
HEADER = ("method", "precision", "x base", "picked tokens", "pool tokens", "seconds")


@dataclass
class Row:
    """One line of the table: how a method did on one target."""

    method: str
    precision: float
    base: float
    picked_tokens: float
    pool_tokens: float
    seconds: float
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        return (
            self.method + self.note,
            f"{self.precision:.2f}",
            f"{self.precision / self.base:.1f}",
            f"{self.picked_tokens:.0f}",
            f"{self.pool_tokens:.0f}",
            f"{self.seconds:.2f}",
        )


def precision(selection: Selection, related: list[str]) -> float:
    """The share of selected rows whose source is one of the target's own."""
    return float(np.isin(np.asarray(selection.dataset["source"]), related).mean())


def compare(
    pool: Dataset, targets: dict[str, Dataset], related: dict[str, list[str]], extractor: NeuronFeatureExtractor
) -> Iterator[tuple[str, list[Row], Selection]]:
    """Every method on every target, from feature columns; yields target, rows, the MoNA selection."""
    sources = np.asarray(pool["source"])
    for name, exemplars in targets.items():
        base = float(np.isin(sources, related[name]).mean())
        rows, chosen = [], None
        for label, (method, params) in METHODS.items():
            started = time.perf_counter()
            draws = range(RANDOM_DRAWS if method == "random" else 1)
            found = []
            for seed in draws:
                selector = NeuronSelector(method, **params, **({"seed": seed} if method == "random" else {}))
                fitted = selector.fit({name: exemplars}, extractor=extractor)
                found.append(fitted.select(pool, ratio=RATIO, provenance={"pool": {"id": "bundled demo pool"}}))
            seconds = (time.perf_counter() - started) / len(found)
            shares = [precision(selection, related[name]) for selection in found]
            tokens = [selection.provenance["tokens"] for selection in found]
            note = (
                f" (mean of {len(found)} draws; 95th percentile {np.percentile(shares, 95):.2f})"
                if method == "random"
                else ""
            )
            rows.append(
                Row(
                    label,
                    float(np.mean(shares)),
                    base,
                    float(np.mean([t["selected_mean"] for t in tokens])),
                    tokens[0]["pool_mean"],
                    seconds,
                    note,
                )  # fmt: skip
            )
            if method == "mona":
                chosen = found[0]
        assert chosen is not None
        yield name, rows, chosen


def best_rows(
    selection: Selection, extractor: NeuronFeatureExtractor, target: str, usual: np.ndarray, rows: int = 5
) -> list[dict[str, Any]]:
    """The best rows, the SAE features that set them apart, and the tokens these fire on.

    Args:
        usual: ``[latents]``, the pool's mean features. A feature sets a row apart by the overlap with the
            target it adds beyond what an average row has.
    """
    found = []
    fmt = row_format(["messages"])
    for i in range(min(rows, len(selection))):
        features = selection.explain(i, target=target, top=len(usual))
        overlap = sum(min(f["value"], f["target"]) for f in features)
        for f in features:
            f["usual"] = min(float(usual[int(f["latent"])]), f["target"]) / overlap
        features = sorted(features, key=lambda f: f["usual"] - f["share"])[:3]
        conversation: Conversation = read_row(selection.dataset[i], fmt)
        tokens = feature_tokens(extractor, conversation, [int(f["latent"]) for f in features])
        words = [
            f"feature {int(f['latent'])}: {f['share']:.1%} of the overlap, {f['usual']:.1%} in an average row; on "
            + ", ".join(map(repr, tokens[int(f["latent"])]))
            for f in features
        ]
        row = selection.dataset[i]
        found.append(
            {"score": row["neuron_score"], "source": row["source"], "text": excerpt(selection, i, 300), "why": words}
        )
    return found


def run_demo(out: Path, say: Callable[[str], None]) -> Path:
    """Run it; returns the report's path.

    Args:
        out: folder for one selection folder a target and ``report.html``. say: prints a line.
    """
    started = time.perf_counter()
    pool, targets, related = bundled.pool(), bundled.targets(), paths.related_sources()
    extractor = bundled.extractor(features=("mona", "nait", "polysemantic", "hidden"))
    say(
        f"Bundled model and SAE ({extractor.extraction.options.dtype}), {len(pool)} pool rows, targets: {', '.join(targets)}"
    )
    say("One forward pass computes mona, nait, polysemantic and hidden features ...")
    extracting = time.perf_counter()
    arguments = {"batched": True, "batch_size": 1000, "keep_in_memory": True, "load_from_cache_file": False}
    featured = pool.map(extractor, desc="extract", features=None, **arguments)
    with_features = {name: data.map(extractor, desc=name, **arguments) for name, data in targets.items()}
    seconds = time.perf_counter() - extracting
    tokens = int(np.sum(featured.with_format("numpy")["n_tokens"][:]))
    say(f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s\n")

    pooled = _sparse(featured, "mona")
    usual = np.bincount(pooled.indices, pooled.values.astype(np.float64), minlength=pooled.indices.max() + 1) / len(
        pool
    )
    parts: list[str] = [f"<p>{len(pool)} rows, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s.</p>"]
    for name, rows, selection in compare(featured, with_features, related, extractor):
        cells = [row.cells() for row in rows]
        say(f"{name}: share of {' + '.join(related[name])} in the picked {RATIO:.0%} (base rate {rows[0].base:.3f})")
        say(text_table(HEADER, cells) + "\n")
        best = best_rows(selection, extractor, name, usual)
        say(f"The {len(best)} best rows for {name} by MoNA, and what sets them apart:")
        for row in best:
            say(f"  {row['score']:.3f} {row['source']}: {' '.join(row['text'].split())[:90]} …")
            say("        " + "; ".join(row["why"][:2]))
        say("")
        selection.save_pretrained(out / name)
        listed = "".join(
            f"<tr><td class=n>{row['score']:.3f}</td><td>{escape(row['source'])}</td><td><pre>{escape(row['text'])}</pre>"
            f"<small>{escape('; '.join(row['why']))}</small></td></tr>"
            for row in best
        )
        parts.append(
            f"<h2>{escape(name)}</h2><p>Precision: the share of {escape(' + '.join(related[name]))}, fixed beforehand.</p>"
            f"{table(HEADER, cells)}<table>{listed}</table>"
        )

    panels = {
        title: {name: _sparse(with_features[name], column) for name in ("gsm8k", "mbpp")}
        for title, column in (("Raw neurons (MLP gate)", "polysemantic"), ("SAE features", "mona"))
    }
    image = activation_profiles(panels)
    (out / "profiles.png").write_bytes(image)
    report = out / "report.html"
    caption = "<h2>Activation profiles of two targets</h2><p>Faint lines: exemplars; bold lines: their means.</p>"
    report.write_text(
        page("neuronselect demo", *parts, caption, picture(image, "activation profiles")), encoding="utf-8"
    )
    say(f"Selections: {', '.join(str(out / name) for name in targets)}")
    say(f"Report: {report}  ({time.perf_counter() - started:.0f} s in all)")
    return report


def _sparse(data: Dataset, column: str) -> SparseRows:
    batch = data.with_format("arrow")[:]
    n = len(data)
    names = (f"{column}_indices", f"{column}_values")
    columns = {name: batch.column(name) for name in names}
    return RowBatch(np.arange(n), np.ones(n, bool), columns).sparse(column)
