"""MATES: probes of the pool, what a regressor makes of them, and the draw in both readings."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from encoders import write_encoder
from tiny import chat, rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, NeuronSelectWarning
from hf_neuronselect.core.configs import CompareConfig, FitConfig
from hf_neuronselect.core.provenance import SourceRecord
from hf_neuronselect.methods import make_method
from hf_neuronselect.methods.mates import BERT, TEMPERATURE, Mates
from hf_neuronselect.methods.random import uniform
from hf_neuronselect.models.loading import causal_lm_of
from hf_neuronselect.models.pin import pin_named
from hf_neuronselect.models.probe import Prober
from hf_neuronselect.models.regressor import Regressor
from hf_neuronselect.pipelines.compare import compare
from hf_neuronselect.pipelines.fit import fit
from hf_neuronselect.rows.answers import AnswerEncoder
from hf_neuronselect.rows.leakage import exact_key
from hf_neuronselect.rows.load import conversations_of
from hf_neuronselect.selection.stages import prepared
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.signals.extraction import Extraction

pytestmark = pytest.mark.filterwarnings("ignore::hf_neuronselect.NeuronSelectWarning")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("mates") / "tiny-encoder"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that another test has measured."""
    monkeypatch.setattr("hf_neuronselect.selection.stages.cache_dir", lambda: tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def lm(tiny_folder: Path) -> NeuronFeatureExtractor:
    return NeuronFeatureExtractor.from_pretrained(str(tiny_folder / "model"), features=["row_key"])


def fitted(lm: NeuronFeatureExtractor, pool: Dataset, target: Dataset, **options: Any) -> NeuronSelector:
    options = {"probes": 12, "epochs": 1} | options
    made = NeuronSelector("mates", **options).prepare(pool, extractor=lm)
    return made.fit({"t": target})


def test_predictions_are_of_a_regressor_on_the_probes_labels(
    lm: NeuronFeatureExtractor, pool: Dataset, target: Dataset, encoder: str
) -> None:
    selector = fitted(lm, pool, target, regressor=encoder, draw="none")
    conversations = conversations_of(pool)
    order = np.random.default_rng(1234).permutation(len(pool))
    tokens = AnswerEncoder(lm.engine("forward").tokenizer, max_length=2048)  # type: ignore[attr-defined]
    samples = tokens.encode(conversations)
    model = causal_lm_of(lm.extraction.spec, torch.device("cpu"))
    prober = Prober(model, learning_rate=1e-3, batch_tokens=1)
    prober.fill([samples[i] for i in order[::-1][:32]])
    labels = []
    for i in order[:12]:
        changes = []
        for row in tokens.encode(conversations_of(target)):  # one exemplar at a time
            prober.reference = [row]
            changes.append((prober.losses_after(samples[i]) - prober.losses())[0])
        labels.append(np.mean(changes))
    regressor = Regressor.load(pin_named(encoder, "regressor"), "regressor")
    texts = regressor.cut([row.words() for row in conversations])
    rho = regressor.learn([texts[i] for i in order[:12]], np.asarray(labels), epochs=1)
    kept = selector.targets["t"]
    assert kept["spearman"].tolist() == [rho] and set(kept) == {"keys", "predicted", "spearman"}
    scores = selector.select(pool, k=5).scores.column("score").to_numpy()
    np.testing.assert_allclose(scores, -regressor.predict(texts) / TEMPERATURE, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("draw", ["gumbel", "code", "none"])
def test_the_draw(draw: str) -> None:
    """Row by row: the paper's draw has the largest -pred / 0.5 + noise, the code's the smallest pred / 0.5 + noise."""
    keys = [exact_key(row) for row in conversations_of(rows(30))]
    predicted = np.random.default_rng(0).normal(size=30)
    target = {
        "keys": np.asarray(
            [[int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")] for key in keys], np.uint64
        ),
        "predicted": predicted,
    }
    index = np.random.default_rng(1).permutation(100)[:30]
    batch = RowBatch(index, np.ones(30, bool), {"row_key": [key.hex() for key in keys]})
    method = make_method("mates", {"regressor": "unused", "draw": draw, "seed": 3})
    found = method.drawn(method.score(batch, target), index)
    for i, row in enumerate(index):
        noise = -math.log(-math.log(uniform(3, np.asarray([row]))[0]))
        wanted = {
            "gumbel": -predicted[i] / 0.5 + noise,
            "code": -(predicted[i] / 0.5 + noise),
            "none": -predicted[i] / 0.5,
        }
        assert found[i] == pytest.approx(wanted[draw], rel=1e-12)
    other = make_method("mates", {"regressor": "unused", "draw": draw, "seed": 4})
    assert np.array_equal(found, other.drawn(method.score(batch, target), index)) == (draw == "none")
    np.testing.assert_array_equal(method.score(batch, target), -predicted / 0.5)
    some = np.asarray([5, 2])
    np.testing.assert_array_equal(method.drawn(method.score(batch.take(some), target), index[some]), found[some])


def test_a_pick_is_explained_by_its_prediction() -> None:
    key = exact_key(conversations_of(rows(1))[0])
    pair = np.asarray([[int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")]], np.uint64)
    target = {"keys": pair, "predicted": np.asarray([-0.5]), "spearman": np.asarray([0.25])}
    row = RowBatch(np.asarray([4]), np.ones(1, bool), {"row_key": [key.hex()]})
    says = (
        "-0.5 is predicted from the row's text: how a training step on it changes the exemplars' loss, in deviations from the "
        "mean of the rows that were tried, lower first (rank correlation with measured changes: 0.25)"
    )
    assert make_method("mates", {}).explain(row, target, None).says == says


def test_rows_are_drawn_by_their_weights() -> None:
    """The share of draws in which a row is first is the softmax of -pred / 0.5."""
    key = exact_key(conversations_of(rows(1))[0])
    method = [make_method("mates", {"regressor": "unused", "seed": seed}) for seed in range(3000)]
    pair = [int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")]
    first = 0
    for one in method:
        scores = []
        for i, value in enumerate((0.0, 0.5)):
            batch = RowBatch(np.asarray([i]), np.ones(1, bool), {"row_key": [key.hex()]})
            target = {"keys": np.asarray([pair], np.uint64), "predicted": np.asarray([value])}
            scores += one.drawn(one.score(batch, target), batch.index).tolist()
        first += scores[0] > scores[1]
    assert first / 3000 == pytest.approx(math.exp(0) / (math.exp(0) + math.exp(-1)), abs=0.03)


def test_nothing_is_done_twice(
    lm: NeuronFeatureExtractor,
    pool: Dataset,
    target: Dataset,
    encoder: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = fitted(lm, pool, target, regressor=encoder).select(pool, k=9)
    (work,) = (home / "prepared").iterdir()
    names = sorted(path.name.split("-")[0] + "-" + path.name.split("-")[1][:9] for path in work.iterdir())
    assert [name.split("-")[0] for name in names] == ["mates", "probes"] and "mates-predicted" in names[0]

    def never(*given: Any, **more: Any) -> Any:
        raise AssertionError("done again")

    with monkeypatch.context() as patch:
        patch.setattr(Prober, "losses_after", never)
        patch.setattr(Regressor, "load", never)
        same = fitted(lm, Dataset.from_list(pool.to_list()), target, regressor=encoder).select(pool, k=9)
        other = fitted(lm, pool, target, regressor=encoder, draw="code", seed=5).select(pool, k=9)
    assert same.indices.tolist() == one.indices.tolist() != other.indices.tolist()
    with monkeypatch.context() as patch:
        patch.setattr(Prober, "losses_after", never)
        fitted(lm, pool, target, regressor=encoder, epochs=2)  # the same probes
        with pytest.raises(AssertionError, match="done again"):
            fitted(lm, pool, target, regressor=encoder, probes=13)


def test_a_regressor_that_was_trained_goes_on_to_predict(
    lm: NeuronFeatureExtractor,
    pool: Dataset,
    target: Dataset,
    encoder: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(self: Regressor, texts: Any) -> np.ndarray:
        if self.trained:
            raise KeyboardInterrupt
        return usual(self, texts)

    usual, learn = Regressor.predict, Regressor.learn

    def learned(self: Regressor, *given: Any, **more: Any) -> float:
        self.trained = False
        rho = learn(self, *given, **more)
        self.trained = True
        return rho

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Regressor, "predict", killed)
        patch.setattr(Regressor, "learn", learned)
        fitted(lm, pool, target, regressor=encoder)
    (work,) = (home / "prepared").iterdir()
    assert sorted(path.name[:15] for path in work.iterdir())[0] == "mates-regressor"
    with monkeypatch.context() as patch:
        patch.setattr(Regressor, "learn", lambda *given, **more: pytest.fail("trained again"))
        one = fitted(lm, pool, target, regressor=encoder)
    assert not list(work.glob("*regressor*"))
    monkeypatch.setattr("hf_neuronselect.selection.stages.cache_dir", lambda: home / "other")
    two = fitted(lm, pool, target, regressor=encoder)
    for name, array in two.targets["t"].items():
        np.testing.assert_array_equal(one.targets["t"][name], array)


def test_equal_rows_and_rows_that_cannot_be_read(
    lm: NeuronFeatureExtractor, pool: Dataset, target: Dataset, encoder: str
) -> None:
    texts = pool.select_columns(["messages"])
    odd = Dataset.from_list([{"messages": []}, {"messages": chat("Only a question?", "")[:1]}], features=texts.features)
    mixed = concatenate_datasets([texts, odd, texts.select(range(5))])
    selector = fitted(lm, mixed, target, regressor=encoder, draw="none")
    assert len(selector.targets["t"]["keys"]) == len(pool) + 1
    found = selector.select(mixed, k=5, exclude=()).scores
    scores = found.column("score").to_numpy(zero_copy_only=False)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [60], "a row without an answer is predicted, too"
    np.testing.assert_array_equal(scores[62:], scores[:5])


def test_a_fit_to_one_pool_is_not_saved(
    lm: NeuronFeatureExtractor, pool: Dataset, target: Dataset, encoder: str, tmp_path: Path
) -> None:
    selector = fitted(lm, pool, target, regressor=encoder)
    assert selector.method.sources() == {"regressor": SourceRecord.of(pin_named(encoder, "regressor"))}
    wanted = "method='mates': predicts the rows of one pool"
    with pytest.raises(NeuronSelectError, match=wanted):
        selector.save_pretrained(tmp_path / "cap")
    selector.select(pool, k=9).save_pretrained(tmp_path / "picked")
    assert not (tmp_path / "picked" / "capability").exists()
    text = (tmp_path / "picked" / "selection.json").read_text()
    assert '"regressor": "tiny-encoder"' in text and encoder not in text
    target.to_json(tmp_path / "t.jsonl")
    options = {"target": f"t={tmp_path}/t.jsonl", "method": "mates", "method_option": {"regressor": encoder}}
    with pytest.raises(NeuronSelectError, match=f"{wanted}, so it is never saved; give the exemplars to select"):
        fit(FitConfig.from_mapping({**options, "out": str(tmp_path / "out")}))


def test_weak_predictions_are_warned_of(
    lm: NeuronFeatureExtractor, pool: Dataset, target: Dataset, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (
        "the regressor of mates hardly predicts the probes it has not seen (rank correlation 0.12 over 2): its order is "
        "little more than chance; raise probes or epochs"
    )
    for rho, doubts in ((0.12, (said,)), (0.8, ())):
        monkeypatch.setattr(Regressor, "learn", lambda *given, value=rho, **more: value)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            selector = fitted(lm, pool, target, regressor=encoder, probes=20 + int(10 * rho))
        assert selector.exemplars["t"].doubts == doubts
        assert [str(one.message) for one in seen if one.category is NeuronSelectWarning] == [
            f"target t: {doubt}" for doubt in doubts
        ]
        assert not selector.halves, "halves would be fitted, too"


# -------------------------------------------------------------------------------------- bad input
def test_a_fit_without_a_pool_is_refused(lm: NeuronFeatureExtractor, target: Dataset, encoder: str) -> None:
    wanted = r"method='mates': tries rows of the pool first: call prepare\(pool, extractor=...\) before fit"
    with pytest.raises(NeuronSelectError, match=wanted):
        NeuronSelector("mates", regressor=encoder).fit({"t": target}, extractor=lm)


def test_a_stream_is_refused(lm: NeuronFeatureExtractor, pool: Dataset, encoder: str) -> None:
    wanted = "method='mates': tries random rows of the pool and predicts all: load it as a Dataset"
    with pytest.raises(NeuronSelectError, match=wanted):
        NeuronSelector("mates", regressor=encoder).prepare(pool.to_iterable_dataset(), extractor=lm)


def test_a_pool_without_answers_is_refused(
    lm: NeuronFeatureExtractor, pool: Dataset, target: Dataset, encoder: str
) -> None:
    pool = pool.map(lambda row: {"messages": row["messages"] if row["id"] < 7 else row["messages"][:1]})
    wanted = (
        "method='mates': only 7 rows of the pool could be tried, at least 10 with an answer are needed: give a larger"
    )
    with pytest.raises(NeuronSelectError, match=wanted):
        fitted(lm, pool, target, regressor=encoder)


def test_another_pool_is_refused(lm: NeuronFeatureExtractor, pool: Dataset, target: Dataset, encoder: str) -> None:
    selector = fitted(lm, pool, target, regressor=encoder)
    wanted = "method='mates': was fitted to another pool, of which it has a prediction for each row: fit it to this one"
    with pytest.raises(NeuronSelectError, match=wanted):
        selector.select(rows(61), k=3)
    assert len(selector.select(pool.select(range(20)), k=3)) == 3, "a part of the pool is no other one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 9}, r"probes=9: must be at least 10"),
        ({"draw": "softmax"}, r"draw='softmax': must be one of gumbel, code, none"),
        ({"state": "full"}, r"state='full': must be one of filled, empty"),
        ({"epochs": 0}, r"epochs=0: must be at least 1"),
        ({"regressor": "./nowhere"}, r"regressor='./nowhere': no such folder; check the path"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NeuronSelectError, match=message):
        make_method("mates", options).check()


def test_a_stand_in_for_the_papers_encoder_is_named(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extraction = Extraction(None)  # type: ignore[arg-type]
    assert make_method("mates", {"regressor": encoder}).stand_in(extraction) == "tiny-encoder"
    usual = Mates()
    monkeypatch.setitem(usual.__dict__, "_source", type("Pinned", (), {"id": BERT}))
    assert usual.stand_in(extraction) == ""


def test_preparing_reads_no_row(lm: NeuronFeatureExtractor, pool: Dataset, encoder: str) -> None:
    method = make_method("mates", {"regressor": encoder})
    ready = prepared(method, pool, SourceRecord(), lm)
    assert "_probes" not in ready.__dict__ and ready == method
    assert len(ready.exemplar_signals[0].probes.rows) == len(pool), "200 are asked for"  # type: ignore[index, union-attr]


def test_comparisons_fit_it_once_a_target(
    tiny_folder: Path, pool: Dataset, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.to_json(tmp_path / "pool.jsonl")
    for seed, name in enumerate("ab", 1):
        rows(6, seed=seed).to_json(tmp_path / f"{name}.jsonl")
    learned = []
    usual = Regressor.learn

    def learn(self: Regressor, *given: Any, **more: Any) -> float:
        learned.append(given)
        return usual(self, *given, **more)

    monkeypatch.setattr(Regressor, "learn", learn)
    found = compare(
        CompareConfig.from_mapping(
            {
                "pool": str(tmp_path / "pool.jsonl"), "target": [f"{name}={tmp_path}/{name}.jsonl" for name in "ab"],
                "model": str(tiny_folder / "model"), "methods": f"mates(regressor={encoder},probes=12,epochs=1),random",
                "k": 8, "related": {"a": "s1", "b": "s2"}, "resamples": 3, "draws": 3, "out": str(tmp_path / "out"),
            }
        )
    )  # fmt: skip
    assert not found.failed and len(learned) == 2
    lines = [line for line in found.lines if line.method.startswith("mates")]
    assert [line.stand_in for line in lines] == ["tiny-encoder"] * 2
    assert all(len(found.samples[label, target]) == 3 for label, target in found.samples if label.startswith("mates"))
