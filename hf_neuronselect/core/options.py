"""Options, declared once.

A job's options are one frozen dataclass. Command-line flags, YAML keys, Python keywords, the record of a run and the
command printed in a card are all derived from it, so none of them can fall behind. Importing this module is cheap: it
must stay so, because every ``--help`` imports it.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from .errors import NeuronSelectError, unknown

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PoolTokens = Literal["all", "no_special", "content", "assistant", "user"]
RowFormatName = Literal["auto", "messages", "prompt", "alpaca", "sharegpt", "qa", "text"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Drift = Literal["endpoints", "mean", "per_token"]
AUTO = "auto"

_KINDS: dict[Any, str] = {str: "text", Path: "a path", dict: "a mapping"}
_KNOWN: dict[Any, dict[str, Option]] = {}


def opt(
    default: Any = MISSING,
    help: str = "",
    *,
    default_factory: Any = MISSING,
    unit: str = "",
    flag: str = "",
    metavar: str = "",
    minimum: float | None = None,
    moves: bool = True,
) -> Any:
    """A field of an options dataclass.

    Args:
        help: one sentence, shown by ``--help`` and in generated docstrings.
        unit: what a number counts, e.g. ``tokens``.
        flag: command-line name without dashes, where it differs from the field's (``private/public`` for a pair).
        metavar: form of the value, e.g. ``NAME=VALUE``.
        minimum: smallest value allowed.
        moves: whether it can change a score or a pick. Options that cannot (``device``) are left out of identities
            and of the command in a card.
    """
    metadata = {"help": help, "unit": unit, "flag": flag, "metavar": metavar, "minimum": minimum, "moves": moves}
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One declared option.

    Attributes:
        kind: the annotated type without ``None``. optional: whether ``None`` is allowed.
        choices: allowed values of a ``Literal``. repeated: a tuple. pairs: a mapping, ``NAME=VALUE`` on the command line.
    """

    name: str
    kind: Any
    optional: bool
    default: Any
    help: str
    unit: str
    flag: str
    metavar: str
    minimum: float | None
    moves: bool

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def repeated(self) -> bool:
        return get_origin(self.kind) is tuple and not self.several

    @property
    def several(self) -> int:
        """How many values one flag takes, of a tuple of that length; else 0."""
        parts = get_args(self.kind) if get_origin(self.kind) is tuple else (...,)
        return 0 if parts[-1] is ... else len(parts)

    @property
    def pairs(self) -> bool:
        return get_origin(self.kind) in (dict, Mapping)

    @property
    def choices(self) -> tuple[Any, ...]:
        """Allowed words; of ``int | Literal["auto"]`` only the words."""
        kind = get_args(self.kind)[0] if self.repeated else self.kind
        parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        return tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))

    @property
    def flags(self) -> tuple[str, str]:
        """Command-line words of the option: one that sets it, and one that unsets it (or nothing)."""
        on, slash, off = (self.flag or self.name.replace("_", "-")).partition("/")
        return f"--{on}", f"--{off}" if slash else ""

    def read(self, value: Any) -> Any:
        """A value of Python, YAML or the command line in the option's own type.

        Raises:
            NeuronSelectError: a value the option cannot have.
        """
        if value is None and self.optional:
            return None
        if self.several:
            given = list(value) if isinstance(value, (list, tuple)) else [value]
            if len(given) != self.several:
                raise _error(self, f"{self.several} values are needed", value)
            return tuple(_scalar(kind, one, self) for kind, one in zip(get_args(self.kind), given, strict=True))
        if self.repeated:
            if isinstance(value, Mapping):  # {name: rows} says what [name=rows] does
                value = [f"{name}={one}" for name, one in value.items()]
            given = [value] if isinstance(value, (str, int, float)) else list(value or ())
            return tuple(_scalar(get_args(self.kind)[0], one, self) for one in given)
        if self.pairs:
            kind = get_args(self.kind)[1]
            return {name: _scalar(kind, one, self) for name, one in _pairs(value, self).items()}
        return _scalar(self.kind, value, self)


