"""Recipes through the command line against the local Hub: select, train, evaluate, push; stopped, killed and run again."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset, load_dataset
from encoders import write_encoder, write_mntp
from hub import TOKENS, Hub
from peft import PeftModel
from records import edit
from tiny import ROOT, chat, rows
from transformers import AutoModelForCausalLM
from versions import before

from hf_neuronselect import Method, NeuronFeatureExtractor, Selection, register_method
from hf_neuronselect.cli import main as cli
from hf_neuronselect.core.configs import SelectConfig
from hf_neuronselect.core.provenance import plain
from hf_neuronselect.methods import METHODS
from hf_neuronselect.pipelines import run as pipeline
from hf_neuronselect.pipelines.parts import named_specs
from hf_neuronselect.pipelines.recipe import Recipe, control_config

RECIPES = ROOT / "recipes"
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # in peft's own code
WEIGHTS = "adapter_model.safetensors"


def call(*words: str) -> tuple[int, str, str]:
    """``neuronselect WORDS`` in this process: exit status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["neuronselect", *words]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = before
    return int(stop.value.code or 0), out.getvalue(), err.getvalue()


def well(*words: str) -> str:
    code, out, err = call(*words)
    assert code == 0, err
    return out


def refused(*words: str) -> str:
    """The one line."""
    code, _, err = call(*words)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert not [token for token in TOKENS if token in err]
    return lines[0]


RECIPE: dict[str, Any] = {
    "select": {"pool": "pool.jsonl", "target": ["math=target.jsonl"], "model": "model", "sae": "sae", "k": 8},
    "train": {
        "model": "model", "controls": ["random"], "max_steps": 3, "save_steps": 2, "per_device_train_batch_size": 4,
        "max_length": 128, "lora_r": 4, "learning_rate": "1e-2",
    },
    "evaluate": {"data": ["held=held.jsonl"]},
    "push": {"selection": "recipe-rows", "adapter": "recipe-lora"},
}  # fmt: skip


