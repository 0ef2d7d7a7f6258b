"""Cards of what the package writes, from the templates in ``model_cards/``.

Each card is a ``huggingface_hub.CardData``: its ``to_dict`` is the YAML head, ``render`` the whole README. What the
package wrote stands between two comments, so that a README's own text outlives every rewrite.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from huggingface_hub import CardData, DatasetCardData, EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..core import bundled
from ..core.errors import NeuronSelectError
from ..core.sources import content_hash
from ..rows.load import spec_of

PLACE = "path/or/id/of/this"  # in a card until it is pushed; then the repository's id
BEGIN, END = "<!-- neuronselect: begin -->", "<!-- neuronselect: end -->"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A user's own word on these is kept when a card is written again.
_USERS_OWN = ("license", "license_name", "license_link", "language", "pretty_name", "extra_gated_prompt")

# What the package says of one selection or adapter, and of no other.
_PACKAGES_OWN = ("configs", "source_datasets", "datasets", "base_model", "model_name", "model-index", "library_name",
                 "pipeline_tag")  # fmt: skip


def _environment() -> Environment:
    inside = Path(__file__).parent.parent / "model_cards"  # in a wheel
    folder = inside if inside.is_dir() else Path(__file__).parents[2] / "model_cards"
    return Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined, keep_trailing_newline=True)


# ------------------------------------------------------------------------------- text made harmless
def cell(value: Any) -> str:
    """A value that cannot break a Markdown table or start markup."""
    text = "".join(c for c in " ".join(str(value).split()) if c.isprintable())
    for old, new in (
        ("\\", "\\\\"),
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "\\|"),
        ("`", "'"),
        ("[", "\\["),
        ("*", "\\*"),
    ):
        text = text.replace(old, new)
    return text


def fenced(text: str, lines: int = 8, width: int = 200) -> str:
    """The first lines of a text in a fence that no text can close, comments broken."""
    kept = text.splitlines()[:lines]
    shown = "\n".join(line if len(line) <= width else line[:width] + " …" for line in kept)
    if len(text.splitlines()) > lines:
        shown += "\n…"
    shown = "".join(c for c in shown if c.isprintable() or c in "\n\t").replace("<!--", "<! --")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


def _facts(pairs: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, cell(value)) for name, value in pairs.items() if value not in (None, "", {}, [])]


# ------------------------------------------------------------------------------------ own text kept
def _head_and_body(text: str) -> tuple[dict[str, Any], str]:
    match = re.match(r"\A---\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, text
    try:
        head = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as cause:
        raise NeuronSelectError(
            f"its YAML head cannot be read ({' '.join(str(cause).split())[:120]}); mend it or remove it",
            option="README.md",
        ) from cause
    return (head if isinstance(head, dict) else {}), text[match.end() :]


def read_text(path: Path) -> str:
    """A README.

    Raises:
        NeuronSelectError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        raise NeuronSelectError("is not UTF-8 text; save it again as UTF-8, or remove it", option="README.md",
                                value=path.name) from cause  # fmt: skip


def merge_card(existing: str, new: str) -> str:
    """A card written again: the package's part and metadata are new, the rest stays.

    Args:
        existing: a README that may have a text, tags, a licence of its own. new: a card of this module.

    Raises:
        NeuronSelectError: the existing YAML head cannot be read.
    """
    if BEGIN not in new:  # not a card of this module (a metric's README): it says all there is
        return new
    old_head, old_body = _head_and_body(existing)
    new_head, new_body = _head_and_body(new)
    before, begin, rest = old_body.partition(BEGIN)
    written, end, after = rest.partition(END)
    if begin and end:  # what the package said last time is not the user's
        old_head = _users_metadata(old_head, written)
    head = new_head | {name: old_head[name] for name in _USERS_OWN if old_head.get(name)}
    head |= {name: value for name, value in old_head.items() if name not in head}
    if tags := list(dict.fromkeys([*_as_list(new_head.get("tags")), *_as_list(old_head.get("tags"))])):
        head["tags"] = tags
    ours = new_body[new_body.index(BEGIN) : new_body.index(END) + len(END)]
    if not (before.strip() or after.strip()):  # no own text there: the new card's own, if it has any
        body = new_body
    elif begin and end:
        body = before + ours + after
    else:
        body = f"{old_body.rstrip()}\n\n{ours}\n"
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n{body}"


def _users_metadata(head: Mapping[str, Any], written: str) -> dict[str, Any]:
    """The head without what the package wrote beside the text ``written``."""
    kept = {name: value for name, value in head.items() if name not in _PACKAGES_OWN}
    if f"states `{cell(head.get('license') or '')}`" in written:
        kept.pop("license", None)
    kept["tags"] = [tag for tag in _as_list(head.get("tags")) if not str(tag).startswith("neuronselect")]
    return {name: value for name, value in kept.items() if value}


