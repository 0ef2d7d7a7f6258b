"""The test Hub does what a Hub does: the real clients push to it and load from it, and it fails when told to."""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from families import tiny_model, tiny_tokenizer
from hub import Hub, card, running
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    HfFileSystem,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from versions import before

httpx: Any = importlib.import_module(type(get_session()).__module__.split(".")[0])  # the clients' own: httpx or httpx2

ASKS_US = pytest.mark.skipif(before("huggingface_hub", "2.2"), reason="cards are checked at the public Hub")
TRIES_AGAIN = pytest.mark.skipif(before("huggingface_hub", "1.21"), reason="does not try again after a cut")
CARD = b"---\nlicense: apache-2.0\ntags:\n- made-here\n---\n# A card\n"


@pytest.fixture(autouse=True)
def nothing_left_over(hub: Hub) -> Iterator[None]:
    """Each test fires all of its faults, and asks nothing the Hub does not know."""
    yield
    left, hub.faults[:] = list(hub.faults), []
    assert left == [] and hub.unknown == []


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return "me/" + re.sub(r"\W+", "-", request.node.name).strip("-")


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, data)


# -- round trips of each library


def test_dataset_round_trip(hub: Hub, name: str) -> None:
    made = rows(30)
    made.push_to_hub(name)
    assert "data/train-00000-of-00001.parquet" in hub.files("datasets", name)
    loaded = load_dataset(name, split="train")
    assert loaded.to_dict() == made.to_dict() and loaded.features == made.features
    streamed = load_dataset(name, split="train", streaming=True)
    assert list(streamed) == list(made)
    fewer = made.select(range(7))
    fewer.push_to_hub(name, "small", split="test", revision="try", num_shards=2)
    assert load_dataset(name, "small", split="test", revision="try").to_dict() == fewer.to_dict()
    with pytest.raises(ValueError, match="small"):
        load_dataset(name, "small", split="test", revision="main")


def test_model_and_tokenizer_round_trip(hub: Hub, name: str) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.push_to_hub(name)
    tokenizer.push_to_hub(name)
    loaded = AutoModelForCausalLM.from_pretrained(name)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    text = "add two numbers"
    assert AutoTokenizer.from_pretrained(name)(text)["input_ids"] == tokenizer(text)["input_ids"]
    info = HfApi().model_info(name)
    assert info.config["model_type"] == "llama" and info.sha == hub.commit("models", name)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_adapter_round_trip(hub: Hub, name: str, tiny_folder: Path) -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder / "model"), config).eval()
    tuned.push_to_hub(name)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder / "model"), name).eval()
    ids = torch.tensor([[1, 5, 9, 3]])
    with torch.no_grad():
        found, expected = loaded(ids).logits, tuned(ids).logits
        plain = loaded.unload()(ids).logits
    assert torch.equal(found, expected) and not torch.equal(found, plain)


@ASKS_US
def test_a_metric_is_pushed_into_the_card(hub: Hub, name: str) -> None:
    hub.add("models", name, {"README.md": CARD})
    hub.add("datasets", name, {"README.md": CARD})
    evaluate.push_to_hub(model_id=name, task_type="text-generation", dataset_type=name, dataset_name="some rows",
                         metric_type="accuracy", metric_name="Accuracy", metric_value=0.75)  # fmt: skip
    data, errors, _ = card(hub.files("models", name)["README.md"].decode())
    assert errors == [] and data["license"] == "apache-2.0"
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75


# -- repositories and rights


