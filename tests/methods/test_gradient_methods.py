"""LESS, GIST and the norm: against a slow reference that trains and differentiates one row at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny import chat, rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector
from hf_neuronselect.models import warm_up
from hf_neuronselect.models.lora import LoraModel, LoraShape
from hf_neuronselect.models.sketch import CountSketch
from hf_neuronselect.models.warm_up import WarmUp
from hf_neuronselect.rows.answers import AnswerEncoder
from hf_neuronselect.rows.encode import Sample
from hf_neuronselect.rows.formats import read_row, row_format
from hf_neuronselect.signals.columns import RowBatch
from hf_neuronselect.store.store import FeatureStore, write_store

DIM = 96
OPTIONS: dict[str, Any] = {
    "warm_up": 0.2, "epochs": 2, "batch": 4, "rate": 0.02, "rank": 3, "alpha": 6, "dropout": 0.0, "dim": DIM,
}  # fmt: skip
POOL, TARGET = rows(32, seed=4), rows(5, seed=5)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Warm-ups are kept where only this test looks."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def folder(tiny_folder: Path) -> str:
    return str(tiny_folder / "model")


def extractor(folder: str, **options: Any) -> NeuronFeatureExtractor:
    return NeuronFeatureExtractor.from_pretrained(folder, features=["gradient"], dtype="float32", **options)


def selector(folder: str, name: str, pool: Dataset = POOL, **changed: Any) -> NeuronSelector:
    made = NeuronSelector(name, **(OPTIONS | changed))
    made.prepare(pool, extractor=extractor(folder))
    return made.fit(TARGET, extractor=extractor(folder))


def scores(folder: str, name: str, pool: Dataset = POOL, **changed: Any) -> np.ndarray:
    return scored(selector(folder, name, pool, **changed), pool)


def scored(made: NeuronSelector, pool: Dataset = POOL, **options: Any) -> np.ndarray:
    return made.select(pool, k=4, exclude=(), **options).scores["score"].to_numpy()


# ------------------------------------------------------------------------------------- the reference
class Reference:
    """Everything in float64, one row at a time, written from the formulas."""

    def __init__(self, folder: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoder = AnswerEncoder(tokenizer, max_length=2048)
        fmt = row_format(["messages"])
        self.pool, self.target = (
            encoder.encode([read_row(row, fmt) for row in data.select_columns("messages")]) for data in (POOL, TARGET)
        )
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        shape = LoraShape(OPTIONS["rank"], OPTIONS["alpha"], OPTIONS["dropout"], 0)
        self.lora = LoraModel(base, shape)
        self.lora.model.double()
        sketch = CountSketch(DIM, seed=0)
        self.matrix = []
        for name, weight in self.lora.factors.items():
            columns = torch.zeros(weight.numel(), DIM)
            sketch.add(columns, name, torch.eye(weight.numel()))
            self.matrix.append(columns.double().numpy())
        self.epochs = list(self.train())

    def gradient(self, sample: Sample) -> np.ndarray:
        weights = list(self.lora.factors.values())
        for weight in weights:
            weight.requires_grad_(True)
        ids = torch.as_tensor(np.asarray(sample.input_ids))[None]
        at = np.flatnonzero(sample.pooled)
        logits = self.lora.model(input_ids=ids).logits[0, at - 1]
        loss = -torch.log_softmax(logits, -1)[range(len(at)), ids[0, at]].mean()
        found = torch.autograd.grad(loss, weights)
        return np.concatenate([one.flatten().numpy() for one in found])

    def project(self, gradient: np.ndarray) -> np.ndarray:
        return gradient @ np.concatenate(self.matrix)

    def whole(self, gradient: np.ndarray) -> np.ndarray:
        """The projection, as long as the gradient."""
        found = self.project(gradient)
        return found * np.linalg.norm(gradient) / np.linalg.norm(found)

    def put(self, values: np.ndarray) -> None:
        start = 0
        with torch.no_grad():
            for weight in self.lora.factors.values():
                weight.copy_(torch.from_numpy(values[start : start + weight.numel()]).view_as(weight))
                start += weight.numel()

    def train(self) -> Any:
        """AdamW by hand; yields factors, moments and the mean rate at the end of each epoch."""
        chosen = [self.pool[i] for i in np.random.default_rng(0).permutation(len(self.pool))]
        chosen = [one for one in chosen if not one.skip][: math.floor(0.2 * len(self.pool) + 0.5)]
        values = np.concatenate([w.detach().numpy().ravel() for w in self.lora.factors.values()]).copy()
        m, v, steps = np.zeros_like(values), np.zeros_like(values), math.ceil(len(chosen) / OPTIONS["batch"])
        total, done = steps * OPTIONS["epochs"], 0
        ramp = math.ceil(0.03 * total)
        for epoch in range(OPTIONS["epochs"]):
            order, rates = np.random.default_rng([0, epoch]).permutation(len(chosen)), []
            for start in range(0, len(chosen), OPTIONS["batch"]):
                part = [chosen[i] for i in order[start : start + OPTIONS["batch"]]]
                gradient = np.mean([self.gradient(one) for one in part], axis=0)
                gradient = gradient * min(1.0, 1.0 / (np.linalg.norm(gradient) + 1e-6))
                rate = OPTIONS["rate"] * (done / ramp if done < ramp else (total - done) / (total - ramp))
                rates.append(rate)
                done += 1
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
                values -= rate * (m / (1 - 0.9**done)) / (np.sqrt(v / (1 - 0.999**done)) + 1e-8)
                self.put(values)
            yield values.copy(), m.copy(), v.copy(), float(np.mean(rates))

    def less(self) -> np.ndarray:
        total = np.zeros(len(self.pool))
        rates = [rate for *_, rate in self.epochs]
        for values, m, v, rate in self.epochs:
            self.put(values)
            target = [self.project(self.gradient(one)) for one in self.target]
            for i, row in enumerate(self.pool):
                if row.skip:
                    continue
                g = self.gradient(row)
                step = self.project((0.9 * m + 0.1 * g) / np.sqrt(0.999 * v + 0.001 * g**2 + 1e-8))
                total[i] += rate / sum(rates) * np.mean([cosine(step, one) for one in target])
        return total

    def gist(self, kept: int) -> np.ndarray:
        self.put(self.epochs[0][0])
        target = np.stack([self.whole(self.gradient(one)) for one in self.target])
        basis = np.linalg.svd(target)[2][:kept]
        mean = (target @ basis.T).mean(axis=0)
        return np.asarray([cosine(basis @ self.project(self.gradient(row)), mean) for row in self.pool])


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.fixture(scope="module")
def reference(folder: str) -> Reference:
    return Reference(folder)


def test_less(folder: str, reference: Reference) -> None:
    np.testing.assert_allclose(scores(folder, "less"), reference.less(), atol=2e-3)


@pytest.mark.parametrize("kept", [2, 50])
def test_gist(folder: str, reference: Reference, kept: int) -> None:
    np.testing.assert_allclose(scores(folder, "gist", directions=kept), reference.gist(min(kept, 5)), atol=2e-3)


def test_the_norm_is_that_of_the_untouched_model(folder: str) -> None:
    made = extractor(folder)
    lora = LoraModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), LoraShape())
    reference = Reference.__new__(Reference)
    reference.lora = lora
    encoder = AnswerEncoder(AutoTokenizer.from_pretrained(folder), max_length=2048)
    samples = encoder.encode([read_row(row, row_format(["messages"])) for row in POOL.select_columns("messages")])
    norms = [np.linalg.norm(reference.gradient(sample)) for sample in samples]
    found = NeuronSelector("gradient-norm").select(POOL, k=3, extractor=made, exclude=())
    np.testing.assert_allclose(found.scores["score"].to_numpy(), norms, rtol=1e-4)
    small = NeuronSelector("gradient-norm", first="small").select(POOL, k=3, extractor=made, exclude=())
    assert small.indices.tolist() == np.argsort(norms)[:3].tolist()


# ------------------------------------------------------------------------------- properties, resuming
def test_batches_and_order_change_nothing(folder: str) -> None:
    made = selector(folder, "less")
    whole = scored(made)
    order = np.random.default_rng(0).permutation(len(POOL))
    for tokens in (16, 4096):
        with_batches = NeuronFeatureExtractor.from_pretrained(
            folder, features=made.method.signals, dtype="float32", batch_tokens=tokens
        )
        rows_read = POOL.select(order).map(with_batches, batched=True, batch_size=7)
        for signal in made.method.signals:
            assert {len(row) for row in rows_read[signal.name]} == {DIM}
        again = made.method.score(batch_of(rows_read, made), made.targets["target"])
        np.testing.assert_allclose(again, whole[order], atol=2e-3)


def batch_of(data: Dataset, made: NeuronSelector) -> RowBatch:
    names = [name for signal in made.method.signals for name in signal.types(made.extractor.extraction)]
    table = data.with_format("arrow")[:]
    columns = {name: table[name] for name in names}
    return RowBatch(np.arange(len(data)), np.ones(len(data), bool), columns)


def test_a_warm_up_is_trained_once_and_goes_on_where_it_stopped(
    folder: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scores(folder, "less")
    (kept,) = home.glob("neuronselect/prepared/*/warm_up-*")
    assert sorted(path.name for path in kept.iterdir()) == ["epoch-1.safetensors", "epoch-2.safetensors"]
    trained: list[int] = []
    train = warm_up.Trainer._train
    monkeypatch.setattr(
        warm_up.Trainer, "_train", lambda self, begin, end: [trained.append(begin), train(self, begin, end)][1]
    )
    before = (kept / "epoch-2.safetensors").read_bytes()
    assert scores(folder, "gist").shape == whole.shape and not trained, "gist takes the first of the same checkpoints"
    (kept / "epoch-2.safetensors").unlink()
    np.testing.assert_allclose(scores(folder, "less"), whole, atol=1e-6)
    assert trained == [1] and (kept / "epoch-2.safetensors").read_bytes() == before
    scores(folder, "less", rate=0.01)
    assert trained == [1, 0] and len([*home.glob("neuronselect/prepared/*/warm_up-*")]) == 2


def test_dropout_is_drawn_again_in_the_same_way(folder: str, home: Path) -> None:
    first = scores(folder, "less", dropout=0.5)
    (kept,) = home.glob("neuronselect/prepared/*/warm_up-*")
    for path in kept.iterdir():
        path.unlink()
    assert scores(folder, "less", dropout=0.5).tolist() == first.tolist()
    assert not np.allclose(first, scores(folder, "less"), atol=1e-6)


def test_a_store_keeps_16_kb_a_row_and_checkpoint(folder: str, tmp_path: Path) -> None:
    made = selector(folder, "less", dim=8192)
    done = write_store(POOL, made.extractor.with_features(made.method.signals), tmp_path / "store", pool_about={})
    assert done["bytes"] / len(POOL) / 2 < 16.5 * 1024 + 100
    assert scored(made, features=FeatureStore(tmp_path / "store")).tolist() == scored(made).tolist()


def test_two_processes_make_the_same_store(folder: str, tmp_path: Path) -> None:
    made = selector(folder, "less")
    signals = made.extractor.with_features(made.method.signals)
    for number in (1, 2):
        write_store(POOL, signals, tmp_path / str(number), pool_about={}, shard_rows=8, num_workers=number)
    one, two = (scored(made, features=FeatureStore(tmp_path / str(number))) for number in (1, 2))
    assert one.tolist() == two.tolist()


# ------------------------------------------------------------------------------------------ bad input
def refused(run: Any) -> str:
    with pytest.raises(NeuronSelectError) as caught:
        run()
    return str(caught.value)


def test_bad_input(folder: str, tmp_path: Path) -> None:
    made = NeuronSelector("less", **OPTIONS)
    assert "call prepare(pool, extractor=...) first" in refused(lambda: made.fit(TARGET, extractor=extractor(folder)))
    stream: IterableDataset = POOL.to_iterable_dataset()
    assert "a stream will not do" in refused(lambda: made.prepare(stream, extractor=extractor(folder)))
    assert "needs a model" in refused(lambda: NeuronSelector("less", **OPTIONS).prepare(POOL))
    assert "above 0 and at most 1" in refused(lambda: NeuronSelector("less", warm_up=1.5))
    assert "below 1" in refused(lambda: NeuronSelector("less", dropout=1.0))
    one = NeuronSelector("gist", **OPTIONS).prepare(POOL, extractor=extractor(folder))
    assert "at least 2 exemplars" in refused(lambda: one.fit(TARGET.select([0]), extractor=extractor(folder)))
    asked = Dataset.from_list([{"messages": chat("why", "")[:1]}] * 3)
    assert "no row has an answer to train on" in refused(
        lambda: NeuronSelector("less", **OPTIONS).prepare(asked, extractor=extractor(folder))
    )
    memory = NeuronFeatureExtractor.from_model(
        AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), features=["gradient"]
    )
    assert "is in memory: save it" in refused(lambda: NeuronSelector("less", **OPTIONS).prepare(POOL, extractor=memory))
    fitted = selector(folder, "less")
    assert "fits the checkpoints of a warm-up on one pool, so it is never saved" in refused(fitted.fitted)
    fitted.select(POOL, k=3).save_pretrained(tmp_path / "picks")
    assert not (tmp_path / "picks" / "capability").exists()


def test_rows_without_an_answer_are_skipped_with_a_reason(folder: str) -> None:
    mixed = Dataset.from_list([{"messages": chat("why", "because")}, {"messages": chat("why", "")[:1]}])
    found = mixed.map(extractor(folder), batched=True)
    assert found["neuron_skip"][0] == "" and "no assistant turn" in found["neuron_skip"][1]
    assert len(found["gradient"][0]) == 8192 and found["gradient"][1] == []


def test_the_schedule_of_a_single_step() -> None:
    assert WarmUp(epochs=1, batch=32).rates(5).tolist() == [[0.0]], "all of it is the ramp"
