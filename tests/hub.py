"""A small Hub on 127.0.0.1 that the real clients download from: models and datasets, and the errors a Hub gives."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

# Repository names that always fail: status, X-Error-Code.
FAILING = {
    "me/gated": (403, "GatedRepo"),
    "me/private": (401, "RepoNotFound"),
    "me/forbidden": (403, None),
    "me/broken": (501, None),
}


class Hub:
    """Repositories by (kind, id): ``{path: bytes}``; one commit each, branch ``main``."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}
        self.requests: list[str] = []

    def add(self, kind: str, name: str, files: dict[str, bytes]) -> str:
        self.repos[kind, name] = {".gitattributes": b"", **files}
        return self.commit(kind, name)

    def commit(self, kind: str, name: str) -> str:
        content = [(path, hashlib.sha1(data).hexdigest()) for path, data in sorted(self.repos[kind, name].items())]
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: int, code: str | None) -> None:
        headers = {"X-Error-Message": "refused"} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": "refused"}).encode(), headers)

    def _json(self, found: object) -> None:
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        self._json([])

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        kind = parts[0] if parts[0] in ("models", "datasets") else "models"
        parts = parts[1:] if parts[0] in ("models", "datasets") else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        if name in FAILING:
            return self._fail(*FAILING[name])
        if (kind, name) not in self.hub.repos:
            return self._fail(404, "RepoNotFound")
        files, commit = self.hub.repos[kind, name], self.hub.commit(kind, name)
        revision = unquote(rest[1]) if len(rest) > 1 else "main"
        if revision not in ("main", commit):
            return self._fail(404, "RevisionNotFound")
        if not api:
            return self._file(files, commit, unquote("/".join(rest[2:])))
        if rest[:1] == ["tree"]:
            return self._tree(files, unquote("/".join(rest[2:])))
        siblings = [{"rfilename": file} for file in files]
        return self._json({"_id": "1", "id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def _file(self, files: dict[str, bytes], commit: str, path: str) -> None:
        if path not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[path]
        etag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first or 0), int(last) if last else len(data) - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._send(206, data[start : end + 1], headers)
        return self._send(200, data, headers)

    def _tree(self, files: dict[str, bytes], folder: str) -> None:
        inside = [path for path in files if not folder or path.startswith(f"{folder}/")]
        if folder and not inside:
            return self._fail(404, "EntryNotFound")
        recursive = "recursive=true" in self.path.lower()
        depth = folder.count("/") + 1 if folder else 0
        found: dict[str, dict] = {}
        for path in inside:
            parts = path.split("/")
            if not recursive and len(parts) > depth + 1:
                directory = "/".join(parts[: depth + 1])
                found[directory] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": directory}
            else:
                oid = hashlib.sha1(files[path]).hexdigest()
                found[path] = {"type": "file", "oid": oid, "size": len(files[path]), "path": path}
        return self._json(list(found.values()))


@contextmanager
def running(hub: Hub) -> Iterator[str]:
    """Serve; gives the endpoint."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
