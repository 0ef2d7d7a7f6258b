"""``neuronselect compare``."""

from ..core.configs import CompareConfig
from .flags import command as command_of
from .flags import note, say


def _run(config: CompareConfig) -> None:
    from ..pipelines.methods import check_methods

    check_methods(config)  # before torch is imported
    from ..pipelines.compare import compare

    compare(config, say=say, note=note)


command = command_of(CompareConfig, _run, section="compare")
