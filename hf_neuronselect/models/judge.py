"""A judge: a chat model that is asked about rows, behind an API or on this machine. Every answer is kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError, InferenceTimeoutError, OfflineModeIsEnabled

from ..core.digests import cache_dir
from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.judging import LOCAL
from .chat import Api, Client, JudgeSpec, Local, Messages
from .loading import Place

LONGEST_WAIT = 60.0
"""Seconds waited at most between two tries."""
GIVE_UP = 20
"""Rows that are refused before any is answered, after which something else must be wrong."""
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_OF_ROW = {400, 413, 422}
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    Attributes:
        text: None where there is none, for the reason in ``problem``. asked: whether it was asked now, not read from disk.
    """

    text: str | None
    problem: str = ""
    asked: bool = False


@dataclass(frozen=True)
class Rating(Generic[T]):
    """What was read in an answer.

    Attributes:
        value: None where there is nothing, for the reason in ``problem``. said: the answer as it is.
    """

    value: T | None
    problem: str = ""
    said: str = ""


@dataclass(frozen=True)
class Estimate:
    """What asking costs, before it is done: tokens are guessed from the letters, answers are as long as they may be."""

    requests: int
    kept: int
    tokens_in: int
    tokens_out: int
    money: float | None

    def __str__(self) -> str:
        price = "" if self.money is None else f", at most ${self.money:.2f}"
        kept = f"; {self.kept:,} were answered before" if self.kept else ""
        return f"{self.requests:,} requests, about {self.tokens_in:,} tokens in and at most {self.tokens_out:,} out{price}{kept}"


