"""Every option of ``select``: it reaches the computation, the record and the card's command, which picks the same rows."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from encoders import write_encoder, write_mntp
from families import tiny_model, tiny_tokenizer
from hub import Hub
from huggingface_hub import HfApi
from indicators import write_reward, write_unieval
from option_values import other
from reports import without_reports
from select_lines import ENCODER, LINES, LM, MNTP, SAE, TEMPLATE, filled
from tiny import chat, rows, write_sae

from hf_neuronselect import FeatureLibrary, NeuronFeatureExtractor, NeuronSelector
from hf_neuronselect.cli import main as cli
from hf_neuronselect.core.configs import CAPABILITY, ExtractConfig, FitConfig, SelectConfig
from hf_neuronselect.core.digests import encoder_hash, files_hash, model_hash, sae_hash
from hf_neuronselect.core.folders import DATA_FILE
from hf_neuronselect.core.options import NumberOptions, flag_words, options_of
from hf_neuronselect.hub.command import COMPUTED_BY, MODEL
from hf_neuronselect.hub.markdown import PLACE
from hf_neuronselect.methods import METHODS
from hf_neuronselect.models import loading
from hf_neuronselect.pipelines import select as pipeline
from hf_neuronselect.pipelines.extract import extract
from hf_neuronselect.pipelines.fit import fit
from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.selection.capability import Capability

OWN_TARGET = f"{CAPABILITY}{PLACE}"  # of exemplars without a name: the selection holds what was fitted on them
FILL_IN = re.compile(r"^- (.+?): `(.*?)`(?:, recorded with the hash (.+))?$", re.MULTILINE)


# ------------------------------------------------------------------------------------------- the files
def write_rows(path: Path, data: Dataset) -> None:
    """Rows whose columns ``messages``, ``turns`` and ``text`` say different things."""
    swapped = [chat(m[1]["content"], m[0]["content"]) for m in data["messages"]]
    texts = [m[1]["content"].upper() for m in data["messages"]]
    data.add_column("turns", swapped).add_column("text", texts).to_json(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("files")
    pool, first = rows(16), rows(4, seed=1)
    pool = Dataset.from_list([*pool, pool[5], *first.select([2])])  # a duplicate, and a row that is an exemplar
    write_rows(folder / "pool.jsonl", pool)
    write_rows(folder / "half.jsonl", pool.select(range(2, 9)))
    write_rows(folder / "t.jsonl", first)
    write_rows(folder / "u.jsonl", rows(4, seed=2))
    write_rows(folder / "many.jsonl", rows(120, seed=3))
    plain = [{"question": one[0]["content"], "answer": one[1]["content"]} for one in pool["messages"]]
    Dataset.from_list(plain).to_json(folder / "qa.jsonl")
    for name, texts in {"unspaced": ["北京很大", "京北在哪", "上海很大", "我爱北京"], "v": ["北京在哪"]}.items():
        Dataset.from_dict({"text": texts}).to_json(folder / f"{name}.jsonl")
    (folder / "model").symlink_to(tiny_folder / "model")
    (folder / "sae").symlink_to(tiny_folder / "sae" / "layers.2")
    tiny_model("llama", rms_norm_eps=0.1).save_pretrained(folder / "model-2")
    tiny_tokenizer().save_pretrained(folder / "model-2")
    write_sae(folder / "sae-2", 32, seed=1)
    tiny_model("olmoe").save_pretrained(folder / "moe")
    tiny_tokenizer().save_pretrained(folder / "moe")
    for seed, name in enumerate(("embedder", "embedder-2")):
        write_encoder(folder / name, seed=seed)
        write_mntp(folder / name.replace("embedder", "mntp"), folder / "model", seed)
    for seed, more in enumerate(("", "-2")):
        write_reward(folder / f"reward{more}", seed)
        write_unieval(folder / f"unieval{more}", seed)
    same = {"model": str(folder / "model"), "sae": str(folder / "sae")}
    extract(ExtractConfig(pool=str(folder / "pool.jsonl"), out=folder / "store", **same))
    for i, (name, k) in enumerate([("pool", 4), ("pool", 4), ("unspaced", 1)]):
        chosen = SelectConfig(pool=str(folder / f"{name}.jsonl"), method="random", seed=i, k=k, out=folder / f"picked-{i}",
                              **same)  # fmt: skip
        pipeline.select(chosen)
    targets = tuple(f"{name}={folder / f'{name}.jsonl'}" for name in "tu")
    fit(FitConfig(**same, target=targets[:1], method_option={"metric": "cosine"}, pooling="sum", out=folder / "cap"))
    fit(FitConfig(**same, target=targets, out=folder / "caps"))
    return folder


@pytest.fixture(scope="module")
def commits(hub: Hub, files: Path) -> dict[str, str]:
    """The first commits of a model, an SAE, an encoder and an adapter on the Hub; their newest have other weights."""
    found = {}
    for name, first in {LM: "model", SAE: "sae", ENCODER: "embedder", MNTP: "mntp"}.items():
        there = {path.relative_to(files / first): path for path in (files / first).rglob("*") if path.is_file()}
        found[name] = hub.add("models", name, {short.as_posix(): path.read_bytes() for short, path in there.items()})
        HfApi().upload_folder(repo_id=name, folder_path=files / f"{first}-2")
    return found


# --------------------------------------------------------------------------------------------- running
@dataclass
class Made:
    """A selection folder, read back."""

    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "selection.json").read_text())

    @property
    def card(self) -> str:
        return (self.folder / "README.md").read_text()

    @property
    def table(self) -> pa.Table:
        """Everything about scores that a stream knows, too."""
        return pq.read_table(self.folder / "scores.parquet").drop_columns(["rank"])

    @property
    def scores(self) -> pa.Table:
        return self.table.select([name for name in self.table.column_names if name.startswith("score")])

    @property
    def picks(self) -> list[int]:
        return pq.read_table(self.folder / DATA_FILE)["source_index"].to_pylist()

    @property
    def words(self) -> list[str]:
        """The card's command."""
        found = re.search(r"```bash\n(.*?)\n```", self.card, re.DOTALL)
        assert found is not None
        return shlex.split(found[1].replace(" \\\n", " "))  # as a shell joins lines

    def filled_in(self, known: Mapping[str, Path]) -> list[str]:
        """The card's command, with the names that it says must be replaced.

        Args:
            known: what the card calls a thing, or the hash it gives -> where it is.
        """
        words = self.words
        for what, word, hashed in FILL_IN.findall(self.card):
            path = str(known.get(what) or known[hashed])
            before = {"the capability": "capability:"}.get(what, "")
            for kind in ("exemplars of ", "the method's "):
                before = f"{what.removeprefix(kind)}=" if what.startswith(kind) else before
            places = [i for i, one in enumerate(words) if f"{one}:".startswith(f"{before}{word}:")]
            assert places, f"the command has no {word} for {what}"
            words[places[0]] = before + path + words[places[0]].removeprefix(before + word)
        return [f"{CAPABILITY}{self.folder}" if word == OWN_TARGET else word for word in words]


