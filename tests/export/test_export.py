"""Exports: TRL's are parsed by TRL and trained on; the others' are held against the keys those trainers document."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import types
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
import yaml
from chats import CHATS, Chat
from datasets import Dataset, load_dataset
from families import tiny_model, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import chat, rows
from transformers import AutoTokenizer
from versions import before

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.core import bundled
from hf_neuronselect.core.configs import Trainer
from hf_neuronselect.core.errors import NeuronSelectWarning
from hf_neuronselect.core.options import NumberOptions
from hf_neuronselect.core.provenance import ExtractionRecord, SourceRecord
from hf_neuronselect.export.export import FORMATS, export_selection
from hf_neuronselect.rows.encode import Limits, SampleEncoder
from hf_neuronselect.rows.formats import Conversation, read_row, row_format
from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.rows.table import as_dataset

MODEL = "org/base"
POOL = {"id": "who/pool", "commit": "a" * 40, "config": None, "split": "train", "license": "apache-2.0"}
CONFIG = {"trl": "sft.yaml", "axolotl": "axolotl.yaml", "llamafactory": "llamafactory.yaml"}


def selected(data: Dataset | list[dict], k: int | None = None, pool: Mapping[str, Any] = POOL) -> Selection:
    """Rows picked by method random: in an order of their own, with a provenance, without a model."""
    data = dataset(data) if isinstance(data, list) else data
    return NeuronSelector("random").select(data, k=k or len(data), exclude=[], source=SourceRecord(**pool))


def scored_by(selection: Selection, model: str, commit: str, **options: Any) -> None:
    """Let the selection's record say that this model scored it."""
    extractor = ExtractionRecord(model=SourceRecord(id=model, commit=commit), options=NumberOptions(**options))
    selection.provenance = replace(selection.provenance, extractor=extractor)


def dataset(data: list[dict]) -> Dataset:
    """Rows as they are: what has no common type stays JSON."""
    keys = dict.fromkeys(key for row in data for key in row)
    if MIXED:
        return Dataset.from_dict({key: [row.get(key) for row in data] for key in keys}, on_mixed_types="use_json")
    return as_dataset(data)


MIXED = not before("datasets", "4.7")  # it has a type for what has no common type
NEEDS_MIXED = pytest.mark.skipif(not MIXED, reason="this datasets reads no arguments without a common type")


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"x": {"type": "number", "default": 1}, "y": {"type": "array"}}},
    },
}
# Arguments of no common type; text beside calls; results of two calls at once; a system turn; several turns.
WRITTEN = '{"x": {"z": "3"}}'
TALKS: list[dict[str, Any]] = [
    {"messages": chat("plain?", "yes")},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather in <b>Ulm</b>?"},
            {"role": "assistant", "content": "", "tool_calls": [call("weather", {"town": "</tool_call>Ulm"}, id="c1")]},
            {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "rain"},
            {"role": "assistant", "content": "Rain."},
        ],
        "tools": [WEATHER],
    },
    {
        "messages": [
            {"role": "user", "content": "Add, twice."},
            {
                "role": "assistant",
                "content": "Let me see.",
                "reasoning_content": "Two sums.",
                "tool_calls": [call("add", {"town": 7, "y": [1, 2.5]}), call("add", WRITTEN)],
            },
            {"role": "tool", "content": "3.5"},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "3.5 and 3"},
        ],
        "tools": [ADD, WEATHER],
    },
    {"messages": [*chat("one", "1"), *chat("two", "2")]},
]


def test_the_command_line_names_every_trainer() -> None:
    assert get_args(Trainer) == FORMATS


@pytest.fixture
def talks() -> Selection:
    return selected(TALKS)


def originals(selection: Selection) -> list[dict[str, Any]]:
    """The rows as they are read: arguments that were written as JSON text are objects."""
    return [_with_objects(TALKS[i]) for i in selection.indices]


def _with_objects(row: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(row)
    assert text.count(json.dumps(WRITTEN)) <= 1
    return json.loads(text.replace(json.dumps(WRITTEN), WRITTEN))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Line by line as a careless reader does it: by everything Unicode calls a line's end."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------- what is written
def test_rows_keep_their_order_and_their_number_in_the_pool(pool: Dataset, tmp_path: Path) -> None:
    selection = selected(pool, 9)
    names = {
        "trl": ["train.jsonl", "README.md", "sft.yaml"],
        "axolotl": ["train.jsonl", "README.md", "axolotl.yaml"],
        "llamafactory": ["train.json", "dataset_info.json", "README.md", "llamafactory.yaml"],
        "unsloth": ["train.jsonl", "README.md", "train_unsloth.py"],
    }
    assert set(names) == set(FORMATS)
    for trainer in FORMATS:
        files = export_selection(selection, trainer, tmp_path / trainer, base_model=MODEL)
        assert files == [tmp_path / trainer / name for name in names[trainer]]
        assert sorted(p.name for p in (tmp_path / trainer).iterdir()) == sorted(names[trainer])
        data = json.loads(files[0].read_text()) if trainer == "llamafactory" else read_lines(files[0])
        assert [line["source_index"] for line in data] == selection.indices.tolist()
        for line, index in zip(data, selection.indices, strict=True):
            turns = line.get("messages") or line["conversations"]
            if trainer == "llamafactory":
                roles = {"human": "user", "gpt": "assistant"}
                turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
                assert set(line) == {"conversations", "system", "source_index"}
            else:
                assert set(line) == {"messages" if "messages" in line else "conversations", "source_index"}
            assert turns == pool[int(index)]["messages"]


NASTY = st.text(max_size=40) | st.sampled_from(
    ["---", "a\n---\nb: [", "{{ x }}{% y %}", "'\"\\", "\u2028\u2029\x85\x0b\x0c\x1c", "# c", "${oc.env:HOME}",
     "!!python/object:os.system", "\ufeff", "<|im_end|>", "\r\n", "\t: -", "é\U0001f600", "\x00"]
).map(lambda text: text * 2)  # fmt: skip


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=NASTY, answer=NASTY, system=NASTY, place=NASTY, trainer=st.sampled_from(FORMATS))
def test_no_text_breaks_anything(
    question: str, answer: str, system: str, place: str, trainer: str, tmp_path: Path
) -> None:
    turns = [{"role": "system", "content": system}, *chat(question, f"x{answer}")]
    plain = selected([{"messages": chat("a", "b")}])
    nasty = selected([{"messages": turns}], pool={"id": place, "commit": place, "license": place, "restricted": place})
    files = export_selection(nasty, trainer, tmp_path / trainer, base_model=MODEL)
    other = export_selection(plain, trainer, tmp_path / f"plain-{trainer}", base_model=MODEL)
    assert len(files[-1].read_text(encoding="utf-8").split("\n")) == len(
        other[-1].read_text(encoding="utf-8").split("\n")
    )
    if trainer == "llamafactory":
        (line,) = json.loads(files[0].read_text(encoding="utf-8"))
        assert line["system"] == system
        assert [turn["value"] for turn in line["conversations"]] == [question, f"x{answer}"]
    else:
        (line,) = read_lines(files[0])
        assert line.get("messages", line.get("conversations")) == turns
    if trainer == "unsloth":
        assert ast.dump(ast.parse(files[-1].read_bytes())) == ast.dump(ast.parse(other[-1].read_bytes()))
    else:
        assert read_yaml(files[-1]) == read_yaml(other[-1])