def write(name: str = "recipe.yaml", without: str = "", **changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose sections have these changes; a key that becomes None is left away."""
    made = {
        section: {k: v for k, v in (RECIPE.get(section, {}) | changes.get(section, {})).items() if v is not None}
        for section in RECIPE
        if section not in without.split()
    }
    Path(name).write_text(yaml.safe_dump(made))
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """What a recipe names, and the recipe."""
    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
    rows(60).to_json(folder / "pool.jsonl")
    rows(6, seed=1).to_json(folder / "target.jsonl")
    rows(6, seed=2).to_json(folder / "held.jsonl")
    with chdir(folder):
        write()
    return folder


@pytest.fixture(scope="module")
def done(files: Path, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder after one whole run into ``run``, and what it said."""
    folder = tmp_path_factory.mktemp("done") / "here"
    shutil.copytree(files, folder)
    with chdir(folder):
        return folder, well("run", "recipe.yaml", "--out", "run")


@pytest.fixture
def here(files: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the files, gone into."""
    shutil.copytree(files, tmp_path / "here")
    with chdir(tmp_path / "here"):
        yield tmp_path / "here"


@pytest.fixture
def again(done: tuple[Path, str], tmp_path: Path) -> Iterator[Path]:
    """A copy of what the whole run left, gone into: paths in recipes are relative."""
    shutil.copytree(done[0], tmp_path / "again")
    with chdir(tmp_path / "again"):
        yield tmp_path / "again"


@pytest.fixture(autouse=True)
def nothing_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "hub" in request.fixturenames:
        hub = request.getfixturevalue("hub")
        left, hub.faults[:] = list(hub.faults), []
        assert left == [] and hub.unknown == []


NUMBERS = count()


@pytest.fixture
def name() -> str:
    return f"recipe-{next(NUMBERS)}"


def commits(hub: Hub, *names: str) -> list[int]:
    """Of a dataset and a model: how many, the first one (by which it was created) aside."""
    return [len(hub.history(kind, name)) - 1 for kind, name in zip(("datasets", "models"), names, strict=False)]


def weights(folder: Path, name: str = "mona") -> bytes:
    return (folder / "adapters" / name / WEIGHTS).read_bytes()


def said(out: str) -> dict[str, bool]:
    """Step -> whether it was done now (True) or before."""
    found = {}
    for line in out.splitlines():
        for step in ("select mona", "select random", "train mona", "train random", "evaluate", "push"):
            if line in (f"{step} ...",) or line.startswith(f"{step}: done before"):
                found[step] = line.endswith(" ...")
    return found


STEPS = ["select mona", "select random", "train mona", "train random", "evaluate", "push"]


# ----------------------------------------------------------------------------------------------- the whole chain
def test_a_run_leaves_what_it_says(done: tuple[Path, str], hub: Hub) -> None:
    folder, out = done
    run = folder / "run"
    assert said(out) == dict.fromkeys(STEPS, True)
    assert {p.relative_to(run).as_posix() for p in run.iterdir()} == {
        "selection", "controls", "adapters", "run.json", "evaluation.json", "evaluation.png",
    }  # fmt: skip
    assert len(Selection.from_pretrained(run / "selection")) == 8
    assert len(Selection.from_pretrained(run / "controls" / "random")) == 8
    found = json.loads((run / "evaluation.json").read_text())
    assert [(row["model"], row["data"], row["rows"]) for row in found["rows"]] == [
        ("base", "held", 6), ("mona", "held", 6), ("random", "held", 6),
    ]  # fmt: skip
    value = {row["model"]: row["value"] for row in found["rows"]}
    assert value["mona"] < value["base"] and value["random"] < value["base"]
    assert found["base"] == {"id": "model", "commit": found["base"]["commit"]}
    assert (run / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    table = [line.split() for line in out.splitlines() if line.split()[:1] in (["base"], ["mona"], ["random"])]
    assert table == [[name, f"{number:.4f}"] for name, number in value.items()]
    assert f"selection: {hub.endpoint}/datasets/me/recipe-rows\nadapter: {hub.endpoint}/me/recipe-lora\n" in out
    steps = json.loads((run / "run.json").read_text())["steps"]
    assert list(steps) == STEPS and all(step["seconds"] >= 0 and step["finished"] for step in steps.values())
    for file in run.rglob("*"):
        if file.suffix in (".json", ".md", ".html", ".jinja"):
            assert str(folder) not in file.read_text(), file


@PEFT_WARNS
def test_what_was_pushed_loads_and_is_linked(done: tuple[Path, str], hub: Hub) -> None:
    run = done[0] / "run"
    local = Selection.from_pretrained(run / "selection")
    pushed = load_dataset("me/recipe-rows", split="train")
    assert pushed.features == local.dataset.features and pushed.to_dict() == local.dataset.to_dict()
    assert len(load_dataset("me/recipe-rows", "scores", split="train")) == 60

    base = AutoModelForCausalLM.from_pretrained(done[0] / "model")
    PeftModel.from_pretrained(base, "me/recipe-lora")
    files = hub.files("models", "me/recipe-lora")
    assert files[WEIGHTS] == weights(run)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    metadata = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert metadata["datasets"] == ["me/recipe-rows"] and metadata["library_name"] == "peft"
    values = {row["model"]: row["value"] for row in json.loads((run / "evaluation.json").read_text())["rows"]}
    (index,) = metadata["model-index"]
    assert index["name"] == "mona"
    (result,) = index["results"]
    assert result["dataset"]["name"] == "held"
    assert result["metrics"] == [{"type": "target_loss", "value": values["mona"], "name": "target_loss"}]
    record = json.loads(files["training.json"])
    assert record["selection"]["repo_id"] == "me/recipe-rows" and record["selection"]["budget"] == {"k": 8}
    assert [row["model"] for row in record["evaluation"]] == ["base", "mona", "random"]


def test_each_repository_got_one_commit(done: tuple[Path, str], hub: Hub) -> None:
    assert commits(hub, "me/recipe-rows", "me/recipe-lora") == [1, 1]
    assert {name for kind, name in hub.repos if name.startswith("me/recipe-")} >= {"me/recipe-rows", "me/recipe-lora"}
    assert ("models", "me/random") not in hub.repos


# --------------------------------------------------------------------------------------------------- run again
def test_again_is_nothing_to_do(again: Path, hub: Hub) -> None:
    before = {path: path.read_bytes() for path in again.rglob("*") if path.is_file()}
    start = len(hub.requests)
    out = well("run", "recipe.yaml", "--out", "run")
    assert said(out) == dict.fromkeys(STEPS, False)
    assert "me/recipe-rows" in out and "held target_loss" in out
    assert {path: path.read_bytes() for path in again.rglob("*") if path.is_file()} == before
    assert set(hub.requests[start:]) == {"GET /api/whoami-v2"}


def test_a_train_key_is_changed(again: Path, hub: Hub, name: str) -> None:
    write(train={"learning_rate": 0.02}, push={"selection": f"{name}-rows", "adapter": f"{name}-lora"})
    before = weights(again / "run")
    out = well("run", "recipe.yaml", "--out", "run")
    assert said(out) == {step: not step.startswith("select") for step in STEPS}
    assert weights(again / "run") != before
    assert hub.files("models", f"me/{name}-lora")[WEIGHTS] == weights(again / "run")
    assert commits(hub, f"me/{name}-rows", f"me/{name}-lora") == [1, 1]


def test_the_pool_is_changed(again: Path) -> None:
    pool = Path("pool.jsonl").read_text().splitlines()
    Path("pool.jsonl").write_text("\n".join(pool[::-1]) + "\n")
    out = well("run", "recipe.yaml", "--out", "run", "--no-push")
    assert said(out) == dict.fromkeys(STEPS[:-1], True)
    made = json.loads((again / "run" / "adapters" / "mona" / "training.json").read_text())
    assert made["selection"]["pool"] == plain(Selection.from_pretrained(again / "run" / "selection").provenance.pool)


def test_the_model_is_changed(again: Path) -> None:
    """The model that selects, not the one that is trained: its folder keeps its name."""
    shutil.copytree("model", "trained")
    write(train={"model": "trained"})
    well("run", "recipe.yaml", "--out", "run", "--no-push")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    out = well("run", "recipe.yaml", "--out", "run", "--no-push")
    assert said(out)["select mona"] and not said(out)["train random"]  # by its scores alone it is another selection


def test_an_encoder_or_its_adapter_is_changed(here: Path) -> None:
    """Their folders keep their names; a selection is made again by what they hold."""
    places = {"encoder": here / "enc", "mntp_adapter": here / "mntp"}
    config = SelectConfig(
        pool="pool.jsonl", target=("math=target.jsonl",), out=here / "out", encoder="enc", mntp_adapter="mntp"
    )
    found = []
    for seed in (0, 1):
        write_encoder(places["encoder"], seed=seed)
        found.append(pipeline._read_by(config))
    write_mntp(places["mntp_adapter"], here / "model")
    found.append(pipeline._read_by(config))
    assert found[0] != found[1] != found[2] and pipeline._read_by(config) == found[2]


def test_an_adapter_is_deleted(again: Path) -> None:
    before = weights(again / "run")
    shutil.rmtree("run/adapters/mona")
    out = well("run", "recipe.yaml", "--out", "run", "--no-push")
    assert said(out) == {
        "select mona": False, "select random": False, "train mona": True, "train random": False, "evaluate": True,
    }  # fmt: skip
    assert weights(again / "run") == before
    assert len(json.loads(Path("run/adapters/mona/training.json").read_text())["evaluation"]) == 3


def test_a_result_is_deleted(again: Path) -> None:
    Path("run/evaluation.json").unlink()
    assert said(well("run", "recipe.yaml", "--out", "run", "--no-push"))["evaluate"]
    assert Path("run/evaluation.json").exists()


# ------------------------------------------------------------------------------------------------------- killed
KILLED = """
import os, signal, sys
from hf_neuronselect.cli import main as cli
from hf_neuronselect.training.callback import CardCallback

def on_step_end(self, args, state, control, **more):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv.pop(1) == "train":
    CardCallback.on_step_end = on_step_end
cli.main()
"""


def child(where: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", KILLED, where, *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)  # fmt: skip


def test_killed_while_it_trains(here: Path, done: tuple[Path, str], caplog: pytest.LogCaptureFixture) -> None:
    run = child("train", "run", "recipe.yaml", "--out", "run", "--no-push")
    out = run.communicate(timeout=120)[0]
    assert run.returncode == -signal.SIGKILL, out
    assert said(out) == {"select mona": True, "select random": True, "train mona": True}
    assert (here / "run/adapters/mona/checkpoints/checkpoint-2/trainer_state.json").exists()
    # And the other selection was being written.
    shutil.rmtree(here / "run/controls/random")
    (here / "run/controls/random/.selection.json.part/data").mkdir(parents=True)
    edit(Path("run/run.json"), lambda record: record["steps"].pop("select random"))

    out = well("run", "recipe.yaml", "--out", "run", "--no-push")
    assert said(out) == {"select mona": False} | dict.fromkeys(STEPS[1:-1], True)
    assert [r.getMessage() for r in caplog.records if "going on" in r.message] == ["going on from checkpoint-2"]
    for name in ("mona", "random"):
        assert weights(here / "run", name) == weights(done[0] / "run", name)
    assert not (here / "run/adapters/mona/checkpoints").exists()


def test_killed_between_two_pushes(again: Path, hub: Hub, name: str) -> None:
    repos = f"me/{name}-rows", f"me/{name}-lora"
    write(push={"selection": repos[0], "adapter": repos[1]})
    started: list[subprocess.Popen[str]] = []
    hub.fault("POST", rf"/api/models/{repos[1]}/commit", call=lambda: started[0].kill(), status=503)
    started.append(child("push", "run", "recipe.yaml", "--out", "run"))
    out = started[0].communicate(timeout=120)[0]
    assert started[0].returncode == -signal.SIGKILL, out
    assert said(out) == dict.fromkeys(STEPS[:-1], False) | {"push": True}
    assert commits(hub, *repos) == [1, 0]
    out = well("run", "recipe.yaml", "--out", "run")
    assert said(out) == dict.fromkeys(STEPS[:-1], False) | {"push": True}
    assert commits(hub, *repos) == [1, 1]
    assert yaml.safe_load(hub.files("models", repos[1])["README.md"].decode().split("---\n")[1])["datasets"] == [
        repos[0]
    ]


# --------------------------------------------------------------------------------------------------- train --data
def test_train_on_a_selection_or_any_rows(again: Path, hub: Hub) -> None:
    write("train.yaml", without="select push evaluate", train={"controls": None})
    for data, folder, name in (("run/selection", "a", "mona"), ("me/recipe-rows", "b", "mona"),
                               ("held.jsonl", "c", "adapter"), ("run/selection/data", "d", "adapter")):  # fmt: skip
        well("train", "--config", "train.yaml", "--data", data, "--out", folder)
        made = json.loads(Path(folder, "adapters", name, "training.json").read_text())
        if name == "mona":
            assert made["selection"]["method"]["name"] == "mona"
            assert weights(Path(folder)) == weights(again / "run")  # the rows of the whole run
        else:
            assert set(made["selection"]) == {"pool"}
        assert made["selection"].get("repo_id") == (data if folder == "b" else None)
        assert ("datasets:\n- me/recipe-rows\n" in Path(folder, "adapters", name, "README.md").read_text()) == (
            folder == "b"
        )
    assert weights(Path("d"), "adapter") == weights(again / "run")
    write("named.yaml", without="select push evaluate",
          train={"controls": None, "data": "held.jsonl", "name": "mine", "max_steps": 1})  # fmt: skip
    well("train", "--config", "named.yaml", "--out", "e")
    assert (again / "e/adapters/mine" / WEIGHTS).exists() and not (again / "e/evaluation.json").exists()


def test_what_is_not_named_is_not_another_model(again: Path) -> None:
    """Rows selected with one's own model are not silently trained on the small bundled one."""
    write("train.yaml", without="select push evaluate", train={"controls": None, "model": None})
    line = refused("train", "--config", "train.yaml", "--data", "run/selection", "--out", "a")
    assert "name the model to fine-tune" in line and "selected with model" in line and not Path("a").exists()


def test_train_selects_on_the_fly(here: Path) -> None:
    """The model that selects is fine-tuned where no other is named."""
    write(train={"controls": None, "max_steps": 1, "model": None}, without="push")
    out = well("train", "--config", "recipe.yaml", "--out", "run")
    assert said(out) == {"select mona": True, "train mona": True, "evaluate": True}
    assert len(Selection.from_pretrained("run/selection")) == 8 and not (here / "run/controls").exists()
    record = json.loads((here / "run/adapters/mona/training.json").read_text())
    assert record["base_model"]["id"] == "model"


def test_several_targets_share_the_budget(here: Path) -> None:
    rows(6, seed=5).to_json("code.jsonl")
    targets = {"target": ["math=target.jsonl", "code=code.jsonl"], "aggregate": "quota", "method": "nait"}
    write(select=targets, train={"controls": ["random", "full"], "max_steps": 1}, without="push")
    out = well("run", "recipe.yaml", "--out", "run")
    made = Selection.from_pretrained("run/selection").provenance
    assert list(made.targets) == ["math", "code"] and made.aggregate == "quota"
    assert "train nait ..." in out and len(Selection.from_pretrained("run/controls/full")) == 60
    card = Path("run/adapters/nait/README.md").read_text()
    assert "| targets | math, code |" in card and "| rows trained on | 8 |" in card
    assert Path("run/adapters/full/README.md").read_text().count("| rows trained on | 60 |") == 1


# ---------------------------------------------------------------------------------------- before anything is done
@pytest.mark.parametrize(
    ("token", "message"),
    [
        (
            None,
            "error: --push: the Hub answered 401; log in with `hf auth login`|error: --push: no token: run `hf auth login`",
        ),
        (
            "hf_wrong",
            "error: --push: the Hub answered 401; log in with `hf auth login` or set HF_TOKEN to a token it knows",
        ),
        ("hf_read", "error: --push: the token can only read; make one that can write"),
    ],
)
def test_who_may_not_push_is_told_first(
    token: str | None, message: str, here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    assert refused("run", "recipe.yaml", "--out", "run").startswith(tuple(message.split("|")))
    assert not (here / "run").exists()
    write(train={"controls": None, "max_steps": 1}, without="evaluate")
    well("run", "recipe.yaml", "--out", "run", "--no-push")


def test_offline_does_the_rest_and_says_so(here: Path) -> None:
    write(train={"controls": None, "max_steps": 1})
    code, out, err = call("run", "recipe.yaml", "--out", "run")
    assert code == 3, err
    assert said(out) == {"select mona": True, "train mona": True, "evaluate": True}
    assert out.endswith("push: left out, HF_HUB_OFFLINE is set; run again without it\n")
    assert call("run", "recipe.yaml", "--out", "run", "--no-push")[0] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "error: RECIPE bad.yaml: cannot be read: "),
        ("train: 5", "error: RECIPE bad.yaml: section train needs option: value lines"),
        ("- train", "error: RECIPE bad.yaml: needs a section train"),
        ("", "error: RECIPE bad.yaml: needs a section train"),
        ("select: {pool: x}", "error: RECIPE bad.yaml: needs a section train"),
        ("{train: {}, evalute: {}}", "error: RECIPE evalute: unknown section; did you mean evaluate"),
        ("{train: {}, 7: {}}", "error: RECIPE 7: unknown section; known: evaluate, push, select, train"),
        ("{train: {max_step: 5}}", "error: RECIPE max_step: unknown key of section train; did you mean max_steps"),
        ("{train: {controls: [randm]}}", "error: controls randm: unknown control; did you mean random"),
        ("{train: {}, select: {out: x}}", "error: --out x: belongs to the command, not into a recipe's select"),
        ("{train: {}, evaluate: {task: x}}", "error: RECIPE task: unknown key of section evaluate; did you mean tasks"),
        ("{train: {}, select: {poool: x}}", "error: RECIPE poool: unknown key of section select; did you mean pool"),
        ("{train: {}, push: {selecton: x}}", "error: RECIPE selecton: unknown key of section push; did you mean selection"),
        ("{train: {}, push: me/repo}", "error: RECIPE bad.yaml: section push needs option: value lines"),
        ("{train: {}}", "error: --data: name a selection or rows to train on, or add a section select"),
        ("{train: {controls: [random], data: x}}", "error: controls random: controls need the section select"),
        ("{train: {data: x}, evaluate: {data: [a=x, a=y]}}", "error: --data a: is the name of two"),
        ("{train: {data: pool.jsonl}, evaluate: {data: [a=gone.jsonl]}}", "error: --data gone.jsonl: no such file"),
        ("{train: {data: ./gone.jsonl}}", "error: --data"),
        ("{train: {data: pool.jsonl, model: ./gone}}", "error: model ./gone: no such folder"),
    ],
)  # fmt: skip
def test_a_bad_recipe_is_one_line(text: str, message: str, here: Path) -> None:
    Path("bad.yaml").write_text(text)
    assert refused("run", "bad.yaml", "--out", "run").startswith(message)
    assert not Path("run").exists() or {path.name for path in Path("run").iterdir()} == {"run.json"}
    assert refused("run", "gone.yaml", "--out", "run").startswith("error: RECIPE gone.yaml: cannot be read")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pool_that_cannot_be_trained_on_is_refused_before_the_pass(streaming: bool, here: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "why?"}]}
    Path("asked.jsonl").write_text("".join(json.dumps(asked | {"id": i}) + "\n" for i in range(20)))
    write(without="push evaluate", select={"pool": "asked.jsonl", "streaming": streaming}, train={"controls": None})
    line = refused("run", "recipe.yaml", "--out", "run")
    assert "cannot be trained on these rows: no assistant turn with an answer (20)" in line