def run(*words: str) -> None:
    """The command line, in this process."""
    before, sys.argv = sys.argv, [*words]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = before
    assert not stop.value.code, words


Select = Callable[..., Made]


@pytest.fixture(scope="module")
def hashes(files: Path) -> dict[str, Path]:
    """Everything local by its hash, as cards give it."""
    found = {
        str(load_rows(str(path), streaming=streaming).about["commit"]): path  # rows; of a stream, its files' bytes
        for path in files.glob("*.jsonl")
        for streaming in (False, True)
    }
    found |= {
        f"content:{model_hash(files / name)}": files / name
        for kind in ("model", "moe", "mntp", "reward", "unieval", "embedder")
        for name in (kind, f"{kind}-2")
        if (files / name).is_dir()
    }
    found |= {f"content:{sae_hash(files / name)}": files / name for name in ("sae", "sae-2")}
    found |= {f"content:{encoder_hash(files / name)}": files / name for name in ("embedder", "embedder-2")}
    found |= {
        f"content:{files_hash(files / n, ('selection.json',))}": files / n for n in ("picked-0", "picked-1", "picked-2")
    }
    return found | {str(Capability.fetch(files / name).source.commit): files / name for name in ("cap", "caps")}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Made]]:
    """Selections made before, by their options."""
    return tmp_path_factory.mktemp("known"), {}


@pytest.fixture
def select(files: Path, known: tuple[Path, dict[str, Made]]) -> Select:
    """``neuronselect select`` with these options on the module's files, once; None removes one."""
    folder, made = known
    usual = {"pool": "{files}/pool.jsonl", "target": ("t={files}/t.jsonl",), "model": "{files}/model",
             "sae": "{files}/sae", "k": 4}  # fmt: skip

    def select(**options: Any) -> Made:
        values = {name: value for name, value in filled(usual | options, files).items() if value is not None}
        key = json.dumps(values, sort_keys=True)
        if key not in made:
            values.setdefault("out", folder / str(len(made)))
            run("neuronselect", "select", *flag_words(SelectConfig, values))
            made[key] = Made(Path(values["out"]))
        return made[key]

    return select