@dataclass
class Judge:
    """Asks, waits where it must, and never asks the same again.

    Args:
        client: of ``spec``'s place, made when it is first needed. place: of a local one's model. sleep: waits.

    Attributes:
        requests: sent so far, tries included. money: they cost, if prices are known.
    """

    spec: JudgeSpec
    client: Client | Local | None = None
    place: Place | None = None
    sleep: Callable[[float], None] = time.sleep
    requests: int = 0
    money: float = 0.0
    _kept: dict[str, str] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # ------------------------------------------------------------------------------------ on disk
    @property
    def file(self) -> Path:
        """Where answers are kept: one JSON line each."""
        return cache_dir() / "judged" / f"{_digest(self.spec.identity)}.jsonl"

    def _answers(self) -> dict[str, str]:
        if self._kept is None:
            self._kept = {}
            if self.file.is_file():
                for line in self.file.read_bytes().splitlines():
                    try:
                        one = json.loads(line)
                        self._kept[str(one["key"])] = str(one["answer"])
                    except (ValueError, TypeError, KeyError):  # a line that was cut by a kill is asked again
                        continue
        return self._kept

    def _keep(self, key: str, answer: str) -> None:
        line = json.dumps({"key": key, "answer": answer}) + "\n"
        with self._lock:
            self._answers()[key] = answer
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as file:
                if file.tell() and not self._ended():
                    line = "\n" + line
                file.write(line.encode())

    def _ended(self) -> bool:
        """Whether the file's last line is whole."""
        with self.file.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    # ------------------------------------------------------------------------------------- asking
    def estimate(self, asked: Sequence[Messages]) -> Estimate:
        """What :meth:`ask` would cost."""
        keys = [_digest(one) for one in asked]
        kept = sum(key in self._answers() for key in keys)
        new = [one for key, one in dict(zip(keys, asked, strict=True)).items() if key not in self._answers()]
        tokens_in = sum(len(turn["content"]) for one in new for turn in one) // 4 + 8 * len(new)
        tokens_out = self.spec.max_tokens * len(new)
        return Estimate(len(new), kept, tokens_in, tokens_out, self._price(tokens_in, tokens_out))

    def _price(self, tokens_in: int, tokens_out: int) -> float | None:
        if self.spec.price_in is None and self.spec.price_out is None:
            return None
        return (tokens_in * (self.spec.price_in or 0) + tokens_out * (self.spec.price_out or 0)) / 1e6

    def ask(self, asked: Sequence[Messages], done: Callable[[Messages], None] = lambda messages: None) -> list[Answer]:
        """The answers, in their order; equal questions are asked once, and what was answered before not at all.

        Args:
            done: called with each question that was answered, in their order.

        Raises:
            NeuronSelectError: the judge cannot be reached, or refuses all. What was answered is kept.
        """
        kept = self._answers()
        keys = [_digest(one) for one in asked]
        new = {key: one for key, one in zip(keys, asked, strict=True) if key not in kept}
        problems: dict[str, str] = {}
        if new:
            self.client = self.client or (Local(self.spec, self.place) if self.spec.at == LOCAL else Api(self.spec))
            if isinstance(self.client, Local):
                for key, said, problem in self.client.replies(new):
                    if said is None:
                        problems[key] = problem
                    else:
                        self._keep(key, said)
                    done(new[key])
                return [Answer(kept.get(key), problems.get(key, ""), key in new) for key in keys]
            stop = threading.Event()

            def one(item: tuple[str, Messages]) -> None:
                key, messages = item
                try:
                    text, problem = self._request(messages, stop)
                except BaseException:
                    stop.set()
                    raise
                if text is not None:
                    self._keep(key, text)
                elif problem:
                    problems[key] = problem
                    if len(problems) >= GIVE_UP and not any(key in kept for key in new):
                        stop.set()
                        raise self._failed(f"refuses every row ({problem.removeprefix('error: ')})")

            pool = ThreadPoolExecutor(self.spec.concurrency, "judge")
            try:
                for messages, _ in zip(new.values(), pool.map(one, list(new.items())), strict=True):
                    done(messages)
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        return [Answer(kept.get(key), problems.get(key, ""), key in new) for key in keys]

    def rate(
        self, asked: Sequence[Messages], read: Callable[[str], T | None], *, what: str, unread: str,
        done: Callable[[Messages], None] = lambda messages: None,
    ) -> list[Rating[T]]:  # fmt: skip
        """Ask, and read what is answered. Warns of the cost before, and of answers that cannot be read.

        Args:
            read: an answer -> what it says; None where it cannot be read. what: is asked about, e.g. ``rows``.
            unread: the reason of an answer that cannot be read. done: as in :meth:`ask`.

        Raises:
            NeuronSelectError: as :meth:`ask`.
        """
        estimate = self.estimate(asked)
        if estimate.requests:
            warnings.warn(f"{self.spec.name} is asked about {len(asked):,} {what}: {estimate}", NeuronSelectWarning,
                          stacklevel=3)  # fmt: skip
        found = []
        for answer in self.ask(asked, done):
            value = None if answer.text is None else read(answer.text)
            problem = "" if value is not None else answer.problem or unread
            found.append(Rating(value, problem, answer.text or ""))
        if lost := sum(one.value is None for one in found):
            warnings.warn(
                f"{lost:,} of {len(asked):,} answers of {self.spec.name} cannot be read: these {what} have no mark",
                NeuronSelectWarning, stacklevel=3,
            )  # fmt: skip
        return found

    def _request(self, messages: Messages, stop: threading.Event) -> tuple[str | None, str]:
        """The text of an answer, or why this row has none (nothing: it was not asked, since all was stopped).

        Raises:
            NeuronSelectError: no answer can be had.
        """
        assert self.client is not None and not isinstance(self.client, Local)
        why = ""
        for nth in range(self.spec.tries):
            if stop.is_set():
                return None, ""
            with self._lock:
                self.requests += 1
            wait = min(LONGEST_WAIT, 2.0**nth) * (0.5 + random.random() / 2)
            try:
                text = self.client.reply(messages)
            except OfflineModeIsEnabled:
                raise self._failed("cannot be asked: HF_HUB_OFFLINE is set; unset it, or use at=local") from None
            except HfHubHTTPError as cause:
                status = getattr(cause.response, "status_code", 0)
                why = f"answered {status}"
                if status in _OF_ROW:
                    return None, f"error: the judge refused the row ({status})"
                if status not in _AGAIN:
                    key = self.spec.key_name
                    mends = {401: f"; the key in {key} is wrong" if key else "; name the variable with its key: key=NAME", 403: "; the key may not use it",
                             404: "; no model of this name, or no such URL", 402: "; the account has no credit"}  # fmt: skip
                    raise self._failed(f"{why}{mends.get(status, '')}") from None
                wait = max(wait, min(LONGEST_WAIT, _retry_after(cause.response)))
            except (InferenceTimeoutError, TimeoutError):
                why = f"did not answer within {self.spec.timeout:g} s"
            except (HTTPError, OSError) as cause:
                kind = type(cause).__name__
                late = kind.endswith("Timeout")  # huggingface-hub 1.5 lets its HTTP client's own through
                why = f"did not answer within {self.spec.timeout:g} s" if late else f"cannot be reached ({kind})"
            except (ValueError, TypeError, KeyError, IndexError, AttributeError):
                why = "answered something that is no chat completion"
            else:
                price = self._price(sum(len(turn["content"]) for turn in messages) // 4, len(text) // 4)
                with self._lock:
                    self.money += price or 0.0
                return text, ""
            if nth + 1 < self.spec.tries:
                self.sleep(wait)
        raise self._failed(f"{why}, {self.spec.tries} times")

    def _failed(self, what: str) -> NeuronSelectError:
        kept = len(self._answers())
        return NeuronSelectError(
            f"the judge at {self.spec.at} {what}; {kept} answers are kept: run again to go on", option="judge",
            value=self.spec.name,
        )  # fmt: skip


def _retry_after(response: Any) -> float:
    """Seconds that a server asks to wait; 0 where it does not say."""
    said = str(getattr(response, "headers", {}).get("retry-after") or "")
    if re.fullmatch(r"\d+(\.\d+)?", said):
        return float(said)
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time()) if said else 0.0
    except (ValueError, TypeError):
        return 0.0


def _digest(state: Any) -> str:
    return hashlib.blake2b(json.dumps(state, sort_keys=True, default=dict).encode(), digest_size=16).hexdigest()
