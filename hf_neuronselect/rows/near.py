"""Texts that are nearly equal: runs of five words, compared by MinHash (datasketch, an extra)."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..core.errors import NeuronSelectError

if TYPE_CHECKING:
    from datasketch import MinHash, MinHashLSH

NEAR, RUN, HASHES = 0.8, 5, 64
"""Two texts are near copies if so large a share of their runs of so many words is common to both, estimated by so many hashes."""


def has_datasketch() -> bool:
    return find_spec("datasketch") is not None


def check_datasketch(option: str) -> None:
    """Refuse to look for near copies without the package.

    Raises:
        NeuronSelectError: it is missing.
    """
    if not has_datasketch():
        raise NeuronSelectError("needs datasketch: pip install 'hf-neuronselect[rivals]'", option=option, value=True)


def min_hash(text: str) -> MinHash:
    """A text's hashes; of fewer than five words, the text is one run."""
    from datasketch import MinHash

    words = re.findall(r"\w+", text.lower())
    runs = {" ".join(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}
    found = MinHash(num_perm=HASHES, seed=1)
    found.update_batch([run.encode() for run in sorted(runs)])
    return found


class NearCopies:
    """A growing set of texts, by their hashes."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        self._index: MinHashLSH = MinHashLSH(threshold=NEAR, num_perm=HASHES)
        self._hashes: list[MinHash] = []

    def add(self, hashes: MinHash) -> None:
        self._index.insert(len(self._hashes), hashes)
        self._hashes.append(hashes)

    def of(self, hashes: MinHash) -> int:
        """How many texts of the set are near copies of this one."""
        return sum(self._hashes[i].jaccard(hashes) >= NEAR for i in self._index.query(hashes))
