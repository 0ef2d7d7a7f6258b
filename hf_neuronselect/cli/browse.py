"""``neuronselect app``."""

from ..core.configs import AppConfig
from .flags import command as command_of
from .flags import note, say


def _run(config: AppConfig) -> None:
    from ..pipelines.serve import serve

    serve(config, say=say, note=note)


command = command_of(AppConfig, _run, arguments=["folder"])
