"""``neuronselect run``."""

from ..core.configs import RunConfig
from .flags import command as command_of
from .flags import note, say


def run_recipe(config: RunConfig) -> int:
    """Run a recipe; 3 if a part that was asked for was left out, and said so."""
    from ..pipelines.run import run

    return run(config, say=say, note=note)


command = command_of(RunConfig, run_recipe, arguments=["recipe"])
