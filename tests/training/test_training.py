"""LoRA training and its evaluation: loss on answers alone, runs that are killed and go on, adapters that fit their base."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from chats import CHATS
from datasets import Dataset, concatenate_datasets
from families import CHATML, tiny_model, tiny_tokenizer
from hub import Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from tiny import chat, rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_neuronselect.core.errors import NeuronSelectError, NeuronSelectWarning
from hf_neuronselect.core.folders import read_adapter
from hf_neuronselect.core.provenance import MethodRecord, SelectionSummary, SourceRecord, TargetRecord, TrainingRecord
from hf_neuronselect.hub.push import push_folder
from hf_neuronselect.models.loss import answer_losses
from hf_neuronselect.models.pin import pin_model
from hf_neuronselect.rows.encode import SampleEncoder
from hf_neuronselect.rows.formats import Conversation
from hf_neuronselect.rows.load import conversations_of
from hf_neuronselect.training import sft
from hf_neuronselect.training.config import TrainConfig
from hf_neuronselect.training.data import check_trainable, encoder_of, tokenizer_for, training_rows
from hf_neuronselect.training.evaluation import evaluate_models, without_trained
from hf_neuronselect.training.figures import results_figure
from hf_neuronselect.training.models import adapter_source, base_source, load_tokenizer
from hf_neuronselect.training.sft import train_adapter

PEFT_WARNS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # in peft's own code
# A template that marks nothing, and that TRL does not know.
UNMARKED = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> Path:
    return tiny_folder / "model"


def with_tokenizer(folder: Path, tokenizer: Any) -> Path:
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def section(model: str | Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(model), "max_steps": 1, "per_device_train_batch_size": 4, "max_length": 256} | changes


def train(model: str | Path, out: Path, data: Dataset | None = None, **changes: Any) -> TrainingRecord:
    config = TrainConfig.from_section(section(model, **changes))
    return train_adapter(rows(12) if data is None else data, out, config, name="mona")


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


# ------------------------------------------------------------------------------------------- the section train
@pytest.mark.parametrize(
    ("given", "option", "message"),
    [
        ({"max_step": 5}, "config", "unknown key of section train; did you mean max_steps"),
        ({"lora-rank": 5}, "config", "unknown key of section train; did you mean"),
        ({"warmup_ratio": 0.1}, "warmup_ratio", "warmup_steps"),
        ({"group_by_length": True}, "group_by_length", "train_sampling_strategy"),
        ({1: 2}, "config", "unknown key of section train"),
        ({"output_dir": "x"}, "output_dir", "the folder is --out"),
        ({"push_to_hub": True}, "push_to_hub", "name the repository in the section push"),
        ({"hub_token": "hf_secret"}, "hub_token", "HF_TOKEN"),
        ({"resume_from_checkpoint": True}, "resume_from_checkpoint", "resumes by itself"),
        ({"completion_only_loss": True}, "completion_only_loss", "the loss is on the answers of every turn"),
        ({"dataset_text_field": "text"}, "dataset_text_field", "rows become messages"),
        ({"dataset-kwargs": {}}, "dataset_kwargs", "rows become messages"),
        ({"model_init_kwargs": {}}, "model_init_kwargs", "dtype, attn_implementation"),
        ({"trust_remote_code": True}, "trust_remote_code", "is never run"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing", "activation_checkpointing"),
        ({"use_peft": False}, "use_peft", "only LoRA is trained"),
        ({"assistant_only_loss": False}, "assistant_only_loss", "questions would be trained on; remove it"),
        ({"assistant_only_loss": "no"}, "assistant_only_loss", "questions would be trained on"),
        ({"controls": ["randm"]}, "controls", "unknown control; did you mean random"),
        ({"controls": "mona"}, "controls", "unknown control; known: alpagasus, deita, full, gradient-norm, ifd, instruction-mining, longest, random"),
        ({"max_steps": "many"}, "max_steps", "TRL refuses it: invalid literal for int"),
        ({"packing": "perhaps"}, "packing", "TRL refuses it: Truthy value expected"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type", "must be one of linear, cosine"),
        ({"dtype": "float99"}, "dtype", "must be one of auto, bfloat16, float16, float32"),
        ({"logging_steps": 0}, "train", "TRL refuses it: logging strategy"),
        ({"fp16": True, "bf16": True}, "train", "TRL refuses it: At most one of fp16 and bf16"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "train", "TRL refuses it: You can't use 8 bit and 4 bit"),
        ({"chat_template_path": "org/model"}, "chat_template_path", "a file is needed, .jinja or .j2"),
    ],
)  # fmt: skip
def test_a_bad_section_is_one_line(given: dict[Any, Any], option: str, message: str) -> None:
    with pytest.raises(NeuronSelectError) as caught:
        TrainConfig.from_section({"max_length": 64} | given)
    line = caught.value.as_command_line()
    assert caught.value.option == option and message in line
    assert line.isprintable() and len(line) < 8000 and "hf_secret" not in line + repr(caught.value.value)


def test_defaults_make_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = TrainConfig.from_section({})
        arguments = config.arguments(tmp_path)
    assert (config.model, config.data, config.controls) == (None, None, ())
    assert not arguments.assistant_only_loss  # the rows say what is learnt
    assert arguments.max_length == 2048 and arguments.report_to == []
    assert (arguments.learning_rate, arguments.lr_scheduler_type, arguments.warmup_steps) == (2e-4, "cosine", 0.03)
    assert (arguments.save_strategy, arguments.save_total_limit) == ("steps", 1) and not arguments.push_to_hub
    assert arguments.output_dir == str(tmp_path)
    assert config.lora().target_modules == "all-linear" and config.lora().task_type == "CAUSAL_LM"
    on_cpu = TrainConfig.from_section({"use_cpu": True}).arguments(tmp_path)
    by_length = getattr(on_cpu, "group_by_length", None) or on_cpu.train_sampling_strategy == "group_by_length"
    assert by_length and not on_cpu.packing and not on_cpu.gradient_checkpointing


def test_keys_go_to_trl_and_peft(tmp_path: Path) -> None:
    config = TrainConfig.from_section(
        {
            "model": "me/base", "revision": "v1", "data": "rows.jsonl", "controls": "random", "name": "mine",
            "learning-rate": "2e-5",  # YAML takes it for text
            "max_steps": "7", "packing": True, "packing_strategy": "wrapped", "neftune_noise_alpha": 5.0, "seed": 3,
            "use_cpu": True, "lora_r": 4, "lora_alpha": 9, "lora_dropout": 0.5, "use_rslora": True,
            "lora_target_modules": ["q_proj", "v_proj"], "lora_modules_to_save": ["lm_head"],
        }
    )  # fmt: skip
    assert (config.model, config.revision, config.data, config.name) == ("me/base", "v1", "rows.jsonl", "mine")
    assert config.controls == ("random",)
    made = config.arguments(tmp_path)
    assert (made.learning_rate, made.max_steps, made.packing, made.packing_strategy) == (2e-5, 7, True, "wrapped")
    assert (made.neftune_noise_alpha, made.seed) == (5.0, 3)
    lora = config.lora()
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora) == (4, 9, 0.5, True)
    assert lora.target_modules == {"q_proj", "v_proj"} and lora.modules_to_save == ["lm_head"]
    assert config.about() == {**config.sft, **config.model_options} and config.about()["learning_rate"] == 2e-5


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["q_proj"], {"q_proj"}),
        ("q_proj", {"q_proj"}),
        (["self_attn.q_proj"], {"self_attn.q_proj"}),
        ("all-linear", "all-linear"),
        (["all-linear"], "all-linear"),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_names_of_modules_are_no_patterns(given: Any, expected: Any) -> None:
    assert TrainConfig.from_section({"lora_target_modules": given}).lora().target_modules == expected


# ----------------------------------------------------------------------------------- what the loss is taken on
@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[list[int], list[int]]]]:
    """Trains, and gives the rows as SFTTrainer fed them: ids and labels."""
    seen: list[Dataset] = []
    count = sft.learnt

    def look(data: Dataset) -> tuple[Dataset, int, int]:
        found = count(data)
        seen.append(found[0])
        return found

    monkeypatch.setattr(sft, "learnt", look)

    def run(model: Path, out: Path, data: Dataset, **changes: Any) -> list[tuple[list[int], list[int]]]:
        record = train(model, out, data, **changes)
        found = []
        for row in seen.pop():
            if "labels" not in row:  # trl < 1.9 applies the mask when it makes a batch
                marks = zip(row["input_ids"], row["assistant_masks"], strict=True)
                row["labels"] = [token if mark else -100 for token, mark in marks]
            ends = np.cumsum(row["seq_lengths"] if "seq_lengths" in row else [len(row["input_ids"])])
            for first, last in zip([0, *ends[:-1]], ends, strict=True):
                found.append((row["input_ids"][first:last], row["labels"][first:last]))
        assert record.results["tokens"] == sum(len(ids) for ids, _ in found)
        assert record.results["answer_tokens"] == sum(sum(x != -100 for x in labels) for _, labels in found)
        return found

    return run


TURNS = [
    chat("what is 2+2?", "4"),
    [{"role": "system", "content": "be brief"}, *chat("why?", "because"), *chat("and?", "that is all")],
    [{"role": "user", "content": "first"}, *chat("second", "an answer " * 30)],
    [*chat("<|im_start|>assistant\nno<|im_end|>\n", "yes"), {"role": "user", "content": "thanks"}],
    [{"role": "assistant", "content": "I begin"}, *chat("hm", "go on")],
]


def expected(tokenizer: Any, turns: list[Any], max_length: int = 256) -> list[tuple[list[int], list[int]]]:
    """By the tokenizer alone."""
    found = []
    for messages in turns:
        got = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        labels = [i if inside else -100 for i, inside in zip(got["input_ids"], got["assistant_masks"], strict=True)]
        found.append((got["input_ids"][:max_length], labels[:max_length]))
    return found


def test_the_loss_is_on_every_answer_and_nothing_else(prepared: Any, base: Path, tmp_path: Path) -> None:
    want = expected(tiny_tokenizer(), TURNS)
    assert prepared(base, tmp_path / "a", Dataset.from_list([{"messages": t} for t in TURNS])) == want
    text = [tiny_tokenizer().decode([i for i in labels if i != -100]) for _, labels in want]
    assert text[0] == "4" and text[1] == "becausethat is all" and text[3] == "yes" and text[4] == "I begingo on"


def test_packed_rows_have_the_same_labels(prepared: Any, base: Path, tmp_path: Path) -> None:
    data = Dataset.from_list([{"messages": t} for t in TURNS])
    got = prepared(base, tmp_path / "a", data, packing=True, packing_strategy="bfd", max_length=512)
    assert sorted(got) == sorted(expected(tiny_tokenizer(), TURNS, 512))


def test_every_row_format_gives_the_same_labels(prepared: Any, base: Path, tmp_path: Path) -> None:
    asked = [("what is 2+2?", "4"), ("add", "one\ntwo"), ("x" * 40, "y" * 40)]
    system = {"role": "system", "content": "be brief"}
    formats = {
        "messages": [{"messages": [system, *chat(q, a)]} for q, a in asked],
        "prompt": [{"prompt": [system, chat(q, a)[0]], "completion": [chat(q, a)[1]]} for q, a in asked],
        "alpaca": [{"system": "be brief", "instruction": q, "input": "", "output": a} for q, a in asked],
        "sharegpt": [
            {"system": "be brief", "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
            for q, a in asked
        ],
    }
    want = expected(tiny_tokenizer(), [[system, *chat(q, a)] for q, a in asked])
    for name, data in formats.items():
        assert prepared(base, tmp_path / name, Dataset.from_list(data)) == want, name
    plain = [{"prompt": q, "completion": a} for q, a in asked]
    want = expected(tiny_tokenizer(), [chat(q, a) for q, a in asked])
    assert prepared(base, tmp_path / "strings", Dataset.from_list(plain)) == want


def test_tools_and_a_given_template(prepared: Any, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "unmarked", tiny_tokenizer(UNMARKED))
    (tmp_path / "chatml.jinja").write_text(CHATML)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    data = Dataset.from_list([{"messages": chat("add 1 and 2", "3"), "tools": json.dumps(tools)}])
    got = prepared(folder, tmp_path / "a", data, chat_template_path=str(tmp_path / "chatml.jinja"))
    tokens = tiny_tokenizer().apply_chat_template(
        chat("add 1 and 2", "3"), tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    assert [ids for ids, _ in got] == [tokens["input_ids"]]
    assert [i for i in got[0][1] if i != -100] == tiny_tokenizer()("3", add_special_tokens=False)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template == CHATML


@pytest.mark.parametrize("name", CHATS)
def test_a_template_without_marks_is_trained_on_its_answers(name: str, prepared: Any, tmp_path: Path) -> None:
    kind = CHATS[name]
    folder = with_tokenizer(tmp_path / "base", kind.tokenizer)
    turns = [*chat("First?", "One."), *chat("Then?", "Two of them.")]
    (ids, labels), *_ = prepared(folder, tmp_path / "a", Dataset.from_list([{"messages": turns}] * 2))
    assert kind.tokenizer.decode(ids) == kind.tokenizer.apply_chat_template(turns, tokenize=False)
    assert kind.tokenizer.decode([i for i in labels if i != -100]) == f"One.{kind.end}Two of them.{kind.end}"


def test_rows_without_answers_are_left_out_and_said(base: Path, tmp_path: Path, prepared: Any) -> None:
    asked = [{"messages": chat("why?", "so")[:1]}, {"messages": chat("why?", "")}, {"messages": None}, {"messages": []}]
    data = Dataset.from_list([*asked, {"messages": chat("why?", "so")}])
    reasons = re.escape("no assistant turn with an answer (2), empty (2)")
    with pytest.warns(NeuronSelectWarning, match=f"^4 of 5 rows cannot be trained on and are left out: {reasons};"):
        assert len(prepared(base, tmp_path / "a", data)) == 1
    with pytest.raises(NeuronSelectError, match="none of the 4 rows can be trained on: .*no assistant turn"):
        train(base, tmp_path / "b", Dataset.from_list(asked[::-1]))
    assert not (tmp_path / "b").exists()
    long = Dataset.from_list([{"messages": chat("q" * 90, "a")}] * 2 + [{"messages": chat("q", "a")}])
    for packing in (False, True):
        with pytest.warns(NeuronSelectWarning, match=r"^2 of 3 rows .* no assistant token within max_length=60 \(2\);"):
            assert len(prepared(base, tmp_path / f"c{packing}", long, max_length=60, packing=packing)) == 1
        assert json.loads((tmp_path / f"c{packing}" / "training.json").read_text())["results"]["rows"] == 1
    with pytest.raises(NeuronSelectError, match=r"none of the 3 rows can be trained on.*max_length=9 \(3\)"):
        train(base, tmp_path / "d", long, max_length=9)


def test_packed_rows_without_an_answer_are_left_out_and_said(base: Path, tmp_path: Path) -> None:
    """Wrapped packing cuts rows anywhere: pieces of a long question alone have no loss."""
    data = Dataset.from_list([{"messages": chat("q" * 200, "an answer")}, {"messages": chat("short", "yes")}])
    with pytest.warns(NeuronSelectWarning, match=r"packed rows hold no token of an answer and are left out"):
        record = train(base, tmp_path / "a", data, packing=True, packing_strategy="wrapped", max_length=64)
    assert record.results["rows"] == 2 and record.results["tokens"] == 69  # of the two pieces with answers
    for name, no in (("labels", -100), ("assistant_masks", 0)):  # as new and old TRL have them
        rows = Dataset.from_dict({name: [[no, no, no], [no, 1, 1, no], [1, no], [1, 1]]})
        with pytest.warns(NeuronSelectWarning, match="^2 of 4 packed rows"):
            kept, tokens, answers = sft.learnt(rows)
        assert (kept[name], tokens, answers) == ([[no, 1, 1, no], [1, 1]], 6, 3)
        with pytest.raises(NeuronSelectError, match="no token would be trained on"):
            sft.learnt(rows.select([0, 2]))


# ----------------------------------------------------------------------------------------------- other guards
def test_a_template_that_refuses_rows_says_so(prepared: Any, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "base", CHATS["gemma"].tokenizer)
    data = [{"messages": TURNS[1]}, {"messages": chat("q", "a")}]
    with pytest.warns(NeuronSelectWarning, match=r"^1 of 2 rows .* the chat template refused the row: no system role"):
        assert len(prepared(folder, tmp_path / "a", Dataset.from_list(data))) == 1
    with pytest.raises(NeuronSelectError, match="none of the 1 rows can be trained on: .*no system role"):
        train(folder, tmp_path / "b", Dataset.from_list(data[:1]))


def test_what_would_be_left_out_is_known_before_a_selection(tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "base", CHATS["gemma"].tokenizer)
    config, source = TrainConfig.from_section(section(folder)), base_source(str(folder))
    rows = [Conversation(messages=TURNS[1]), Conversation(messages=chat("q", "a"))]
    assert check_trainable(rows[1:], source, config) == ""
    assert check_trainable(rows, source, config).startswith("the chat template refused the row: no system role")
    with pytest.raises(NeuronSelectError, match="model='base': cannot be trained on these rows: .*no system role"):
        check_trainable(rows[:1], source, config)


@pytest.mark.parametrize("asked", [200, 30, None])
def test_rows_are_cut_at_the_models_last_position(asked: int | None, tmp_path: Path) -> None:
    lm = tiny_model("llama")
    lm.config.max_position_embeddings = 40
    lm.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    data = Dataset.from_list([{"messages": chat("q", "a")}, {"messages": chat("q", "because " * 40)}])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        record = train(tmp_path / "base", tmp_path / "a", data, max_length=asked)
    said = [str(one.message) for one in heard if issubclass(one.category, NeuronSelectWarning)]
    at = ", not at max_length 200" if asked == 200 else ""
    wanted = f"rows longer than the model's 40 positions are cut there{at}, and counted as truncated; "
    wanted += "give max_length 40 to say so"
    assert said == ([] if asked == 30 else [wanted])
    assert record.results["truncated"] == 1
    assert record.results["tokens"] <= 2 * (asked if asked == 30 else 40)
    assert "cut at max_length" in (tmp_path / "a" / "README.md").read_text()


def test_tool_calls_are_learnt_from_every_format(base: Path, tmp_path: Path) -> None:
    """Lists of prompt and completion keep their calls; null arguments, as Arrow fills them in, are none."""
    config = TrainConfig.from_section(section(base))
    tokenizer = tokenizer_for(base_source(str(base)), config)
    encoder = encoder_of(tokenizer, config.arguments(tmp_path))
    function = {"arguments": {"town": "Ulm", "unit": None}, "name": "look"}  # pyarrow 17 sorts the keys
    said, asked = ([{"type": "text", "text": text}] for text in ("I look.", "Weather?"))
    answer = {
        "role": "assistant", "content": said, "tool_calls": [{"function": function, "type": "function"}]
    }  # fmt: skip
    question = {"role": "user", "content": asked}
    shown = '<call>{"function": {"arguments": {"town": "Ulm"}, "name": "look"}, "type": "function"}</call>'
    for columns in ({"prompt": [question], "completion": [answer]}, {"messages": [question, answer]}):
        for tools in (None, "", "null", "[]", []):
            data = Dataset.from_list([columns | {"tools": tools}])
            ((row,), _) = training_rows(conversations_of(data), encoder)
            ids = np.asarray(row["input_ids"])
            assert tokenizer.decode(ids[np.asarray(row["assistant_masks"]) == 1]) == "I look." + shown
            assert "user\nWeather?<|im_end|>" in tokenizer.decode(ids) and "tools" not in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("changes", "option", "message"),
    [
        ({"lora_target_modules": ["q_proj", "c_attn"]}, "lora_target_modules",
         "'c_attn': the model has no such module; its linear layers are down_proj, gate_proj, k_proj, lm_head, o_proj"),
        ({"lora_target_modules": r".*\.c_(attn|proj)"}, "train", "Target modules"),
        ({"lora_r": 0}, "train", "`r` should be a positive integer"),
        ({"eval_strategy": "steps"}, "train", "you didn't pass an `eval_dataset`"),
        ({"eos_token": "<none>"}, "eos_token", "is not in the tokenizer's vocabulary"),
        ({"attn_implementation": "nope"}, "model", "cannot be loaded: Specified `attn_implementation"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model(
    changes: dict[str, Any], option: str, message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(NeuronSelectError) as caught:
        train(base, tmp_path / "a", **changes)
    assert caught.value.option == option and message in str(caught.value), caught.value
    assert caught.value.as_command_line().isprintable()


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NeuronSelectError, match="model='./nowhere': no such folder"):
        train("./nowhere", tmp_path / "a")


def test_one_module_alone_is_trained(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "a", lora_target_modules=["q_proj"])
    assert {key.split(".")[-3] for key in load_file(tmp_path / "a" / WEIGHTS)} == {"q_proj"}


def test_a_base_without_end_of_text(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    folder = with_tokenizer(tmp_path / "base", tokenizer)
    with pytest.raises(NeuronSelectError, match="model='base': its tokenizer has no end-of-text token"):
        train(folder, tmp_path / "a")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Tokenizers of base models, without a chat template: with BOS, and without."""
    found = []
    for name in ("bos", "none"):
        tokenizer = tiny_tokenizer(None, adds_bos=name == "bos")
        if name == "none":
            tokenizer.bos_token = None
        folder = with_tokenizer(tmp_path_factory.mktemp("bare") / name, tokenizer)
        found.append(load_tokenizer(base_source(str(folder))))
    return found


