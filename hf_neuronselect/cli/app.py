"""The command ``neuronselect`` and its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import (
    browse,
    compare,
    demo,
    evaluate,
    explain,
    export,
    extract,
    fit,
    judge,
    push,
    report,
    run,
    sae,
    select,
    train,
)
from .flags import add, say

app = typer.Typer(
    help="Select the instruction data that makes a model better at a task, by the model's own neurons.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for name, module in {
    "demo": demo,
    "select": select,
    "fit": fit,
    "extract": extract,
    "compare": compare,
    "explain": explain,
    "app": browse,
    "judge": judge,
    "report": report,
    "train": train,
    "run": run,
    "evaluate": evaluate,
    "export": export,
    "push": push,
}.items():
    add(app, name, module.command)
app.add_typer(sae.app, name="sae")


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"neuronselect {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    pass
