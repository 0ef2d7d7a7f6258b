"""``neuronselect train``: a recipe, named by ``--config``, on a selection that is there already."""

from ..core.configs import RunConfig
from .flags import command as command_of
from .run import run_recipe

command = command_of(RunConfig, run_recipe, flags={"recipe": "--config"})
command.__doc__ = "Fine-tune a LoRA adapter on a selection, evaluate it before and after, push it."