CONTENT = st.text(st.characters(codec="ascii", exclude_characters="\r"), max_size=20)
MESSAGES = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), CONTENT), min_size=1, max_size=5
)


@given(turns=MESSAGES)
@settings(max_examples=60, deadline=None)
def test_the_plain_template_is_what_the_extractor_feeds(bare: list[Any], turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    for tokenizer in bare:
        template = tokenizer.chat_template
        assert "generation %}" in template
        try:
            tokenizer.chat_template = None
            plain = SampleEncoder(tokenizer).render(Conversation(messages=messages))
        finally:
            tokenizer.chat_template = template
        assert tokenizer.apply_chat_template(messages, tokenize=False) == plain
        assert plain.startswith("<s>") == (tokenizer.bos_token is not None)


def test_a_base_model_without_a_template_is_trained(prepared: Any, bare: list[Any], tmp_path: Path) -> None:
    for i, tokenizer in enumerate(bare):
        folder = Path(tokenizer.name_or_path)
        got = prepared(folder, tmp_path / str(i), Dataset.from_list([{"messages": t} for t in TURNS]))
        assert got == expected(tokenizer, TURNS)
        assert tokenizer.decode([x for x in got[1][1] if x != -100]) == "because</s>that is all</s>"
        saved = AutoTokenizer.from_pretrained(tmp_path / str(i))
        assert saved.chat_template == tokenizer.chat_template and saved.bos_token == tokenizer.bos_token
        assert saved("x")["input_ids"] == tokenizer("x")["input_ids"]


# -------------------------------------------------------------------------------------------- the adapter folder
LEARNT = Dataset.from_list(
    [{"messages": chat(f"say number {i} in full, please", "seven seven seven")} for i in range(16)]
)
HELD_OUT = Dataset.from_list([{"messages": chat(f"another question, number {i}", "seven seven")} for i in range(5)])


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that learnt to say seven."""
    out = tmp_path_factory.mktemp("tuned") / "adapter"
    (out.parent / "given.jinja").write_text(CHATML)
    config = TrainConfig.from_section(
        section(base, max_steps=12, learning_rate="2e-2", logging_steps=2, lora_r=4, use_cpu=True,
                chat_template_path=str(out.parent / "given.jinja"))
    )  # fmt: skip
    selection = SelectionSummary(
        pool=SourceRecord(id="pool.jsonl", commit="content:0"),
        method=MethodRecord(name="mona"),
        targets={"sevens": TargetRecord()},
    )
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("error", category)
        train_adapter(LEARNT, out, config, selection=selection, name="mona")
    return out


def test_the_folder_holds_an_adapter_and_no_pickle(tuned: Path, base: Path) -> None:
    names = {path.relative_to(tuned).as_posix() for path in tuned.rglob("*") if path.is_file()}
    assert names == {"README.md", CONFIG, WEIGHTS, "training.json", "tokenizer.json", "tokenizer_config.json",
                     "chat_template.jinja"}  # fmt: skip
    for name in names - {WEIGHTS}:
        text = (tuned / name).read_text()
        assert str(base.parent) not in text and str(tuned.parent) not in text and "/tmp" not in text, name
    config = json.loads((tuned / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["r"]) == ("model", None, 4)
    assert all(key.split(".")[-2] in ("lora_A", "lora_B") for key in load_file(tuned / WEIGHTS))


def test_the_record_says_what_was_done(tuned: Path, base: Path) -> None:
    record = json.loads((tuned / "training.json").read_text())
    assert record["base_model"] == {"id": "model", "commit": base_source(str(base)).commit}
    assert record["name"] == "mona" and record["selection"]["method"]["name"] == "mona"
    assert record["settings"] == {
        "max_steps": 12, "per_device_train_batch_size": 4, "max_length": 256, "learning_rate": 0.02, "logging_steps": 2,
        "lora_r": 4, "use_cpu": True, "chat_template_path": "given.jinja",
    }  # fmt: skip
    want = expected(tiny_tokenizer(), LEARNT["messages"])
    results = record["results"]
    assert (results["steps"], results["rows"]) == (12, 16)
    assert results["tokens"] == sum(len(ids) for ids, _ in want)
    assert results["answer_tokens"] == sum(sum(x != -100 for x in labels) for _, labels in want)
    assert [step for step, _ in record["losses"]] == [2, 4, 6, 8, 10, 12]
    assert record["losses"][-1][1] < record["losses"][0][1] - 1
    assert (
        record["hyperparameters"] | {"LoRA r": 4, "learning_rate": 0.02, "max_steps": 12} == record["hyperparameters"]
    )
    assert "num_train_epochs" not in record["hyperparameters"] and record["evaluation"] == []
    assert {"hf-neuronselect", "trl", "peft", "transformers", "torch", "datasets"} == set(record["packages"])


def test_the_callback_filled_the_card(tuned: Path) -> None:
    text = (tuned / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "peft" and {"neuronselect", "lora"} <= set(metadata["tags"])
    assert "license" not in metadata and "base_model" not in metadata and "datasets" not in metadata  # all local
    losses = json.loads((tuned / "training.json").read_text())["losses"]
    for fact in ("learning_rate | 0.02", "LoRA r | 4", "steps | 12", "selection method | mona", "max_steps | 12",
                 f"first and last training loss | {losses[0][1]:.3f} to {losses[-1][1]:.3f}"):  # fmt: skip
        assert f"| {fact} |" in body


@PEFT_WARNS
def test_peft_loads_it_and_the_loss_falls(tuned: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    held_out = conversations_of(HELD_OUT)
    before = answer_losses(model, tokenizer, held_out).mean
    after = answer_losses(PeftModel.from_pretrained(model, tuned), tokenizer, held_out).mean
    assert after < before - 1


def test_the_seed_decides_every_bit(base: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(base, tmp_path / name, max_steps=3, seed=seed)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_a_folder_of_something_else_is_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(NeuronSelectError, match="out='mine': exists and is not an adapter trained here; name another"):
        train(base, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    train(base, tmp_path / "empty")
    train(base, tmp_path / "empty", seed=1)  # an adapter is made again
    assert json.loads((tmp_path / "empty" / "training.json").read_text())["settings"]["seed"] == 1


class Killed(BaseException):
    """What a kill does: nothing after it runs."""


@pytest.mark.parametrize("what", ["weights", "tokenizer", "record"])
def test_an_adapter_stays_until_the_next_is_whole(
    what: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained again over an earlier adapter and killed on the way: the earlier one is there, and training goes on."""
    train(base, tmp_path / "a", max_steps=1)
    before = weights(tmp_path / "a")

    def dies(save: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*given: Any, **more: Any) -> Any:  # while the adapter's folder is written, not a checkpoint's
            if any(str(one).startswith(str(tmp_path / "a" / ".training.json.part")) for one in given):
                raise Killed
            return save(*given, **more)

        return killed

    tokenizer = type(load_tokenizer(base_source(str(base))))
    owner, name = {
        "weights": (PeftModel, "save_pretrained"),
        "tokenizer": (tokenizer, "save_pretrained"),
        "record": (sft, "put"),
    }[what]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies(getattr(owner, name)))
        with pytest.raises(Killed):
            train(base, tmp_path / "a", max_steps=1, seed=1)
    assert read_adapter(tmp_path / "a", "a").settings.get("seed") != 1 and weights(tmp_path / "a") == before
    train(base, tmp_path / "a", max_steps=1, seed=1)
    assert weights(tmp_path / "a") != before and not list((tmp_path / "a").glob(".*"))
    assert json.loads((tmp_path / "a" / "training.json").read_text())["settings"]["seed"] == 1


