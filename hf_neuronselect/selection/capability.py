"""What is kept of fitted targets: their arrays, hashes of their exemplars, and a record; saved and read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..core.digests import files_hash
from ..core.errors import NeuronSelectError
from ..core.folders import (
    CAPABILITY_FILE,
    CAPABILITY_FOLDER,
    CAPABILITY_RECORD,
    FITTED,
    SELECTION_RECORD,
    read_capability,
)
from ..core.options import ExtractionOptions, check_names, part_of
from ..core.provenance import BESIDE, CapabilityRecord, ExtractionRecord, SourceRecord
from ..core.seals import checksums, encode
from ..core.sources import bundled_folder, hub_commit, hub_errors
from ..core.writing import put
from ..methods.base import Target
from ..rows.leakage import Leakage, as_array, from_array
from ..signals.extractor import NeuronFeatureExtractor
from .record import extraction_record

_LEAKAGE = "leakage"


@dataclass(frozen=True)
class Capability:
    """A fitted method without its data.

    Attributes:
        targets: name -> what the method keeps of its exemplars, avoided targets too. leakage: finds the exemplars in a pool.
        source: where it was loaded from; None for one fitted in this process.
    """

    record: CapabilityRecord
    targets: dict[str, Target]
    leakage: Leakage = field(default_factory=Leakage)
    source: SourceRecord | None = None

    def save(self, folder: Path) -> CapabilityRecord:
        """Write ``capability.safetensors`` and ``config.json``, which is returned; no exemplar's text is in them."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            f"{name}/{key}": np.ascontiguousarray(value)
            for name, target in self.targets.items()
            for key, value in target.items()
        }
        arrays[f"{_LEAKAGE}/rows"] = as_array(self.leakage.rows)
        arrays[f"{_LEAKAGE}/questions"] = as_array(self.leakage.questions)
        put(folder / CAPABILITY_FILE, save(arrays))
        record = replace(self.record, files=checksums(folder, [CAPABILITY_FILE]))
        put(folder / CAPABILITY_RECORD, encode(record))
        return record

    @classmethod
    def load(cls, folder: Path, name: str, source: SourceRecord | None = None) -> Capability:
        """Read a capability's folder.

        Args:
            name: what errors call it.

        Raises:
            NeuronSelectError: not a capability, or one that was changed.
        """
        record = read_capability(folder, name)
        try:
            arrays = load_file(folder / CAPABILITY_FILE)
            leakage = Leakage(from_array(arrays[f"{_LEAKAGE}/rows"]), from_array(arrays[f"{_LEAKAGE}/questions"]))
        except (OSError, KeyError, SafetensorError) as cause:
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:160]
            raise NeuronSelectError(f"not a capability ({reason})", option="target", value=name) from cause
        targets: dict[str, Target] = {
            target: {
                key.removeprefix(f"{target}/"): value for key, value in arrays.items() if key.startswith(f"{target}/")
            }
            for target in (*record.targets, *(record.avoided.targets if record.avoided else ()))
        }
        return cls(record, targets, leakage, source)

    @classmethod
    def fetch(
        cls, source: str | Path, *, revision: str | None = None, token: str | bool | None = None, subfolder: str = ""
    ) -> Capability:
        """Load a capability from a folder or the Hub. It may be saved by itself or inside a selection.

        Args:
            subfolder: of the folder or repository, e.g. of a feature library.

        Raises:
            NeuronSelectError: it cannot be had, or is none.
        """
        folder, known, commit = Path(source), Path(source).resolve().name, None
        if not folder.is_dir():
            known = str(source)
            with hub_errors("target", known):
                folder = _download(known, subfolder, revision, token)
            commit = hub_commit(folder)
        own = not subfolder and (folder / FITTED[0]).is_file() and not (folder / CAPABILITY_FILE).exists()
        folder = folder / (CAPABILITY_FOLDER if own else subfolder)
        loaded = cls.load(folder, str(source))
        name = Path(subfolder).name or None
        commit = commit or f"content:{files_hash(folder, (CAPABILITY_RECORD, CAPABILITY_FILE))}"
        return cls(loaded.record, loaded.targets, loaded.leakage, SourceRecord(id=known, commit=commit, name=name))


