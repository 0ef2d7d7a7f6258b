"""``neuronselect push``."""

from ..core.configs import PushConfig
from .flags import command as command_of
from .flags import say


def _run(config: PushConfig) -> None:
    from ..pipelines.push import push

    say(push(config))


command = command_of(PushConfig, _run, arguments=["folder", "repo"])
