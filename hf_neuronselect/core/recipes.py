"""Recipes: YAML files with a section for each command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import NeuronSelectError
from .options import Options, check_names, underscored


def read_recipe(path: Path) -> Mapping[Any, Any]:
    """The sections of a recipe, as they are written.

    Raises:
        NeuronSelectError: the file cannot be read, or has no sections.
    """
    import yaml  # only commands that read a recipe pay for it

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise NeuronSelectError(
            f"cannot be read: {cause.strerror}; check the path", option="config", value=path.name
        ) from cause
    except (UnicodeDecodeError, yaml.YAMLError) as cause:
        reason = " ".join(str(cause).split())[:200]
        raise NeuronSelectError(f"cannot be read: {reason}; mend the YAML", option="config", value=path.name) from cause
    return found if isinstance(found, Mapping) else {}


def section_of(recipe: Mapping[Any, Any], name: str, path: Path) -> dict[str, Any]:
    """One section of a recipe; names with dashes are written with underscores.

    Raises:
        NeuronSelectError: there is no such section, or it has no options.
    """
    section = recipe.get(name)
    if not isinstance(section, Mapping):
        needs = f"section {name} needs" if name in recipe else f"needs a section {name}: with"
        raise NeuronSelectError(f"{needs} option: value lines", option="config", value=path.name)
    return underscored(section)


def read_section(path: Path, name: str, kind: type[Options]) -> dict[str, Any]:
    """The options of ``kind`` that a recipe's section sets.

    Raises:
        NeuronSelectError: the file cannot be read, lacks the section, or sets an unknown option.
    """
    values = section_of(read_recipe(path), name, path)
    check_names(kind, values, f"key of section {name}", "config")
    return values
