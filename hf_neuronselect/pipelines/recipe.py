"""A recipe: sections ``select``, ``train``, ``evaluate`` and ``push`` of one YAML file, checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.configs import EvaluateOptions, PushSection, SelectConfig
from ..core.errors import NeuronSelectError, unknown
from ..core.options import AUTO
from ..core.recipes import read_recipe, section_of
from ..training.config import TrainConfig
from .job import avoided_specs
from .methods import method_of
from .parts import named_specs

SECTIONS = ("select", "train", "evaluate", "push")


@dataclass(frozen=True)
class Recipe:
    """The sections of a recipe; ``select`` is None where it has none."""

    select: SelectConfig | None
    train: TrainConfig
    evaluate: EvaluateOptions
    push: PushSection

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read and check a recipe, before anything is computed.

        Raises:
            NeuronSelectError: it cannot be read, or has unknown sections, options or values.
        """
        found = read_recipe(path)
        if "train" not in found:
            raise NeuronSelectError("needs a section train: (TRL's keys)", option="config", value=path.name)
        for name in found:
            if name not in SECTIONS:
                raise unknown("section", name, SECTIONS, "config")
        values = {name: section_of(found, name, path) for name in found}
        select = None
        if "select" in values:
            if "out" in values["select"]:
                raise NeuronSelectError("belongs to the command, not into a recipe's select", option="out",
                                        value=values["select"]["out"])  # fmt: skip
            select = _options(SelectConfig, "select", values["select"] | {"out": "selection"})
            chosen = method_of(select.method, select.method_option, select.seed, select.picker)
            chosen.check()
            avoided_specs(select, chosen.method)
        evaluate = _options(EvaluateOptions, "evaluate", values.get("evaluate", {}))
        named_specs(evaluate.data, "data")
        push = _options(PushSection, "push", values.get("push", {}))
        return cls(select, TrainConfig.from_section(values["train"]), evaluate, push)


def _options(kind: Any, name: str, values: Mapping[str, object]) -> Any:
    return kind.from_mapping(values, kind=f"key of section {name}", option="config")


def control_config(config: SelectConfig, method: str, out: Path, picked: int) -> SelectConfig:
    """The selection of a control, on the same pool and targets, of as many rows.

    Args:
        method: one that needs no target. picked: rows that the recipe's own selection has.
    """
    chosen = method_of(method, {}, config.seed)
    ratio, k, max_tokens = config.ratio, config.k, config.max_tokens
    if chosen.keeps_all:
        ratio = k = max_tokens = None
    elif config.threshold is not None or ratio == AUTO:  # scores of another method have another scale
        ratio, k = None, picked
    return replace(
        config,
        target=(*config.target, *config.avoid),  # it scores neither, and leaves the exemplars of both out
        avoid=(),
        avoid_weight=1.0,
        method=method,
        method_option={},
        picker=None,
        aggregate="quota",
        weight={},
        ratio=ratio,
        k=k,
        max_tokens=max_tokens,
        threshold=None,
        held_out=None,
        train={},
        features=None if chosen.signals else config.features,
        push_to_hub=None,
        out=out,
    )
