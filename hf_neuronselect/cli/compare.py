"""``neuronselect compare``."""

from ..core.configs import CompareConfig
from ..core.progress import live_table
from .flags import command as command_of
from .flags import note, say


def _run(config: CompareConfig) -> int:
    """3 if a method did not run, and said why."""
    from ..pipelines.methods import check_methods

    check_methods(config)  # before torch is imported
    from ..pipelines.compare import compare

    with live_table() as table:
        found = compare(config, say=say, note=note, table=table)
    return 3 if found.failed else 0


command = command_of(CompareConfig, _run, section="compare")
