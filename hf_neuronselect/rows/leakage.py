"""Find exact duplicates in the pool, and exemplars that leaked into it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from .formats import Conversation

KEY_BYTES = 16
_MIN_QUESTION = 32
"""Shorter questions ("Continue.") are too common to search for; only whole rows are compared."""
_WORD = re.compile(r"[^\W_]{4,}")


def normalised(text: str) -> str:
    """Lower case with single spaces: an exemplar written so has leaked, too."""
    return " ".join(text.casefold().split())


def exact_key(conversation: Conversation) -> bytes:
    """16-byte hash of a row; only rows that are equal to the letter, with the same tools, have the same."""
    return _hash(conversation.exact())


def key(text: str) -> bytes:
    """16-byte hash of a text in its normalised form."""
    return _hash(normalised(text))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


class Seen:
    """A growing set of keys at 16 bytes a key, since a pool may have a hundred million rows.

    Keys are kept in sorted arrays; two arrays of similar size are merged, which briefly takes twice
    their memory.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []  # uint64 [2, n] each: the keys' first and second halves, sorted by the first

    def __len__(self) -> int:
        return sum(run.shape[1] for run in self._runs)

    @property
    def nbytes(self) -> int:
        return sum(run.nbytes for run in self._runs)

    def add(self, keys: Iterable[bytes]) -> None:
        """Add keys that are not in the set; each may occur once."""
        run = _sorted(_halves(keys))
        while self._runs and self._runs[-1].shape[1] <= run.shape[1]:
            run = _sorted(np.concatenate([self._runs.pop(), run], axis=1))
        if run.size:
            self._runs.append(run)

    def contains(self, keys: Sequence[bytes]) -> np.ndarray:
        """Bool ``[n]``: keys that are in the set."""
        asked = _halves(keys)
        found = np.zeros(asked.shape[1], dtype=bool)
        for run in self._runs:
            first, behind = (np.searchsorted(run[0], asked[0], side) for side in ("left", "right"))
            for i in np.flatnonzero(behind > first).tolist():
                found[i] |= bool((run[1, first[i] : behind[i]] == asked[1, i]).any())
        return found


def _halves(keys: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2).T.copy()


def _sorted(run: np.ndarray) -> np.ndarray:
    return run[:, np.argsort(run[0], kind="stable")]  # stable sorts merge two sorted halves quickly


class Leakage:
    """Finds pool rows that are an exemplar, ask an exemplar's question, or contain it in their text.

    Saved capabilities keep only hashes; they find a question that is a whole user turn, not one inside a longer turn.

    Args:
        rows, questions: keys of whole exemplars and of their user turns.
        texts: normalised text of the user turns, if known.
    """

    def __init__(self, rows: Iterable[bytes] = (), questions: Iterable[bytes] = (), texts: Iterable[str] = ()) -> None:
        self.rows, self.questions, self.texts = set(rows), set(questions), set(texts)
        # A row is searched only for questions whose longest ASCII word it contains; questions without one (unspaced
        # scripts, for instance) are always searched for.
        self._by_word: dict[str, list[str]] = {}
        self._always: list[str] = []
        for text in sorted(self.texts):
            words = [w for w in _WORD.findall(text) if w.isascii()]
            if words:
                self._by_word.setdefault(max(words, key=len), []).append(text)
            else:
                self._always.append(text)

    @classmethod
    def of(cls, conversations: Iterable[Conversation]) -> Leakage:
        """Collect the keys and questions of exemplars."""
        rows, questions, texts = set(), set(), set()
        for conversation in conversations:
            if conversation.skip:
                continue
            rows.add(key(conversation.content()))
            for question in conversation.questions():
                questions.add(key(question))
                if len(normal := normalised(question)) >= _MIN_QUESTION:
                    texts.add(normal)
        return cls(rows, questions, texts)

    def __or__(self, other: Leakage) -> Leakage:
        return Leakage(self.rows | other.rows, self.questions | other.questions, self.texts | other.texts)

    def find(self, conversation: Conversation) -> bool:
        """Whether a pool row leaks an exemplar."""
        if self.rows and key(conversation.content()) in self.rows:
            return True
        if not self.questions:
            return False
        turns = conversation.questions()
        if any(len(normalised(turn)) >= _MIN_QUESTION and key(turn) in self.questions for turn in turns):
            return True
        if not self.texts:
            return False
        text = normalised(conversation.content())
        if any(question in text for question in self._always):
            return True
        return any(
            question in text
            for word in self._by_word.keys() & set(_WORD.findall(text))
            for question in self._by_word[word]
        )


def as_array(keys: Iterable[bytes]) -> np.ndarray:
    """Keys as uint8 ``[n, 16]``, sorted."""
    joined = b"".join(sorted(keys))
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, KEY_BYTES).copy()


def from_array(array: np.ndarray | Sequence) -> set[bytes]:
    return {bytes(row) for row in np.asarray(array, dtype=np.uint8)}
