"""Methods that read texts alone, against slow references written from their formulas and against their libraries."""

from __future__ import annotations

import gzip
import hashlib
import math
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hf_neuronselect import (
    FeatureLibrary,
    NeuronFeatureExtractor,
    NeuronSelectError,
    NeuronSelector,
    NeuronSelectWarning,
    Selection,
)
from hf_neuronselect.core.configs import FitConfig, SelectConfig
from hf_neuronselect.methods import PoolMethod, make_method
from hf_neuronselect.methods.bm25 import terms_of
from hf_neuronselect.methods.random import uniform
from hf_neuronselect.pipelines.fit import fit
from hf_neuronselect.pipelines.methods import check_methods
from hf_neuronselect.pipelines.select import select
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.signals.forward import ForwardEngine

POOL = [
    "the cat sat on the mat",
    "a dog and a cat",
    "x + y = z, solve for x",
    "Solve: how many apples has Ann? 3 + 4 = 7 apples",
    "the the the the",
    "def add(x, y): return x + y",
    "...",
    "numbers are fun and apples are too",
]
EXEMPLARS = ["How many apples? Ann has 3 apples", "solve x", "the mat"]


def batch(texts: Sequence[str], first: int = 0) -> RowBatch:
    n = len(texts)
    return RowBatch(np.arange(first, first + n), np.ones(n, bool), {"words": list(texts)})


def scored(name: str, pool: Sequence[str], exemplars: Sequence[str], size: int = 100, **options: Any) -> np.ndarray:
    """Scores of a pool that is read in batches of ``size`` rows."""
    method = make_method(name, options)
    assert isinstance(method, PoolMethod)
    targets, state = {"t": method.fit(batch(exemplars))}, method.start()
    parts = [batch(pool[i : i + size], i) for i in range(0, len(pool), size)]
    for part in parts:
        method.observe(state, part)
    score = method.scorer(method.finish(state, targets))
    return np.concatenate([method.drawn(score(part)["t"], part.index) for part in parts])


def texts(rows: Sequence[str]) -> Dataset:
    return Dataset.from_dict({"text": list(rows)})


# ------------------------------------------------------------------------------------- their signals
def test_words_of_a_row_are_its_turns_without_roles() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    row = Conversation([
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "21"},
    ])  # fmt: skip
    assert row.words().splitlines()[::2] == ["How warm is it?", "21"]
    assert "Köln" in row.words() and "user" not in row.words()
    assert Conversation(text="user: x").words() == "user: x"


# -------------------------------------------------------------------------------------------- bm25
def words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() or letter == "_" else " " for letter in text.lower()).split()


def bm25_reference(pool: Sequence[str], query: str) -> np.ndarray:
    """Lucene's formula, row by row."""
    rows = [words(text) for text in pool]
    average = sum(map(len, rows)) / len(rows)
    found = []
    for row in rows:
        total = 0.0
        for term in words(query):
            df, tf = sum(term in one for one in rows), row.count(term)
            idf = math.log(1 + (len(rows) - df + 0.5) / (df + 0.5))
            total += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(row) / average))
        found.append(total)
    return np.asarray(found)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("queries", ["mean", "max"])
def test_bm25_reference(queries: str, size: int) -> None:
    table = np.stack([bm25_reference(POOL, query) for query in EXEMPLARS])
    wanted = table.mean(axis=0) if queries == "mean" else table.max(axis=0)
    got = scored("bm25", POOL, EXEMPLARS, size, queries=queries)
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(got, scored("bm25", POOL, EXEMPLARS, queries=queries))


def test_bm25_of_the_library_itself() -> None:
    """On its own tokens; the library drops words of one letter, so there are none here."""
    import bm25s

    pool = [" ".join(word for word in words(text) if len(word) > 1) or "none" for text in POOL]
    query = "how many apples solve the mat"
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(bm25s.tokenize(pool, stopwords=None, show_progress=False), show_progress=False)
    wanted = index.get_scores(query.split())
    np.testing.assert_allclose(scored("bm25", pool, [query]), wanted, rtol=1e-5, atol=1e-6)


