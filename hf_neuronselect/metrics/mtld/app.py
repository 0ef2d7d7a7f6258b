"""The page of the Space: compute the metric on arguments given as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evaluate
import gradio as gr
from evaluate.utils.gradio import parse_readme

HERE = Path(__file__).resolve().parent
SCRIPT = str(HERE / "mtld.py")
EXAMPLE = {"data": ["of the people by the people for the people", "no word comes twice here"]}


def compute(arguments: str) -> dict[str, Any]:
    """Call ``module.compute`` with the arguments in a JSON object."""
    try:
        return evaluate.load(SCRIPT).compute(**json.loads(arguments))  # a new instance, since a module keeps added rows
    except (TypeError, ValueError) as error:  # bad input: show the message, not a traceback
        raise gr.Error(str(error)) from error


# evaluate's own launcher needs gradio 3, which does not work with current datasets and numpy.
page = gr.Interface(
    fn=compute,
    inputs=gr.Code(json.dumps(EXAMPLE, indent=2), language="json", label="arguments of compute"),
    outputs=gr.JSON(label="result"),
    title="MTLD lexical diversity",
    description=evaluate.load(SCRIPT).description,
    article=parse_readme(HERE / "README.md"),
    flagging_mode="never",
)

if __name__ == "__main__":
    page.launch()
