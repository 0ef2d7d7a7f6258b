"""The one error users meet, and the warnings category of the package."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from .text import shown


class NeuronSelectError(ValueError):
    """Bad input: what was given, what was seen, and the mend.

    Args:
        message: what is wrong and what to do about it.
        option: name of the Python argument (``max_length``); the command line shows ``--max-length``.
        value: the value seen. Never a secret.
    """

    def __init__(self, message: str, *, option: str | None = None, value: object = None) -> None:
        self.message, self.option, self.value = shown(message), option, value
        self.flag: str | None = None  # how the command that was called spells the option
        super().__init__(self.message)

    def __str__(self) -> str:
        if self.option is None:
            return self.message
        return f"{self.option}={self.value!r}: {self.message}"

    def as_command_line(self) -> str:
        """``--option VALUE: message``, as ``neuronselect`` prints it; what is no flag of the command has no dashes."""
        if self.option is None:
            return self.message
        value = "" if self.value is None else f" {shown(self.value)}"
        return f"{self.flag or '--' + self.option.replace('_', '-')}{value}: {self.message}"


class NeuronSelectWarning(UserWarning):
    """Something that does not stop the run but that its reader should know."""

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message))


def unknown(kind: str, name: object, known: Iterable[str], option: str) -> NeuronSelectError:
    """An error for a name that is not registered; it names the near ones."""
    known = sorted(known)
    near = near_names(str(name), known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return NeuronSelectError(f"unknown {kind}; {hint}", option=option, value=name)


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """At most three of the known names that were probably meant; those of the same letters first."""
    known = sorted(known)
    turned = [one for one in known if sorted(one) == sorted(name)]
    return list(dict.fromkeys([*turned, *get_close_matches(name, known, n=3)]))[:3]


def one_of(value: str, allowed: Iterable[str], option: str) -> str:
    """Return ``value`` if it is one of ``allowed``, else raise."""
    if value not in (allowed := tuple(allowed)):
        raise NeuronSelectError(f"must be one of {', '.join(allowed)}", option=option, value=value)
    return value
