"""README and docs: examples run, commands and options exist, links lead somewhere, every method is described."""

from __future__ import annotations

import os
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub import Hub
from typer.main import get_command

from hf_neuronselect.cli.app import app
from hf_neuronselect.core import bundled
from hf_neuronselect.core.configs import SelectConfig
from hf_neuronselect.core.options import options_of
from hf_neuronselect.methods import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NETWORK = "<!-- needs the network -->"
# Names in examples -> what is at hand offline.
OFFLINE = {
    '"meta-llama/Meta-Llama-3-8B"': repr(str(bundled.MODEL)),
    '"EleutherAI/sae-llama-3-8b-32x"': repr(str(bundled.SAE)),
    'load_dataset("teknium/OpenHermes-2.5", split="train")': f'load_dataset("parquet", data_files={str(bundled.POOL)!r}, '
    'split="train[:40]")',
    'load_dataset("openai/gsm8k", "main", split="train[:100]")': f'load_dataset("parquet", '
    f'data_files={str(bundled.TARGETS["gsm8k"])!r}, split="train[:8]")',
}


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str
    network: bool

    def __str__(self) -> str:
        return f"{self.page}-{self.text.strip().splitlines()[-1][:40]}"


def blocks() -> Iterator[Block]:
    """Every fenced block of every page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            before = text[: found.start()].rstrip().splitlines()
            yield Block(page.name, found[1], found[2], bool(before) and before[-1] == NETWORK)


def of_language(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


def commands() -> list[str]:
    """Every ``neuronselect`` command line in a shell block."""
    lines = [line for block in of_language("bash") for line in block.text.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("neuronselect ")]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


# docs/extend.md has a test of its own, which registers what it defines: tests/methods/test_stages.py.
@pytest.mark.parametrize(
    "block", [b for b in of_language("python") if not b.network and b.page != "extend.md"], ids=str
)
def test_python_examples_run(block: Block, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = block.text
    for name, here in OFFLINE.items():
        code = code.replace(name, here)
    exec(compile(code, block.page, "exec"), {"__name__": "example"})


def test_examples_are_found() -> None:
    assert sum(not block.network for block in of_language("python") if block.page != "extend.md") >= 4
    assert len(commands()) >= 15


@pytest.mark.parametrize("line", commands())
def test_commands_have_these_options(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command: Any = get_command(app)
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_recipes_in_the_docs_have_these_options() -> None:
    sections = [yaml.safe_load(block.text) for block in of_language("yaml")]
    assert sections
    for section in sections:
        SelectConfig.from_mapping({"out": "selected", **section["select"]})


def test_every_method_and_option_is_described() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in METHODS.names():
        if METHODS[name].__module__.startswith("hf_neuronselect."):
            assert re.search(rf"^\| \[.*`{name}`", text, re.MULTILINE), name
            for option in options_of(METHODS[name]):
                assert f"| `{option}` |" in text, f"{name}: {option}"


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("benchmarks/*.md"), *ROOT.glob("recipes/**/*.md")],
                         ids=lambda page: page.relative_to(ROOT).as_posix())  # fmt: skip
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_the_tables_of_the_smollm2_recipe_are_its_figures() -> None:
    folder = ROOT / "recipes" / "smollm2"
    tables = runpy.run_path(str(folder / "tables.py"))["tables"](folder)
    text = (folder / "README.md").read_text()
    assert len(tables) == 3 and all(table in text for table in tables)
