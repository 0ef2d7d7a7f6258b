"""The command ``neuronselect``: parse, call, say. The work is done elsewhere."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import transformers
import typer
import yaml
from datasets import Dataset

from ..core import bundled as paths
from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.folders import SELECTION_RECORD, check_free
from ..core.provenance import Counts, EvaluationRecord, SourceRecord
from ..hub.push import check_write_access, push_folder
from ..methods import METHODS, Method, make_method
from ..models.sae_formats import find_folder, load_sae
from ..pipelines import bundled
from ..rows.load import Rows, load_again, load_rows
from ..selection import NeuronSelector, Selection
from ..selection.library import load_capability
from ..selection.selector import TARGET_NAME
from ..signals.extractor import NeuronFeatureExtractor
from ..signals.forward import FEATURES, Directions, merge_directions
from ..store.store import FeatureStore, write_store

app = typer.Typer(
    help="Select the instruction data that makes a model better at a task, by the model's own neurons.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
sae_app = typer.Typer(help="Train or look at a sparse autoencoder.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(sae_app, name="sae")

PoolTokens = Literal["all", "no_special", "assistant", "user"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ValueDtype = Literal["float16", "float32"]
Quantize = Literal["4bit", "8bit"]
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"]
Trainer = Literal["trl", "axolotl", "llamafactory", "unsloth"]
Engine = Literal["local", "ray"]
Aggregate = Literal["quota", "round_robin", "mean", "max", "weighted"]


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Values of the recipe's section for this command become its defaults; flags win."""
    if path is None:
        return None
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as cause:
        raise NeuronSelectError(
            f"cannot be read: {' '.join(str(cause).split())[:200]}", option="config", value=path.name
        ) from cause
    command = str(context.info_name)
    section = recipe.get(command, recipe) if isinstance(recipe, dict) else None
    if not isinstance(section, dict):
        raise NeuronSelectError(
            f"needs a section {command}: with option: value lines", option="config", value=path.name
        )
    values = {str(key).replace("-", "_"): value for key, value in section.items()}
    # {name: rows} is what [name=rows] says.
    values = {
        key: [f"{name}={rows}" for name, rows in value.items()] if isinstance(value, dict) else value
        for key, value in values.items()
    }
    known = {parameter.name for parameter in context.command.params}
    for key in values:
        if key not in known:
            raise NeuronSelectError(f"unknown option {key!r} in section {command}", option="config", value=path.name)
    context.default_map = {**(context.default_map or {}), **values}
    return path