def test_bm25_does_not_depend_on_the_order_of_rows() -> None:
    order = np.random.default_rng(0).permutation(len(POOL))
    mixed = scored("bm25", [POOL[i] for i in order], EXEMPLARS[::-1])
    np.testing.assert_allclose(mixed, scored("bm25", POOL, EXEMPLARS)[order], rtol=1e-12)


def test_bm25_leaves_out_common_words_only_when_asked() -> None:
    assert scored("bm25", POOL, ["the"])[4] > 0
    with pytest.raises(NeuronSelectError, match="finds no word in any exemplar"):
        scored("bm25", POOL, ["the"], stop_words="english")
    assert scored("bm25", POOL, ["the cat"], stop_words="english")[4] == 0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("A 7th x_y naïve Straße", ["a", "7th", "x_y", "naïve", "strasse"]),
        ("e\u0301te\u0301 ＡＢ", ["été", "ab"]),  # composed and full-width letters
        ("我爱北京 ok", ["我爱", "爱北", "北京", "ok"]),
        ("好!", ["好"]),
        ("カタカナto日本", ["カタ", "タカ", "カナ", "to", "日本"]),
        ("น้ำดี", ["น้ํา", "าดี"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # marks are parts of words
        ("한국어 문장", ["한국어", "문장"]),
        ("!? ...", []),
    ],
)
def test_words_of_any_script(text: str, wanted: list[str]) -> None:
    import unicodedata

    found = [unicodedata.normalize("NFC", term) for term in terms_of(text)]
    assert found == [unicodedata.normalize("NFC", term) for term in wanted]


def test_characters_of_scripts_without_spaces() -> None:
    assert list(terms_of("我爱ab北京", 1)) == ["我", "爱", "ab", "北", "京"]
    pool = ["京北很大", "北京很大", "上海"]
    assert scored("bm25", pool, ["北京"]).argmax() == 1 and scored("bm25", pool, ["北京"])[0] == 0
    first, second, third = scored("bm25", pool, ["北京"], unspaced="characters")
    assert first == second > third == 0


def test_bm25_doubts_what_it_cannot_split() -> None:
    with pytest.warns(NeuronSelectWarning, match="cannot split a script without spaces"):
        scored("bm25", POOL, ["ꦲ" * 3 + "\U00011680" * 60])
    with pytest.warns(NeuronSelectWarning, match="no word in 1 of 2 exemplars"):
        scored("bm25", POOL, ["cat", "?!"])
    with pytest.warns(NeuronSelectWarning, match="no word of the exemplars is in the pool"):
        assert not scored("bm25", POOL, ["Katze"]).any()
    with pytest.warns(NeuronSelectWarning, match="no word of the exemplars is in the pool"):
        assert scored("bm25", ["...", "?"], ["cat"]).tolist() == [0, 0]


def test_bm25_keeps_no_text() -> None:
    kept = make_method("bm25", {}).fit(batch(["zebra apple zebra"]))
    assert {name: values.dtype.kind for name, values in kept.items()} == {"terms": "u", "lengths": "i"}
    assert kept["lengths"].tolist() == [3] and len(set(kept["terms"].tolist())) == 2
    assert kept["terms"].tolist() == make_method("bm25", {}).fit(batch(["zebra zebra apple"]))["terms"].tolist()


def test_bm25_selects_and_is_saved(tmp_path: Any) -> None:
    """Also where rows of the pool cannot be used, and with one exemplar."""
    pool = texts([*POOL[:3], "", *POOL[3:]])
    selector = NeuronSelector("bm25").fit(texts(EXEMPLARS[:1]))
    selection = selector.select(pool, k=2)
    assert selection.indices.tolist() == [4, 8]
    selector.save_pretrained(tmp_path / "cap")
    again = NeuronSelector.from_pretrained(tmp_path / "cap").select(pool, k=2)
    assert again.scores.equals(selection.scores)


