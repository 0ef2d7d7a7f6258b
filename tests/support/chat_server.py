"""A chat API on 127.0.0.1 that answers as told, and fails as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-hidden-123"


@dataclass
class ChatServer:
    """What it was asked, and what it does.

    Attributes:
        answer: a prompt -> the text of the answer. faults: done to the next requests, one each: a status, ``slow``,
            ``garbage`` (no JSON), ``empty`` (JSON without choices) or ``cut`` (the connection). retry_after: sent with a status.
        url: base URL while it serves. asked: the requests' bodies. keys: their Authorization. busiest: most requests at once.
    """

    answer: Callable[[str], str] = lambda prompt: "4.5\nFine."
    faults: list[int | str] = field(default_factory=list)
    retry_after: str = ""
    slow: float = 0.6
    pause: float = 0.0
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    busiest: int = 0
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self) -> int | str | None:
        with self.lock:
            return self.faults.pop(0) if self.faults else None


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_POST(self) -> None:  # noqa: N802 (the library's name)
        told: ChatServer = self.server.told
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with told.lock:
            told.asked.append(body | {"path": self.path})
            told.keys.append(self.headers.get("Authorization"))
            told.now += 1
            told.busiest = max(told.busiest, told.now)
        time.sleep(told.pause)
        with told.lock:
            told.now -= 1  # before the answer, upon which the client may send its next request
        try:
            self._answer(told, body)
        except OSError:  # the client went away
            pass

    def _answer(self, told: ChatServer, body: dict[str, Any]) -> None:
        fault = told.fault()
        if fault == "cut":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(told.slow)
        text = told.answer(body["messages"][-1]["content"])
        found: Any = {
            "id": "1", "created": 0, "model": body["model"], "object": "chat.completion", "system_fingerprint": "",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip
        status = fault if isinstance(fault, int) else 200
        data = json.dumps({"error": "no"} if status != 200 or fault == "empty" else found).encode()
        if fault == "garbage":
            data = b"<html>not what you asked for"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status != 200 and told.retry_after:
            self.send_header("Retry-After", told.retry_after)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def chatting(told: ChatServer) -> Iterator[str]:
    """Serve; gives the base URL."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.told = told
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
