"""``neuronselect sae train``, ``sae find``, ``sae label``, ``sae describe`` and ``sae inspect``."""

import typer

from ..core.sae_configs import SaeDescribeConfig, SaeFindConfig, SaeInspectConfig, SaeLabelConfig, SaeTrainConfig
from .flags import add, command, note, say

app = typer.Typer(help="Train, find or look at a sparse autoencoder.", no_args_is_help=True, rich_markup_mode=None)


def _train(config: SaeTrainConfig) -> None:
    from ..pipelines.sae import train_sae

    train_sae(config, say=say, note=note)


def _inspect(config: SaeInspectConfig) -> None:
    from ..pipelines.sae import inspect_sae

    for name, value in inspect_sae(config).items():
        say(f"{name:17} {value}")


def _find(config: SaeFindConfig) -> None:
    from ..pipelines.sae import find_sae

    find_sae(config, say=say)


def _label(config: SaeLabelConfig) -> None:
    from ..pipelines.labels import label_sae

    label_sae(config, say=say, note=note)


def _describe(config: SaeDescribeConfig) -> None:
    from ..pipelines.labels import describe_sae

    describe_sae(config, say=say, note=note)


add(app, "find", command(SaeFindConfig, _find, arguments=["model"]))
add(app, "label", command(SaeLabelConfig, _label))
add(app, "describe", command(SaeDescribeConfig, _describe))
add(app, "train", command(SaeTrainConfig, _train, section="sae"))
add(app, "inspect", command(SaeInspectConfig, _inspect, arguments=["sae"]))
