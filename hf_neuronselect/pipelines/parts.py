"""Steps that several pipelines share: naming targets, checking folders, making extractors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch

from ..core.configs import CAPABILITY
from ..core.errors import NeuronSelectError
from ..core.options import ExtractionOptions
from ..core.writing import FolderKind, check_folder, reserve
from ..hub.markdown import check_readme
from ..rows.load import Rows, load_rows, rows_name
from ..selection.selector import TARGET_NAME
from ..signals.base import Signal, signals_of
from ..signals.extractor import NeuronFeatureExtractor, runs_model

Say: TypeAlias = Callable[[str], None]
"""Receives a line for the user."""

quiet: Say = logging.getLogger(__name__).info


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


def load_named(specs: Mapping[str, str], option: str, texts: Iterable[str] = ()) -> dict[str, Rows]:
    """Rows by name.

    Args:
        texts: columns that are texts, besides those of the row formats.

    Raises:
        NeuronSelectError: as :func:`~hf_neuronselect.rows.load.load_rows`.
    """
    return {name: load_rows(spec, option=option, texts=texts) for name, spec in specs.items()}


# ----------------------------------------------------------------------------------------- folders
def check(out: Path, kind: FolderKind) -> None:
    """Refuse a folder that cannot be written, that holds something else, or whose README cannot be kept.

    Raises:
        NeuronSelectError: it cannot be used.
    """
    check_folder(out, kind)
    check_readme(out)


@contextmanager
def hold(out: Path, kind: FolderKind) -> Iterator[None]:
    """Check a folder and keep other commands out of it while the one in the ``with`` block works.

    Raises:
        NeuronSelectError: it cannot be used, or another command writes into it.
    """
    check(out, kind)
    with reserve(out, kind):
        yield


# -------------------------------------------------------------------------------------- extractors
def extractor_of(options: ExtractionOptions, signals: Sequence[str | Signal], note: Say) -> NeuronFeatureExtractor:
    """The extractor of a command's options; without a model, of the bundled one."""
    runs = any(runs_model(signal) for signal in signals_of(signals))
    if options.model is None and options.sae is None and runs:
        note("No --model: using the bundled 9 M model and its SAE.")
    extractor = NeuronFeatureExtractor.from_options(options, signals)
    on_cpu = options.device == "cpu" or (options.device == "auto" and not torch.cuda.is_available())
    if runs and options.dtype == "auto" and on_cpu and extractor.extraction.options.dtype == "bfloat16":
        note("Computing in bfloat16, which this CPU has. Its rounding moves scores a little; --dtype float32 does not.")
    if options.model is not None and extractor.extraction.sae_found:
        note(f"{extractor.extraction.sae_found}.")
    return extractor
