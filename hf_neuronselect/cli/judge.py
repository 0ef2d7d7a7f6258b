"""``neuronselect judge``."""

from ..core.judging import JudgeConfig
from .flags import command as command_of
from .flags import say


def _run(config: JudgeConfig) -> None:
    from ..pipelines.judge import judge

    judge(config, say=say)


command = command_of(JudgeConfig, _run, arguments=["folder"])
