"""Figures of a selection: their numbers are those of its report, and nothing of pyplot is touched."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tiny import chat
from tiny import rows as rows_of

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.selection.reasons import sampled
from hf_neuronselect.selection.reported import reported
from hf_neuronselect.selection.sample import pool_map, profile_of
from hf_neuronselect.store.store import FeatureStore, write_store

HOSTILE = "$\\frac{$ \x1b[31m\u202e<b>"


def selection_of(rows: int, target: Dataset, extractor: NeuronFeatureExtractor, k: int = 6, **targets: Dataset) -> Any:
    sources = ["plain", HOSTILE, "plain", "third"]
    pool = Dataset.from_list(
        [{"messages": chat(f"word{i} " * (1 + i % 17), f"answer {i}"), "source": sources[i % 4]} for i in range(rows)]
    )
    return NeuronSelector("mona").fit({"t": target, **targets}, extractor=extractor).select(pool, k=k)


@pytest.fixture(scope="module")
def selection(target: Dataset, extractor: NeuronFeatureExtractor) -> Selection:
    return selection_of(40, target, extractor)


@pytest.fixture(scope="module")
def two(target: Dataset, extractor: NeuronFeatureExtractor) -> Selection:
    return selection_of(40, target, extractor, u=target.select([0, 1, 2]))


def heights(axis: Any, label: str) -> list[int]:
    (bars,) = [found for found in axis.containers if found.get_label() == label]
    return [int(bar.get_height()) for bar in bars]


def of_report(html: str) -> Iterator[tuple[list[int], list[int], str]]:
    """Rows and picks of each bar of each histogram of scores, and the cut it names."""
    for picture in re.findall(r'<svg role="img" aria-label="Histogram of [\d,]+ scores.*?</svg>', html):
        if 'viewBox="0 0 760' in picture:  # the wide one of the two
            found = re.findall(r"score \S+ to \S+: ([\d,]+) rows, ([\d,]+) of them picked", picture)
            cut = re.search(r">(cut [^<]+)<", picture)
            yield *([int(n.replace(",", "")) for n in one] for one in zip(*found, strict=True)), cut[1] if cut else ""


def test_the_histogram_is_that_of_the_report(
    selection: Selection, two: Selection, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    held = selection_of(40, rows_of(12, seed=5), extractor)
    assert held.provenance.targets["t"].held_out and not selection.provenance.targets["t"].held_out
    for one, panels in ((held, 1), (selection, 1), (two, 2)):
        axes = one.plot.scores().axes
        pictures = list(of_report(one.report()))
        assert len(axes) == 2 * panels and len(pictures) == panels
        for upper, (rows, picks, cut) in zip(axes[::2], pictures, strict=True):
            every, chosen = heights(upper, "pool"), heights(upper, "picks")
            shown = [i for i, count in enumerate(every) if count]  # the report draws no empty bars
            assert [every[i] for i in shown] == rows and [chosen[i] for i in shown] == picks
            assert sum(chosen) == len(one) and sum(every) == 40
            assert [text.get_text() for text in upper.texts] == [cut] * bool(cut)
        for lower, record in zip(axes[1::2], one.provenance.targets.values(), strict=True):
            shown = [label.get_text() for label in lower.get_yticklabels()]
            assert shown == ["picks", "chance", "exemplars"][: 3 if record.held_out else 2]
            for strokes in lower.collections[2:]:
                clipped = np.clip(record.held_out, *lower.get_xlim())
                assert sorted(strokes.get_positions()) == pytest.approx(sorted(clipped))
    one.save_pretrained(tmp_path / "s")
    again = Selection.from_pretrained(tmp_path / "s").plot.scores("u").axes
    assert len(again) == 2 and heights(again[0], "pool") == heights(axes[2], "pool")
    with pytest.raises(NeuronSelectError, match="^target='v': one of t, u$"):
        one.plot.scores("v")
    with pytest.raises(NeuronSelectError, match="^target='v': one of t$"):
        selection.plot.scores("v")
    assert (
        selection.plot.scores("t")
        .axes[0]
        .get_title(loc="left")
        .startswith("Scores for t: the median pick scores above")
    )


def test_lengths_are_those_of_the_report(selection: Selection) -> None:
    (axis,) = selection.plot.lengths().axes
    of_pool, of_picks = (patch.get_data().values for patch in axis.patches)
    told = re.findall(r"tokens: ([\d.]+)% of the pool, ([\d.]+)% of the picks", selection.report())
    told = told[: len(of_pool)]  # the wide picture is first
    assert [tuple(f"{100 * share:.1f}" for share in pair) for pair in zip(of_pool, of_picks, strict=True)] == told
    lengths = selection.picked_lengths()
    assert axis.get_legend().get_texts()[1].get_text() == f"picks, median {np.median(lengths):,.0f}"
    assert f"{lengths.mean():,.0f} tokens on average" in axis.get_title(loc="left")


def test_shares_are_those_of_the_report(selection: Selection, tmp_path: Path) -> None:
    (axis,) = selection.plot.sources().axes
    said = unescape(re.search(r'aria-label="Shares of the picks by source: ([^"]*)"', selection.report())[1])  # type: ignore[index]
    names = [label.get_text() for label in axis.get_yticklabels()]
    shares, pool = ([bar.get_width() for bar in bars] for bars in axis.containers)
    assert ", ".join(f"{n} {a:.0%} (pool {b:.0%})" for n, a, b in zip(names, shares, pool, strict=True)) == said
    assert sum(shares) == pytest.approx(1) and sum(pool) == pytest.approx(1)
    assert not [name for name in names if "\x1b" in name or "\u202e" in name]
    selection.save_pretrained(tmp_path / "s")
    again = Selection.from_pretrained(tmp_path / "s").plot.sources().axes[0]
    assert len(again.containers) == 1 and "of the pool" not in again.get_title(loc="left")


def test_hostile_names_are_drawn_as_text(selection: Selection) -> None:
    """A dollar sign starts no formula: this one would be refused."""
    assert HOSTILE[:8] in selection.plot.sources().axes[0].get_yticklabels()[1].get_text()
    assert selection.plot.sources()._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_what_is_not_known_is_said(target: Dataset, extractor: NeuronFeatureExtractor, pool: Dataset) -> None:
    plain = NeuronSelector("mona").fit({"t": target}, extractor=extractor)
    with pytest.raises(NeuronSelectError, match="^source_column='source': the rows have no such column of names$"):
        plain.select(pool.remove_columns([n for n in pool.column_names if n != "messages"]), k=3).plot.sources()
    equal = Dataset.from_list([{"messages": chat("the same", f"{i}")} for i in range(4)])
    assert plain.select(equal, k=4).plot.scores().axes  # all of them picked
    stream = plain.select(pool.to_iterable_dataset(), k=3)
    assert sum(heights(stream.plot.scores().axes[0], "picks")) == 3


def test_pyplot_stays_untouched(selection: Selection, tmp_path: Path) -> None:
    selection.save_pretrained(tmp_path / "s")
    code = f"""
