"""A selection as another trainer reads it: the rows, and a configuration that runs in the folder it is written to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..core.errors import NeuronSelectError, NeuronSelectWarning, one_of
from ..core.options import NumberOptions
from ..core.provenance import aim
from ..core.writing import FolderKind, reserve, writing
from ..hub.markdown import cell as escaped
from ..rows.answers import AnswerEncoder, answered, left_out
from ..selection.selection import Selection
from .axolotl import AXOLOTL
from .base import BaseModel, Exporter, Files, Rows
from .llamafactory import LLAMAFACTORY
from .model import base_model_of
from .trl import TRL
from .unsloth import UNSLOTH

EXPORTERS: dict[str, Exporter] = {exporter.name: exporter for exporter in (TRL, AXOLOTL, LLAMAFACTORY, UNSLOTH)}
FORMATS: tuple[str, ...] = tuple(EXPORTERS)

README = "README.md"
DEFAULT_LENGTH = 2048  # tokens of a training row, where none were counted
_MARK = "# neuronselect export for "
EXPORT = FolderKind(
    "an export",
    tuple(exporter.config for exporter in EXPORTERS.values()),
    _MARK,
    tuple(name for exporter in EXPORTERS.values() for name in (exporter.config, README, *exporter.data)),
)


def export_selection(
    selection: Selection, trainer: str, out: str | Path, *, base_model: str | None = None
) -> list[Path]:
    """Write the rows, best first, and the configuration with which another trainer fine-tunes on them.

    Args:
        trainer: one of :data:`FORMATS`.
        out: a new or empty folder, or one an export wrote before (its files are replaced).
        base_model: Hub id or folder of the model to train; default the selection's own model, at its commit.

    Returns:
        The files: data first, the configuration last.

    Raises:
        NeuronSelectError: an unknown trainer, a folder with other files, no model to name, or a row the trainer
            cannot hold.
    """
    exporter = EXPORTERS[one_of(trainer, FORMATS, "format")]
    out = Path(out)
    with reserve(out, EXPORT):
        files = _files_of(selection, exporter, base_model)
        with writing(out, EXPORT) as new:
            for file, content in files.items():
                if isinstance(content, str):
                    (new / file).write_text(content, encoding="utf-8", newline="\n")
                else:
                    pq.write_table(content, new / file)
    return [out / file for file in files]


def _files_of(selection: Selection, exporter: Exporter, base_model: str | None) -> Files:
    """Contents of all files, the configuration last."""
    rows = _read(selection, exporter.name)
    base = base_model_of(selection, base_model, has_tools=rows.any_tools or rows.any_calls)
    settings = _settings(selection)
    asked = settings.max_length if settings else DEFAULT_LENGTH
    length = min(asked, base.limits.positions or asked)
    if exporter.tokens(base):
        rows = _tokenised(rows, base, asked)
    elif base.tokenizer is None and exporter in (TRL, UNSLOTH):
        warnings.warn(
            f"the tokenizer of {base.name} is not on this machine, and the rows cannot be written as token ids: download it "
            f"(`hf download {base.name}`) and export again for that. {exporter.learnt(rows, base)}",
            NeuronSelectWarning, stacklevel=3,
        )  # fmt: skip
    files = exporter.write(rows, base, length)
    head = _header(selection, exporter, len(rows.index))
    config = "".join(f"# {line}\n" for line in head) + str(files.pop(exporter.config))
    files |= {README: _readme(exporter, head, exporter.learnt(rows, base)), exporter.config: config}
    return files


def _settings(selection: Selection) -> NumberOptions | None:
    """The options with which the rows were read and scored; None if no model was needed."""
    extractor = selection.provenance.extractor
    return extractor.options if extractor else None


def _read(selection: Selection, trainer: str) -> Rows:
    if not len(selection):
        raise NeuronSelectError(
            "the selection has no rows; select again with a larger budget", option="format", value=trainer
        )
    rows = Rows(selection.conversations(), [int(i) for i in selection.indices])
    for i, row in enumerate(rows.conversations):
        if row.skip:
            raise rows.error(i, f"cannot be read ({row.skip})", "leave it out and select again", trainer)
        if row.text is not None:
            raise rows.error(
                i,
                "is plain text, but chat trainers need turns",
                "add a column messages (user and assistant turns) to the pool and select again, or train on the plain "
                "texts: load_dataset opens the selection folder",
                trainer,
            )
        if not answered(row):
            raise rows.error(i, "has no assistant turn: there is nothing to learn", "leave it out and select again",
                             trainer)  # fmt: skip
    return rows


def _tokenised(rows: Rows, base: BaseModel, length: int) -> Rows:
    """The rows with their token ids; rows that cannot be trained on are left out, with a warning."""
    encoder = AnswerEncoder(base.tokenizer, max_length=length, chat_template=base.template, limits=base.limits)
    samples = encoder.encode(rows.conversations)
    kept = [i for i, sample in enumerate(samples) if not sample.skip]
    reasons = left_out(samples)
    if not kept:
        raise NeuronSelectError(f"none of the {len(samples)} rows can be trained on: {reasons}", option="base_model",
                                value=base.name)  # fmt: skip
    if reasons:
        warnings.warn(
            f"{len(samples) - len(kept)} of {len(samples)} rows cannot be trained on and are left out: {reasons}; mend "
            "these rows, or leave it",
            NeuronSelectWarning, stacklevel=4,
        )  # fmt: skip
    return Rows([rows.conversations[i] for i in kept], [rows.index[i] for i in kept], [samples[i] for i in kept])


def _readme(exporter: Exporter, head: Sequence[str], learnt: str) -> str:
    """What the folder holds, for people."""
    facts = "".join(f"- {escaped(line)}\n" for line in head[2:])
    return (
        f"# Training rows for {exporter.name}\n\n```bash\n{exporter.command}\n```\n\n"
        f"starts the training in this folder. Adapt the settings marked so in `{exporter.config}`.\n\n{learnt}\n\n{facts}"
    )


def _header(selection: Selection, exporter: Exporter, written: int) -> list[str]:
    """Comments at the top of the configuration: how to run it, and where the rows come from."""
    made = selection.provenance
    pool = made.pool
    options = ", ".join(f"{name}={value}" for name, value in made.method.options.items())
    targets = aim(made.targets, made.avoided)
    stated = pool.license or "not stated; see the page of the dataset"
    restricted = f"; restricted: {pool.restricted}" if pool.restricted else ""
    where = " ".join(filter(None, (pool.config, pool.split)))
    lines = [
        f"{_MARK[2:]}{exporter.name}: run it in this folder with `{exporter.command}`.",
        "Adapt the settings marked so; another export into this folder overwrites this file.",
        f"dataset: {pool.id or 'rows in memory'} at {pool.commit or pool.fingerprint or '?'} {where}",
        f"method: {made.method.name} {f'({options})' if options else ''} {f'for {targets}' if targets else ''}",
        f"rows: {written} of {made.counts.rows}, best first",
        f"licence of the dataset: {stated}{restricted}",
    ]
    return [_one_line(line) for line in lines]


def _one_line(value: Any) -> str:
    """Text that cannot end a comment."""
    text = " ".join(str(value).split())[:300]
    return "".join(c if c.isprintable() else "?" for c in text)
