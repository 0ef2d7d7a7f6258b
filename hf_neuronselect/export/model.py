"""The model an export trains: its name, its commit, and what its chat template can do."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer

from ..core.errors import NeuronSelectError
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
    name, revision = base_model, None
    if name is None:
        name, revision = _scoring_model(selection)
    elif not name.strip() or any(not c.isprintable() for c in name):
        raise NeuronSelectError("must be a Hub id (ORG/NAME) or a folder", option="base_model", value=name)
    if os.path.isdir(name):
        name = os.path.abspath(name)  # the configuration runs in its own folder
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            name, revision=revision, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # not on this machine, or it needs remote code: write the configuration without it
        return BaseModel(name, revision, False, None, True)
    if tokenizer.chat_template is None:
        return BaseModel(name, revision, True, None if has_tools else PLAIN_TEMPLATE, True)
    return BaseModel(name, revision, True, None, _marks_answers(tokenizer))


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


def _marks_answers(tokenizer: Any) -> bool:
    """Whether TRL can train on answers alone: the template marks them, or TRL knows a variant that does."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = tokenizer.chat_template
    template = template.get("default", "") if isinstance(template, Mapping) else template
    try:
        return bool(has_generation_markers(template) or get_training_chat_template(tokenizer))
    except ValueError:
        return False
