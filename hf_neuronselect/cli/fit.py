"""``neuronselect fit``."""

from ..core.configs import FitConfig
from .flags import command as command_of
from .flags import note, say


def _run(config: FitConfig) -> None:
    from ..pipelines.methods import check_methods

    check_methods(config)  # before torch is imported
    from ..pipelines.fit import fit

    fit(config, say=say, note=note)


command = command_of(FitConfig, _run, section="fit")