@PEFT_WARNS
def test_a_base_from_the_hub(hub: Hub, base: Path, tmp_path: Path) -> None:
    commit = hub.add("models", "me/tiny-base", {path.name: path.read_bytes() for path in base.iterdir()})
    record = train("me/tiny-base", tmp_path / "a", revision="main", max_steps=3)
    assert record.base_model == SourceRecord(id="me/tiny-base", commit=commit)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/tiny-base", commit)
    assert "base_model: me/tiny-base\n" in (tmp_path / "a" / "README.md").read_text()
    # Another version of the base is pushed: the adapter still finds its own.
    hub.repos["models", "me/tiny-base"].write("refs/heads/main", {}, "emptied", "me")
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    train(base, tmp_path / "b", max_steps=3)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") and hub.unknown == []


# ------------------------------------------------------------------------------------------------------ going on
KILLED = """
import json, os, signal, sys
from datasets import Dataset
from hf_neuronselect.training.callback import CardCallback
from hf_neuronselect.training.config import TrainConfig
from hf_neuronselect.training.sft import train_adapter

def on_step_end(self, args, state, control, **more):
    if state.global_step == 8:
        os.kill(os.getpid(), signal.SIGKILL)

CardCallback.on_step_end = on_step_end
section, rows, out = json.load(sys.stdin)
train_adapter(Dataset.from_list(rows), out, TrainConfig.from_section(section), name="mona")
"""
# Five steps an epoch: the kill and the last checkpoint are in the second one.
TWICE = {"max_steps": -1, "num_train_epochs": 2, "save_steps": 3, "save_total_limit": 3, "logging_steps": 1,
         "learning_rate": 0.01}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was killed in its eighth of ten steps."""
    out = tmp_path_factory.mktemp("stopped") / "adapter"
    given = json.dumps([section(base, **TWICE), list(rows(20)), str(out)])
    done = subprocess.run([sys.executable, "-c", KILLED], input=given, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == -9, done.stderr[-3000:]
    assert {path.name for path in (out / "checkpoints").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert not (out / "training.json").exists()
    return out


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "adapter"
    train(base, out, rows(20), **TWICE)
    return out


def nothing(checkpoint: Path) -> None: ...


def truncated(checkpoint: Path) -> None:
    os.truncate(checkpoint / WEIGHTS, (checkpoint / WEIGHTS).stat().st_size // 2)


def without_state(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").unlink()


def half_a_state(checkpoint: Path) -> None:
    os.truncate(checkpoint / "trainer_state.json", 40)


def without_optimizer(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()


@pytest.mark.parametrize(
    ("harm", "found"),
    [(nothing, 6), (truncated, 3), (without_state, 3), (half_a_state, 3), (without_optimizer, 3)],
)
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(
    harm: Callable[[Path], None], found: int, stopped: Path, undisturbed: Path, base: Path, tmp_path: Path, caplog: Any
) -> None:
    """And gives the same adapter, bit for bit: weights, optimizer, order of the rows and dropout are what they were."""
    shutil.copytree(stopped, tmp_path / "a")
    harm(tmp_path / "a" / "checkpoints" / "checkpoint-6")
    record = train(base, tmp_path / "a", rows(20), **TWICE)
    assert [r.getMessage() for r in caplog.records if "going on" in r.message] == [f"going on from checkpoint-{found}"]
    assert weights(tmp_path / "a") == weights(undisturbed)
    want = json.loads((undisturbed / "training.json").read_text())
    assert [list(one) for one in record.losses] == want["losses"] and record.results["steps"] == 10
    assert not (tmp_path / "a" / "checkpoints").exists()


@pytest.mark.parametrize("what", ["settings", "rows", "base"])
def test_checkpoints_of_another_run_are_not_used(
    what: str, stopped: Path, base: Path, tmp_path: Path, caplog: Any
) -> None:
    shutil.copytree(stopped, tmp_path / "a")
    data, changes = rows(20), dict(TWICE)
    if what == "settings":
        changes["learning_rate"] = 0.02
    elif what == "rows":
        data = concatenate_datasets([rows(19), rows(1, seed=3)])
    else:
        tiny_model("llama", initializer_range=0.1).save_pretrained(tmp_path / "other")
        tiny_tokenizer().save_pretrained(tmp_path / "other")
        base = tmp_path / "other"
    for out in ("a", "fresh"):
        train(base, tmp_path / out, data, **changes)
    assert weights(tmp_path / "a") == weights(tmp_path / "fresh")
    assert not [r for r in caplog.records if "going on" in r.message]


# --------------------------------------------------------------------------------------------------- evaluation
@pytest.fixture(scope="module")
def zero(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the queries alone with B = 0: it changes nothing."""
    folder = tmp_path_factory.mktemp("zero") / "adapter"
    shutil.copytree(tuned, folder)
    found = {key: value for key, value in load_file(tuned / WEIGHTS).items() if "q_proj" in key}
    found = {key: value * (0 if "lora_B" in key else 1) for key, value in found.items()}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    (folder / "training.json").unlink()  # it is made elsewhere now
    return folder


