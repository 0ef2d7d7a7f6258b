"""The evaluate modules: loaded from their folders, against values worked out by hand or slowly."""

from __future__ import annotations

import ast
import copy
import doctest
import itertools
import math
import re
import socket
import subprocess
import sys
import warnings
from decimal import Decimal
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from families import CHATML, tiny_model, tiny_tokenizer
from huggingface_hub import metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import chat, rows

from hf_neuronselect.core import bundled
from hf_neuronselect.core.errors import NeuronSelectError, NeuronSelectWarning
from hf_neuronselect.metrics import METRICS, metric_path
from hf_neuronselect.metrics.answer_match.answer_match import answer_match, choice, last_number, normalised
from hf_neuronselect.metrics.mtld.mtld import factors, mtld, words
from hf_neuronselect.metrics.precision_at_budget.precision_at_budget import precision_at_budget
from hf_neuronselect.metrics.selection_overlap.selection_overlap import selection_overlap
from hf_neuronselect.models.loss import answer_losses
from hf_neuronselect.rows.formats import Conversation

ALLOWED = {"evaluate", "datasets", "numpy", *sys.stdlib_module_names}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request would fail the test."""

    def refuse(_self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a request to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def load(name: str, tmp_path: Path) -> Any:
    return evaluate.load(str(metric_path(name)), cache_dir=str(tmp_path))


# ---------------------------------------------------------------------------------------- the folders
def test_every_folder_is_a_metric() -> None:
    folder = metric_path("mtld").parent
    assert sorted(p.parent.name for p in folder.glob("*/app.py")) == sorted(METRICS)
    with pytest.raises(NeuronSelectError, match="did you mean answer_match") as error:
        metric_path("answers_match")
    assert error.value.option == "metric"


def test_the_package_part_imports_no_evaluate() -> None:
    code = "import sys, hf_neuronselect.metrics; sys.exit('evaluate' in sys.modules or 'trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", METRICS)
def test_the_folder_can_be_pushed_as_a_space(name: str) -> None:
    folder = metric_path(name)
    assert {p.name for p in folder.iterdir() if p.name != "__pycache__"} == {
        "__init__.py", "README.md", "app.py", "requirements.txt", f"{name}.py",
    }  # fmt: skip
    data = metadata_load(folder / "README.md")
    assert data["sdk"] == "gradio" and data["app_file"] == "app.py" and data["title"] and data["sdk_version"]
    assert set(data["tags"]) >= {"evaluate", "neuronselect"} and set(data["tags"]) & {"metric", "measurement"}
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for heading in ("## Inputs", "## Outputs", "## Example", "## Limits", "## Citation"):
        assert heading in readme
    assert readme.isascii()
    needed = {re.split(r"[<>=]", line)[0] for line in (folder / "requirements.txt").read_text().split()}
    imported = _imports(folder / f"{name}.py") - set(sys.stdlib_module_names)
    if name == "target_loss":
        assert needed == {"datasets", "evaluate", "hf-neuronselect"}  # which needs the rest
        assert imported == {"datasets", "evaluate", "hf_neuronselect", "torch"}
    else:
        assert imported <= ALLOWED and needed == imported


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert len(node.names) == 1, "evaluate reads one import a line"
            found.add(node.names[0].name.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, "the file stands alone in a Space"
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", METRICS)
def test_the_readme_example_gives_what_it_says(name: str) -> None:
    path = metric_path(name) / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, name, str(path), 0)
    assert len(example.examples) >= 4
    result = doctest.DocTestRunner().run(example)
    assert (result.failed, result.attempted) == (0, len(example.examples))


@pytest.mark.parametrize("name", METRICS)
def test_the_pages_example_runs(name: str, tmp_path: Path) -> None:
    """The page needs gradio; its example and what it calls do not."""
    tree = ast.parse((metric_path(name) / "app.py").read_text(encoding="utf-8"))
    assigned = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    example = ast.literal_eval(assigned["EXAMPLE"])
    assert f"{name}.py" in ast.unparse(assigned["SCRIPT"]) and (metric_path(name) / f"{name}.py").is_file()
    if name == "target_loss":
        example |= {"model_id": str(bundled.MODEL)}
    got = load(name, tmp_path).compute(**example)
    described = load(name, tmp_path).inputs_description.partition("Returns:")[2]
    assert all(f"{key}" in described for key in got)


@pytest.mark.parametrize("name", METRICS)
def test_the_module_says_what_it_is(name: str, tmp_path: Path) -> None:
    module = load(name, tmp_path)
    assert module.name == name and module.description and module.citation
    tags = metadata_load(metric_path(name) / "README.md")["tags"]
    assert module.module_type in tags
    assert evaluate.load(str(metric_path(name) / f"{name}.py"), cache_dir=str(tmp_path)).name == name
    with pytest.raises(ValueError, match="Bad inputs"):
        module.add_batch(predictions=[1.0], references=[1.0], nonsense=[1])


def test_modules_go_together_in_combine(tmp_path: Path) -> None:
    both = evaluate.combine([load("mtld", tmp_path), load("mtld", tmp_path)])
    got = both.compute(data=["a b a b a b"])
    assert set(got) == {f"mtld_{i}_{key}" for i in (0, 1) for key in ("mtld", "per_text", "texts", "no_words")}


# ---------------------------------------------------------------------------------------------- mtld
def slow_factors(tokens: list[str], threshold: float) -> float:
    """The definition, with the ratio of each stretch counted anew."""
    total, start = 0.0, 0
    for end in range(1, len(tokens) + 1):
        stretch = tokens[start:end]
        if len(set(stretch)) < threshold * len(stretch) - 1e-12:
            total, start = total + 1, end
    rest = tokens[start:]
    return total + ((1 - len(set(rest)) / len(rest)) / (1 - threshold) if rest else 0.0)


def slow_mtld(tokens: list[str], threshold: float) -> float:
    return np.mean([len(tokens) / slow_factors(t, threshold) for t in (tokens, tokens[::-1])])


def test_mtld_by_hand() -> None:
    # Forward: of the people by the people | for the people: the ratio is 4/6 at the 6th word, one factor; the rest has
    # ratio 1 and adds nothing. Backward: people the for people the | by people the of: 3/5 at the 5th word.
    assert mtld("Of the people, by the people, for the people.") == 9.0
    # Forward: a a | b c d b: 1/2, one factor; rest 3/4: (1 - .75) / .28. Backward: b d c b a (4/5) a (4/6): one factor.
    forward = 6 / (1 + 0.25 / 0.28)
    assert mtld("a a b c d b") == pytest.approx((forward + 6.0) / 2)
    # At exactly the threshold a stretch goes on: 18 different words of 25.
    tokens = [*map(str, range(18)), *["0"] * 7]
    assert factors(tokens, 0.72) == pytest.approx(1.0) and factors([*tokens, "0"], 0.72) == 1.0
    assert factors([*tokens, "0", "x"], 0.72) == 1.0
    assert mtld("one two three") == 3.0 and mtld("word") == 1.0
    assert mtld("a a a a") == 2.0
    assert math.isnan(mtld("")) and math.isnan(mtld(" ?! \u0301"))
    for threshold in (0, 1, -1, 2, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            mtld("a b", threshold)


def test_words_of_any_script() -> None:
    assert words("Don't stop_me NOW, 3.5!") == ["don", "t", "stop", "me", "now", "3", "5"]
    assert words("हिन्दी में, ÉCOLE e\u0301t\u00e9 \u00dfX") == ["हिन्दी", "में", "\u00e9cole", "e\u0301t\u00e9", "\u00dfx"]
    assert words("\u4f60\u597d\uff0c\u4e16\u754c") == ["\u4f60\u597d", "\u4e16\u754c"]


TOKENS = st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=80)


@settings(deadline=None)
@given(TOKENS, st.sampled_from([0.5, 0.6, 0.72, 0.9]))
def test_mtld_is_its_slow_definition(tokens: list[str], threshold: float) -> None:
    assert factors(tokens, threshold) == pytest.approx(slow_factors(tokens, threshold))
    got = mtld(" ".join(tokens), threshold)
    if len(set(tokens)) == len(tokens):
        assert got == len(tokens)
    else:
        assert got == pytest.approx(slow_mtld(tokens, threshold))
    assert got == pytest.approx(mtld(" ".join(reversed(tokens)), threshold))
    assert got >= 1


def test_mtld_module(tmp_path: Path) -> None:
    module = load("mtld", tmp_path)
    texts = ["of the people by the people for the people", "", "a a a a", "..."]
    want = {"mtld": 5.5, "per_text": [9.0, math.nan, 2.0, math.nan], "texts": 2, "no_words": 2}
    got = module.compute(data=texts)
    np.testing.assert_equal(got, want)
    module.add_batch(data=texts[:1])
    module.add_batch(data=texts[1:3])
    module.add(data=texts[3])
    np.testing.assert_equal(module.compute(), want)
    assert module.compute(data=texts, threshold=0.4)["per_text"][2] == pytest.approx(4 / (1 + 0 / 0.6))
    np.testing.assert_equal(
        module.compute(data=["!"]), {"mtld": math.nan, "per_text": [math.nan], "texts": 0, "no_words": 1}
    )
    for bad, match in (([["a"]], "expected format"), (["a", None], "text 1 is None")):
        with pytest.raises(ValueError, match=match):
            module.compute(data=bad)
        assert module.compute(data=texts[2:3])["per_text"] == [2.0], "no row of a failed call is left"
    with pytest.raises(ValueError, match="threshold"):
        module.compute(data=["a b"], threshold=72)


# --------------------------------------------------------------------------------- selection_overlap
def test_overlap_by_hand(tmp_path: Path) -> None:
    module = load("selection_overlap", tmp_path)
    selections = [[0, 1, 2, 3], [2, 3, 4], [3, 9], []]
    got = module.compute(data=selections, m=2)
    assert got["sizes"] == [4, 3, 2, 0] and got["core"] == 2 and got["m"] == 2
    assert got["jaccard"][0] == pytest.approx([1, 2 / 5, 1 / 5, 0])
    assert got["overlap"][0] == pytest.approx([1, 2 / 3, 1 / 2, 0])
    assert got["jaccard"][3] == got["overlap"][3] == [0, 0, 0, 0]
    assert module.compute(data=selections[:3])["core"] == 1
    module.add_batch(data=[np.asarray(s) for s in selections[:2]])
    module.add_batch(data=selections[2:])
    assert module.compute(m=np.int64(2)) == got


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 12)), min_size=2, max_size=5), st.data())
def test_overlap_is_its_definition(sets: list[set[int]], data: st.DataObject) -> None:
    m = data.draw(st.integers(1, len(sets)))
    got = selection_overlap([sorted(s) for s in sets], m)
    for i, j in itertools.product(range(len(sets)), repeat=2):
        both = sum(row in sets[i] and row in sets[j] for row in range(13))
        either = sum(row in sets[i] or row in sets[j] for row in range(13))
        smaller = min(len(sets[i]), len(sets[j]))
        assert got["jaccard"][i][j] == (both / either if either else 0)
        assert got["overlap"][i][j] == (both / smaller if smaller else 0)
        assert 0 <= got["jaccard"][i][j] <= got["overlap"][i][j] <= 1
        assert got["jaccard"][i][j] == got["jaccard"][j][i] and got["overlap"][i][j] == got["overlap"][j][i]
    assert got["core"] == sum(sum(row in s for s in sets) >= m for row in range(13))


@pytest.mark.parametrize(
    ("data", "options", "match"),
    [
        ([[1, 2]], {}, "at least two"),
        ([[1, 2], [1.5]], {}, "selection 1 has 1.5"),
        ([[1, 2], [-1]], {}, "selection 1 has -1"),
        ([[math.nan], [1]], {}, "selection 0 has nan"),
        ([[1, None], [1]], {}, "selection 0 has None"),
        ([[1, 2], [3, 3]], {}, "selection 1 has a row twice"),
        ([[1], [2]], {"m": 0}, "m=0"),
        ([[1], [2]], {"m": 3}, "m=3"),
        ([[1], [2]], {"m": True}, "m=True"),
        ([[1], [2]], {"m": 1.5}, "m=1.5"),
        ([1, 2], {}, "expected format"),
        ([["a"], ["b"]], {}, "expected format|could not convert"),
    ],
)
def test_overlap_of_what_is_no_selection(data: Any, options: dict, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        load("selection_overlap", tmp_path).compute(data=data, **options)


# ------------------------------------------------------------------------------- precision_at_budget
def slow_precision(scores: list[float], relevant: list[int], k: int) -> tuple[int, int]:
    """Pick k times the best row that is left; (hits, picked)."""
    left = [i for i, score in enumerate(scores) if not math.isnan(score)]
    picked: list[int] = []
    while left and len(picked) < k:
        best = left[0]
        for i in left:
            if scores[i] > scores[best]:
                best = i
        left.remove(best)
        picked.append(best)
    return sum(relevant[i] for i in picked), len(picked)


SCORES = st.sampled_from([math.nan, -math.inf, math.inf, -1.0, 0.0, 0.5, 0.5, 2.0])


@settings(deadline=None)
@given(st.lists(st.tuples(SCORES, st.integers(0, 1)), min_size=1, max_size=30), st.data())
def test_precision_is_its_slow_definition(pairs: list[tuple[float, int]], data: st.DataObject) -> None:
    scores, relevant = [score for score, _ in pairs], [label for _, label in pairs]
    if not any(relevant) or all(math.isnan(score) for score in scores):
        with pytest.raises(ValueError, match="no row is relevant|every score is nan"):
            precision_at_budget(scores, relevant, k=1)
        return
    k = data.draw(st.integers(1, len(pairs) + 3))
    got = precision_at_budget(scores, relevant, k=k)
    hits, picked = slow_precision(scores, relevant, k)
    base = sum(relevant) / len(relevant)
    want = {"precision": hits / picked, "recall": hits / sum(relevant), "base_rate": base}
    assert got == pytest.approx(want | {"lift": hits / picked / base, "k": picked})
    assert all(0 <= got[key] <= 1 for key in want)


@given(st.integers(1, 60), st.floats(0.001, 1))
def test_a_ratio_is_the_selectors_own_budget(total: int, ratio: float) -> None:
    from hf_neuronselect.selection.budget import Budget

    got = precision_at_budget(list(range(total)), [1] * total, ratio=ratio)
    assert got["k"] == Budget(ratio=ratio).rows(total) and got["lift"] == 1


def test_precision_module(tmp_path: Path) -> None:
    module = load("precision_at_budget", tmp_path)
    scores, relevant = [0.5, math.nan, 0.9, 0.5, 0.1], [0, 1, 1, 1, 0]
    want = {"precision": 0.5, "recall": 1 / 3, "base_rate": 0.6, "lift": 0.5 / 0.6, "k": 2}
    assert module.compute(predictions=scores, references=relevant, k=2) == pytest.approx(want)
    assert module.compute(predictions=np.asarray(scores), references=np.asarray(relevant, bool), ratio=0.4) == want
    module.add_batch(predictions=scores[:3], references=relevant[:3])
    module.add(prediction=scores[3], reference=relevant[3])
    module.add(predictions=scores[4], references=relevant[4])
    assert module.compute(k=2) == want
    assert module.compute(predictions=[*scores, None], references=[*relevant, 0], k=9)["k"] == 4


@pytest.mark.parametrize(
    ("scores", "relevant", "options", "match"),
    [
        ([1.0, 2.0], [0, 1], {}, "exactly one"),
        ([1.0, 2.0], [0, 1], {"k": 1, "ratio": 0.5}, "exactly one"),
        ([1.0, 2.0], [0, 1], {"k": 0}, "k=0"),
        ([1.0, 2.0], [0, 1], {"k": 1.0}, "k=1.0"),
        ([1.0, 2.0], [0, 1], {"k": True}, "k=True"),
        ([1.0, 2.0], [0, 1], {"ratio": 0}, "ratio=0"),
        ([1.0, 2.0], [0, 1], {"ratio": 5}, "ratio=5"),
        ([1.0, 2.0], [0, 1], {"ratio": math.nan}, "ratio=nan"),
        ([1.0, 2.0], [0, 0.7], {"k": 1}, "row 1 is 0.7"),
        ([1.0, 2.0], [0, math.nan], {"k": 1}, "row 1 is nan"),
        ([1.0, 2.0], [0, 0], {"k": 1}, "no row is relevant"),
        ([math.nan, math.nan], [0, 1], {"k": 1}, "every score is nan"),
        ([1.0, 2.0], [0], {"k": 1}, "Mismatch"),
        (["best", "worst"], [0, 1], {"k": 1}, "could not convert|expected format"),
    ],
)
def test_precision_of_bad_input(scores: Any, relevant: Any, options: dict, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        load("precision_at_budget", tmp_path).compute(predictions=scores, references=relevant, **options)


# -------------------------------------------------------------------------------------- answer_match
@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 5 + 3 = 8", "8"),
        ("#### 18", "18"),
        ("1 #### 2 #### 1,234,567.50 dollars.", "1234567.5"),
        ("#### 7\nand 3 more lines\n#### none", None),
        ("It costs $1,008.00.", "1008"),
        ("-5", "-5"),
        ("\u22125.25", "-5.25"),
        ("x = -$3", "-3"),
        ("$-3", "-3"),
        ("10-5", "5"),
        ("(2)-5", "5"),
        ("10 - 5", "5"),
        ("from 10 to -5", "-5"),
        ("pages 12,34", "34"),
        ("1,0000", "0"),
        ("12,345,6", "6"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("version 2.5.", "2.5"),
        ("\\boxed{42}", "42"),
        ("**1,000**", "1000"),
        ("50%", "50"),
        ("3/4", "4"),
        ("007", "7"),
        ("\u0663", "3"),
        ("none", None),
        ("", None),
        ("#### ", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12), st.booleans()
)
def test_any_number_is_read_back(value: Decimal, commas: bool) -> None:
    text = f"{value:,f}" if commas else f"{value:f}"
    for sentence in (text, f"1 and 2 make {text}.", f"9 #### {text}", f"({text})", f"7 apples cost {text} dollars!"):
        assert last_number(sentence) == value


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The  Nile.", "nile"),
        ("an  A-team, the best", "ateam best"),
        ("A", "a"),
        ("the", "the"),
        ("+", "+"),
        ("\u4e1c\u4eac\u3002", "\u4e1c\u4eac"),
        ("E\u0301cole", "\u00e9cole"),
        ("theatre", "theatre"),
        (" \n", None),
    ],
)
def test_normalised(text: str, want: str | None) -> None:
    assert normalised(text) == want


@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalised(text)
    assert (once is None) == (not text.strip())
    if once is not None:
        assert answer_match([text], [[text, "other"]], "text")["matches"] == 1
        assert once == " ".join(once.split())


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C) because", "C"),
        ("The answer is D.", "D"),
        ("Answer: _E_", "E"),
        ("I'd say B", "B"),
        ("K, then J", "J"),
        ("ABC D", "D"),
        ("B2 or C", "C"),
        ("b", "B"),
        ("(j).", "J"),
        ("a dog", None),
        ("k", None),
        ("", None),
        ("A dog, so B", "A"),
    ],
)
def test_choice(text: str, letter: str | None) -> None:
    assert choice(text) == letter


@pytest.mark.parametrize(
    ("kind", "predictions", "references", "matches", "unparsed"),
    [
        ("number", ["so 8.", "9", "eight"], ["#### 8", "1 #### 8.5", "8"], 1, 1),
        ("number", ["3", "4"], [["1", "3.0"], ["5"]], 1, 0),
        ("text", ["The Nile", "nile!", " "], ["Nile", ["Amazon", "the nile"], "x"], 2, 1),
        ("choice", ["(B)", "C, not A", "none"], ["B", "A", ["A", "B"]], 1, 1),
    ],
)
def test_answer_match_module(
    kind: str, predictions: list[str], references: list, matches: int, unparsed: int, tmp_path: Path
) -> None:
    module = load("answer_match", tmp_path)
    want = {"answer_match": matches / len(predictions), "matches": matches, "unparsed": unparsed}
    assert module.compute(predictions=predictions, references=references, kind=kind) == want
    module.add(prediction=predictions[0], reference=references[0])
    module.add_batch(predictions=predictions[1:2], references=references[1:2])
    for prediction, reference in zip(predictions[2:], references[2:], strict=True):
        module.add(predictions=prediction, references=reference)
    assert module.compute(kind=kind) == want
    assert answer_match(predictions, references, kind) == want


@pytest.mark.parametrize(
    ("predictions", "references", "kind", "match"),
    [
        (["8"], ["8"], "numbers", "must be one of number, text, choice"),
        (["8"], ["eight"], "number", "row 0, 'eight', has no answer of kind 'number'"),
        (["8", "9"], ["8", ["9", "nine"]], "number", "row 1, 'nine'"),
        (["a"], [" "], "text", "row 0"),
        (["a"], ["none"], "choice", "row 0"),
        (["a"], [[]], "text", "row 0"),
        (["a", None], ["a", "a"], "text", "row 1"),
        (["a", "b"], ["a"], "text", "Mismatch"),
        ([["a"]], ["a"], "text", "expected format"),
        (["a"], [3], "text", "expected format|list"),
        ([], [], "text", "there are none"),
    ],
)
def test_answers_that_cannot_be(predictions: list, references: list, kind: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        load("answer_match", tmp_path).compute(predictions=predictions, references=references, kind=kind)


def test_answer_match_counts_rows() -> None:
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        answer_match(["a", "b"], ["a"], "text")


# --------------------------------------------------------------------------------------- target_loss
@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target_loss")
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # in peft's own code
        adapter = get_peft_model(
            copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        )
    adapter.save_pretrained(folder / "adapter")
    adapter.save_pretrained(folder / "with_tokenizer")
    tiny_tokenizer(CHATML.replace("<|im_start|>", "<s>")).save_pretrained(folder / "with_tokenizer")
    return folder


def conversations(data: list) -> list[Conversation]:
    return [Conversation(messages=messages) for messages in data]


def test_target_loss_module(model_folder: Path, tmp_path: Path) -> None:
    module = load("target_loss", tmp_path)
    data = list(rows(7)["messages"])
    model_id = str(model_folder / "model")
    want = answer_losses(tiny_model("llama"), tiny_tokenizer(), conversations(data))
    got = module.compute(data=data, model_id=model_id)
    assert got == {
        "target_loss": pytest.approx(want.mean, rel=1e-6),
        "answer_tokens": want.tokens.sum(),
        "rows": 7,
        "skipped": 0,
    }
    module.add_batch(data=data[:3])
    module.add(data=data[3])
    module.add_batch(data=data[4:])
    assert module.compute(model_id=model_id, batch_tokens=64) == got | {
        "target_loss": pytest.approx(got["target_loss"], rel=1e-6)
    }
    assert module.compute(data=rows(7)["messages"], model_id=model_id) == got
    assert module.compute(data=[{"messages": messages} for messages in data], model_id=model_id) == got
    cut = module.compute(data=data, model_id=model_id, max_length=95)
    assert cut["answer_tokens"] < got["answer_tokens"] and cut["rows"] + cut["skipped"] == 7
    half = module.compute(data=data, model_id=model_id, dtype="bfloat16", device="cpu")
    assert half["target_loss"] == pytest.approx(want.mean, rel=0.02) and half != got


def test_target_loss_keeps_what_a_row_holds(model_folder: Path, tmp_path: Path) -> None:
    """Tool calls, tools and other formats reach the model."""
    module, model_id = load("target_loss", tmp_path), str(model_folder / "model")
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    want = answer_losses(tiny_model("llama"), tiny_tokenizer(), [Conversation(messages=turns, tools=tools)])
    assert want.tokens[0] > 40
    got = module.compute(data=[{"messages": turns, "tools": tools}], model_id=model_id)
    assert (got["target_loss"], got["answer_tokens"]) == (pytest.approx(want.mean), want.tokens[0])
    same = module.compute(data=[chat("q", "a")], model_id=model_id)
    for row in ({"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "a"}):
        assert module.compute(data=[row], model_id=model_id) == same


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # in peft's own code
def test_target_loss_of_an_adapter(model_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    module, data = load("target_loss", tmp_path), list(rows(4)["messages"])
    model_id = str(model_folder / "model")
    adapted = PeftModel.from_pretrained(tiny_model("llama"), str(model_folder / "adapter"))
    want = answer_losses(adapted, tiny_tokenizer(), conversations(data)).mean
    got = module.compute(data=data, model_id=model_id, adapter_id=str(model_folder / "adapter"))
    assert got["target_loss"] == pytest.approx(want, rel=1e-6)
    assert abs(want - module.compute(data=data, model_id=model_id)["target_loss"]) > 1e-3
    # An adapter that brings its tokenizer is measured with its own chat template.
    own = tiny_tokenizer(CHATML.replace("<|im_start|>", "<s>"))
    want = answer_losses(adapted, own, conversations(data)).mean
    got = module.compute(data=data, model_id=model_id, adapter_id=str(model_folder / "with_tokenizer"))
    assert got["target_loss"] == pytest.approx(want, rel=1e-6)


def test_target_loss_says_what_it_skips(model_folder: Path, tmp_path: Path) -> None:
    module, model_id = load("target_loss", tmp_path), str(model_folder / "model")
    data = [chat("q", "a"), [{"role": "user", "content": "q"}], []]
    with pytest.warns(NeuronSelectWarning, match=r"2 of 3 rows are left out \(row 1: error: no assistant turn"):
        got = module.compute(data=data, model_id=model_id)
    assert (got["rows"], got["skipped"], got["answer_tokens"]) == (1, 2, 1)
    with pytest.raises(NeuronSelectError, match="no row has an answer"):
        module.compute(data=data[1:], model_id=model_id)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({}, "model_id"),
        ({"model_id": "./nowhere"}, "model_id"),
        ({"model_id": "nobody/nothing-of-that-name"}, "model_id"),
        ({"adapter_id": "./nowhere"}, "adapter_id"),
        ({"dtype": "int3"}, "dtype"),
        ({"max_length": 0}, "max_length"),
        ({"data": ["a text"]}, "data"),
        ({"data": [{"question": "q"}]}, "row_format"),
    ],
)
def test_target_loss_of_bad_input(options: dict, option: str, model_folder: Path, tmp_path: Path) -> None:
    given = {"data": [chat("q", "a")]} | ({"model_id": str(model_folder / "model")} if options else {}) | options
    with pytest.raises(NeuronSelectError) as error:
        load("target_loss", tmp_path).compute(**given)
    assert error.value.option == option
