"""Fit a reusable capability on exemplars."""

from __future__ import annotations

from ..core.configs import CAPABILITY, FitConfig
from ..core.errors import NeuronSelectError
from ..core.folders import CAPABILITY as CAPABILITY_FOLDER
from ..core.provenance import aim
from ..selection.selector import NeuronSelector
from .job import avoided_specs, check_rows
from .methods import Chosen, method_of
from .parts import Say, extractor_of, hold, load_named, named_specs, quiet


def fit(config: FitConfig, *, say: Say = quiet, note: Say = quiet) -> NeuronSelector:
    """Fit a method on exemplars and write the capability to ``config.out``.

    Raises:
        NeuronSelectError: bad input, or a method that learns nothing from exemplars.
    """
    chosen = method_of(config.method, config.method_option, 0, config.picker)
    if not chosen.method.needs_target:
        raise NeuronSelectError("learns nothing from exemplars; there is nothing to save", option="method",
                                value=config.method)  # fmt: skip
    if chosen.method.not_saved:
        raise NeuronSelectError(f"{chosen.method.not_saved}, so it is never saved; give the exemplars to select",
                                option="method", value=config.method)  # fmt: skip
    with hold(config.out, CAPABILITY_FOLDER):
        return _fit(config, chosen, say, note)


def _fit(config: FitConfig, chosen: Chosen, say: Say, note: Say) -> NeuronSelector:
    specs = named_specs(config.target, "target")
    for spec in specs.values():
        if spec.startswith(CAPABILITY):
            raise NeuronSelectError("is fitted already; give rows", option="target", value=spec)
    if not specs:
        raise NeuronSelectError(
            f"method {config.method} needs exemplars, 10 to 100 rows that show the task: --target NAME=rows",
            option="target",
        )
    avoid = avoided_specs(config, chosen.method)
    targets, avoided = load_named(specs, "target"), load_named(avoid, "avoid")
    check_rows([*targets.values(), *avoided.values()], config)
    selector = chosen.selector()
    selector.fit(
        {name: rows.data for name, rows in targets.items()},
        avoid={name: rows.data for name, rows in avoided.items()},
        avoid_weight=config.avoid_weight,
        extractor=extractor_of(config, chosen.signals, note),
        sources={name: rows.source for name, rows in {**targets, **avoided}.items()},
    )
    selector.save_pretrained(config.out)
    used = [f"{name} ({one.used} exemplars)" for name, one in selector.exemplars.items() if name not in avoided]
    say(f"{config.method} capability of {aim(used, selector.about().avoided)} -> {config.out}")
    return selector
