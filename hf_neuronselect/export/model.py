"""The model an export trains: its name, its commit, and what its chat template can do."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..core.errors import NeuronSelectError
from ..core.sources import Source
from ..models.checkpoint import config_of, limits_of, read_tokenizer
from ..models.pin import pin_model
from ..rows.answers import AnswerEncoder
from ..rows.encode import PLAIN_TEMPLATE, Limits
from ..selection.selection import Selection
from .base import BaseModel

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def base_model_of(selection: Selection, base_model: str | None, *, has_tools: bool) -> BaseModel:
    """The named model, or the one the selection was made with.

    Args:
        has_tools: whether rows have tools; the plain chat template, which a model without one gets, has none.

    Raises:
        NeuronSelectError: no model is named and the selection's own is not on the Hub.
    """
    name, revision, template = base_model, None, None
    if name is None:
        name, revision = _scoring_model(selection)
        extractor = selection.provenance.extractor
        template = extractor.options.chat_template if extractor and extractor.options else None
    elif not name.strip() or any(not c.isprintable() for c in name):
        raise NeuronSelectError("must be a Hub id (ORG/NAME) or a folder", option="base_model", value=name)
    if os.path.isdir(name):
        name = os.path.abspath(name)  # the configuration runs in its own folder
    tokenizer, limits = _here(name, revision)
    if tokenizer is None or not tokenizer.is_fast:  # answers are found by offsets
        return BaseModel(name, revision, template=template)
    if template is None and not tokenizer.chat_template and not has_tools:
        template = PLAIN_TEMPLATE
    marked = AnswerEncoder(tokenizer, chat_template=template).marked
    return BaseModel(name, revision, tokenizer, template, marked, limits)


def _here(name: str, revision: str | None) -> tuple[Any, Limits]:
    """The model's tokenizer and limits, as far as they are on this machine: nothing is downloaded for an export.

    Raises:
        NeuronSelectError: a folder without a tokenizer that can be read.
    """
    try:
        if os.path.isdir(name):
            source = pin_model(name, revision=None, token=None, option="base_model")
        else:
            source = Source(name, "content:", snapshot_download(name, revision=revision, local_files_only=True))
        tokenizer = read_tokenizer(source)
    except NeuronSelectError as cause:
        if os.path.isdir(name):
            raise NeuronSelectError(cause.message, option="base_model", value=Path(name).name) from cause
        return None, Limits()  # the configuration is written without it
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return None, Limits()
    try:
        return tokenizer, limits_of(config_of(source))
    except NeuronSelectError:  # a tokenizer alone
        return tokenizer, Limits()


def _scoring_model(selection: Selection) -> tuple[str, str | None]:
    """Hub id and commit of the model the selection was made with."""
    extractor = selection.provenance.extractor
    model = extractor.model if extractor else None
    name, commit = (model.id or "", model.commit or "") if model else ("", "")
    if not _HUB_ID.fullmatch(name) or ":" in commit:  # a local folder's content hash has a colon
        raise NeuronSelectError(
            "the selection was not made with a Hub model; name the model to train (ORG/NAME or a folder)",
            option="base_model",
        )
    return name, commit or None
