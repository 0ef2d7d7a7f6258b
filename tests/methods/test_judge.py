"""A judge behind an API that answers garbage, times out and refuses; and one on this machine."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from chat_server import KEY, ChatServer
from datasets import Dataset
from families import tiny_model, tiny_tokenizer
from tiny import chat
from transformers import AutoConfig, AutoModelForCausalLM

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, NeuronSelectWarning
from hf_neuronselect.cli import main as cli
from hf_neuronselect.core.folders import DATA_FILE
from hf_neuronselect.core.options import ExtractionOptions
from hf_neuronselect.core.provenance import plain
from hf_neuronselect.methods import make_method
from hf_neuronselect.models import chat as clients
from hf_neuronselect.models import dtypes, loading
from hf_neuronselect.models.chat import JudgeSpec
from hf_neuronselect.models.judge import Answer, Judge
from hf_neuronselect.models.marks import read_mark
from hf_neuronselect.rows.load import conversations_of


def by_letters(prompt: str) -> str:
    """A mark from 0 to 5: how many letters b the answer has, by halves."""
    answer = re.findall(r"Response:\n(.*?)\n\n", prompt, re.DOTALL)[0]
    return f"{answer.count('b') / 2:g}\nBecause it has so many."


def pool(answers: list[str]) -> Dataset:
    return Dataset.from_list([{"messages": chat(f"question {i}", answer)} for i, answer in enumerate(answers)])


def select(server: ChatServer, rows: Dataset, **options: Any) -> Any:
    given = {"at": server.url, "judge": "some-judge", "tries": 3, "key": "OPENAI_API_KEY"} | options
    selector = NeuronSelector("alpagasus", **given)
    extractor = NeuronFeatureExtractor.from_options(ExtractionOptions(), selector.method.signals)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = selector.select(rows, extractor=extractor)
    return found, [str(one.message) for one in said if issubclass(one.category, NeuronSelectWarning)]


def test_rows_of_four_and_a_half_and_more_are_kept(server: ChatServer, tmp_path: Path) -> None:
    server.answer = by_letters
    rows = pool(["b" * 9, "none", "b" * 10, "b" * 8, "bbb b bbb bb", "x"])
    found, said = select(server, rows, price_in=0.5, price_out=1.5)
    assert found.indices.tolist() == [2, 0, 4]
    scores = found.scores.column("score").to_numpy()
    np.testing.assert_array_equal(scores, [4.5, 0, 5, 4, 4.5, 0])
    assert len(server.asked) == 6
    for body in server.asked:
        assert body["temperature"] == 0 and body["model"] == "some-judge" and body["path"] == "/v1/chat/completions"
        assert "accuracy" in body["messages"][0]["content"]
    assert any("6 requests" in one and "at most $0.00" in one for one in said)
    cost = next(cost for cost in found.provenance.cost.passes.values() if cost.engine == "judge")
    assert cost.requests == 6 and cost.money is not None and cost.money > 0
    # a second time nothing is asked; another question is
    again, said = select(server, rows)
    assert again.indices.tolist() == [2, 0, 4] and len(server.asked) == 6 and not said
    select(server, rows, ask="helpfulness")
    assert len(server.asked) == 12


def test_the_key_goes_to_its_url_alone_and_is_written_nowhere(server: ChatServer, tmp_path: Path) -> None:
    found, said = select(server, pool(["a", "b"]))
    assert set(server.keys) == {f"Bearer {KEY}"}  # not the Hub's own token
    found.save_pretrained(tmp_path / "out")
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in data or b"hf_secret" in data for data in written)
    assert KEY not in json.dumps(plain(found.provenance)) + "".join(said)


def test_an_api_without_a_key_gets_no_token_of_the_hub(server: ChatServer) -> None:
    """Nor OpenAI's key, which is not named here."""
    select(server, pool(["a"]), key=None)
    assert server.keys == ["Bearer none"]


@pytest.mark.parametrize("fault", [429, 500, 503, "garbage", "empty", "cut", "slow"])
def test_what_passes_is_tried_again(server: ChatServer, fault: int | str) -> None:
    waited: list[float] = []
    server.faults = [fault, fault]
    judge = Judge(spec(server, timeout=0.3), sleep=waited.append)
    asked = [[{"role": "user", "content": f"q{i}"}] for i in range(3)]
    assert [answer.text for answer in judge.ask(asked)] == ["4.5\nFine."] * 3
    assert len(server.asked) == judge.requests == 5 and len(waited) == 2


def spec(server: ChatServer, **options: Any) -> JudgeSpec:
    return JudgeSpec("some-judge", server.url, tries=3, concurrency=1, **{"key": "OPENAI_API_KEY"} | options)


