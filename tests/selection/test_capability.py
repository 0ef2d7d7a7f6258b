"""A selection knows how it was made; a saved capability brings its own extractor; a folder is whole or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from records import edit
from stopped import DONE, stop_at
from tiny import chat, make_extractor, rows

from hf_neuronselect import FeatureLibrary, NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.core import bundled
from hf_neuronselect.core.options import ExtractionOptions
from hf_neuronselect.core.provenance import SourceRecord
from hf_neuronselect.hub.command import select_command
from hf_neuronselect.hub.push import push_folder
from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.store.store import FeatureStore, write_store

QUESTION = "How many apples are left when Tom eats three of his eight apples?"


@pytest.fixture
def options() -> dict[str, Any]:
    """Options of the tiny extractor that are not the default."""
    return {"layer": 1, "max_length": 64, "pool_tokens": "assistant", "pooling": "sum", "top_k_features": 4}


@pytest.fixture
def unusual(tiny_folder: Path, options: dict[str, Any]) -> NeuronFeatureExtractor:
    return make_extractor(tiny_folder, **options)


def places(folder: Path) -> dict[str, str]:
    return {"model": str(folder / "model"), "sae": str(folder / "sae")}


def reasons(selection: Selection) -> list[Any]:
    """What a folder alone can tell of the best row."""
    found = selection.explain(0)
    return [found.says, found.score, *((part.id, part.amount, part.share, part.tokens) for part in found.parts)]


# -- what a saved selection knows


def test_a_saved_selection_has_its_selector(
    tiny_folder: Path, tmp_path: Path, pool: Dataset, target: Dataset, unusual: NeuronFeatureExtractor
) -> None:
    selector = NeuronSelector("mona", metric="cosine").fit({"t": target}, extractor=unusual)
    selection = selector.select(pool, k=5)
    selection.save_pretrained(tmp_path / "s")
    again = Selection.from_pretrained(tmp_path / "s")
    found = again.selector
    assert found is not None and found.about() == selector.about()
    assert again.provenance.extractor == selector.extraction and found.identities == selector.identities
    assert found.leakage.questions == selector.leakage.questions
    with pytest.raises(NeuronSelectError, match="which is not on the Hub: name its folder") as caught:
        again.explain(0)
    assert caught.value.option == "model"
    found.make_extractor(**places(tiny_folder))
    assert reasons(again) == reasons(selection)
    other = rows(20, seed=9)
    assert found.select(other, k=4).indices.tolist() == selector.select(other, k=4).indices.tolist()


@pytest.mark.parametrize("method", ["random", "longest"])
def test_a_baseline_knows_its_options(tmp_path: Path, pool: Dataset, extractor: Any, method: str) -> None:
    given = {"seed": 7} if method == "random" else {}
    NeuronSelector(method, **given).select(pool, k=3, extractor=extractor).save_pretrained(tmp_path / "s")
    found = Selection.from_pretrained(tmp_path / "s").selector
    assert found is not None and (found.method.name, found.method.options) == (method, given)
    assert list(found.targets) == [method]


def test_explain_works_from_a_folder_of_the_bundled_model(tmp_path: Path, target: Dataset, pool: Dataset) -> None:
    extractor = NeuronFeatureExtractor.from_options(ExtractionOptions(), ["mona"])
    selection = NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(pool, k=3)
    selection.save_pretrained(tmp_path / "s")
    assert reasons(Selection.from_pretrained(tmp_path / "s")) == reasons(selection)


# -- a capability's own extractor


def saved(folder: Path, target: Dataset, extractor: NeuronFeatureExtractor) -> NeuronSelector:
    NeuronSelector("mona").fit({"t": target}, extractor=extractor).save_pretrained(folder)
    return NeuronSelector.from_pretrained(folder)


def test_a_capability_makes_its_extractor(
    tiny_folder: Path, tmp_path: Path, pool: Dataset, target: Dataset, unusual: NeuronFeatureExtractor
) -> None:
    loaded = saved(tmp_path / "c", target, unusual)
    made = loaded.make_extractor(**places(tiny_folder), batch_tokens=64)
    assert made.identities["mona"] == unusual.identities["mona"] and made.extraction.options.batch_tokens == 64
    expected = NeuronSelector("mona").fit({"t": target}, extractor=unusual).select(pool, k=5)
    assert loaded.select(pool, k=5).indices.tolist() == expected.indices.tolist()
    assert str(tiny_folder) not in (tmp_path / "c" / "config.json").read_text()


def test_a_bundled_capability_needs_no_options(tmp_path: Path, target: Dataset) -> None:
    extractor = NeuronFeatureExtractor.from_options(ExtractionOptions(max_length=128), ["mona"])
    loaded = saved(tmp_path / "c", target, extractor)
    assert loaded.make_extractor().identities == extractor.identities
    again = loaded.make_extractor(max_length=128, layer=-2, dtype="auto")  # the same options once more
    assert again.identities == extractor.identities


@pytest.mark.parametrize(
    ("given", "both"),
    [
        ({"max_length": 32}, ("64", 32)),
        ({"layer": -1}, ("1", -1)),
        ({"pool_tokens": "all"}, ("assistant", "all")),
        ({"pooling": "mean"}, ("sum", "mean")),
        ({"dtype": "bfloat16"}, ("float32", "bfloat16")),
        ({"value_dtype": "float16"}, ("float32", "float16")),
        ({"columns": {"messages": "turns"}}, ("{}", {"messages": "turns"})),
    ],
)
def test_options_that_contradict_a_capability_are_refused(
    given: dict[str, Any], both: tuple[str, Any], tiny_folder: Path, tmp_path: Path, target: Dataset,
    unusual: NeuronFeatureExtractor,
) -> None:  # fmt: skip
    loaded = saved(tmp_path / "c", target, unusual)
    with pytest.raises(NeuronSelectError, match="contradicts the capability") as caught:
        loaded.make_extractor(**places(tiny_folder), **given)
    assert caught.value.option == next(iter(given)) and caught.value.value == both[1]
    assert both[0] in caught.value.message


def test_another_model_than_the_capabilitys_is_refused(
    tiny_folder: Path, tmp_path: Path, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    loaded = saved(tmp_path / "c", target, extractor)
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    known = extractor.extraction.model.commit
    with pytest.raises(
        NeuronSelectError, match=f"was fitted with model at {known}, this is model at content:"
    ) as caught:
        loaded.make_extractor(model=str(tmp_path / "model"), sae=str(tiny_folder / "sae"))
    assert caught.value.option == "model"
    with pytest.raises(NeuronSelectError, match="unknown option; did you mean max_length"):
        loaded.make_extractor(max_lenght=3)


def test_a_capability_of_columns_cannot_make_an_extractor(
    tmp_path: Path, target: Dataset, pool: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    NeuronSelector("mona").fit({"t": target.map(extractor, batched=True)}).save_pretrained(tmp_path / "c")
    loaded = NeuronSelector.from_pretrained(tmp_path / "c")
    assert (
        loaded.extraction.signals == {name: extractor.identities[name] for name in ("mona", "tokens")}
        and loaded.extraction.model is None
    )
    with pytest.raises(NeuronSelectError, match="that is not recorded: pass extractor="):
        loaded.make_extractor()
    assert len(loaded.select(pool, k=3, extractor=extractor)) == 3


# -- fitting twice


def test_fitting_again_starts_clean(pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor) -> None:
    first = pool.select(range(4))
    selector = NeuronSelector("mona").fit({"first": first}, extractor=extractor)
    assert selector.select(pool, k=5).provenance.counts.leak == 4
    again = selector.fit({"second": target}, extractor=extractor).select(pool, k=5)
    fresh = NeuronSelector("mona").fit({"second": target}, extractor=extractor).select(pool, k=5)
    assert again.provenance.counts == fresh.provenance.counts and again.provenance.counts.leak == 0
    assert list(again.provenance.targets) == ["second"] and again.indices.tolist() == fresh.indices.tolist()
    # Of another extractor, too: nothing of the first one is remembered.
    sae = extractor.extraction.sae.location
    other = NeuronFeatureExtractor.from_model(*_loaded(extractor), sae=sae, features=["mona"])
    assert selector.fit(target, extractor=other).identities == other.identities


def _loaded(extractor: NeuronFeatureExtractor) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = extractor.extraction.model.location
    return AutoModelForCausalLM.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)


# -- leakage


def excluded(selector: NeuronSelector, texts: list[list[dict[str, str]]], **options: Any) -> list[str | None]:
    small = Dataset.from_list([{"messages": messages} for messages in texts])
    return selector.select(small, ratio=1.0, **options).scores.column("excluded").to_pylist()


def test_a_saved_capability_leaves_out_an_exemplars_question(
    tmp_path: Path, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    """Only hashes are saved: a whole user turn is found, a question inside a longer one is not."""
    exemplars = Dataset.from_list([*target.select_columns(["messages"]), {"messages": chat(QUESTION, "5")}])
    loaded = saved(tmp_path / "c", exemplars, extractor)
    pool = [
        chat(QUESTION, "another answer"),
        chat(f"  {QUESTION.upper()}", "in other letters"),
        [*chat("hello there", "hi"), *chat(QUESTION, "later in the talk")],
        chat("Unrelated", "no"),
    ]
    assert excluded(loaded, pool, extractor=extractor) == ["leak", "leak", "leak", None]


def test_a_question_without_spaces_is_found_inside_a_longer_row(
    target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    question = "小明有八个苹果，他吃了三个，又把两个送给了妹妹，请问他现在还剩下几个苹果？请写出计算过程。"
    exemplars = Dataset.from_list([*target.select_columns(["messages"]), {"messages": chat(question, "三个")}])
    selector = NeuronSelector("mona").fit({"t": exemplars}, extractor=extractor)
    pool = [chat(f"请回答下面的问题。{question}谢谢！", "三"), chat(f"请回答下面的问题。{question[5:]}谢谢！", "三")]
    assert excluded(selector, pool) == ["leak", None]


# -- a folder is whole, or refused


@pytest.mark.parametrize("full", [False, True], ids=["killed", "disk full"])
def test_a_selection_written_over_another_is_the_old_or_the_new(full: bool, tmp_path: Path) -> None:
    """Stopped at steps all over the write; the same command then goes on."""
    old, new = (NeuronSelector("random", seed=seed).select(rows(30), k=4) for seed in (0, 1))
    picks = {str(one.indices.tolist()): name for name, one in {"old": old, "new": new}.items()}
    found, n = [], 1
    while "done" not in found:
        folder = tmp_path / str(n)
        old.save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")
        status = stop_at(n, lambda folder=folder: new.save_pretrained(folder), str(folder), full=full)
        found.append(picks[str(Selection.from_pretrained(folder).indices.tolist())])
        if status == DONE:
            found.append("done")
        new.save_pretrained(folder)
        assert picks[str(Selection.from_pretrained(folder).indices.tolist())] == "new"
        assert (folder / "notes.txt").read_text() == "mine" and not list(folder.glob(".*"))
        n += 17
    assert set(found) == {"old", "new", "done"}


def test_a_model_folder_is_no_capability(target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path) -> None:
    """Both have a config.json."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(NeuronSelectError, match="exists and is not a capability folder"):
        NeuronSelector("mona").fit({"t": target}, extractor=extractor).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", ["../../secret.txt", "/etc/hostname", "README.md"])
