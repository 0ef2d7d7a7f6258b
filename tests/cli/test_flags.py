"""Every option of every command, typed on the command line, reaches the function that does the work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from option_values import CONFIGS, EVERY, needed, other
from typer.testing import CliRunner

from hf_neuronselect.cli.app import app
from hf_neuronselect.cli.main import main
from hf_neuronselect.core.configs import RunConfig, SelectConfig
from hf_neuronselect.core.options import Options, flag_words, options_of

WORK = {name: f"hf_neuronselect.pipelines.{name}.{name}" for name in CONFIGS if " " not in name}
WORK |= {f"sae {one}": f"hf_neuronselect.pipelines.sae.{one}_sae" for one in ("train", "find", "inspect")}
WORK["app"] = "hf_neuronselect.pipelines.serve.serve"
WORK |= {f"sae {one}": f"hf_neuronselect.pipelines.labels.{one}_sae" for one in ("label", "describe")}
ARGUMENTS = {
    "explain": ["folder"],
    "report": ["folder"],
    "judge": ["folder"],
    "app": ["folder"],
    "run": ["recipe"],
    "export": ["folder"],
    "push": ["folder", "repo"],
    "sae find": ["model"],
    "sae inspect": ["sae"],
}


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Options]:
    """Runs ``neuronselect WORDS``; returns the config that the command's function got."""

    def run(command: str, *words: str) -> Options:
        got: list[Options] = []

        def work(config: Options, **more: Any) -> Any:
            got.append(config)
            if command == "compare":
                return SimpleNamespace(failed=[])
            return {} if command in ("sae inspect", "export") else 0

        monkeypatch.setattr(WORK["run" if command == "train" else command], work)
        monkeypatch.setattr("hf_neuronselect.pipelines.methods.check_methods", lambda config: None)
        monkeypatch.setattr(sys, "argv", ["neuronselect", *command.split(), *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, capsys.readouterr().err
        return got[0]

    return run


def words_of(command: str, values: dict[str, Any]) -> list[str]:
    placed = ARGUMENTS.get(command, [])
    flags = flag_words(CONFIGS[command], {name: value for name, value in values.items() if name not in placed})
    given = [values[name] for name in placed if name in values]
    return [*flags, *(str(one) for value in given for one in (value if isinstance(value, tuple) else [value]))]


@pytest.mark.parametrize(("command", "name"), EVERY)
def test_an_option_reaches_the_work(command: str, name: str, typed: Callable[..., Options]) -> None:
    value = other(options_of(CONFIGS[command])[name])
    values = needed(command, name) | {name: value}
    if command == "push":
        values = {"folder": Path("f"), "repo": "r"} | values
    config = typed(command, *words_of(command, values))
    assert isinstance(config, CONFIGS[command])
    reached = getattr(config, name)
    assert reached == ({key: str(one).lower() for key, one in value.items()} if name == "method_option" else value)
    assert config.given == set(values)


def test_words_of_the_design(typed: Callable[..., Options]) -> None:
    words = ["--pool", "p", "--out", "o", "--no-messages", "--no-examples", "--public", "--streaming", "--keep", "leak"]
    made = typed("select", *words)
    assert made == SelectConfig(
        pool="p", out=Path("o"), messages=False, examples=False, private=False, streaming=True, keep=("leak",)
    )
    assert typed("run", "r.yaml", "--out", "o", "--no-push") == RunConfig(
        recipe=Path("r.yaml"), out=Path("o"), push=False
    )
    assert typed("train", "--config", "r.yaml", "--data", "d", "--out", "o") == RunConfig(
        recipe=Path("r.yaml"), out=Path("o"), data="d"
    )


@pytest.mark.parametrize("command", ["select", "fit", "extract", "compare", "demo", "evaluate", "export", "sae train"])
def test_a_recipe_has_a_section_for_the_command(command: str, typed: Callable[..., Options], tmp_path: Path) -> None:
    values = needed(command, "")
    section = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    section = {name: list(value) if isinstance(value, tuple) else value for name, value in section.items()}
    placed = [str(section.pop(name)) for name in ARGUMENTS.get(command, []) if name in section]
    (tmp_path / "recipe.yaml").write_text(f"{command.split()[0]}: {section}\nother: {{}}\n")
    assert typed(command, "--config", str(tmp_path / "recipe.yaml"), *placed) == CONFIGS[command](**values)


@pytest.mark.parametrize("words", [[], ["sae"]])
def test_the_list_of_commands_cuts_no_sentence_off(words: list[str]) -> None:
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}).output
    assert "Commands:" in shown and "..." not in shown.partition("Commands:")[2]


def test_a_default_of_several_values_is_shown_as_it_is_typed() -> None:
    shown = CliRunner().invoke(app, ["sae", "train", "--help"], env={"COLUMNS": "200"}).output
    assert "[default: -2]" in " ".join(shown.split()) and "(-2,)" not in shown
