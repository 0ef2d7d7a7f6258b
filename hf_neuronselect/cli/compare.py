"""``neuronselect compare``."""

from ..core.configs import CompareConfig
from .flags import command as command_of
from .flags import note, say


def _run(config: CompareConfig) -> int:
    """3 if a method did not run, and said why."""
    from ..pipelines.methods import check_methods

    check_methods(config)  # before torch is imported
    from ..pipelines.compare import compare

    return 3 if compare(config, say=say, note=note).failed else 0


command = command_of(CompareConfig, _run, section="compare")
