"""Start-up: what may be imported before a command works, so that help and refusals do not wait for torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_neuronselect

# Third-party modules that may be loaded by --help and by a refused flag: typer, and what typer needs.
ALLOWED = {"typer", "annotated_doc", "annotated_types", "click", "colorama", "pydantic", "pydantic_core", "shellingham",
           "typing_extensions", "typing_inspection"}  # fmt: skip
LOADED = """
import json, sys
before = set(sys.modules)
{code}
found = {{name.split(".")[0] for name, module in list(sys.modules.items()) if name not in before
         and "site-packages" in (getattr(module, "__file__", None) or "")}}
print(json.dumps(sorted(found)), file=sys.stderr)
"""
MAIN = """
from hf_neuronselect.cli.main import main
sys.argv = ["neuronselect", *{words}]
try:
    main()
except SystemExit as stop:
    pass
"""


def loaded(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", LOADED.format(code=code)], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_the_import_loads_nothing_heavy() -> None:
    assert loaded("import hf_neuronselect") == set()
    assert loaded("from hf_neuronselect import NeuronSelectError") == set()


def test_extraction_loads_no_trainer() -> None:
    """They take seconds together, and every worker imports this."""
    found = loaded("import hf_neuronselect.signals.extractor")
    assert found >= {"torch", "transformers"} and found.isdisjoint({"numba", "peft", "trl"})


HELPS = ["", "demo", "select", "fit", "extract", "compare", "train", "run", "evaluate", "export", "push", "sae",
         "explain", "app", "judge", "report", "sae train", "sae label", "sae describe", "sae inspect"]  # fmt: skip


@pytest.mark.parametrize("command", HELPS)
def test_help_loads_nothing_heavy(command: str) -> None:
    assert loaded(MAIN.format(words=[*command.split(), "--help"])) <= ALLOWED


POOL = ["--pool", "p.jsonl", "--out", "o"]
BAD = [
    ["select", *POOL, "--dtype", "int8"],
    ["select", *POOL, "--ratio", "2"],
    ["select", *POOL, "--k", "1", "--ratio", ".1"],
    ["select", *POOL, "--unknown"],
    ["select", "--out", "o"],
    ["extract", *POOL, "--shard", "2/2"],
    ["evaluate", "--out", "o"],
    ["run"],
    ["explain", "f"],
    ["export", "f", "--format", "mine"],
]


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_flags_are_refused_before_anything_heavy(words: list[str]) -> None:
    code = MAIN.format(words=words).replace("pass", "assert stop.code == 2")
    assert loaded(code) <= ALLOWED


@pytest.mark.parametrize(
    "words",
    [
        ["select", *POOL, "--method", "mono"],
        ["select", *POOL, "--method-option", "metric=dot"],
        ["fit", "--out", "o", "--method-option", "metrics=cosine"],
        ["extract", *POOL, "--method", "mona,mono"],
        ["compare", *POOL, "--methods", "mona(metric=dot)"],
    ],
    ids=" ".join,
)
def test_a_wrong_method_is_refused_before_torch(words: list[str]) -> None:
    code = MAIN.format(words=words).replace("pass", "assert stop.code == 2")
    assert not loaded(code) & {"torch", "transformers", "datasets", "trl"}


def test_public_names_are_there_when_asked_for() -> None:
    for name in hf_neuronselect.__all__:
        assert callable(getattr(hf_neuronselect, name)) and name in dir(hf_neuronselect)
    assert set(hf_neuronselect.__all__) == set(hf_neuronselect._PLACES)
    with pytest.raises(AttributeError, match="has no attribute 'Selector'"):
        hf_neuronselect.Selector  # noqa: B018


def test_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_neuronselect.cli.main", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"neuronselect {hf_neuronselect.__version__}\n"
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{hf_neuronselect.__version__}"\n' in pyproject
