"""What the self-contained pages have in common: their templates, and a policy that allows only their own style and script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..core.text import replaced

_FOLDER = Path(__file__).parent / "templates"


def rendered(template: str, styles: Sequence[str], script: str, values: Mapping[str, Any]) -> str:
    """A page, as HTML. Its content security policy names its style and its script by their hashes and forbids all else.

    Args:
        template, styles, script: names of files in ``templates``. values: what the template shows, escaped there.
    """
    style, code = "".join(map(_text, styles)), _text(script)
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(code)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    page = _environment().get_template(template)
    return replaced(page.render({"style": style, "script": code, "policy": policy, **values}))


@cache
def _environment() -> Environment:
    """One for all pages: it keeps the templates that it has compiled."""
    return Environment(
        loader=FileSystemLoader(_FOLDER, encoding="utf-8"), undefined=StrictUndefined, autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source of a content security policy: exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