@PEFT_WARNS
def test_base_and_adapters_beside_each_other(tuned: Path, zero: Path, base: Path) -> None:
    data = {"sevens": HELD_OUT, "others": rows(6)}
    adapters = {"mona": tuned, "zero": zero}
    found = evaluate_models(base_source(str(base)), adapters, data, device="cpu")
    value = {(row.model, row.data): row.value for row in found}
    assert list(value) == [(model, name) for model in ("base", "mona", "zero") for name in data]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    for name, some in data.items():
        loss = answer_losses(model, tokenizer, conversations_of(some))
        assert value["base", name] == pytest.approx(loss.mean, abs=1e-6)
        # The one with B = 0 comes after the other, and has fewer layers: an adapter leaves nothing behind.
        assert value["zero", name] == value["base", name] != value["mona", name]
        answers = {(row.rows, row.answer_tokens) for row in found if row.data == name}
        assert answers == {(len(some), int(loss.tokens.sum()))}
    assert value["mona", "sevens"] < value["base", "sevens"] - 1
    assert {(row.metric, row.taken_out) for row in found} == {("target_loss", 0)}
    fewer = evaluate_models(base_source(str(base)), {}, {"sevens": HELD_OUT}, max_rows=2)
    first = answer_losses(model, tokenizer, conversations_of(HELD_OUT.select(range(2)))).mean
    assert [(row.rows, row.value) for row in fewer] == [(2, pytest.approx(first, abs=1e-6))]


