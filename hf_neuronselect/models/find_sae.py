"""Find the SAEs of a model: shipped with the package, beside the model, in the user's cache, or published on the Hub.

An SAE belongs to a model by what its record (``training.json``) or the catalogue says of that model: its Hub id, the
hash of its files, or the hash of its norms, which rounding and quantising leave as they are. A folder's name says nothing.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ..core import bundled
from ..core.digests import cache_dir
from ..core.sae_record import SaeRecord, read_record
from ..core.sources import Source
from .checkpoint import block_parameters
from .sae_formats import sae_folders
from .sae_match import norms_hash

CATALOGUE = bundled.ASSETS / "published_saes.json"
UNKNOWN = "unknown"
SHIPPED, LOCAL, PUBLISHED = "in this package", "on this machine", "on the Hub"
# SAELens' names of models are TransformerLens', most of them the last part of the Hub id.
_LENS_NAMES = {"gpt2-small": "gpt2"}
_LENS_SITES = "blocks[.]([0-9]+)[.]hook_(resid_post|resid_pre|mlp_out)"


@dataclass(frozen=True)
class FoundSae:
    """An SAE, or one for each of several layers.

    Attributes:
        place: where it is. sae: the value of ``--sae`` by layer. doubt: why it may not fit the model; ``""`` if it does.
    """

    place: str
    sae: Mapping[int, str]
    format: str
    license: str
    doubt: str = ""

    def about(self, layer: int) -> str:
        """What it is and where it was found, for the screen."""
        name = Path(self.sae[layer]).parent.name if self.place == SHIPPED else self.sae[layer]
        return f"SAE {name}, block {layer} ({self.format}), found {self.place}; its license: {self.license}"

    def nearest(self, layer: int) -> int:
        """The layer it has that is nearest to one asked for."""
        return min(self.sae, key=lambda one: (abs(one - layer), one))


# --------------------------------------------------------------------------------------------- what an SAE is of
def hub_id(source: Source) -> str | None:
    """A model's Hub id; of a folder only if it is one of the Hub's cache."""
    if source.revision is not None:
        return source.id
    cached = re.search("/models--([^/]+?)--([^/]+)/snapshots/", f"{Path(source.location).as_posix()}/")
    return f"{cached[1]}/{cached[2]}" if cached else None


def doubt_of(source: Source, record: SaeRecord) -> str | None:
    """Why an SAE may not fit a model: ``""`` if it was trained on it; None if nothing says that it was."""
    base, known = source.base or source, record.model
    if record.commit is not None and base.commit == record.commit:
        return ""
    if known is not None and (hub_id(base) or "").casefold() == known.casefold():
        pinned = record.commit is not None and ":" not in record.commit and base.revision is not None
        return f"it was trained on {known} at commit {record.commit}, the model is at {base.commit}" if pinned else ""
    if record.norms is not None and norms_hash(base) == record.norms:
        return f"it was trained on {known}, which has the model's norms; other weights may have been trained further"
    return None


# ---------------------------------------------------------------------------------------------- where SAEs are
def find_saes(source: Source, places: Sequence[str] = (SHIPPED, LOCAL, PUBLISHED)) -> list[FoundSae]:
    """The SAEs of a model, the surest first."""
    where = {SHIPPED: _shipped, LOCAL: _local, PUBLISHED: _published}
    return [found for place in places for found in where[place](source)]


def pick_sae(found: Sequence[FoundSae], layer: int) -> tuple[FoundSae, int] | None:
    """The SAE that ``--sae auto`` means: of the layer if there is one, else of the nearest; sure ones first."""
    order = sorted(found, key=lambda one: (one.place == PUBLISHED, abs(one.nearest(layer) - layer), bool(one.doubt)))
    return (order[0], order[0].nearest(layer)) if order else None


def _shipped(source: Source) -> Iterator[FoundSae]:
    for root in bundled.SAES:
        yield from _in_folder(source, root, SHIPPED)


def _local(source: Source) -> Iterator[FoundSae]:
    if source.revision is None and source.location:
        folder = Path(source.location)
        beside = [folder / "sae", folder.with_name(f"{folder.name}-sae")]
        for root in beside:
            yield from _in_folder(source, root, LOCAL, beside=True)
    yield from _in_folder(source, cache_dir() / "saes", LOCAL)


def _in_folder(source: Source, root: Path, place: str, *, beside: bool = False) -> Iterator[FoundSae]:
    """The SAEs below a folder that are of the model, or lie beside it and say nothing else."""
    for folder, kind, layer in sae_folders(root):
        record = read_record(folder, folder.name)
        doubt = None if record is None else doubt_of(source, record)
        if record is None and beside:
            doubt = "it lies beside the model, but no record says which model it was trained on"
        if doubt is not None and layer is not None:
            yield FoundSae(place, {layer: str(folder)}, kind, (record and record.license) or UNKNOWN, doubt)


def _published(source: Source) -> Iterator[FoundSae]:
    name = hub_id(source.base or source)
    if name is None:
        return
    for entry in catalogue():
        if name.casefold() in (one.casefold() for one in entry.models):
            yield FoundSae(PUBLISHED, entry.by_layer(), entry.format, entry.license)
    sites = ["saelens resid_post", "saelens resid_pre", "saelens mlp_out"]
    for (repo, sae_format), by_layer in sorted(_lens(name).items(), key=lambda one: sites.index(one[0][1])):
        yield FoundSae(PUBLISHED, {n: f"{repo}/{path}" for n, path in by_layer.items()}, sae_format, UNKNOWN)


# ------------------------------------------------------------------------------------------------ the catalogue
@dataclass(frozen=True)
class Published:
    """An entry of the catalogue.

    Attributes:
        models: Hub ids of the model. folder: with ``{layer}``, and ``{l0}`` where a layer's folder names its mean L0.
        l0: of each layer. neuronpedia: where Neuronpedia shows its features, with ``{layer}``; "" if it does not.
    """

    models: tuple[str, ...]
    repo: str
    folder: str
    layers: tuple[int, ...]
    format: str
    license: str
    l0: tuple[int, ...] = ()
    neuronpedia: str = ""

    def by_layer(self) -> dict[int, str]:
        """The value of ``--sae`` for each layer."""
        l0 = self.l0 or (0,) * len(self.layers)
        return {n: f"{self.repo}/{self.folder.format(layer=n, l0=one)}" for n, one in zip(self.layers, l0, strict=True)}


@lru_cache(maxsize=1)
def catalogue() -> tuple[Published, ...]:
    """The published SAEs that are known; layers are numbers or ``first-last``."""
    found = []
    for entry in json.loads(CATALOGUE.read_text(encoding="utf-8")):
        layers: list[int] = []
        for one in entry["layers"]:
            first, _, last = str(one).partition("-")
            layers += range(int(first), int(last or first) + 1)
        found.append(
            Published(tuple(entry["models"]), entry["repo"], entry["folder"], tuple(layers), entry["format"],
                      entry["license"], tuple(entry.get("l0", ())), entry.get("neuronpedia", ""))
        )  # fmt: skip
    return tuple(found)


def feature_page(sae: Source, feature: int) -> str:
    """Neuronpedia's page of a feature; "" where the SAE is not known there."""
    for entry in catalogue():
        layer = next((n for n, name in entry.by_layer().items() if entry.neuronpedia and name == sae.id), None)
        if layer is not None:
            return f"https://www.neuronpedia.org/{entry.neuronpedia.format(layer=layer)}/{feature}"
    return ""