# ------------------------------------------------------------------------------- options said once
Config = Annotated[
    Path | None,
    typer.Option("--config", is_eager=True, callback=_read_config, help="YAML recipe with a section of this command."),
]
Pool = Annotated[str, typer.Option(help="File, folder or Hub id org/name[@revision][:config[:split]].")]
Targets = Annotated[
    list[str] | None, typer.Option("--target", help="[NAME=]rows, or capability:FOLDER_OR_ID[:NAME]; repeatable.")
]
Model = Annotated[str | None, typer.Option(help="Causal LM: folder or Hub id. Without it the bundled model and SAE.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")]
Sae = Annotated[str | None, typer.Option(help="Sparse autoencoder: folder, org/repo or org/repo/folder.")]
SaeRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the SAE.")]
Layer = Annotated[int, typer.Option(help="0-based block; negative counts from the end.")]
TopK = Annotated[int | None, typer.Option("--top-k-features", help="Latents a token keeps; default the SAE's own.")]
Pooled = Annotated[PoolTokens, typer.Option("--pool-tokens", help="Tokens whose activations are averaged.")]
MaxLength = Annotated[int, typer.Option(help="Tokens kept of a row.")]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: the checkpoint's on a GPU, float32 on a CPU.")]
ValueDtypeOption = Annotated[ValueDtype, typer.Option(help="Of sparse features that are kept; dense ones are float32.")]
QuantizeOption = Annotated[Quantize | None, typer.Option(help="4bit or 8bit (needs bitsandbytes).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DeviceMapOption = Annotated[
    DeviceMap | None, typer.Option(help="Spread a model too large for one GPU over all of them.")
]
BatchTokens = Annotated[str, typer.Option(help="Padded tokens a batch, or auto.")]
Private = Annotated[bool | None, typer.Option("--private/--public", help="Of a repository that is created.")]
AllowPublic = Annotated[bool, typer.Option("--allow-public", help="Although the rows' source is private or gated.")]
NoExamples = Annotated[bool, typer.Option("--no-examples", help="Keep row text out of the card and the report.")]
RunFolder = Annotated[Path, typer.Option(help="Folder of the run; run again to go on.")]
MethodOption = Annotated[
    list[str] | None, typer.Option("--method-option", help="NAME=VALUE of the method; repeatable.")
]


def _extractor(
    features: tuple[str, ...], model: str | None, revision: str | None, sae: str | None, sae_revision: str | None,
    layer: int, top_k: int | None, pool_tokens: PoolTokens, max_length: int, dtype: Dtype,
    value_dtype: ValueDtype, quantize: Quantize | None, device: str, device_map: DeviceMap | None, batch_tokens: str,
) -> NeuronFeatureExtractor:  # fmt: skip
    if batch_tokens != "auto" and not batch_tokens.isdigit():
        raise NeuronSelectError("a number of tokens, or auto", option="batch_tokens", value=batch_tokens)
    options: dict[str, Any] = {
        "features": features,
        "layer": layer,
        "top_k_features": top_k,
        "pool_tokens": pool_tokens,
        "max_length": max_length,
        "dtype": dtype,
        "value_dtype": value_dtype,
        "quantize": quantize,
        "device": device,
        "device_map": device_map,
        "batch_tokens": batch_tokens if batch_tokens == "auto" else int(batch_tokens),
    }
    if model is None:
        if sae is not None:
            raise NeuronSelectError("belongs to a model: name it with --model", option="sae", value=sae)
        _say("No --model: using the bundled 9 M model and its SAE.")
        return bundled.extractor(**options)
    needs_sae = any(FEATURES[name].needs_sae for name in features)
    if needs_sae and sae is None:
        raise NeuronSelectError("this method needs --sae, a sparse autoencoder of the model's base", option="sae")
    return NeuronFeatureExtractor.from_pretrained(
        model, revision=revision, sae=sae, sae_revision=sae_revision, **options
    )


def _method_options(pairs: list[str] | None, name: str, seed: int) -> dict[str, Any]:
    """``metric=cosine`` -> ``{"metric": "cosine"}``, read as YAML scalars; --seed where the method has one."""
    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise NeuronSelectError("NAME=VALUE is needed", option="method_option", value=pair)
        options[key] = yaml.safe_load(value)
    if name == "random":
        options.setdefault("seed", seed)
    return options


def _targets(specs: list[str] | None) -> tuple[dict[str, Rows], NeuronSelector | None]:
    """``[NAME=]SPEC`` to named rows, or a saved capability."""
    found: dict[str, Rows] = {}
    capability = None
    for spec in specs or []:
        name, equals, rest = spec.partition("=")
        if not (equals and TARGET_NAME.fullmatch(name)):
            name, rest = Path(spec.split(":")[0].split("@")[0]).name.split(".")[0], spec
        if rest.startswith("capability:"):
            capability = load_capability(rest.removeprefix("capability:"))
            continue
        if not TARGET_NAME.fullmatch(name):
            raise NeuronSelectError("name it: --target NAME=… (letters, digits, _ and -)", option="target", value=spec)
        if name in found:
            raise NeuronSelectError("two targets of this name", option="target", value=name)
        found[name] = load_rows(rest, option="target")
    if capability is not None and found:
        raise NeuronSelectError("a capability stands alone; give no other --target", option="target")
    return found, capability


def _fitted(
    method: str, options: dict[str, Any], targets: dict[str, Rows], extractor: NeuronFeatureExtractor
) -> NeuronSelector:
    selector = NeuronSelector(method, **options)
    if selector.method.needs_target and not targets:
        raise NeuronSelectError(f"method {method} needs exemplars: --target NAME=rows", option="target")
    selector.extractor = extractor
    if targets:
        sources = {name: rows.source for name, rows in targets.items()}
        selector.fit({name: rows.data for name, rows in targets.items()}, extractor=extractor, sources=sources)
    return selector


def _features_of(method: Method) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*method.features, *(method.fit_features or ())]))


