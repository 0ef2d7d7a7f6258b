"""``neuronselect demo``."""

from ..core.configs import DemoConfig
from .flags import command as command_of
from .flags import note, say


def _run(config: DemoConfig) -> None:
    from ..pipelines.demo import demo

    demo(config, say=say, note=note)


command = command_of(DemoConfig, _run, section="demo")
