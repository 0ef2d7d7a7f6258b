"""Cards of the folders this package writes, from the templates in ``model_cards/``.

Each card is a ``huggingface_hub.CardData``: its ``to_dict`` is the YAML head, ``render`` the whole README. The
package's part is between two comments; a user's text around it survives every rewrite.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import CardData, DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..core import bundled
from ..core.folders import DATA_FILE
from ..core.provenance import (
    Avoided,
    CapabilityRecord,
    ExtractionRecord,
    Provenance,
    SourceRecord,
    TargetRecord,
    TrainingRecord,
    aim,
)
from ..core.sae_record import SaeRecord
from ..core.sources import bundled_folder
from ..core.text import replaced
from ..core.writing import put
from .command import holds_target, own_target, select_command
from .markdown import BEGIN, END, README, cell, facts, fenced, merge_card, read_text

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _environment() -> Environment:
    inside = Path(__file__).parent.parent / "model_cards"  # in a wheel
    folder = inside if inside.is_dir() else Path(__file__).parents[2] / "model_cards"
    return Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined, keep_trailing_newline=True)


class CardTemplate(CardData):
    """A card: subclasses fill it; ``to_dict`` is its metadata, ``render`` the README."""

    template: ClassVar[str]

    def metadata(self) -> CardData:
        raise NotImplementedError

    def values(self) -> dict[str, Any]:
        """Variables of the template."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = _replaced(self.metadata().to_dict())
        return found

    def render(self) -> str:
        text = _environment().get_template(self.template).render(**self.values())
        return replaced(f"---\n{self.to_yaml()}\n---\n{BEGIN}\n{text.strip()}\n{END}\n")


