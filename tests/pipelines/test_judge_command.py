"""Picks rated by a judge: what it is asked, the means, the check of the judge, what it is refused for."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from chat_server import KEY, ChatServer
from datasets import Dataset
from tiny import chat, rows

from hf_neuronselect import NeuronSelectError
from hf_neuronselect.cli.main import main
from hf_neuronselect.core.configs import SelectConfig
from hf_neuronselect.core.judging import JudgeConfig
from hf_neuronselect.explain.judged import LONGEST, Group, asked, read_aspects, read_prompt
from hf_neuronselect.models.chat import JudgeSpec
from hf_neuronselect.models.judge import Rating
from hf_neuronselect.models.marks import Marked
from hf_neuronselect.pipelines.explain import rows_like
from hf_neuronselect.pipelines.judge import _named, judge
from hf_neuronselect.pipelines.select import select

MATHS = Dataset.from_list(
    [{"messages": chat(f"What is {i} plus {i + 1}?", f"The sum is {2 * i + 1}.")} for i in range(12)]
)
POOL = Dataset.from_list(
    [{"messages": chat(f"What is {i} plus {i + 40}?", f"The sum is {2 * i + 40}.")} for i in range(20, 40)]
    + [{"messages": chat(f"Tell me of river {i}", f"It flows {'on ' * (i % 7)}and on.")} for i in range(40)]
)


def parts(prompt: str) -> tuple[str, str]:
    """The exemplar and the row of a question."""
    found = re.search(r"<exemplar>\n(.*)\n</exemplar>\n\n<row>\n(.*)\n</row>", prompt, re.DOTALL)
    assert found is not None
    return found[1], found[2]


def knows_sums(prompt: str) -> str:
    """Marks rows that look like the exemplars, whose words are in order, high."""
    mark = 9 if re.search(r"What is \d+ plus", parts(prompt)[1]) else 2
    return f"Similarity: {mark}. About sums.\nFormat: {mark - 1}. \x1b[31mRed.\nGeneralisation: {mark}. Perhaps."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A selection by a method with a target, one without, their pool and exemplars."""
    folder = tmp_path_factory.mktemp("judged")
    MATHS.to_json(folder / "maths.jsonl")
    POOL.to_json(folder / "pool.jsonl")
    rows(30, seed=5).to_json(folder / "other.jsonl")
    given = {"pool": str(folder / "pool.jsonl"), "model": str(tiny_folder / "model"), "sae": str(tiny_folder / "sae")}
    mona = {"target": (f"maths={folder / 'maths.jsonl'}",), "k": 15}
    select(SelectConfig(out=folder / "mona", **mona, **given))
    select(SelectConfig(out=folder / "short", method="shortest", k=8, **given))
    return folder


@pytest.fixture
def ask(server: ChatServer, files: Path) -> Callable[..., Any]:
    def work(*names: str, **options: Any) -> Any:
        given = {"target": f"maths={files / 'maths.jsonl'}", "pool": str(files / "pool.jsonl"), "at": server.url,
                 "key": "OPENAI_API_KEY", "samples": 6, "checks": 4, "tries": 2} | options  # fmt: skip
        config = JudgeConfig(folder=tuple(str(files / name) for name in names or ("mona",)), **given)
        return judge(config)

    return work


def test_picks_stand_beside_random_rows_and_the_judge_is_checked(
    ask: Any, server: ChatServer, files: Path, tmp_path: Path
) -> None:
    server.answer = knows_sums
    with pytest.warns(UserWarning, match=r"is asked about 30 pairs: \d+ requests, about"):
        found = ask("mona", "short", out=tmp_path / "out", price_in=1.0, price_out=1.0)
    assert [group.name.split(" (")[0] for group in found.groups] == [
        "mona", "short", "random rows of the pool", "other exemplars of maths", "rows of another task",
        "exemplars, words shuffled",
    ]  # fmt: skip
    assert [len(group.rows) for group in found.groups] == [6, 6, 6, 4, 4, 4]
    # one exemplar, the one that is named, against each row
    texts = [f"user: {one['messages'][0]['content']}\nassistant: {one['messages'][1]['content']}" for one in MATHS]
    pairs = [parts(body["messages"][-1]["content"]) for body in server.asked]
    assert {exemplar for exemplar, _ in pairs} == {texts[found.exemplar]}
    assert all(body["temperature"] == 0 for body in server.asked)
    # numbers name the rows
    of_pool = [f"user: {one['messages'][0]['content']}\nassistant: {one['messages'][1]['content']}" for one in POOL]
    assert {of_pool[i] for group in found.groups[:3] for i in group.rows} <= {row for _, row in pairs}
    for group in found.picks:
        sums = np.asarray(["What is" in of_pool[i] for i in group.rows])
        np.testing.assert_array_equal(group.marks, np.where(sums[:, None], [[9, 8, 9]], [[2, 1, 2]]))
        assert group.means()["format"].value == pytest.approx(np.where(sums, 8, 1).mean())
        above = found.above_random()[group.name]
        assert above.value == pytest.approx(group.overall.mean() - found.random.overall.mean())
    # shuffled words lose "What is ... plus" nearly always
    assert found.check.passed and found.check.auc.value >= 0.8
    assert "gpt-4o-mini tells exemplars of the task from other rows: AUC" in str(found)
    record = json.loads((tmp_path / "out" / "judged.json").read_text())
    assert record["picks"]["mona"]["rows"] == 6 and record["check"]["passed"] and record["judge"] == "gpt-4o-mini"
    table = pq.read_table(tmp_path / "out" / "judged.parquet").to_pylist()
    assert len(table) == 30 and table[0]["similarity_reason"] == "About sums."
    assert not any("\x1b" in (one["answer"] or "") + one["format_reason"] for one in table)
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file())
    assert KEY.encode() not in written
    # a second time nothing is asked
    before = len(server.asked)
    assert str(ask("mona", "short")) == str(found) and len(server.asked) == before