def write_card(folder: Path, card: CardTemplate) -> None:
    """``README.md`` of a folder; a text of its own in the one that is there is kept."""
    path = folder / "README.md"
    text = card.render()
    path.write_text(merge_card(read_text(path), text) if path.exists() else text, encoding="utf-8")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


# -------------------------------------------------------------------------------------------- cards
class CardTemplate(CardData):
    """A card: data classes below fill it; ``to_dict`` is its metadata, ``render`` the README."""

    template: ClassVar[str]

    def metadata(self) -> CardData:
        raise NotImplementedError

    def values(self) -> dict[str, Any]:
        """What the template is filled with."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return dict(self.metadata().to_dict())

    def render(self) -> str:
        text = _environment().get_template(self.template).render(**self.values())
        return f"---\n{self.to_yaml()}\n---\n{BEGIN}\n{text.strip()}\n{END}\n"


def _extractor_facts(extractor: Mapping[str, Any] | None) -> dict[str, Any]:
    if not extractor:
        return {}
    model, sae, options = extractor["model"], extractor["sae"], extractor["options"]
    return {
        "model": _pinned(model),
        "SAE": None if sae is None else _pinned(sae),
        "layer (0-based)": options["layer"],
        "K": options["top_k_features"] if options["top_k_features"] is not None else "the SAE's own",
        "pooled tokens": extractor["options"]["pool_tokens"],
        "max length": extractor["options"]["max_length"],
        "dtype": extractor["options"]["dtype"],
    }


def _pinned(source: Mapping[str, Any]) -> str:
    """``id at commit``; what is bundled goes by that name, not by its folder's."""
    own = {f"content:{content_hash(path)}" for path in (bundled.MODEL, bundled.SAE / "layers.3")}
    return f"{'bundled' if source['commit'] in own else source['id']} at {source['commit']}"


