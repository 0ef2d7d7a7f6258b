"""``neuronselect explain``."""

from ..core.configs import ExplainConfig
from .flags import command as command_of
from .flags import say


def _run(config: ExplainConfig) -> None:
    from ..pipelines.explain import explain

    explain(config, say=say)


command = command_of(ExplainConfig, _run, arguments=["folder"])