def test_the_folder_that_one_is_in_is_judged_by_its_name(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files / "mona")
    config = JudgeConfig(folder=(".", "../mona", "../short"), at="local", judge="x")
    assert _named(config) == (["mona", "short"], ["../mona", "../short"])


def test_exemplars_that_selections_share_are_read_once(
    ask: Any, server: ChatServer, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer, read, of = knows_sums, list[str](), rows_like
    shutil.copytree(files / "mona", files / "again")
    monkeypatch.setattr("hf_neuronselect.pipelines.judge.rows_like", lambda *given: read.append(given[1]) or of(*given))
    ask("mona", "again")
    assert read == ["target", "pool"]


def test_what_is_drawn_depends_on_the_seed_alone(ask: Any, server: ChatServer) -> None:
    server.answer = knows_sums
    one, again, other = ask(), ask(concurrency=1), ask(seed=1)
    assert [g.rows for g in one.groups] == [g.rows for g in again.groups] != [g.rows for g in other.groups]


@pytest.mark.parametrize("answer", ["10\n10\n10", "", "Similarity: 9. x\nFormat: 8. y", "<html>"])
def test_a_judge_that_talks_garbage_is_said_to_be_unchecked(ask: Any, server: ChatServer, answer: str) -> None:
    server.answer = lambda prompt: answer
    with pytest.warns(UserWarning, match="24 of 24 answers of gpt-4o-mini cannot be read: these pairs have no mark"):
        found = ask()
    assert not found.check.passed
    assert "could not be checked: 0 of 12 pairs with a known answer have marks that can be read" in str(found)
    assert found.picks[0].means()["overall"].value is None and "0 of 6" in str(found)


def test_a_judge_that_says_the_same_of_all_is_warned_of(ask: Any, server: ChatServer) -> None:
    server.answer = lambda prompt: "Similarity: 8\nFormat: 8\nGeneralisation: 8"
    told = str(ask())
    assert "Warning: gpt-4o-mini cannot tell exemplars of the task from other rows (AUC 0.50 (0.50 to 0.50)" in told
    assert "its marks say nothing about the picks; ask a larger model" in told


def test_faults_are_tried_again_and_a_refused_row_is_left_out(ask: Any, server: ChatServer, monkeypatch: Any) -> None:
    server.answer, server.faults = knows_sums, [429, "slow", 400]
    monkeypatch.setattr("hf_neuronselect.models.judge.LONGEST_WAIT", 0.01)
    found = ask(timeout=0.3, concurrency=1, tries=3)
    problems = [rating.problem for group in found.groups for rating in group.ratings if rating.problem]
    assert problems == ["error: the judge refused the row (400)"]


def test_fewer_picks_than_samples_and_no_pool_are_said(ask: Any, server: ChatServer) -> None:
    server.answer = knows_sums
    found = ask("short", pool=None, samples=50, checks=0)
    assert len(found.picks[0].rows) == 8 and found.random is None and found.check is None
    assert "Note: short has 8 picks that can be read: all of them are rated, not 50." in str(found)
    assert "the pool" in found.notes[1] and "is not at hand: give it (--pool)" in found.notes[1]


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["mona"], {"target": None}, r"its exemplars.* are not at hand: give them, --target maths=ROWS"),
        (["short"], {"target": None}, "no selection says what it is for: give the exemplars"),
        (["mona"], {"target": "code"}, "mona was selected for maths"),
        (["mona"], {"pool": "{files}/other.jsonl"}, "the selection was made with"),
        (["mona"], {"at": "ftp://x"}, "must be hub, local, or the base URL"),
        (["mona"], {"prompt": "{files}/maths.jsonl"}, r"has no \{exemplar\} and no \{row\}"),
        (["mona"], {"prompt": "{files}/none.txt"}, "cannot be read: No such file"),
        (["nowhere"], {}, "nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused_before_anything_is_asked(
    ask: Any, server: ChatServer, files: Path, names: list[str], options: dict[str, Any], words: str
) -> None:
    options = {key: value.format(files=files) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(NeuronSelectError, match=words):
        ask(*names, **options)
    assert not server.asked


def test_a_missing_key_is_one_line(files: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["neuronselect", "judge", str(files / "mona"), str(files / "short")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "set the environment variable OPENAI_API_KEY" in capsys.readouterr().err


def test_a_local_judge_says_that_it_cannot_judge(ask: Any, server: ChatServer, tiny_folder: Path) -> None:
    with pytest.warns(UserWarning, match="cannot be read"):
        found = ask(judge=str(tiny_folder / "model"), at=None, samples=2, checks=2)
    assert not server.asked and not found.check.passed and found.judge == "model"


# ------------------------------------------------------------------------------------- questions and answers
def test_texts_are_put_in_as_they_are() -> None:
    """No braces of theirs are filled in, and one cannot pull in the other."""
    (turn,) = asked("A {exemplar} B {row} {other}", "{row}{0}", "\\1 {exemplar}")
    assert turn["content"] == "A {row}{0} B \\1 {exemplar} {other}"
    (turn,) = asked("{exemplar}|{row}", "a" * 5 + "b" * LONGEST + "c" * 5, "x")
    assert (
        turn["content"].startswith("aaaaab") and "\n[...]\n" in turn["content"] and turn["content"].endswith("bccccc|x")
    )
    assert len(turn["content"]) < LONGEST + 20


def test_the_packages_own_prompt_asks_for_what_is_read() -> None:
    text = read_prompt(None)
    answer = text.split("one sentence:\n")[1].replace("number", "7")
    assert read_aspects(answer) == (Marked(7, "reason"),) * 3


@pytest.mark.parametrize(
    ("answer", "marks"),
    [
        ("Similarity: 9. A\nFormat: 8. B\nGeneralisation: 7. C", (9, 8, 7)),
        ("Sure!\n\n**Similarity:** 9/10 - yes\n- **Format**: 8 out of 10\n* Generalization = 7", (9, 8, 7)),
        ("similarity (1-10): 3.5; x\nFORMAT: 2,5\ngeneralisation: 10", (3.5, 2.5, 10)),
        ("Similarity: 7. 3 of the 4 steps are alike\nFormat: 1\nGeneralisation: 1", (7, 1, 1)),
        ("Similarity: 0\nFormat: 8\nGeneralisation: 7", None),
        ("Similarity: 11\nFormat: 8\nGeneralisation: 7", None),
        ("Similarity: -3\nFormat: 8\nGeneralisation: 7", None),
        ("Similarity: 3-5\nFormat: 8\nGeneralisation: 7", None),
        ("Similarity: 3 to 5\nFormat: 8\nGeneralisation: 7", None),
        ("Similarity: 3/5\nFormat: 8\nGeneralisation: 7", None),
        ("Similarity: 3\nSimilarity: 4\nFormat: 8\nGeneralisation: 7", None),
        ("Similarity: high\nFormat: 8\nGeneralisation: 7", None),
        ("Similarity: 1.2.3\nFormat: 8\nGeneralisation: 7", None),
        ("Similarity 9\nFormat 8\nGeneralisation 7", None),
        ("Similarity: 9 Format: 8 Generalisation: 7", None),
        ("", None),
    ],
)  # fmt: skip
def test_marks_are_read_by_their_names(answer: str, marks: tuple[float, ...] | None) -> None:
    found = read_aspects(answer)
    assert (None if found is None else tuple(one.mark for one in found)) == marks


def test_the_mean_of_a_group_is_of_what_was_read() -> None:
    marked = Rating((Marked(1, ""), Marked(2, ""), Marked(6, "")))
    group = Group("g", (4, 5), (marked, Rating(None, "no")))
    assert group.overall.tolist() == [3] and group.means()["generalisation"].value == 6


@pytest.mark.parametrize("judge", ["./nowhere", "../nowhere", "/nowhere"])
def test_a_folder_that_is_missing_is_no_name_of_an_api(judge: str) -> None:
    with pytest.raises(NeuronSelectError, match="no such folder"):
        JudgeSpec.of(JudgeConfig(folder=("x",), judge=judge), begin="", local_tokens=1)
