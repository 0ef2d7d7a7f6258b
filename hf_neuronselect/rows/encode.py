"""Conversations to token ids, with the tokens that are pooled marked."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

import numpy as np
from jinja2 import TemplateError

from ..core.errors import NeuronSelectError, NeuronSelectWarning, one_of
from .formats import Conversation
from .turns import ROLES

POOL_TOKENS = ("all", "no_special", "content", "assistant", "user")
# Tokens that a signal may ask for besides the pooled ones, by name: the turns whose texts they are of.
MARKS = {"content": ROLES, "answer": ("assistant",), "prompt": ("assistant",)}
Spans: TypeAlias = list[tuple[int, int]]
# Errors a chat template can raise on a row.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
# The day that a chat template may print (Llama 3 prints it as "today"). With the day of the run, the same row would be
# other tokens tomorrow.
DAY = datetime(2024, 7, 26)
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])((?:(?!\1)[^\\])*)\1\s*\)""")
_BY_CHANCE = re.compile(r"\|\s*random\b|\blipsum\s*\(|\bstrftime_now\s*\(")  # gives another text each time
# Private-use characters: one that the rendered row lacks replaces a turn's text.
_SENTINELS = tuple(map(chr, range(0xE000, 0xF900)))


# The plain form of SampleEncoder as a chat template, with TRL's marks around the trained tokens.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{{ '\\n' }}{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Sample:
    """One tokenised row.

    Attributes:
        input_ids: int64 ``[n]``, the tokens fed to the model.
        pooled: bool ``[n]``, the tokens whose activations are averaged.
        marks: bool ``[n]`` by name (:data:`MARKS`): tokens of the turns' own texts (``content``), of the answers
            (``answer``), the one token before the first answer (``prompt``). Only those asked for.
        n_total: length before truncation.
        skip: reason the row has no tokens (``empty`` or ``error: …``), else ``""``.
    """

    input_ids: np.ndarray
    pooled: np.ndarray
    marks: Mapping[str, np.ndarray]
    n_total: int
    skip: str = ""

    @property
    def truncated(self) -> bool:
        return self.n_total > len(self.input_ids)


@dataclass(frozen=True)
class Limits:
    """What a model can be fed.

    Attributes:
        positions: tokens of a row. embeddings: token ids are below that. None: not limited.
    """

    positions: int | None = None
    embeddings: int | None = None

    def beyond(self, tokenizer: Any, ids: Sequence[int] | np.ndarray) -> str:
        """Why these ids cannot be fed to the model, "" if they can."""
        highest = int(np.max(ids)) if len(ids) else 0
        if self.embeddings is None or highest < self.embeddings:
            return ""
        token = tokenizer.convert_ids_to_tokens(highest)
        return f"the tokenizer's {token!r} has the id {highest}, the model embeddings for {self.embeddings} tokens"


def templates_of(tokenizer: Any) -> dict[str, str]:
    """A tokenizer's chat templates by name; a single one is ``default``."""
    found = tokenizer.chat_template
    if isinstance(found, Mapping):
        return dict(found)
    if isinstance(found, (list, tuple)):  # as older files have them
        return {one["name"]: one["template"] for one in found}
    return {"default": found} if found else {}


def _pinned(template: str) -> str:
    """A chat template whose date is :data:`DAY`.

    Raises:
        NeuronSelectError: it prints something else that is not the same each time.
    """
    template = _CLOCK.sub(lambda call: repr(DAY.strftime(call[2])), template)
    if found := _BY_CHANCE.search(template):
        raise NeuronSelectError(
            f"the chat template prints something else each time ({found[0].strip()}), and so would a row's tokens be: give "
            "one without it", option="chat_template",
        )  # fmt: skip
    return template


def _skipped(reason: str, n_total: int = 0) -> Sample:
    return Sample(np.zeros(0, np.int64), np.zeros(0, bool), {}, n_total, reason)


def _difference(text: str, other: str) -> tuple[int, int]:
    """Start and end of the part of ``text`` that differs from ``other``."""

    def agreeing(limit: int, same: Any) -> int:
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if same(middle) else (low, middle - 1)
        return low

    limit = min(len(text), len(other))
    start = agreeing(limit, lambda n: text[:n] == other[:n])
    tail = agreeing(limit - start, lambda n: n == 0 or text[-n:] == other[-n:])
    return start, len(text) - tail