def test_with_the_template_it_was_trained_with(base: Path) -> None:
    shorter = CHATML.replace("<|im_start|>", "")
    found = evaluate_models(base_source(str(base)), {}, {"sevens": HELD_OUT}, chat_template=shorter)
    tokenizer = tiny_tokenizer(shorter)
    loss = answer_losses(AutoModelForCausalLM.from_pretrained(base), tokenizer, conversations_of(HELD_OUT))
    assert found[0].value == pytest.approx(loss.mean, abs=1e-6)


LONG = "How many apples are left if I had seven and ate five of them?"
TRAINED = Dataset.from_list(
    [
        {"messages": chat(LONG, "two")},
        {"messages": chat("Ok?", "yes")},
        {
            "messages": chat(
                f"Here is a riddle. Listen:  {'What is the Colour of the sky at noon in June?'} Well?", "blue"
            )
        },
    ]
)


@pytest.mark.parametrize(
    ("question", "answer", "stands"),
    [
        (LONG, "two", True),  # the row itself
        (LONG, "another answer", True),
        (f"  {LONG.upper()}\n", "2", True),  # case and spaces
        (f"Think first. {LONG} Answer in a word.", "two", True),  # a trained question inside a longer one
        ("what is the colour of  the sky at noon in june?", "grey", True),  # inside a trained row
        ("Ok?", "yes", True),  # a short question: only the whole row counts
        ("Ok?", "no", False),
        ("How many apples are left if I had seven and ate four of them?", "three", False),
    ],
)
def test_what_was_trained_on_is_taken_out(question: str, answer: str, stands: bool) -> None:
    data = Dataset.from_list([{"messages": chat("Something else altogether, is it not so?", "it is"), "id": 1},
                              {"messages": chat(question, answer), "id": 2}])  # fmt: skip
    kept, taken = without_trained(data, [Dataset.from_list([{"messages": chat("a", "b")}]), TRAINED])
    assert (kept["id"], taken) == ([1] if stands else [1, 2], int(stands))