def _lens(name: str) -> dict[tuple[str, str], dict[int, str]]:
    """SAELens' own directory, where it is installed: (repository, format) -> layer -> folder."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for release in _lens_directory().values():
        model = str(release.get("model", ""))
        model = _LENS_NAMES.get(model, model).casefold()
        if release.get("conversion_func") is not None or model not in (name.casefold(), name.split("/")[-1].casefold()):
            continue  # its other formats are in the catalogue, or cannot be read
        for one in release.get("saes", ()):
            site, path = re.fullmatch(_LENS_SITES, str(one.get("id"))), str(one.get("path"))
            if site and not path.endswith(".pt"):
                by_layer = found.setdefault((str(release["repo_id"]), f"saelens {site[2]}"), {})
                by_layer.setdefault(int(site[1]), path)
    return found


@lru_cache(maxsize=1)
def _lens_directory() -> dict[str, Any]:
    """The file is read, the package is not imported: that takes seconds."""
    spec = importlib.util.find_spec("sae_lens")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "pretrained_saes.yaml"
        if file.is_file():
            # The safe loader in C: yaml.safe_load takes ten times as long for its 1.5 MB.
            found = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(file.read_text(encoding="utf-8")).get_single_data()
            return {key: one for key, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}
    return {}


# ------------------------------------------------------------------------------------------- where there is none
TRAINED = 10_000_000  # tokens after which more make a better reconstruction but not a better selection
_RATE = 2000 * 119_000_000  # parameters of blocks times tokens/s: SmolLM2-135M in bfloat16 on two CPU cores


def how_to_train(model: str, lm_config: Any | None = None, *, pool: str | None = None, layer: int | None = None) -> str:
    """The command that trains an SAE, ready to be copied where the pool is known, and its likely hours."""
    words = ["neuronselect", "sae", "train", "--model", model, "--pool", pool or "YOUR_ROWS"]
    words += [] if layer is None else ["--layer", str(layer)]
    command = f"`{shlex.join([*words, '--tokens', '10e6', '--out', 'sae'])}`, then add `--sae sae`"
    on = f"{TRAINED / 1e6:.0f} million tokens on two CPU cores, at 2,000 tokens/s for 135 M parameters"
    if lm_config is None:
        return (
            f"train one: {command} (about {TRAINED * 1e9 / _RATE / 3600:.0f} hours for each billion parameters; {on})"
        )
    hours = TRAINED * block_parameters(lm_config) / _RATE / 3600
    return f"train one: {command} (about {max(hours, 0.1):.{1 if hours < 10 else 0}f} hours for {on})"