def test_a_record_that_lists_other_files_is_refused(name: str, tmp_path: Path) -> None:
    NeuronSelector("random").select(rows(30), k=4).save_pretrained(tmp_path / "s")
    record = tmp_path / "s" / "selection.json"
    edit(record, lambda made: made["files"].update({name: "0" * 32}))
    with pytest.raises(NeuronSelectError, match="its record lists other files"):
        Selection.from_pretrained(tmp_path / "s")
    edit(record, lambda made: made["files"].clear())
    with pytest.raises(NeuronSelectError, match="its record lists other files"):
        Selection.from_pretrained(tmp_path / "s")


def test_a_library_whose_capabilities_were_changed(
    target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    fitted = {name: NeuronSelector(name).fit({"t": target}, extractor=extractor) for name in ("mona", "nait")}
    FeatureLibrary(fitted).save_pretrained(tmp_path)
    a, b = (tmp_path / "capabilities" / name for name in fitted)
    for path in a.iterdir():  # two whole capabilities, each in the other's place
        path.replace(b / f"{path.name}.part")
        (b / path.name).replace(path)
        (b / f"{path.name}.part").replace(b / path.name)
    assert NeuronSelector.from_pretrained(tmp_path, subfolder="capabilities/mona").method.name == "nait"
    found = FeatureLibrary.from_pretrained(tmp_path)
    for read in (lambda: found["mona"], lambda: push_folder(tmp_path, "me/library")):
        with pytest.raises(NeuronSelectError, match="its capability mona is not the one that library.json lists"):
            read()
    FeatureLibrary(fitted).save_pretrained(tmp_path)
    same = FeatureLibrary.from_pretrained(tmp_path)["mona"]
    assert same.exemplars == fitted["mona"].exemplars


def test_a_record_edited_by_hand_is_refused(tmp_path: Path) -> None:
    NeuronSelector("random").select(rows(30), k=4).save_pretrained(tmp_path / "s")
    record = tmp_path / "s" / "selection.json"
    record.write_text(record.read_text().replace('"selected": 4', '"selected": 5'))
    for read in (Selection.from_pretrained, load_rows):
        with pytest.raises(NeuronSelectError, match="selection.json was changed after it was written; select again"):
            read(str(tmp_path / "s"))


# -- cost


def test_cost_of_this_run_and_of_a_store(
    tmp_path: Path, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    selector = NeuronSelector("mona").fit({"t": target}, extractor=extractor)
    direct = selector.select(pool, k=5).provenance
    lengths = selector.select(pool, k=5).scores.column("n_tokens").to_pylist()
    assert direct.timing.tokens_per_second and direct.cost.fit_seconds and direct.cost.score_seconds
    exemplars, rest = direct.cost.passes.values()
    assert (exemplars.engine, exemplars.rows, exemplars.signals) == (
        "forward",
        len(target),
        (extractor.key("mona"),),
    )
    assert (rest.engine, rest.rows, rest.tokens) == ("forward", len(pool), sum(lengths))

    write_store(pool, extractor, tmp_path / "store", pool_about={"id": "p"})
    stored = selector.select(pool, k=5, features=FeatureStore(tmp_path / "store")).provenance
    assert stored.timing.tokens_per_second is None and stored.cost.computed_tokens == exemplars.tokens
    assert stored.tokens.pool_mean == direct.tokens.pool_mean


# -- the command of a card


def flags(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


def test_every_option_that_moves_a_number_is_in_the_command(tiny_folder: Path, pool: Dataset, target: Dataset) -> None:
    moved: dict[str, Any] = {
        "layer": 1, "top_k_features": 4, "pooling": "sum", "site": "mlp", "drift": "mean", "value_dtype": "float16",
        "row_format": "messages", "columns": {"messages": "talk"}, "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}",
        "max_length": 99, "truncation_side": "left", "pool_tokens": "no_special", "dtype": "float32",
        "attn_implementation": "eager",
    }  # fmt: skip
    data = [one.rename_column("messages", "talk") for one in (pool, target)]
    extractor = make_extractor(tiny_folder, features=("mona", "nait"), **moved)
    selection = NeuronSelector("nait", direction="mean").fit({"t": data[1]}, extractor=extractor).select(data[0], k=3)
    command = select_command(selection.provenance)
    said = dict(zip(command.words, command.words[1:], strict=False))
    assert said["--pooling"] == "sum" and said["--site"] == "mlp" and said["--drift"] == "mean"
    assert said["--columns"] == "messages=talk" and said["--chat-template"] == moved["chat_template"]
    assert said["--truncation-side"] == "left" and said["--row-format"] == "messages" and said["--max-length"] == "99"
    assert said["--attn-implementation"] == "eager" and said["--pool-tokens"] == "no_special" and said["--layer"] == "1"
    assert said["--top-k-features"] == "4" and said["--dtype"] == "float32" and said["--k"] == "3"
    assert "direction=mean" in command.words
    # float16 is the default, and the tiny folders are nowhere but here.
    assert "--value-dtype" not in said and {what for what, _, _ in command.fill_in} >= {"the model", "the sae"}


def test_bundled_names_need_no_filling_in(target: Dataset) -> None:
    extractor = NeuronFeatureExtractor.from_options(ExtractionOptions(), ["mona"])
    pool = Dataset.from_parquet(str(bundled.POOL)).select(range(30))
    selector = NeuronSelector("mona").fit(
        {"t": target}, extractor=extractor, sources={"t": SourceRecord(id="bundled:gsm8k")}
    )
    made = selector.select(pool, k=3, source=SourceRecord(id="bundled:pool")).provenance
    command = select_command(made)
    assert command.fill_in == [] and "--model" not in command.words and "--sae" not in command.words
    assert command.words[3] == "bundled:pool" and "t=bundled:gsm8k" in command.words


def test_a_capabilitys_command_leaves_its_options_to_it(
    tiny_folder: Path, tmp_path: Path, pool: Dataset, target: Dataset, unusual: NeuronFeatureExtractor
) -> None:
    loaded = saved(tmp_path / "c", target, unusual)
    loaded.make_extractor(**places(tiny_folder))
    command = select_command(loaded.select(pool, k=3).provenance)
    assert flags(command.words) == {
        "--pool",
        "--target",
        "--method",
        "--method-option",
        "--model",
        "--sae",
        "--k",
        "--out",
    }
    assert "capability:c" in command.words
    assert [what for what, _, _ in command.fill_in] == ["the pool", "the capability", "the model", "the sae"]


def test_scores_of_a_saved_selector_are_the_same(
    tiny_folder: Path, tmp_path: Path, pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor
) -> None:
    selection = NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(pool, k=5)
    selection.save_pretrained(tmp_path / "s")
    again = Selection.from_pretrained(tmp_path / "s").selector
    assert again is not None
    scores = again.select(pool, k=5, extractor=again.make_extractor(**places(tiny_folder))).scores
    np.testing.assert_array_equal(scores.column("score"), selection.scores.column("score"))
