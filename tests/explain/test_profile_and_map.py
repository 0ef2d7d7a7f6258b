"""Activation profiles and the map of a pool against slow float64 references; their pictures and data are safe and whole."""

from __future__ import annotations

import base64
import re
import struct
import zlib

import numpy as np
import pytest

from hf_neuronselect.explain.png import png
from hf_neuronselect.explain.pool_map import map_data, map_of, map_picture, scaled
from hf_neuronselect.explain.profile import panel_of, profile_panel, profile_said
from hf_neuronselect.signals.columns import RowBatch

RNG = np.random.default_rng(3)


def sparse_rows(table: np.ndarray, start: int = 0) -> RowBatch:
    places = [np.flatnonzero(row).astype(np.int32) for row in table]
    columns = {
        "mona_indices": places,
        "mona_values": [row[at].astype(np.float32) for row, at in zip(table, places, strict=True)],
    }
    return RowBatch(np.arange(start, start + len(table)), np.ones(len(table), bool), columns)


def dense_rows(table: np.ndarray, start: int = 0) -> RowBatch:
    return RowBatch(
        np.arange(start, start + len(table)), np.ones(len(table), bool), {"hidden": list(table.astype(np.float32))}
    )


def some(rows: int, width: int, shift: float = 0.0) -> np.ndarray:
    table = RNG.gamma(1.0, size=(rows, width)) * (RNG.random((rows, width)) < 0.4)
    table[:, : width // 4] += shift
    return table.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize(("signal", "make"), [("mona", sparse_rows), ("hidden", dense_rows)])
def test_a_panel(signal: str, make) -> None:
    picks, pool = some(30, 150, 1.5), some(40, 150)
    found = panel_of(signal, signal == "mona", make(picks), make(pool))
    both = np.concatenate([picks, pool])
    most = set(np.argsort(-both.var(axis=0), kind="stable")[:100].tolist())
    assert found is not None and set(found.units.tolist()) == most
    assert np.allclose(found.picks, picks[:, found.units]) and np.allclose(found.pool, pool[:, found.units])
    gap = (picks.mean(axis=0) - pool.mean(axis=0)) / both.std(axis=0)
    assert (np.diff(gap[found.units]) <= 1e-6).all(), "what picks have more is on the left"
    shares = []
    for unit in found.units:
        within = ((picks[:, unit] - picks[:, unit].mean()) ** 2).sum() + (
            (pool[:, unit] - pool[:, unit].mean()) ** 2
        ).sum()
        shares.append(1 - within / ((both[:, unit] - both[:, unit].mean()) ** 2).sum())
    assert found.apart == pytest.approx(np.mean(shares), rel=1e-5) and found.by_chance == 1 / 69
    assert f"{found.apart:.1%} of the variance of 100" in profile_said([found])


def test_alike_rows_are_apart_by_chance_alone() -> None:
    shares = [panel_of("mona", True, sparse_rows(some(50, 120)), sparse_rows(some(50, 120))).apart for _ in range(20)]  # type: ignore[union-attr]
    assert np.mean(shares) == pytest.approx(1 / 99, rel=0.1)


def test_nothing_to_show() -> None:
    assert panel_of("hidden", False, dense_rows(np.ones((4, 3))), dense_rows(np.ones((4, 3)))) is None
    assert panel_of("mona", True, sparse_rows(np.zeros((0, 3))), sparse_rows(some(4, 3))) is None
    assert panel_of("mona", True, sparse_rows(np.zeros((3, 3))), sparse_rows(np.zeros((3, 3)))) is None


def test_the_panel_s_picture() -> None:
    panel = panel_of("mona", True, sparse_rows(some(12, 20, 2.0)), sparse_rows(some(9, 20)))
    assert panel is not None
    svg = profile_panel(panel, "<alt> \x1b", 760)
    assert 'aria-label="&lt;alt&gt; \ufffd"' in svg and "picks have more" in svg and "style=" not in svg
    file = base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1])  # type: ignore[index]
    width, height = struct.unpack(">II", file[16:24])
    assert (width, height) == (len(panel.units), 12 + 4 + 9)
    length = struct.unpack(">I", file[33:37])[0]
    lines = zlib.decompress(file[41 : 41 + length])
    pixels = np.frombuffer(lines, np.uint8).reshape(height, 1 + 4 * width)[:, 1:].reshape(height, width, 4)
    both = np.concatenate([panel.picks, panel.pool])
    low, high = np.quantile(both, (0.01, 0.99), axis=0)
    strength = np.rint(255 * np.clip((both - low) / np.where(high > low, high - low, 1), 0, 1))
    assert np.array_equal(np.concatenate([pixels[:12, :, 3], pixels[16:, :, 3]]), strength) and not pixels[12:16].any()
    assert file == png(pixels)


