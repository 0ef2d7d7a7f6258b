"""Every option of every command but ``select``: flag, recipe and Python give the same, and the callee gets the value."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset, IterableDataset
from option_values import CONFIGS
from select_lines import LINES as OF_SELECT
from select_lines import filled
from tiny import rows

from hf_neuronselect import NeuronSelector
from hf_neuronselect.cli.main import main
from hf_neuronselect.core import configs, judging, sae_configs
from hf_neuronselect.core.configs import EvaluateOptions, FitConfig, PushSection, RunConfig, SelectConfig
from hf_neuronselect.core.options import ExtractionOptions, Options, flag_words, options_of
from hf_neuronselect.core.provenance import SelectionSummary, SourceRecord, TargetRecord
from hf_neuronselect.models.pin import pin_model
from hf_neuronselect.models.sae_formats import load_sae
from hf_neuronselect.pipelines import (
    compare,
    demo,
    evaluate,
    explain,
    export,
    extract,
    fit,
    judge,
    labels,
    push,
    report,
    run,
    sae,
    select,
    serve,
)
from hf_neuronselect.pipelines.browse import Browser

Seen = dict[str, Any]
SAME = object()


class Enough(Exception):
    """All that a test looks at has happened."""


@dataclass(frozen=True)
class Line:
    """An option that is not its default, and where its value arrives.

    Attributes:
        at: finds it in what was seen. arrives: what is found there, if not the value. beside: other options.
    """

    value: Any
    at: Callable[[Seen], Any]
    arrives: Any = SAME
    beside: Mapping[str, Any] = field(default_factory=dict)


def key(name: str) -> Callable[[Seen], Any]:
    return lambda seen: seen[name]


# ------------------------------------------------------------------------------------------- the tables
def of_extractor(name: str) -> Callable[[Seen], Any]:
    return lambda seen: getattr(seen["extractor"].extraction.options, name)


NUMBERS: dict[str, Any] = {
    "model": "{files}/model", "revision": "v1", "sae": "{files}/sae/layers.2", "sae_revision": "v2", "dtype": "bfloat16",
    "quantize": "4bit", "attn_implementation": "eager", "row_format": "messages", "columns": {"messages": "messages"},
    "chat_template": "{{ messages }}", "max_length": 9, "truncation_side": "left", "pool_tokens": "user", "layer": 2,
    "top_k_features": 3, "pooling": "sum", "site": "mlp", "drift": "mean", "value_dtype": "float32", "device": "cpu",
    "device_map": "auto", "batch_tokens": 77, "encoder": "{files}/encoder", "encoder_revision": "v3", "encoder_window": 9,
    "encoder_prompt": "words: ", "encoder_dtype": "bfloat16", "mntp_adapter": "{files}/mntp", "mntp_revision": "v4",
}  # fmt: skip
BESIDE = {"model": "sae", "sae": "model"}
EXTRACTION = {
    name: Line(value, of_extractor(name), beside={BESIDE[name]: NUMBERS[BESIDE[name]]} if name in BESIDE else {})
    for name, value in NUMBERS.items()
}
METHOD = {
    "method": Line("hidden", lambda seen: seen["method"].name),
    "method_option": Line({"metric": "cosine"}, lambda seen: {"metric": seen["method"].options["metric"]}),
    "picker": Line("knn(neighbours=3)", lambda seen: str(seen["picker"])),
    "avoid": Line(("u={files}/u.jsonl",), lambda seen: list(seen["avoid"]), ["u"]),
    "avoid_weight": Line(2.5, key("avoid_weight"), beside={"avoid": ("u={files}/u.jsonl",)}),
}
MEASURED = {
    "data": Line(("held={files}/t.jsonl",), lambda seen: list(seen["losses"]["data"]), ["held"]),
    "tasks": Line(("task",), lambda seen: seen["tasks"]["tasks"]),
    "max_rows": Line(3, lambda seen: seen["losses"]["max_rows"]),
    "max_length": Line(9, lambda seen: seen["losses"]["max_length"]),
    "dtype": Line("bfloat16", lambda seen: (seen["losses"]["dtype"], seen["tasks"]["dtype"]), ("bfloat16", "bfloat16")),
    "device": Line("cpu", lambda seen: (seen["losses"]["device"], seen["tasks"]["device"]), ("cpu", "cpu")),
    "include_path": Line(Path("{files}"), lambda seen: seen["tasks"]["include_path"]),
    "limit": Line(3, lambda seen: seen["tasks"]["limit"]),
    "num_fewshot": Line(2, lambda seen: seen["tasks"]["num_fewshot"]),
    "batch_size": Line(5, lambda seen: seen["tasks"]["batch_size"]),
    "apply_chat_template": Line(False, lambda seen: seen["tasks"]["apply_chat_template"]),
}
COMMITTED = {
    "private": Line(True, lambda seen: seen["push"]["private"]),
    "allow_public": Line(True, lambda seen: seen["push"]["allow_public"]),
    "revision": Line("branch", lambda seen: seen["push"]["revision"]),
    "create_pr": Line(True, lambda seen: seen["push"]["create_pr"]),
    "commit_message": Line("words", lambda seen: seen["push"]["commit_message"]),
    "examples": Line(False, key("examples")),
}
JUDGE = {
    "judge": Line("some", lambda seen: seen["spec"].name),
    "at": Line("hub", lambda seen: seen["spec"].at),
    "key": Line("KEY", lambda seen: seen["spec"].key),
    "concurrency": Line(3, lambda seen: seen["spec"].concurrency),
    "tries": Line(2, lambda seen: seen["spec"].tries),
    "timeout": Line(9.5, lambda seen: seen["spec"].timeout),
    "price_in": Line(0.5, lambda seen: seen["spec"].price_in),
    "price_out": Line(0.5, lambda seen: seen["spec"].price_out),
}


ROW = {"row": 0}


def budget(name: str, value: Any) -> Line:
    return Line(value, lambda seen: seen["made"].budget.given(), {name: value})


LINES: dict[str, dict[str, Line]] = {
    "fit": EXTRACTION | METHOD | {
        "target": Line(("one={files}/t.jsonl",), lambda seen: list(seen["targets"]), ["one"]),
        "out": Line(Path("{files}/new"), key("folder")),
    },
    "extract": EXTRACTION | {
        "pool": Line("{files}/t.jsonl", lambda seen: seen["pool_about"]["id"], "t.jsonl"),
        "out": Line(Path("{files}/new"), key("folder")),
        "method": Line("nait,hidden", key("signals"), ["nait", "hidden"]),
        "method_option": Line({"candidate": "mean"}, key("signals"), ["content_mean", "nait"], {"method": "nait"}),
        "capability": Line(("{files}/cap",), lambda seen: [name[:8] for name in seen["signals"]], ["nait_on_"]),
        "shard_rows": Line(9, key("shard_rows")),
        "shard": Line("1/3", key("shard"), (1, 3)),
        "num_workers": Line(2, key("num_workers")),
        "backend": Line("ray", key("backend")),
    },
    "compare": EXTRACTION | {
        "pool": Line("{files}/u.jsonl", lambda seen: seen["made"].pool.id, "u.jsonl"),
        "target": Line(("one={files}/t.jsonl",), lambda seen: seen["line"].target, "one"),
        "methods": Line("longest", lambda seen: seen["line"].method),
        "picker": Line("knn(neighbours=3)", lambda seen: seen["line"].method, "mona + knn(neighbours=3)", {"methods": "mona"}),
        "ratio": budget("ratio", 0.25),
        "k": budget("k", 3),
        "threshold": budget("threshold", 0.5),
        "max_tokens": budget("max_tokens", 99),
        "keep": Line(("leak",), lambda seen: seen["made"].exclude, ("duplicate",)),
        "seed": Line(5, lambda seen: seen["made"].method.options["seed"]),
        "source_share": Line(0.34, lambda seen: seen["made"].spread.source_share),
        "drop_near_copies": Line(True, lambda seen: seen["made"].spread.drop_near_copies),
        "draws": Line(3, lambda seen: seen["line"].draws),
        "resamples": Line(4, lambda seen: len(seen["samples"][0]), 4, {"methods": "mona", "related": {"t": "s1"}}),
        "held_out": Line(("t={files}/u.jsonl",), lambda seen: {one.target for one in seen["trained"]}, {"t"},
                         {"train": {"max_steps": "1"}}),
        "train": Line({"max_steps": "2"}, lambda seen: seen["config"].train, SAME, {"held_out": ("t={files}/u.jsonl",)}),
        "train_seeds": Line(2, lambda seen: {one.seed for one in seen["trained"]}, {0, 1},
                            {"held_out": ("t={files}/u.jsonl",), "train": {"max_steps": "1"}}),
        "related": Line({"t": "s1, s2"}, lambda seen: seen["line"].base_rate, 10 / 16),
        "source_column": Line("kind", lambda seen: seen["line"].base_rate, 4 / 16, {"related": {"t": "k3"}}),
        "features": Line(Path("{files}/kept"), lambda seen: seen["store"].folder,
                         beside={"methods": "hidden,nait", "model": "{files}/model", "k": 2}),
        "num_workers": Line(2, key("num_workers"),
                            beside={"methods": "hidden,nait", "model": "{files}/model", "k": 2}),
        "transfer": Line(True, lambda seen: {one.target for one in seen["transfers"]}, {"t", "u"},
                         {"target": ("t={files}/t.jsonl", "u={files}/u.jsonl"), "train": {"max_steps": "1"},
                          "held_out": ("t={files}/u.jsonl", "u={files}/t.jsonl")}),
        "examples": Line(False, lambda seen: seen["config"].examples),
        "out": Line(Path("{files}/other"), lambda seen: (seen["config"].out / "compare.csv").is_file(), True),
    },
    "demo": {
        "out": Line(Path("{files}/demo"), lambda seen: seen["config"].out),
        "model": Line("{files}/model", lambda seen: seen["config"].model),
    },
    "run": {
        "recipe": Line(Path("{files}/other.yaml"), key("learning_rate"), 0.5),
        "out": Line(Path("{files}/run2"), key("folder")),
        "data": Line("{files}/t.jsonl", lambda seen: seen["rows"].pool.id, "t.jsonl"),
        "push": Line(False, lambda seen: seen["push"], None),
    },
    "evaluate": MEASURED | {
        "out": Line(Path("{files}/new"), key("folder")),
        "model": Line("{files}/model", lambda seen: seen["losses"]["base"].id, "model"),
        "revision": Line("v1", lambda seen: seen["base"][1]),
        "adapter": Line(("a=folder",), lambda seen: seen["losses"]["adapters"], {"a": "folder"}),
    },
    "export": {
        "folder": Line(Path("elsewhere"), key("folder")),
        "format": Line("axolotl", key("format")),
        "out": Line(Path("{files}/new"), key("out")),
        "base_model": Line("org/lm", key("base_model")),
    },
    "push": COMMITTED | {
        "folder": Line(Path("elsewhere"), lambda seen: seen["push"]["folder"]),
        "repo": Line("me/other", lambda seen: seen["push"]["repo"]),
    },
    "sae train": {name: Line(value, lambda seen, name=name: getattr(seen["asked"], name)) for name, value in {
        "k": 7, "tokens": 5000, "batch": 99, "learning_rate": 0.5, "context": 64, "buffer_gb": 0.25, "seed": 3,
        "expansion_factor": 4, "latents": 48, "out": Path("{files}/new"), "layer": (1,),
    }.items()} | {
        "pool": Line("{files}/t.jsonl", lambda seen: len(seen["rows"]), 4),
        "model": Line("{files}/model", lambda seen: seen["extraction"].model.id, "model"),
        "revision": Line("v1", lambda seen: seen["extraction"].options.revision, beside={"model": "{files}/model"}),
        "dtype": Line("bfloat16", lambda seen: seen["extraction"].options.dtype),
        "device": Line("cpu", lambda seen: seen["extraction"].options.device),
        "max_rows": Line(5, lambda seen: len(seen["rows"])),
        "streaming": Line(True, lambda seen: isinstance(seen["rows"], IterableDataset)),
    },
    "explain": {
        "folder": Line("elsewhere", key("folder"), beside=ROW),
        "row": Line(3, key("asked"), ("explain", 3, 10)),
        "why_not": Line(3, key("asked"), ("why_not", 3, 10)),
        "contrast": Line((2, 1), key("asked"), ("contrast", 2, 1, 10)),
        "target": Line("u={files}/t.jsonl", lambda seen: (seen["target"], len(seen["exemplars"])), ("u", 4), ROW),
        "causal": Line(3, lambda seen: seen["causal"].k),
        "held_out": Line("{files}/t.jsonl", lambda seen: len(seen["held_out"]), 4, {"causal": 2}),
        "draws": Line(3, lambda seen: seen["causal"].draws, beside={"causal": 2}),
        "seed": Line(3, lambda seen: seen["causal"].seed, beside={"causal": 2}),
        "top": Line(4, key("asked"), ("explain", 0, 4), ROW),
        "features": Line(Path("{files}/kept"), lambda seen: seen["features"], beside=ROW),
        "pool": Line("{files}/pool.jsonl", lambda seen: len(seen["pool"]), 16, ROW),
        "model": Line("{files}/model", lambda seen: seen["made"]["model"], beside=ROW),
        "sae": Line("{files}/sae", lambda seen: seen["made"]["sae"], beside=ROW),
        "device": Line("cpu", lambda seen: seen["made"]["device"], beside=ROW),
    },
    "app": {
        "folder": Line("elsewhere", key("folder")),
        "target": Line("u={files}/t.jsonl", lambda seen: (seen["target"], len(seen["exemplars"])), ("u", 4)),
        "features": Line(Path("{files}/kept"), lambda seen: seen["features"]),
        "pool": Line("{files}/pool.jsonl", lambda seen: len(seen["pool"]), 16),
        "model": Line("{files}/model", lambda seen: seen["made"]["model"]),
        "sae": Line("{files}/sae", lambda seen: seen["made"]["sae"]),
        "device": Line("cpu", lambda seen: seen["made"]["device"]),
        "host": Line("127.0.0.2", lambda seen: seen["served"].host),
        "port": Line(8123, key("port")),
        "mcp": Line(True, lambda seen: seen["served"].mcp),
    },
    "report": {
        "folder": Line(Path("{files}/t.jsonl").parent, lambda seen: Path(seen["folder"])),
        "target": Line(("t={files}/t.jsonl",), lambda seen: {name: len(one) for name, one in seen["exemplars"].items()}, {"t": 4}),
        "examples": Line(False, lambda seen: seen["shown"][0]),
        "features": Line(Path("{files}/kept"), lambda seen: seen["selection"].features),
        "pool": Line("{files}/pool.jsonl", lambda seen: len(seen["selection"].pool), 16),
        "model": Line("{files}/model", lambda seen: seen["made"]["model"]),
        "sae": Line("{files}/sae", lambda seen: seen["made"]["sae"]),
        "device": Line("cpu", lambda seen: seen["made"]["device"]),
    },
    "judge": {
        "folder": Line(("{files}/selected", "{files}/second"), lambda seen: [one.name for one in seen["groups"][:2]],
                       ["selected", "second"]),
        "target": Line("u={files}/u.jsonl", lambda seen: seen["groups"][-3].name, "other exemplars of u"),
        "pool": Line("{files}/pool.jsonl", lambda seen: seen["groups"][1].name, "random rows of the pool"),
        "samples": Line(2, lambda seen: len(seen["groups"][0].rows)),
        "checks": Line(2, lambda seen: len(seen["groups"][-1].rows)),
        "prompt": Line(Path("{files}/prompt.txt"), lambda seen: seen["prompt"][:2], "Is"),
        "seed": Line(5, lambda seen: seen["groups"][0].rows, (13, 3), {"samples": 2}),  # (3, 11) by the default
        "out": Line(Path("{files}/judged"), key("folder")),
    } | JUDGE,
    "sae label": {
        name: EXTRACTION[name]
        for name in ("model", "revision", "sae", "sae_revision", "layer", "max_length", "dtype", "device")
    } | {
        "pool": Line("{files}/t.jsonl", lambda seen: len(seen["rows"]), 4),
        "tokens": Line(5000, key("tokens")),
        "seed": Line(3, lambda seen: seen["about"]["seed"]),
        "out": Line(Path("{files}/labels.parquet"), key("saved")),
    },
    "sae describe": {
        name: EXTRACTION[name]
        for name in ("model", "revision", "sae", "sae_revision", "layer", "max_length", "dtype", "device")
    } | JUDGE | {
        "pool": Line("{files}/t.jsonl", lambda seen: len(seen["rows"]), 4),
        "tokens": Line(5000, key("tokens")),
        "seed": Line(3, key("seed")),
        "contexts": Line(12, key("contexts")),
        "features": Line("3,4", key("wanted"), [3, 4]),
        "selection": Line("{files}/selected", lambda seen: seen["selection"], beside={"features": None}),
        "most": Line(3, key("wanted"), [0, 1, 2], {"features": None, "selection": "{files}/selected"}),
        "out": Line(Path("{files}/labels.parquet"), key("saved")),
    },
    "sae find": {
        "model": Line("{files}/model", lambda seen: seen["pinned"][0]),
        "revision": Line("v1", lambda seen: seen["pinned"][1]),
        "layer": Line(2, key("picked")),
    },
    "sae inspect": {
        "sae": Line(Path("{files}/sae"), lambda seen: seen["found"][0]),
        "layer": Line(2, lambda seen: (seen["found"][1], seen["layer"]), (2, 2)),
    },
}  # fmt: skip
USUAL: dict[str, dict[str, Any]] = {
    "fit": {"target": ("t={files}/t.jsonl",), "out": "{files}/out"},
    "extract": {"pool": "{files}/pool.jsonl", "out": "{files}/out"},
    "compare": {"pool": "{files}/pool.jsonl", "target": ("t={files}/t.jsonl",), "methods": "random", "out": "{files}/c"},
    "run": {"recipe": "{files}/recipe.yaml", "out": "{files}/run"},
    "evaluate": {"data": ("t={files}/t.jsonl",), "tasks": ("some",), "out": "{files}/out"},
    "export": {"folder": "selection", "format": "trl"},
    "push": {"folder": "selection", "repo": "me/rows"},
    "sae train": {"pool": "{files}/pool.jsonl", "out": "{files}/out"},
    "sae find": {"model": "{files}/model"},
    "explain": {"folder": "selection"},
    "app": {"folder": "selection"},
    "report": {"folder": "{files}"},
    "judge": {"folder": ("{files}/selected",), "target": "t={files}/t.jsonl", "at": "http://localhost/v1"},
    "sae label": {"pool": "{files}/pool.jsonl"},
    "sae describe": {"pool": "{files}/pool.jsonl", "features": "1", "at": "http://localhost/v1"},
    "demo": {"out": "{files}/demo"},
}  # fmt: skip
RECIPE = {"select": {"pool": "{files}/pool.jsonl", "target": ["t={files}/t.jsonl"], "k": 4},
          "train": {"learning_rate": 1e-4}, "push": {"adapter": "me/adapter"}}  # fmt: skip


# ------------------------------------------------------------------------------------------ the callees
@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name in ("model", "sae"):
        (folder / name).symlink_to(tiny_folder / name)
    pool = rows(16)
    pool.add_column("kind", [f"k{i % 4}" for i in range(16)]).to_json(folder / "pool.jsonl")
    for seed, name in enumerate("tu", 1):
        rows(4, seed=seed).to_json(folder / f"{name}.jsonl")
    same = {"target": (f"t={folder / 't.jsonl'}",), "method": "nait"}
    fit.fit(FitConfig(**same, out=folder / "cap"))
    for name in ("selected", "second"):
        select.select(SelectConfig(pool=str(folder / "pool.jsonl"), method="random", k=4, out=folder / name))
    (folder / "prompt.txt").write_text("Is {exemplar} like {row}?")
    write_recipe(folder / "recipe.yaml", folder)
    write_recipe(folder / "other.yaml", folder, train={"learning_rate": 0.5})
    return folder


def write_recipe(path: Path, files: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(filled(RECIPE | changes, files)))
    return path


class Saved(SimpleNamespace):
    """Labels that are written nowhere."""

    def with_descriptions(self, others: Any) -> Saved:
        return self


class Empty(SimpleNamespace):
    """A selection without rows."""

    def __len__(self) -> int:
        return 0


def patch_explanations(found: Seen, patch: Callable[..., None]) -> None:
    """The callees of ``explain``, ``sae label`` and ``sae describe``."""

    def make_labels(extractor: Any, rows: Any, **more: Any) -> Any:
        found.update(more, extractor=extractor, rows=list(rows))
        label = SimpleNamespace(auc=0.5)
        return Saved(found={0: label}, about=more, save=lambda path: found.update(saved=path))

    def firings(extractor: Any, rows: Any, tokens: int, only: Any) -> None:
        found.update(extractor=extractor, rows=list(rows), tokens=tokens, wanted=only)

    def contexts(config: Any, seen: Any, wanted: Any) -> dict[int, Any]:
        found.update(contexts=config.contexts, seed=config.seed)
        return {}

    def described(judge: Any, *given: Any) -> list[Any]:
        found.update(spec=judge.spec)
        return []

    def of_selection(config: Any, folder: str, sae: Any, note: Any) -> list[int]:
        found.update(selection=folder)
        return list(range(config.most))

    def explainer(**given: Any) -> Any:
        found.update(given)
        return SimpleNamespace(**{
            name: lambda *asked, name=name: found.update(asked=(name, *asked)) for name in ("explain", "why_not", "contrast")
        })  # fmt: skip

    def selected(folder: str) -> Any:
        found["folder"] = folder
        selector = SimpleNamespace(
            targets={"t": {}, "u": {}}, exemplars={}, make_extractor=lambda **given: found.update(made=given)
        )
        made = SimpleNamespace(pool=SourceRecord(id="pool.jsonl"))
        return SimpleNamespace(selector=selector, provenance=made, explainer=explainer)

    def written(folder: Path) -> Any:
        found.update(folder=folder, exemplars={})
        selector = SimpleNamespace(
            exemplars={"t": TargetRecord()}, examples=found["exemplars"],
            make_extractor=lambda **given: found.update(made=given),
        )  # fmt: skip
        found["selection"] = Empty(
            selector=selector,
            provenance=SimpleNamespace(pool=SourceRecord(id="pool.jsonl")),
            report=lambda *given, **more: found.update(shown=given) or "",
        )
        return found["selection"]

    def served(config: configs.AppConfig, port: int) -> None:
        found.update(served=config, port=port)
        Browser.explainer.func(SimpleNamespace(config=config, selection=selected(config.folder)))
        raise Enough

    patch(serve, "check_gradio", lambda config: None)
    patch(serve, "_started", served)
    patch(report, "Selection", SimpleNamespace(from_pretrained=written))
    patch(report, "FeatureStore", lambda folder: folder)
    patch(report, "put", lambda path, text: None)
    patch(labels, "make_labels", make_labels)
    for name, callee in {"firings_of": firings, "_contexts": contexts, "_described": described, "_table": str,
                         "_of_selection": of_selection}.items():  # fmt: skip
        patch(labels, name, callee)
    patch(labels.Labels, "save", lambda self, path: found.update(saved=path))
    patch(explain, "Selection", SimpleNamespace(from_pretrained=selected))
    patch(explain, "causal_check", lambda explainer, options, rows: found.update(causal=options, held_out=rows))
    patch(explain, "FeatureStore", lambda folder: folder)


def patch_judge(found: Seen, patch: Callable[..., None]) -> None:
    """The callees of ``judge``."""

    def rated(asked: Any, prompt: str, exemplar: str, groups: Any) -> Any:
        found.update(spec=asked.spec, prompt=prompt, groups=groups)
        raise Enough

    patch(judge, "_rated", rated)
    patch(judge, "check_folder", lambda folder, kind: found.update(folder=folder))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the callees of each pipeline get; none of them does its work."""
    found: Seen = {"push": None}

    def patch(module: Any, name: str, callee: Callable[..., Any]) -> None:
        monkeypatch.setattr(module, name, callee)

    def fitted(self: NeuronSelector, targets: Any, *, extractor: Any, **more: Any) -> NeuronSelector:
        found.update(more, method=self.method, picker=self.picker, targets=targets, extractor=extractor)
        return self

    def write_store(pool: Dataset, extractor: Any, folder: Path, **more: Any) -> None:
        signals = [signal.name for signal in extractor.signals]
        found.update(more, extractor=extractor, folder=folder, signals=signals)
        raise Enough

    def losses(base: Any, adapters: Any, data: Any, **more: Any) -> list[Any]:
        found["losses"] = {"base": base, "adapters": adapters, "data": data, **more}
        return []

    def tasks(base: str, adapters: Any, tasks: Any, **more: Any) -> Any:
        found["tasks"] = {"tasks": tasks, **more}
        return SimpleNamespace(rows=[], to_dict=dict, table=lambda: "")

    def base_source(model: str | None, revision: str | None = None) -> Any:
        found["base"] = model, revision
        return before(model)

    def push_folder(folder: Path, repo: str, **more: Any) -> str:
        found["push"] = {"folder": folder, "repo": repo, **more}
        return "url"

    def opened(folder: Path) -> Any:
        found["folder"] = folder
        return SimpleNamespace(write_pages=lambda folder, examples: found.update(examples=examples))

    def exported(selection: Any, format: str, out: Path, *, base_model: str | None) -> list[Path]:
        found.update(format=format, out=out, base_model=base_model)
        return []

    def train_on_rows(extraction: Any, lm_config: Any, rows: Any, pool: Any, config: Any, **more: Any) -> Any:
        found.update(extraction=extraction, rows=rows, asked=config)
        return {}

    def find_folder(folder: Path, layer: int | None) -> Path:
        found["found"] = folder, layer
        return look(folder, layer)

    def load(folder: Path, *, layer: int | None) -> Any:
        found["layer"] = layer
        return load_sae(folder, layer=layer)

    def pin(model: str, *, revision: str | None, token: Any) -> Any:
        found["pinned"] = model, revision
        return pin_model(model, revision=None, token=token)

    def pick(known: Any, layer: int) -> None:
        found["picked"] = layer

    patch_explanations(found, patch)
    patch_judge(found, patch)
    monkeypatch.setenv("KEY", "x")
    before, look = evaluate.base_source, sae.find_folder
    patch(sae, "pin_model", pin)
    patch(sae, "pick_sae", pick)
    monkeypatch.setattr(NeuronSelector, "fit", fitted)
    monkeypatch.setattr(NeuronSelector, "save_pretrained", lambda self, folder: found.update(folder=folder))
    patch(extract, "write_store", write_store)
    patch(evaluate, "evaluate_models", losses)
    patch(evaluate, "base_source", base_source)
    patch(evaluate, "check_tasks", lambda options: None)
    patch(evaluate, "write_evaluation", lambda folder, record: found.update(folder=folder))
    monkeypatch.setattr("hf_neuronselect.training.harness.run_tasks", tasks)
    patch(push, "push_folder", push_folder)
    for module in (push, export):
        patch(module, "Selection", SimpleNamespace(from_pretrained=opened))
    patch(export, "export_selection", exported)
    monkeypatch.setattr("hf_neuronselect.training.sae_train.train_on_rows", train_on_rows)
    patch(sae, "find_folder", find_folder)
    patch(sae, "load_sae", load)
    return found