def _error(option: Option, message: str, value: Any) -> NeuronSelectError:
    return NeuronSelectError(message, option=option.name, value=value)


def _pairs(value: Any, option: Option) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {str(name): one for name, one in value.items()}
    found: dict[str, Any] = {}
    texts = [value] if isinstance(value, str) else list(value or ())
    if option.metavar.endswith(",..."):  # several in one text
        texts = [part for text in texts for part in str(text).split(",")]
    for text in texts:
        name, equals, one = str(text).partition("=")
        if not equals or not name:
            raise _error(option, f"{option.metavar or 'NAME=VALUE'} is needed", text)
        if name in found:
            raise _error(option, f"{name!r} is given twice", text)
        found[name] = one
    return found


def _scalar(kind: Any, value: Any, option: Option) -> Any:  # noqa: C901 (one branch a type)
    if kind is Any:
        return value
    origin = get_origin(kind)
    if origin is Literal:
        if value not in get_args(kind):
            raise _error(option, f"must be one of {', '.join(map(str, get_args(kind)))}", value)
        return value
    if origin in (Union, types.UnionType):  # e.g. int | Literal["auto"]
        words = [word for part in get_args(kind) if get_origin(part) is Literal for word in get_args(part)]
        if value in words:
            return value
        plain = next(part for part in get_args(kind) if get_origin(part) is not Literal)
        if get_origin(plain) is dict and not isinstance(value, Mapping):  # only Python can give a mapping
            raise _error(option, f"must be one of {', '.join(words)}", value)
        try:
            return _scalar(plain, value, option)
        except NeuronSelectError as cause:
            raise _error(option, f"{cause.message}, or {', '.join(words)}", value) from None
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if kind is bool:
        value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise _error(option, "must be true or false", value)
        return value
    if kind in (int, float):
        return _number(kind, value, option)
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind is str and isinstance(value, (str, Path, int, float)) and not isinstance(value, bool):
        return str(value)
    raise _error(option, f"must be {_KINDS.get(origin or kind, 'another kind of value')}", value)


def _number(kind: type, value: Any, option: Option) -> int | float:
    counted = f" ({option.unit})" if option.unit else ""
    wanted = f"must be a {'whole ' if kind is int else ''}number{counted}"
    try:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError
        power = isinstance(value, str) and "e" in value.lower()  # 5e6
        found: float = float(value) if kind is float or power or isinstance(value, float) else int(value)
        if kind is int and found != int(found):
            raise ValueError
    except (ValueError, OverflowError):
        raise _error(option, wanted, value) from None
    if not math.isfinite(found):
        raise _error(option, "must be a finite number", value)
    if option.minimum is not None and found < option.minimum:
        raise _error(option, f"must be at least {option.minimum:g}", value)
    return kind(found)


def options_of(cls: type) -> dict[str, Option]:
    """The declared options of a dataclass, by name: its own first, then those of the groups it is composed of."""
    if cls in _KNOWN:
        return _KNOWN[cls]
    hints = get_type_hints(cls)
    order = [name for part in cls.__mro__ for name in part.__dict__.get("__annotations__", ())]
    found = {}
    for one in sorted(fields(cls), key=lambda one: order.index(one.name)):
        kind, optional = hints[one.name], False
        if get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind):
            rest = [part for part in get_args(kind) if part is not type(None)]
            kind, optional = (rest[0] if len(rest) == 1 else Union[tuple(rest)]), True  # noqa: UP007
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        about: dict[str, Any] = {
            "help": "",
            "unit": "",
            "flag": "",
            "metavar": "",
            "minimum": None,
            "moves": True,
        } | dict(one.metadata)
        found[one.name] = Option(one.name, kind, optional, default, **about)
    _KNOWN[cls] = found
    return found