def test_repositories_are_made_moved_listed_and_deleted(hub: Hub, api: HfApi, name: str) -> None:
    url = api.create_repo(name, repo_type="dataset")
    assert url == f"{hub.endpoint}/datasets/{name}" and url.repo_id == name
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(name, repo_type="dataset")
    assert status(caught) == 409
    assert api.create_repo(name, repo_type="dataset", exist_ok=True).repo_id == name
    assert [c.title for c in api.list_repo_commits(name, repo_type="dataset")] == ["initial commit"]
    assert api.list_repo_files(name, repo_type="dataset") == [".gitattributes"]
    api.create_repo(name + "-space", repo_type="space", space_sdk="static")
    assert api.space_info(name + "-space").sdk == "static"
    api.create_repo("lab/" + name.split("/")[1])  # of an organisation the user is in
    with pytest.raises(HfHubHTTPError) as caught:
        api.move_repo(name, name + "-space", repo_type="model")
    assert isinstance(caught.value, RepositoryNotFoundError)
    api.move_repo(name, name + "-moved", repo_type="dataset")
    assert not api.repo_exists(name, repo_type="dataset") and api.repo_exists(name + "-moved", repo_type="dataset")
    word = name.split("/")[1]
    assert [found.id for found in api.list_datasets(author="me", search=word)] == [name + "-moved"]
    assert not list(api.list_datasets(author="other", search=word))
    api.delete_repo(name + "-moved", repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info(name + "-moved")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo(name + "-moved", repo_type="dataset")
    api.delete_repo(name + "-moved", repo_type="dataset", missing_ok=True)


def test_listings_come_in_pages(hub: Hub, api: HfApi, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "page", 2)
    for part in "abc":
        hub.add("models", f"{name}-{part}", {"README.md": CARD})
    assert {m.id for m in api.list_models(search=name, filter="made-here")} == {f"{name}-{part}" for part in "abc"}
    assert len(list(api.list_models(search=name, limit=1))) == 1
    hub.add("models", name, {f"d/{n}.txt": b"%d" % n for n in range(5)})
    found = api.list_repo_tree(name, recursive=True, expand=True)
    assert [f.path for f in found] == [".gitattributes", "d", *(f"d/{n}.txt" for n in range(5))]
    for n in range(3):
        api.upload_file(path_or_fileobj=b"new%d" % n, path_in_repo="new", repo_id=name, commit_message=f"n{n}")
    titles = [commit.title for commit in api.list_repo_commits(name)]
    assert titles == ["n2", "n1", "n0", "Add files", "initial commit"]
    assert next(iter(api.list_repo_tree(name, "d", expand=True))).last_commit.title == "Add files"
    for n in range(3):
        api.create_discussion(name, f"number {n}")
    assert [d.num for d in api.get_repo_discussions(name)] == [3, 2, 1]


def test_private_repositories_are_seen_by_their_owner_only(hub: Hub, api: HfApi, name: str, tmp_path: Path) -> None:
    hub.add("models", name, {"a.txt": b"secret"}, private=True)
    hub.add("models", name + "-open", {"a.txt": b"open"})
    assert api.model_info(name).private and Path(hf_hub_download(name, "a.txt")).read_bytes() == b"secret"
    for token, code in (("hf_other", 404), (False, 401)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api.model_info(name, token=token)
        assert status(caught) == code
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(name, "a.txt", token=token, cache_dir=tmp_path / str(code))
        assert [found.id for found in api.list_models(search=name, token=token)] == [name + "-open"]
        path = hf_hub_download(name + "-open", "a.txt", token=token, cache_dir=tmp_path / str(code))
        assert Path(path).read_bytes() == b"open"
    rows(3).push_to_hub(name, private=True)
    with pytest.raises(DatasetNotFoundError):  # first: what is cached is given to anyone
        load_dataset(name, split="train", token="hf_other")
    assert len(load_dataset(name, split="train")) == 3
    api.update_repo_settings(name, private=False)
    assert not api.model_info(name, token=False).private
    api.update_repo_settings(name, gated="manual")
    with pytest.raises(GatedRepoError):
        hf_hub_download(name, "a.txt", token="hf_other", cache_dir=tmp_path)
    with pytest.raises(GatedRepoError):
        api.auth_check(name, token="hf_other")
    api.auth_check(name)


def test_what_a_token_may_do(hub: Hub, api: HfApi, name: str) -> None:
    hub.add("models", name, {"a.txt": b"a"})
    assert api.whoami()["name"] == "me" and [org["name"] for org in api.whoami()["orgs"]] == ["lab"]
    assert api.whoami(token="hf_read")["auth"]["accessToken"]["role"] == "read"
    for token, code in (("hf_read", 403), ("hf_other", 403), ("hf_wrong", 401)):
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_repo(name + "-new", token=token)
        assert status(caught) == code
        with pytest.raises(HfHubHTTPError) as caught:
            api.upload_file(path_or_fileobj=b"b", path_in_repo="a.txt", repo_id=name, token=token)
        assert status(caught) == code and not isinstance(caught.value, RepositoryNotFoundError)
        with pytest.raises(HfHubHTTPError) as caught:
            api.delete_repo(name, token=token)
        assert status(caught) == code
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header"):
        api.model_info(name, token="hf_wrong")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(name + "-new", token=False)
    assert status(caught) == 401
    assert hub.files("models", name)["a.txt"] == b"a" and ("models", name + "-new") not in hub.repos


# -- commits


def test_a_commit_adds_changes_copies_and_deletes(hub: Hub, api: HfApi, name: str) -> None:
    start = hub.add("models", name, {"a.txt": b"a", "d/b.txt": b"b", "d/c.txt": b"c", "w.bin": b"weights"})
    changes = [
        add("a.txt", b"changed"),
        add("big.safetensors", b"\x00" * 5000),
        CommitOperationCopy("w.bin", "copy.bin"),
        CommitOperationDelete("d/", is_folder=True),
    ]
    done = api.create_commit(name, changes, commit_message="all", commit_description="at once", parent_commit=start)
    files = hub.files("models", name)
    assert set(files) == {".gitattributes", "a.txt", "big.safetensors", "copy.bin", "w.bin"}
    assert files["a.txt"] == b"changed" and files["copy.bin"] == b"weights"
    assert done.oid == hub.commit("models", name) and done.commit_url == f"{hub.endpoint}/{name}/commit/{done.oid}"
    last, before, *_ = hub.history("models", name)
    assert (last.title, last.description, last.author, before.sha) == ("all", "at once", "me", start)
    assert hub.files("models", name, start)["a.txt"] == b"a"
    info = api.model_info(name, files_metadata=True)
    lfs = {sibling.rfilename: sibling.lfs is not None for sibling in info.siblings}
    assert lfs == {".gitattributes": False, "a.txt": False, "big.safetensors": True, "copy.bin": True, "w.bin": True}
    # What has not changed is not sent again.
    same = [add("a.txt", b"changed"), add("big.safetensors", b"\x00" * 5000)]
    again = api.create_commit(name, same, commit_message="none")
    assert again.oid == done.oid


def test_a_refused_commit_changes_nothing(hub: Hub, api: HfApi, name: str) -> None:
    start = hub.add("models", name, {"a.txt": b"a", "README.md": CARD})
    newer = api.upload_file(path_or_fileobj=b"b", path_in_repo="a.txt", repo_id=name).oid
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit(name, [add("a.txt", b"c")], commit_message="stale", parent_commit=start)
    assert status(caught) == 412
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.create_commit(name, [add("a.txt", b"c"), CommitOperationDelete("nope")], commit_message="no such file")
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"c", path_in_repo="a.txt", repo_id=name, revision="nope")
    for bad in (b"---\nlicense: [\n---\n", b"---\nlicense: 3\n---\n", b"---\nlanguage: no\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            api.upload_file(path_or_fileobj=bad, path_in_repo="README.md", repo_id=name)
    # Round the client's own checks: bad metadata, and a file that was never uploaded.
    lines = [
        b'{"key": "file", "value": {"path": "README.md", "content": "LS0tCmxpY2Vuc2U6IDMKLS0tCg==", "encoding": "base64"}}',
        b'{"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": "%s", "size": 1}}' % (b"0" * 64),
        b'{"key": "deletedFile", "value": {"path": "../a.txt"}}',
    ]
    for line in lines:
        body = b'{"key": "header", "value": {"summary": "x"}}\n' + line
        said = httpx.post(f"{hub.endpoint}/api/models/{name}/commit/main", content=body,
                           headers={"Authorization": "Bearer hf_secret"})  # fmt: skip
        assert said.status_code == 400
    assert hub.commit("models", name) == newer and hub.files("models", name)["a.txt"] == b"b"


def test_of_commits_on_one_parent_one_wins(hub: Hub, api: HfApi, name: str) -> None:
    start = hub.add("models", name, {"a.txt": b"a"})

    def commit(n: int) -> int:
        operations = [add("a.txt", b"%d" % n), add(f"{n}.txt", b"%d" % n)]
        try:
            api.create_commit(name, operations, commit_message=str(n), parent_commit=start)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(commit, range(8)))
    assert sorted(answers) == [200] + [412] * 7
    won = answers.index(200)
    assert set(hub.files("models", name)) == {".gitattributes", "a.txt", f"{won}.txt"}
    assert hub.files("models", name)["a.txt"] == b"%d" % won


def test_branches_tags_and_squash(hub: Hub, api: HfApi, name: str) -> None:
    first = hub.add("datasets", name, {"a.txt": b"1"})
    kind = {"repo_type": "dataset"}
    api.create_branch(name, branch="feat/x", **kind)
    done = api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=name, revision="feat/x", **kind)
    api.create_tag(name, tag="v1", revision="feat/x", **kind)
    api.create_branch(name, branch="old", revision=first[:9], **kind)
    refs = api.list_repo_refs(name, **kind)
    assert {b.name: b.target_commit for b in refs.branches} == {"main": first, "feat/x": done.oid, "old": first}
    assert [(t.name, t.ref, t.target_commit) for t in refs.tags] == [("v1", "refs/tags/v1", done.oid)]
    for revision, text in (("main", b"1"), ("feat/x", b"2"), ("v1", b"2"), (done.oid, b"2"), (first[:8], b"1")):
        assert Path(hf_hub_download(name, "a.txt", revision=revision, **kind)).read_bytes() == text
    for make in (lambda: api.create_branch(name, branch="old", **kind), lambda: api.create_tag(name, tag="v1", **kind)):
        with pytest.raises(HfHubHTTPError) as caught:
            make()
        assert status(caught) == 409
    api.create_branch(name, branch="old", exist_ok=True, **kind)
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"3", path_in_repo="a.txt", repo_id=name, revision="v1", **kind)
    api.super_squash_history(name, branch="feat/x", **kind)
    assert len(api.list_repo_commits(name, revision="feat/x", **kind)) == 1
    api.delete_branch(name, branch="old", **kind)
    api.delete_tag(name, tag="v1", **kind)
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(name, tag="v1", **kind)
    for gone in ("old", "v1"):
        with pytest.raises(RevisionNotFoundError):
            api.list_repo_commits(name, revision=gone, **kind)


