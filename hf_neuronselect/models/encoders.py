"""Text encoders of sentence-transformers: pinned, loaded, and run over texts of any length."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download

from ..core.digests import encoder_hash
from ..core.errors import NeuronSelectError
from ..core.sources import Source, hub_errors, resolve
from .batching import plan_batches
from .dtypes import DTYPES
from .loading import on_forget

LIBRARY = "sentence_transformers"
# What an encoder is loaded from: never a pickle, nor copies of its weights for other frameworks.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_OTHERS = ("onnx/*", "openvino/*", "gguf/*")


@dataclass(frozen=True)
class Pieces:
    """A text cut into pieces that fit an encoder's window.

    Attributes:
        texts: the pieces, in their order. tokens: how many the encoder reads of each, special ones and prompt left out.
    """

    texts: tuple[str, ...]
    tokens: tuple[int, ...]


def pin_encoder(name: str, *, revision: str | None, token: str | bool | None) -> Source:
    """Pin an encoder by folder or Hub id.

    Raises:
        NeuronSelectError: it cannot be had, or its library is not installed.
    """
    if find_spec(LIBRARY) is None:
        raise NeuronSelectError(
            "needs sentence-transformers: pip install 'hf-neuronselect[rivals]'", option="encoder", value=name
        )
    probe = ("modules.json", "config.json")
    return resolve(name, revision=revision, token=token, option="encoder", probe=probe, hashed=encoder_hash)


class Encoder:
    """An encoder, ready to embed.

    Args:
        model: a ``SentenceTransformer``. prompt: put before every piece; None: the encoder's own default, if it has one.
        window: tokens of a piece, special ones and prompt included; None: all that the encoder takes.

    Raises:
        NeuronSelectError: a window that the encoder does not have, or that its prompt fills.
    """

    def __init__(self, model: Any, *, window: int | None, prompt: str | None, name: str = "") -> None:
        self.model, self.name = model, name
        default = model.default_prompt_name
        self.prompt: str = (model.prompts.get(default) if default and prompt is None else prompt) or ""
        most = model.max_seq_length or math.inf
        if window is not None and window > most:
            raise NeuronSelectError(f"{name} takes at most {most:.0f} tokens", option="encoder_window", value=window)
        self.window: float = window or most
        self.tokenizer = copy.deepcopy(model.tokenizer)  # a thread cuts with it while the model pads with its own
        self.room = math.inf  # tokens of the text itself in one piece
        if not math.isfinite(self.window):
            return
        if not getattr(self.tokenizer, "is_fast", False):
            raise NeuronSelectError("needs a fast tokenizer (offsets); name another", option="encoder", value=name)
        own = self._tokens([self.prompt])[0]
        self.room = self.window - self.tokenizer.num_special_tokens_to_add(pair=False) - len(own.offsets)
        if self.room < 1:
            raise NeuronSelectError(
                f"has no room for text beside {len(own.offsets)} tokens of the prompt; make it larger",
                option="encoder_window", value=int(self.window),
            )  # fmt: skip

    def _tokens(self, texts: Sequence[str]) -> list[Any]:
        """Tokens of texts with their characters and words, without special tokens."""
        if not texts:
            return []
        return list(self.tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False).encodings)

    def cut(self, texts: Sequence[str]) -> list[Pieces]:
        """Texts as pieces of at most one window each, cut between words wherever that is possible."""
        if not math.isfinite(self.room):  # it reads texts of any length
            return [Pieces((text,), (len(text.split()),)) for text in texts]
        return [
            self._cut(text, tokens, int(self.room)) for text, tokens in zip(texts, self._tokens(texts), strict=True)
        ]

    def _cut(self, text: str, tokens: Any, room: int) -> Pieces:
        offsets, words = tokens.offsets, tokens.word_ids
        if len(offsets) <= room:
            return Pieces((text,), (len(offsets),))
        parts, start = [], 0
        while start < len(offsets):
            end = min(start + room, len(offsets))
            between = end
            while start < between < len(offsets) and words[between] == words[between - 1]:
                between -= 1
            end = between if between > start else end  # a word longer than the window is cut anywhere
            first, last = offsets[start][0], offsets[end - 1][1]
            parts.append(text[first:last])
            start = end
        found_texts: list[str] = []
        found_tokens: list[int] = []
        for part, again in zip(parts, self._tokens(parts), strict=True):
            # By itself a piece can have other tokens than within its text: one that no longer fits is cut again.
            fits = len(again.offsets) <= self.room or room == 1
            pieces = Pieces((part,), (len(again.offsets),)) if fits else self._cut(part, again, max(1, room // 2))
            found_texts += pieces.texts
            found_tokens += pieces.tokens
        kept = [i for i, tokens_of in enumerate(found_tokens) if tokens_of]
        return Pieces(tuple(found_texts[i] for i in kept), tuple(found_tokens[i] for i in kept))

    def embed(
        self, rows: Sequence[Pieces], device: torch.device, batch_tokens: int, done: Callable[[int], None]
    ) -> np.ndarray:
        """Each row's embedding: the mean of its pieces', as the encoder gives them.

        Args:
            batch_tokens: tokens a batch. done: called with the tokens of each batch.

        Returns:
            float32 ``[rows, width]``.
        """
        texts = [text for row in rows for text in row.texts]
        tokens = [count for row in rows for count in row.tokens]
        around = 2 + max(0, int(self.window - self.room)) if math.isfinite(self.window) else 2
        vectors: list[Any] = [None] * len(texts)
        for chosen in plan_batches([count + around for count in tokens], batch_tokens):
            found = self.model.encode(
                [texts[i] for i in chosen], prompt=self.prompt, batch_size=len(chosen), device=str(device),
                show_progress_bar=False, convert_to_numpy=True,
            )  # fmt: skip
            for i, vector in zip(chosen.tolist(), found, strict=True):
                vectors[i] = np.asarray(vector, dtype=np.float64)
            done(sum(tokens[i] for i in chosen))
        ends = np.cumsum([len(row.texts) for row in rows])
        parts = np.split(np.stack(vectors), ends[:-1])
        return np.stack([part.mean(axis=0) for part in parts]).astype(np.float32)


@lru_cache(maxsize=2)
def encoder_of(source: Source, window: int | None, prompt: str | None, dtype: str) -> Encoder:
    """An encoder by its source, in one of :data:`~.dtypes.DTYPES` and on the CPU until it is run elsewhere.

    Raises:
        NeuronSelectError: it cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    folder = Path(source.location)
    if source.revision is not None:
        with hub_errors("encoder", source.id):
            found = snapshot_download(
                source.location, revision=source.revision, allow_patterns=list(_FILES), ignore_patterns=list(_OTHERS)
            )
        folder = Path(found)
    _check_files(folder, source.id)
    try:
        model = SentenceTransformer(
            str(folder), device="cpu", trust_remote_code=False, local_files_only=True,
            model_kwargs={"use_safetensors": True, "dtype": DTYPES[dtype]},
        )  # fmt: skip
    except Exception as cause:  # damaged files raise errors of many kinds
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:240]
        raise NeuronSelectError(f"cannot be loaded: {reason}", option="encoder", value=source.id) from cause
    model.eval().requires_grad_(False)
    made = Encoder(model, window=window, prompt=prompt, name=source.id)
    if math.isfinite(made.window):
        model.max_seq_length = int(made.window)
    return made


def _check_files(folder: Path, name: str) -> None:
    """Refuse an encoder with weights that are pickles alone."""
    try:
        stated = json.loads((folder / "modules.json").read_bytes())
        parts = [folder / str(one.get("path", "")) for one in stated]
    except (OSError, ValueError, AttributeError, TypeError):
        parts = [folder]
    for part in parts:
        if (part / "pytorch_model.bin").is_file() and not any(part.glob("*.safetensors*")):
            raise NeuronSelectError(
                "has weights only as pickles, which are never opened: save it again with SentenceTransformer(...)."
                "save_pretrained(...), or name another", option="encoder", value=name,
            )  # fmt: skip


on_forget(encoder_of.cache_clear)
