"""``neuronselect extract``."""

from ..core.configs import ExtractConfig
from .flags import command as command_of
from .flags import note, say


def _run(config: ExtractConfig) -> None:
    from ..pipelines.methods import check_methods

    check_methods(config)  # before torch is imported
    from ..pipelines.extract import extract

    extract(config, say=say, note=note)


command = command_of(ExtractConfig, _run, section="extract")
