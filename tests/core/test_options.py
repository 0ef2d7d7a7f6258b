"""Every option of every command: converted, refused, and the same from Python, YAML and the command line."""

from __future__ import annotations

from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from option_values import CONFIGS, EVERY, bad, needed, other

from hf_neuronselect.cli.flags import command as command_of
from hf_neuronselect.core.configs import ExtractConfig, SelectConfig
from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.core.options import ExtractionOptions, Options, RowOptions, flag_words, opt, options_of, part_of

ONE = pytest.mark.parametrize(("command", "name"), EVERY)


def typed(kind: type[Options], *words: str) -> Options:
    """What a command line of these words gives."""
    got: list[Options] = []
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command_of(kind, got.append, section="mine"))
    app(list(words), standalone_mode=False)
    return got[0]


@ONE
def test_an_option_says_what_it_is(command: str, name: str) -> None:
    option = options_of(CONFIGS[command])[name]
    assert option.help.endswith(".") and option.help[0] != " "
    assert option.flags[0].startswith("--") and "_" not in option.flags[0]
    if not option.required and option.default is not None:
        assert option.read(option.default) == option.default


@ONE
def test_python_yaml_and_flags_give_the_same(command: str, name: str, tmp_path: Path) -> None:
    kind = CONFIGS[command]
    option = options_of(kind)[name]
    value = other(option)
    assert value != option.default
    values = needed(command, name) | {name: value}
    made = kind(**values)
    assert getattr(made, name) == value and type(getattr(made, name)) is type(value)
    assert kind.from_mapping(values) == made and kind.from_mapping(values).given == set(values)
    assert name in made.given and name in made.changed() and (name in made.changed(moving=True)) == option.moves

    def plain(one: Any) -> Any:
        return str(one) if isinstance(one, Path) else list(one) if isinstance(one, tuple) else one

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"mine": {key.replace("_", "-"): plain(one) for key, one in values.items()}}))
    assert typed(kind, "--config", str(file)) == made

    flags = typed(kind, *flag_words(kind, values))
    if name == "method_option":  # text, until the method's own options read it
        assert flags.method_option == {"metric": "cosine", "times": "2.5", "on": "true"}  # type: ignore[attr-defined]
    else:
        assert flags == made and flags.given == set(values)


DEFAULTS = [(command, name) for command, name in EVERY
            if options_of(CONFIGS[command])[name].default not in (None, (), {}, MISSING)]  # fmt: skip


@pytest.mark.parametrize(("command", "name"), DEFAULTS)
def test_flags_win_over_a_recipe(command: str, name: str, tmp_path: Path) -> None:
    kind = CONFIGS[command]
    option = options_of(kind)[name]
    values = needed(command, name)
    file = tmp_path / "recipe.yaml"
    default = str(option.default) if isinstance(option.default, Path) else option.default
    file.write_text(yaml.safe_dump({"mine": {name: default}}))
    made = typed(kind, "--config", str(file), *flag_words(kind, values | {name: other(option)}))
    assert getattr(made, name) == other(option)
    assert name in typed(kind, "--config", str(file), *flag_words(kind, values)).given  # set, though to its default


@ONE
def test_a_bad_value_is_refused(command: str, name: str) -> None:
    kind = CONFIGS[command]
    for value in bad(options_of(kind)[name]):
        with pytest.raises(NeuronSelectError) as refused:
            kind(**(needed(command, name) | {name: value}))
        assert refused.value.option == name and refused.value.message, value


@pytest.mark.parametrize("command", CONFIGS)
def test_missing_and_unknown_names(command: str) -> None:
    kind = CONFIGS[command]
    needs = needed(command, "")
    for name, option in options_of(kind).items():
        if option.required:
            with pytest.raises(NeuronSelectError, match="is needed"):
                kind.from_mapping({key: value for key, value in needs.items() if key != name})
    with pytest.raises(NeuronSelectError, match="unknown option"):
        kind.from_mapping(needs | {"nonsense": 1})


def test_own_options_come_first() -> None:
    names = list(options_of(SelectConfig))
    assert names[:2] == ["pool", "out"] and names.index("target") < names.index("ratio") < names.index("model")
    assert set(part_of(SelectConfig(pool="p", out=Path("o")), ExtractionOptions)) == set(options_of(ExtractionOptions))


def test_pairs_and_lists_from_every_side() -> None:
    same = {"pool": "p", "out": "o"}
    for target in (["a=x", "b=y"], {"a": "x", "b": "y"}, ("a=x", "b=y")):
        assert SelectConfig(**same, target=target).target == ("a=x", "b=y")  # type: ignore[arg-type]
    assert SelectConfig(**same, target="a=x").target == ("a=x",)  # type: ignore[arg-type]
    assert SelectConfig(**same, columns=["text=body"]).columns == {"text": "body"}  # type: ignore[arg-type]
    weights = SelectConfig(**same, aggregate="weighted", weight=["a=1", "b=0.5"]).weight  # type: ignore[arg-type]
    assert weights == {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"k": 1, "ratio": 0.1}, "exactly one of ratio, k, threshold, max_tokens .got ratio, k"),
        ({"ratio": 0}, "must lie in"),
        ({"weight": {"a": 1}}, "belongs to aggregate weighted"),
        ({"avoid_weight": 0.5}, "avoid_weight=0.5: belongs to avoid: add --avoid NAME=rows, or remove it"),
        ({"avoid": "a=x", "avoid_weight": 0}, "avoid_weight=0.0: must be a finite number above 0"),
        ({"avoid": "a=x", "avoid_weight": -1}, "avoid_weight=-1.0: must be a finite number above 0"),
        ({"avoid": "a=x", "avoid_weight": "inf"}, "avoid_weight='inf': must be a finite number"),
        ({"device_map": {"model": 0}, "device": 5.5, "dtype": 7}, "must be one of auto, float32"),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(NeuronSelectError, match=message):
        SelectConfig(pool="p", out="o", **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("shard", ["", "1", "3/3", "a/b", "-1/2", "0/0", "1/2/3"])
def test_a_shard_is_i_of_n(shard: str) -> None:
    with pytest.raises(NeuronSelectError, match="I/N is needed"):
        ExtractConfig(pool="p", out=Path("o"), shard=shard)
    assert ExtractConfig(pool="p", out=Path("o"), shard="2/3").part == (2, 3)


def test_a_unit_is_said_in_the_error() -> None:
    with pytest.raises(NeuronSelectError, match=r"max_length='long': must be a whole number \(tokens\)"):
        SelectConfig(pool="p", out=Path("o"), max_length="long")  # type: ignore[arg-type]


def test_a_frozen_value_is_converted_once() -> None:
    made = SelectConfig(pool="p", out="o", k="5", ratio=None, features="store")  # type: ignore[arg-type]
    assert made.k == 5 and made.out == Path("o") and made.features == Path("store")
    with pytest.raises(AttributeError):
        made.k = 6  # type: ignore[misc]
    assert opt(3, "Help.").metadata["help"] == "Help."


def test_several_columns_in_one_text() -> None:
    want = {"question": "ask", "answer": "reply"}
    for given in ("question=ask,answer=reply", ["question=ask", "answer=reply"], ["question=ask,answer=reply"], want):
        assert RowOptions(columns=given).columns == want
    with pytest.raises(NeuronSelectError, match="columns='x'"):
        RowOptions(columns="question=ask,x")
    with pytest.raises(NeuronSelectError, match="row_format='alpacca'"):
        RowOptions(row_format="alpacca")