def test_rows_that_are_not_selected_cannot_be_pushed(again: Path, hub: Hub) -> None:
    write(train={"controls": None})
    line = refused("train", "--config", "recipe.yaml", "--data", "run/selection", "--out", "other")
    assert "--push recipe-rows: the rows are not selected by this run" in line and not Path("other").exists()
    well("train", "--config", "recipe.yaml", "--data", "run/selection", "--out", "other", "--no-push")


@pytest.mark.parametrize("file", ["thesis.txt", "run.json"])
def test_a_folder_of_something_else_is_left_alone(file: str, here: Path) -> None:
    Path("mine").mkdir()
    Path("mine", file).write_text("precious")
    line = refused("run", "recipe.yaml", "--out", "mine", "--no-push")
    assert line == "error: --out mine: exists and is not a run's folder; name another"
    assert [path.read_text() for path in Path("mine").iterdir()] == ["precious"]


def test_rows_edited_by_hand_are_not_trained_on(again: Path) -> None:
    file = again / "run/selection/data/train-00000-of-00001.parquet"
    edited = Dataset.from_parquet(str(file)).map(lambda row: {"messages": chat("buy", "now")})
    edited.to_parquet(str(file))
    for words in (["run", "recipe.yaml"], ["train", "--config", "data.yaml"]):
        write("data.yaml", without="select push evaluate", train={"controls": None, "data": "run/selection"})
        line = refused(*words, "--out", "run" if words[0] == "run" else "other", *["--no-push"])
        assert "was changed after selection.json was written" in line