def _replaced(value: Any) -> Any:
    """Metadata whose texts are as the card shows them."""
    if isinstance(value, dict):
        return {key: _replaced(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_replaced(one) for one in value]
    return replaced(value) if isinstance(value, str) else value


def write_card(folder: Path, card: CardTemplate, before: Path | None = None) -> None:
    """Write ``README.md`` of a folder; the user's own text in the one that is there is kept.

    Args:
        before: the folder with the earlier README, if it is another one.
    """
    path = (before or folder) / README
    text = card.render()
    put(folder / README, merge_card(read_text(path), text) if path.exists() else text)


# ------------------------------------------------------------------------------------------- shared parts
def source_name(source: SourceRecord | None) -> str:
    """The id of a source; what the package brings by a name instead of its folder's; "" of an unknown one."""
    if source is None or not (source.id or source.commit):
        return ""
    folder = bundled_folder(source.commit) if source.commit else None
    if folder is None:
        return str(source.id)
    own = folder in (bundled.MODEL, *bundled.SAE.iterdir())
    return "bundled" if own else f"{folder.parent.name} (in the package)"


def _pinned(source: SourceRecord | None) -> str:
    """``id at commit``."""
    name = source_name(source)
    return f"{name} at {source.commit}" if name and source and source.commit else name


def _hub_id(source: SourceRecord | None) -> str | None:
    """The id, if it is one of the Hub."""
    return source.id if source and source.id and source.on_hub and HUB_ID.fullmatch(source.id) else None


def _extractor_facts(extractor: ExtractionRecord | None) -> dict[str, Any]:
    if extractor is None or extractor.options is None:
        return {}
    options = extractor.options
    usual = type(options)()
    unusual = {
        name.replace("_", " "): value
        for name, value in options.changed(moving=True).items()
        if name not in ("layer", "top_k_features", "pool_tokens", "max_length", "dtype", "chat_template")
        and value != getattr(usual, name)
    }
    return {
        "model": _pinned(extractor.model),
        "SAE": _pinned(extractor.sae),
        **{name.replace("_", " "): _pinned(source) for name, source in extractor.beside.items()},
        "layer (0-based)": options.layer,
        "K": "the SAE's own" if options.top_k_features is None and extractor.sae else options.top_k_features,
        "pooled tokens": options.pool_tokens,
        "max length": options.max_length,
        "dtype": options.dtype,
        **unusual,
        "chat template": "another than the tokenizer's, in the record" if options.chat_template else None,
    }


def _used(targets: Mapping[str, TargetRecord], avoided: Avoided | None) -> str:
    """How many exemplars of each target were used, and what is avoided."""
    return aim([f"{name}: {target.used}" for name, target in targets.items()], avoided)


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def selection_facts(made: Provenance) -> dict[str, Any]:
    """What a reader of a selection is told of its record, by names in words; some values may be empty."""
    pool = made.pool
    every = {**made.targets, **(made.avoided.targets if made.avoided else {})}
    return {
        "pool": pool.id or pool.fingerprint,
        "rows taken from": _pinned(pool.derived_from),
        "pool revision": pool.commit,
        "pool config and split": " ".join(filter(None, (pool.config, pool.split))),
        **{
            f"exemplars {name}": f"taken from {_pinned(target.source.derived_from)}"
            if target.source.derived_from
            else _pinned(target.source)
            for name, target in every.items()
            if target.source
        },
        **{
            f"exemplars of {name} found": f"{target.hit:.0%} score in the pool's best 5 % when not fitted on"
            for name, target in every.items()
            if target.hit is not None
        },
        "avoided": made.avoided
        and f"{', '.join(made.avoided.targets)}: the score for it is taken off, times "
        f"{made.avoided.weight:g}, in standard deviations of the pool",
        "capability": _pinned(made.capability),
        "budget": _listed(made.budget.given()).replace("=", " "),
        "ratio": made.auto and made.auto.line,
        "options": _listed(made.method.options),
        "aggregate": made.aggregate,
        **_extractor_facts(made.extractor),
        "left out": ", ".join(f"{count} {reason}" for reason, count in made.counts.left_out.items()),
        "truncated": made.counts.truncated,
        "tokens a row, pool": made.tokens.pool_mean,
        "tokens a row, selected": made.tokens.selected_mean,
        "packages": ", ".join(f"{name} {version}" for name, version in made.packages.items()),
    }


# ------------------------------------------------------------------------------------------------- cards
@dataclass(repr=False)
class SelectionCard(CardTemplate):
    """The dataset card of a selection folder.

    Args:
        provenance: ``selection.json``, with the files' checksums.
        examples: beginnings of the best rows' texts; empty for ``--no-examples``.
    """

    template: ClassVar[str] = "selection_card.md.jinja"
    provenance: Provenance
    examples: Sequence[str] = ()

    def metadata(self) -> CardData:
        pool, method = self.provenance.pool, self.provenance.method
        # `datasets` caches a local folder by its card's configs alone: without a hash of the rows in them, another
        # selection in a folder of the same name would get the first one's rows.
        content = (self.provenance.files or {}).get(DATA_FILE, "")
        source = _hub_id(pool)
        return DatasetCardData(
            license=pool.license,
            tags=["neuronselect", f"neuronselect-{method.name}"],
            source_datasets=[source] if source else None,
            configs=[
                {
                    "config_name": "default",
                    "description": f"selection {content}",
                    "data_files": [{"split": "train", "path": "data/*.parquet"}],
                    "default": True,
                },
                {
                    "config_name": "scores",
                    "description": f"every row's scores, {content}",
                    "data_files": [{"split": "train", "path": "scores.parquet"}],
                },
            ],
        )

    def values(self) -> dict[str, Any]:
        made = self.provenance
        command = select_command(made)
        return {
            "selected": made.counts.selected,
            "rows": made.counts.rows,
            "method": made.method.name,
            "paper": made.method.paper,
            "targets": cell(aim(made.targets, made.avoided)),
            "license": cell(made.pool.license or ""),
            "facts": facts(selection_facts(made)),
            "doubts": [cell(f"{of}: {doubt}") for of, doubt in made.doubts],
            "command": command.text,
            "own_target": own_target(made),
            "holds_target": holds_target(made) and any(what.startswith("exemplars") for what, _, _ in command.fill_in),
            "fill_in": [tuple(map(cell, one)) for one in command.fill_in],
            "examples": [fenced(text) for text in self.examples],
        }


@dataclass(repr=False)
class CapabilityCard(CardTemplate):
    """The card of a saved capability."""

    template: ClassVar[str] = "capability_card.md.jinja"
    record: CapabilityRecord

    def metadata(self) -> CardData:
        return ModelCardData(
            library_name="hf_neuronselect",
            tags=["neuronselect", "neuronselect-capability", f"neuronselect-{self.record.method.name}"],
            base_model=_hub_id(self.record.extractor.model),
        )

    def values(self) -> dict[str, Any]:
        made, extractor = self.record, self.record.extractor
        table = {
            "exemplars": _used(made.targets, made.avoided),
            "options": _listed(made.method.options),
            "signals": ", ".join(f"{name} {identity}" for name, identity in extractor.signals.items()),
            **_extractor_facts(extractor),
        }
        known = extractor.model is not None
        return {
            "method": made.method.name,
            "targets": cell(aim(made.targets, made.avoided)),
            "facts": facts(table),
            "knows_model": known,
            "local": [
                (option, cell(source.id or ""))
                for option, source in {"model": extractor.model, "sae": extractor.sae, **extractor.beside}.items()
                if source and not source.on_hub and not bundled_folder(source.commit)
            ],
        }


@dataclass(repr=False)
class LibraryCard(CardTemplate):
    """The card of a feature library; ``entries``: name -> capability."""

    template: ClassVar[str] = "library_card.md.jinja"
    entries: Mapping[str, CapabilityRecord]

    def metadata(self) -> CardData:
        models = sorted({found for entry in self.entries.values() if (found := _hub_id(entry.extractor.model))})
        methods = sorted({entry.method.name for entry in self.entries.values()})
        return ModelCardData(
            library_name="hf_neuronselect",
            tags=["neuronselect", "neuronselect-library", *(f"neuronselect-{method}" for method in methods)],
            base_model=models or None,
        )

    def values(self) -> dict[str, Any]:
        rows = []
        for name, entry in sorted(self.entries.items()):
            made = entry.extractor
            identities = ", ".join(dict.fromkeys(made.signals.values()))
            used = _used(entry.targets, entry.avoided)
            line = [name, entry.method.name, used, _pinned(made.model), _pinned(made.sae), identities]
            rows.append([cell(value) for value in line])
        return {"rows": rows, "first": rows[0][0] if rows else "name"}


@dataclass(repr=False)
class SaeCard(CardTemplate):
    """The card of a folder of SAEs trained here; ``records``: folder -> record."""

    template: ClassVar[str] = "sae_card.md.jinja"
    records: Mapping[str, SaeRecord]

    def metadata(self) -> CardData:
        models = sorted({made.model for made in self.records.values() if made.model})
        licences = {made.license for made in self.records.values()}
        return ModelCardData(
            library_name="sparsify",
            base_model=[name for name in models if HUB_ID.fullmatch(name)] or None,
            license=licences.pop() if len(licences) == 1 else None,
            tags=["neuronselect", "sparse-autoencoder"],
        )

    def values(self) -> dict[str, Any]:
        saes = []
        for folder, made in sorted(self.records.items()):
            loss = made.loss is not None and made.loss_with_sae is not None and made.loss_without is not None
            table = {
                "model": f"{made.model or 'not said'}{f' at {made.commit}' if made.commit else ''}",
                "reads the output of block": made.layer,
                "latents": f"{made.latents:,}",
                "latents a token keeps": made.l0 and f"{made.l0:.1f}",
                "fraction of variance unexplained": f"{made.fvu:.4f} on {made.tokens:,} held-out tokens",
                "dead latents": f"{100 * made.dead:.1f} %",
                "loss of the model": loss
                and f"{made.loss:.3f}, {made.loss_with_sae:.3f} with the block's output replaced "
                f"by the reconstruction, {made.loss_without:.3f} by zeros",
                "trained on": _listed({name: made.training[name] for name in _TRAINING if name in made.training}),
            }
            saes.append((cell(folder), cell(made.verdict), facts(table)))
        return {"saes": saes}


_TRAINING = ("tokens", "distinct_tokens", "rows", "batch", "lr", "seed", "context", "dtype")


@dataclass(repr=False)
class AdapterCard(CardTemplate):
    """The card of a LoRA adapter."""

    template: ClassVar[str] = "adapter_card.md.jinja"
    record: TrainingRecord

    def metadata(self) -> CardData:
        made = self.record
        rows = made.selection and (made.selection.repo_id or made.selection.pool.id)
        return ModelCardData(
            library_name="peft",
            base_model=_hub_id(made.base_model),
            datasets=[rows] if rows and HUB_ID.fullmatch(rows) else None,
            tags=["neuronselect", "lora", "sft", "trl"],
            pipeline_tag="text-generation",
            model_name=made.name,
            eval_results=[
                EvalResult(
                    task_type="text-generation",
                    dataset_type=re.sub(r"[^\w.-]", "-", row.data),
                    dataset_name=row.data,
                    metric_type=re.sub(r"[^\w.-]", "_", row.metric),
                    metric_name=row.metric,
                    metric_value=row.value,
                )
                for row in made.evaluation
                if row.model == made.name
            ]
            or None,
        )

    def values(self) -> dict[str, Any]:
        made, rows = self.record, self.record.selection
        pool = rows.pool if rows else None
        named = {
            "rows": "rows trained on",
            "truncated": "of them cut at max_length or the model's last position",
            "steps": "steps",
            "tokens": "tokens of these rows",
            "answer_tokens": "of them answers",
            "seconds": "seconds",
        }
        ends = made.losses[:1] + made.losses[-1:]
        table = {
            "base model": _pinned(made.base_model),
            "rows": rows and (rows.repo_id or (f"selected from {_pinned(pool)}" if _pinned(pool) else None)),
            "selection method": rows and rows.method and rows.method.name,
            "targets": rows and aim(rows.targets or (), rows.avoided),
            **{text: made.results[name] for name, text in named.items() if made.results.get(name)},
            "first and last training loss": " to ".join(f"{loss:.3f}" for _, loss in ends),
            **made.hyperparameters,
            "packages": ", ".join(f"{name} {version}" for name, version in made.packages.items()),
        }
        measured = sorted({(row.data, row.metric) for row in made.evaluation})
        found = {(row.model, row.data, row.metric): row.value for row in made.evaluation}
        models = dict.fromkeys(row.model for row in made.evaluation)
        return {
            "name": cell(made.name),
            "facts": facts(table),
            "header": [cell(f"{data}: {metric}") for data, metric in measured],
            "table": [
                [cell(model), *(f"{found[model, *what]:.4f}" if (model, *what) in found else "" for what in measured)]
                for model in models
            ],
            "license": cell((pool and pool.license) or ""),
            "base_is_local": _hub_id(made.base_model) is None,
        }