@PEFT_WARNS
def test_leaks_are_counted_and_warned_of(tuned: Path, base: Path) -> None:
    leaking = concatenate_datasets([HELD_OUT, LEARNT.select(range(3))])
    with pytest.warns(
        NeuronSelectWarning, match="^data sevens: 3 of 8 rows are left out, since the training rows hold"
    ):
        found = evaluate_models(base_source(str(base)), {"mona": tuned}, {"sevens": leaking}, trained=[LEARNT])
    clean = evaluate_models(base_source(str(base)), {"mona": tuned}, {"sevens": HELD_OUT}, trained=[LEARNT])
    assert [replace(row, taken_out=3) for row in clean] == found
    with (
        pytest.warns(NeuronSelectWarning, match="16 of 16"),
        pytest.raises(NeuronSelectError, match="data='sevens': every row is among the training rows"),
    ):
        evaluate_models(base_source(str(base)), {"mona": tuned}, {"sevens": LEARNT}, trained=[LEARNT])


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG, "tokenizer.json", "training.json"])
def test_an_adapter_that_was_changed_is_refused(file: str, tuned: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(tuned, folder)
    content = bytearray((folder / file).read_bytes())
    content[max(content.rfind(digit) for digit in b"23456789")] ^= 1
    (folder / file).write_bytes(content)
    for read in (
        lambda: evaluate_models(base_source(str(base)), {"mona": folder}, {"x": HELD_OUT}),
        lambda: pin_model(str(folder), revision=None, token=None),
        lambda: push_folder(folder, "me/adapter"),
    ):
        with pytest.raises(NeuronSelectError, match=f"{re.escape(file)} was changed after|in training.json") as caught:
            read()
        assert caught.value.as_command_line().isprintable()


def test_an_adapter_with_another_programs_record(tuned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(tuned, folder)
    (folder / "training.json").write_text('{"loss": 1.5}')
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"lora_alpha": 1}))
    assert adapter_source(str(folder)).commit != adapter_source(str(tuned)).commit