def test_two_of_one_name(here: Path) -> None:
    write(select={"method": "random"}, train={"max_steps": 1})
    assert "name random: a control has the adapter's name; set name: in" in refused(
        "run", "recipe.yaml", "--out", "run", "--no-push"
    )


SELECT = {"pool": "p", "target": ("a=x", "b=y"), "method": "mona", "method_option": {"metric": "cosine"}, "out": "o"}


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        ({"ratio": 0.1}, {"ratio": 0.1}),
        ({"k": 3}, {"k": 3}),
        ({"max_tokens": 99}, {"max_tokens": 99}),
        ({"threshold": 0.5}, {"k": 7}),  # scores of another method have another scale
        ({}, {}),
    ],
)
def test_a_control_picks_as_many_rows(budget: dict[str, Any], kept: dict[str, Any]) -> None:
    config = SelectConfig(**SELECT, **budget, seed=4, keep=("leak",), aggregate="max", push_to_hub="me/x", max_length=9)
    made = control_config(config, "random", Path("c"), picked=7)
    same = {"pool": "p", "target": ("a=x", "b=y"), "seed": 4, "keep": ("leak",), "max_length": 9}
    assert made == SelectConfig(method="random", out=Path("c"), **same, **kept)
    everything = control_config(config, "full", Path("c"), picked=7)
    assert everything == SelectConfig(method="full", out=Path("c"), **same)


