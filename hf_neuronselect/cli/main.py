"""The command ``neuronselect``: its commands, and one handler for every error."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from .. import __version__
from ..core.errors import NeuronSelectError, NeuronSelectWarning
from . import compare, demo, evaluate, export, extract, fit, push, run, sae, select, train
from .flags import note, say

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
    "train": train,
    "run": run,
    "evaluate": evaluate,
    "export": export,
    "push": push,
}.items():
    app.command(name)(module.command)
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


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """The package's own warnings as one line on stderr; those of libraries are left out."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, NeuronSelectWarning):
            note(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def main() -> None:
    """Run the command line; bad input is one line and exit status 2, without a traceback."""
    if not sys.stderr.isatty():
        # The libraries read these when they are imported, which is after the flags are checked.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers reads it, too
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        with _plain_warnings():
            status = app(standalone_mode=False)
    except NeuronSelectError as error:
        note(f"error: {error.as_command_line()}")
        sys.exit(2)
    except Exception as error:
        message = getattr(error, "format_message", None)  # typer's usage errors: an unknown flag, a missing value
        if message is None:
            raise
        note(f"error: {message()}")
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