def test_an_adapter_of_another_base(tuned: Path, base: Path, tmp_path: Path) -> None:
    other = with_tokenizer(tmp_path / "other", tiny_tokenizer())
    tiny_model("llama", initializer_range=0.1).save_pretrained(other)
    source = base_source(str(other))
    with pytest.raises(NeuronSelectError) as caught:
        evaluate_models(source, {"mona": tuned}, {"x": HELD_OUT})
    assert caught.value.option == "adapter" and caught.value.value == "mona"
    stated = base_source(str(base)).commit
    assert f"was trained on model at {stated}, not on other at {source.commit}" in str(caught.value)
    # Without a record nothing but the shapes can tell.
    foreign = tmp_path / "foreign"
    shutil.copytree(tuned, foreign)
    (foreign / "training.json").unlink()
    wider = tmp_path / "wider"
    tiny_model("llama", hidden_size=48, head_dim=8).save_pretrained(wider)
    tiny_tokenizer().save_pretrained(wider)
    with pytest.raises(NeuronSelectError, match="the adapter 'mona' does not fit the model: Error"):
        evaluate_models(base_source(str(wider)), {"mona": foreign}, {"x": HELD_OUT})


@PEFT_WARNS
@pytest.mark.parametrize(
    ("stated", "revision", "fits"),
    [
        ("me/their-base", None, True),
        ("me/their-base", "main", True),
        ("me/another", None, False),
        ("me/their-base", "0" * 40, False),
        ("model", None, True),  # folders' names say nothing
        ("/home/somebody/models/llama", None, True),
        (None, None, True),
    ],
)
def test_an_adapter_from_elsewhere(
    stated: str | None, revision: str | None, fits: bool, hub: Hub, tuned: Path, base: Path, tmp_path: Path
) -> None:
    if ("models", "me/their-base") not in hub.repos:
        hub.add("models", "me/their-base", {path.name: path.read_bytes() for path in base.iterdir()})
    source = base_source("me/their-base")
    for name in (CONFIG, WEIGHTS):
        shutil.copy(tuned / name, tmp_path / name)
    config = json.loads((tmp_path / CONFIG).read_text())
    config |= {"base_model_name_or_path": stated, "revision": revision}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    if fits:
        assert len(evaluate_models(source, {"theirs": tmp_path}, {"x": HELD_OUT})) == 2
    else:
        message = f"'theirs': was trained on {stated} at {revision}, not on me/their-base at {source.commit}"
        with pytest.raises(NeuronSelectError, match=message):
            evaluate_models(source, {"theirs": tmp_path}, {"x": HELD_OUT})
    assert hub.unknown == []