def underscored(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Names as Python writes them: ``max-length`` becomes ``max_length``."""
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def check_names(cls: type, values: Mapping[str, Any], kind: str, option: str) -> None:
    """Refuse names that are no option of ``cls``.

    Raises:
        NeuronSelectError: an unknown name; the near ones are given.
    """
    for name in values:
        if name not in options_of(cls):
            raise unknown(kind, name, options_of(cls) or ["none"], option)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all options: values are checked and converted when it is made."""

    def __post_init__(self) -> None:
        for option in options_of(type(self)).values():
            object.__setattr__(self, option.name, option.read(getattr(self, option.name)))
        self.check()

    def check(self) -> None:
        """Refuse values that do not go together."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, kind: str = "option", option: str = "option") -> Self:
        """Options from names and values, as of a YAML section; dashes in names are underscores.

        Raises:
            NeuronSelectError: an unknown or missing name, or a value the option cannot have.
        """
        values = underscored(values)
        check_names(cls, values, kind, option)
        for name, one in options_of(cls).items():
            if one.required and name not in values:
                raise NeuronSelectError(f"is needed: {one.help[0].lower()}{one.help[1:]}", option=name)
        made = cls(**values)
        object.__setattr__(made, "_given", frozenset(values))
        return made

    @property
    def given(self) -> frozenset[str]:
        """Names of the options that were set, even to their defaults; made in Python, of those that differ from them."""
        return frozenset(getattr(self, "_given", self.changed()))

    def values(self) -> dict[str, Any]:
        """Every option's value, by name."""
        return {name: getattr(self, name) for name in options_of(type(self))}

    def changed(self, *, moving: bool = False) -> dict[str, Any]:
        """Options that differ from their defaults.

        Args:
            moving: only those that can change a score or a pick.
        """
        return {
            name: value
            for name, option in options_of(type(self)).items()
            if (option.moves or not moving) and (value := getattr(self, name)) != option.default
        }


def part_of(options: Options, kind: type[Options]) -> dict[str, Any]:
    """The values that ``options`` has for the options of ``kind``."""
    return {name: getattr(options, name) for name in options_of(kind)}


def flag_words(kind: type, values: Mapping[str, Any]) -> list[str]:
    """Command-line words that set these options of ``kind``."""
    words: list[str] = []
    for name, value in values.items():
        option = options_of(kind)[name]
        on, off = option.flags
        if value is True:
            words.append(on)
        elif value is False:
            words += [off] if off else []
        elif option.pairs:
            words += [word for key, one in value.items() for word in (on, f"{key}={_text(one)}")]
        elif option.several and value is not None:
            words += [on, *map(_text, value)]
        elif option.repeated:
            words += [word for one in value for word in (on, _text(one))]
        elif value is not None:
            words += [on, _text(value)]
    return words


def _text(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)


# ------------------------------------------------------------------------------------------ rows to columns
@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """The model that reads the rows, and its SAE."""

    model: str | None = opt(None, "Causal LM or PEFT adapter: folder or Hub id. Without it, the bundled model and SAE.")
    revision: str | None = opt(None, "Branch, tag or commit of the model.")
    sae: str | None = opt(None, "Sparse autoencoder: folder, org/repo, org/repo/folder or auto (see sae find).")
    sae_revision: str | None = opt(None, "Branch, tag or commit of the SAE.")

    def check(self) -> None:
        super().check()
        if self.sae == AUTO and self.sae_revision is not None:
            raise NeuronSelectError("belongs to an SAE that is named", option="sae_revision", value=self.sae_revision)


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(Options):
    """The text encoder that some methods read rows by, in the place of a causal LM."""

    encoder: str = opt(
        "BAAI/bge-base-en-v1.5", "Text encoder of sentence-transformers, for methods that use one: folder or Hub id."
    )
    encoder_revision: str | None = opt(None, "Branch, tag or commit of the encoder.")
    mntp_adapter: str | None = opt(
        None,
        "PEFT adapter trained with bidirectional attention (MNTP), which makes the model an encoder: folder or Hub id.",
    )
    mntp_revision: str | None = opt(None, "Branch, tag or commit of this adapter.")


@dataclass(frozen=True, kw_only=True)
class EncodingOptions(Options):
    """How a text encoder reads a row."""

    encoder_window: int | None = opt(
        None, "Tokens the encoder reads at once; longer rows are cut and averaged. Default its own.", unit="tokens",
        minimum=1,
    )  # fmt: skip
    encoder_prompt: str | None = opt(
        None, "Text put before all that the encoder reads; default its own, if it has one."
    )
    encoder_dtype: Literal["float32", "bfloat16", "float16"] = opt(
        "float32", "Weights and activations of the encoder; embeddings are stored as float32."
    )


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(Options):
    """Number formats the model runs in."""

    dtype: Dtype = opt(
        "auto",
        "Weights and activations; auto: the checkpoint's on a GPU and, of large bfloat16 models, on a CPU that has it; else float32.",
    )
    quantize: Literal["4bit", "8bit"] | None = opt(None, "Load the model quantised (needs bitsandbytes).")
    attn_implementation: str | None = opt(None, "Attention kernel, as transformers names it.")


@dataclass(frozen=True, kw_only=True)
class RowOptions(Options):
    """How a row becomes tokens."""

    row_format: RowFormatName = opt("auto", "Format of the rows; auto: by the names of their columns.")
    columns: dict[str, str] = opt(
        default_factory=dict,
        help="Column of the format = column of the data; repeatable.",
        metavar="OURS=THEIRS,...",
    )
    chat_template: str | None = opt(None, "Chat template (Jinja text) used instead of the tokenizer's own.")
    max_length: int = opt(2048, "Tokens kept of a row.", unit="tokens", minimum=1)
    truncation_side: Literal["right", "left"] = opt("right", "Side that is cut off a longer row.")
    pool_tokens: PoolTokens = opt("all", "Tokens whose activations are averaged.")


@dataclass(frozen=True, kw_only=True)
class ReadOptions(Options):
    """What is read from the model."""

    layer: int = opt(
        -2, "0-based block; negative counts from the end. -2 is the penultimate (MoNA's); nait reads every block."
    )
    top_k_features: int | None = opt(None, "Latents a token keeps; default the SAE's own (MoNA: 192).", minimum=1)
    pooling: Literal["mean", "sum"] = opt("mean", "How the tokens' features become a row's (sum: MoNA, App. D.5).")
    site: Literal["residual", "mlp"] = opt("residual", "What nait reads: block outputs, or the MLPs' neurons.")
    drift: Drift = opt("endpoints", "nait's drift: last minus first token, mean minus first, or per token.")
    value_dtype: Literal["float16", "float32"] = opt("float16", "Type of stored sparse values; dense ones are float32.")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Where and in which batches the model runs; no number depends on these."""

    device: str = opt("auto", "auto, cpu, cuda, cuda:1 or mps.", moves=False)
    device_map: DeviceMap | dict[str, Any] | None = opt(
        None, "Spread a model too large for one GPU over all of them, instead of device.", moves=False
    )
    batch_tokens: int | Literal["auto"] = opt(
        "auto", "Padded tokens a batch, or auto.", unit="tokens", minimum=1, moves=False
    )

    def check(self) -> None:
        super().check()
        if self.device_map is not None and self.device != "auto":
            raise NeuronSelectError(
                f"replaces device, which is {self.device}: give one of them", option="device_map", value=self.device_map
            )


@dataclass(frozen=True, kw_only=True)
class NumberOptions(PrecisionOptions, RowOptions, ReadOptions, EncodingOptions):
    """Everything that moves a column's numbers, besides the model, its SAE and the encoder."""


@dataclass(frozen=True, kw_only=True)
class ExtractionOptions(ModelOptions, EncoderOptions, NumberOptions, DeviceOptions):
    """Everything between a row and its columns."""
