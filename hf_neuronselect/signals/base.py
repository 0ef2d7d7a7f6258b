"""What a signal is, and the registry of them.

A signal is a named group of columns that one engine computes for each row. It has an identity of its own: a hash of
what moves its numbers, and of nothing else. Stored columns are used only where the identity is the one asked for.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from ..core.registry import Registry

if TYPE_CHECKING:
    from .extraction import Extraction

VERSION = 2
"""Raised whenever a change moves a number: part of every identity."""

BOOKKEEPING = ("neuron_skip", "neuron_signals")
"""Columns beside the signals': why a row has none (else ""), and the identity of each signal."""


def digest(state: Any) -> str:
    """16 hex digits of JSON values."""
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=8).hexdigest()


class Signal(ABC):
    """A group of columns computed for each row.

    Class attributes:
        name: what methods ask for it by. engine: the engine that computes it.
        reads: extraction options that move its numbers, besides those of its engine.
        sources: what it needs besides the model and its SAE, by the options that name it.
        needs_sae: whether it reads the latents of the extraction's SAE.
        has_vector: whether rows can be compared by it, dense or sparse.
        stored: whether a store keeps it; False for what is cheaper to compute again, or is read of exemplars alone.
    """

    name: str
    engine: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    sources: ClassVar[tuple[str, ...]] = ()
    needs_sae: ClassVar[bool] = False
    has_vector: ClassVar[bool] = False
    stored: ClassVar[bool] = True

    def types(self, extraction: Extraction) -> dict[str, pa.DataType]:
        """Its columns; by default one of its name, a float32 vector a row."""
        return {self.name: pa.list_(pa.float32())}

    def numbers(self, extraction: Extraction) -> Mapping[str, Any]:
        """What moves its numbers, besides its engine's state, in JSON's own types."""
        return {name: getattr(extraction.options, name) for name in self.reads}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Signal) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<signal {self.name}>"


SIGNALS: Registry[type[Signal]] = Registry("signal", "features")
register_signal = SIGNALS.add


def signals_of(given: str | Signal | Iterable[str | Signal]) -> tuple[Signal, ...]:
    """Signals by name or as they are, each once, in their order.

    Raises:
        NeuronSelectError: an unknown name.
    """
    given = [given] if isinstance(given, (str, Signal)) else given
    return tuple(dict.fromkeys(one if isinstance(one, Signal) else SIGNALS[one]() for one in given))


def pack_identities(identities: Mapping[str, str]) -> str:
    """Identities as one text, as the column ``neuron_signals`` holds them: ``hidden=…,mona=…``."""
    return ",".join(f"{name}={identity}" for name, identity in sorted(identities.items()))


def unpack_identities(text: str) -> dict[str, str]:
    """The reverse of :func:`pack_identities`."""
    return dict(part.split("=", 1) for part in text.split(",") if "=" in part)
