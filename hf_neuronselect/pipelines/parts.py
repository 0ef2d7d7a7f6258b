"""Steps that several pipelines share: naming methods and targets, checking folders, making extractors."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ..core.errors import NeuronSelectError
from ..core.options import ExtractionOptions
from ..methods import Method, make_method, signals_needed
from ..methods.base import exemplar_signals
from ..rows.load import Rows, load_rows, rows_name
from ..selection.selector import TARGET_NAME, NeuronSelector
from ..signals.extractor import NeuronFeatureExtractor

Say: TypeAlias = Callable[[str], None]
"""Receives a line for the user."""

quiet: Say = logging.getLogger(__name__).info
CAPABILITY = "capability:"


# ----------------------------------------------------------------------------------------- methods
@dataclass(frozen=True)
class Chosen:
    """A method with its options.

    Attributes:
        label: how the user wrote it, e.g. ``nait(normalize=true)``.
    """

    label: str
    method: Method

    def selector(self) -> NeuronSelector:
        """A new selector, not fitted."""
        return NeuronSelector(self.method.name, **self.method.options)

    @property
    def signals(self) -> tuple[str, ...]:
        """Signals that the method reads, of the pool or of exemplars."""
        return signals_needed(self.method)

    @property
    def exemplar_signals(self) -> tuple[str, ...]:
        """Signals that fitting reads, those it can do without included."""
        return tuple(dict.fromkeys([*exemplar_signals(self.method), *self.method.optional_signals]))

    @property
    def draws(self) -> bool:
        """Whether it has a seed."""
        return "seed" in self.method.options

    def with_seed(self, seed: int) -> Chosen:
        return method_of(self.method.name, {**self.method.options, "seed": seed}, seed, label=self.label)


def method_of(name: str, options: Mapping[str, Any], seed: int, *, label: str = "") -> Chosen:
    """A method by its name.

    Args:
        options: values, or text that the method's options read. seed: for methods that have this option.

    Raises:
        NeuronSelectError: unknown method, or an option it does not have or that cannot have this value.
    """
    method = make_method(name, options)
    if "seed" in method.options and "seed" not in options:
        method = make_method(name, {**options, "seed": seed})
    return Chosen(label or name, method)


def methods_of(text: str, seed: int) -> list[Chosen]:
    """Methods as ``compare`` takes them: ``mona,nait(normalize=true,direction=mean),random``.

    Raises:
        NeuronSelectError: not of that form, a method named twice, or as :func:`method_of`.
    """
    found: dict[str, Chosen] = {}
    for part in re.split(r",(?![^(]*\))", text):
        label = part.strip()
        match = re.fullmatch(r"([\w.-]+)(?:\((.*)\))?", label)
        if match is None:
            raise NeuronSelectError("must be names, or name(option=value,...), separated by commas", option="methods",
                                    value=label or text)  # fmt: skip
        if label in found:
            raise NeuronSelectError("is named twice", option="methods", value=label)
        pairs = [pair.partition("=") for pair in (match[2] or "").split(",") if pair.strip()]
        found[label] = method_of(match[1], {key.strip(): value for key, _, value in pairs}, seed, label=label)
    return list(found.values())


# ----------------------------------------------------------------------------------------- targets
def named_specs(specs: Sequence[str], option: str) -> dict[str, str]:
    """``[NAME=]SPEC`` by name; without a name, by the file's or the repository's.

    Raises:
        NeuronSelectError: two of one name, or one that cannot be a name.
    """
    found: dict[str, str] = {}
    for text in specs:
        name, equals, spec = text.partition("=")
        if not (equals and TARGET_NAME.fullmatch(name)):
            name, spec = rows_name(text.removeprefix(CAPABILITY)), text
        if not TARGET_NAME.fullmatch(name):
            raise NeuronSelectError("name it: NAME=… (letters, digits, _ and -)", option=option, value=text)
        if name in found:
            raise NeuronSelectError("is the name of two; give each its own: NAME=…", option=option, value=name)
        found[name] = spec
    return found


def load_named(specs: Mapping[str, str], option: str) -> dict[str, Rows]:
    """Rows by name.

    Raises:
        NeuronSelectError: as :func:`~hf_neuronselect.rows.load.load_rows`.
    """
    return {name: load_rows(spec, option=option) for name, spec in specs.items()}


# ----------------------------------------------------------------------------------------- folders
def check_folder(out: Path, marker: str, kind: str) -> None:
    """Refuse a folder that cannot be written, or that holds something else.

    Args:
        marker: file that every folder of this kind has. kind: e.g. ``a selection folder``.

    Raises:
        NeuronSelectError: it cannot be used.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / marker).exists())):
        raise NeuronSelectError(f"exists and is not {kind}; name another", option="out", value=out.name)
    above = out.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise NeuronSelectError(f"cannot be written: {above.name or above} is read-only or no folder", option="out",
                                value=out.name)  # fmt: skip


# -------------------------------------------------------------------------------------- extractors
def extractor_of(options: ExtractionOptions, signals: Sequence[str], note: Say) -> NeuronFeatureExtractor:
    """The extractor of a command's options; without a model, of the bundled one."""
    if options.model is None and signals:
        note("No --model: using the bundled 9 M model and its SAE.")
    return NeuronFeatureExtractor.from_options(options, signals)
