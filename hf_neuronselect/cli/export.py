"""``neuronselect export``."""

from ..core.configs import ExportConfig
from .flags import command as command_of
from .flags import say


def _run(config: ExportConfig) -> None:
    from ..pipelines.export import export

    for file in export(config):
        say(str(file))


command = command_of(ExportConfig, _run, arguments=["folder"], section="export")
