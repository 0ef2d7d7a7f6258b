"""``neuronselect select``."""

from ..core.configs import SelectConfig
from .flags import command as command_of
from .flags import note, say


def _run(config: SelectConfig) -> None:
    from ..pipelines.methods import check_methods

    check_methods(config)  # before torch is imported
    from ..pipelines.select import select

    select(config, say=say, note=note)


command = command_of(SelectConfig, _run, section="select")
