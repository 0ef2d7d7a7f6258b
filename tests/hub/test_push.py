"""Every push and load of the package by the real clients against the local Hub: whole, in one commit, or one clear line."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import datasets.config
import evaluate
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset
from hub import TOKENS, Hub
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from peft import PeftModel
from safetensors.numpy import load_file
from tiny import ALL, make_extractor, rows
from transformers import AutoModelForCausalLM
from versions import before

from hf_neuronselect import FeatureLibrary, NeuronFeatureExtractor, NeuronSelector, Selection
from hf_neuronselect.cli import main as cli
from hf_neuronselect.core.configs import SelectConfig
from hf_neuronselect.core.errors import NeuronSelectError, NeuronSelectWarning
from hf_neuronselect.core.folders import DATA_FILE, FITTED
from hf_neuronselect.core.provenance import SelectionSummary, SourceRecord, TrainingRecord, plain
from hf_neuronselect.core.seals import encode
from hf_neuronselect.hub.push import check_write_access, push_folder
from hf_neuronselect.metrics import metric_path
from hf_neuronselect.pipelines.select import select
from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.selection.library import load_capability
from hf_neuronselect.store.store import FeatureStore, write_store
from hf_neuronselect.training.config import TrainConfig
from hf_neuronselect.training.sft import train_adapter

WRONG = "hf_wrong"
SELECTION = {"README.md", "selection.json", "scores.parquet", "report.html", DATA_FILE, *FITTED}


@pytest.fixture(autouse=True)
def nothing_left_over(hub: Hub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture) -> Iterator[None]:
    """Each test fires all of its faults, asks nothing the Hub does not know, and shows no token."""
    for name in ("hf_neuronselect", "huggingface_hub", "datasets"):
        caplog.set_level(logging.DEBUG, name)
    yield
    left, hub.faults[:] = list(hub.faults), []
    assert left == [] and hub.unknown == []
    said = "".join(capfd.readouterr()) + "".join(record.getMessage() for record in caplog.get_records("call"))
    assert not [token for token in (*TOKENS, WRONG) if token in said]


NUMBERS = count()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A repository of this test's own; its name has nothing of the parameters, some of which are tokens."""
    return f"me/{request.node.originalname.removeprefix('test_')}-{next(NUMBERS)}"


@pytest.fixture(scope="module")
def selector(extractor: NeuronFeatureExtractor, target: Dataset) -> NeuronSelector:
    return NeuronSelector("mona").fit({"math": target, "code": rows(5, seed=2)}, extractor=extractor)


@pytest.fixture(scope="module")
def selection(selector: NeuronSelector, pool: Dataset) -> Selection:
    return selector.select(pool, k=9, source=SourceRecord(id="pool.jsonl", commit="content:0"))


def few(k: int = 4, seed: int = 0, **pool_about: Any) -> Selection:
    """Some rows without a model."""
    return NeuronSelector("random", seed=seed).select(rows(30), k=k, source=SourceRecord(**pool_about))


def saved(folder: Path, **options: Any) -> Path:
    few(**options).save_pretrained(folder)
    return folder