@pytest.mark.parametrize(("signal", "make"), [("mona", sparse_rows), ("hidden", dense_rows)])
def test_a_map_is_the_pool_s_principal_components(signal: str, make) -> None:
    table = some(60, 40) * np.linspace(3, 0.3, 40)
    drawn, picked = np.arange(60) < 45, np.arange(60) >= 40
    exemplars = some(7, 50, 1.0)[:, : 40 if signal == "hidden" else 50]
    found = map_of(signal, make(table), drawn, picked, {"t": make(exemplars)})
    assert found is not None
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    middle = unit[drawn].mean(axis=0)
    _, values, axes = np.linalg.svd(unit[drawn] - middle)
    assert found.share == pytest.approx(values[:2] ** 2 / (values**2).sum(), rel=1e-4)
    expected = (unit - middle) @ axes[:2].T
    assert np.allclose(np.abs(found.places), np.abs(expected), atol=1e-4)
    assert (found.places[picked].mean(axis=0) >= np.median(found.places, axis=0) - 1e-6).all()
    known = (exemplars / np.linalg.norm(exemplars, axis=1, keepdims=True))[:, :40]
    assert np.allclose(np.abs(found.exemplars["t"]), np.abs((known - middle) @ axes[:2].T), atol=1e-4)


def test_pools_without_a_map() -> None:
    for table in (np.ones((9, 4)), np.zeros((9, 4))):
        assert map_of("hidden", dense_rows(table), np.ones(9, bool), np.zeros(9, bool), {}) is None
    assert map_of("hidden", dense_rows(some(9, 4)), np.arange(9) < 2, np.zeros(9, bool), {}) is None
    silent = np.vstack([np.zeros((5, 4)), some(2, 4, 1.0)])  # only picks have any feature
    assert map_of("mona", sparse_rows(silent), np.arange(7) < 5, np.arange(7) >= 5, {}) is None


def test_the_map_s_picture_and_data() -> None:
    table = some(50, 12)
    picked = np.arange(50) % 5 == 0
    found = map_of("hidden", dense_rows(table, start=100), np.ones(50, bool), picked, {"t": dense_rows(some(4, 12))})
    assert found is not None
    svg = map_picture(found, "words")
    assert [len(re.findall("h0", path)) for path in re.findall(r'class="dot [a-z]+" d="([^"]*)"', svg)] == [40, 10]
    assert re.search(r'class="exemplar" d="([^"]*)"', svg)[1].count("z") == 4  # type: ignore[index]
    rows, exemplars = scaled(found)
    every = np.concatenate([rows, exemplars["t"]])
    assert every.min() >= 24 and every[:, 0].max() <= 976 and every[:, 1].max() <= 596
    order = np.argsort(found.places[:, 1])[3:-3]
    assert (np.diff(rows[order, 1]) <= 0).all(), "up is up"
    data = map_data(found, {105: "five"}, {"t": ["first"]})
    assert [one[2] for one in data[:50]] == list(range(100, 150)) and [one[3] for one in data] == [
        *map(int, picked),
        2,
        2,
        2,
        2,
    ]
    assert data[5][4] == "five" and [one[4] for one in data[-4:]] == ["first", "", "", ""]