def _directions(specs: Sequence[str], extractor: NeuronFeatureExtractor) -> Directions:
    """What candidates are projected on: the directions of saved capabilities, all of one kind."""
    found: list[Directions] = []
    for spec in specs:
        selector = load_capability(spec.removeprefix("capability:"))
        directions = selector.directions()
        if directions is None:
            raise NeuronSelectError(
                f"is of method {selector.method.name}, which has no directions; extract with --method "
                f"{selector.method.name}", option="capability", value=spec,
            )  # fmt: skip
        if selector.extractor_hash != extractor.hash:
            raise NeuronSelectError(
                f"comes from extractor {selector.extractor_hash}, the options here make {extractor.hash}: model, layer, "
                "template and tokens must be the same", option="capability", value=spec,
            )  # fmt: skip
        found.append(directions)
    return merge_directions(found)


def _report_counts(counts: Counts) -> None:
    out = counts.left_out | ({"truncated": counts.truncated} if counts.truncated else {})
    if out:
        _say("Left out or noted: " + ", ".join(f"{value} {name}" for name, value in out.items()))
    for reason in counts.reasons:
        _say(f"  {reason}")


# ---------------------------------------------------------------------------------------- commands
@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for selections, picture and report.")] = Path("neuronselect-demo"),
) -> None:
    """The whole main job on the bundled model, SAE and data, offline."""
    from ..pipelines.demo import run_demo

    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "report.html").exists())):
        raise NeuronSelectError("exists and is not a demo folder; name another", option="out", value=out.name)
    out.mkdir(parents=True, exist_ok=True)
    run_demo(out, typer.echo)


