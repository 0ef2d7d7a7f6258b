"""FeatureLibrary: many capabilities in one repository, with an index and a card."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from huggingface_hub import hf_hub_download

from ..core.errors import NeuronSelectError, unknown
from ..core.folders import LIBRARY, check_entry
from ..core.folders import LIBRARY_RECORD as INDEX
from ..core.provenance import CapabilityRecord, LibraryRecord
from ..core.seals import encode, read
from ..core.sources import hub_commit, hub_errors
from ..core.writing import put, settle, writing
from ..hub.cards import LibraryCard, write_card
from ..hub.pushable import PushToHub
from .capability import Capability
from .cosines import Cosines, cosines
from .selector import NeuronSelector

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class FeatureLibrary(PushToHub, MutableMapping[str, NeuronSelector]):
    """Capabilities by name; from a folder or the Hub, each is read when it is first used.

    Args:
        capabilities: name -> fitted selector.

    Example:
        >>> library = FeatureLibrary({"gsm8k": selector})
        >>> library.push_to_hub("me/lib")  # others in the repository are deleted
        >>> FeatureLibrary.from_pretrained("me/lib")["gsm8k"].select(pool, extractor=extractor, ratio=0.05)
    """

    def __init__(self, capabilities: Mapping[str, NeuronSelector] | None = None) -> None:
        self._loaded: dict[str, NeuronSelector] = {}
        self._entries: dict[str, CapabilityRecord] = {}
        self._source: tuple[str, str | None, str | bool | None] | None = None
        self.update(capabilities or {})

    def __repr__(self) -> str:
        return f"FeatureLibrary({', '.join(self) or 'empty'})"

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> NeuronSelector:
        """A capability.

        Raises:
            NeuronSelectError: no such name (the near ones are given).
        """
        if name not in self._entries:
            raise unknown("capability of this library", name, self._entries, "target")
        if name not in self._loaded:
            assert self._source is not None
            source, revision, token = self._source
            capability = Capability.fetch(source, revision=revision, token=token, subfolder=_place(name))
            check_entry(name, self._entries[name], capability.record, source)
            self._loaded[name] = NeuronSelector.of(capability)
        return self._loaded[name]

    def __setitem__(self, name: str, selector: NeuronSelector) -> None:
        if not _NAME.fullmatch(name):
            raise NeuronSelectError("a capability's name is letters, digits, _, - and .", option="name", value=name)
        if not selector.targets or not selector.method.needs_target:
            raise NeuronSelectError("fit a target first: there is nothing to keep", option="name", value=name)
        self._loaded[name] = selector
        self._entries[name] = selector.about()

    def __delitem__(self, name: str) -> None:
        if name not in self._entries:
            raise unknown("capability of this library", name, self._entries, "target")
        del self._entries[name]
        self._loaded.pop(name, None)

    def about(self, name: str) -> CapabilityRecord:
        """Method, targets and extractor of a capability, from the index alone."""
        if name not in self._entries:
            raise unknown("capability of this library", name, self._entries, "target")
        return self._entries[name]

    def cosines(self) -> Cosines:
        """How alike the capabilities' directions are: see :func:`~hf_neuronselect.selection.cosines.cosines`."""
        return cosines(self)

    # -------------------------------------------------------------------------------- persistence
    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``library.json``, ``capabilities/<name>/`` and ``README.md``; capabilities not in it are removed.

        Raises:
            NeuronSelectError: the library is empty, or the folder holds something else.
        """
        if not self._entries:
            raise NeuronSelectError("the library is empty: library['name'] = selector")
        with writing(Path(folder), LIBRARY) as new:
            for name, selector in self.items():
                self._entries[name] = selector.fitted().save(new / _place(name))
            write_card(new, LibraryCard(self._entries), before=Path(folder))
            put(new / INDEX, encode(LibraryRecord(capabilities={name: self._entries[name] for name in self})))

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> FeatureLibrary:
        """Load a library's index, from a folder or the Hub; each capability is fetched when it is first used.

        Raises:
            NeuronSelectError: not a feature library.
        """
        path = Path(source) / INDEX
        if not Path(source).is_dir():
            with hub_errors("target", str(source)):
                path = Path(hf_hub_download(str(source), INDEX, revision=revision, token=token))
                revision = hub_commit(path)  # capabilities come from the same commit
        else:
            settle(Path(source), LIBRARY, "target")
        library = cls()
        record = read(path, LibraryRecord, what=LIBRARY.what, again=LIBRARY.again, option="target", value=str(source))
        library._entries = dict(record.capabilities)
        if bad := [name for name in library._entries if not _NAME.fullmatch(name)]:
            raise NeuronSelectError(f"bad capability name {bad[0]!r} in {INDEX}", option="target", value=str(source))
        library._source = (str(source), revision, token)
        return library


def _place(name: str) -> str:
    return f"capabilities/{name}"


def load_capability(spec: str, token: str | bool | None = None) -> NeuronSelector:
    """Load the capability named by ``FOLDER_OR_ID[@revision]``, with ``:NAME`` for one of a feature library.

    Raises:
        NeuronSelectError: no such capability, or a library without the name of one.
    """
    where, name = (spec, "") if Path(spec).exists() or ":" not in spec else spec.rsplit(":", 1)
    place, _, revision = (where, "", "") if Path(where).exists() else where.partition("@")
    if name:
        return FeatureLibrary.from_pretrained(place, revision=revision or None, token=token)[name]
    if (Path(place) / INDEX).is_file():
        known = ", ".join(FeatureLibrary.from_pretrained(place))
        raise NeuronSelectError(f"is a feature library; name one of it: capability:{spec}:NAME ({known})",
                                option="target", value=spec)  # fmt: skip
    return NeuronSelector.from_pretrained(place, revision=revision or None, token=token)