def titles(hub: Hub, kind: str, name: str, revision: str = "main") -> list[str]:
    return [commit.title for commit in hub.history(kind, name, revision)]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def named(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    """The same with the repository's id in the card as it stands in a folder's."""
    card = re.sub(rf'("|`|capability:){name}\b(?!-)', r"\1path/or/id/of/this", files["README.md"].decode())
    return files | {"README.md": card.encode()}


def since(hub: Hub, start: int, word: str) -> list[str]:
    return [request for request in hub.requests[start:] if word in request]


def same_rows(found: Dataset, expected: Dataset) -> None:
    assert found.features == expected.features and found.to_dict() == expected.to_dict()


def same_selection(found: Selection, expected: Selection) -> None:
    same_rows(found.dataset, expected.dataset)
    assert found.indices.dtype == np.int64 and found.indices.tolist() == expected.indices.tolist()
    assert found.scores.equals(expected.scores)
    assert found.provenance == expected.provenance


def same_capability(found: NeuronSelector, expected: NeuronSelector) -> None:
    assert found.about() == expected.about() and list(found.targets) == list(expected.targets)
    for target, arrays in expected.targets.items():
        assert found.targets[target].keys() == arrays.keys()
        for key, array in arrays.items():
            assert found.targets[target][key].dtype == array.dtype
            assert np.array_equal(found.targets[target][key], array)
    for kind in ("rows", "questions"):
        assert getattr(found.leakage, kind) == getattr(expected.leakage, kind) != set()


@contextmanager
def refused(message: str, option: str = "repo") -> Iterator[None]:
    """One line that names the option and the mend, and no token."""
    with pytest.raises(NeuronSelectError) as caught:
        yield
    line = caught.value.as_command_line()
    assert message in line and caught.value.option == option and line.startswith(f"--{option}")
    assert line.isprintable() and not [token for token in (*TOKENS, WRONG) if token in line]


# -- round trips, each in one commit


def test_selection(hub: Hub, name: str, selection: Selection) -> None:
    assert selection.push_to_hub(name) == f"{hub.endpoint}/datasets/{name}"
    assert titles(hub, "datasets", name) == ["Selection(9 of 60 rows by 'mona')", "initial commit"]
    assert hub.files("datasets", name).keys() == {".gitattributes", *SELECTION}
    found = Selection.from_pretrained(name)
    same_selection(found, selection)
    same_rows(load_dataset(name, split="train"), selection.dataset)
    scores = load_dataset(name, "scores", split="train")
    assert scores.with_format("arrow")[:].equals(selection.scores)
    assert scores.num_rows == 60 and sum(scores["selected"]) == 9
    # What came from the Hub is pushed on as it is, but for the report: without the pool it lacks texts of near misses.
    found.push_to_hub(f"{name}-2")
    again, before = (named(hub.files("datasets", one), one) for one in (f"{name}-2", name))
    assert b"was not at hand" in again.pop("report.html") and b"was not at hand" not in before.pop("report.html")
    assert again == before


def test_selection_of_rows_without_messages(hub: Hub, name: str) -> None:
    pairs = Dataset.from_list([{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(12)])
    made = NeuronSelector("random").select(pairs, k=3)
    made.push_to_hub(name)
    loaded = load_dataset(name, split="train")
    assert loaded.remove_columns("messages").to_dict() == made.dataset.to_dict()
    assert [turns[1]["content"] for turns in loaded["messages"]] == made.dataset["completion"]
    assert Selection.from_pretrained(name).scores.equals(made.scores)


def test_capability(hub: Hub, name: str, selector: NeuronSelector, selection: Selection, pool: Dataset,
                    extractor: NeuronFeatureExtractor) -> None:  # fmt: skip
    assert selector.push_to_hub(name) == f"{hub.endpoint}/{name}"
    assert titles(hub, "models", name) == [repr(selector), "initial commit"]
    assert hub.files("models", name).keys() == {".gitattributes", "README.md", "config.json", "capability.safetensors"}
    found = NeuronSelector.from_pretrained(name)
    same_capability(found, selector)
    again = found.select(pool, k=9, extractor=extractor)
    same_rows(again.dataset, selection.dataset)
    assert again.scores.equals(selection.scores)


@pytest.fixture(scope="module")
def capabilities(extractor: NeuronFeatureExtractor, target: Dataset, selector: NeuronSelector) -> dict[str, Any]:
    others = {"hidden-math": NeuronSelector("hidden"), "code_only": NeuronSelector("mona", metric="cosine")}
    for made in others.values():
        made.fit(target, extractor=extractor)
    return {"all.v1": selector, **others}


def test_library_is_read_when_asked_and_of_one_commit(hub: Hub, name: str, capabilities: dict[str, Any]) -> None:
    library = FeatureLibrary(capabilities)
    assert library.push_to_hub(name) == f"{hub.endpoint}/{name}"
    assert titles(hub, "models", name) == [repr(library), "initial commit"]
    files = {f"capabilities/{n}/{f}" for n in capabilities for f in ("config.json", "capability.safetensors")}
    assert hub.files("models", name).keys() == {".gitattributes", "README.md", "library.json", *files}
    commit, start = hub.commit("models", name), len(hub.requests)
    found = FeatureLibrary.from_pretrained(name)
    about = found.about("all.v1")
    assert list(found) == sorted(capabilities) and about.files.keys() == {"capability.safetensors"}
    assert replace(about, files=None) == capabilities["all.v1"].about()
    assert {request.rpartition("/")[2] for request in hub.requests[start:]} == {"library.json"}
    start = len(hub.requests)
    same_capability(found["hidden-math"], capabilities["hidden-math"])
    asked = since(hub, start, "/resolve/")
    assert asked and all(f"/{commit}/capabilities/hidden-math/" in request for request in asked)
    # Somebody changes it: what is fetched later still is of the commit whose index was read.
    FeatureLibrary({"all.v1": capabilities["code_only"]}).push_to_hub(name)
    same_capability(found["all.v1"], capabilities["all.v1"])
    assert list(FeatureLibrary.from_pretrained(name)) == ["all.v1"]
    same_capability(FeatureLibrary.from_pretrained(name, revision=commit)["code_only"], capabilities["code_only"])
    with refused("unknown capability of this library; did you mean all.v1", "target"):
        found["all.v2"]


def test_library_grows_and_shrinks(hub: Hub, name: str, capabilities: dict[str, Any], target: Dataset,
                                   extractor: NeuronFeatureExtractor) -> None:  # fmt: skip
    FeatureLibrary(capabilities).push_to_hub(name)
    found = FeatureLibrary.from_pretrained(name)
    found["nait"] = NeuronSelector("nait").fit(target, extractor=extractor)
    start = len(hub.requests)
    found.push_to_hub(name, commit_message="one more")
    assert len(since(hub, start, "PUT /_lfs/")) == 1  # the new one's weights alone
    del found["hidden-math"]
    found.push_to_hub(name, commit_message="one less")
    assert titles(hub, "models", name)[:2] == ["one less", "one more"] and len(hub.history("models", name)) == 4
    files = hub.files("models", name)
    assert {path.split("/")[1] for path in files if "/" in path} == {"all.v1", "code_only", "nait"}
    assert b"hidden-math" not in files["README.md"] + files["library.json"]
    again = FeatureLibrary.from_pretrained(name)
    for key in found:
        same_capability(again[key], found[key])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_adapter(hub: Hub, name: str, tiny_folder: Path, tmp_path: Path) -> None:
    base, out = f"{name}-base", tmp_path / "adapter"
    hub.add("models", base, contents(tiny_folder / "model"))
    made = few(k=6)
    made.push_to_hub(f"{name}-rows")
    section = {"model": base, "max_steps": 2, "per_device_train_batch_size": 2, "max_length": 256, "lora_r": 2,
               "lora_target_modules": ["q_proj", "v_proj"], "disable_tqdm": True}  # fmt: skip
    told = made.provenance.summary(f"{name}-rows")
    record = train_adapter(made.dataset, out, TrainConfig.from_section(section), selection=told)
    assert push_folder(out, name) == f"{hub.endpoint}/{name}"
    assert titles(hub, "models", name) == ["adapter by hf_neuronselect", "initial commit"]
    files = hub.files("models", name)
    assert {"adapter_config.json", "adapter_model.safetensors", "training.json", "README.md"} <= files.keys()
    assert not [path for path in files if path.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert name in files["README.md"].decode()  # the card says how to load it
    assert {path: named(files, name)[path] for path in contents(out)} == contents(out)  # all of the folder
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (base, hub.commit("models", base))
    assert record.base_model == SourceRecord(id=base, commit=hub.commit("models", base))
    info = HfApi().model_info(name)
    assert info.card_data.base_model == base and info.card_data.datasets == [f"{name}-rows"]
    assert info.library_name == "peft"
    # The same adapter on the same base, from the folder and from the Hub.
    ids, logits = torch.tensor([[1, 5, 9, 33, 17]]), []
    for where in (str(out), name, None):
        model = AutoModelForCausalLM.from_pretrained(base)
        model = model if where is None else PeftModel.from_pretrained(model, where)
        with torch.no_grad():
            logits.append(model.eval()(ids).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    there = load_file(hf_hub_download(name, "adapter_model.safetensors"))
    here = load_file(out / "adapter_model.safetensors")
    assert there.keys() == here.keys() and all(np.array_equal(there[key], here[key]) for key in here)


def test_feature_store(hub: Hub, name: str, pool: Dataset, tiny_folder: Path, tmp_path: Path) -> None:
    extractor = make_extractor(tiny_folder, features=("mona",))
    about = {"id": "pool.jsonl", "commit": "content:0"}
    write_store(pool, extractor, tmp_path / "a", pool_about=about, shard_rows=16)
    assert push_folder(tmp_path / "a", name) == f"{hub.endpoint}/datasets/{name}"
    assert {path: data for path, data in hub.files("datasets", name).items() if path != ".gitattributes"} == contents(
        tmp_path / "a"
    )
    found = FeatureStore(snapshot_download(name, repo_type="dataset"))
    expected = FeatureStore(tmp_path / "a")
    same_rows(found.dataset(), expected.dataset())
    wanted = extractor.identities
    assert {signal: [identity] for signal, identity in wanted.items()} == found.identities
    assert found.cost(wanted) == expected.cost(wanted) and found.cost(wanted).passes
    # Fewer, larger shards: those that are no more go in the same commit.
    write_store(pool, extractor, tmp_path / "b", pool_about=about, shard_rows=32)
    push_folder(tmp_path / "b", name)
    assert hub.files("datasets", name).keys() == {".gitattributes", *contents(tmp_path / "b")}
    assert len([path for path in hub.files("datasets", name) if "/shard-" in path]) == 4  # two of each signal
    assert titles(hub, "datasets", name) == ["feature store by hf_neuronselect"] * 2 + ["initial commit"]
    pulled, made = (FeatureStore(path) for path in (snapshot_download(name, repo_type="dataset"), tmp_path / "b"))
    same_rows(pulled.dataset(), made.dataset())


def test_metric_is_a_space(hub: Hub) -> None:
    name, folder = "lab/mtld", metric_path("mtld")  # `evaluate` runs the file of the repository's name
    assert push_folder(folder, name) == f"{hub.endpoint}/spaces/{name}"
    info = HfApi().space_info(name)
    assert info.sdk == "gradio" and info.card_data["app_file"] == "app.py"
    files = hub.files("spaces", name)
    assert files.keys() == {".gitattributes", "README.md", "__init__.py", "app.py", "mtld.py", "requirements.txt"}
    assert len(hub.history("spaces", name)) == 2
    texts = ["of the people by the people for the people", "no word comes twice here"]
    found = evaluate.load(str(folder)).compute(data=texts)
    assert found["mtld"] == 7.0
    if not before("evaluate", "0.4.3"):  # it loads nothing from the Hub beside a current datasets
        assert evaluate.load(name).compute(data=texts) == found


def test_sae(hub: Hub, name: str, tiny_folder: Path, extractor: NeuronFeatureExtractor, target: Dataset) -> None:
    assert push_folder(tiny_folder / "sae", name) == f"{hub.endpoint}/{name}"
    assert titles(hub, "models", name) == ["SAE by hf_neuronselect", "initial commit"]
    options = {"features": ALL, "value_dtype": "float32"}
    found = NeuronFeatureExtractor.from_pretrained(str(tiny_folder / "model"), sae=name, **options)
    assert found.extraction.sae.commit == hub.commit("models", name)
    batch = {"messages": target["messages"]}
    there, here = found(batch), extractor(batch)
    assert there.keys() == here.keys() == {*there, "neuron_signals"}  # whose identity of mona has the SAE's commit
    for key, values in here.items():
        if key == "neuron_signals":
            continue
        assert all(np.array_equal(a, b) for a, b in zip(there[key], values, strict=True)), key


# -- one commit, or none


@pytest.mark.parametrize("what", ["selection", "capability", "library", "sae", "metric"])
def test_the_same_again_is_no_commit(hub: Hub, name: str, what: str, selection: Selection, tiny_folder: Path,
                                     capabilities: dict[str, Any]) -> None:  # fmt: skip
    pushes: dict[str, Callable[[], str]] = {
        "selection": lambda: selection.push_to_hub(name),
        "capability": lambda: capabilities["code_only"].push_to_hub(name),
        "library": lambda: FeatureLibrary(capabilities).push_to_hub(name),
        "sae": lambda: push_folder(tiny_folder / "sae", name),
        "metric": lambda: push_folder(metric_path("mtld"), name),
    }
    name = "me/mtld" if what == "metric" else name  # `evaluate` runs the file of the repository's name
    url = pushes[what]()
    kind = {"selection": "datasets", "metric": "spaces"}.get(what, "models")
    assert len(hub.history(kind, name)) == 2
    before = hub.files(kind, name)
    assert pushes[what]() == url
    assert hub.files(kind, name) == before
    assert len(hub.history(kind, name)) == 2


def test_a_push_of_the_pages_alone(hub: Hub, name: str) -> None:
    made = few()
    made.push_to_hub(name)
    before, start = hub.files("datasets", name), len(hub.requests)
    made.push_to_hub(name, examples=False, commit_message="no texts")
    after = hub.files("datasets", name)
    assert {path for path in after if after[path] != before.get(path)} == {"README.md", "report.html"}
    assert titles(hub, "datasets", name)[0] == "no texts" and len(hub.history("datasets", name)) == 3
    assert not since(hub, start, "PUT /_lfs/")


def test_a_smaller_selection_replaces_a_larger_one(hub: Hub, name: str, selection: Selection) -> None:
    selection.push_to_hub(name)
    other = few(seed=3)
    other.push_to_hub(name)
    assert len(hub.history("datasets", name)) == 3
    same_selection(Selection.from_pretrained(name), other)
    same_rows(load_dataset(name, split="train"), other.dataset)
    assert len(load_dataset(name, "scores", split="train")) == 30


def test_only_what_belongs_is_pushed_or_deleted(hub: Hub, name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "s")
    push_folder(folder, name)
    HfApi().create_commit(name, [CommitOperationAdd("theirs.txt", b"keep"), CommitOperationAdd("data/x.parquet", b"old")],
                          commit_message="by hand", repo_type="dataset")  # fmt: skip
    (folder / "thesis.txt").write_text("private")
    (folder / "data" / ".env").write_text("PASSWORD=1")
    push_folder(folder, name)
    assert hub.files("datasets", name).keys() == {".gitattributes", "theirs.txt", *SELECTION}
    assert len(hub.history("datasets", name)) == 4


# -- where to


def test_only_files_of_the_record_are_pushed_and_no_links(hub: Hub, name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "s")
    (tmp_path / "secret").write_text("swordfish")
    (folder / "data" / "extra.parquet").write_bytes((folder / "scores.parquet").read_bytes())
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.warns(NeuronSelectWarning, match="not pushed, since .*: data/extra.parquet, notes.txt; upload"):
        push_folder(folder, name)
    assert not {"data/extra.parquet", "notes.txt"} & set(hub.files("datasets", name))
    (folder / "report.html").unlink()
    (folder / "report.html").symlink_to(tmp_path / "secret")
    with pytest.raises(NeuronSelectError, match="report.html is a link"):
        push_folder(folder, name)
    assert b"swordfish" not in hub.files("datasets", name)["report.html"]


def test_private_message_and_own_namespace(hub: Hub, tmp_path: Path) -> None:
    folder = saved(tmp_path / "s")
    url = push_folder(folder, "plain-name-of-a-test", private=True, commit_message="as I say")
    assert url == f"{hub.endpoint}/datasets/me/plain-name-of-a-test"
    assert hub.repos["datasets", "me/plain-name-of-a-test"].private
    assert titles(hub, "datasets", "me/plain-name-of-a-test") == ["as I say", "initial commit"]
    assert push_folder(folder, "plain-name-of-a-test", private=True) == url  # it is private already
    with refused("no such path here and no such repository on the Hub, or it is private", "selection"):
        Selection.from_pretrained("me/plain-name-of-a-test", token="hf_other")
    assert len(Selection.from_pretrained("me/plain-name-of-a-test")) == 4


def test_organisation(hub: Hub, name: str) -> None:
    name = name.replace("me/", "lab/")
    assert few().push_to_hub(name) == f"{hub.endpoint}/datasets/{name}"
    assert len(Selection.from_pretrained(name)) == 4


@pytest.mark.parametrize("branch", ["wip", "feat/x"])
def test_branches(hub: Hub, name: str, branch: str) -> None:
    first, second = few(), few(seed=1)
    start = first.push_to_hub(name, revision=branch)
    assert start == f"{hub.endpoint}/datasets/{name}/tree/{branch}"
    assert titles(hub, "datasets", name) == ["initial commit"]
    assert len(hub.history("datasets", name, branch)) == 2
    second.push_to_hub(name, revision=branch)  # it is there now
    assert len(hub.history("datasets", name, branch)) == 3 and len(hub.history("datasets", name)) == 1
    same_selection(Selection.from_pretrained(name, revision=branch), second)
    same_rows(load_dataset(name, split="train", revision=branch), second.dataset)
    with refused("not a selection folder", "selection"):
        Selection.from_pretrained(name)
    with refused("the repository has no such revision", "selection"):
        Selection.from_pretrained(name, revision="nope")


def test_pull_request(hub: Hub, name: str) -> None:
    first, second = few(), few(seed=1)
    first.push_to_hub(name)
    before = hub.commit("datasets", name)
    assert second.push_to_hub(name, create_pr=True) == f"{hub.endpoint}/datasets/{name}/discussions/1"
    assert hub.commit("datasets", name) == before
    same_selection(Selection.from_pretrained(name), first)
    same_selection(Selection.from_pretrained(name, revision="refs/pr/1"), second)
    third = few(seed=2)
    third.push_to_hub(name, revision="refs/pr/1")  # onto the pull request that is there
    assert hub.commit("datasets", name) == before and len(hub.history("datasets", name, "refs/pr/1")) == 4
    same_selection(Selection.from_pretrained(name, revision="refs/pr/1"), third)
    HfApi().merge_pull_request(name, 1, repo_type="dataset")
    same_selection(Selection.from_pretrained(name), third)


def test_what_is_no_branch(hub: Hub, name: str) -> None:
    few().push_to_hub(name)
    HfApi().create_tag(name, tag="v1", repo_type="dataset")
    for revision in ("v1", hub.commit("datasets", name)):
        with refused("the repository has no such revision; look at its branches"):
            few(seed=1).push_to_hub(name, revision=revision)
    assert len(hub.history("datasets", name)) == 2


def test_pull_request_by_somebody_else(hub: Hub, name: str) -> None:
    few().push_to_hub(name)
    url = few(seed=1).push_to_hub(name, create_pr=True, token="hf_other")
    assert url.endswith("/discussions/1")
    assert hub.history("datasets", name, "refs/pr/1")[0].author == "other"


# -- refusals


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (False, None, "the Hub answered 401; log in with `hf auth login` or set HF_TOKEN to a token it knows"),
        (WRONG, None, "the Hub answered 401; log in with `hf auth login`"),
        ("hf_read", None, "the Hub answered 403; the token may not write it"),
        ("hf_secret", "other/rows", "the Hub answered 403; the token may not write it"),
        ("hf_secret", "me/a/b", "a Hub id (org/name)"),
        ("hf_secret", "me/a b", "a Hub id (org/name)"),
        ("hf_secret", "-me-", "a Hub id (org/name)"),
    ],
)
def test_who_may_not(hub: Hub, name: str, token: Any, repo: str | None, message: str) -> None:
    made = set(hub.repos)
    with refused(message):
        few().push_to_hub(repo or name, token=token)
    assert set(hub.repos) == made


def test_no_token_at_all(hub: Hub, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with refused("the Hub answered 401; log in with `hf auth login` or set HF_TOKEN"):
        few().push_to_hub(name)
    with refused("no token: run `hf auth login` or set HF_TOKEN"):
        few().push_to_hub(name, token=True)
    with refused("no token: run `hf auth login` or set HF_TOKEN", "push"):
        check_write_access()
    assert ("datasets", name) not in hub.repos


def test_write_access_is_asked_beforehand(hub: Hub) -> None:
    assert check_write_access() == "me" and check_write_access("hf_other") == "other"
    with refused("the token can only read; make one that can write", "push"):
        check_write_access("hf_read")
    with refused("the Hub answered 401; log in", "push"):
        check_write_access(WRONG)


@pytest.mark.parametrize(("token", "private", "message"), [
    ("hf_read", False, "the Hub answered 403; the token may not write it"),
    ("hf_other", False, "the Hub answered 403; the token may not write it"),
    ("hf_other", True, "403; the token may not write it"),
    (WRONG, False, "the Hub answered 401; log in"),
])  # fmt: skip
def test_who_may_not_change_what_is_there(hub: Hub, name: str, token: str, private: bool, message: str) -> None:
    few().push_to_hub(name, private=private)
    before = hub.commit("datasets", name)
    with refused(message):
        few(seed=1).push_to_hub(name, token=token)
    assert hub.commit("datasets", name) == before


@pytest.mark.parametrize(("status", "message"), [
    (409, "the Hub answered 409; the repository is being changed; try again"),
    (412, "the Hub answered 412; somebody pushed in the meantime; push again"),
    (429, "the Hub answered 429; try again later"),
    (500, "the Hub answered 500; try again later"),
    (503, "the Hub answered 503; try again later"),
])  # fmt: skip
def test_a_refused_commit(hub: Hub, name: str, status: int, message: str) -> None:
    hub.fault("POST", f"{name}/commit/main", status=status)
    with refused(message):
        few().push_to_hub(name)
    assert titles(hub, "datasets", name) == ["initial commit"]
    few().push_to_hub(name)
    same_selection(Selection.from_pretrained(name), few_as_saved(name))


def few_as_saved(name: str) -> Selection:
    """``few()`` with the timing and the hashes of the one that was pushed."""
    made = few()
    pushed = Selection.from_pretrained(name).provenance
    made.provenance = replace(
        made.provenance, **{key: getattr(pushed, key) for key in ("timing", "cost", "files", "pool")}
    )
    return made


def test_somebody_pushes_in_the_meantime(hub: Hub, name: str) -> None:
    few().push_to_hub(name)
    theirs = few(seed=1)

    def push() -> None:
        theirs.push_to_hub(name, commit_message="theirs")

    hub.fault("POST", f"{name}/commit/main", call=push)
    with refused("the Hub answered 412; somebody pushed in the meantime; push again"):
        few(seed=2).push_to_hub(name)
    assert titles(hub, "datasets", name)[0] == "theirs"
    same_selection(Selection.from_pretrained(name), theirs)
    ours = few(seed=2)
    ours.push_to_hub(name)
    same_selection(Selection.from_pretrained(name), ours)


@contextmanager
def lasting(hub: Hub, *what: Any, **how: Any) -> Iterator[None]:
    """A fault that is met, and never used up."""
    fault = hub.fault(*what, **how, times=10**6)
    try:
        yield
    finally:
        hub.faults.remove(fault)
    assert fault.times < 10**6


@pytest.mark.parametrize(("how", "message"), [
    ({"status": 503}, "the Hub answered 503; try again later"),
    ({"cut_after": 100}, "the Hub cannot be reached"),
])  # fmt: skip
def test_an_upload_that_fails_for_good(hub: Hub, name: str, how: dict[str, int], message: str,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client waits between its tries
    with lasting(hub, "PUT", f"/_lfs/datasets/{name}/", **how), refused(message):
        few().push_to_hub(name)
    assert titles(hub, "datasets", name) == ["initial commit"]
    few().push_to_hub(name)
    assert len(Selection.from_pretrained(name)) == 4


def test_an_lfs_batch_that_is_refused(hub: Hub, name: str) -> None:
    hub.fault("POST", f"{name}.git/info/lfs/objects/batch", status=403)
    with refused("the Hub answered 403; the token may not write it"):
        few().push_to_hub(name)


def test_a_lost_answer(hub: Hub, name: str) -> None:
    """The Hub has it, and the client cannot know: pushed again, nothing is twice."""
    hub.fault("POST", f"{name}/commit/main", lost=True)
    made = few()
    with refused("the Hub cannot be reached"):
        made.push_to_hub(name)
    made.push_to_hub(name)
    assert len(hub.history("datasets", name)) == 2
    same_selection(Selection.from_pretrained(name), made)


@pytest.mark.parametrize("how", ["offline", "lost", "id"])
def test_a_push_is_not_told_what_is_for_loading(hub: Hub, name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        message = "HF_HUB_OFFLINE is set"
    elif how == "lost":
        hub.fault("POST", f"{name}/commit/main", lost=True)
        message = "the Hub cannot be reached"
    else:
        name, message = "me/a b", "org/name"
    with pytest.raises(NeuronSelectError) as caught:
        few().push_to_hub(name)
    assert message in str(caught.value)
    for other in ("path", "in the cache", "what is cached", "work offline"):
        assert other not in str(caught.value)


def test_foreign_content(hub: Hub, name: str, selector: NeuronSelector, tmp_path: Path) -> None:
    hub.add("datasets", name, {"notes.txt": b"mine", "train.csv": b"a,b\n"})
    before = hub.files("datasets", name)
    with refused("the repository holds something else (notes.txt, train.csv), not a selection; name another"):
        few().push_to_hub(name)
    with refused("the repository holds something else"):
        few().push_to_hub(name, create_pr=True)
    assert hub.files("datasets", name) == before and len(hub.history("datasets", name)) == 2
    # Something of ours, but of another kind.
    FeatureLibrary({"a": selector}).push_to_hub(name)
    with refused("not a capability; name another"):
        selector.push_to_hub(name)
    # An empty repository, or one with a card alone, is free.
    hub.add("datasets", f"{name}-card", {"README.md": b"# Soon\n"})
    few().push_to_hub(f"{name}-card")
    assert len(Selection.from_pretrained(f"{name}-card")) == 4


def test_a_refused_push_leaves_no_branch(hub: Hub, name: str) -> None:
    hub.add("datasets", name, {"notes.txt": b"mine"})
    with refused("the repository holds something else"):
        few().push_to_hub(name, revision="new")
    assert set(hub.repos["datasets", name].refs) == {"refs/heads/main"}


def test_somebodys_space_is_not_a_metric(hub: Hub, name: str) -> None:
    with refused("name it answer_match"):
        push_folder(metric_path("answer_match"), name)
    name = "me/answer_match"
    hub.add("spaces", name, {"app.py": b"import gradio", "model.py": b"x = 1", "README.md": b"---\nsdk: gradio\n---\n"})
    before = hub.files("spaces", name)
    with refused("the repository holds something else"):
        push_folder(metric_path("answer_match"), name)
    assert hub.files("spaces", name) == before


def test_folders_that_are_not_ours(hub: Hub, name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with refused("nothing that neuronselect writes (selection, feature library, capability", "folder"):
        push_folder(tmp_path / "mine", name)
    with refused("no such folder", "folder"):
        push_folder(tmp_path / "nowhere", name)
    assert not [repo for _, repo in hub.repos if repo == name]


@pytest.mark.parametrize("how", ["rows", "scores", "record", "gone", "no record"])
def test_a_folder_edited_by_hand(hub: Hub, name: str, how: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "s")
    data, record, option = folder / DATA_FILE, folder / "selection.json", "selection"
    message = "was changed after selection.json was written (4 rows in data/, 4 by selection.json); select again"
    if how == "rows":
        pq.write_table(pq.read_table(data).slice(0, 3), data)
        message = f"{DATA_FILE} was changed after selection.json was written (3 rows in data/, 4 by selection.json)"
    elif how == "scores":
        pq.write_table(pq.read_table(folder / "scores.parquet").slice(0, 3), folder / "scores.parquet")
    elif how == "record":
        record.write_text(record.read_text()[:-40])
        message = "not a selection folder (Input data was truncated"
    elif how == "gone":
        data.unlink()
        message = f"{DATA_FILE} is missing, which selection.json lists; select again"
    else:
        record.unlink()
        message, option = "nothing that neuronselect writes", "folder"
    with refused(message, option):
        push_folder(folder, name)
    assert ("datasets", name) not in hub.repos
    with refused(message if option == "selection" else "not a selection folder", "selection"):
        Selection.from_pretrained(folder)


def test_a_repository_edited_by_hand(hub: Hub, name: str, tmp_path: Path) -> None:
    few().push_to_hub(name)
    few(seed=5).save_pretrained(tmp_path / "other")
    HfApi().upload_file(path_or_fileobj=tmp_path / "other" / DATA_FILE, path_in_repo=DATA_FILE, repo_id=name,
                        repo_type="dataset")  # fmt: skip
    with refused(f"{DATA_FILE} was changed after selection.json was written", "selection"):
        Selection.from_pretrained(name)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_damaged_record(hub: Hub, name: str, text: str, tmp_path: Path) -> None:
    for marker, file in (("adapter_config.json", "training.json"), ("manifest.json", "manifest.json")):
        folder = tmp_path / marker
        folder.mkdir()
        (folder / marker).write_text("{}")
        (folder / file).write_bytes(text.encode("latin-1"))
        with refused(file, "folder"):
            push_folder(folder, name)
    assert not [repo for _, repo in hub.repos if repo == name]


def test_loading_what_is_not_there(hub: Hub, name: str) -> None:
    for load, option in ((Selection, "selection"), (NeuronSelector, "target"), (FeatureLibrary, "target")):
        with refused("no such path here and no such repository on the Hub", option):
            load.from_pretrained(name)
        with refused("neither a path that exists nor a Hub id", option):
            load.from_pretrained("./no/such/folder")
    hub.add("datasets", name, {"a.txt": b"a"})
    hub.add("models", name, {"a.txt": b"a", "library.json": b"[1]"})
    with refused("not a selection folder", "selection"):
        Selection.from_pretrained(name)
    with refused("not a capability", "target"):
        NeuronSelector.from_pretrained(name)
    with refused("not a feature library", "target"):
        FeatureLibrary.from_pretrained(name)


# -- failures in the middle


def test_server_errors_in_an_upload_are_survived(hub: Hub, name: str) -> None:
    for where in (f"PUT /_lfs/datasets/{name}/", f"POST /datasets/{name}.git/info/lfs/objects/batch"):
        method, path = where.split(" ")
        hub.fault(method, path, status=503)
    made = few()
    made.push_to_hub(name)
    assert len(hub.history("datasets", name)) == 2
    same_selection(Selection.from_pretrained(name), made)


TRIES_AGAIN = pytest.mark.skipif(before("huggingface_hub", "1.21"), reason="does not try again after a cut")


@TRIES_AGAIN
def test_a_connection_cut_in_an_upload_is_survived(hub: Hub, name: str, selection: Selection) -> None:
    hub.fault("PUT", f"/_lfs/datasets/{name}/", cut_after=500)
    selection.push_to_hub(name)
    assert len(hub.history("datasets", name)) == 2
    same_selection(Selection.from_pretrained(name), selection)


@TRIES_AGAIN
@pytest.mark.parametrize("how", ["package", "datasets"])
def test_a_connection_cut_in_a_download_is_survived(hub: Hub, name: str, how: str, selection: Selection) -> None:
    selection.push_to_hub(name)
    hub.fault("GET", f"{name}/resolve/.*/{DATA_FILE}", cut_after=500)
    if how == "package":
        same_selection(Selection.from_pretrained(name), selection)
    else:
        same_rows(load_dataset(name, split="train"), selection.dataset)


def test_downloads_cut_for_good(hub: Hub, name: str, selection: Selection, selector: NeuronSelector,
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(time, "sleep", lambda _: None)
    selection.push_to_hub(name)
    selector.push_to_hub(name)
    for load, kind, file, option in ((Selection, "datasets/", DATA_FILE, "selection"),
                                     (NeuronSelector, "", "capability.safetensors", "target")):  # fmt: skip
        with lasting(hub, "GET", f"^/{kind}{name}/resolve/.*/{file}", cut_after=0):
            with refused("the Hub cannot be reached", option):
                load.from_pretrained(name)
    same_selection(Selection.from_pretrained(name), selection)
    same_capability(NeuronSelector.from_pretrained(name), selector)


PUSH = "import sys; from hf_neuronselect.hub.push import push_folder; push_folder(sys.argv[1], sys.argv[2])"


def test_a_push_that_is_killed_leaves_nothing_visible(hub: Hub, name: str, tmp_path: Path) -> None:
    before, after = few(), few(seed=1)
    before.push_to_hub(name)
    after.save_pretrained(tmp_path / "s")
    commit = hub.commit("datasets", name)
    child = subprocess.Popen([sys.executable, "-c", PUSH, str(tmp_path / "s"), name])

    def kill() -> None:
        os.kill(child.pid, 9)
        child.wait()

    # The files are up; of the commit, a beginning.
    hub.fault("POST", f"{name}/commit/main", call=kill, cut_after=40)
    child.wait(timeout=120)
    # Rows and scores of both; their fitted capabilities hold nothing and are one file.
    assert child.returncode == -9 and len(hub.repos["datasets", name].lfs) == 5
    assert hub.commit("datasets", name) == commit
    same_selection(Selection.from_pretrained(name), before)
    start = len(hub.requests)
    push_folder(tmp_path / "s", name)
    assert not since(hub, start, "PUT /_lfs/")  # they need not be sent again
    assert len(hub.history("datasets", name)) == 3
    same_selection(Selection.from_pretrained(name), after)


# -- privacy


@pytest.mark.parametrize("restricted", ["private", "gated"])
def test_rows_of_a_restricted_source_are_pushed_private(hub: Hub, name: str, restricted: str, tmp_path: Path) -> None:
    made = few(id="me/secret", commit="0" * 40, restricted=restricted)
    made.push_to_hub(name)
    assert hub.repos["datasets", name].private
    with refused(f"the rows come from me/secret ({restricted}); leave private away, or say allow_public", "private"):
        made.push_to_hub(f"{name}-2", private=False)
    assert ("datasets", f"{name}-2") not in hub.repos
    made.push_to_hub(f"{name}-3", private=False, allow_public=True)
    assert not hub.repos["datasets", f"{name}-3"].private
    # What was loaded again, from the Hub or a folder, still is restricted.
    Selection.from_pretrained(name).push_to_hub(f"{name}-4")
    made.save_pretrained(tmp_path / "s")
    push_folder(tmp_path / "s", f"{name}-5")
    assert hub.repos["datasets", f"{name}-4"].private and hub.repos["datasets", f"{name}-5"].private
    # A public repository is refused, also for a pull request, and untouched.
    hub.create("datasets", f"{name}-6")
    for options in ({}, {"create_pr": True}, {"revision": "main"}):
        with refused("the repository is public already; make it private in its settings, or name another"):
            made.push_to_hub(f"{name}-6", **options)
    assert titles(hub, "datasets", f"{name}-6") == ["initial commit"]


def test_an_adapter_or_a_store_of_restricted_rows_is_pushed_private(hub: Hub, name: str, tmp_path: Path) -> None:
    pool = SourceRecord(id="me/secret", commit="0" * 40, restricted="private")
    trained = TrainingRecord(name="a", base_model=SourceRecord(id="b"), selection=SelectionSummary(pool=pool))
    for kind, marker, file, content in (
        ("models", "adapter_config.json", "training.json", trained),
        ("datasets", "manifest.json", "manifest.json", {"pool": plain(pool), "rows": 0, "shard_rows": 1}),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / marker).write_text("{}")
        (folder / file).write_text(encode(content))
        push_folder(folder, name)
        assert hub.repos[kind, name].private, kind
        with refused("come from me/secret (private)", "private"):
            push_folder(folder, f"{name}-2", private=False)


def test_private_is_not_forgotten_for_a_public_repository(hub: Hub, name: str) -> None:
    few().push_to_hub(name)
    with refused("the repository is public already"):
        few(seed=1).push_to_hub(name, private=True)
    assert len(hub.history("datasets", name)) == 2


def test_without_examples_no_text_is_shown(hub: Hub, name: str) -> None:
    made = few()
    made.push_to_hub(name, examples=False)
    made.push_to_hub(f"{name}-with")
    texts = [turn["content"] for turns in made.dataset["messages"] for turn in turns]
    words = [word for text in texts for word in re.findall(r"#\S+", text)]  # each row's own
    assert len(words) >= 4
    for page in ("README.md", "report.html"):
        bare, full = (hub.files("datasets", repo)[page].decode() for repo in (name, f"{name}-with"))
        assert not [word for word in words if word in bare]
        assert [word for word in words if word in full]
    same_rows(load_dataset(name, split="train"), made.dataset)


def test_terms_of_a_source_come_along(hub: Hub, name: str) -> None:
    """From a source on the Hub to the card of what was selected from it."""
    rows(20).to_parquet(buffer := io.BytesIO())
    files = {"data/train-00000-of-00001.parquet": buffer.getvalue()}
    hub.add("datasets", f"{name}-mit", {**files, "README.md": b"---\nlicense: mit\n---\n# Rows\n"})
    hub.add("datasets", f"{name}-none", files)
    hub.add("datasets", f"{name}-private", files, private=True)
    hub.add("datasets", f"{name}-gated", files)
    hub.repos["datasets", f"{name}-gated"].gated = "auto"
    expected = {
        "mit": {"license": "mit"},
        "none": {},
        "private": {"restricted": "private"},
        "gated": {"restricted": "gated"},
    }
    for kind, terms in expected.items():
        loaded = load_rows(f"{name}-{kind}")
        source = {"id": f"{name}-{kind}", "commit": hub.commit("datasets", f"{name}-{kind}"), "config": None}
        assert loaded.about == {**source, "split": "train", **terms}
        made = NeuronSelector("random").select(loaded.data, k=3, source=loaded.source)
        made.push_to_hub(f"{name}-{kind}-3")
        info = HfApi().dataset_info(f"{name}-{kind}-3")
        assert info.private == ("restricted" in terms)
        assert info.card_data.get("license") == terms.get("license")
        assert info.card_data.source_datasets == [f"{name}-{kind}"]
        text = hub.files("datasets", f"{name}-{kind}-3")["README.md"].decode()
        said = "The pool states `mit`" if "license" in terms else "The pool states no licence."
        assert said in text
        # Rows of rows: the first source's terms go on holding.
        again = load_rows(f"{name}-{kind}-3")
        assert again.about.get("license") == terms.get("license")
        assert ("restricted" in again.about) == ("restricted" in terms)


def test_a_store_of_rows_from_the_hub_is_read_offline(
    hub: Hub, name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(20).to_parquet(tmp_path / "rows.parquet")
    hub.add("datasets", name, {"train.parquet": (tmp_path / "rows.parquet").read_bytes()})
    loaded = load_rows(name)
    extractor = make_extractor(tiny_folder, features=("mona",))
    write_store(loaded.data, extractor, tmp_path / "store", pool_about=loaded.about)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    again = load_rows(name)
    assert again.about["commit"] == loaded.about["commit"]
    stored = FeatureStore(tmp_path / "store")
    assert len(stored.dataset()) == len(NeuronSelector("longest").select(again.data, features=stored, ratio=1.0)) == 20


@pytest.mark.parametrize("way", ["whole", "filtered"])
def test_rows_loaded_by_datasets_keep_their_terms(hub: Hub, name: str, way: str, tmp_path: Path) -> None:
    """Selected in Python, where no one said where the rows come from: it is asked of the Hub when they are pushed."""
    rows(20).to_parquet(tmp_path / "rows.parquet")
    files = {"train.parquet": (tmp_path / "rows.parquet").read_bytes()}
    for kind, why in (("open", None), ("private", "private"), ("gated", "gated")):
        source = f"{name}-{kind}"
        hub.add("datasets", source, files, private=kind == "private")
        data = load_dataset(source, split="train")
        hub.repos["datasets", source].gated = kind == "gated"
        made = NeuronSelector("random").select(data if way == "whole" else data.select(range(15)), k=3)
        made.push_to_hub(f"{source}-3")
        assert hub.repos["datasets", f"{source}-3"].private == (why is not None)
        if why:
            with refused(f"the rows come from {source} ({why}); leave private away", "private"):
                made.push_to_hub(f"{source}-4", private=False)
        assert made.provenance.pool.origin.commit == hub.commit("datasets", source)


def test_a_source_with_capitals_is_named_as_it_is(hub: Hub, name: str, tmp_path: Path) -> None:
    rows(20).to_parquet(tmp_path / "rows.parquet")
    source = f"{name}-OpenRows"
    hub.add("datasets", source, {"train.parquet": (tmp_path / "rows.parquet").read_bytes()})
    made = NeuronSelector("random").select(load_dataset(source, split="train"), k=3)
    assert made.provenance.pool.id == source
    made.push_to_hub(f"{name}-3")
    assert not hub.repos["datasets", f"{name}-3"].private


@pytest.mark.parametrize("pushed", [True, False])
def test_the_command_in_a_card_makes_the_selection_again(
    hub: Hub, name: str, pushed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool by its id and commit; in the place of the local exemplars, the target that the selection holds."""
    rows(30).to_json(tmp_path / "rows.jsonl")
    hub.add("datasets", f"{name}-pool", {"train.jsonl": (tmp_path / "rows.jsonl").read_bytes()})
    rows(6, seed=3).to_json(tmp_path / "mine.jsonl")
    made = select(
        SelectConfig(pool=f"{name}-pool", target=(f"t={tmp_path / 'mine.jsonl'}",), k=4, layer=2, out=tmp_path / "sel",
                     method="nait")
    )  # fmt: skip
    if pushed:
        push_folder(tmp_path / "sel", name)
    else:  # the pool moves on, the command does not
        more = CommitOperationAdd("more.jsonl", b'{"messages": []}\n')
        HfApi().create_commit(f"{name}-pool", [more], repo_type="dataset", commit_message="more")
    card = (
        hub.files("datasets", name)["README.md"] if pushed else (tmp_path / "sel" / "README.md").read_bytes()
    ).decode()
    here = name if pushed else "path/or/id/of/this"
    assert "- exemplars of t: `mine.jsonl`" in card and f"give `--target capability:{here}` in their place" in card
    (block,) = re.findall(r"```bash\n(neuronselect select .*?)```", card, re.DOTALL)
    words = shlex.split(
        block.replace("\\\n", " ").replace("t=mine.jsonl", f"capability:{name if pushed else tmp_path / 'sel'}")
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    again = Selection.from_pretrained("selected")
    same_rows(again.dataset, made.dataset)
    assert again.provenance.capability is not None and again.provenance.capability.id == (name if pushed else "sel")


def test_a_model_with_the_name_of_a_selection_is_not_taken_for_it(hub: Hub, name: str, selection: Selection) -> None:
    selection.push_to_hub(name)
    hub.add("models", name, {"adapter_config.json": b"{}", "config.json": b"{}"})
    found = load_capability(name)
    assert found.targets.keys() == {"math", "code"} and found.capability.commit == hub.commit("datasets", name)
    assert load_capability(f"{name}@{found.capability.commit}").capability == found.capability