@pytest.mark.parametrize("name", ["bm25", "dsir"])
def test_a_capability_of_texts_needs_no_model(name: str, tmp_path: Any) -> None:
    """Fitted in Python without an extractor, or on the command line with a model that is not here any more."""
    texts(POOL).to_json(tmp_path / "pool.jsonl")
    fitted = NeuronSelector(name).fit(texts(EXEMPLARS))
    fitted.save_pretrained(tmp_path / "cap")
    config: Any = {"pool": str(tmp_path / "pool.jsonl"), "target": (f"capability:{tmp_path / 'cap'}",), "k": 3}
    found = select(SelectConfig(**config, out=tmp_path / "out"))
    assert found.indices.tolist() == fitted.select(texts(POOL), k=3).indices.tolist()
    assert found.provenance.method.name == name


def test_held_out_exemplars_are_scored_only_where_the_method_can() -> None:
    """bm25 knows the rows of its pool alone; dsir and zip-fit score any text."""
    exemplars, pool = texts([f"row {i} has {i * i} apples" for i in range(10)]), texts([*POOL] * 30)
    for name in ("bm25", "dsir", "zip-fit"):
        selector = NeuronSelector(name).fit(exemplars)
        assert set(selector.halves) == ({"target"} if name != "bm25" else set())
        selection = selector.select(pool, k=1, exclude=())
        assert (selection.provenance.targets["target"].hit is None) == (name == "bm25")


def test_a_missing_library_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    fitted = "needs bm25s: pip install 'hf-neuronselect\\[rivals\\]'"
    with pytest.raises(NeuronSelectError, match=fitted):
        NeuronSelector("bm25").fit(texts(EXEMPLARS))
    selector = NeuronSelector("bm25")
    selector.targets = {"t": {}}
    with pytest.raises(NeuronSelectError, match=fitted):
        selector.select(texts(POOL), k=1)


def test_a_missing_library_is_named_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    for config in (SelectConfig(pool="p", out=Path("o"), method="bm25"), FitConfig(out=Path("o"), method="bm25")):
        with pytest.raises(NeuronSelectError, match="needs bm25s: pip install"):
            check_methods(config)