def _download(repo: str, subfolder: str, revision: str | None, token: str | bool | None) -> Path:
    """A snapshot of a model repository with a capability, or else of a data set that holds a selection."""
    wanted = [f"{subfolder}/{name}" if subfolder else name for name in (CAPABILITY_RECORD, CAPABILITY_FILE)]
    missing: Exception | None = None
    try:
        folder = Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=wanted))
        if subfolder or (folder / CAPABILITY_FILE).is_file():
            return folder
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError) as cause:
        if subfolder:
            raise
        missing = cause
    try:
        return Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, token=token, allow_patterns=[SELECTION_RECORD, *FITTED]
            )
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalEntryNotFoundError):
        if missing is not None:
            raise missing from None
        return folder


def make_extractor(
    fitted: ExtractionRecord, features: Iterable[str], *, token: str | bool | None = None, **options: Any
) -> NeuronFeatureExtractor:
    """An extractor that computes the same numbers as the one a capability was fitted with.

    Args:
        options: of :class:`~hf_neuronselect.core.options.ExtractionOptions`. ``device``, ``device_map`` and
            ``batch_tokens`` are free; a local ``model``, ``sae``, ``encoder`` or adapter must be named again; all others may be left out.

    Raises:
        NeuronSelectError: the model is not at hand, or an option contradicts the capability; both values are named.
    """
    check_names(ExtractionOptions, options, "option", "option")
    if fitted.model is None or fitted.options is None:
        raise NeuronSelectError(
            "the features were computed beforehand, by a model that is not recorded: pass extractor=", option="model"
        )
    known = part_of(fitted.options, type(fitted.options)) | _named("model", "revision", fitted.model, options)
    if fitted.sae is not None:
        known |= _named("sae", "sae_revision", fitted.sae, options)
    for option, source in fitted.beside.items():
        known |= _named(option, BESIDE[option], source, options)
    given = {name: value for name, value in options.items() if value is not None}
    extractor = NeuronFeatureExtractor.from_options(ExtractionOptions(**known | given), features, token=token)
    _check_same(fitted, extraction_record(extractor, features), given)
    return extractor


def _named(option: str, revision: str, source: SourceRecord, given: Mapping[str, object]) -> dict[str, str | None]:
    """A model, SAE, encoder or adapter as options: at its commit on the Hub, bundled, or as given."""
    if given.get(option) is not None:
        return {}
    if source.on_hub:
        return {option: source.id, revision: source.commit}
    if folder := bundled_folder(source.commit):
        return {option: str(folder)}
    raise NeuronSelectError(
        f"the capability was fitted with {source.id} at {source.commit}, which is not on the Hub: name its folder",
        option=option,
    )


def _check_same(fitted: ExtractionRecord, made: ExtractionRecord, given: Mapping[str, object]) -> None:
    for option in ("model", "sae", *BESIDE):
        before, now = getattr(fitted, option), getattr(made, option)
        if (before and before.pins) != (now and now.pins):
            known, found = (
                f"{one.id} at {' on '.join(map(str, one.pins))}" if one else "none" for one in (before, now)
            )
            raise NeuronSelectError(
                f"the capability was fitted with {known}, this is {found}: name the one it was fitted with",
                option=option,
                value=given.get(option),
            )
    assert fitted.options is not None and made.options is not None
    for name, value in part_of(fitted.options, type(fitted.options)).items():
        if (now := getattr(made.options, name)) != value:
            raise NeuronSelectError(
                f"contradicts the capability, which was fitted with {value}; leave it out",
                option=name, value=given.get(name, now),
            )  # fmt: skip
    for signal, identity in fitted.signals.items():
        if made.signals.get(signal, identity) != identity:
            raise NeuronSelectError(
                f"signal {signal} is {made.signals[signal]} here and {identity} in the capability: it was fitted with "
                "another version of this package; fit it again", option="target",
            )  # fmt: skip