def test_pull_requests_are_opened_added_to_and_merged(hub: Hub, api: HfApi, name: str) -> None:
    hub.add("models", name, {"a.txt": b"a", "b.txt": b"b"})
    other = HfApi(token="hf_other")
    changes = [add("a.txt", b"theirs"), add("n.bin", b"new")]
    opened = other.create_commit(name, changes, commit_message="Better", create_pr=True)
    assert (opened.pr_num, opened.pr_revision) == (1, "refs/pr/1")
    assert opened.pr_url == f"{hub.endpoint}/{name}/discussions/1"
    other.upload_file(path_or_fileobj=b"more", path_in_repo="m.txt", repo_id=name, revision="refs/pr/1")
    assert hub.files("models", name)["a.txt"] == b"a"
    assert Path(hf_hub_download(name, "n.bin", revision="refs/pr/1")).read_bytes() == b"new"
    assert [r.ref for r in api.list_repo_refs(name, include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    api.upload_file(path_or_fileobj=b"ours", path_in_repo="b.txt", repo_id=name)
    with pytest.raises(HfHubHTTPError) as caught:
        other.merge_pull_request(name, 1)
    assert status(caught) == 403
    assert api.comment_discussion(name, 1, "Thanks").content == "Thanks"
    api.merge_pull_request(name, 1)
    files = hub.files("models", name)
    assert (files["a.txt"], files["b.txt"], files["m.txt"], files["n.bin"]) == (b"theirs", b"ours", b"more", b"new")
    told = api.get_discussion_details(name, 1)
    assert (told.status, told.merge_commit_oid) == ("merged", hub.commit("models", name))
    assert told.author == "other" and told.target_branch == "refs/heads/main"
    # Both sides changed the same file: not merged.
    api.create_commit(name, [add("a.txt", b"left")], commit_message="Left", create_pr=True)
    api.upload_file(path_or_fileobj=b"right", path_in_repo="a.txt", repo_id=name)
    assert api.get_discussion_details(name, 2).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError) as caught:
        api.merge_pull_request(name, 2)
    assert status(caught) == 409 and hub.files("models", name)["a.txt"] == b"right"
    api.change_discussion_status(name, 2, "closed")
    assert api.create_pull_request(name, "A draft").status == "draft"
    assert api.rename_discussion(name, 3, "Another name").new_title == "Another name"
    assert [d.num for d in api.get_repo_discussions(name, discussion_status="open")] == [3]
    assert [d.num for d in api.get_repo_discussions(name, author="other")] == [1]


# -- files


def test_files_come_whole_in_ranges_and_as_snapshots(hub: Hub, name: str, tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    files = {"README.md": CARD, "w.safetensors": data, "deep/er/x.txt": b"x", "empty.txt": b""}
    commit = hub.add("models", name, files)
    folder = Path(snapshot_download(name))
    assert folder.name == commit
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == hub.files("models", name)
    assert {p.name for p in Path(snapshot_download(name, allow_patterns="deep/*", local_dir=tmp_path)).glob("*")} == {
        ".cache", "deep",
    }  # fmt: skip
    system = HfFileSystem()
    with system.open(f"{name}/w.safetensors", block_size=64) as file:
        file.seek(1000)
        assert file.read(10) == data[1000:1010]
    assert system.cat_file(f"{name}/w.safetensors", start=-6) == data[-6:]
    assert sorted(system.ls(f"{name}/deep", detail=False)) == [f"{name}/deep/er"]
    assert system.isdir(f"{name}/deep/er") and system.info(f"{name}/deep/er/x.txt")["size"] == 1
    url = f"{hub.endpoint}/{name}/resolve/main/w.safetensors"
    for asked, code, expected in (
        ("bytes=5-9", 206, data[5:10]),
        ("bytes=10230-", 206, data[10230:]),
        ("bytes=-4", 206, data[-4:]),
        ("bytes=10000-99999", 206, data[10000:]),
        ("bytes=10240-", 416, b""),
    ):
        said = httpx.get(url, headers={"Range": asked})
        assert (said.status_code, said.content) == (code, expected), asked
    head = httpx.head(url)
    assert head.headers["Content-Length"] == "10240" and head.headers["X-Repo-Commit"] == commit and not head.content
    assert head.headers["ETag"] == head.headers["X-Linked-Etag"] and len(head.headers["ETag"]) == 66
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(name, "nope.txt")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(name, "README.md", revision="nope")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(name + "-none", "README.md")


def test_large_files_go_in_parts(hub: Hub, api: HfApi, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "multipart_over", 1000)
    monkeypatch.setattr(hub, "chunk_size", 4096)
    hub.create("datasets", name)
    data = os.urandom(10_000)
    hub.fault("PUT", f"{name}/.*/2$", status=503)
    before = len(hub.requests)
    api.upload_file(path_or_fileobj=data, path_in_repo="d.parquet", repo_id=name, repo_type="dataset")
    parts = [request[-1] for request in hub.requests[before:] if request.startswith("PUT")]
    assert parts == ["1", "2", "2", "3"] and any(r.endswith("/complete") for r in hub.requests[before:])
    assert hub.files("datasets", name)["d.parquet"] == data
    url = f"{hub.endpoint}/_lfs/datasets/{name}/{'0' * 64}"
    assert httpx.put(url, content=b"not of that hash").status_code == 400


def test_a_chunked_request_body_is_read(hub: Hub, name: str) -> None:
    hub.create("models", name)
    lines = [b'{"key": "header", "value": {"summary": "chunked"}}\n',
             b'{"key": "file", "value": {"path": "a.txt", "content": "YQ==", "encoding": "base64"}}\n']  # fmt: skip
    said = httpx.post(f"{hub.endpoint}/api/models/{name}/commit/main", content=iter(lines),
                       headers={"Authorization": "Bearer hf_secret"})  # fmt: skip
    assert said.request.headers["Transfer-Encoding"] == "chunked"
    assert said.json()["commitOid"] == hub.commit("models", name) and hub.files("models", name)["a.txt"] == b"a"


# -- cards


@ASKS_US
def test_a_card_is_loaded_changed_and_pushed(hub: Hub, name: str) -> None:
    hub.add("datasets", name, {"README.md": CARD})
    loaded = DatasetCard.load(name)
    loaded.data.pretty_name = "Some rows"
    loaded.push_to_hub(name)
    info = HfApi().dataset_info(name)
    assert info.card_data.pretty_name == "Some rows" and {"made-here", "license:apache-2.0"} <= set(info.tags)


# -- faults


def test_a_server_error_is_retried(hub: Hub, name: str) -> None:
    hub.fault("PUT", f"/_lfs/datasets/{name}/", status=502)
    made = rows(10, seed=4)
    made.push_to_hub(name)
    assert load_dataset(name, split="train").to_dict() == made.to_dict()
    assert sum(r.startswith(f"PUT /_lfs/datasets/{name}/") for r in hub.requests) == 2


@TRIES_AGAIN
def test_a_connection_cut_in_an_upload_is_retried(hub: Hub, api: HfApi, name: str) -> None:
    hub.create("models", name)
    data = os.urandom(3_000_000)
    hub.fault("PUT", f"{name}/", cut_after=1_000_000)
    api.upload_file(path_or_fileobj=data, path_in_repo="w.bin", repo_id=name)
    assert hub.files("models", name)["w.bin"] == data


@TRIES_AGAIN
def test_a_connection_cut_in_a_download_is_taken_up_again(hub: Hub, name: str) -> None:
    data = os.urandom(300_000)
    hub.add("models", name, {"w.bin": data})
    hub.fault("GET", f"{name}/resolve/.*/w.bin", cut_after=100_000)
    assert Path(hf_hub_download(name, "w.bin")).read_bytes() == data


def test_errors_reach_the_client_by_their_code(hub: Hub, api: HfApi, name: str) -> None:
    hub.add("models", name, {"a.txt": b"a"})
    for code, error in (("GatedRepo", GatedRepoError), ("RevisionNotFound", RevisionNotFoundError)):
        fault = hub.fault("GET", f"/api/models/{name}", status=403, code=code, times=2)
        for _ in range(2):
            with pytest.raises(error):
                api.model_info(name)
        assert fault not in hub.faults
    assert api.model_info(name).id == name
    hub.fault("POST", "/preupload/", status=400)
    with pytest.raises(BadRequestError):
        api.upload_file(path_or_fileobj=b"b", path_in_repo="a.txt", repo_id=name)


def test_a_lost_answer_to_a_commit_leaves_the_commit(hub: Hub, api: HfApi, name: str) -> None:
    hub.create("models", name)
    hub.fault("POST", f"{name}/commit/main", lost=True)
    with pytest.raises(httpx.TransportError):
        api.upload_file(path_or_fileobj=b"b", path_in_repo="a.txt", repo_id=name)
    assert hub.files("models", name)["a.txt"] == b"b"


PUSH = """
import sys
from datasets import Dataset
print("ready", flush=True)
Dataset.from_dict({"x": list(range(int(sys.argv[2])))}).push_to_hub(sys.argv[1])
"""


@pytest.mark.parametrize("at", ["/info/lfs/verify", "/preupload/main", "/commit/main"])
def test_a_push_that_is_killed_leaves_nothing_visible(hub: Hub, at: str) -> None:
    name = f"me/killed{at.replace('/', '-')}"
    before = Dataset.from_dict({"x": [1, 2]})
    before.push_to_hub(name)
    commit = hub.commit("datasets", name)
    child = subprocess.Popen([sys.executable, "-c", PUSH, name, "50"], stdout=subprocess.DEVNULL)

    def kill() -> None:
        child.kill()
        child.wait()

    if at == "/commit/main":  # its body is cut as well: what a killed client has sent by then is not whole
        hub.fault("POST", name + at, call=kill, cut_after=40)
    else:
        hub.fault("POST", name + ".*" + at, call=kill)
    child.wait(timeout=120)
    assert child.returncode == -9
    uploaded = len(hub.repos["datasets", name].lfs) - 1
    assert uploaded == (at != "/preupload/main")
    assert hub.commit("datasets", name) == commit
    assert load_dataset(name, split="train").to_dict() == before.to_dict()
    # Pushed again, it is all there.
    subprocess.run([sys.executable, "-c", PUSH, name, "50"], check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert load_dataset(name, split="train")["x"] == list(range(50))


def test_what_is_not_known_is_noted(hub: Hub) -> None:
    assert httpx.get(f"{hub.endpoint}/api/nothing/of/that/name").status_code == 404
    assert hub.unknown == ["GET /api/nothing/of/that/name"]
    hub.unknown.clear()


def test_a_hub_that_has_stopped_answers_no_more() -> None:
    with httpx.Client() as client:
        with running(Hub()) as endpoint:
            assert client.get(f"{endpoint}/api/models").json() == []
        with pytest.raises(httpx.TransportError):  # nor on a connection that was kept alive
            client.get(f"{endpoint}/api/models")


def test_without_a_hub_nothing_listens() -> None:
    """What a test meets that forgets the ``hub`` fixture: the reserved port refuses at once."""
    with socket.socket() as reserved, socket.socket() as client:
        reserved.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            client.connect(reserved.getsockname())
