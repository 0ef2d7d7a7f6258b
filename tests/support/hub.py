"""A Hub on 127.0.0.1, in memory, that the real clients push to and load from; it can be told to fail.

It answers what huggingface_hub, datasets, transformers, peft and evaluate ask over plain HTTP: repositories with
branches, tags, commits, pull requests and LFS files, with their rights and their errors. Xet is not spoken: clients
need ``HF_HUB_DISABLE_XET=1``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

import yaml

# Repository names that always fail: status, X-Error-Code.
FAILING: dict[str, tuple[int, str | None]] = {
    "me/gated": (403, "GatedRepo"),
    "me/private": (401, "RepoNotFound"),
    "me/forbidden": (403, None),
    "me/broken": (501, None),
}
# token -> user, role; organisation -> members
TOKENS = {"hf_secret": ("me", "write"), "hf_read": ("me", "read"), "hf_other": ("other", "write")}
ORGANISATIONS = {"lab": {"me"}}
LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".npz")
LFS_FROM = 1_000_000  # bytes
# Keys of a card, what their values (or what is in their lists) must be, and what the whole may be.
CARD: list[tuple[str, type, tuple[type, ...]]] = [
    ("license license_name license_link library_name pipeline_tag pretty_name", str, (str,)),
    ("tags datasets metrics task_categories size_categories", str, (list,)),
    ("language base_model", str, (str, list)),
    ("configs model-index", dict, (list,)),
    ("dataset_info", dict, (dict, list)),
]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


class Refusal(Exception):
    """What a route raises to answer with an error."""

    def __init__(self, status: int, code: str | None = None, message: str = "refused", **body: Any) -> None:
        super().__init__(message)
        self.reply = Reply({"error": message, **body}, status, {"X-Error-Message": message})
        if code:
            self.reply.headers["X-Error-Code"] = code


@dataclass
class Reply:
    """``body`` is sent as it is when bytes, else as JSON."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Blob:
    data: bytes
    is_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds in place of an LFS file."""
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.data)}")
        return "".join(line + "\n" for line in lines).encode()

    @cached_property
    def oid(self) -> str:
        """Git's own hash of the blob; for LFS, of its pointer."""
        held = self.pointer if self.is_lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid


Tree = dict[str, Blob]


def wants_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_FROM)


def inside(tree: Tree, folder: str) -> Tree:
    return {path: blob for path, blob in tree.items() if not folder or path.startswith(f"{folder}/")}


