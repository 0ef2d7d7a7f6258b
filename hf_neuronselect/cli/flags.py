"""Commands whose flags come from an options dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from ..core.errors import NeuronSelectError
from ..core.options import MISSING, Option, Options, options_of
from ..core.progress import aside
from ..core.recipes import read_section
from ..core.text import shown
from . import STOPPED

C = TypeVar("C", bound=Options)
_RECIPE = typer.Option("--config", metavar="RECIPE", help="YAML file with a section of this command; flags win.")


def say(text: str) -> None:
    """Print a result on stdout."""
    with aside():
        typer.echo(shown(text, lines=True))


def note(text: str) -> None:
    """Print a remark on stderr."""
    with aside():
        typer.echo(shown(text, lines=True), err=True)


def command(
    kind: type[C],
    work: Callable[[C], int | None],
    *,
    arguments: Iterable[str] = (),
    section: str | None = None,
    flags: Mapping[str, str] | None = None,
) -> Callable[..., int | None]:
    """Make a typer command that fills ``kind`` from flags and a recipe and calls ``work`` with it.

    Args:
        arguments: options given by position. section: the recipe's section; None: the command has no ``--config``.
        flags: option -> flag, where it differs from the option's own.
    """
    positional = tuple(arguments)

    def run(**given: Any) -> int | None:
        values = {name: value for name, value in given.items() if value not in (None, [], ())}
        recipe = values.pop("config", None)
        if recipe is not None and section is not None:
            values = read_section(Path(recipe), section, kind) | values
        for name in positional:
            if name not in values and options_of(kind)[name].required:
                raise NeuronSelectError(f"{name.upper()} is needed: {options_of(kind)[name].help}")
        try:
            return work(kind.from_mapping(values))
        except NeuronSelectError as error:
            error.flag = _spelled(error.option)
            if error.flag in _OF_METHODS and error.option not in options_of(kind):
                error.value = f"{error.option}={'' if error.value is None else error.value}"
            raise
        except KeyboardInterrupt as cause:  # typer would print an empty line and hide it
            raise SystemExit(STOPPED) from cause

    def _spelled(name: str | None) -> str | None:
        """An option as this command has it: ``--pool``, ``FOLDER``; another's, as of a recipe, in plain words."""
        if name == "config" and "recipe" in options_of(kind):
            name = "recipe"
        if name is None or (name == "config" and section is not None):
            return None
        if name in positional:
            return name.upper()
        option = options_of(kind).get(name)
        if option is not None:
            return (flags or {}).get(name) or option.flags[0]
        given = [flag for flag, of in _OF_METHODS.items() if of in options_of(kind)]
        return given[0] if given and _is_of_a_method(name) else name.replace("_", " ")

    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_argument(option) if name in positional else _flag(option, (flags or {}).get(name)),
        )
        for name, option in options_of(kind).items()
    ]
    if section is not None:
        parameters.append(
            inspect.Parameter(
                "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, _RECIPE]
            )
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__doc__ = kind.__doc__
    return run


_OF_METHODS = {"--method-option": "method_option", "--methods": "methods"}
"""Flags under which an option of a method is given -> the command's option."""


def _is_of_a_method(name: str) -> bool:
    from ..methods.base import METHODS  # looked up for an error alone

    return any(name in options_of(METHODS[method]) for method in METHODS.names())


def add(app: typer.Typer, name: str, made: Callable[..., int | None]) -> None:
    """Give ``app`` a command, listed with the whole first sentence of its help: typer would cut that off."""
    first = " ".join((made.__doc__ or "").split()).split(". ")[0]
    app.command(name, short_help=f"{first.rstrip('.')}.")(made)


def _argument(option: Option) -> Any:
    kind: Any = list[str] if option.repeated else str
    return Annotated[kind | None, typer.Argument(metavar=option.name.upper(), help=_help(option), show_default=False)]


def _flag(option: Option, flag: str | None) -> Any:
    """The flag's annotation: values arrive as text, :meth:`Option.read` converts and checks them."""
    on, off = (flag, "") if flag else option.flags
    if option.kind is bool:
        return Annotated[bool | None, typer.Option(f"{on}/{off}" if off else on, help=_help(option))]
    kind: Any = list[str] if option.repeated or option.pairs else str
    if option.several:
        kind = tuple[(str,) * option.several]  # type: ignore[misc]
    return Annotated[kind | None, typer.Option(on, metavar=_metavar(option), help=_help(option))]


def _metavar(option: Option) -> str:
    if option.metavar:
        return option.metavar
    kinds = (option.kind, *get_args(option.kind))
    number = "INTEGER" if int in kinds else "NUMBER" if float in kinds else ""
    words = "|".join(map(str, option.choices))
    return "|".join(filter(None, (number, words))) or ("PATH" if option.kind is Path else "TEXT")


def _help(option: Option) -> str:
    default = option.default
    if option.required:
        return f"{option.help} [required]"
    if default in (None, MISSING, (), {}) or isinstance(default, bool):
        return option.help
    values = default if isinstance(default, tuple) else (default,)
    return f"{option.help} [default: {', '.join(map(str, values))}]"
