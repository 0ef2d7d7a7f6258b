"""``neuronselect evaluate``."""

from ..core.configs import EvaluateConfig
from .flags import command as command_of
from .flags import note, say


def _run(config: EvaluateConfig) -> None:
    from ..pipelines.evaluate import evaluate

    evaluate(config, say=say, note=note)


command = command_of(EvaluateConfig, _run, section="evaluate")
