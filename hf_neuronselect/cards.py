"""Cards of what the package writes, from the templates in ``model_cards/``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, DatasetCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined


def _environment() -> Environment:
    inside = Path(__file__).parent / "model_cards"  # in a wheel
    folder = inside if inside.is_dir() else Path(__file__).parent.parent / "model_cards"
    return Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined, keep_trailing_newline=True)


def cell(value: Any) -> str:
    """A value that cannot break a Markdown table or start markup."""
    text = " ".join(str(value).split())
    for old, new in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'"), ("[", "\\["), ("*", "\\*")):
        text = text.replace(old, new)
    return text


def _facts(pairs: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, cell(value)) for name, value in pairs.items() if value not in (None, "", {}, [])]


def _extractor_facts(extractor: Mapping[str, Any] | None) -> dict[str, Any]:
    if not extractor:
        return {}
    model, sae, options = extractor["model"], extractor["sae"], extractor["options"]
    return {
        "model": f"{model.get('id', 'local')} at {model['commit']}",
        "SAE": None if sae is None else f"{sae.get('id', 'local')} at {sae['commit']}",
        "layer (0-based)": options["layer"],
        "K": options["top_k"] if options["top_k"] is not None else "the SAE's own",
        "pooled tokens": extractor["pool_tokens"],
        "max length": extractor["max_length"],
        "dtype": extractor["dtype"],
    }


def selection_card(provenance: Mapping[str, Any], content: str) -> str:
    """The dataset card of a selection folder: only ``data/`` is in its configs.

    Args:
        content: a hash of the data. ``datasets`` caches a local folder by its card's configs alone: without it,
            another selection in a folder of the same name would be answered with the first one's rows.
    """
    data = DatasetCardData(
        tags=["neuronselect", f"neuronselect-{provenance['method']['name']}"],
        configs=[
            {
                "config_name": "default",
                "description": f"selection {content}",
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            }
        ],
    )
    counts, tokens = provenance["counts"], provenance["tokens"]
    method = {k: v for k, v in provenance["method"].items() if k not in ("name", "paper")}
    out = {name: counts[name] for name in ("empty", "error", "duplicate", "leak", "null") if counts[name]}
    facts = {
        "pool": provenance.get("pool", {}).get("id") or provenance.get("pool", {}).get("fingerprint"),
        "pool revision": provenance.get("pool", {}).get("commit"),
        "budget": ", ".join(f"{k} {v}" for k, v in provenance["budget"].items()),
        "options": ", ".join(f"{k}={v}" for k, v in method.items()),
        "aggregate": provenance["aggregate"],
        **_extractor_facts(provenance["extractor"]),
        "left out": ", ".join(f"{v} {k}" for k, v in out.items()),
        "truncated": counts["truncated"],
        "tokens a row, pool": tokens["pool_mean"],
        "tokens a row, selected": tokens["selected_mean"],
    }
    needed = [name for name, what in provenance["targets"].items() if what]
    return _environment().get_template("selection_card.md.jinja").render(
        card_data=data.to_yaml(),
        selected=counts["selected"],
        rows=counts["rows"],
        method=provenance["method"]["name"],
        paper=provenance["method"]["paper"],
        targets=", ".join(needed),
        facts=_facts(facts),
    )  # fmt: skip


def capability_card(config: Mapping[str, Any]) -> str:
    """The card of a saved capability."""
    data = CardData(tags=["neuronselect", "neuronselect-capability"], library_name="hf_neuronselect")
    facts = {
        "exemplars": ", ".join(f"{name}: {what.get('used', '?')}" for name, what in config["targets"].items()),
        "options": ", ".join(f"{k}={v}" for k, v in config["params"].items()),
        "extractor hash": config["extractor_hash"],
        **_extractor_facts(config["extractor"]),
    }
    return _environment().get_template("capability_card.md.jinja").render(
        card_data=data.to_yaml(),
        method=config["method"],
        paper="",
        targets=", ".join(config["targets"]),
        facts=_facts(facts),
    )  # fmt: skip