def test_a_control_leaves_avoided_exemplars_out_and_avoids_nothing() -> None:
    config = SelectConfig(**SELECT, avoid=("c=z",), avoid_weight=0.5, k=3)
    made = control_config(config, "random", Path("c"), picked=7)
    assert made == SelectConfig(pool="p", target=("a=x", "b=y", "c=z"), method="random", out=Path("c"), k=3)


def test_names_of_data() -> None:
    assert named_specs([], "data") == {}
    assert named_specs(["a=x.jsonl", "folder/b.v2.jsonl", "org/c@main:config:split", "bundled:gsm8k"], "data") == {
        "a": "x.jsonl", "b": "folder/b.v2.jsonl", "c": "org/c@main:config:split", "gsm8k": "bundled:gsm8k",
    }  # fmt: skip


def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Signals that each pass over the pool computes, filled while a test runs."""
    seen: list[list[str]] = []
    before = NeuronFeatureExtractor.compute

    def compute(self: NeuronFeatureExtractor, prepared: Any, *rest: Any, **more: Any) -> Any:
        if len(prepared) > 20:  # the pool's; exemplars are fewer
            seen.append(sorted(signal.name for signal in self.computed))
        return before(self, prepared, *rest, **more)

    monkeypatch.setattr(NeuronFeatureExtractor, "compute", compute)
    return seen


@pytest.fixture
def text_signal() -> Iterator[None]:
    """A control that reads a signal: the mean hidden state's first number."""

    @register_method
    class First(Method):
        name, signals, needs_target = "first", ("hidden",), False

        def score(self, rows: Any, target: Any) -> np.ndarray:
            return rows.dense("hidden")[:, 0].astype(np.float64)

    yield
    METHODS.remove("first")