def _whole(rendered: str, start: int, end: int, text: str) -> tuple[int, int]:
    """The turn's whole text around the part that differs: a template can print its beginning (a thought's mark) anyway."""
    at = rendered.find(text, max(0, end - len(text)), start + len(text)) if text else -1
    return (start, end) if at < 0 else (min(start, at), max(end, at + len(text)))


class SampleEncoder:
    r"""Turns conversations into token ids, through the tokenizer's chat template or the plain form.

    Without a chat template each turn becomes ``<|role|>\n{content}\n``, with the tokenizer's BOS first and its EOS
    after each assistant turn (choice: the form of Tulu).

    A turn's span is found in the *rendered* text: the conversation is rendered again with that turn replaced, and the
    part that differs is the turn. Templates may therefore strip, trim or reorder text, and nothing is tokenised twice.

    Args:
        tokenizer: a transformers tokenizer; spans need a fast one (offsets).
        pool_tokens: ``all``, ``no_special``, ``content`` (the turns' own texts), ``assistant`` or ``user``.
        max_length: tokens kept of a row.
        truncation_side: the side that is cut; ``right`` keeps the beginning.
        marks: names of :data:`MARKS`, tokens to find besides the pooled ones.
        chat_template: overrides the tokenizer's own. Of several named ones, rows with tools take ``tool_use``, all
            others ``default``. A date in it is always :data:`DAY`.
        limits: of the model that the tokens are for.

    Raises:
        NeuronSelectError: an option out of range, spans with a slow tokenizer, named templates without a default, a template
            that prints something else each time.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        pool_tokens: str = "all",
        max_length: int = 2048,
        truncation_side: str = "right",
        marks: Sequence[str] = (),
        chat_template: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.pool_tokens = one_of(pool_tokens, POOL_TOKENS, "pool_tokens")
        self.truncation_side = one_of(truncation_side, ("right", "left"), "truncation_side")
        if max_length < 1:
            raise NeuronSelectError("must be at least 1", option="max_length", value=max_length)
        self.asked, self.limits = max_length, limits or Limits()
        self.max_length = min(max_length, self.limits.positions or max_length)
        self.marks = {name: MARKS[name] for name in marks}
        self.pooled_roles = {"content": ROLES, "assistant": ("assistant",), "user": ("user",)}.get(pool_tokens, ())
        self.templates = {"default": chat_template} if chat_template else templates_of(tokenizer)
        if self.templates and "default" not in self.templates:
            raise NeuronSelectError(
                f"the tokenizer's chat templates are named {', '.join(self.templates)}, none default: give one's text",
                option="chat_template",
            )
        self.templates = {name: _pinned(template) for name, template in self.templates.items()}
        self.special_ids = np.asarray(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        self.needs_offsets = bool(self.marks or self.pooled_roles)
        if self.needs_offsets and not tokenizer.is_fast:
            raise NeuronSelectError(
                "finding the turns needs a fast tokenizer (offsets): use pool_tokens all or no_special, and a method that "
                "reads whole rows",
                option="pool_tokens",
                value=pool_tokens,
            )

    def render(self, conversation: Conversation) -> str:
        """The text fed to the model, special tokens included."""
        if conversation.text is not None:
            return conversation.text
        if not self.templates:
            return self._render_plain(conversation.messages)
        name = "tool_use" if conversation.tools and "tool_use" in self.templates else "default"
        return self.tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            chat_template=self.templates[name],
            tokenize=False,
        )

    def _render_plain(self, messages: list[dict[str, Any]]) -> str:
        eos = self.tokenizer.eos_token or ""
        turns = (f"<|{m['role']}|>\n{m['content']}{eos if m['role'] == 'assistant' else ''}\n" for m in messages)
        return (self.tokenizer.bos_token or "") + "".join(turns)

    def spans(self, conversation: Conversation, rendered: str, roles: Iterable[str]) -> list[tuple[int, int]]:
        """Character spans ``[start, end)`` in ``rendered`` of the turns of ``roles``, in their order."""
        return _spans_of(self.turn_spans(conversation, rendered), roles)

    def turn_spans(self, conversation: Conversation, rendered: str) -> list[tuple[str, int, int]]:
        """Every turn's role and character span in ``rendered``; plain text is one turn of any role."""
        if conversation.text is not None:
            return [(role, 0, len(rendered)) for role in ROLES]
        found = self._spans_at_once(conversation, rendered)
        if found is None:
            sentinel = next(s for s in _SENTINELS if s not in rendered)
            found = {}
            for i, message in enumerate(conversation.messages):
                start, end = _difference(rendered, self._render_replaced(conversation, i, sentinel))
                text = message["content"].strip() if end > start else ""
                found[i] = _whole(rendered, start, end, text)
        return [(message["role"], *found[i]) for i, message in enumerate(conversation.messages)]

    def _spans_at_once(self, conversation: Conversation, rendered: str) -> dict[int, tuple[int, int]] | None:
        """The span of every turn by one more rendering, in which all turns are replaced.

        What stands between the turns there must stand between their texts in ``rendered``, too, as they are or
        stripped. None where it does not: turns with calls or reasoning, or a template that treats texts differently.
        """
        if any(set(turn) & {"tool_calls", "reasoning_content"} for turn in conversation.messages):
            return None
        free = (s for s in _SENTINELS if s not in rendered)
        mark = next(free) + next(free)  # a template that strips or looks for a word sees a text
        replaced = [turn | {"content": mark} for turn in conversation.messages]
        try:
            around = self.render(Conversation(messages=replaced, tools=conversation.tools)).split(mark)
        except _TEMPLATE_ERRORS:
            return None
        if len(around) != len(replaced) + 1 or not rendered.startswith(around[0]):
            return None
        found, position = {}, len(around[0])
        for i, (turn, behind) in enumerate(zip(conversation.messages, around[1:], strict=True)):
            text = turn["content"]
            for form in (text, text.strip(), text.lstrip(), text.rstrip()):
                end = position + len(form)
                if rendered.startswith(form, position) and rendered.startswith(behind, end):
                    break
            else:
                return None
            found[i] = (position, end)
            position = end + len(behind)
        return found if position == len(rendered) else None

    def _render_replaced(self, conversation: Conversation, i: int, sentinel: str) -> str:
        """Render with the text of turn ``i`` replaced; the turn's other keys (ids, names) stay."""
        before, turn, after = conversation.messages[:i], conversation.messages[i], conversation.messages[i + 1 :]
        turn = turn | {k: sentinel for k in ("content", "reasoning_content") if k in turn}

        def render(turn: dict[str, Any]) -> str:
            return self.render(Conversation(messages=[*before, turn, *after], tools=conversation.tools))

        if not turn.get("tool_calls"):
            return render(turn)
        try:
            return render({k: v for k, v in turn.items() if k != "tool_calls"})
        except _TEMPLATE_ERRORS:  # the template needs calls before their results: keep them, without their text
            calls = [call | {"function": {"name": sentinel, "arguments": {}}} for call in turn["tool_calls"]]
            return render(turn | {"tool_calls": calls})

    def encode(self, conversations: Sequence[Conversation]) -> list[Sample]:
        """Tokenise. Rows that cannot be used are returned with ``skip`` set, never dropped."""
        samples: list[Sample | None] = [None] * len(conversations)
        rendered: dict[int, str] = {}
        spans: dict[int, tuple[Spans, dict[str, Spans]]] = {}
        for i, conversation in enumerate(conversations):
            if conversation.skip:
                samples[i] = _skipped(conversation.skip)
                continue
            if self.pool_tokens in ("assistant", "user") and not any(
                m["role"] == self.pool_tokens for m in conversation.messages
            ):
                samples[i] = _skipped(f"error: no {self.pool_tokens} turn to pool")
                continue
            try:
                text = self.render(conversation)
                if self.needs_offsets:
                    of_turns = self.turn_spans(conversation, text)
                    spans[i] = (
                        _spans_of(of_turns, self.pooled_roles),
                        {name: _spans_of(of_turns, roles) for name, roles in self.marks.items()},
                    )
                    if conversation.text is not None:  # no turn, so no prompt
                        spans[i][1].pop("prompt", None)
            except _TEMPLATE_ERRORS as error:
                reason = re.sub(r"\s+", " ", str(error))[:200]
                samples[i] = _skipped(f"error: the chat template refused the row: {reason}")
                continue
            rendered[i] = text

        # Plain text gets the tokenizer's BOS; rendered text already has it.
        for is_text in (False, True):
            rows = [i for i in rendered if (conversations[i].text is not None) == is_text]
            if not rows:
                continue
            bos = self.tokenizer.bos_token
            plain = [rendered[i].removeprefix(bos) if is_text and bos else rendered[i] for i in rows]
            encoded = self.tokenizer(
                plain,
                add_special_tokens=is_text,
                return_attention_mask=False,
                return_offsets_mapping=self.needs_offsets,
                truncation=False,
                verbose=False,
            )
            for j, i in enumerate(rows):
                offsets = np.asarray(encoded["offset_mapping"][j]).reshape(-1, 2) if self.needs_offsets else None
                samples[i] = self._sample(np.asarray(encoded["input_ids"][j], np.int64), offsets, spans.get(i))
        found = [sample for sample in samples if sample is not None]
        if self.max_length < self.asked and any(sample.truncated and not sample.skip for sample in found):
            asked = f", not at max_length {self.asked}" if self.asked < sys.maxsize else ""
            warnings.warn(
                f"rows longer than the model's {self.max_length} positions are cut there{asked}, and counted as truncated; give "
                f"max_length {self.max_length} to say so",
                NeuronSelectWarning,
                stacklevel=2,
            )
        return found

    def _sample(
        self, ids: np.ndarray, offsets: np.ndarray | None, spans: tuple[Spans, dict[str, Spans]] | None
    ) -> Sample:
        n_total = len(ids)
        if n_total == 0:
            return _skipped("empty")
        if self.pool_tokens == "no_special":
            pooled = ~np.isin(ids, self.special_ids)
        else:
            pooled = np.ones(n_total, bool)
        marks: dict[str, np.ndarray] = {}
        if offsets is not None and spans is not None:
            if self.pooled_roles:
                pooled = _inside(offsets, spans[0])
            marks = {name: _inside(offsets, spans[1].get(name, [])) for name in self.marks}
            if "prompt" in marks:
                marks["prompt"] = _before_first(marks["prompt"])
        keep = slice(0, self.max_length) if self.truncation_side == "right" else slice(-self.max_length, None)
        ids, pooled = ids[keep], pooled[keep]
        if beyond := self.limits.beyond(self.tokenizer, ids):
            return _skipped(f"error: {beyond}", n_total)
        if not pooled.any():
            return _skipped(f"error: no {self.pool_tokens} token within max_length={self.max_length}", n_total)
        return Sample(ids, pooled, {name: mark[keep] for name, mark in marks.items()}, n_total)


def _spans_of(turns: Iterable[tuple[str, int, int]], roles: Iterable[str]) -> Spans:
    """The spans of some roles' turns, without empty ones."""
    wanted = set(roles)
    return list(dict.fromkeys((start, end) for role, start, end in turns if role in wanted and end > start))


def _before_first(mark: np.ndarray) -> np.ndarray:
    """Bool ``[n]``: the token before the first marked one; none if that is the first of all."""
    found = np.zeros_like(mark)
    if mark.any() and (first := int(mark.argmax())):
        found[first - 1] = True
    return found


def _inside(offsets: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """Bool ``[n]``: tokens, with character offsets ``[n, 2]``, that overlap any of the spans."""
    if not spans:
        return np.zeros(len(offsets), bool)
    starts, ends = np.asarray(sorted(spans), np.int64).T
    reach = np.concatenate([[-1], np.maximum.accumulate(ends)])  # where the spans that begin before a place end
    first, last = offsets[:, 0], offsets[:, 1]
    return np.asarray((last > first) & (reach[np.searchsorted(starts, last, side="left")] > first))
