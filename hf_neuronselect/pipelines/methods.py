"""Methods as commands name them. Importing this is cheap: a wrong name is refused before torch is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.configs import CAPABILITY, DEFAULT_METHOD, CompareConfig, ExtractConfig, TargetOptions
from ..core.errors import NeuronSelectError
from ..methods import METHODS, Method, make_method, signals_needed
from ..methods.base import exemplar_signals, vector_signal
from ..pickers import Picker, picker_of

if TYPE_CHECKING:
    from ..rows.load import Rows
    from ..selection.selector import NeuronSelector
    from ..signals.base import Signal
    from ..signals.extractor import NeuronFeatureExtractor


ALL = "all"


@dataclass(frozen=True)
class Chosen:
    """A method with its options.

    Attributes:
        label: how the user wrote it, e.g. ``nait(normalize=true)``.
        picker: in which order rows are taken; None: the method's own.
    """

    label: str
    method: Method
    picker: str | None = None

    def selector(self) -> NeuronSelector:
        """A new selector, not fitted."""
        from ..selection.selector import NeuronSelector  # heavy

        return NeuronSelector(self.method, picker=self.picker)

    def prepared(self, rows: Rows, extractor: NeuronFeatureExtractor) -> Chosen:
        """The method after its work on the pool; its signals may then be others."""
        from ..selection.stages import prepared  # heavy

        return replace(self, method=prepared(self.method, rows.data, rows.source, extractor))

    @property
    def _picker(self) -> Picker:
        return picker_of(self.picker or self.method.default_picker)

    def check(self) -> None:
        """Refuse what cannot run here. Called before any row is read.

        Raises:
            NeuronSelectError: a package is missing, or a file that an option names.
        """
        self.method.check()
        self._picker.check()

    @property
    def signals(self) -> tuple[str, ...]:
        """Signals that method and picker read, of the pool or of exemplars."""
        return tuple(dict.fromkeys([*signals_needed(self.method), *self.compared]))

    @property
    def compared(self) -> tuple[str, ...]:
        """The signal by whose vectors the picker compares rows; () if it compares none."""
        return vector_signal(self.method, self._picker)

    @property
    def exemplar_signals(self) -> tuple[str, ...]:
        """Signals that are read of exemplars: to fit on them, and to score those that were not fitted on."""
        scored_by = self.method.signals if self.method.needs_target else ()
        return tuple(dict.fromkeys([*exemplar_signals(self.method), *scored_by]))

    @property
    def keeps_all(self) -> bool:
        """Whether every row is kept, whatever budget others have."""
        return self.method.default_budget.ratio == 1 and not self.method.source_option

    @property
    def draws(self) -> bool:
        """Whether it has a seed."""
        return "seed" in self.method.options

    def with_seed(self, seed: int) -> Chosen:
        return method_of(self.method.name, {**self.method.options, "seed": seed}, seed, self.picker, label=self.label)


def method_of(
    name: str, options: Mapping[str, Any], seed: int, picker: str | None = None, *, label: str = ""
) -> Chosen:
    """A method by its name, or ``NAME:VALUE`` where one of its options names rows or a selection.

    Args:
        options: values, or text that the method's options read. seed: for methods that have this option.
        picker: in which order rows are taken; default the method's own.

    Raises:
        NeuronSelectError: unknown method or picker, or an option it does not have or that cannot have this value.
    """
    name, colon, value = name.partition(":")
    if colon:
        option = METHODS[name].source_option
        if not option or option in options:
            why = f"has {option} twice" if option else "has no option that names rows; set options by name"
            raise NeuronSelectError(why, option="method", value=f"{name}:{value}")
        options = {option: value, **options}
        label = label or label_of(f"{name}:{value}")
    method = make_method(name, options)
    if "seed" in method.options and "seed" not in options:
        method = make_method(name, {**options, "seed": seed})
    if picker is not None:
        vector_signal(method, picker_of(picker))
    return Chosen(label or name, method, picker)


_COMMA = re.compile(r",(?![^(]*\))")  # not inside (...)


def methods_of(text: str, seed: int, pickers: str | None = None) -> list[Chosen]:
    """Methods as ``compare`` takes them: ``mona,nait(normalize=true,direction=mean),subset:rows.jsonl``.

    ``all`` is every method but those that need rows or a selection of the user's, and those that take hours: name these.

    Args:
        pickers: separated by commas; every method that has a target is taken with each.

    Raises:
        NeuronSelectError: not of that form, a method named twice, or as :func:`method_of`.
    """
    found: dict[str, Chosen] = {}
    written: set[str] = set()
    for part in _COMMA.split(text):
        label = part.strip()
        if label == ALL:
            for name in sorted(METHODS.names(), key=lambda name: (name != DEFAULT_METHOD, name)):
                if not METHODS[name].source_option and not METHODS[name].costly:
                    found.setdefault(name, method_of(name, {}, seed))
                    written.add(name)
            continue
        match = re.fullmatch(r"([\w.-]+(?::[^()]+)?)(?:\((.*)\))?", label)
        if match is None:
            raise NeuronSelectError("must be names, or name(option=value,...), separated by commas", option="methods",
                                    value=label or text)  # fmt: skip
        pairs = [pair.partition("=") for pair in (match[2] or "").split(",") if pair.strip()]
        options = {key.strip(): value.strip() for key, _, value in pairs}
        short, whole = (label_of(match[1], options, folders=folders) for folders in (False, True))
        name = whole if short in found else short  # files without their folders, unless two then have one name
        if whole in written or name in found:
            raise NeuronSelectError("is named twice", option="methods", value=label)
        written.add(whole)
        found[name] = method_of(match[1], options, seed, label=name)
    if pickers is None:
        return list(found.values())
    named = [str(picker_of(part)) for part in _COMMA.split(pickers)]
    return [
        one
        if picker is None
        else method_of(one.method.name, one.method.options, seed, picker, label=f"{one.label} + {picker}")
        for one in found.values()
        for picker in (named if one.method.needs_target else [None])
    ]


def label_of(name: str, options: Mapping[str, str] | None = None, *, folders: bool = False) -> str:
    """A method with its options, as tables call it.

    Args:
        name: of the method, or ``NAME:VALUE``. folders: name those of files, too; needed where two files have one name.
    """

    def told(value: str) -> str:
        return value if folders or not os.path.exists(value) else Path(value).name or value

    name, colon, value = name.partition(":")
    words = ",".join(f"{key}={told(one)}" for key, one in (options or {}).items())
    return name + (f":{told(value)}" if colon else "") + (f"({words})" if words else "")


def check_methods(config: TargetOptions | ExtractConfig | CompareConfig) -> None:
    """Refuse unknown methods, their options, and methods that cannot run here.

    Raises:
        NeuronSelectError: as :func:`methods_of`, or a package is missing.
    """
    chosen: list[Chosen] = []
    if isinstance(config, ExtractConfig):  # reads signals alone
        methods_to_extract(config)
    elif isinstance(config, CompareConfig):  # which says of a method that cannot run why
        methods_of(config.methods, config.seed, config.picker)
    elif not any(CAPABILITY in target for target in config.target):  # a capability has a method of its own
        chosen = [method_of(config.method, config.method_option, 0, config.picker)]
    for one in chosen:
        one.check()


def signals_read(methods: Iterable[Chosen]) -> list[Signal | str]:
    """Signals that methods and their pickers read, each once."""
    return list(dict.fromkeys(signal for chosen in methods for signal in chosen.signals))


def methods_to_extract(config: ExtractConfig) -> list[Chosen]:
    """Methods whose signals a store gets.

    Raises:
        NeuronSelectError: as :func:`methods_of`, or one method's options with several methods.
    """
    if config.method is None and config.capability:
        return []
    chosen = methods_of(config.method or DEFAULT_METHOD, 0)
    if not config.method_option:
        return chosen
    if len(chosen) > 1:
        raise NeuronSelectError("is of one method; with several, write name(option=value)", option="method_option",
                                value=next(iter(config.method_option)))  # fmt: skip
    return [method_of(chosen[0].method.name, {**chosen[0].method.options, **config.method_option}, 0)]
