"""The command in a selection's card, derived from its record."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..core.configs import CAPABILITY, SelectConfig
from ..core.folders import FITTED
from ..core.options import AUTO, flag_words
from ..core.provenance import BESIDE, ExtractionRecord, Provenance, SourceRecord
from ..core.sources import bundled_folder
from .markdown import PLACE

ROWS, MODEL = "ROWS", "MODEL"  # printed where nothing is known
COMPUTED_BY = "the model that computed the columns, with its SAE and options"


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        words: as a shell splits it. fill_in: words that the reader replaces by paths on their machine: what each is,
            its word, and the hash it is recognised by.
    """

    words: list[str]
    fill_in: list[tuple[str, str, str]]

    @property
    def text(self) -> str:
        """One option a line; no word closes the fence or the comment around it (a shell joins ``'a''b'``)."""
        quoted = {word: shlex.quote(word).replace("<!--", "<!''--").replace("```", "``''`") for word in self.words}
        lines = (" \\\n    " if word.startswith("--") else " " for word in self.words)
        return "".join(before + quoted[word] for before, word in zip(lines, self.words, strict=True)).strip()


def select_command(made: Provenance) -> Command:
    """The ``neuronselect select`` command that makes a selection again.

    Files are named without their folders. Of exemplars that have no name, as those made in Python, the target that was
    fitted on them is read from the selection itself.
    """
    fill_in: list[tuple[str, str, str]] = []

    def spec(what: str, source: SourceRecord | None) -> str:
        word = source_word(source)
        if not _resolves(source):
            fill_in.append((what, word, (source.commit if source else None) or ""))
        return word

    values: dict[str, Any] = {"pool": spec("the pool", made.pool)}
    if made.capability is not None:
        name = f":{made.capability.name}" if made.capability.name else ""
        values["target"] = [f"{CAPABILITY}{spec('the capability', made.capability)}{name}"]
    elif own_target(made):
        values["target"] = [f"{CAPABILITY}{PLACE}"]
    else:
        values["target"] = [
            f"{name}={spec(f'exemplars of {name}', target.source)}" for name, target in made.targets.items()
        ]
        if made.avoided is not None:
            values["avoid"] = [
                f"{name}={spec(f'exemplars of {name}', target.source)}" for name, target in made.avoided.targets.items()
            ]
            values["avoid_weight"] = made.avoided.weight
    values["method"] = made.method.name
    options = {name: value for name, value in made.method.options.items() if value is not None}
    of_method = {name: spec(f"the method's {name}", source) for name, source in made.method.sources.items()}
    values["method_option"] = options | of_method
    values["picker"] = made.method.picker
    if made.extractor is not None:
        # A capability brings its own options; a method without targets uses it only to leave out its exemplars.
        values |= _extraction(made.extractor, spec, alone=made.capability is None or not made.targets)
    if _from_columns(made):
        signals = made.extractor.signals if made.extractor else {}
        fill_in.append((COMPUTED_BY, MODEL, ", ".join(f"{name}-{identity}" for name, identity in signals.items())))
        values["model"] = MODEL
    values |= made.budget.given()
    values["aggregate"] = made.aggregate
    values["weight"] = made.weights or {}
    values["keep"] = [what for what in ("duplicate", "leak") if what not in made.exclude]
    if made.spread is not None:
        values |= asdict(made.spread)
    values["out"] = "selected"
    return Command(["neuronselect", "select", *flag_words(SelectConfig, values)], fill_in)


def own_target(made: Provenance) -> bool:
    """Whether the command reads the target that the selection itself holds."""
    targets = [*made.targets.values(), *(made.avoided.targets.values() if made.avoided else ())]
    named = all(source_word(target.source) != ROWS for target in targets)
    return not named and holds_target(made)


def holds_target(made: Provenance) -> bool:
    """Whether a selection holds targets that can select again: one fitted on columns does not know its model."""
    return made.capability is None and not _from_columns(made) and set(FITTED) <= (made.files or {}).keys()


def _from_columns(made: Provenance) -> bool:
    """Whether the signals were columns of the pool, computed by a model that is not recorded."""
    return made.tokens.pool_mean is not None and (made.extractor is None or made.extractor.model is None)


def _resolves(source: SourceRecord | None) -> bool:
    """Whether a source can be had by its name on any machine."""
    return source is not None and (source.on_hub or source_word(source).startswith("bundled:"))


def _extraction(
    extractor: ExtractionRecord, spec: Callable[[str, SourceRecord], str], *, alone: bool
) -> dict[str, Any]:
    """Options of the extractor; without ``alone`` only those that a capability cannot tell."""
    values: dict[str, Any] = {}
    sources = (("model", "revision", extractor.model), ("sae", "sae_revision", extractor.sae))
    if extractor.model is None or not bundled_folder(extractor.model.commit):
        for option, revision, source in sources:
            if option == "sae" and source is not None and bundled_folder(source.commit):
                values[option] = AUTO
            elif source is not None and (alone or not source.on_hub):
                # A model's or an SAE's id is a name of its own: its commit goes into another option.
                values[option] = source.id if source.on_hub else spec(f"the {option}", source)
                values[revision] = source.commit if source.on_hub else None
    for option, source in extractor.beside.items():
        if alone or not source.on_hub:
            values[option] = source.id if source.on_hub else spec(f"the {option.replace('_', ' ')}", source)
            values[BESIDE[option]] = source.commit if source.on_hub else None
    if alone and extractor.options is not None:
        values |= extractor.options.changed(moving=True)
    return values


def source_word(source: SourceRecord | None) -> str:
    """What to type for a source: ``id@commit[:config[:split]]``, ``bundled:NAME``, or a file's name."""
    if source is None or source.id is None:
        return ROWS
    if not source.on_hub:
        return source.id
    split = source.split or "train"
    # A split other than train needs the config before it; the first one is called `default`.
    rest = f":{source.config or 'default'}:{split}" if source.config or split != "train" else ""
    return f"{source.id}@{source.commit}{rest}"