def test_no_row_is_tokenised_before_it_is_scored(
    monkeypatch: pytest.MonkeyPatch, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    read: list[int] = []
    before = ForwardEngine.read
    monkeypatch.setattr(ForwardEngine, "read", lambda *given: read.append(len(given[1])) or before(*given))
    selection = NeuronSelector("bm25").fit(target, extractor=extractor).select(pool, k=3)
    assert sum(read) == len(target) + len(pool)
    assert selection.provenance.tokens.pool_mean


# -------------------------------------------------------------------------------------------- dsir
def ngrams(text: str) -> list[str]:
    """Words as WordPunct has them, and pairs of words; found letter by letter."""

    def kind(letter: str) -> str:
        return "space" if letter.isspace() else "word" if letter.isalnum() or letter == "_" else "other"

    found, before = [], "space"
    for letter in text.lower():
        if kind(letter) == before != "space":
            found[-1] += letter
        elif kind(letter) != "space":
            found.append(letter)
        before = kind(letter)
    return found + [f"{a} {b}" for a, b in pairwise(found)]


def dsir_reference(pool: Sequence[str], exemplars: Sequence[str]) -> np.ndarray:
    """methods.md, bucket by bucket."""

    def counted(rows: Sequence[str]) -> Counter[int]:
        return Counter(
            int(hashlib.sha256(one.encode()).hexdigest(), 16) % 10_000 for row in rows for one in ngrams(row)
        )

    p, q = counted(exemplars), counted(pool)
    of_p, of_q = sum(p.values()), sum(q.values())
    return np.asarray(
        [
            sum(c * (math.log(p[b] / of_p + 1e-8) - math.log(q[b] / of_q + 1e-8)) for b, c in counted([row]).items())
            for row in pool
        ]
    )


@pytest.mark.parametrize("size", [1, 3, 100])
def test_dsir_reference(size: int) -> None:
    got = scored("dsir", POOL, EXEMPLARS, size, gumbel=False)
    np.testing.assert_allclose(got, dsir_reference(POOL, EXEMPLARS), rtol=1e-10)
    np.testing.assert_array_equal(got, scored("dsir", POOL, EXEMPLARS, gumbel=False))


def test_dsir_does_not_depend_on_the_order_of_rows() -> None:
    order = np.random.default_rng(0).permutation(len(POOL))
    mixed = scored("dsir", [POOL[i] for i in order], EXEMPLARS[::-1], gumbel=False)
    np.testing.assert_allclose(mixed, scored("dsir", POOL, EXEMPLARS, gumbel=False)[order], rtol=1e-12)


def test_dsir_draws_rows_by_their_weights() -> None:
    """Gumbel noise of a seed and a row: the first of a draw is row i with the probability softmax(log w)_i."""
    weights = scored("dsir", POOL, ["a cat sat on the mat x"], gumbel=False)
    method = make_method("dsir", {})
    noise = scored("dsir", POOL, EXEMPLARS, 3) - scored("dsir", POOL, EXEMPLARS, gumbel=False)
    again = scored("dsir", POOL, EXEMPLARS) - scored("dsir", POOL, EXEMPLARS, gumbel=False)
    np.testing.assert_allclose(noise, again, atol=1e-9)
    np.testing.assert_allclose(noise, -np.log(-np.log(uniform(0, np.arange(len(POOL))))), atol=1e-9)
    assert method.options["gumbel"] is True and len(np.unique(noise.round(6))) == len(POOL)
    assert not np.allclose(
        noise, scored("dsir", POOL, EXEMPLARS, seed=1) - scored("dsir", POOL, EXEMPLARS, gumbel=False)
    )
    draws = np.stack([-np.log(-np.log(np.maximum(uniform(seed, np.arange(40_000)), 1e-17))) for seed in (0, 7)])
    assert abs(draws.mean() - 0.5772) < 0.02 and abs(draws.var() - np.pi**2 / 6) < 0.05
    two = np.asarray([0.0, 1.0])
    first = (draws[0, ::2] + two[0] > draws[0, 1::2] + two[1]).mean()
    assert abs(first - np.exp(two[0]) / np.exp(two).sum()) < 0.02
    assert np.isfinite(weights).all()


def test_dsir_leaves_out_short_rows_and_says_so() -> None:
    with pytest.warns(NeuronSelectWarning, match="dsir leaves out 4 of 8 rows, which have fewer than 7 words"):
        got = scored("dsir", POOL, EXEMPLARS, gumbel=False, min_words=7)
    kept = np.asarray([sum(" " not in one for one in ngrams(text)) >= 7 for text in POOL])
    assert kept.sum() == 4
    np.testing.assert_array_equal(np.isfinite(got), kept)
    np.testing.assert_allclose(got[kept], dsir_reference(POOL, EXEMPLARS)[kept], rtol=1e-10)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_dsir_fits_the_pool_on_its_first_ngrams(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_neuronselect.methods.dsir.MOST", 20)
    used = next(i for i in range(1, len(POOL)) if len([n for row in POOL[:i] for n in ngrams(row)]) > 20)
    method = make_method("dsir", {"gumbel": False})
    assert isinstance(method, PoolMethod)
    state = method.start()
    for i in range(0, len(POOL), size):
        method.observe(state, batch(POOL[i : i + size], i))
    assert state.ngrams == len([one for row in POOL[:used] for one in ngrams(row)]) == state.counts.sum()


def test_dsir_of_the_authors_library(tmp_path: Any) -> None:
    library = pytest.importorskip("data_selection")
    for name, rows in {"pool": POOL, "target": EXEMPLARS}.items():
        texts(rows).to_json(tmp_path / f"{name}.jsonl")
    dsir = library.HashedNgramDSIR(
        [str(tmp_path / "pool.jsonl")], [str(tmp_path / "target.jsonl")], str(tmp_path / "cache"), num_proc=1
    )
    dsir.fit_importance_estimator(num_tokens_to_fit="auto")
    wanted = [dsir.importance_estimator(dsir.featurizer(text)) for text in POOL]
    np.testing.assert_allclose(scored("dsir", POOL, EXEMPLARS, gumbel=False), wanted, rtol=1e-9)


def test_dsir_refuses_exemplars_without_words_and_keeps_counts_alone() -> None:
    with pytest.raises(NeuronSelectError, match="finds no word in any exemplar"):
        make_method("dsir", {}).fit(batch([" ", "\n"]))
    kept = make_method("dsir", {}).fit(batch(EXEMPLARS))
    assert list(kept) == ["counts"] and kept["counts"].shape == (10_000,)


# ----------------------------------------------------------------------------------------- zip-fit
def zip_reference(pool: Sequence[str], exemplars: Sequence[str], level: int) -> np.ndarray:
    def size(text: str) -> int:
        return len(gzip.compress(text.encode(), compresslevel=level))

    def alignment(x: str, e: str) -> float:
        return 1 - (size(x + e) - min(size(x), size(e))) / max(size(x), size(e))

    return np.asarray([np.mean([alignment(x, e) for e in exemplars]) for x in pool])


def zipped(pool: Sequence[str], exemplars: Sequence[str], size: int = 100, **options: Any) -> np.ndarray:
    method = make_method("zip-fit", options)
    score = method.scorer({"t": method.fit(batch(exemplars)), "half": method.fit(batch(exemplars[:1]))})
    parts = [score(batch(pool[i : i + size], i))["t"] for i in range(0, len(pool), size)]
    return np.concatenate(parts)


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_zip_fit_reference(level: int) -> None:
    """To the byte, for texts of all sizes around the windows of zlib, with bytes that repeat and that do not."""
    draw = np.random.default_rng(level)
    noise = ["".join(map(chr, draw.integers(32, 90, n))) for n in (0, 7, 240, 1500, 31_000, 70_000)]
    pool = [*POOL, *noise, noise[4] + noise[3] + noise[4], "ab" * 9000]
    exemplars = [*EXEMPLARS, "naïve 北京", noise[3][:900] + POOL[3], noise[3][:900] + POOL[3]]
    got = zipped(pool, exemplars, level=level)
    np.testing.assert_allclose(got, zip_reference(pool, exemplars, level), rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(got, zipped(pool, exemplars, 3, level=level))


def test_zip_fit_of_the_authors_level_knows_lengths_alone() -> None:
    exemplar = "how many apples has Ann, if she had three"
    same = ["four apples has Ann, if she had five", "def add(x, y): return x + y  # a sum", "a" * 36]
    assert len({len(text) for text in same}) == len(set(zipped(same, [exemplar], level=0))) == 1
    found = zipped(same, [exemplar])
    assert found.argmax() == 0 and len(set(found.tolist())) == 3
    with pytest.raises(NeuronSelectError, match="must be at most 9"):
        make_method("zip-fit", {"level": "10"})


def test_zip_fit_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    selector = NeuronSelector("zip-fit").fit(texts(EXEMPLARS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(selector.select(texts(POOL), k=1)) == 1
    monkeypatch.setattr("hf_neuronselect.methods.zip_fit.LONG", 0)
    with pytest.warns(NeuronSelectWarning, match=r"each of 8 rows with each of 3 exemplars, .* 0.0 hours"):
        selector.select(texts(POOL), k=1)


def test_texts_of_exemplars_are_never_saved(tmp_path: Any) -> None:
    secret = "solve the secret riddle"
    pool = texts(POOL)
    selector = NeuronSelector("zip-fit").fit(texts([secret]))
    for save in (
        lambda: selector.save_pretrained(tmp_path / "cap"),
        lambda: FeatureLibrary({"one": selector}).save_pretrained(tmp_path / "lib"),
    ):
        with pytest.raises(NeuronSelectError, match="keeps the exemplars' texts, so it is never saved"):
            save()
    selector.select(pool, k=3).save_pretrained(tmp_path / "out")
    assert secret.encode() not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    again = Selection.from_pretrained(tmp_path / "out")
    assert again.selector is None and len(again) == 3
    texts([secret]).to_json(tmp_path / "t.jsonl")
    with pytest.raises(NeuronSelectError, match="keeps the exemplars' texts"):
        fit(FitConfig(target=(str(tmp_path / "t.jsonl"),), method="zip-fit", out=tmp_path / "cap"))
    assert not (tmp_path / "cap").exists()