def test_a_run_reads_its_pool_once(here: Path, monkeypatch: pytest.MonkeyPatch, text_signal: None) -> None:
    write(train={"controls": ["first", "random"], "max_steps": 1}, without="push evaluate")
    seen = passes(monkeypatch)
    well("run", "recipe.yaml", "--out", "run")
    assert seen == [["hidden", "mona", "tokens"]]
    assert {path.name for path in Path("run").iterdir()} == {"selection", "controls", "adapters", "run.json"}
    for folder, method in (("selection", "mona"), ("controls/first", "first"), ("controls/random", "random")):
        words = [*SAME, "--method", method, "--target", "math=target.jsonl", "--k", "8", "--out", f"alone-{method}"]
        well("select", "--pool", "pool.jsonl", *words)
        alone, shared = (Selection.from_pretrained(where) for where in (f"alone-{method}", f"run/{folder}"))
        assert shared.scores.equals(alone.scores) and shared.dataset.to_dict() == alone.dataset.to_dict(), method


def test_a_killed_run_finishes_its_store(here: Path, monkeypatch: pytest.MonkeyPatch, text_signal: None) -> None:
    write(train={"controls": ["first"], "max_steps": 1}, without="push evaluate")
    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "finish", lambda *words, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call("run", "recipe.yaml", "--out", "run")
    seen = passes(monkeypatch)
    well("run", "recipe.yaml", "--out", "run")
    assert seen == [] and not Path("run/features").exists()