def card(text: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """Metadata of a README, what is wrong with it, and what is only worth a warning."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    try:
        data = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        return {}, [f"not YAML: {error}"], []
    if data is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return {}, ["metadata must be a mapping"], []
    errors = []
    for keys, inner, shapes in CARD:
        for key in set(keys.split()) & data.keys():
            values = data[key] if isinstance(data[key], list) else [data[key]]
            if not isinstance(data[key], shapes) or not all(isinstance(value, inner) for value in values):
                errors.append(f'"{key}" must be {" or ".join(sorted(shape.__name__ for shape in shapes))}')
    return data, errors, []


@dataclass
class Commit:
    sha: str
    title: str
    description: str
    author: str
    date: str
    parent: Commit | None
    tree: Tree


@dataclass
class Discussion:
    num: int
    title: str
    author: str
    status: str
    base: str | None  # of a pull request: the branch it is for
    merged: str | None = None
    created: str = field(default_factory=now)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"

    def event(self, kind: str, author: str, **data: Any) -> dict[str, Any]:
        made = {"id": f"{self.num:04x}{len(self.events):020x}", "type": kind, "createdAt": now(),
                "author": {"name": author}, "data": data}  # fmt: skip
        self.events.append(made)
        return made


@dataclass
class Repo:
    """``refs``: full name of each branch, tag and pull request -> its last commit."""

    kind: str
    id: str
    private: bool = False
    gated: str | bool = False
    sdk: str | None = None
    created: str = field(default_factory=now)
    refs: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)

    def find(self, revision: str) -> Commit:
        """The commit of a branch, tag, ref, sha or beginning of one sha."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        fits = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        if len(fits) != 1:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[fits[0]]

    def branch(self, revision: str) -> str:
        """The full name of something one can commit to."""
        for ref in (revision, f"refs/heads/{revision}"):
            if ref in self.refs and ref.startswith(("refs/heads/", "refs/pr/")):
                return ref
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def write(self, ref: str, tree: Tree, title: str, author: str, description: str = "",
              parent: Commit | None = None) -> Commit:  # fmt: skip
        content = [self.id, len(self.commits), title, sorted((path, blob.oid) for path, blob in tree.items())]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        made = Commit(sha, title, description, author, now(), parent, tree)
        self.commits[sha] = self.refs[ref] = made
        return made

    def history(self, commit: Commit | None) -> Iterator[Commit]:
        while commit:
            yield commit
            commit = commit.parent

    def last_change(self, commit: Commit, path: str) -> Commit:
        def at(tree: Tree) -> object:
            return tree.get(path) or inside(tree, path)

        while commit.parent and at(commit.parent.tree) == at(commit.tree):
            commit = commit.parent
        return commit

    def discussion(self, num: str) -> Discussion:
        if not 0 < int(num) <= len(self.discussions):
            raise Refusal(404, None, "no such discussion")
        return self.discussions[int(num) - 1]

    def merged(self, pull: Discussion) -> tuple[Tree, list[str]]:
        """The tree a merge gives, and the files both sides changed differently."""
        ours, theirs = self.refs[pull.base], self.refs[pull.ref]
        known = {commit.sha for commit in self.history(ours)}
        base = next((commit.tree for commit in self.history(theirs) if commit.sha in known), {})
        changed = {p for p in {*theirs.tree, *base} if theirs.tree.get(p) != base.get(p)}
        conflicts = [p for p in changed if ours.tree.get(p) not in (base.get(p), theirs.tree.get(p))]
        tree = {path: blob for path, blob in ours.tree.items() if path not in changed}
        return tree | {path: theirs.tree[path] for path in changed if path in theirs.tree}, sorted(conflicts)


@dataclass
class Fault:
    method: str
    path: str
    status: int | None = None
    code: str | None = None
    cut_after: int | None = None
    lost: bool = False
    call: Callable[[], object] | None = None
    times: int = 1


class Hub:
    """Repositories by (kind, id), kind one of models, datasets, spaces.

    Attributes:
        requests: ``"METHOD /path"`` of each, as they came. unknown: those no route answered, or that broke the server.
        faults: those not used up. multipart_over, chunk_size: LFS files larger than this many bytes go in such parts.
        page: entries a listing gives at most at once. endpoint: set by :func:`running`.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.faults: list[Fault] = []
        self.multipart_over, self.chunk_size, self.page = 32_000_000, 16_000_000, 1000
        self.endpoint = ""
        self.lock = threading.RLock()

    def create(self, kind: str, name: str, private: bool = False, author: str = "me", **more: Any) -> Repo:
        with self.lock:
            repo = self.repos[kind, name] = Repo(kind, name, private, **more)
            patterns = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
            repo.write("refs/heads/main", {".gitattributes": Blob(patterns.encode())}, "initial commit", author)
            return repo

    def add(self, kind: str, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """A new repository, these files its second commit; gives the commit's sha."""
        with self.lock:
            repo = self.create(kind, name, private)
            blobs = {path: Blob(data, wants_lfs(path, len(data))) for path, data in files.items()}
            repo.lfs |= {blob.sha256: blob.data for blob in blobs.values() if blob.is_lfs}
            parent = repo.find("main")
            return repo.write("refs/heads/main", parent.tree | blobs, "Add files", "me", parent=parent).sha

    def commit(self, kind: str, name: str, revision: str = "main") -> str:
        with self.lock:
            return self.repos[kind, name].find(revision).sha

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        with self.lock:
            return {path: blob.data for path, blob in self.repos[kind, name].find(revision).tree.items()}

    def history(self, kind: str, name: str, revision: str = "main") -> list[Commit]:
        """Commits, the last first."""
        with self.lock:
            repo = self.repos[kind, name]
            return list(repo.history(repo.find(revision)))

    def fault(self, method: str, path: str, *, status: int | None = None, code: str | None = None,
              cut_after: int | None = None, lost: bool = False, call: Callable[[], object] | None = None,
              times: int = 1) -> Fault:  # fmt: skip
        """Let the next ``times`` requests whose path and query have the pattern ``path`` go wrong.

        Args:
            method: ``"GET"``, or a pattern such as ``"PUT|POST"``. call: done first, before the request's body is read.
            status, code: answer with these, and do nothing. cut_after: close the connection after so many bytes: of
                the request's body for PUT and POST (which is then not handled), else of the answer's.
            lost: handle the request, then close the connection without an answer.
        """
        made = Fault(method, path, status, code, cut_after, lost, call, times)
        with self.lock:
            self.faults.append(made)
        return made

    def came(self, method: str, path: str) -> Fault | None:
        """Note a request; gives the fault that meets it."""
        with self.lock:
            self.requests.append(f"{method} {path.partition('?')[0]}")
            for fault in self.faults:
                if re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    if fault.times == 0:
                        self.faults.remove(fault)
                    return fault
        return None


Route = Callable[..., Reply]
ROUTES: list[tuple[tuple[str, ...], re.Pattern[str], str, Route]] = []
_NAME = r"(?P<name>[^/]+(?:/[^/]+?)?)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_NAME}"
_GIT = rf"/(?:(?P<kind>datasets|spaces)/)?{_NAME}"
_LFS = r"/_lfs/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
_REV = r"(?P<rev>[^/]+)"


def route(methods: str, pattern: str, right: str = "read") -> Callable[[Route], Route]:
    """Answer such requests with this method of the handler.

    Args:
        pattern: of the raw path; its groups are decoded and given by name. ``kind`` and ``name`` become the repository.
        right: what the user must have there: ``none``, ``read``, ``propose`` (any user who may write somewhere:
            discussions and pull requests are open to all), ``write``, or ``commit``, which is one of the last two.
    """

    def keep(function: Route) -> Route:
        ROUTES.append((tuple(methods.split()), re.compile(pattern), right, function))
        return function

    return keep


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for the client's delayed acknowledgement
    hub: Hub
    user: str | None
    role: str | None
    body: bytes
    query: dict[str, list[str]]

    def log_message(self, *_: object) -> None: ...

    # -- one request

    def do_GET(self) -> None:
        fault = self.hub.came(self.command, self.path) or Fault("", "")
        if fault.call:
            fault.call()
        uploads = self.command in ("PUT", "POST")
        body = self._body(fault.cut_after if uploads else None)
        if body is None:  # cut by a fault, or the client is gone: nothing is done
            return self._hang_up()
        reply = Refusal(fault.status, fault.code, "fault").reply if fault.status else self._answer(body)
        if fault.lost:
            return self._hang_up()
        self._send(reply, None if uploads else fault.cut_after)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _body(self, cut_after: int | None) -> bytes | None:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length if cut_after is None else min(length, cut_after))
            return body if cut_after is None and len(body) == length else None
        body = b""
        while cut_after is None or len(body) < cut_after:
            size = int(self.rfile.readline().split(b";")[0].strip() or b"-1", 16)
            chunk = self.rfile.read(size + 2)
            if size < 0 or len(chunk) < size + 2:
                return None
            if size == 0:
                return body
            body += chunk[:-2]
        return None

    def _answer(self, body: bytes) -> Reply:
        path, _, query = self.path.partition("?")
        self.body, self.query = body, parse_qs(query)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            return Refusal(401, None, "Invalid credentials in Authorization header").reply
        self.user, self.role = TOKENS.get(token, (None, None))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for methods, pattern, right, function in ROUTES:
                if method in methods and (found := pattern.fullmatch(path)):
                    # The raw path is split before it is decoded: a revision may hold a slash.
                    words = {name: unquote(value) for name, value in found.groupdict("").items()}
                    with self.hub.lock:
                        if "name" not in words:
                            return function(self, **words)
                        kind, name = words.pop("kind") or "models", words.pop("name")
                        if right == "commit":
                            right = "propose" if self.flag("create_pr") or words["rev"][:8] == "refs/pr/" else "write"
                        return function(self, self.repo(kind, name, right), **words)
        except Refusal as refusal:
            return refusal.reply
        except Exception:  # a mistake of this file: seen by tests, and not retried by clients
            self.hub.unknown.append(f"{self.command} {path}: {traceback.format_exc()}")
            return Refusal(501, None, "the test Hub broke").reply
        self.hub.unknown.append(f"{self.command} {path}")
        return Refusal(404, None, "no such route").reply

    def _send(self, reply: Reply, cut_after: int | None) -> None:
        content = reply.body
        self.send_response(reply.status)
        if not isinstance(content, bytes):
            content = json.dumps(content, default=str).encode()
            self.send_header("Content-Type", "application/json")
        for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
            self.send_header(name, " ".join(value.encode("ascii", "replace").decode().splitlines()))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut_after])
        if cut_after is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)

    # -- what routes use

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def url(self, repo: Repo) -> str:
        return f"{self.base}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.id}"

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}") or {}

    def asked(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        return self.asked(name).lower() in ("1", "true")

    def owns(self, name: str) -> bool:
        owner = name.split("/")[0]
        return self.user is not None and (self.user == owner or self.user in ORGANISATIONS.get(owner, ()))

    def writer(self, name: str | None = None) -> str:
        """The user, who may write: at all, or to the namespace of ``name``."""
        if self.user is None:
            raise Refusal(401, None, "Invalid username or password.")
        if self.role != "write" or (name is not None and not self.owns(name)):
            raise Refusal(403, None, "You don't have the rights to do this")
        return self.user

    def repo(self, kind: str, name: str, right: str) -> Repo:
        if name in FAILING:
            raise Refusal(*FAILING[name])
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self.owns(name) and right != "none"):
            raise Refusal(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if right in ("propose", "write"):
            self.writer(name if right == "write" else None)
        return repo

    def readable(self, repo: Repo) -> None:
        if repo.gated and not self.owns(repo.id):
            raise Refusal(403 if self.user else 401, "GatedRepo", "Access to this repository is restricted")

    def page_of(self, items: list[Any]) -> Reply:
        limit = min(int(self.asked("limit", str(self.hub.page))), self.hub.page)
        start = int(self.asked("cursor", "0"))
        headers = {}
        if start + limit < len(items):
            query = urlencode(self.query | {"cursor": [start + limit]}, doseq=True)
            headers["Link"] = f'<{self.base}{self.path.partition("?")[0]}?{query}>; rel="next"'
        return Reply(items[start : start + limit], headers=headers)

    # -- users and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Reply:
        if self.user is None:
            raise Refusal(401, None, "Invalid username or password.")
        orgs = [{"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": "admin", "isEnterprise": False}
                for org, members in ORGANISATIONS.items() if self.user in members]  # fmt: skip
        token = {"displayName": "test", "role": self.role, "createdAt": now()}
        return Reply({"type": "user", "id": self.user, "name": self.user, "fullname": self.user, "email": None,
                      "isPro": False, "canPay": False, "orgs": orgs,
                      "auth": {"type": "access_token", "accessToken": token}})  # fmt: skip

    @route("GET", "/api/agent-harnesses")  # the `hf` command asks, and does without
    def nothing(self) -> Reply:
        raise Refusal(404, None, "no such list")

    @route("POST", "/api/repos/create")
    def create(self) -> Reply:
        asked, (kind, name) = self.json(), self.named()
        author = self.writer(name)
        if known := self.hub.repos.get((kind, name)):
            raise Refusal(409, None, "You already created this repo", url=self.url(known))
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        made = self.hub.create(kind, name, private, author, sdk=asked.get("sdk"))
        return Reply({"url": self.url(made), "name": name, "id": name})

    def named(self) -> tuple[str, str]:
        asked = self.json()
        return f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or self.user}/{asked['name']}"

    @route("DELETE", "/api/repos/delete")
    def delete(self) -> Reply:
        repo = self.repo(*self.named(), "write")
        del self.hub.repos[repo.kind, repo.id]
        return Reply()

    @route("POST", "/api/repos/move")
    def move(self) -> Reply:
        asked = self.json()
        repo, to = self.repo(asked["type"] + "s", asked["fromRepo"], "write"), asked["toRepo"]
        self.writer(to)
        if (repo.kind, to) in self.hub.repos:
            raise Refusal(409, None, "A repository of this name exists")
        self.hub.repos[repo.kind, to] = self.hub.repos.pop((repo.kind, repo.id))
        repo.id = to
        return Reply()

    @route("PUT", _API + "/settings", "write")
    def settings(self, repo: Repo) -> Reply:
        asked = self.json()
        older = asked.get("private", repo.private)  # what older clients call it
        repo.private = asked["visibility"] == "private" if "visibility" in asked else older
        repo.gated = asked.get("gated", repo.gated)
        return Reply()

    @route("GET", _API + "/auth-check(?P<write>/write)?")
    def auth_check(self, repo: Repo, write: str) -> Reply:
        self.readable(repo)
        if write:
            self.writer(repo.id)
        return Reply()

    @route("GET", "/api/(?P<kind>models|datasets|spaces)")
    def repositories(self, kind: str) -> Reply:
        found = [self.describe(repo, repo.find("main")) for (of, name), repo in self.hub.repos.items()
                 if of == kind and (self.owns(name) or not repo.private)]  # fmt: skip
        found = [info for info in found if self.asked("author", info["author"]) == info["author"]
                 and all(word.lower() in info["id"].lower() for word in self.query.get("search", []))
                 and set(self.query.get("filter", [])) <= set(info["tags"])]  # fmt: skip
        if (key := self.asked("sort")) in ("createdAt", "lastModified"):
            found.sort(key=lambda info: info[key], reverse=True)
        return self.page_of(found)

    def describe(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        readme = commit.tree.get("README.md")
        data = card(readme.data.decode(errors="replace"))[0] if readme else {}
        tags = [tag for tag in data.get("tags") or [] if isinstance(tag, str)]
        for key, label in (("license", "license"), ("datasets", "dataset"), ("base_model", "base_model")):
            values = data.get(key) or []
            tags += [f"{label}:{value}" for value in (values if isinstance(values, list) else [values])]
        siblings: list[dict[str, Any]] = []
        for path, blob in sorted(commit.tree.items()):
            siblings.append({"rfilename": path})
            if self.flag("blobs"):
                lfs = {"lfs": {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}}
                siblings[-1] |= {"size": len(blob.data), "blobId": blob.oid} | (lfs if blob.is_lfs else {})
        info = {"_id": hashlib.sha1(repo.created.encode() + repo.id.encode()).hexdigest()[:24], "id": repo.id,
                "author": repo.id.split("/")[0], "sha": commit.sha, "createdAt": repo.created,
                "lastModified": repo.find("main").date, "private": repo.private, "gated": repo.gated,
                "disabled": False, "downloads": 0, "likes": 0, "tags": tags, "siblings": siblings,
                "usedStorage": sum(map(len, repo.lfs.values()))}  # fmt: skip
        info |= ({"cardData": data} if data else {}) | ({"sdk": repo.sdk} if repo.sdk else {})
        if repo.kind == "models":
            info |= {"modelId": repo.id} | {k: data[k] for k in ("library_name", "pipeline_tag") if k in data}
            if config := commit.tree.get("config.json"):
                info["config"] = json.loads(config.data)
        return info

    # -- what a revision holds

    def entry(self, repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any] | None:
        """A file or a folder as listings give it."""
        blob, under = commit.tree.get(path), inside(commit.tree, path)
        if blob:
            found = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
            if blob.is_lfs:
                found["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
        elif under:
            oid = hashlib.sha1(json.dumps(sorted((p, b.oid) for p, b in under.items())).encode()).hexdigest()
            found = {"type": "directory", "oid": oid, "size": 0, "path": path}
        else:
            return None
        if expand:
            last = repo.last_change(commit, path)
            found["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
            if blob:
                found["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
        return found

    @route("GET", _API + f"/tree/{_REV}(?:/(?P<path>.*))?")
    def tree(self, repo: Repo, rev: str, path: str) -> Reply:
        commit, folder = repo.find(rev), path.strip("/")
        under = inside(commit.tree, folder)
        if folder and not under:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {rev}")
        depth = folder.count("/") + 1 if folder else 0
        paths = set()
        for parts in (file.split("/") for file in under):
            deepest = len(parts) if self.flag("recursive") else depth + 1
            paths |= {"/".join(parts[:n]) for n in range(depth + 1, deepest + 1)}
        return self.page_of([self.entry(repo, commit, found, self.flag("expand")) for found in sorted(paths)])

    @route("POST", _API + f"/paths-info/{_REV}")
    def paths_info(self, repo: Repo, rev: str) -> Reply:
        commit, form = repo.find(rev), parse_qs(self.body.decode())
        expand = form.get("expand") == ["True"]
        found = [self.entry(repo, commit, path.strip("/"), expand) for path in form.get("paths", [])]
        return Reply([entry for entry in found if entry])

    @route("GET", _GIT + f"/resolve/{_REV}/(?P<path>.+)")
    def resolve(self, repo: Repo, rev: str, path: str) -> Reply:
        self.readable(repo)
        commit = repo.find(rev)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.tree:
            return Reply(b"", 404, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        blob = commit.tree[path]
        data, size = blob.data, len(blob.data)
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(size)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted or not any(wanted.groups()):
            return Reply(data, 200, headers)
        if wanted[1]:
            start, end = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        else:  # the last so many
            start, end = max(size - int(wanted[2]), 0), size - 1
        if start > end:
            return Reply(b"", 416, {"Content-Range": f"bytes */{size}"})
        return Reply(data[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{size}"})

    # -- history

    @route("GET", _API + "/refs")
    def refs(self, repo: Repo) -> Reply:
        found: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
        for ref, commit in repo.refs.items():
            kind = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[ref.split("/")[1]]
            name = ref if kind == "pullRequests" else ref.split("/", 2)[2]
            found[kind].append({"name": name, "ref": ref, "targetCommit": commit.sha})
        return Reply({kind: refs for kind, refs in found.items() if kind != "pullRequests" or self.flag("include_prs")})

    @route("GET", _API + f"/commits/{_REV}")
    def log(self, repo: Repo, rev: str) -> Reply:
        return self.page_of([{"id": c.sha, "title": c.title, "message": c.description, "date": c.date,
                              "authors": [{"user": c.author}]} for c in repo.history(repo.find(rev))])  # fmt: skip

    @route("POST DELETE", _API + f"/(?P<what>branch|tag)/{_REV}", "write")
    def change_ref(self, repo: Repo, what: str, rev: str) -> Reply:
        folder, asked, at = {"branch": "refs/heads", "tag": "refs/tags"}[what], self.json(), rev
        if self.command == "POST":  # the address has the new branch's name, but the new tag's revision
            rev, at = (rev, asked.get("startingPoint", "main")) if what == "branch" else (asked["tag"], rev)
        ref = f"{folder}/{rev}"
        if self.command == "POST":
            if ref in repo.refs:
                raise Refusal(409, None, f"Reference already exists: {ref}")
            repo.refs[ref] = repo.find(at)
        elif ref == "refs/heads/main":
            raise Refusal(403, None, "The main branch cannot be deleted")
        elif repo.refs.pop(ref, None) is None:
            raise Refusal(404, "RevisionNotFound", f"No such reference: {ref}")
        return Reply()

    @route("POST", _API + f"/super-squash/{_REV}", "write")
    def squash(self, repo: Repo, rev: str) -> Reply:
        ref = repo.branch(rev)
        repo.write(ref, repo.refs[ref].tree, self.json()["message"], self.writer())
        return Reply()

    # -- uploads

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Reply:
        _, errors, warnings = card(self.json()["content"])
        said = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return Reply(said, 400 if errors else 200)

    @route("POST", _API + f"/preupload/{_REV}", "commit")
    def preupload(self, repo: Repo, rev: str) -> Reply:
        tree, told = repo.find(rev).tree, []
        for asked in self.json()["files"]:
            mode = "lfs" if wants_lfs(asked["path"], asked["size"]) else "regular"
            told.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False})
            if held := tree.get(asked["path"]):
                told[-1]["oid"] = held.etag
        return Reply({"files": told})

    @route("POST", _GIT + r"\.git/info/lfs/objects/batch", "propose")
    def lfs_batch(self, repo: Repo) -> Reply:
        asked = self.json()
        if asked["operation"] != "upload":
            raise Refusal(422, None, "only uploads")
        multipart, told = "multipart" in asked.get("transfers", []), []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            told.append({"oid": oid, "size": size})
            if not re.fullmatch("[0-9a-f]{64}", oid):
                told[-1]["error"] = {"code": 422, "message": "not a sha256"}
            elif oid not in repo.lfs:
                href = f"{self.base}/_lfs/{repo.kind}/{repo.id}/{oid}"
                upload: dict[str, Any] = {"href": href}
                if multipart and size > self.hub.multipart_over:
                    numbers = range(1, ceil(size / self.hub.chunk_size) + 1)
                    header = {"chunk_size": str(self.hub.chunk_size)} | {str(n): f"{href}/{n}" for n in numbers}
                    upload = {"href": f"{href}/complete", "header": header}
                verify = {"href": f"{self.url(repo)}.git/info/lfs/verify"}
                told[-1]["actions"] = {"upload": upload, "verify": verify}
        return Reply({"transfer": "basic", "objects": told})

    # No right is asked here: like presigned addresses, these are the right.

    @route("PUT", _LFS + r"(?:/(?P<part>\d+))?", "none")
    def lfs_put(self, repo: Repo, oid: str, part: str) -> Reply:
        if part:
            repo.parts.setdefault(oid, {})[int(part)] = self.body
            return Reply(b"", headers={"ETag": f'"{hashlib.sha1(self.body).hexdigest()}"'})
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, None, "the content is not that of its sha256")
        repo.lfs[oid] = self.body
        return Reply(b"")

    @route("POST", _LFS + "/complete", "none")
    def lfs_complete(self, repo: Repo, oid: str) -> Reply:
        parts = repo.parts.pop(oid, {})
        tags = {part["partNumber"]: part["etag"].strip('"') for part in self.json()["parts"]}
        if tags != {number: hashlib.sha1(data).hexdigest() for number, data in parts.items()}:
            raise Refusal(400, None, "these are not the parts that came")
        self.body = b"".join(data for _, data in sorted(parts.items()))
        return self.lfs_put(repo, oid, "")

    @route("POST", _GIT + r"\.git/info/lfs/verify", "propose")
    def lfs_verify(self, repo: Repo) -> Reply:
        asked = self.json()
        if asked["oid"] not in repo.lfs or len(repo.lfs[asked["oid"]]) != asked["size"]:
            raise Refusal(404, None, "not stored, or of another size")
        return Reply()

    def changed(self, repo: Repo, tree: Tree, key: str, value: dict[str, Any]) -> Tree:
        """``tree`` after one line of a commit."""
        path = value["path"]
        if {"", ".", "..", ".git"} & set(path.removesuffix("/").split("/")):
            raise Refusal(400, None, f"not a path: {path}")
        if key == "file":
            return tree | {path: Blob(base64.b64decode(value["content"], validate=True))}
        if key == "lfsFile":
            data = repo.lfs.get(value["oid"])
            if data is None or value.get("size", len(data)) != len(data):
                raise Refusal(400, None, f"LFS pointer pointed to a file that does not exist: {path}")
            return tree | {path: Blob(data, is_lfs=True)}
        if key not in ("deletedFile", "deletedFolder"):
            raise Refusal(400, None, f"unknown operation: {key}")
        gone = {path} & tree.keys() if key == "deletedFile" else inside(tree, path.rstrip("/")).keys()
        if not gone:
            raise Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
        return {kept: blob for kept, blob in tree.items() if kept not in gone}

    @route("POST", _API + f"/commit/{_REV}", "commit")
    def commit(self, repo: Repo, rev: str) -> Reply:
        first, *lines = [json.loads(line) for line in self.body.split(b"\n") if line.strip()]
        header, ref, new_pull = first["value"], repo.branch(rev), self.flag("create_pr")
        parent, expected = repo.refs[ref], header.get("parentCommit")
        if expected and new_pull:
            parent = repo.find(expected)
        elif expected and not parent.sha.startswith(expected):
            raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
        tree = parent.tree
        for line in lines:
            tree = self.changed(repo, tree, line["key"], line["value"])
        readme = tree.get("README.md")
        if readme and readme != parent.tree.get("README.md") and (errors := card(readme.data.decode())[1]):
            raise Refusal(400, None, f"Invalid metadata in README.md: {'; '.join(errors)}")
        title, text = header["summary"], header.get("description", "")
        told: dict[str, Any] = {"success": True, "hookOutput": ""}
        if new_pull:
            pull = self.discuss(repo, title, text, "open", base=ref)
            ref = pull.ref
            told["pullRequestUrl"] = f"{self.url(repo)}/discussions/{pull.num}"
        made = repo.write(ref, tree, title, self.writer(), text, parent)
        return Reply(told | {"commitOid": made.sha, "commitUrl": f"{self.url(repo)}/commit/{made.sha}"})

    # -- discussions and pull requests

    def discuss(self, repo: Repo, title: str, text: str, status: str, base: str | None) -> Discussion:
        made = Discussion(len(repo.discussions) + 1, title, self.writer(), status, base)
        made.event("comment", made.author, edited=False, hidden=False, latest={"raw": text})
        repo.discussions.append(made)
        if base:
            repo.refs[made.ref] = repo.refs[base]
        return made

    def about(self, repo: Repo, found: Discussion) -> dict[str, Any]:
        return {"num": found.num, "title": found.title, "status": found.status, "isPullRequest": bool(found.base),
                "createdAt": found.created, "author": {"name": found.author},
                "repo": {"name": repo.id, "type": repo.kind[:-1]}}  # fmt: skip

    @route("POST", _API + "/discussions", "propose")
    def add_discussion(self, repo: Repo) -> Reply:
        asked = self.json()
        status, base = ("draft", "refs/heads/main") if asked.get("pullRequest") else ("open", None)
        made = self.discuss(repo, asked["title"], asked.get("description", ""), status, base)
        return Reply({"num": made.num, "url": f"{self.url(repo)}/discussions/{made.num}"})

    @route("GET", _API + "/discussions")
    def discussions(self, repo: Repo) -> Reply:
        kinds = {"pull_request": (True,), "discussion": (False,)}.get(self.asked("type"), (True, False))
        states = {"open": ("open", "draft"), "closed": ("closed", "merged")}.get(self.asked("status"))
        found = [one for one in reversed(repo.discussions) if bool(one.base) in kinds
                 and (states is None or one.status in states)
                 and self.asked("author", one.author) == one.author]  # fmt: skip
        start = int(self.asked("p", "0")) * self.hub.page
        shown = [self.about(repo, one) for one in found[start : start + self.hub.page]]
        return Reply({"discussions": shown, "count": len(found), "start": start})

    @route("GET", _API + r"/discussions/(?P<num>\d+)")
    def discussion_details(self, repo: Repo, num: str) -> Reply:
        found = repo.discussion(num)
        told = self.about(repo, found) | {"events": found.events, "diff": ""}
        if found.base:
            told["filesWithConflicts"] = [] if found.merged else repo.merged(found)[1]
            told["changes"] = {"base": found.base} | ({"mergeCommitId": found.merged} if found.merged else {})
        return Reply(told)

    @route("POST", _API + r"/discussions/(?P<num>\d+)/(?P<what>comment|status|title|merge)", "propose")
    def change_discussion(self, repo: Repo, num: str, what: str) -> Reply:
        asked, found, user = self.json(), repo.discussion(num), self.writer()
        if what == "comment":
            said = found.event("comment", user, edited=False, hidden=False, latest={"raw": asked["comment"]})
            return Reply({"newMessage": said})
        if what == "merge" or found.author != user:
            self.writer(repo.id)
        if what == "title":
            old, found.title = found.title, asked["title"]
            return Reply({"newTitle": found.event("title-change", user, **{"from": old, "to": found.title})})
        if what == "status":
            found.status = asked["status"]
            return Reply({"newStatus": found.event("status-change", user, status=found.status)})
        if not found.base or found.status not in ("open", "draft"):
            raise Refusal(400, None, "not an open pull request")
        tree, conflicts = repo.merged(found)
        if conflicts:
            raise Refusal(409, None, f"conflicts: {', '.join(conflicts)}")
        made = repo.write(found.base, tree, f"{found.title} (#{num})", user, parent=repo.refs[found.base])
        found.status, found.merged = "merged", made.sha
        found.event("status-change", user, status="merged")
        return Reply()

    # Last: its pattern meets any two words after the kind.
    @route("GET", _API + f"(?:/revision/{_REV})?")
    def info(self, repo: Repo, rev: str) -> Reply:
        return Reply(self.describe(repo, repo.find(rev or "main")))


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, hub: Hub, listener: socket.socket) -> None:
        super().__init__(listener.getsockname(), type("Handler", (_Handler,), {"hub": hub}), bind_and_activate=False)
        self.socket.close()
        self.socket, self.hub = listener, hub
        self.connections: set[socket.socket] = set()
        self.server_activate()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients that hang up are part of the tests
            self.hub.unknown.append(traceback.format_exc())

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):  # a kept-alive one would go on being served
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def running(hub: Hub, listener: socket.socket | None = None) -> Iterator[str]:
    """Serve; gives the endpoint.

    Args:
        listener: a bound socket to take, else any free port.
    """
    if listener is None:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
    hub.endpoint = "http://{}:{}".format(*listener.getsockname())
    server = _Server(hub, listener)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub.endpoint
    finally:
        server.stop()