@pytest.fixture
def steps(seen: Seen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Seen:
    """The steps of a run: they only note what they get."""

    def take(self: Any, spec: Any, *rest: Any) -> None:
        record = spec.summary if isinstance(spec, run.TrainingRows) else SelectionSummary(pool=SourceRecord())
        self.rows["a"] = Dataset.from_list([{"text": "x"}]), record
        seen["rows"] = record

    def train(self: Any) -> None:
        seen.update(folder=self.out, learning_rate=self.recipe.train.about()["learning_rate"])

    record = SimpleNamespace(selection=SelectionSummary(pool=SourceRecord()))
    for name, step in {"select": take, "take": take, "train": train}.items():
        monkeypatch.setattr(run._Run, name, step)
    for name, callee in {
        "check_write_access": lambda: "me", "check_tasks": lambda options: None, "read_adapter": lambda *given: record,
        "write_record": lambda *given: None, "replace": lambda one, **changes: one, "Selection": push.Selection,
    }.items():  # fmt: skip
        monkeypatch.setattr(run, name, callee)
    monkeypatch.setattr(run.constants, "HF_HUB_OFFLINE", False)
    return seen


# ------------------------------------------------------------------------------------------------ tests
SECTIONS = {"evaluate": EvaluateOptions, "push": PushSection}
PIPELINES = {"fit": fit, "extract": extract, "compare": compare, "demo": demo, "run": run, "evaluate": evaluate,
             "export": export, "push": push, "explain": explain, "app": serve, "report": report, "judge": judge, "sae label": labels, "sae describe": labels, "sae train": sae, "sae find": sae, "sae inspect": sae}  # fmt: skip
FUNCTIONS = {
    "app": "serve",
    "sae label": "label_sae",
    "sae describe": "describe_sae",
    "sae train": "train_sae",
    "sae find": "find_sae",
    "sae inspect": "inspect_sae",
}
PLACED = {
    "explain": ["folder"],
    "app": ["folder"],
    "report": ["folder"],
    "judge": ["folder"],
    "run": ["recipe"],
    "export": ["folder"],
    "push": ["folder", "repo"],
    "sae find": ["model"],
    "sae inspect": ["sae"],
}
ALL = [(command, name) for command, lines in LINES.items() for name in lines]


def words_of(value: Any) -> list[str]:
    """A value by position: several words where it has several parts."""
    return [str(one) for one in (value if isinstance(value, tuple) else [value])]


def config_of(command: str, name: str, files: Path) -> Options:
    line = LINES[command][name]
    values = USUAL.get(command, {}) | dict(line.beside) | {name: line.value}  # None takes a usual one away
    return CONFIGS[command].from_mapping(
        filled({one: value for one, value in values.items() if value is not None}, files)
    )


def test_every_option_of_every_command_has_a_line() -> None:
    assert {*LINES, "select"} == set(CONFIGS)
    for command, lines in LINES.items():
        assert set(lines) == set(options_of(CONFIGS[command])), command
    modules = (configs, judging, sae_configs)
    known = {kind for of in modules for name, kind in vars(of).items() if name.endswith("Config")}
    assert known == set(CONFIGS.values()), "a command that is not in the tables"
    assert set(MEASURED) == set(options_of(EvaluateOptions))
    assert set(COMMITTED) | {"selection", "adapter"} == set(options_of(PushSection))
    assert set(NUMBERS) == set(options_of(ExtractionOptions))


@pytest.mark.parametrize(("command", "name"), ALL)
def test_flag_recipe_and_python_reach_the_pipeline_alike(
    command: str, name: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(command, name, files)
    values = {one: getattr(config, one) for one in config.given}
    assert values[name] != options_of(type(config))[name].default
    placed = [word for one in PLACED.get(command, []) if one in values for word in words_of(values[one])]
    rest = {one: value for one, value in values.items() if one not in PLACED.get(command, [])}
    ways = [[*flag_words(type(config), rest), *placed]]
    if (
        command == "sae train"
        or command not in ("run", "push", "explain", "app", "judge", "report")
        and "sae" not in command
    ):
        section = {one: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
                   for one, v in rest.items()}  # fmt: skip
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({command.split()[0]: section}))
        ways.append(["--config", str(tmp_path / "r.yaml"), *placed])
    got: list[Options] = []

    def work(config: Options, **more: Any) -> Any:
        got.append(config)
        if command == "compare":
            return SimpleNamespace(failed=[])
        return {} if command in ("sae inspect", "export") else 0

    monkeypatch.setattr(PIPELINES[command], FUNCTIONS.get(command, command), work)
    for words in ways:
        monkeypatch.setattr(sys, "argv", ["neuronselect", *command.split(), *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, words
    assert got == [config] * len(ways) and all(one.given == config.given for one in got)


def check(line: Line, seen: Seen, files: Path) -> None:
    assert line.at(seen) == filled(line.value if line.arrives is SAME else line.arrives, files)


@pytest.mark.parametrize(("command", "name"), [one for one in ALL if one[0] not in ("compare", "demo", "run")])
def test_an_option_arrives(command: str, name: str, files: Path, seen: Seen) -> None:
    work = getattr(PIPELINES[command], FUNCTIONS.get(command, command))
    with suppress(Enough):
        work(config_of(command, name, files))
    check(LINES[command][name], seen, files)


@pytest.mark.parametrize("name", LINES["compare"])
def test_an_option_of_compare_arrives(name: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: Seen = {}

    def share_pass(jobs: Any, folder: Path, *, num_workers: int | None, **more: Any) -> None:
        given["num_workers"] = num_workers
        before(jobs, folder, **more)

    before = compare.share_pass
    monkeypatch.setattr(compare, "share_pass", share_pass)
    config = config_of("compare", name, files)
    found = compare.compare(config)  # type: ignore[arg-type]
    made = next(iter(found.selections.values())).provenance
    seen = given | {
        "extractor": found.extractor,
        "made": made,
        "line": found.lines[0],
        "store": found.store,
        "config": config,
        "samples": list(found.samples.values()),
        "transfers": found.transfers,
        "trained": found.trained,
    }
    check(LINES["compare"][name], seen, files)


@pytest.mark.parametrize("name", LINES["demo"])
def test_an_option_of_demo_arrives(name: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Seen = {}

    def compare_in(work: Path, config: Options, **more: Any) -> None:
        seen["config"] = config
        raise Enough

    monkeypatch.setattr(demo, "compare_in", compare_in)
    with suppress(Enough):
        demo.demo(config_of("demo", name, files))  # type: ignore[arg-type]
    check(LINES["demo"][name], seen, files)


@pytest.mark.parametrize("name", LINES["run"])
def test_an_option_of_run_arrives(name: str, files: Path, steps: Seen, tmp_path: Path) -> None:
    config = config_of("run", name, files)
    assert isinstance(config, RunConfig)
    assert run.run(config if name == "out" else replace(config, out=tmp_path / "run")) == 0
    assert steps["push"] or name == "push"
    check(LINES["run"][name], steps, files)


# ------------------------------------------------------------------------------- the sections of a recipe
@pytest.mark.parametrize("name", [*COMMITTED, "selection", "adapter"])
def test_an_option_of_the_section_push_arrives(name: str, files: Path, steps: Seen, tmp_path: Path) -> None:
    lines = COMMITTED | {
        repo: Line(f"me/{repo}", lambda seen: seen["push"]["repo"]) for repo in ("selection", "adapter")
    }
    section = ({"selection": "me/rows"} if name not in ("selection", "adapter") else {}) | {name: lines[name].value}
    recipe = write_recipe(tmp_path / "r.yaml", files, push=section)
    run.run(RunConfig(recipe=recipe, out=tmp_path / "run"))
    check(lines[name], steps, files)


@pytest.mark.parametrize("name", MEASURED)
def test_an_option_of_the_section_evaluate_arrives(
    name: str, files: Path, steps: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = MEASURED[name]
    asked = {"data": ["t={files}/t.jsonl"], "tasks": ["some"]} | {name: line.value}
    asked = {one: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for one, v in asked.items()}

    def stop(*given: Any) -> None:
        raise Enough

    monkeypatch.setattr(run, "write_evaluation", stop)
    with suppress(Enough):
        run.run(RunConfig(recipe=write_recipe(tmp_path / "r.yaml", files, evaluate=asked), out=tmp_path / "run"))
    check(line, steps, files)


@pytest.mark.parametrize("name", [name for name in options_of(SelectConfig) if name != "out"])
def test_an_option_of_the_section_select_arrives(
    name: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, got = OF_SELECT[name], []

    def prepare(config: SelectConfig, **more: Any) -> None:
        got.append(config)
        raise Enough

    monkeypatch.setattr(run, "prepare", prepare)
    monkeypatch.setattr(run, "_read_by", lambda config: [])  # what they name need not be there
    monkeypatch.setattr(run, "_scoring_model", lambda *given: (None, None))
    values = filled(RECIPE["select"] | dict(line.beside) | {name: line.value}, files)
    values = {one: list(v) if isinstance(v, tuple) else v for one, v in values.items() if v is not None}
    if name in ("ratio", "threshold", "max_tokens"):
        values.pop("k", None)
    with suppress(Enough):
        run.run(RunConfig(recipe=write_recipe(tmp_path / "r.yaml", files, select=values), out=tmp_path / "run"))
    wanted = options_of(SelectConfig)[name].read(values[name])
    assert getattr(got[0], name) == wanted != options_of(SelectConfig)[name].default
