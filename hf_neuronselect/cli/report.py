"""``neuronselect report``."""

from ..core.configs import ReportConfig
from .flags import command as command_of
from .flags import say


def _run(config: ReportConfig) -> None:
    from ..pipelines.report import report

    report(config, say=say)


command = command_of(ReportConfig, _run, arguments=["folder"])
