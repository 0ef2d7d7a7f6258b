"""The model an export trains: its name, its commit, and what its chat template can do."""

from __future__ import annotations

import os
import re
from typing import Any

from transformers import AutoTokenizer

from ..core.errors import NeuronSelectError
from ..rows.answers import AnswerEncoder
from ..rows.encode import PLAIN_TEMPLATE
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
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            name, revision=revision, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # not on this machine, or it needs remote code: write the configuration without it
        tokenizer = None
    if tokenizer is None or not tokenizer.is_fast:  # answers are found by offsets
        return BaseModel(name, revision, template=template)
    if template is None and not tokenizer.chat_template and not has_tools:
        template = PLAIN_TEMPLATE
    return BaseModel(name, revision, tokenizer, template, AnswerEncoder(tokenizer, chat_template=template).marked)


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