SAME = ["--model", "model", "--sae", "sae"]


# ------------------------------------------------------------------------------------------- the other commands
def test_evaluate_by_itself(again: Path) -> None:
    out = well("evaluate", "--model", "model", "--adapter", "mine=run/adapters/mona", "--data", "held=held.jsonl",
               "--data", "target.jsonl", "--out", "found")  # fmt: skip
    found = json.loads(Path("found/evaluation.json").read_text())
    value = {(row["model"], row["data"]): row["value"] for row in found["rows"]}
    assert list(value) == [(model, data) for model in ("base", "mine") for data in ("held", "target")]
    before = json.loads(Path("run/evaluation.json").read_text())["rows"]
    assert [value["base", "held"], value["mine", "held"]] == [before[0]["value"], before[1]["value"]]
    assert f"{value['mine', 'held']:.4f}" in out and Path("found/evaluation.png").exists()
    write("config.yaml", without="select train push", evaluate={"max_rows": 2, "max_length": 200})
    well("evaluate", "--config", "config.yaml", "--model", "model", "--out", "fewer")
    assert json.loads(Path("fewer/evaluation.json").read_text())["rows"][0]["rows"] == 2
    assert refused("evaluate", "--out", "none") == "error: --data: name held-out rows (--data) or tasks (--tasks)"
    line = refused("evaluate", "--adapter", "mine=run/adapters/mona", "--data", "held.jsonl", "--out", "none")
    assert "was trained on model at content:" in line and "not on hf_neuronselect-bundled at content:" in line
    assert not Path("none").exists()