@app.command()
def select(
    out: Annotated[Path, typer.Option(help="Selection folder to write.")],
    pool: Pool,
    config: Config = None,
    target: Targets = None,
    method: Annotated[str, typer.Option(help="mona, nait, polysemantic, hidden, random, longest, ...")] = "mona",
    method_option: MethodOption = None,
    model: Model = None,
    revision: Revision = None,
    sae: Sae = None,
    sae_revision: SaeRevision = None,
    layer: Layer = -2,
    top_k_features: TopK = None,
    pool_tokens: Pooled = "all",
    max_length: MaxLength = 2048,
    dtype: DtypeOption = "auto",
    value_dtype: ValueDtypeOption = "float16",
    quantize: QuantizeOption = None,
    device: Device = "auto",
    device_map: DeviceMapOption = None,
    batch_tokens: BatchTokens = "auto",
    ratio: Annotated[float | None, typer.Option(help="Share of the pool kept, in (0, 1].")] = None,
    k: Annotated[int | None, typer.Option(help="Rows kept.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Keep rows scoring at least this.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Keep the best rows that fit into so many tokens.")] = None,
    aggregate: Annotated[Aggregate, typer.Option(help="How several targets share the budget.")] = "quota",
    weight: Annotated[list[str] | None, typer.Option(help="NAME=NUMBER for --aggregate weighted; repeatable.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Keep what is left out otherwise: duplicate, leak.")] = None,
    seed: Annotated[int, typer.Option(help="Of method random.")] = 0,
    features: Annotated[Path | None, typer.Option(help="Feature store of this pool: no forward pass over it.")] = None,
    streaming: Annotated[bool, typer.Option(help="Read the pool as a stream; memory is O(selected).")] = False,
    no_messages: Annotated[bool, typer.Option("--no-messages", help="Add no messages column.")] = False,
    no_examples: NoExamples = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Dataset repository to push the selection to.")] = None,
    private: Private = None,
    allow_public: AllowPublic = False,
) -> None:
    """Pool and targets to a selection folder."""
    if push_to_hub is not None:
        check_write_access()
    options = _method_options(method_option, method, seed)
    chosen = make_method(method, options)
    check_free(out, SELECTION_RECORD, "a selection folder")
    rows = load_rows(pool, streaming=streaming)
    named, capability = _targets(target)
    given: dict[str, Any] = {
        "model": model, "revision": revision, "sae": sae, "sae_revision": sae_revision, "top_k_features": top_k_features,
        "quantize": quantize, "device": device, "device_map": device_map, "batch_tokens": batch_tokens,
        **{name: value for name, value, usual in (("layer", layer, -2), ("pool_tokens", pool_tokens, "all"),
                                                  ("max_length", max_length, 2048), ("dtype", dtype, "auto"),
                                                  ("value_dtype", value_dtype, "float16")) if value != usual},
    }  # fmt: skip
    if capability is not None:
        selector = capability
        if capability.method.name != method:
            raise NeuronSelectError(
                f"the capability is of method {capability.method.name}", option="method", value=method
            )
        selector.make_extractor(**given)
    else:
        extractor = _extractor(
            _features_of(chosen), model, revision, sae, sae_revision, layer, top_k_features, pool_tokens, max_length,
            dtype, value_dtype, quantize, device, device_map, batch_tokens,
        )  # fmt: skip
        selector = _fitted(method, options, named, extractor)
    data, store = rows.data, None
    if features is not None:
        if not isinstance(data, Dataset):
            raise NeuronSelectError(
                "a store is of a whole pool; leave --streaming away", option="features", value=features.name
            )
        store = FeatureStore(features, pool_about=rows.about)
    weights = {}
    for pair in weight or []:
        name, _, number = pair.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise NeuronSelectError("NAME=NUMBER is needed", option="weight", value=pair) from None
    exclude = [what for what in ("duplicate", "leak") if what not in (keep or [])]
    selection = selector.select(
        data, ratio=ratio, k=k, threshold=threshold, max_tokens=max_tokens, aggregate=aggregate,
        weights=weights or None, exclude=exclude, features=store,
        source=rows.source,
    )  # fmt: skip
    made = selection.provenance
    selection.save_pretrained(out, messages=not no_messages, examples=not no_examples)
    tokens, timing = made.tokens, made.timing
    typer.echo(f"{len(selection)} of {made.counts.rows} rows selected by {method} in {timing.seconds:.1f} s -> {out}")
    if tokens.selected_mean and tokens.pool_mean:
        rate = f", {timing.tokens_per_second:,} tokens/s" if timing.tokens_per_second else ""
        typer.echo(f"tokens a row: {tokens.selected_mean:.0f} selected, {tokens.pool_mean:.0f} in the pool{rate}")
    _report_counts(made.counts)
    if push_to_hub is not None:
        typer.echo(push_folder(out, push_to_hub, private=private, allow_public=allow_public))