def test_waits_grow_and_follow_what_the_server_asks(server: ChatServer) -> None:
    waited: list[float] = []
    server.faults, server.retry_after = [429, 429], "7"
    Judge(spec(server), sleep=waited.append).ask([[{"role": "user", "content": "q"}]])
    assert waited == [7.0, 7.0]
    waited.clear()
    server.faults, server.retry_after = [429] * 4, ""
    judge = Judge(JudgeSpec("other", server.url, tries=5), sleep=waited.append)
    judge.ask([[{"role": "user", "content": "q"}]])
    assert all(0.5 * 2**nth <= wait <= 2**nth for nth, wait in enumerate(waited)) and len(waited) == 4


@pytest.mark.parametrize(
    ("fault", "tries", "words"),
    [
        (429, 3, "answered 429, 3 times"),
        ("garbage", 3, "no chat completion, 3 times"),
        ("cut", 3, "cannot be reached"),
        (401, 1, "answered 401; the key in OPENAI_API_KEY is wrong"),
        (404, 1, "answered 404; no model of this name"),
    ],
)
def test_a_judge_that_fails_keeps_what_it_said_and_goes_on(
    server: ChatServer, fault: int | str, tries: int, words: str
) -> None:
    asked = [[{"role": "user", "content": f"q{i}"}] for i in range(6)]
    judge = Judge(spec(server), sleep=lambda seconds: None)
    assert len(judge.ask(asked[:2])) == 2
    server.faults = [fault] * tries
    with pytest.raises(NeuronSelectError, match=words) as error:
        judge.ask(asked)
    assert "2 answers are kept: run again to go on" in str(error.value) and KEY not in str(error.value)
    before = len(server.asked)
    again = Judge(spec(server))
    with again.file.open("ab") as file:
        file.write(b'{"key": "cut by a ki')
    assert [answer.text for answer in again.ask(asked)] == ["4.5\nFine."] * 6
    assert len(server.asked) == before + 4
    assert [answer.asked for answer in Judge(spec(server)).ask(asked)] == [False] * 6


def test_a_row_that_is_refused_is_left_out_alone(server: ChatServer) -> None:
    server.faults = [413]
    found, said = select(server, pool(["a", "b", "c"]), concurrency=1)
    assert found.indices.tolist() == [1, 2]
    assert found.provenance.counts.error == 1 and "refused the row (413)" in found.provenance.counts.reasons[0]
    server.faults = [400] * 50
    with pytest.raises(NeuronSelectError, match=r"refuses every row .*400"):
        select(server, pool([f"other {i}" for i in range(40)]), concurrency=1)
    assert len(server.asked) < 30


def test_answers_without_a_mark_are_counted_and_dropped(server: ChatServer) -> None:
    said = iter(["As an AI, I cannot.", "5\nGood.", "", "7", "Between 3 and 4", "Score: 4.5/5"])
    server.answer = lambda prompt: next(said)
    found, warned = select(server, pool(list("abcdef")), concurrency=1)
    assert found.indices.tolist() == [1, 5]
    assert found.provenance.counts.error == 4
    assert any("4 of 6 answers of some-judge cannot be read" in one for one in warned)


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("4.5", 4.5), ("5\n4 because", 5), ("\n\n3\nx", 3), ("Score: 4", 4), ("**4.5**", 4.5), ("4/5", 4), ("4,5", 4.5),
        ("4 out of 5", 4), ("Rating (0-5): 3.5", 3.5), ("I give it 2.", 2), ("0", 0), ("10", None), ("-1", None),
        ("", None), ("four", None), ("3 or 4", None), ("5.1", None), ("v2b", None), ("good\n5", None), ("1e9", None),
        ("nan", None), ("4.5.1", None), ("4/10", None),
    ],
)  # fmt: skip
def test_marks_are_the_one_number_of_the_first_line(answer: str, mark: float | None) -> None:
    assert read_mark(answer) == mark


def test_requests_run_at_once_and_equal_ones_once(server: ChatServer) -> None:
    server.pause = 0.03
    asked = [[{"role": "user", "content": f"q{i % 8}"}] for i in range(16)]
    judge = Judge(JudgeSpec("some-judge", server.url, concurrency=4))
    assert judge.estimate(asked).requests == 8
    assert len(judge.ask(asked)) == 16
    assert len(server.asked) == 8 and 2 <= server.busiest <= 4


def test_a_local_judge(tiny_folder: Path, server: ChatServer) -> None:
    """The greedy answer of the model itself; the tiny one says nothing that is a mark."""
    selector = NeuronSelector("alpagasus", judge=str(tiny_folder / "model"), at="local")
    judge = Judge(selector.method.signals[0].judge)
    (answer,) = judge.ask([[{"role": "user", "content": "Hi"}]])
    assert answer.asked and isinstance(answer.text, str)
    assert judge.ask([[{"role": "user", "content": "Hi"}]])[0] == Answer(answer.text)
    # the same beside longer questions
    judge.file.unlink()
    asked = [[{"role": "user", "content": text}] for text in ("A longer one", "Hi", "Why?" * 9)]
    assert Judge(judge.spec).ask(asked)[1].text == answer.text
    assert not server.asked
    assert selector.method.stand_in(None) == "model"


