"""Who is asked: a chat model behind an API, a provider of the Hub, or a model on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from ..core.errors import NeuronSelectError
from ..core.judging import API, HUB, LOCAL, JudgeOptions
from ..core.sources import Source
from .checkpoint import config_of, limits_of
from .dtypes import auto_dtype
from .next_token import GREEDY
from .pin import pin_named

if TYPE_CHECKING:
    from .loading import Place

LOCAL_ROWS, LOCAL_TOKENS = 8, 8192
"""Rows, and padded tokens of their prompts, that a local judge reads at once."""
Messages = Sequence[Mapping[str, str]]


class Client(Protocol):
    """Answers one request at a time."""

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
        price_in, price_out: US dollars a million tokens, of prompts and of answers. dtype: of a local one's weights.
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
    dtype: str = ""

    @classmethod
    def of(cls, options: JudgeOptions, *, begin: str, local_tokens: int, max_tokens: int = 256) -> Self:
        """The judge that options name.

        Args:
            begin, local_tokens: of a local judge, what its answers are made to begin with, and how long they may be.
            max_tokens: of any other judge's answers.

        Raises:
            NeuronSelectError: a local one that cannot be had.
        """
        if options.place == LOCAL:
            model = pin_named(options.judge, "judge")
            dtype = auto_dtype(config_of(model))
            return cls(model.id, LOCAL, model=model, begin=begin, max_tokens=local_tokens, dtype=dtype)
        return cls(
            options.judge, options.place, options.key or "", max_tokens=max_tokens, tries=options.tries, timeout=options.timeout,
            concurrency=options.concurrency, price_in=options.price_in, price_out=options.price_out,
        )  # fmt: skip

    @property
    def identity(self) -> list[str | int]:
        """What moves an answer."""
        if self.model is not None:
            return [LOCAL, self.model.key, self.max_tokens, self.begin, self.dtype, "greedy"]
        return [self.at.rstrip("/"), self.name, self.max_tokens]

    @property
    def key_name(self) -> str:
        """The environment variable with the key that is sent; "" for none."""
        return self.key or ("OPENAI_API_KEY" if self.at.startswith(API.removesuffix("v1")) else "")

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


class Api:
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


class Local:
    """A model on this machine, greedily; without a place on the first GPU, or the CPU."""

    def __init__(self, spec: JudgeSpec, place: Place | None = None) -> None:
        import torch

        from .loading import ModelSpec, causal_lm_of, tokenizer_of

        assert spec.model is not None
        place = place or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.tokenizer = causal_lm_of(ModelSpec(spec.model, spec.dtype), place), tokenizer_of(spec.model)
        self.max_tokens, self.begin = spec.max_tokens, spec.begin
        self.window = limits_of(self.model.config).positions

    def replies(self, asked: Mapping[str, Messages]) -> Iterator[tuple[str, str | None, str]]:
        """Key and answer of each, the longest questions first; no answer for the reason after it."""
        import torch

        encoded = {key: self._ids(messages) for key, messages in asked.items()}
        for key in [key for key, ids in encoded.items() if self.window and len(ids) + self.max_tokens > self.window]:
            tokens = len(encoded.pop(key))
            yield key, None, f"error: {tokens:,} tokens are asked, the judge reads {self.window:,} with its answer"
        keys = sorted(encoded, key=lambda key: -len(encoded[key]))
        while keys:
            width = len(encoded[keys[0]])
            count = max(1, min(LOCAL_ROWS, LOCAL_TOKENS // width))
            batch, keys = keys[:count], keys[count:]
            ids = torch.zeros((len(batch), width), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for i, key in enumerate(batch):  # padded on the left: answers begin at one position
                ids[i, width - len(encoded[key]) :] = torch.tensor(encoded[key])
                mask[i, width - len(encoded[key]) :] = 1
            with torch.no_grad():
                out = self.model.generate(
                    input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device), **GREEDY,
                    max_new_tokens=self.max_tokens, pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                )  # fmt: skip
            for key, said in zip(batch, out[:, width:], strict=True):
                yield key, self.begin + str(self.tokenizer.decode(said, skip_special_tokens=True)), ""

    def _ids(self, messages: Messages) -> list[int]:
        turns = [dict(one) for one in messages]
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        else:
            text = "".join(f"<|{turn['role']}|>\n{turn['content']}\n" for turn in turns) + "<|assistant|>\n"
        return list(self.tokenizer(text + self.begin, add_special_tokens=False)["input_ids"])