@app.command()
def fit(
    out: Annotated[Path, typer.Option(help="Capability folder to write.")],
    config: Config = None,
    target: Targets = None,
    method: Annotated[str, typer.Option(help="mona, nait, ...")] = "mona",
    method_option: MethodOption = None,
    model: Model = None,
    revision: Revision = None,
    sae: Sae = None,
    sae_revision: SaeRevision = None,
    layer: Layer = -2,
    top_k_features: TopK = None,
    pool_tokens: Pooled = "all",
    max_length: MaxLength = 2048,
    dtype: DtypeOption = "auto",
    value_dtype: ValueDtypeOption = "float16",
    quantize: QuantizeOption = None,
    device: Device = "auto",
    device_map: DeviceMapOption = None,
    batch_tokens: BatchTokens = "auto",
) -> None:
    """Exemplars to a reusable capability (prototype or directions)."""
    options = _method_options(method_option, method, 0)
    chosen = make_method(method, options)
    if not chosen.needs_target:
        raise NeuronSelectError(
            "learns nothing from exemplars; there is nothing to save", option="method", value=method
        )
    named, _ = _targets(target)
    extractor = _extractor(
        _features_of(chosen), model, revision, sae, sae_revision, layer, top_k_features, pool_tokens, max_length,
        dtype, value_dtype, quantize, device, device_map, batch_tokens,
    )  # fmt: skip
    selector = _fitted(method, options, named, extractor)
    selector.save_pretrained(out)
    used = ", ".join(f"{name} ({found.used} exemplars)" for name, found in selector.exemplars.items())
    typer.echo(f"{method} capability of {used} -> {out}")


