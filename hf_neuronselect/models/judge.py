"""A judge: a chat model that is asked about rows, behind an API or on this machine. Every answer is kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub.errors import HfHubHTTPError, HTTPError, InferenceTimeoutError, OfflineModeIsEnabled

from ..core.digests import cache_dir
from ..core.errors import NeuronSelectError
from ..core.sources import Source

HUB, LOCAL = "hub", "local"
LONGEST_WAIT = 60.0
"""Seconds waited at most between two tries."""
LOCAL_ROWS = 8
"""Rows that a local judge answers at once."""
GIVE_UP = 20
"""Rows that are refused before any is answered, after which something else must be wrong."""
_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_OF_ROW = {400, 413, 422}
_RANGE = re.compile(r"\d+\s*(?:-|–|to|\.\.)\s*\d+|(?:/|out\s+of)\s*5(?![\d.,])", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.,-])-?\d+(?:[.,]\d+)?(?!\w|[.,]\d)")
Messages = Sequence[Mapping[str, str]]


class _Client(Protocol):
    def reply(self, messages: Messages) -> str:
        """The text of an answer; raises what the client raises."""


@dataclass(frozen=True)
class JudgeSpec:
    """A judge, and how it is asked. Answers are greedy (temperature 0).

    Attributes:
        name: the model's name at the URL, its Hub id, or (``at=local``) a folder or Hub id. at: ``hub`` (a provider of the
            Hub), ``local``, or the base URL of an API like OpenAI's. key: environment variable with that API's key; OpenAI's own is sent
            to OpenAI alone, unless it is named.
        model: of a local one, pinned. begin: what its answers are made to begin with, since small models talk around a mark.
        max_tokens: of an answer. tries: of a request that fails. timeout: seconds of one. concurrency: requests at once.
        price_in, price_out: US dollars a million tokens, of prompts and of answers.
    """

    name: str
    at: str
    key: str = ""
    model: Source | None = None
    begin: str = ""
    max_tokens: int = 256
    tries: int = 6
    timeout: float = 60.0
    concurrency: int = 8
    price_in: float | None = None
    price_out: float | None = None

    @property
    def identity(self) -> list[str | int]:
        """What moves an answer."""
        if self.model is not None:
            return [LOCAL, self.model.key, self.max_tokens, self.begin]
        return [self.at.rstrip("/"), self.name, self.max_tokens]

    @property
    def key_name(self) -> str:
        """The environment variable with the key that is sent; "" for none."""
        return self.key or ("OPENAI_API_KEY" if self.at.startswith("https://api.openai.com/") else "")

    def check(self) -> None:
        """Refuse a judge that cannot be asked.

        Raises:
            NeuronSelectError: no URL, or no key for it.
        """
        if self.at in (HUB, LOCAL):
            return
        if not re.match(r"https?://[^/\s]+", self.at):
            raise NeuronSelectError(
                "must be hub, local, or the base URL of an API: https://…/v1", option="at", value=self.at
            )
        if self.key_name and not os.environ.get(self.key_name):
            raise NeuronSelectError(
                f"the judge {self.name} needs a key: set the environment variable {self.key_name}, or name another judge "
                "(at=hub, at=local, or another URL)", option="key", value=self.key_name,
            )  # fmt: skip


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
        client: of ``spec``'s place, made when it is first needed. sleep: waits.

    Attributes:
        requests: sent so far, tries included. money: they cost, if prices are known.
    """

    spec: JudgeSpec
    client: _Client | _Local | None = None
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
        new = [text for key, text in {_digest(one): one for one in asked}.items() if key not in self._answers()]
        tokens_in = sum(len(turn["content"]) for one in new for turn in one) // 4 + 8 * len(new)
        tokens_out = self.spec.max_tokens * len(new)
        return Estimate(len(new), len(asked) - len(new), tokens_in, tokens_out, self._price(tokens_in, tokens_out))

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
            self.client = self.client or (_Local(self.spec) if self.spec.at == LOCAL else _Api(self.spec))
            if isinstance(self.client, _Local):
                for key, text in self.client.replies(new):
                    self._keep(key, text)
                    done(new[key])
                return [Answer(kept[key], asked=key in new) for key in keys]
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

    def _request(self, messages: Messages, stop: threading.Event) -> tuple[str | None, str]:
        """The text of an answer, or why this row has none (nothing: it was not asked, since all was stopped).

        Raises:
            NeuronSelectError: no answer can be had.
        """
        assert self.client is not None and not isinstance(self.client, _Local)
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
                why = f"cannot be reached ({type(cause).__name__})"
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


class _Api:
    """A provider of the Hub, or an API like OpenAI's. The Hub's token is never sent to a URL."""

    def __init__(self, spec: JudgeSpec) -> None:
        from huggingface_hub import InferenceClient  # heavy

        self.spec = spec
        if spec.at == HUB:
            self.client = InferenceClient(provider="auto", timeout=spec.timeout)
        else:
            key = os.environ.get(spec.key_name) or "none"
            self.client = InferenceClient(base_url=spec.at.rstrip("/"), api_key=key, timeout=spec.timeout)

    def reply(self, messages: Messages) -> str:
        found = self.client.chat_completion(
            [dict(one) for one in messages], model=self.spec.name, temperature=0.0, max_tokens=self.spec.max_tokens
        )
        text = found.choices[0].message.content
        if not isinstance(text, str):
            raise TypeError("no text")
        return text


class _Local:
    """A model on this machine, greedily."""

    def __init__(self, spec: JudgeSpec) -> None:
        import torch

        from .loading import ModelSpec, causal_lm_of, tokenizer_of

        assert spec.model is not None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        self.model, self.tokenizer = causal_lm_of(ModelSpec(spec.model, dtype), device), tokenizer_of(spec.model)
        self.max_tokens, self.begin = spec.max_tokens, spec.begin

    def replies(self, asked: Mapping[str, Messages]) -> Iterator[tuple[str, str]]:
        """Key and answer of each, the longest questions first."""
        import torch

        encoded = {key: self._ids(messages) for key, messages in asked.items()}
        keys = sorted(encoded, key=lambda key: -len(encoded[key]))
        for batch in (keys[start : start + LOCAL_ROWS] for start in range(0, len(keys), LOCAL_ROWS)):
            width = len(encoded[batch[0]])
            ids = torch.zeros((len(batch), width), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for i, key in enumerate(batch):  # padded on the left: answers begin at one position
                ids[i, width - len(encoded[key]) :] = torch.tensor(encoded[key])
                mask[i, width - len(encoded[key]) :] = 1
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device), do_sample=False,
                    max_new_tokens=self.max_tokens, temperature=None, top_p=None, top_k=None,
                    pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                )  # fmt: skip
            for key, said in zip(batch, out[:, width:], strict=True):
                yield key, self.begin + str(self.tokenizer.decode(said, skip_special_tokens=True))

    def _ids(self, messages: Messages) -> list[int]:
        turns = [dict(one) for one in messages]
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        else:
            text = "".join(f"<|{turn['role']}|>\n{turn['content']}\n" for turn in turns) + "<|assistant|>\n"
        return list(self.tokenizer(text + self.begin, add_special_tokens=False)["input_ids"])


def read_mark(answer: str, most: float = 5.0) -> float | None:
    """The one number on an answer's first line; None where there is none, several, or one out of range."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    if not lines:
        return None
    found = _NUMBER.findall(_RANGE.sub(" ", lines[0].replace("*", " ").replace("_", " ")))
    if len(found) != 1:
        return None
    mark = float(found[0].replace(",", "."))
    return mark if 0 <= mark <= most else None


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
