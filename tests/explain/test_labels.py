"""Labels of features: the words they fire on, and an honest figure of how well those predict them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import make_extractor, rows

from hf_neuronselect import NeuronSelectError
from hf_neuronselect.core import bundled
from hf_neuronselect.core.sae_configs import SaeLabelConfig
from hf_neuronselect.explain import labels
from hf_neuronselect.explain.firings import Firings
from hf_neuronselect.explain.labels import Label, Labels, label_firings, labels_of, make_labels
from hf_neuronselect.models.sae_formats import load_sae
from hf_neuronselect.pipelines.labels import label_sae
from hf_neuronselect.rows.load import conversations_of
from hf_neuronselect.signals.extraction import resolve_sae

TERMS = ["", "cat", "dog", "sun", "the", "end", "␣", "one", "two"]


def firings(seed: int = 0, n: int = 4000) -> Firings:
    """Feature 0 fires on cat, 1 after sun, 2 before the, 3 at random, 4 nearly never; half of what 0 to 2 could."""
    draw = np.random.default_rng(seed)
    token, row = draw.integers(1, len(TERMS), n), np.arange(n) // 20
    first, last = np.arange(n) % 20 == 0, np.arange(n) % 20 == 19
    before, after = np.roll(token, 1), np.roll(token, -1)
    fires = [token == 1, (before == 3) & ~first, (after == 4) & ~last, draw.random(n) < 0.05, np.arange(n) < 3]
    places = [np.flatnonzero(one & ((draw.random(n) < 0.5) | (i > 2))) for i, one in enumerate(fires)]
    latent = np.concatenate([np.full(len(one), i) for i, one in enumerate(places)])
    place = np.concatenate(places)
    order = np.argsort(place, kind="stable")
    return Firings(token, row, place[order], latent[order], draw.random(len(place)).astype(np.float32) + 0.5)


def auc_reference(seen: Firings, feature: int, label: Label) -> float:
    """Over all pairs of held-out tokens, written from the definition."""
    held = np.flatnonzero(seen.row % labels.HELD_OUT == labels.HELD_OUT - 1)
    fires = set(seen.place[seen.latent == feature].tolist())
    learnt = seen.row % labels.HELD_OUT != labels.HELD_OUT - 1

    def word(at: int, step: int) -> str | None:
        other = at + step
        return TERMS[seen.token[other]] if 0 <= other < len(seen.row) and seen.row[other] == seen.row[at] else None

    def weight(term: str, step: int) -> float:
        own = seen.latent == feature
        strength, mean = seen.strength[own], seen.strength[own & learnt[seen.place]].mean()
        chosen = learnt[seen.place[own]]
        total = float((strength[chosen] / mean).sum())
        with_it = sum(float(s / mean) for s, at, ok in zip(strength, seen.place[own], chosen, strict=True)
                      if ok and word(int(at), step) == term)  # fmt: skip
        base = sum(word(int(at), step) == term for at in np.flatnonzero(learnt)) / learnt.sum()
        return float(np.log((with_it + labels.PRIOR * base) / ((total + labels.PRIOR) * base)))

    slots = [(0, label.on), (-1, label.after), (1, label.before)]
    weights = [(step, term, weight(term, step)) for step, terms in slots for term in terms]
    score = {int(at): sum(w for step, term, w in weights if word(int(at), step) == term) for at in held}
    positive = [score[at] for at in score if at in fires]
    negative = [score[at] for at in score if at not in fires]
    wins = sum((p > q) + 0.5 * (p == q) for p in positive for q in negative)
    return wins / (len(positive) * len(negative))


def test_labels_are_the_words_that_a_feature_fires_on() -> None:
    seen = firings()
    found = label_firings(seen, TERMS)
    assert (found[0].on, found[0].after, found[0].before) == (("cat",), (), ())
    assert (found[1].on, found[1].after, found[1].before) == ((), ("sun",), ())
    assert (found[2].on, found[2].after, found[2].before) == ((), (), ("the",))
    assert 3 not in found and 4 not in found, "no word says where it fires; it fires too seldom"
    assert str(found[1]) == "after “sun”"
    for feature in range(3):
        assert found[feature].auc == pytest.approx(auc_reference(seen, feature, found[feature]), abs=1e-9)
        assert found[feature].auc > 0.9
        own = seen.place[seen.latent == feature]
        assert found[feature].tokens == len(own) / len(seen.token)
        assert found[feature].rows == len(set(seen.row[own].tolist())) / seen.rows


def test_a_label_that_holds_on_other_rows_no_more_is_told_by_its_auc() -> None:
    seen = firings()
    held = seen.row % labels.HELD_OUT == labels.HELD_OUT - 1
    token = seen.token.copy()
    token[held] = np.random.default_rng(1).permutation(token[held])
    turned = label_firings(Firings(token, seen.row, seen.place, seen.latent, seen.strength), TERMS)
    assert abs(turned[0].auc - 0.5) < 0.1


def test_labels_of_a_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = make_extractor(tiny_folder, features=["mona"], batch_tokens=64)
    found = make_labels(extractor, conversations_of(rows(40)), tokens=600, about={"pool": "some"})
    sae = extractor.extraction.sae
    assert sae is not None and found.about["sae"] == sae.key and found.about["pool"] == "some"
    assert 600 <= found.about["tokens"] < 900 and found.found
    assert all(0 <= label.auc <= 1 and 0 < label.tokens <= label.rows <= 1 for label in found.found.values())
    other = make_labels(make_extractor(tiny_folder, features=["mona"]), conversations_of(rows(40)), tokens=600)
    assert other.found.keys() == found.found.keys(), "batches move nothing"
    path = tmp_path / "labels.parquet"
    found.save(path)
    again = Labels.load(path)
    assert again.about == found.about and again.found.keys() == found.found.keys()
    assert all(again.found[one].on == found.found[one].on for one in again.found)
    monkeypatch.setattr(labels, "labels_path", lambda sae: path)
    assert labels_of(sae) is not None
    found.save(tmp_path / "labels.parquet")
    Labels(found.found, {"sae": "another"}).save(path)
    assert labels_of(sae) is None
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(NeuronSelectError, match="damaged: make them again"):
        labels_of(sae)


def test_no_more_rows_are_read_than_are_needed(tiny_folder: Path) -> None:
    read: list[int] = []
    every = (read.append(i) or row for i, row in enumerate(conversations_of(rows(300))))  # type: ignore[func-returns-value]
    found = make_labels(make_extractor(tiny_folder, features=["mona"]), every, tokens=600)
    assert found.about["tokens"] >= 600 and len(read) <= found.about["rows"] + 64 < 150


def test_few_rows_are_refused(tiny_folder: Path) -> None:
    extractor = make_extractor(tiny_folder, features=["mona"])
    with pytest.raises(NeuronSelectError, match="at least 4 rows"):
        make_labels(extractor, conversations_of(rows(2)), tokens=100)
    with pytest.raises(NeuronSelectError, match="no row can be read"):
        make_labels(extractor, [], tokens=100)


@pytest.mark.parametrize("folder", [path for root in bundled.SAES for path in sorted(root.iterdir()) if path.is_dir()],
                         ids=lambda path: path.name)  # fmt: skip
def test_the_labels_in_the_package_are_of_its_saes_and_small(folder: Path) -> None:
    source = resolve_sae(str(folder), None, int(folder.name.removeprefix("layers.")), None)
    found = labels_of(source)
    assert found is not None and found.about["pool"] == "bundled:pool" and found.about["tokens"] >= 300_000
    latents = load_sae(folder, layer=None).num_latents
    assert len(found.found) > 0.5 * latents and max(found.found) < latents
    assert (folder / labels.FILE).stat().st_size < 1_000_000
    assert all(0 <= one.auc <= 1 and (one.on or one.after or one.before) for one in found.found.values())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("mine", "is a folder; name a file"),
        ("mine/thesis.txt", "exists and has no labels; name another file"),
    ],
)
def test_labels_are_not_written_over_something_else(out: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(NeuronSelectError, match=message):
        label_sae(SaeLabelConfig(pool="bundled:pool", tokens=100, out=tmp_path / out))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_labels_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NeuronSelectError, match="cannot be written: .*; name another file"):
        Labels({0: Label(("two",), (), (), 0.9, 0.1, 0.2)}, {}).save(tmp_path / "file" / "labels.parquet")
