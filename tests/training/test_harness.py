"""Task accuracy through lm-evaluation-harness: base and adapters, the local tasks, tables."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub import Hub, running
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import ROOT
from transformers import AutoModelForCausalLM

from hf_neuronselect import NeuronSelectError
from hf_neuronselect.core import bundled
from hf_neuronselect.training.harness import HarnessResults, HarnessRow, _load_tasks, run_tasks

TASKS = ROOT / "recipes" / "lm_eval_tasks"
NAMES = ["gsm8k_small", "mmlu_small", "tydiqa_small"]


# ------------------------------------------------------------------------------------------- without lm-eval
def results(values: dict[str, dict[tuple[str, str], float]], **tasks: dict[str, Any]) -> HarnessResults:
    """Results with ``values[model][task, metric]``."""
    rows = [
        HarnessRow(model, task, metric, value, 0.01 if metric == "acc" else None, 50)
        for model, found in values.items()
        for (task, metric), value in found.items()
    ]
    named = {row.task for row in rows}
    return HarnessResults(rows, {"tasks": {name: tasks.get(name, {}) for name in named}})


SHARES = results(
    {
        "base": {("gsm8k", "exact_match,last"): 0.125, ("mmlu", "acc"): 0.5, ("mmlu", "brier_score"): 0.8},
        "mo|na": {("gsm8k", "exact_match,last"): 0.25, ("mmlu", "acc"): 0.5, ("mmlu", "brier_score"): 0.7},
    },
    mmlu={"higher_is_better": {"acc": True, "brier_score": False}},
)


def test_markdown_table() -> None:
    assert SHARES.table("markdown").splitlines() == [
        "| model | gsm8k (exact_match %) | mmlu (acc %) | average (%) |",
        "| --- | ---: | ---: | ---: |",
        "| base | 12.5 | 50.0 | 31.2 |",
        "| mo\\|na | **25.0** | 50.0 | **37.5** |",
    ]


def test_text_table_with_another_metric_has_no_average() -> None:
    """Shares and Brier scores have no mean; of a metric where less is better, the least is best."""
    lines = SHARES.table(metrics={"mmlu": "brier_score"}, stderr=True).splitlines()
    assert [line.split() for line in lines[1:]] == [["base", "12.5", "0.8"], ["mo|na", "25.0", "0.7"]]
    assert "lower is better" in lines[0] and "average" not in lines[0]
    assert len({len(line) for line in lines}) == 1
    assert "| **0.7** |" in SHARES.table("markdown", metrics={"mmlu": "brier_score"})
    assert "50.0 ± 1.0" in SHARES.table(stderr=True)


def test_table_of_one_metric_and_of_groups() -> None:
    found = {("a", "word_perplexity"): 10.0, ("b", "word_perplexity"): 20.0}
    assert results({"base": found}).table().splitlines()[1].split() == ["base", "10", "20", "15"]
    grouped = {("all", "acc"): 0.5, ("one", "acc"): 0.25, ("two", "acc"): 0.75}
    table = results({"base": grouped}, all={"sums_up": ["one", "two"]}).table()
    assert table.splitlines()[0].split() == ["model", "all", "(acc", "%)"]


def test_table_says_what_is_wrong() -> None:
    with pytest.raises(NeuronSelectError, match="measured are: acc, brier_score"):
        SHARES.table(metrics={"mmlu": "acc_norm"})
    with pytest.raises(NeuronSelectError, match="style='html'"):
        SHARES.table("html")


def test_numbers_that_are_not_finite() -> None:
    made = results({"base": {("a", "acc"): float("nan")}, "b": {("a", "acc"): 0.5}})
    assert "| base | n/a |" in made.table("markdown")
    assert json.loads(json.dumps(made.to_dict(), allow_nan=False))["results"][0]["value"] is None


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(NeuronSelectError, match=r"pip install 'hf-neuronselect\[lm-eval\]'") as caught:
        run_tasks(str(bundled.MODEL), {"base": None}, ["gsm8k_small"], include_path=TASKS)
    assert caught.value.option == "tasks"


@pytest.mark.parametrize(
    ("changes", "option"),
    [({"tasks": []}, "tasks"), ({"adapters": {}}, "adapters"), ({"limit": 0}, "limit"), ({"batch_size": 0}, "batch_size"),
     ({"dtype": "int8"}, "dtype")],
)  # fmt: skip
def test_bad_options(changes: dict[str, Any], option: str) -> None:
    call = {"model": str(bundled.MODEL), "adapters": {"base": None}, "tasks": ["gsm8k_small"]} | changes
    with pytest.raises(NeuronSelectError) as caught:
        run_tasks(**call)
    assert caught.value.option == option


def test_committed_tasks_are_small_and_run_no_python() -> None:
    assert sum(file.stat().st_size for file in TASKS.rglob("*") if file.is_file()) <= 300_000
    for name in NAMES:
        config = yaml.safe_load((TASKS / name / f"{name}.yaml").read_text())  # safe_load knows no !function
        test, fewshot = (
            [json.loads(line) for line in (TASKS / name / config["dataset_kwargs"]["data_files"][split]).open()]
            for split in ("test", "fewshot")
        )
        assert 50 <= len(test) <= 100 and not {row["id"] for row in test} & {row["id"] for row in fewshot}
    assert {path.suffix for path in TASKS.rglob("*") if path.is_file()} == {".md", ".yaml", ".jsonl"}


def test_recipe_draws_every_group_alike(tmp_path: Path) -> None:
    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / "meta").mkdir(exist_ok=True)
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    def row(i: int, answer: str, question: str = "q") -> dict[str, Any]:
        turns = [{"role": "user", "content": f"{question}{i}"}, {"role": "assistant", "content": answer}]
        return {"id": i, "messages": turns}

    langs = ["a"] * 30 + ["b"] * 6 + ["c"] * 6
    write("gsm8k", [row(i, f"so\n#### {i}") for i in range(12)])
    write("mmlu", [row(i, "ABCD"[i % 4]) for i in range(42)])
    write("meta/mmlu", [{"id": i, "subject": lang} for i, lang in enumerate(langs)])
    write("tydiqa", [row(i, "x", "long " * 999 if i == 41 else "q") for i in range(42)])
    write("meta/tydiqa", [{"id": i, "lang": lang, "answers": ["x", "y"]} for i, lang in enumerate(langs)])
    script = TASKS.parent / "tiny" / "make_eval_tasks.py"
    command = [sys.executable, str(script), "--eval", str(tmp_path), "--out", str(tmp_path / "out"), "--rows", "10"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    drawn = {
        path.relative_to(tmp_path / "out").as_posix(): [json.loads(line) for line in path.open()]
        for path in (tmp_path / "out").rglob("*.jsonl")
    }
    assert len(drawn["gsm8k_small/test.jsonl"]) == 7 and len(drawn["gsm8k_small/fewshot.jsonl"]) == 5
    for task in ("mmlu_small", "tydiqa_small"):
        rows = drawn[f"{task}/test.jsonl"] + drawn[f"{task}/fewshot.jsonl"]
        counts = [sum(row["group"] == lang for row in rows) for lang in "abc"]
        assert sum(counts) == 15 and max(counts) - min(counts) <= 1 and len({row["id"] for row in rows}) == 15
    assert all(row["answer"] == row["id"] % 4 for row in drawn["mmlu_small/test.jsonl"])
    assert all(len(row["prompt"]) < 50 for row in drawn["tydiqa_small/test.jsonl"])
    for name in NAMES:
        assert (tmp_path / "out" / name / f"{name}.yaml").read_bytes() == (TASKS / name / f"{name}.yaml").read_bytes()


# ---------------------------------------------------------------------------------------------- with lm-eval
@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """``zero``: a fresh LoRA, whose B is 0. ``large``: the same with a large random B."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("adapters")
    lm = AutoModelForCausalLM.from_pretrained(bundled.MODEL, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        lora = get_peft_model(lm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    for name in ("zero", "large"):
        lora.save_pretrained(folder / name)
    file = folder / "large" / "adapter_model.safetensors"
    weights = load_file(file)
    for key, value in weights.items():
        if "lora_B" in key:
            weights[key] = 3 * torch.randn(value.shape, generator=generator)
    save_file(weights, file, metadata={"format": "pt"})
    return {name: str(folder / name) for name in ("zero", "large")}


def numbers(made: HarnessResults, model: str) -> dict[tuple[str, str], tuple[float, float | None, int]]:
    return {(row.task, row.metric): (row.value, row.stderr, row.samples) for row in made.rows if row.model == model}


def test_base_and_adapters_on_the_local_tasks(
    adapters: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)  # the tasks' data are found from anywhere
    models = {"base": None, "zero": adapters["zero"], "large": adapters["large"], "base again": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=FutureWarning)
        made = run_tasks(str(bundled.MODEL), models, NAMES, include_path=TASKS, limit=4)
    base = numbers(made, "base")
    assert set(base) == {("gsm8k_small", "exact_match,last-number"), ("mmlu_small", "acc"), ("mmlu_small", "brier_score"),
                         ("tydiqa_small", "exact_match,stripped")}  # fmt: skip
    assert all(0 <= value <= 2 and samples == 4 for value, _, samples in base.values())
    assert numbers(made, "zero") == base
    assert numbers(made, "large")["mmlu_small", "brier_score"] != base["mmlu_small", "brier_score"]
    assert numbers(made, "base again") == base  # an adapter leaves nothing behind
    assert not caplog.records

    saved = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert saved["limit"] == 4 and saved["lm_eval"] and saved["dtype"] == "float32"
    assert saved["tasks"]["mmlu_small"] == {
        "version": 1.0, "num_fewshot": 0, "higher_is_better": {"acc": True, "brier_score": False},
    }  # fmt: skip
    assert saved["adapters"]["base"] is None and saved["adapters"]["large"]["id"] == "large"
    assert len(saved["results"]) == 16 and str(tmp_path.parent) not in json.dumps(saved)
    assert made.table("markdown").splitlines()[0].endswith("| average (%) |")


def test_few_shots_plain_text_and_a_tag(adapters: dict[str, str]) -> None:
    """The tag of the three tasks, narrowed to MMLU's numbers: prompts matter."""
    call: dict[str, Any] = {"include_path": TASKS, "limit": 3}
    briers = set()
    for options in ({}, {"num_fewshot": 2}, {"apply_chat_template": False, "num_fewshot": 2}):
        made = run_tasks(str(bundled.MODEL), {"base": None}, ["mmlu_small"], **call, **options)
        briers.add(numbers(made, "base")["mmlu_small", "brier_score"][0])
        assert made.about["tasks"]["mmlu_small"]["num_fewshot"] == options.get("num_fewshot", 0)
    assert len(briers) == 3
    _, loaded = _load_tasks(["neuronselect_small"], TASKS)
    assert sorted(task.task_name for task in loaded) == NAMES


def test_answers_that_are_right_count() -> None:
    """A model that knows every answer, said in its own way, gets all of them; one that is off gets none."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM

    manager, loaded = _load_tasks(NAMES, TASKS)

    class Oracle(LM):
        def __init__(self, wrong: bool) -> None:
            super().__init__()
            self.wrong = wrong

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [self.answer(request.doc) for request in requests]

        def answer(self, doc: dict[str, Any]) -> str:
            if "answers" in doc:
                return f"  {'no' * self.wrong}{doc['answers'][-1].upper()}. "
            number = float(doc["answer"].split("####")[1].replace(",", "")) + self.wrong
            return f"First 3 of 7, then ${number:,.2f} in all."

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            right = [request.args[1].strip() == "ABCD"[request.doc["answer"]] for request in requests]
            return [(0.0 if ok != self.wrong else -9.0, False) for ok in right]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

    for wrong in (False, True):
        found = lm_eval.simple_evaluate(Oracle(wrong), tasks=loaded, task_manager=manager, bootstrap_iters=0)["results"]
        scores = [
            found["gsm8k_small"]["exact_match,last-number"],
            found["mmlu_small"]["acc,none"],
            found["tydiqa_small"]["exact_match,stripped"],
        ]
        assert scores == [float(not wrong)] * 3


def test_group_of_own_tasks(adapters: dict[str, str], tmp_path: Path) -> None:
    """A group sums its tasks up, and its tasks' data are found too."""
    rows = [{"q": f"{i} + 1 =", "right": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("one", "two"):
        task = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["1", "2"],
            "doc_to_target": "right",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    made = run_tasks(str(bundled.MODEL), {"base": None}, ["both"], include_path=tmp_path)
    found = numbers(made, "base")
    assert {task for task, _ in found} == {"both", "one", "two"}
    assert found["both", "acc"][0] == pytest.approx((found["one", "acc"][0] + found["two", "acc"][0]) / 2)
    assert found["both", "acc"][2] == 8 and made.about["tasks"]["both"]["sums_up"] == ["one", "two"]
    assert made.table().splitlines()[0].split() == ["model", "both", "(acc", "%)"]


def test_unknown_task_and_missing_data(adapters: dict[str, str], tmp_path: Path) -> None:
    call: dict[str, Any] = {"model": str(bundled.MODEL), "adapters": {"base": None}}
    with pytest.raises(
        NeuronSelectError, match="did you mean .*gsm8k_small.*; include_path has .*mmlu_small"
    ) as caught:
        run_tasks(**call, tasks=["gsm8k_smal"], include_path=TASKS)
    assert caught.value.option == "tasks" and caught.value.value == "gsm8k_smal"
    with pytest.raises(NeuronSelectError, match="include_path=.*no such folder"):
        run_tasks(**call, tasks=["gsm8k_small"], include_path=tmp_path / "none")
    broken = {"task": "broken", "dataset_path": "json", "dataset_kwargs": {"data_files": "none.jsonl"}, "test_split": "train",
              "doc_to_text": "q", "doc_to_target": "a"}  # fmt: skip
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(NeuronSelectError, match="data cannot be loaded.*none.jsonl"):
        run_tasks(**call, tasks=["broken"], include_path=tmp_path)
    (tmp_path / "code.yaml").write_text(yaml.safe_dump(broken | {"task": "code", "unsafe_code": True}))
    with pytest.raises(NeuronSelectError, match="HF_ALLOW_CODE_EVAL=1"):
        run_tasks(**call, tasks=["code"], include_path=tmp_path)


def test_adapters_and_models_that_do_not_fit(
    adapters: dict[str, str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call: dict[str, Any] = {"tasks": ["mmlu_small"], "include_path": TASKS, "limit": 1}
    tiny = str(tiny_folder / "model")
    with pytest.raises(NeuronSelectError, match="'mona' does not fit the model"):
        run_tasks(tiny, {"mona": adapters["large"]}, **call)
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((Path(adapters["zero"]) / "adapter_config.json").read_bytes())
    with pytest.raises(NeuronSelectError, match="no adapter_model.safetensors"):  # a pickle is not opened
        run_tasks(str(bundled.MODEL), {"mona": str(folder)}, **call)
    weights = load_file(Path(adapters["zero"]) / "adapter_model.safetensors")
    kept = {key: value for key, value in weights.items() if "layers.0." in key}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NeuronSelectError, match="missing adapter keys"):
        run_tasks(str(bundled.MODEL), {"mona": str(folder)}, **call)
    with pytest.raises(NeuronSelectError, match="adapters='org/none': no such path here"):
        run_tasks(str(bundled.MODEL), {"mona": "org/none"}, **call)

    for file in bundled.MODEL.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(NeuronSelectError, match="no chat template.*tokenizer="):
        run_tasks(str(tmp_path), {"base": None}, **call)
    made = run_tasks(str(tmp_path), {"base": None}, **call, tokenizer=str(bundled.MODEL))
    assert numbers(made, "base") == numbers(run_tasks(str(bundled.MODEL), {"base": None}, **call), "base")


SCRIPT = """
import json, sys
from hf_neuronselect import NeuronSelectError
from hf_neuronselect.training.harness import run_tasks

folder, tasks = sys.argv[1:]
call = dict(tasks=["mmlu_small"], include_path=tasks, limit=2)
made = run_tasks("me/base", {"base": None, "hub": "me/lora", "folder": folder}, **call)
try:
    run_tasks("me/base", {"pickle": "me/pickle"}, **call)
except NeuronSelectError as error:
    print(json.dumps([made.to_dict(), str(error)]))
"""


def test_model_and_adapter_from_a_hub(adapters: dict[str, str], tmp_path: Path) -> None:
    folder = Path(adapters["large"])
    hub = Hub()
    hub.add("models", "me/base", {file.name: file.read_bytes() for file in bundled.MODEL.iterdir()})
    hub.add("models", "me/lora", {file.name: file.read_bytes() for file in folder.iterdir()})
    config = (folder / "adapter_config.json").read_bytes()
    hub.add("models", "me/pickle", {"adapter_config.json": config, "adapter_model.bin": b"never opened"})
    with running(hub) as endpoint:
        env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
                            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
        command = [sys.executable, "-c", SCRIPT, str(folder), str(TASKS)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    made, refused = json.loads(done.stdout.strip().splitlines()[-1])
    found = {name: [row["value"] for row in made["results"] if row["model"] == name] for name in made["adapters"]}
    assert found["hub"] == found["folder"] != found["base"]
    assert made["model"]["id"] == "me/base" and len(made["adapters"]["hub"]["commit"]) == 40
    assert "no adapter_model.safetensors" in refused