@app.command()
def extract(
    out: Annotated[Path, typer.Option(help="Feature store to write or to finish.")],
    pool: Pool,
    config: Config = None,
    method: Annotated[
        str | None, typer.Option(help="Methods whose features are computed, separated by commas; default mona.")
    ] = None,
    capability: Annotated[
        list[str] | None,
        typer.Option(help="FOLDER_OR_ID[:NAME] of method nait: one number per block of a row is stored; repeatable."),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    sae: Sae = None,
    sae_revision: SaeRevision = None,
    layer: Layer = -2,
    top_k_features: TopK = None,
    pool_tokens: Pooled = "all",
    max_length: MaxLength = 2048,
    dtype: DtypeOption = "auto",
    value_dtype: ValueDtypeOption = "float16",
    quantize: QuantizeOption = None,
    device: Device = "auto",
    device_map: DeviceMapOption = None,
    batch_tokens: BatchTokens = "auto",
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows of a shard.")] = 4096,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Only every N-th shard, from the I-th (0-based): N processes, one store.")
    ] = "0/1",
    num_workers: Annotated[
        str, typer.Option(help="Processes (or Ray actors) with an extractor each; auto: one a GPU.")
    ] = "auto",
    engine: Annotated[
        Engine, typer.Option(help="local, or ray: a Ray cluster's nodes (pip install 'hf-neuronselect[ray]').")
    ] = "local",
) -> None:
    """A pool's features to a resumable store; `select --features STORE` then needs no forward pass over it."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or not int(found[1]) < int(found[2]):
        raise NeuronSelectError("I/N is needed, I from 0 to N - 1", option="shard", value=shard)
    if num_workers != "auto" and not re.fullmatch("0*[1-9][0-9]*", num_workers):
        raise NeuronSelectError("at least 1, or auto: one a GPU", option="num_workers", value=num_workers)
    names: list[str] = []
    for one in (method or "mona").split(",") if method or not capability else []:
        names += _features_of(METHODS[one.strip()]())
    rows = load_rows(pool)
    assert isinstance(rows.data, Dataset)
    extractor = _extractor(
        tuple(dict.fromkeys(names)), model, revision, sae, sae_revision, layer, top_k_features, pool_tokens, max_length,
        dtype, value_dtype, quantize, device, device_map, batch_tokens,
    )  # fmt: skip
    if capability:
        extractor = extractor.with_features(extractor.features, _directions(capability, extractor))
    path = Path(pool)
    done = write_store(
        rows.data, extractor, out, pool_about=rows.about, shard_rows=shard_rows, shard=(int(found[1]), int(found[2])),
        num_workers=None if num_workers == "auto" else int(num_workers), engine=engine,
        load_pool=partial(load_again, str(path.resolve()) if path.exists() else pool, rows.about), say=_say,
    )  # fmt: skip
    rate = f", {done['tokens'] / done['seconds']:,.0f} tokens/s" if done["tokens"] else ""
    typer.echo(
        f"{done['rows']} rows, {done['bytes'] / max(1, done['rows']):,.0f} bytes a row{rate}, "
        f"{done['skipped_shards']} shards were there already -> {out}"
    )
    if done["healed_shards"]:
        _say(f"{done['healed_shards']} damaged shards were done again.")
    if done["missing_shards"]:
        _say(f"{done['missing_shards']} shards are still missing; without --shard, extract makes what is missing.")


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="Recipe with a section train (TRL's keys), and evaluate and push.")],
    out: RunFolder,
    data: Annotated[str | None, typer.Option(help="Selection or rows; else the section select selects.")] = None,
    no_push: Annotated[bool, typer.Option("--no-push", help="Leave the section push out.")] = False,
) -> int:
    """Fine-tune a LoRA adapter on a selection, evaluate it before and after, push it."""
    return _run_recipe(config, out, data, no_push)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe with sections select, train, evaluate, push.")],
    out: RunFolder,
    no_push: Annotated[bool, typer.Option("--no-push", help="Leave the section push out.")] = False,
) -> int:
    """The whole chain: select, train, evaluate, push. Finished steps are skipped when it is run again."""
    return _run_recipe(recipe, out, None, no_push)


def _run_recipe(path: Path, out: Path, data: str | None, no_push: bool) -> int:
    from ..pipelines.run import Recipe, run_recipe

    def select_rows(words: Sequence[str]) -> None:
        app(list(words), standalone_mode=False)

    options = set(inspect.signature(select).parameters) - {"config"}
    return run_recipe(
        Recipe.read(path, select_options=options), out, select=select_rows, say=typer.echo, data=data, push=not no_push
    )


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for evaluation.json and evaluation.png.")],
    config: Config = None,
    model: Annotated[str | None, typer.Option(help="Base model; default the bundled one.")] = None,
    revision: Revision = None,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=folder or Hub id; repeatable.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="[NAME=]held-out rows; repeatable.")] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Task of lm-evaluation-harness; repeatable.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of more task files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of a task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in a task's prompt.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Held-out rows of each data set.")] = None,
    max_length: MaxLength = 2048,
    dtype: DtypeOption = "auto",
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a batch, of tasks.")] = 8,
    apply_chat_template: Annotated[bool, typer.Option(help="Ask tasks as chat turns.")] = True,
) -> None:
    """A base model and its adapters beside each other: loss on held-out answers, accuracy on tasks."""
    from ..pipelines.run import evaluation_text, named_specs, run_harness, task_rows
    from ..training.evaluation import evaluate_models, write_evaluation
    from ..training.models import base_source

    if not data and not tasks:
        raise NeuronSelectError("name held-out rows (--data) or tasks (--tasks)", option="data")
    adapters = named_specs(adapter)
    base = base_source(model, revision)
    found = EvaluationRecord(base=SourceRecord.of(base))
    if data:
        named = {name: load_rows(spec, option="data").data for name, spec in named_specs(data).items()}
        rows = evaluate_models(
            base, adapters, named, max_length=max_length, max_rows=max_rows, dtype=dtype, device=device
        )
        found = replace(found, rows=tuple(rows))
    if tasks:
        options = {
            "include_path": include_path, "limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size,
            "apply_chat_template": apply_chat_template, "dtype": dtype, "device": device,
        }  # fmt: skip
        results = run_harness(base, adapters, {"tasks": tasks, **options})
        found = replace(
            found, rows=(*found.rows, *task_rows(results)), tasks=results.to_dict(), tasks_table=results.table()
        )
    write_evaluation(out, found)
    for line in evaluation_text(found):
        typer.echo(line)
    typer.echo(f"-> {out / 'evaluation.json'}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Selection folder.")],
    format: Annotated[Trainer, typer.Option(help="Whose data and configuration.")],
    out: Annotated[Path | None, typer.Option(help="Default: the selection's name and the format.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Model to be trained, for the configuration.")] = None,
) -> None:
    """A selection as another trainer reads it, with a configuration that runs."""
    from ..export.export import export_selection

    out = out or folder.resolve().parent / f"{folder.resolve().name}-{format}"
    for file in export_selection(Selection.from_pretrained(folder), format, out, base_model=base_model):
        typer.echo(str(file))


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(help="Selection, capability, feature library, adapter, SAE, store, metric.")
    ],
    repo: Annotated[str, typer.Argument(help="Repository, org/name or name.")],
    private: Private = None,
    revision: Annotated[str | None, typer.Option(help="Branch; created where it is missing.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it instead.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="Of the one commit.")] = None,
    allow_public: AllowPublic = False,
    no_examples: NoExamples = False,
) -> None:
    """Any folder this package wrote, to the Hub, in one commit."""
    if no_examples:
        Selection.from_pretrained(folder).write_pages(folder, examples=False)
    typer.echo(
        push_folder(
            folder, repo, private=private, revision=revision, create_pr=create_pr, commit_message=commit_message,
            allow_public=allow_public,
        )
    )  # fmt: skip


@sae_app.command("train")
def sae_train(
    pool: Pool,
    out: Annotated[Path, typer.Option(help="Folder; the SAE goes into OUT/<blocks>.<layer>.")],
    config: Config = None,
    model: Annotated[str | None, typer.Option(help="Causal LM; default the bundled one.")] = None,
    layer: Layer = -2,
    expansion_factor: Annotated[int, typer.Option(min=1, help="Latents as a multiple of the model's width.")] = 32,
    k: Annotated[int, typer.Option(min=1, help="Latents a token keeps.")] = 32,
    context: Annotated[int, typer.Option(min=8, help="Tokens of a training row.")] = 512,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Use only the first rows.")] = None,
) -> None:
    """Train a TopK SAE on rows of any format, through eai-sparsify (pip install 'hf-neuronselect[sae]')."""
    from ..training.sae import train_on_rows

    rows = load_rows(pool).data
    assert isinstance(rows, Dataset)
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    folder, record = train_on_rows(
        model or str(paths.MODEL), rows, out, layer=layer, expansion_factor=expansion_factor, k=k, context=context
    )
    typer.echo(
        f"FVU {record['fvu']:.3f}, {record['dead']} of {record['latents']} latents dead, L0 {record['l0']:.1f} -> {folder}"
    )


@sae_app.command("inspect")
def sae_inspect(
    sae: Annotated[str, typer.Argument(help="Local SAE folder.")] = str(paths.SAE),
    layer: Annotated[int | None, typer.Option(help="Picks one of several.")] = None,
) -> None:
    """What an SAE file holds: format, site, shape, activation."""
    folder = find_folder(Path(sae), layer)
    found = load_sae(folder, layer=layer)
    facts = {
        "format": found.format,
        "site": f"{found.site.io} of {found.site.module}",
        "latents": found.num_latents,
        "width": found.d_in,
        "activation": found.activation + (f", k = {found.k}" if found.k else ""),
        "b_dec subtracted": "yes" if found.b_pre is not None else "no",
        "input norm": found.input_norm,
        "decoder": "yes" if found.W_dec is not None else "no",
        "trained on": found.model_name or "not said",
        "dtype": str(found.W_enc.dtype).removeprefix("torch."),
    }
    for name, value in facts.items():
        typer.echo(f"{name:17} {value}")


# ------------------------------------------------------------------------------------------- main
@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """The package's own warnings as one line on stderr."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, NeuronSelectWarning):
            _say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def main() -> None:
    """Entry point: one handler for every error; bad input is exit status 2, one line, no traceback."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        with _plain_warnings():
            status = app(standalone_mode=False)
    except NeuronSelectError as error:
        _say(f"error: {error.as_command_line()}")
        sys.exit(2)
    except Exception as error:
        # typer's own usage errors (its vendored click is not imported here).
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        _say(f"error: {message()}")
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
