"""``hf neuronselect``: the Hub's own command line runs the package as an extension."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub.cli.extensions import ExtensionManifest
from tiny import chat

import hf_neuronselect


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``hf extensions install me/hf-neuronselect`` leaves, with this environment in place of one of its own."""
    home = tmp_path_factory.mktemp("home")
    place = home / ".local" / "share" / "hf" / "extensions" / "hf-neuronselect"
    script = place / "venv" / "bin" / "hf-neuronselect"
    script.parent.mkdir(parents=True)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["hf-neuronselect"].partition(":")  # as pip writes a console script
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    script.chmod(0o755)
    (place / script.name).symlink_to(script)  # huggingface_hub 1.5 looks for it here
    about = {
        "owner": "me",
        "repo": "hf-neuronselect",
        "repo_id": "me/hf-neuronselect",
        "short_name": "neuronselect",
        "executable_name": script.name,
        "executable_path": str(script),
        "type": "python",
        "installed_at": datetime.now(UTC).isoformat(),
    }
    known = {field.name: about.get(field.name) for field in fields(ExtensionManifest)}  # versions have other fields
    (place / "manifest.json").write_text(json.dumps(known))
    return home


def hf(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The client's command line as it stands."""
    return subprocess.run(
        [sys.executable, "-m", "huggingface_hub.cli.hf", *words], cwd=home, capture_output=True, text=True, timeout=120,
        env=os.environ | {"HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_it_answers_as_neuronselect_does(home: Path) -> None:
    done = hf(home, "neuronselect", "--version")
    assert (done.returncode, done.stdout) == (0, f"neuronselect {hf_neuronselect.__version__}\n"), done.stderr
    done = hf(home, "neuronselect", "--help")
    assert done.returncode == 0 and "neuronselect [OPTIONS] COMMAND" in done.stdout
    done = hf(home, "neuronselect", "select", "--pool", "p.jsonl", "--out", "o", "--ratio", "2")
    assert done.returncode == 2 and done.stderr.startswith("error: --ratio 2")


def test_it_selects(home: Path) -> None:
    pool = "".join(json.dumps({"messages": chat(f"question {i}", f"answer {i}")}) + "\n" for i in range(9))
    (home / "pool.jsonl").write_text(pool)
    done = hf(home, "neuronselect", "select", "--pool", "pool.jsonl", "--method", "random", "--k", "3", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((home / "out" / "selection.json").read_text())["method"]["name"] == "random"