def test_the_head_says_where_the_rows_come_from(talks: Selection, tmp_path: Path) -> None:
    for trainer in FORMATS:
        config = export_selection(talks, trainer, tmp_path / trainer, base_model=MODEL)[-1]
        head = [line for line in config.read_text().split("\n\n")[0].splitlines() if line.startswith("#")]
        text = "\n".join(head)
        assert f"neuronselect export for {trainer}" in head[0]
        assert f"dataset: who/pool at {'a' * 40} train" in text
        assert "method: random (seed=0)" in text
        assert "licence of the dataset: apache-2.0" in text
    talks.provenance = replace(talks.provenance, pool=SourceRecord(fingerprint="f00"))
    assert (
        "licence of the dataset: not stated"
        in export_selection(talks, "trl", tmp_path / "trl", base_model=MODEL)[-1].read_text()
    )


def test_alpaca_rows_become_turns_and_saved_rows_are_read_as_they_were_scored(tmp_path: Path) -> None:
    data = Dataset.from_list([{"instruction": "Name it.", "input": "7", "output": "seven", "system": "s"}])
    files = export_selection(selected(data), "trl", tmp_path / "alpaca", base_model=MODEL)
    turns = [{"role": "system", "content": "s"}, *chat("Name it.\n\n7", "seven")]
    assert read_lines(files[0]) == [{"messages": turns, "source_index": 0}]

    # A saved selection has no column `messages` where it would lack the calls; the rows' own columns have them.
    talk = TALKS[1]["messages"]
    selection = selected([{"prompt": talk[1:2], "completion": talk[2:], "tools": TALKS[1]["tools"]}])
    selection.save_pretrained(tmp_path / "saved")
    saved = Selection.from_pretrained(tmp_path / "saved")
    assert "messages" not in saved.dataset.column_names
    (line,) = read_lines(export_selection(saved, "unsloth", tmp_path / "prompt", base_model=MODEL)[0])
    assert line["conversations"] == talk[1:] and line["tools"] == TALKS[1]["tools"]


def test_the_columns_a_user_named_are_used(tmp_path: Path, tiny_folder: Path) -> None:
    renames = {"instruction": "question", "output": "reply"}
    extractor = NeuronFeatureExtractor.from_pretrained(
        str(tiny_folder / "model"), features=["hidden"], row_format="alpaca", columns=renames
    )
    data = Dataset.from_list([{"question": f"q{i}", "reply": f"r{i}", "text": "no"} for i in range(4)])
    selection = NeuronSelector("random").select(data, k=2, extractor=extractor)
    lines = read_lines(export_selection(selection, "trl", tmp_path, base_model=MODEL)[0])
    assert [line["messages"] for line in lines] == [chat(f"q{i}", f"r{i}") for i in selection.indices]


# ------------------------------------------------------------------------------------------- refusals
def error_of(*args: Any, **options: Any) -> NeuronSelectError:
    with pytest.raises(NeuronSelectError) as caught:
        export_selection(*args, **options)
    return caught.value


def test_bad_input(talks: Selection, tmp_path: Path) -> None:
    assert error_of(talks, "torchtune", tmp_path, base_model=MODEL).as_command_line() == (
        "--format torchtune: must be one of trl, axolotl, llamafactory, unsloth"
    )
    missing = error_of(talks, "trl", tmp_path / "x")
    assert missing.option == "base_model" and "name the model to train" in str(missing)
    assert error_of(talks, "trl", tmp_path / "x", base_model=" ").option == "base_model"
    assert error_of(talks, "trl", tmp_path / "x", base_model="a\nb").option == "base_model"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("trainer", FORMATS)
def test_rows_nobody_can_learn_chatting_from(trainer: str, tmp_path: Path) -> None:
    texts = selected(Dataset.from_dict({"text": ["once", "upon"]}))
    found = error_of(texts, trainer, tmp_path / "out", base_model=MODEL)
    assert found.option == "format"
    assert re.search(rf"row 0 of the selection \(source_index {texts.indices[0]}\) is plain text.*messages", str(found))
    silent = [{"messages": chat("a", "b")}, {"messages": [{"role": "user", "content": "hello?"}]}]
    selection = selected(silent)
    row = selection.indices.tolist().index(1)
    assert f"row {row} of the selection (source_index 1) has no assistant turn" in str(
        error_of(selection, trainer, tmp_path / "out", base_model=MODEL)
    )
    assert not (tmp_path / "out").exists()


