"""The worked notebook: it runs from top to bottom offline, and is stored as it was written, without outputs."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "recipes" / "neuronselect.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_nothing_of_a_run_is_stored() -> None:
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert stored["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in cells("code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}
    assert not re.search(r"/(home|root|tmp|Users)/", NOTEBOOK.read_text(encoding="utf-8"))


def test_its_links_lead_somewhere() -> None:
    text = "\n".join("".join(cell["source"]) for cell in cells("markdown"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    assert links and all((NOTEBOOK.parent / link).exists() for link in links)
    recipes = re.findall(r"recipes/\S+\.yaml", text)
    assert recipes and all((NOTEBOOK.parent.parent / recipe).exists() for recipe in recipes)


def test_it_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | {"IPYTHONDIR": str(tmp_path / "ipython"), "CUDA_VISIBLE_DEVICES": ""})
    shown: dict[str, dict[str, str]] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", output
            if output.output_type == "execute_result":
                shown[cell.id] = output.data
    assert "<b>20 of 400 rows for gsm8k</b>" in shown["select"]["text/html"]
    for name in ("scores", "sources", "lengths"):
        assert base64.b64decode(shown[name]["image/png"]).startswith(b"\x89PNG"), name
    assert "place 0 of the selection" in shown["explain"]["text/html"]
    assert "below the cut" in shown["why-not"]["text/html"]
    assert (tmp_path / "runs" / "gsm8k-5pct" / "report.html").is_file()
    assert 0 < float(shown["train"]["text/plain"]) < 6