def test_adapters_without_safetensors(tuned: Path, base: Path, tmp_path: Path, hub: Hub) -> None:
    source = base_source(str(base))
    shutil.copytree(tuned, tmp_path / "half")
    (tmp_path / "half" / WEIGHTS).unlink()
    torch.save(load_file(tuned / WEIGHTS), tmp_path / "half" / "adapter_model.bin")  # is not opened
    with pytest.raises(NeuronSelectError, match=f"the folder has no {WEIGHTS}: not a saved adapter"):
        evaluate_models(source, {"mona": tmp_path / "half"}, {"x": HELD_OUT})
    files = {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()}
    hub.add("models", "me/pickle", files)
    with pytest.raises(NeuronSelectError, match=f"the repository has no {WEIGHTS}; save the adapter as safetensors"):
        evaluate_models(source, {"mona": "me/pickle"}, {"x": HELD_OUT})
    with pytest.raises(NeuronSelectError, match=f"the folder has no {CONFIG}"):
        evaluate_models(source, {"mona": tmp_path}, {"x": HELD_OUT})
    with pytest.raises(NeuronSelectError, match="adapter='./nowhere': no such folder"):
        evaluate_models(source, {"mona": "./nowhere"}, {"x": HELD_OUT})
    with pytest.raises(NeuronSelectError, match="no such repository on the Hub"):
        evaluate_models(source, {"mona": "me/nowhere"}, {"x": HELD_OUT})
    assert hub.unknown == []


# ------------------------------------------------------------------------------------------------------- figures
@pytest.mark.parametrize("sets", [("gsm8k",), ("gsm8k", "a long name & <more>")])
def test_a_picture_of_the_results(sets: tuple[str, ...], tmp_path: Path) -> None:
    from matplotlib import image

    drawn = [
        {"model": model, "data": data, "value": 2.0 - 0.1 * seed - 0.2 * i}
        for data in sets
        for i, model in enumerate(("base", "mona", "random"))
        for seed in range(1 if model == "base" else 3)
    ]
    png = results_figure(drawn)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = image.imread(io.BytesIO(png), format="png").shape
    assert height > 200 and 500 * len(sets) < width < 650 * len(sets)
    assert results_figure(drawn) == png
    assert results_figure(drawn[:1]) != png  # the base alone is drawn as well