USER, ANSWER = chat("q", "a")
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, SYSTEM, ANSWER], r"has a system turn after the first \(turn 1\)"),
        ([USER, USER, ANSWER], "does not alternate"),
        ([ANSWER, USER, ANSWER], "does not alternate"),
        ([USER, ANSWER, USER], "does not end with an assistant turn"),
        ([USER, ANSWER | {"tool_calls": [call("f", "{oops")]}], "calls f with arguments that are not JSON"),
        ([USER, ANSWER | {"tool_calls": [{"type": "function"}]}], "has a tool call without a function's name"),
    ],
)
def test_rows_llamafactory_would_drop_without_a_word(messages: list[dict], message: str, tmp_path: Path) -> None:
    selection = selected([{"messages": messages}])
    found = error_of(selection, "llamafactory", tmp_path / "out", base_model=MODEL)
    assert re.search(rf"row 0 of the selection \(source_index 0\) {message}.*; leave it out .* trl", str(found))
    assert export_selection(selection, "trl", tmp_path / "trl", base_model=MODEL)


def test_folders(talks: Selection, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    export_selection(talks, "trl", mine, base_model=MODEL)  # empty
    (mine / "out").mkdir()
    (mine / "out" / "adapter.bin").write_text("trained")
    files = export_selection(talks, "axolotl", mine, base_model=MODEL)  # its own
    left = {p.relative_to(mine).as_posix() for p in mine.rglob("*") if p.is_file()}
    assert (
        left
        == {"train.jsonl", "README.md", "axolotl.yaml", "out/adapter.bin"}
        == {f.name for f in files} | {"out/adapter.bin"}
    )
    text = error_of(selected(Dataset.from_dict({"text": ["x"]})), "trl", mine, base_model=MODEL)
    assert "plain text" in str(text) and (mine / "axolotl.yaml").exists()  # nothing is lost to a failed export

    other = tmp_path / "other"
    other.mkdir()
    (other / "sft.yaml").write_text("model_name_or_path: mine\n")
    found = error_of(talks, "trl", other, base_model=MODEL)
    assert found.option == "out" and "is not an export" in str(found)
    assert (other / "sft.yaml").read_text() == "model_name_or_path: mine\n"
    found = error_of(talks, "trl", other / "sft.yaml", base_model=MODEL)
    assert found.option == "out" and "is a file" in str(found)
    if os.geteuid() != 0:
        other.chmod(0o500)
        assert error_of(talks, "trl", other / "below", base_model=MODEL).option == "out"


def test_the_model_of_the_selection_is_the_default(talks: Selection, tmp_path: Path, tiny_folder: Path) -> None:
    scored_by(talks, "org/scorer", "c" * 40, max_length=777)
    made = {t: export_selection(talks, t, tmp_path / t)[-1] for t in FORMATS}
    for trainer, (name, revision, length) in {
        "trl": ("model_name_or_path", "model_revision", "max_length"),
        "axolotl": ("base_model", "revision_of_model", "sequence_len"),
        "llamafactory": ("model_name_or_path", "model_revision", "cutoff_len"),
    }.items():
        config = read_yaml(made[trainer])
        assert (config[name], config[revision], config[length]) == ("org/scorer", "c" * 40, 777)
    assert f"MODEL = 'org/scorer'\nREVISION = '{'c' * 40}'" in made["unsloth"].read_text()
    named = read_yaml(export_selection(talks, "trl", tmp_path / "trl", base_model=MODEL)[-1])
    assert named["model_name_or_path"] == MODEL and "model_revision" not in named
    # The extractor's folder is not what others can load.
    scored_by(talks, "org/looks-like-one", "content:abc")
    assert error_of(talks, "trl", tmp_path / "trl").option == "base_model"


def test_a_folder_is_named_in_full(
    talks: Selection, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder)
    config = read_yaml(export_selection(talks, "trl", tmp_path, base_model="model")[-1])
    assert config["model_name_or_path"] == str((tiny_folder / "model").absolute())


# ------------------------------------------------------------------------------------------------ trl
def parse_trl(config: Path) -> tuple[Any, Any, Any, Any]:
    """As ``trl sft --config`` does it; stops at a key TRL does not know."""
    from trl.scripts.sft import make_parser

    return make_parser().parse_args_and_config(["--config", str(config)], fail_with_unknown_args=True)


def test_trl_knows_every_key(talks: Selection, tmp_path: Path) -> None:
    scored_by(talks, "org/scorer", "c" * 40, max_length=512)
    config = export_selection(talks, "trl", tmp_path)[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no deprecated key
        script, sft, model, data = parse_trl(config)
    assert (model.model_name_or_path, model.model_revision, model.dtype) == ("org/scorer", "c" * 40, "bfloat16")
    assert (model.use_peft, model.lora_r, model.lora_alpha, model.lora_dropout) == (True, 16, 32, 0.05)
    assert model.lora_target_modules == "all-linear"
    assert (sft.max_length, sft.assistant_only_loss, sft.report_to, sft.output_dir) == (512, True, [], "out")
    assert (sft.per_device_train_batch_size, sft.gradient_accumulation_steps, sft.num_train_epochs) == (2, 8, 2)
    assert sft.learning_rate == 2e-4 and sft.gradient_checkpointing is True
    assert script.dataset_name is None
    assert [(d.path, d.data_files, d.split) for d in data.datasets] == [("json", "train.jsonl", "train")]
    config.write_text(config.read_text() + "lora_rr: 3\n")
    with pytest.raises(ValueError, match="lora_rr"):
        parse_trl(config)


@pytest.mark.slow
def test_trl_trains_on_it(tmp_path: Path) -> None:
    """The command in the file's first line, as it stands, on rows with tools whose arguments have no common type."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    selection = selected(TALKS if MIXED else [TALKS[0], TALKS[3]])
    out = tmp_path / "export"
    config = export_selection(selection, "trl", out, base_model=str(tmp_path / "model"))[-1]
    command = re.search(r"`trl (.*)`", config.read_text().splitlines()[0])
    assert command is not None
    done = subprocess.run(
        [sys.executable, "-m", "trl.cli" if before("trl", "0.25") else "trl.cli.main", *command[1].split()],
        cwd=out, capture_output=True, text=True, timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    if "No module named 'mergekit'" in done.stderr:
        pytest.skip("with these libraries, this trl's own command line does not start without mergekit")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "out" / "adapter_model.safetensors").is_file()
    state = json.loads(next((out / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["global_step"] == 2 and state["epoch"] == 2
    assert "`gradient_checkpointing` is deprecated" not in done.stdout + done.stderr


@NEEDS_MIXED
def test_trl_learns_the_answers_and_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import SFTTrainer, get_dataset, get_peft_config

    talks = selected(TALKS)
    lm = tiny_model("llama")
    lm.config.max_position_embeddings = 1024  # of characters
    lm.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = export_selection(talks, "trl", tmp_path / "out", base_model=str(tmp_path / "model"))[-1]
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    _, sft, model, data = parse_trl(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks a transformers 5 model by an old name
        trainer = SFTTrainer(
            model=model.model_name_or_path, args=sft, train_dataset=get_dataset(data)["train"],
            peft_config=get_peft_config(model),
        )  # fmt: skip
    tokenizer = tiny_tokenizer()
    learned = {
        row["source_index"]: tokenizer.decode([label for label in row["labels"] if label != -100])
        for row in trainer.train_dataset
    }
    assert list(learned) == talks.indices.tolist()
    assert learned[0] == "yes" and learned[3] == "12"
    assert re.fullmatch(r'<call>.*"town": "</tool_call>Ulm".*</call>Rain\.', learned[1])
    assert re.fullmatch(r"Let me see\.<call>.*</call><call>.*</call>3\.5 and 3", learned[2])


@NEEDS_MIXED
def test_what_trl_reads_is_what_was_selected(talks: Selection, tmp_path: Path) -> None:
    """``load_dataset`` and the template see each row as it was: no key filled with None, calls and tools whole."""
    out = export_selection(talks, "trl", tmp_path, base_model=MODEL)[0]
    data = load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer()
    for row, original in zip(data, originals(talks), strict=True):
        assert json.loads(row["tools"]) == original.get("tools")
        turns = [{k: v for k, v in turn.items() if k != "source_index"} for turn in row["messages"]]
        assert turns == original["messages"]
        assert tokenizer.apply_chat_template(
            row["messages"], tools=json.loads(row["tools"]), tokenize=False
        ) == tokenizer.apply_chat_template(original["messages"], tools=original.get("tools"), tokenize=False)


@pytest.mark.parametrize("trainer", ["trl", "axolotl", "llamafactory", "unsloth"])
def test_every_export_is_read_back(talks: Selection, tmp_path: Path, trainer: str) -> None:
    """As file and as folder, whole and as a stream: the same text, with the same calls and tools."""
    data = export_selection(talks, trainer, tmp_path / "out", base_model=MODEL)[0]
    tokenizer = tiny_tokenizer()

    def text_of(turns: Any, tools: Any) -> str:
        return tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)

    want = [text_of(o["messages"], o.get("tools")) for o in originals(talks)]
    if trainer == "llamafactory":  # no place for numbers of calls, nor for reasoning but the answer itself
        want = [text.replace(', "id": "c1"', "") for text in want]
        want = [text.replace("Let me see.<call>", "<think>\nTwo sums.\n</think>\n\nLet me see.<call>") for text in want]
    for source, streaming in ((data, False), (tmp_path / "out", False), (data, True)):
        with pytest.warns(NeuronSelectWarning, match="source_index"):
            rows = list(load_rows(str(source), streaming=streaming).data)
        fmt = row_format(dict.fromkeys(name for row in rows for name in row))
        found = [read_row(row, fmt) for row in rows]
        texts = [text_of(o.messages, o.tools) for o in found]
        for text, wanted in zip(texts, want, strict=True):
            assert text == wanted


@NEEDS_MIXED
def test_turns_of_another_kind_far_down_the_file(tmp_path: Path) -> None:
    """``datasets`` types a JSON-lines file by its first 10 MB: calls that come later must not break it."""
    filler = "lorem ipsum " * 3000
    data = [{"messages": chat(f"{i}", filler)} for i in range(310)]
    data += [TALKS[1] | {"messages": TALKS[1]["messages"][1:]}, TALKS[2]]
    selection = NeuronSelector("full").select(dataset(data), ratio=1.0)
    assert selection.indices.tolist() == list(range(312))

    out = export_selection(selection, "trl", tmp_path / "trl", base_model=MODEL)[0]
    assert out.stat().st_size > 10 << 20
    read = load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert (
        read[311]["messages"] == _with_objects(TALKS[2])["messages"]
        and json.loads(read[311]["tools"]) == TALKS[2]["tools"]
    )
    assert read[0]["messages"][0] == {"role": "user", "content": "0", "source_index": 0} and read[0]["tools"] == "null"

    files = export_selection(selection, "axolotl", tmp_path / "axolotl", base_model=MODEL)
    assert [file.name for file in files] == ["train.parquet", "README.md", "axolotl.yaml"]
    (about,) = read_yaml(files[-1])["datasets"]
    assert (about["path"], about["ds_type"]) == ("train.parquet", "parquet")
    table = pq.read_table(files[0])
    assert table.num_rows == 312 and table.column("source_index").to_pylist() == list(range(312))
    turn = table.column("messages")[311].as_py()[1]
    assert json.loads(turn["tool_calls"][1]["function"]["arguments"]) == {"x": {"z": "3"}}


def test_a_model_without_a_template_gets_the_one_its_rows_were_scored_in(pool: Dataset, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer(None).save_pretrained(tmp_path / "base")
    selection = selected(pool, 3)
    files = export_selection(selection, "trl", tmp_path / "trl", base_model=str(tmp_path / "base"))
    assert [file.name for file in files] == ["train.jsonl", "chat_template.jinja", "README.md", "sft.yaml"]
    _, sft, _, _ = parse_trl(files[-1])
    assert (sft.chat_template_path, sft.assistant_only_loss) == ("chat_template.jinja", True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    template = files[1].read_text()
    talk = [SYSTEM, *pool[0]["messages"], *pool[1]["messages"]]
    scored = SampleEncoder(tokenizer).render(Conversation(messages=talk))
    assert tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False) == scored
    marked = tokenizer.apply_chat_template(
        talk, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    answers = [t for t, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(answers) == "".join(m["content"] + "</s>" for m in talk if m["role"] == "assistant")

    axolotl = read_yaml(export_selection(selection, "axolotl", tmp_path / "a", base_model=str(tmp_path / "base"))[-1])
    assert axolotl["chat_template_jinja"] == axolotl["datasets"][0]["chat_template_jinja"] == template
    script = export_selection(selection, "unsloth", tmp_path / "u", base_model=str(tmp_path / "base"))[-1]
    assert f"TEMPLATE = {template!r}" in script.read_text()
    # The plain form shows no tools: no template is put in their place, and the rows are token ids.
    tools = export_selection(selected(TALKS), "trl", tmp_path / "t", base_model=str(tmp_path / "base"))
    assert [file.name for file in tools] == ["train.jsonl", "README.md", "sft.yaml"]
    assert {frozenset(line) for line in read_lines(tools[0])} == {
        frozenset({"input_ids", "assistant_masks", "source_index"})
    }


def based_on(folder: Path, kind: Chat) -> str:
    tiny_model("llama").save_pretrained(folder)
    kind.tokenizer.save_pretrained(folder)
    return str(folder)


def conversed(kind: Chat) -> list[dict[str, Any]]:
    """Rows that the template takes: several turns, calls, a system turn, and one that is cut off."""
    found: list[dict[str, Any]] = [{"messages": [*chat("one?", "First."), *chat("two?", "Second one.")]}]
    found.append({"messages": chat("long " * 500, "cut off")})
    if kind.system:
        found.append({"messages": [SYSTEM, *chat("q", "a")]})
    if kind.call is not None:
        turns = [
            USER,
            ANSWER | {"content": "", "tool_calls": [call("f", {"x": 1})]},
            {"role": "tool", "content": "2"},
            ANSWER,
        ]
        found.append({"messages": turns, "tools": [ADD]})
    return found


@pytest.mark.parametrize("name", CHATS)
def test_token_ids_are_what_was_scored_with_the_answers_marked(name: str, tmp_path: Path) -> None:
    """In every export that writes them: the ids of scoring, the loss on the answers and their ends alone."""
    kind = CHATS[name]
    data, model = conversed(kind), based_on(tmp_path / "base", kind)
    selection = selected(data)
    wanted = {0: f"First.{kind.end}Second one.{kind.end}", 2: f"a{kind.end}", 3: f"{kind.call}{kind.end}a{kind.end}"}
    for trainer in ("trl", "axolotl", "unsloth"):
        with pytest.warns(
            NeuronSelectWarning, match=r"^1 of \d rows .* no assistant token within max_length=512 \(1\);"
        ):
            files = export_selection(selection, trainer, tmp_path / trainer, base_model=model)
        lines, left = read_lines(files[0]), [i for i in selection.indices.tolist() if i != 1]
        assert len(lines) == len(data) - 1
        for line, i in zip(lines, left, strict=True):
            ids = line["input_ids"]
            row = Conversation(data[i]["messages"], data[i].get("tools"))
            assert ids == SampleEncoder(kind.tokenizer).encode([row])[0].input_ids.tolist()
            if trainer == "trl":
                answers = [t for t, m in zip(ids, line["assistant_masks"], strict=True) if m]
                assert line["source_index"] == i
            else:
                assert line["attention_mask"] == [1] * len(ids)
                answers = [t for t in line["labels"] if t != -100]
            assert kind.tokenizer.decode(answers) == wanted[i]
        readme = (tmp_path / trainer / "README.md").read_text()
        assert "written as token ids" in readme and f"rows: {len(lines)} of {len(data)}" in readme
    script = (tmp_path / "unsloth" / "train_unsloth.py").read_text()
    compile(script, "train_unsloth.py", "exec")
    assert "train_on_responses_only" not in script and "turn_marks" not in script
    (about,) = read_yaml(tmp_path / "axolotl" / "axolotl.yaml")["datasets"]
    assert about == {"path": "train.jsonl", "ds_type": "json", "split": "train", "type": None}
    assert parse_trl(tmp_path / "trl" / "sft.yaml")[1].assistant_only_loss is False


def test_trl_learns_the_answers_of_a_template_without_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real SFTTrainer, from the configuration as it is: labels are the answers and their ends."""
    from trl import SFTTrainer, get_dataset

    kind = CHATS["llama3"]
    model = based_on(tmp_path / "base", kind)
    with pytest.warns(NeuronSelectWarning, match="^1 of 4 rows"):
        config = export_selection(selected(conversed(kind)), "trl", tmp_path / "out", base_model=model)[-1]
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for packing in (False, True):
        _, sft, options, data = parse_trl(config)
        sft.packing, sft.packing_strategy = packing, "bfd"
        trainer = SFTTrainer(model=options.model_name_or_path, args=sft, train_dataset=get_dataset(data)["train"])
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
        learned = [kind.tokenizer.decode([t for t in row.tolist() if t != -100]) for row in batch["labels"]]
        assert sorted("".join(learned)) == sorted("First.Second one.aa" + kind.call + kind.end * 5)


def test_a_template_given_for_scoring_is_trained_with(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = "{% for m in messages %}{{ m.role + '> ' + m.content + '</s>' }}{% endfor %}"
    selection = selected([{"messages": chat("q", "a")}])
    scored_by(selection, "org/scorer", "c" * 40, chat_template=shown)
    monkeypatch.setattr("hf_neuronselect.export.model._here", lambda *given: (tiny_tokenizer(), Limits()))
    files = export_selection(selection, "trl", tmp_path)
    assert [file.name for file in files] == ["train.jsonl", "chat_template.jinja", "README.md", "sft.yaml"]
    (line,) = read_lines(files[0])
    assert tiny_tokenizer().decode(line["input_ids"]) == "user> q</s>assistant> a</s>"


def test_the_base_model_is_read_as_any_model(tmp_path: Path) -> None:
    """Named templates, the model's last position, and refusals are those of scoring and training."""
    folder = tmp_path / "base"
    lm = tiny_model("llama")
    lm.config.max_position_embeddings = 24
    lm.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "none"}
    tokenizer.save_pretrained(folder)
    selection = selected([{"messages": chat("q", "a")}, {"messages": chat("why", "because " * 20)}])
    with pytest.warns(NeuronSelectWarning, match="rows longer than the model's 24 positions are cut there"):
        files = export_selection(selection, "trl", tmp_path / "out", base_model=str(folder))
    assert [len(row["input_ids"]) <= 24 for row in read_lines(files[0])] == [True, True]
    assert yaml.safe_load(files[-1].read_text())["max_length"] == 24
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(NeuronSelectError, match="base_model='base': its tokenizer cannot be read"):
        export_selection(selection, "trl", tmp_path / "out", base_model=str(folder))


def test_what_is_not_known_to_work_is_said(talks: Selection, tmp_path: Path) -> None:
    for trainer, said in (("trl", "else TRL stops"), ("unsloth", "whatever follows them")):
        with pytest.warns(NeuronSelectWarning, match=f"the tokenizer of org/base is not on this machine.*{said}"):
            export_selection(talks, trainer, tmp_path / trainer, base_model=MODEL)
        assert said in (tmp_path / trainer / "README.md").read_text()
    for trainer, said in (("axolotl", "roles_to_train"), ("llamafactory", "templates of its own")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            export_selection(talks, trainer, tmp_path / trainer, base_model=MODEL)
        assert said in (tmp_path / trainer / "README.md").read_text()
    found = export_selection(talks, "trl", tmp_path / "marked", base_model=str(bundled.MODEL))[-1]
    assert parse_trl(found)[1].assistant_only_loss is True


# -------------------------------------------------------------------------- the others' documented keys
def check(found: Mapping[str, Any], schema: Mapping[str, Any], path: str = "") -> None:
    """Every key is a documented one, of a documented type or value."""
    for key, value in found.items():
        assert key in schema, f"{path}{key} is not documented"
        wanted = schema[key]
        if isinstance(wanted, Mapping):
            assert isinstance(value, Mapping)
            check(value, wanted, f"{path}{key}.")
        elif isinstance(wanted, set):
            assert value in wanted, f"{path}{key}: {value!r}"
        elif isinstance(wanted, list):
            assert isinstance(value, list) and value
            for item in value:
                check(item, wanted[0], f"{path}{key}[].") if isinstance(wanted[0], Mapping) else None
                assert isinstance(wanted[0], Mapping) or isinstance(item, wanted[0]), f"{path}{key}: {value!r}"
        else:
            assert type(value) in (wanted if isinstance(wanted, tuple) else (wanted,)), f"{path}{key}: {value!r}"


# Read from axolotl-ai-cloud/axolotl: src/axolotl/utils/schemas/datasets.py (SFTDataset) and config.py at
# 07e83ab884f5849585a8b6d1856bca62f21bb041, peft.py at 00564c8f9909b0a895823b620145c0618991cb55, training.py at
# 002a637c86864c8acf451757ee45040b5ea5e25f, model.py at 04980d49e98d30d0af16ca3cb95b59683b74d42e, deprecated.py
# (RemappedParameters) at 1377ccc3e46bdc1c8b01a9c23da57446b85aa1d5.
TEMPLATE = {"jinja", "tokenizer_default", "tokenizer_default_fallback_chatml"}
AXOLOTL = {
    "base_model": str,
    "revision_of_model": str,
    "chat_template": TEMPLATE,
    "chat_template_jinja": str,
    "datasets": [
        {
            "path": str,
            "ds_type": {"json", "parquet"},
            "split": str,
            "type": {"chat_template", None},
            "chat_template": TEMPLATE,
            "chat_template_jinja": str,
            "field_messages": str,
            "field_tools": str,
            "message_property_mappings": {"role": str, "content": str},
            "roles_to_train": [str],
            "train_on_eos": {"all", "turn", "last"},
        }
    ],
    "dataset_prepared_path": str,
    "val_set_size": float,
    "sequence_len": int,
    "excess_length_strategy": {"drop", "truncate", "raise"},
    "sample_packing": bool,
    "adapter": {"lora", "qlora"},
    "lora_r": int,
    "lora_alpha": int,
    "lora_dropout": float,
    "lora_target_linear": bool,
    "micro_batch_size": int,
    "gradient_accumulation_steps": int,
    "learning_rate": float,
    "lr_scheduler": {"cosine", "linear", "constant"},
    "num_epochs": (int, float),
    "optimizer": {"adamw_torch_fused"},
    "bf16": {"auto", True, False},
    "gradient_checkpointing": bool,
    "output_dir": str,
    "logging_steps": int,
    "saves_per_epoch": int,
}


def test_axolotl(talks: Selection, tmp_path: Path) -> None:
    data, _, config = export_selection(talks, "axolotl", tmp_path, base_model=MODEL)
    found = read_yaml(config)
    check(found, AXOLOTL)
    (about,) = found["datasets"]
    assert (tmp_path / about["path"]) == data and found["base_model"] == MODEL
    # Its strategy reads JSON text in arguments and parameters, and takes the lists of turns and tools as they are.
    for line, original in zip(read_lines(data), originals(talks), strict=True):
        turns, tools = line[about["field_messages"]], line[about["field_tools"]]
        for turn in turns:
            for made in turn.get("tool_calls", []):
                assert isinstance(made["function"]["arguments"], str)
                made["function"]["arguments"] = json.loads(made["function"]["arguments"])
        expected = json.loads(json.dumps(original["messages"]))
        for turn in expected:
            for made in turn.get("tool_calls", []):
                if isinstance(made["function"]["arguments"], str):
                    made["function"]["arguments"] = json.loads(made["function"]["arguments"])
        assert turns == expected
        for tool in tools or []:
            tool["function"]["parameters"] = json.loads(tool["function"]["parameters"])
        assert tools == original.get("tools")
    # Older `datasets` know no mixed types: the file must be readable with one type a key, too.
    table = pq.read_table(_arrow(read_lines(data), tmp_path))
    assert table.num_rows == len(TALKS)
    assert "tools" not in read_lines(export_selection(selected(TALKS[:1]), "axolotl", tmp_path, base_model=MODEL)[0])[0]


def _arrow(lines: list[dict[str, Any]], folder: Path) -> Path:
    Dataset.from_list(lines).to_parquet(folder / "typed.parquet")
    return folder / "typed.parquet"


# Read from hiyouga/LLaMA-Factory: src/llamafactory/hparams/{model_args,finetuning_args}.py at
# 00577a85775a2a78b14641ff8f68c58c6f46b027, data_args.py at 072bfe29d3b10447b0702196028af2f0fb87ad6b; the rest are
# transformers' TrainingArguments, which examples/train_lora/qwen3_lora_sft.yaml at
# 77e7f47dcf2764cb9d9265fb9716be00871c3cee uses. Its parser stops at other keys.
LLAMAFACTORY = {
    "model_name_or_path": str,
    "model_revision": str,
    "dataset": str,
    "dataset_dir": str,
    "cutoff_len": int,
    "train_on_prompt": bool,
    "stage": {"sft"},
    "do_train": bool,
    "finetuning_type": {"lora", "oft", "freeze", "full"},
    "lora_rank": int,
    "lora_alpha": int,
    "lora_dropout": float,
    "lora_target": str,
    "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int,
    "learning_rate": float,
    "lr_scheduler_type": {"cosine"},
    "num_train_epochs": float,
    "bf16": bool,
    "output_dir": str,
    "logging_steps": int,
    "save_strategy": {"no", "steps", "epoch"},
    "report_to": {"none"},
}
# data/README.md at 2ad9871bb402d0d4682466970bd404c650f05b9c; left-out tags are from/value, human, gpt, observation,
# function_call, system (src/llamafactory/data/parser.py at 85b0f312ff145428784384b282603b048ee7f61b).
DATASET_INFO = {"file_name": str, "formatting": {"alpaca", "sharegpt"},
                "columns": {"messages": str, "system": str, "tools": str}}  # fmt: skip


def test_llamafactory(talks: Selection, tmp_path: Path) -> None:
    data, info, _, config = export_selection(talks, "llamafactory", tmp_path, base_model=MODEL)
    found = read_yaml(config)
    check(found, LLAMAFACTORY)
    about = json.loads(info.read_text())[found["dataset"]]
    check(about, DATASET_INFO)
    assert (config.parent / found["dataset_dir"] / about["file_name"]).resolve() == data.resolve()
    loaded = load_dataset("json", data_files=str(data), split="train", cache_dir=str(tmp_path / "cache"))
    for line, original in zip(loaded, originals(talks), strict=True):
        turns = line[about["columns"]["messages"]]
        # src/llamafactory/data/converter.py at 02e2fb34bf8a79330b080607872fe4565876d0e6: what is not so is left out.
        assert len(turns) % 2 == 0
        for i, turn in enumerate(turns):
            assert set(turn) == {"from", "value"}
            assert turn["from"] in (("gpt", "function_call") if i % 2 else ("human", "observation"))
        tools = line[about["columns"]["tools"]]
        assert (json.loads(tools) if tools else None) == original.get("tools")
        system = [m["content"] for m in original["messages"] if m["role"] == "system"]
        assert line[about["columns"]["system"]] == "".join(system)
    by_row = {line["source_index"]: line["conversations"] for line in loaded}
    weather, add = by_row[1], by_row[2]
    assert [turn["from"] for turn in weather] == ["human", "function_call", "observation", "gpt"]
    assert json.loads(weather[1]["value"]) == [{"name": "weather", "arguments": {"town": "</tool_call>Ulm"}}]
    assert "<" not in weather[1]["value"]  # src/llamafactory/data/formatter.py looks for marks in it
    assert [turn["from"] for turn in add] == ["human", "function_call", "observation", "gpt"]
    before, calls = re.fullmatch(r"(.*)<tool_call>(.*)</tool_call>", add[1]["value"], re.DOTALL).groups()
    assert before == "<think>\nTwo sums.\n</think>\n\nLet me see."
    assert json.loads(calls) == [
        {"name": "add", "arguments": {"town": 7, "y": [1, 2.5]}}, {"name": "add", "arguments": {"x": {"z": "3"}}},
    ]  # fmt: skip
    assert add[2]["value"].split("\n</tool_response>\n<tool_response>\n") == ["3.5", "3"]


# ------------------------------------------------------------------------------------------- unsloth
# Read from unslothai/unsloth: unsloth/models/loader.py (from_pretrained) at 0050c73e05ca9bb74e42d0649be410f177160c08,
# unsloth/models/llama.py (get_peft_model) at 00060afeb383f16c980bcc241e462b7684480d09, unsloth/chat_templates.py
# (get_chat_template) at 02658740e7a4cb0634470a1fc57573d6202acfbe; from unslothai/unsloth-zoo:
# unsloth_zoo/dataset_utils.py (train_on_responses_only) at 005a25062ee881083d05ac43f199280cdbda5aeb.
UNSLOTH = {
    "FastLanguageModel.from_pretrained": {"model_name", "max_seq_length", "dtype", "load_in_4bit", "load_in_8bit",
                                          "token", "revision"},
    "FastLanguageModel.get_peft_model": {"model", "r", "target_modules", "lora_alpha", "lora_dropout", "bias",
                                         "use_gradient_checkpointing", "random_state", "use_rslora"},
    "get_chat_template": {"tokenizer", "chat_template", "mapping", "map_eos_token", "system_message"},
    "train_on_responses_only": {"trainer", "instruction_part", "response_part", "tokenizer"},
}  # fmt: skip


def test_the_unsloth_script_calls_what_is_documented(talks: Selection, tmp_path: Path) -> None:
    import trl

    data, _, script = export_selection(talks, "unsloth", tmp_path, base_model='quo"te/back\\slash')
    tree = ast.parse(script.read_text())
    known = UNSLOTH | {
        "SFTTrainer": set(inspect.signature(trl.SFTTrainer.__init__).parameters),
        "SFTConfig": set(inspect.signature(trl.SFTConfig).parameters),
    }
    seen = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in known:
            seen.add(name)
            assert {keyword.arg for keyword in node.keywords} <= known[name], name
    assert seen == set(known)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [getattr(node, "module", None) or node.names[0].name for node in imports]
    assert modules.index("unsloth") < modules.index("trl")
    constants = {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)}
    assert constants["MODEL"] == 'quo"te/back\\slash' and constants["REVISION"] is None
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id.isupper()}
    assert used == set(constants)
    assert [line["conversations"] for line in read_lines(data)] == [o["messages"] for o in originals(talks)]
    assert [line.get("tools") for line in read_lines(data)] == [o.get("tools") for o in originals(talks)]


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# An empty thought before the last answer, as Qwen3's template puts it.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
DEFAULT_SYSTEM = "{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}" + THINKING


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        ("chatml", ("<|im_start|>user\n", "<|im_start|>assistant\n")),
        ("bundled", ("<|user|>\n", "<|assistant|>\n")),
        (MISTRAL, ("[INST] ", "[/INST] ")),
        (THINKING, ("<|im_start|>user\n", "<|im_start|>assistant\n")),
        (DEFAULT_SYSTEM, ("<|im_start|>user\n", "<|im_start|>assistant\n")),
    ],
)
def test_the_unsloth_script_finds_the_turns(
    template: str, marks: tuple[str, str], talks: Selection, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer() if template == "chatml" else tiny_tokenizer(template)
    if template == "bundled":
        tokenizer = AutoTokenizer.from_pretrained(bundled.MODEL)
    tree = ast.parse(export_selection(talks, "unsloth", tmp_path, base_model=MODEL)[-1].read_text())
    tree.body = [n for n in tree.body if getattr(n, "name", "") == "turn_marks" or ast.unparse(n) == "import os"]
    space: dict[str, Any] = {}
    exec(compile(tree, "train_unsloth.py", "exec"), space)
    assert space["turn_marks"](tokenizer) == marks


@pytest.mark.parametrize("known", [True, False])
def test_the_unsloth_script_runs_up_to_unsloth_itself(
    known: bool, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsloth needs a GPU: its functions are stood in for; TRL, datasets and the tokenizer are the real ones."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    masked: dict[str, Any] = {}
    folder = str(tiny_folder / "model")

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(model_name, revision, max_seq_length, load_in_4bit):
            assert model_name == (folder if known else MODEL)
            return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

        @staticmethod
        def get_peft_model(model, r, lora_alpha, lora_dropout, bias, target_modules, use_gradient_checkpointing,
                           random_state):  # fmt: skip
            return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules))

    def train_on_responses_only(trainer, instruction_part, response_part):
        masked.update(trainer=trainer, parts=(instruction_part, response_part))
        trainer.train = lambda: None  # its optimizer is of bitsandbytes
        return trainer

    parts = types.ModuleType("unsloth"), types.ModuleType("unsloth.chat_templates")
    parts[0].FastLanguageModel, parts[0].is_bfloat16_supported = FastLanguageModel, lambda: False
    parts[1].get_chat_template, parts[1].train_on_responses_only = None, train_on_responses_only
    for module in parts:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    talks = selected(TALKS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = export_selection(talks, "unsloth", tmp_path, base_model=folder if known else MODEL)[-1]
    monkeypatch.chdir(tmp_path)
    if known:
        monkeypatch.setattr("trl.SFTTrainer.train", lambda self: masked.update(trainer=self))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(script), run_name="__main__")
    tokenizer = tiny_tokenizer()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    if known:
        labels = [[t for t in row if t != -100] for row in masked["trainer"].train_dataset["labels"]]
        said = {i: tokenizer.decode(row) for i, row in zip(talks.indices.tolist(), labels, strict=True)}
        assert (said[0], said[3]) == ("yes", "12") and said[1].endswith("</call>Rain.")
        return
    assert masked["parts"] == ("<|im_start|>user\n", "<|im_start|>assistant\n")
    texts = [
        tokenizer.apply_chat_template(o["messages"], tools=o.get("tools"), tokenize=False) for o in originals(talks)
    ]
    # TRL appends its end of text; Unsloth's own preparation does not.
    assert [text.removesuffix("</s>") for text in masked["trainer"].train_dataset["text"]] == texts
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_selection_made_with_a_model(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    selection = NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(pool, k=5)
    config = export_selection(selection, "trl", tmp_path, base_model=MODEL)[-1]
    assert "method: mona (" in config.read_text() and "for t" in config.read_text()
    assert parse_trl(config)[1].max_length == extractor.extraction.options.max_length
    assert read_lines(tmp_path / "train.jsonl")[0]["messages"] == rows(60)[int(selection.indices[0])]["messages"]