def test_a_local_judge_is_greedy_whatever_its_own_settings_say(tiny_folder: Path, tmp_path: Path) -> None:
    """Some instruct models come with a penalty for repeating, which would count the marks that the question names."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_folder / "model"), tiny_tokenizer()
    asked = [[{"role": "user", "content": text}] for text in ("Hi Hi Hi", "From 0 to 5, 5 5 5?")]
    said = []
    for penalty in (1.0, 1.9):
        model.generation_config.repetition_penalty = penalty
        model.save_pretrained(tmp_path / str(penalty))
        tokenizer.save_pretrained(tmp_path / str(penalty))
        chosen = make_method("alpagasus", {"judge": str(tmp_path / str(penalty)), "at": "local"})
        judge = Judge(chosen.signals[0].judge)
        judge.file.unlink(missing_ok=True)  # one name for both: these settings move no answer
        said.append([answer.text for answer in judge.ask(asked)])
        assert judge.client.model.generation_config.repetition_penalty == penalty
    assert said[0] == said[1]


def test_each_process_has_a_local_judge_on_its_own_gpu(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal = make_method("alpagasus", {"judge": str(tiny_folder / "model"), "at": "local"}).signals[0]
    asked: list[torch.device] = []

    def causal_lm_of(spec: Any, place: torch.device) -> Any:
        asked.append(place)
        raise NeuronSelectError("seen")

    monkeypatch.setattr(loading, "causal_lm_of", causal_lm_of)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, rank in (("auto", 0), ("auto", 1), ("cpu", 1)):
        extractor = NeuronFeatureExtractor.from_options(ExtractionOptions(device=device), (signal,))
        with pytest.raises(NeuronSelectError, match="seen"):
            extractor.compute(extractor.prepare(conversations_of(pool(["an answer"]))), rank)
    assert asked == [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]


def test_what_a_local_judge_cannot_read_whole_has_no_mark(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge(make_method("alpagasus", {"judge": str(tiny_folder / "model"), "at": "local"}).signals[0].judge)
    window = AutoConfig.from_pretrained(tiny_folder / "model").max_position_embeddings
    asked = [[{"role": "user", "content": text}] for text in ("Hi", "a " * window, "Why?")]
    monkeypatch.setattr(clients, "LOCAL_TOKENS", 1)  # a row at a time
    short, long, other = judge.ask(asked)
    assert short.text and other.text and not short.problem
    assert long.text is None and re.fullmatch(
        rf"error: [\d,]+ tokens are asked, the judge reads {window:,} with its answer", long.problem
    )
    assert judge.ask(asked)[1].problem == long.problem, "it is not kept as an answer"


def test_a_local_judge_runs_in_the_format_that_auto_means(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")
    monkeypatch.setattr(dtypes, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(dtypes, "LARGE", 1000)
    specs = [
        make_method("alpagasus", {"judge": str(folder), "at": "local"}).signals[0].judge
        for folder in (tmp_path / "lm", tiny_folder / "model")
    ]
    assert [spec.dtype for spec in specs] == ["bfloat16", "float32"] and "bfloat16" in specs[0].identity
    (answer,) = (judge := Judge(specs[0])).ask([[{"role": "user", "content": "Hi"}]])
    assert answer.text and judge.client.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"at": "ftp://x"}, "must be hub, local, or the base URL"),
        ({"at": "local", "judge": "./nowhere"}, "no such folder"),
        ({}, "set the environment variable OPENAI_API_KEY"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_first(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(NeuronSelectError, match=words):
        make_method("alpagasus", options).check()


def test_offline_nothing_is_sent(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NeuronSelectError, match="HF_HUB_OFFLINE is set; unset it, or use at=local"):
        Judge(spec(server), sleep=lambda seconds: None).ask([[{"role": "user", "content": "q"}]])
    assert not server.asked


def test_the_cards_command_asks_the_same_judge(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = by_letters
    pool(["b" * n for n in (3, 9, 10, 2, 8)]).to_json(tmp_path / "pool.jsonl")
    monkeypatch.chdir(tmp_path)
    options = {"at": server.url, "judge": "some-judge", "ask": "helpfulness", "concurrency": 2}
    words = [word for name, value in options.items() for word in ("--method-option", f"{name}={value}")]
    run = ["neuronselect", "select", "--pool", "pool.jsonl", "--method", "alpagasus", *words, "--out", "one"]
    for out in ("one", "selected"):
        monkeypatch.setattr("sys.argv", run)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        assert Dataset.from_parquet(str(tmp_path / out / DATA_FILE))["source_index"] == [2, 1]
        found = re.search(r"```bash\n(.*?)\n```", (tmp_path / out / "README.md").read_text(), re.DOTALL)
        assert found is not None
        run = shlex.split(found[1].replace(" \\\n", " "))
        assert {"judge=some-judge", f"at={server.url}", "ask=helpfulness", "--threshold"} <= set(run)
    assert len(server.asked) == 5