def _option(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def select_command(provenance: Mapping[str, Any]) -> list[str]:
    """The ``neuronselect select`` words that make a selection again; local files by their names."""
    words = ["neuronselect", "select", "--pool", spec_of(provenance.get("pool") or {})]
    method = provenance["method"]
    known = provenance.get("target_rows") or {}
    if capability := provenance.get("capability"):
        inside = f":{capability['name']}" if capability.get("name") else ""
        words += ["--target", f"capability:{spec_of(capability)}{inside}"]
    else:
        words += [
            word
            for name, exemplars in provenance["targets"].items()
            if exemplars or name in known
            for word in ("--target", f"{name}={spec_of(known.get(name, {}))}")
        ]
    words += ["--method", method["name"]]
    for name, value in method.items():
        if name not in ("name", "paper") and value is not None:
            words += ["--method-option", f"{name}={_option(value)}"]
    extractor = provenance.get("extractor")
    if extractor:
        if extractor["model"]["commit"] != f"content:{content_hash(bundled.MODEL)}":
            for option, flag, source in (("--model", "--revision", extractor["model"]),
                                         ("--sae", "--sae-revision", extractor["sae"])):  # fmt: skip
                words += [option, source["id"]] if source else []
                words += [flag, source["commit"]] if source and ":" not in source["commit"] else []
        options = extractor["options"]
        words += ["--layer", str(options["layer"]), "--pool-tokens", extractor["options"]["pool_tokens"]]
        words += [] if options["top_k_features"] is None else ["--top-k-features", str(options["top_k_features"])]
        words += ["--max-length", str(extractor["options"]["max_length"]), "--dtype", extractor["options"]["dtype"]]
        words += ["--quantize", extractor["options"]["quantize"]] if extractor["options"]["quantize"] else []
    for name, value in provenance["budget"].items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    if provenance["aggregate"]:
        words += ["--aggregate", provenance["aggregate"]]
    for name, value in (provenance["weights"] or {}).items():
        words += ["--weight", f"{name}={value}"]
    for what in ("duplicate", "leak"):
        words += [] if what in provenance["exclude"] else ["--keep", what]
    return [*words, "--out", "selected"]


def _shell(words: Sequence[str]) -> str:
    """One option a line; no word closes the fence or the comment that it stands in (a shell joins ``'a''b'``)."""
    quoted = {word: shlex.quote(word).replace("<!--", "<!''--").replace("```", "``''`") for word in words}
    return "".join((" \\\n    " if word.startswith("--") else " ") + quoted[word] for word in words).strip()


@dataclass(repr=False)
class SelectionCard(CardTemplate):
    """The dataset card of a selection folder.

    Args:
        provenance: ``selection.json``.
        content: a hash of the data. ``datasets`` caches a local folder by its card's configs alone: without it,
            another selection in a folder of the same name would be answered with the first one's rows.
        examples: beginnings of the best rows' texts; empty for ``--no-examples``.
    """

    template: ClassVar[str] = "selection_card.md.jinja"
    provenance: Mapping[str, Any]
    content: str
    examples: Sequence[str] = ()

    def metadata(self) -> CardData:
        pool = self.provenance.get("pool") or {}
        source = pool.get("id", "")
        return DatasetCardData(
            license=pool.get("license"),
            tags=["neuronselect", f"neuronselect-{self.provenance['method']['name']}"],
            source_datasets=[source] if _HUB_ID.fullmatch(source) and "commit" in pool else None,
            configs=[
                {
                    "config_name": "default",
                    "description": f"selection {self.content}",
                    "data_files": [{"split": "train", "path": "data/*.parquet"}],
                    "default": True,
                },
                {
                    "config_name": "scores",
                    "description": f"every row's scores, {self.content}",
                    "data_files": [{"split": "train", "path": "scores.parquet"}],
                },
            ],
        )

    def values(self) -> dict[str, Any]:
        made = self.provenance
        counts, tokens, pool = made["counts"], made["tokens"], made.get("pool") or {}
        method = {k: v for k, v in made["method"].items() if k not in ("name", "paper")}
        out = {name: counts[name] for name in ("empty", "error", "duplicate", "leak", "null") if counts[name]}
        facts = {
            "pool": pool.get("id") or pool.get("fingerprint"),
            "rows taken from": _pinned(pool["derived_from"]) if pool.get("derived_from") else None,
            "pool revision": pool.get("commit"),
            "pool config and split": " ".join(filter(None, (pool.get("config"), pool.get("split")))),
            **{
                f"exemplars {name}": f"taken from {_pinned(about['derived_from'])}"
                if "derived_from" in about
                else _pinned(about)
                for name, about in (made.get("target_rows") or {}).items()
            },
            "budget": ", ".join(f"{k} {v}" for k, v in made["budget"].items()),
            "options": ", ".join(f"{k}={v}" for k, v in method.items()),
            "aggregate": made["aggregate"],
            **_extractor_facts(made["extractor"]),
            "left out": ", ".join(f"{v} {k}" for k, v in out.items()),
            "truncated": counts["truncated"],
            "tokens a row, pool": tokens["pool_mean"],
            "tokens a row, selected": tokens["selected_mean"],
            "packages": ", ".join(f"{k} {v}" for k, v in made["packages"].items()),
        }
        return {
            "selected": counts["selected"],
            "rows": counts["rows"],
            "method": made["method"]["name"],
            "paper": made["method"]["paper"],
            "targets": cell(", ".join(name for name, what in made["targets"].items() if what)),
            "license": cell(pool.get("license") or ""),
            "facts": _facts(facts),
            "command": _shell(select_command(made)),
            "examples": [fenced(text) for text in self.examples],
        }


@dataclass(repr=False)
class CapabilityCard(CardTemplate):
    """The card of a saved capability; ``config`` is its ``config.json``."""

    template: ClassVar[str] = "capability_card.md.jinja"
    config: Mapping[str, Any]

    def metadata(self) -> CardData:
        return ModelCardData(
            library_name="hf_neuronselect",
            tags=["neuronselect", "neuronselect-capability", f"neuronselect-{self.config['method']}"],
            base_model=_base_model(self.config["extractor"]),
        )

    def values(self) -> dict[str, Any]:
        config = self.config
        facts = {
            "exemplars": ", ".join(f"{name}: {what.get('used', '?')}" for name, what in config["targets"].items()),
            "options": ", ".join(f"{k}={v}" for k, v in config["params"].items()),
            "extractor hash": str(config["signals"]),
            **_extractor_facts(config["extractor"]),
        }
        return {"method": config["method"], "targets": cell(", ".join(config["targets"])), "facts": _facts(facts)}


@dataclass(repr=False)
class LibraryCard(CardTemplate):
    """The card of a feature library; ``entries``: name -> its line in ``library.json``."""

    template: ClassVar[str] = "library_card.md.jinja"
    entries: Mapping[str, Mapping[str, Any]]

    def metadata(self) -> CardData:
        models = sorted({found for e in self.entries.values() if (found := _base_model(e["extractor"]))})
        methods = sorted({entry["method"] for entry in self.entries.values()})
        return ModelCardData(
            library_name="hf_neuronselect",
            tags=["neuronselect", "neuronselect-library", *(f"neuronselect-{method}" for method in methods)],
            base_model=models or None,
        )

    def values(self) -> dict[str, Any]:
        rows = []
        for name, entry in sorted(self.entries.items()):
            extractor = entry["extractor"] or {}
            model, sae = extractor.get("model") or {}, extractor.get("sae") or {}
            used = ", ".join(f"{target} {what.get('used', '?')}" for target, what in entry["targets"].items())
            about = [name, entry["method"], used, _short(model), _short(sae), str(entry["signals"])]
            rows.append([cell(value) for value in about])
        return {"rows": rows, "first": rows[0][0] if rows else "name"}


@dataclass(repr=False)
class SaeCard(CardTemplate):
    """The card of an SAE trained here; ``record`` is its ``training.json``, measured on held-out rows."""

    template: ClassVar[str] = "sae_card.md.jinja"
    model: str
    folder: str
    record: Mapping[str, Any]

    def metadata(self) -> CardData:
        base = self.model if _HUB_ID.fullmatch(self.model) else None
        return ModelCardData(library_name="sparsify", base_model=base, tags=["neuronselect", "sparse-autoencoder"])

    def values(self) -> dict[str, Any]:
        record = self.record
        facts = {
            "latents": record["latents"],
            "latents a token keeps": f"{record['l0']:.1f}",
            "fraction of variance unexplained": f"{record['fvu']:.4f} on {record['tokens']:,} held-out tokens",
            "dead latents on those tokens": f"{record['dead']} of {record['latents']}",
            "norm of the first token, against the others": f"{record['first_token_norm_ratio']:.2f}",
        }
        return {"model": cell(self.model), "folder": cell(self.folder), "facts": _facts(facts)}


@dataclass(repr=False)
class AdapterCard(CardTemplate):
    """The card of a LoRA adapter, filled while it is trained (``training.callback``) and evaluated.

    Attributes:
        base_model: ``{"id", "commit"}``. selection: what was trained on, its ``selection.json`` and, once
            pushed, its ``repo_id``. hyperparameters: what was given. results: ``training.json``'s numbers.
        evaluation: rows of the table: ``{"model", "data", "metric", "value"}``.
    """

    template: ClassVar[str] = "adapter_card.md.jinja"
    name: str
    base_model: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    packages: dict[str, str] = field(default_factory=dict)

    def metadata(self) -> CardData:
        base = str(self.base_model.get("id", ""))
        dataset = self.selection.get("repo_id") or (self.selection.get("pool") or {}).get("id", "")
        return ModelCardData(
            library_name="peft",
            base_model=base if _HUB_ID.fullmatch(base) else None,
            datasets=[dataset] if _HUB_ID.fullmatch(dataset) else None,
            tags=["neuronselect", "lora", "sft", "trl"],
            pipeline_tag="text-generation",
            model_name=self.name,
            eval_results=[
                EvalResult(
                    task_type="text-generation",
                    dataset_type=re.sub(r"[^\w.-]", "-", row["data"]),
                    dataset_name=row["data"],
                    metric_type=re.sub(r"[^\w.-]", "_", row["metric"]),
                    metric_name=row["metric"],
                    metric_value=row["value"],
                )
                for row in self.evaluation
                if row["model"] == self.name
            ]
            or None,
        )

    def values(self) -> dict[str, Any]:
        made = self.selection
        pool = made.get("pool") or {}
        method = (made.get("method") or {}).get("name")
        facts = {
            "base model": _short(self.base_model),
            "rows": made.get("repo_id") or (f"selected from {_short(pool)}" if pool else None),
            "selection method": method,
            "targets": ", ".join(made.get("targets") or {}),
            "rows trained on": self.results.get("rows"),
            "steps": self.results.get("steps"),
            "tokens of these rows": self.results.get("tokens"),
            "of them answers": self.results.get("answer_tokens"),
            "seconds": self.results.get("seconds"),
            "first and last training loss": " to ".join(f"{loss:.3f}" for _, loss in (self.losses[:1] + self.losses[-1:])),
            **self.hyperparameters,
            "packages": ", ".join(f"{k} {v}" for k, v in self.packages.items()),
        }  # fmt: skip
        measured = sorted({(row["data"], row["metric"]) for row in self.evaluation})
        models = list(dict.fromkeys(row["model"] for row in self.evaluation))
        found = {(row["model"], row["data"], row["metric"]): row["value"] for row in self.evaluation}
        table = [
            [cell(model), *(f"{found[model, *what]:.4f}" if (model, *what) in found else "" for what in measured)]
            for model in models
        ]
        return {
            "name": cell(self.name),
            "facts": _facts(facts),
            "header": [cell(f"{data}: {metric}") for data, metric in measured],
            "table": table,
            "license": cell(pool.get("license") or ""),
            "base_is_local": not _HUB_ID.fullmatch(str(self.base_model.get("id", ""))),
        }


def _short(source: Mapping[str, Any]) -> str:
    if not source:
        return ""
    return _pinned(source)[:120] if source.get("commit") else str(source.get("id"))


def _base_model(extractor: Mapping[str, Any] | None) -> str | None:
    found = ((extractor or {}).get("model") or {}).get("id", "")
    return found if _HUB_ID.fullmatch(found) else None