def run_again(made: Made, known: Mapping[str, Path], work: Path) -> Made:
    """Run the card's command: the same scores and picks, and the same command again."""
    work.mkdir(exist_ok=True)
    with chdir(work), without_reports():
        run(*made.filled_in(known))
    again = Made(work / "selected")
    assert again.table.equals(made.table) and again.picks == made.picks
    wanted = flags_in(made.words)
    if OWN_TARGET in made.words:  # the second target is a capability, whose options belong to it
        own = {word for option in options_of(NumberOptions).values() for word in option.flags}
        wanted = [flag for flag in wanted if flag not in own]
    assert flags_in(again.words) == wanted
    return again


def flags_in(words: list[str]) -> list[str]:
    return sorted(word for word in words if word.startswith("--"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pipeline hands on: its extractors, and the push, which goes nowhere."""
    found: dict[str, Any] = {"push": None}
    before = NeuronFeatureExtractor.from_options.__func__  # type: ignore[attr-defined]

    def from_options(cls: type, options: Any, *rest: Any, **more: Any) -> Any:
        found["options"] = options
        return before(cls, options, *rest, **more)

    def push_folder(folder: Path, repo: str, **options: Any) -> str:
        found["push"] = {"repo": repo, **options}
        return "url"

    monkeypatch.setattr(NeuronFeatureExtractor, "from_options", classmethod(from_options))
    monkeypatch.setattr(pipeline, "push_folder", push_folder)
    monkeypatch.setattr(pipeline, "check_write_access", lambda: "me")
    return found


@pytest.fixture
def plain_quantised(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Loads what should be quantised as it is (bitsandbytes is an extra); lists what was asked for."""
    asked: list[str] = []
    before = loading._from_files

    def load(spec: loading.ModelSpec, *rest: Any) -> Any:
        asked.append(str(spec.quantize))
        return before(dataclasses.replace(spec, quantize=None), *rest)

    monkeypatch.setattr(loading, "_from_files", load)
    yield asked


# --------------------------------------------------------------------------------------------- the walk
def test_every_option_has_a_line() -> None:
    assert set(LINES) == set(options_of(SelectConfig))
    moving = {name for name, line in LINES.items() if line.changes != "nothing"}
    assert moving == {name for name, option in options_of(SelectConfig).items() if option.moves}
    assert all(LINES[name].record and LINES[name].printed for name in moving)


def walk(name: str, files: Path, select: Select, commit: str = "") -> Made:
    """Set one option: it shows in scores or picks, in the record and in the command."""
    line = LINES[name]
    usual = select(**line.beside)
    made = select(**dict(line.beside) | {name: filled(line.value, files, commit)})
    if line.changes == "scores":
        assert not made.scores.equals(usual.scores)
    elif line.changes == "picks":
        assert made.picks != usual.picks
    elif line.changes == "identity":
        assert made.record["extractor"]["signals"] != usual.record["extractor"]["signals"]
    assert line.record is not None
    path, value = line.record
    found: Any = made.record
    for part in path.split("."):
        found = found[part]
    assert found == filled(value, files, commit)
    words, wanted = made.words, [filled(word, files, commit) for word in line.printed]
    assert any(words[i : i + len(wanted)] == wanted for i in range(len(words))), words
    assert str(files) not in made.card
    return made


LOCAL = [name for name, line in LINES.items() if line.changes != "nothing" and not line.hub]


@pytest.mark.parametrize("name", LOCAL)
def test_an_option_reaches_scores_record_and_command(
    name: str, files: Path, hashes: dict[str, Path], tmp_path: Path, select: Select, plain_quantised: list[str]
) -> None:
    run_again(walk(name, files, select), hashes, tmp_path / "again")
    if name == "quantize":
        assert "8bit" in plain_quantised


@pytest.mark.parametrize("name", [name for name, line in LINES.items() if line.hub])
def test_a_revision_reaches_scores_record_and_command(
    name: str, files: Path, hashes: dict[str, Path], tmp_path: Path, select: Select, commits: dict[str, str]
) -> None:
    run_again(walk(name, files, select, commits[LINES[name].hub]), hashes, tmp_path / "again")


@pytest.mark.parametrize("name", [name for name, line in LINES.items() if line.changes == "nothing"])
def test_an_option_that_moves_nothing(
    name: str, files: Path, hashes: dict[str, Path], tmp_path: Path, select: Select, seen: dict[str, Any]
) -> None:
    line = LINES[name]
    usual = select(**line.beside)
    value = filled(line.value, files)
    made = select(**dict(line.beside) | {name: value})
    assert made.table.equals(usual.table) and made.picks == usual.picks
    assert made.words == usual.words
    shows = {
        "device": lambda: seen["options"].device == value,
        "device_map": lambda: seen["options"].device_map == value,
        "batch_tokens": lambda: seen["options"].batch_tokens == value,
        "private": lambda: seen["push"]["private"] is True,
        "allow_public": lambda: seen["push"]["allow_public"] is True,
        "push_to_hub": lambda: seen["push"]["repo"] == value,
        "out": lambda: made.folder == Path(value),
        "features": lambda: any(one.get("reused") for one in made.record["cost"]["passes"].values()),
        "streaming": lambda: pq.read_table(made.folder / "scores.parquet")["rank"].null_count == 18 - 4,
        "messages": lambda: "messages" not in load_dataset(str(made.folder), split="train").column_names,
        "examples": lambda: "The best rows begin" in usual.card and "The best rows begin" not in made.card,
    }
    assert shows[name]()
    run_again(made, hashes, tmp_path / "again")


# ---------------------------------------------------------------------------------- methods' own options
ASKED = {"alpagasus"}  # a server: see methods/test_judge.py
OWN = [(name, option) for name in METHODS.names() if name not in ASKED for option in options_of(METHODS[name])]
VALUES = {("nait", "candidate"): "last", ("random", "seed"): 11, ("dsir", "min_words"): 15, ("zip-fit", "level"): 1,
          ("ifd", "ratio"): "ppl", ("igds", "measure"): "loss", ("igds", "tau"): 0.3, ("igds", "answer_tokens"): 4,
          ("subset", "rows"): "{files}/half.jsonl", ("matched-random", "selection"): "{files}/picked-1",
          ("matched-random", "seed"): 11, ("selectit", "model_2"): "{files}/model-2", ("selectit", "sizes"): "1 9 2",
          ("selectit", "model_3"): "{files}/model-2", ("deita", "quality_scorer"): "{files}/model-2",
          ("deita", "complexity_scorer"): "{files}/model", ("instruction-mining", "reward"): "{files}/reward-2",
          ("instruction-mining", "unieval"): "{files}/unieval-2", ("gist", "directions"): 1,
          ("less", "epochs"): 1, ("gist", "epochs"): 1,
          ("mates", "regressor"): "{files}/embedder-2", ("mates", "epochs"): 2,
          **{(name, option): value for name in ("less", "gist")
             for option, value in (("warm_up", 0.3), ("batch", 3), ("rate", 0.05))}}  # fmt: skip
# Options that a method cannot do without.
OF: dict[Any, dict[str, str]] = {
    "subset": {"rows": "{files}/pool.jsonl"},
    "matched-random": {"selection": "{files}/picked-0"},
    ("matched-random", "seed"): {"selection": "{files}/picked-2"},  # of rows of one length
    ("selectit", "model_3"): {"model_2": "{files}/moe"},
    ("selectit", "sizes"): {"model_2": "{files}/moe"},
    ("igds", "answer_tokens"): {"tau": "0"},  # few features make this model say a word of the exemplars
    "deita": {"quality_scorer": "{files}/model", "complexity_scorer": "{files}/model-2"},
    "instruction-mining": {"reward": "{files}/reward", "unieval": "{files}/unieval"},
    "less": {"warm_up": "0.5", "epochs": "2", "batch": "2", "rate": "0.01"},
    "gist": {"warm_up": "0.5", "epochs": "2", "batch": "2", "rate": "0.01"},
    "mates": {"regressor": "{files}/embedder", "probes": "10", "epochs": "1"},
}
NEEDS = {"routing": {"model": "{files}/moe", "sae": None}, "encoder": {"encoder": "{files}/embedder"},
         "llm2vec": {"mntp_adapter": "{files}/mntp"}}  # fmt: skip
BESIDE = {
    ("bm25", "unspaced"): {"pool": "{files}/unspaced.jsonl", "target": ("t={files}/v.jsonl",)},
    ("matched-random", "seed"): {"pool": "{files}/unspaced.jsonl"},
    ("instruction-mining", "version"): NEEDS["encoder"],
}


@pytest.mark.parametrize(("method", "option"), OWN)
def test_an_option_of_a_method(
    method: str, option: str, files: Path, hashes: dict[str, Path], tmp_path: Path, select: Select
) -> None:
    value = VALUES.get((method, option), other(options_of(METHODS[method])[option]))
    beside, own = BESIDE.get((method, option), {}), OF.get((method, option), OF.get(method, {}))
    usual = select(method=method, method_option=own, **beside)
    made = select(method=method, method_option=own | {option: value}, **beside)
    assert not made.scores.equals(usual.scores)
    value = Path(value).name if str(value).startswith("{files}") else value
    assert made.record["method"]["options"] == usual.record["method"]["options"] | {option: value}
    assert f"{option}={str(value).lower()}" in made.words
    run_again(made, hashes, tmp_path / "again")


@pytest.mark.parametrize("method", sorted({*METHODS.names()} - ASKED))
def test_every_methods_command_runs(method: str, hashes: dict[str, Path], tmp_path: Path, select: Select) -> None:
    own = {"method_option": OF[method]} if method in OF else {}
    run_again(select(method=method, **own, **NEEDS.get(method, {})), hashes, tmp_path / "again")


# ------------------------------------------------------------------------------------------- capabilities
@pytest.mark.parametrize(
    "options",
    [
        {"target": ("capability:{files}/cap",)},
        {"target": ("capability:{files}/cap",), "method": "longest", "max_length": 9},
        {"target": ("capability:{files}/cap",), "method": "random", "seed": 3},
        {"target": ("capability:{files}/caps",), "aggregate": "weighted", "weight": {"t": 2, "u": 1}},
        {"target": ("capability:{files}/caps",), "aggregate": "round_robin", "keep": ("leak", "duplicate")},
        {"target": ("t={files}/t.jsonl",), "aggregate": "weighted", "weight": {"t": 2}},
        {"target": ("t={files}/t.jsonl",), "aggregate": "mean"},
        {"target": ("t={files}/t.jsonl", "u={files}/u.jsonl"), "method": "longest"},
        {"target": None, "method": "longest", "k": None},
        {"pool": "{files}/qa.jsonl", "streaming": True, "method": "nait"},
    ],
)  # fmt: skip
def test_the_command_of_other_selections(
    options: dict[str, Any], hashes: dict[str, Path], tmp_path: Path, select: Select
) -> None:
    """Saved capabilities, also of controls; several targets; one target with options of several."""
    run_again(select(**options), hashes, tmp_path / "again")


def test_the_command_names_a_librarys_entry(
    files: Path, hashes: dict[str, Path], tmp_path: Path, select: Select
) -> None:
    library = {name: NeuronSelector.from_pretrained(files / name) for name in ("cap", "caps")}
    FeatureLibrary(library).save_pretrained(tmp_path / "library")
    made = select(target=(f"capability:{tmp_path / 'library'}:cap",))
    run_again(made, hashes | {"the capability": tmp_path / "library"}, tmp_path / "again")


# ------------------------------------------------------------------------------------------- from Python
@pytest.mark.parametrize("mapped", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("nait", {"site": "mlp"}),
        ("nait", {"drift": "mean"}),
        ("nait", {"drift": "per_token", "layer": 3}),
        ("mona", {"chat_template": TEMPLATE, "value_dtype": "float32"}),
        ("mona", {"columns": {"messages": "turns"}, "max_length": 9}),
        ("mona", {"row_format": "text"}),
    ],
)
def test_the_command_of_a_selection_made_in_python(
    method: str, options: dict[str, Any], mapped: bool, files: Path, hashes: dict[str, Path], tmp_path: Path
) -> None:
    extractor = NeuronFeatureExtractor.from_pretrained(
        str(files / "model"), sae=str(files / "sae"), features=[method], **options
    )
    pool, target = (
        load_dataset("json", data_files=str(files / f"{name}.jsonl"), split="train") for name in ("pool", "t")
    )
    if mapped:
        pool, target = pool.map(extractor, batched=True), target.map(extractor, batched=True)
    selector = NeuronSelector(method).fit({"t": target}, extractor=None if mapped else extractor)
    selector.select(pool, k=4).save_pretrained(tmp_path / "made")
    made = Made(tmp_path / "made")
    names = {"the pool": files / "pool.jsonl", "exemplars of t": files / "t.jsonl"}
    if mapped:  # the columns do not tell how they were computed, so the command must not pretend to know
        assert made.words[made.words.index("--model") + 1] == MODEL
        assert f"- {COMPUTED_BY}: `{MODEL}`, recorded with the hash {extractor.key(method)}" in made.card
        words = made.filled_in(hashes | names | {COMPUTED_BY: files / "model"})
        words += flag_words(SelectConfig, {"sae": files / "sae"} | options)
        with chdir(tmp_path):
            run(*words)
        assert Made(tmp_path / "selected").picks == made.picks
    else:
        run_again(made, hashes | names, tmp_path / "again")
