"""For every declared option: a value that is not its default, and values it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from hf_neuronselect.core import configs, judging, sae_configs
from hf_neuronselect.core.options import Option, Options, options_of

CONFIGS: dict[str, type[Options]] = {
    "select": configs.SelectConfig,
    "fit": configs.FitConfig,
    "extract": configs.ExtractConfig,
    "compare": configs.CompareConfig,
    "demo": configs.DemoConfig,
    "run": configs.RunConfig,
    "evaluate": configs.EvaluateConfig,
    "export": configs.ExportConfig,
    "push": configs.PushConfig,
    "explain": configs.ExplainConfig,
    "app": configs.AppConfig,
    "judge": judging.JudgeConfig,
    "report": configs.ReportConfig,
    "sae train": sae_configs.SaeTrainConfig,
    "sae label": sae_configs.SaeLabelConfig,
    "sae describe": sae_configs.SaeDescribeConfig,
    "sae find": sae_configs.SaeFindConfig,
    "sae inspect": sae_configs.SaeInspectConfig,
}
EVERY = [(command, name) for command, kind in CONFIGS.items() for name in options_of(kind)]
# Values of options that not every text or number is a value of.
_OF = {"ratio": 0.25, "shard": "1/3", "method_option": {"metric": "cosine", "times": 2.5, "on": True}}
# Options that belong to another one.
_WITH: dict[str, dict[str, Any]] = {
    "weight": {"aggregate": "weighted"}, "avoid_weight": {"avoid": ("a=x y",)}, "most": {"selection": "some"},
}  # fmt: skip
_OF_SELECT = {"held_out": {"ratio": "auto"}, "train": {"ratio": "auto", "held_out": "held.jsonl"}}


def other(option: Option) -> Any:
    """A value that is not the default."""
    if option.name in _OF:
        return _OF[option.name]
    if option.several:
        return (37, 36)
    if option.kind is bool:
        return not option.default if isinstance(option.default, bool) else True
    if option.pairs:
        number = get_args(option.kind)[1] is float
        return {"one": 2.5 if number else "a", "two": 1.0 if number else "b=c"}
    words = [word for word in option.choices if word != option.default]
    if option.repeated:
        return (37, -1) if int in get_args(option.kind) else tuple(option.choices or ("a=x y", "b"))
    if words and option.kind is not int:
        return words[-1]
    if int in (option.kind, *get_args(option.kind)):
        return 37
    if option.kind is float:
        return 0.125
    if option.kind is Path:
        return Path("some/where")
    return "37,36" if option.name == "features" else "some text"


def bad(option: Option) -> list[Any]:
    """Values the option cannot have."""
    kinds = (option.kind, *get_args(option.kind))
    if option.pairs:
        return ["no equals sign", ["a=1", "a=2"]]
    if option.choices and int not in kinds:
        return ["nonsense", 5]
    if int in kinds:
        return ["nonsense", 1.5, True, float("inf"), *([option.minimum - 1] if option.minimum is not None else [])]
    if float in kinds:
        return ["nonsense", float("nan"), float("-inf"), True]
    if option.kind is bool:
        return ["maybe", 1]
    return [[5, []]] if option.repeated else [["a", "b"], True]


def needed(command: str, name: str) -> dict[str, Any]:
    """The options that must be given beside one."""
    values = {one.name: other(one) for one in options_of(CONFIGS[command]).values() if one.required}
    if command == "evaluate" and name not in ("data", "tasks"):
        values["data"] = ("held.jsonl",)
    if command == "explain" and name not in ("row", "why_not", "contrast", "causal"):
        values["causal" if name == "held_out" else "row"] = 37
    if command == "sae describe" and name not in ("features", "selection", "most"):
        values["features"] = "37,36"
    beside = _WITH.get(name, {}) | (_OF_SELECT.get(name, {}) if command == "select" else {})
    return {key: value for key, value in (values | beside).items() if key != name}