import sys
from hf_neuronselect import Selection
selection = Selection.from_pretrained({str(tmp_path / "s")!r})
assert "matplotlib" not in sys.modules
selection.plot.scores().savefig({str(tmp_path / "scores.png")!r})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_profiles_and_map_are_those_of_the_report(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    made = NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(pool, k=9)
    made.save_pretrained(tmp_path / "s")
    alone = Selection.from_pretrained(tmp_path / "s")
    with pytest.raises(NeuronSelectError, match="rows of the pool are needed; neuronselect report FOLDER --pool POOL"):
        alone.plot.profile()
    write_store(pool, extractor, tmp_path / "store", pool_about={"id": "pool"}, shard_rows=16)
    store = FeatureStore(tmp_path / "store")
    sample = sampled(made.explainer(features=store), reported(made, examples=False).table)[0]
    assert sample is not None
    profile, plane = profile_of(sample), pool_map(sample, dict(made.selector.kept))  # type: ignore[union-attr]
    assert profile is not None and plane is not None and plane.exemplars
    axes = made.plot.profile(store).axes
    assert len(axes) == 2 * len(profile.panels)
    for at, panel in enumerate(profile.panels):
        for axis, rows in zip(axes[2 * at : 2 * at + 2], panel.strength, strict=True):
            np.testing.assert_allclose(axis.images[0].get_array()[:, :, 3], rows)
    (axis,) = made.plot.map(store).axes
    shown = {one.get_label(): np.asarray(one.get_offsets()) for one in axis.collections}
    np.testing.assert_allclose(shown["picks"], plane.places[plane.picked])
    np.testing.assert_allclose(shown["random rows of the pool"], plane.places[~plane.picked])
    np.testing.assert_allclose(shown["exemplars"], plane.exemplars["t"])