def test_evaluate_on_tasks(again: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = ["--tasks", "mmlu_small", "--include-path", str(RECIPES / "lm_eval_tasks"), "--limit", "2"]
    out = well("evaluate", "--model", "model", "--adapter", "mine=run/adapters/mona", *tasks, "--out", "found")
    found = json.loads(Path("found/evaluation.json").read_text())
    assert {(row["model"], row["data"]) for row in found["rows"]} == {("base", "mmlu_small"), ("mine", "mmlu_small")}
    assert found["tasks"]["limit"] == 2 and found["tasks_table"] in out
    assert not Path("found/evaluation.png").exists()  # of losses, which were not asked for
    well("evaluate", "--model", "model", *tasks, "--out", "base")
    same = [row for row in found["rows"] if row["model"] == "base"]
    assert json.loads(Path("base/evaluation.json").read_text())["rows"] == same


def test_a_recipe_with_tasks(here: Path) -> None:
    pytest.importorskip("lm_eval")
    write(evaluate={"tasks": ["mmlu_small"], "include_path": str(RECIPES / "lm_eval_tasks"), "limit": 2, "max_rows": 3},
          train={"controls": None, "data": "pool.jsonl", "max_steps": 1, "name": "mine"},
          without="select push")  # fmt: skip
    out = well("run", "recipe.yaml", "--out", "run")
    card = Path("run/adapters/mine/README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert {result["dataset"]["name"] for result in metadata["model-index"][0]["results"]} == {"held", "mmlu_small"}
    assert "mmlu_small" in out and "held target_loss" in out and "held: target_loss" in card
    again = well("run", "recipe.yaml", "--out", "run")
    assert again.splitlines()[-12:] == out.splitlines()[-12:]


def test_export_for_trl(again: Path) -> None:
    out = well("export", "run/selection", "--format", "trl", "--base-model", "me/base")
    files = [Path(line) for line in out.splitlines()]
    assert files and all(file.is_file() for file in files) and {file.parent.name for file in files} == {"selection-trl"}
    assert any("me/base" in file.read_text() for file in files if file.suffix in (".yaml", ".yml"))


def test_push_by_itself(again: Path, hub: Hub, name: str) -> None:
    rows_repo, lora_repo = f"{name}-rows", f"{name}-lora"
    question = Selection.from_pretrained("run/selection").dataset[0]["messages"][0]["content"]
    url = well("push", "run/selection", rows_repo, "--private", "--no-examples", "--commit-message", "mine")
    assert url == f"{hub.endpoint}/datasets/me/{rows_repo}\n" and hub.repos["datasets", f"me/{rows_repo}"].private
    assert hub.history("datasets", f"me/{rows_repo}")[0].title == "mine"
    files = hub.files("datasets", f"me/{rows_repo}")
    assert question not in files["README.md"].decode() + files["report.html"].decode()
    assert load_dataset(f"me/{rows_repo}", split="train")[0]["messages"][0]["content"] == question

    assert well("push", "run/adapters/random", lora_repo) == f"{hub.endpoint}/me/{lora_repo}\n"
    url = well("push", "run/adapters/mona", lora_repo, "--create-pr")
    assert url == f"{hub.endpoint}/me/{lora_repo}/discussions/1\n"
    assert hub.files("models", f"me/{lora_repo}")[WEIGHTS] == weights(again / "run", "random")
    assert hub.files("models", f"me/{lora_repo}", "refs/pr/1")[WEIGHTS] == weights(again / "run")
    assert commits(hub, f"me/{rows_repo}", f"me/{lora_repo}") == [1, 1]
    assert "nothing that neuronselect writes" in refused("push", "model", f"{name}-x")


# -------------------------------------------------------------------------------------------- committed recipes
@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_a_committed_recipe_has_known_keys(path: Path) -> None:
    recipe = Recipe.read(path)
    assert recipe.select is None or recipe.select.push_to_hub is None
    assert recipe.select is not None or recipe.train.data or "--data" in path.read_text()
    for spec in named_specs(recipe.evaluate.data, "data").values():  # a file of this checkout, or an id
        assert (RECIPES.parent / spec).is_file() or not spec.startswith("recipes/")
    assert path.read_text().startswith("# ")


TRL = sorted((RECIPES / "trl").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {"tiny_mona.yaml"} <= {path.name for path in RECIPES.glob("*.yaml")} and TRL


def trl_reads(path: Path) -> Any:
    from trl.scripts.sft import make_parser

    return make_parser().parse_args_and_config(["--config", str(path), "--use_cpu"])


@pytest.mark.skipif(before("transformers", "5.23"), reason="has an older name for activation_checkpointing")
@pytest.mark.parametrize("path", TRL, ids=lambda path: path.name)
def test_a_committed_trl_recipe_has_trl_keys_only(path: Path, tmp_path: Path) -> None:
    script, training, model, _ = trl_reads(path)
    assert training.assistant_only_loss and model.use_peft and model.model_name_or_path and script.dataset_name
    assert model.lora_target_modules == "all-linear"
    (tmp_path / path.name).write_text(path.read_text() + "\ncontrols: [random]\n")
    with pytest.raises(ValueError, match="--controls"):
        trl_reads(tmp_path / path.name)
