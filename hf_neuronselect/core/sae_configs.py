"""Options of the ``neuronselect sae`` commands; see :mod:`.configs`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .configs import POOL_HELP
from .errors import NeuronSelectError
from .judging import JudgeOptions
from .options import Dtype, Options, opt


@dataclass(frozen=True, kw_only=True)
class SaeTrainConfig(Options):
    """Train TopK SAEs on the tokens of rows of any format, and say how good they are. A killed training goes on."""

    pool: str = opt(help=POOL_HELP)
    out: Path = opt(help="Folder; an SAE goes into OUT/<blocks>.<layer>, unfinished work into OUT/unfinished.")
    model: str | None = opt(None, "Causal LM; default the bundled one.")
    revision: str | None = opt(None, "Branch, tag or commit of the model.")
    layer: tuple[int, ...] = opt(
        (-2,), "0-based block whose output is read; negative counts from the end; repeatable.", metavar="INTEGER"
    )
    expansion_factor: int = opt(16, "Latents as a multiple of the model's width.", minimum=1)
    latents: int | None = opt(None, "Latents, in the place of a multiple of the width.", minimum=1)
    k: int = opt(32, "Latents a token keeps.", minimum=1)
    tokens: int = opt(
        10_000_000, "Tokens to train on; rows are seen again until there are so many.", unit="tokens", minimum=1
    )
    batch: int | None = opt(None, "Tokens of a step; default 1,024 to 4,096, by tokens.", unit="tokens", minimum=2)
    learning_rate: float = opt(4e-4, "The highest learning rate, after a warm-up and before it falls.", minimum=0)
    dtype: Dtype = opt("auto", "The model's weights and activations; the SAE itself is trained in float32.")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1 or mps.")
    context: int = opt(512, "Tokens of a piece of a row.", unit="tokens", minimum=8)
    max_rows: int | None = opt(None, "Use only the first rows.", unit="rows", minimum=1)
    streaming: bool = opt(False, "Read the pool as a stream, only as far as the tokens need it.")
    buffer_gb: float = opt(0.5, "Gigabytes of disk, in OUT, for shuffled activations, at most.", minimum=0)
    seed: int = opt(0, "Seed of the order and of the first weights.", minimum=0)

    def check(self) -> None:
        super().check()
        if self.latents is not None and self.expansion_factor != 16:
            raise NeuronSelectError("give latents or expansion_factor, not both", option="latents", value=self.latents)
        if not self.layer:
            raise NeuronSelectError("name a block at least", option="layer")


@dataclass(frozen=True, kw_only=True)
class SaeLabelConfig(Options):
    """Label an SAE's features by the words they fire on, and say how well the labels predict that. No other model is asked."""

    pool: str = opt(help=POOL_HELP)
    model: str | None = opt(None, "Causal LM; default the bundled one and its SAE.")
    revision: str | None = opt(None, "Branch, tag or commit of the model.")
    sae: str = opt("auto", "Sparse autoencoder: folder, org/repo, org/repo/folder or auto.")
    sae_revision: str | None = opt(None, "Branch, tag or commit of the SAE.")
    layer: int = opt(-2, "0-based block; negative counts from the end.")
    tokens: int = opt(1_000_000, "Tokens that are read, of random rows.", unit="tokens", minimum=1)
    max_length: int = opt(256, "Tokens kept of a row.", unit="tokens", minimum=1)
    dtype: Dtype = opt("auto", "The model's weights and activations.")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1 or mps.")
    seed: int = opt(0, "Seed of the rows' order.", minimum=0)
    out: Path | None = opt(None, "File of the labels; default in the cache, where explain finds them.")


@dataclass(frozen=True, kw_only=True)
class SaeDescribeConfig(JudgeOptions, SaeLabelConfig):
    """Let a chat model say in a phrase what features of an SAE fire on, and check its phrases on other contexts. Give --features or --selection."""

    features: str | None = opt(None, "Numbers of features.", metavar="12,40,77")
    selection: str | None = opt(
        None,
        "Selection made with this SAE, folder or data set on the Hub: the features that explain its picks most, by its first target.",
    )
    most: int = opt(20, "Features of a selection.", minimum=1)
    contexts: int = opt(
        20, "Held-out contexts of each feature that its phrase is checked on; it fires in half of them.", minimum=8
    )

    def check(self) -> None:
        super().check()
        if (self.features is None) == (self.selection is None):
            raise NeuronSelectError("give one of --features and --selection")
        if self.selection is None and "most" in self.given:
            raise NeuronSelectError("is for the features of a selection: add --selection FOLDER", option="most",
                                    value=self.most)  # fmt: skip
        _ = self.numbers

    @property
    def numbers(self) -> tuple[int, ...]:
        """The features named, each once; none with a selection.

        Raises:
            NeuronSelectError: one is not a number.
        """
        words = [] if self.features is None else [one.strip() for one in self.features.split(",")]
        if wrong := [one for one in words if not (one.isascii() and one.isdigit() and len(one) < 10)]:
            raise NeuronSelectError("must be numbers of features with commas between them, such as 12,40,77",
                                    option="features", value=wrong[0])  # fmt: skip
        return tuple(dict.fromkeys(map(int, words)))


@dataclass(frozen=True, kw_only=True)
class SaeFindConfig(Options):
    """List the SAEs of a model: in this package, on this machine and on the Hub."""

    model: str = opt(help="Causal LM or PEFT adapter: folder or Hub id.")
    revision: str | None = opt(None, "Branch, tag or commit of the model.")
    layer: int = opt(-2, "0-based block that the SAE should read; negative counts from the end.")


@dataclass(frozen=True, kw_only=True)
class SaeInspectConfig(Options):
    """Show what an SAE file holds: format, site, shape, activation."""

    sae: Path | None = opt(None, "Local SAE folder; default the bundled one.")
    layer: int | None = opt(None, "Picks one of several.")
