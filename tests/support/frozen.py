"""Freezes the numbers of many small selections, so that changed code can be compared with them to the bit.

``run OUT.npz [NAME ...]`` makes all selections (or those named) with the bundled model, SAE and data and writes their
scores and picks; ``compare A.npz B.npz`` says which arrays differ; ``goldens OUT.npz GOLDENS.json`` writes a short
extract for a test. One line in :data:`CASES` adds a selection. Numbers are equal to the bit between runs on one
machine with the same packages; between machines, expect the last digits (of bfloat16: the third) to differ.
"""

# ruff: noqa: E402 (the environment is set before anything reads it)
from __future__ import annotations

import os
import sys
import tempfile

if __name__ == "__main__":
    HOME = tempfile.TemporaryDirectory(prefix="hf_home_")  # removed when the process ends
    os.environ |= {
        "HF_HOME": HOME.name,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import shlex
import shutil
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Arrays = dict[str, np.ndarray]
Options = Mapping[str, Any]
Row = dict[str, Any]

ROWS_OF_A_SOURCE, EXEMPLARS, FORMAT_ROWS = 2, 5, 16
MOST_BYTES = 300
"""Longer rows of the pool are not taken, to save time, where a source has enough short ones."""
NEARLY = 2e-5
"""Scores that are no further apart than this part of themselves decide nothing."""
MAX_LENGTH = 256
"""Tokens kept of a row unless a selection says otherwise; one planted row is longer."""
THREE = ("gsm8k", "mbpp", "humaneval")
QUERIES = {"row_format": "qa", "columns": {"question": "query", "answer": "reply"}}
PLAIN_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n\n{% endfor %}"


# ----------------------------------------------------------------------------------------- package
def package() -> Path:
    """The package's folder."""
    spec = importlib.util.find_spec("hf_neuronselect")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def assets() -> Path:
    """The package's bundled files."""
    return package() / "assets"


def entry_point() -> importlib.metadata.EntryPoint:
    """The command; a checkout's own ``pyproject.toml`` is asked first, because another version may be installed."""
    group, name = "console_scripts", "neuronselect"
    project = package().parent / "pyproject.toml"
    if project.is_file():
        value = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["scripts"][name]
        return importlib.metadata.EntryPoint(name, value, group)
    return next(iter(importlib.metadata.entry_points(group=group, name=name)))


# -------------------------------------------------------------------------------------------- rows
def _chat(*turns: str, first: str = "user") -> list[Row]:
    roles = ("user", "assistant") if first == "user" else (first, "user", "assistant")
    return [{"role": roles[i % len(roles)], "content": turn} for i, turn in enumerate(turns)]


def _size(row: Row) -> int:
    return sum(len(turn["content"].encode()) for turn in row["messages"])


def _spread(rows: Sequence[Any], n: int) -> list[Any]:
    """``n`` of the rows, evenly spaced."""
    return [rows[i * len(rows) // n] for i in range(n)]


def exemplar_rows(target: str) -> list[Row]:
    """Some exemplars of a bundled target."""
    return _spread(pq.read_table(assets() / "demo" / "targets" / f"{target}.parquet").to_pylist(), EXEMPLARS)


def pool_rows() -> list[Row]:
    """Rows of every source of the demo pool, equally many and in its order, and rows that must be left out or cut."""
    rows = pq.read_table(assets() / "demo" / "pool.parquet").to_pylist()
    sources = sorted({row["source"] for row in rows})
    chosen: list[int] = []
    for source in sources:
        own = sorted((i for i, row in enumerate(rows) if row["source"] == source), key=lambda i: _size(rows[i]))
        short = [i for i in own if _size(rows[i]) <= MOST_BYTES]
        chosen += _spread(max(short, own[:ROWS_OF_A_SOURCE], key=len), ROWS_OF_A_SOURCE)
    found = [rows[i] for i in sorted(chosen)]
    for place, (name, messages) in enumerate(_planted(found, exemplar_rows("gsm8k"))):
        found.insert(7 + 4 * place, {"messages": messages, "source": "planted", "id": f"planted-{name}"})
    return found


def _planted(rows: Sequence[Row], exemplars: Sequence[Row]) -> list[tuple[str, list[Row] | None]]:
    texts = [turn["content"] for row in rows for turn in row["messages"]]
    long = "\n\n".join(texts[:20])
    ask, other = exemplars[0]["messages"][0]["content"], exemplars[1]["messages"][0]["content"]
    return [
        ("duplicate", rows[0]["messages"]),  # rows[0] is before it, rows[35] after it
        ("duplicate_ahead", rows[35]["messages"]),
        ("duplicate_again", rows[2]["messages"]),
        ("exemplar", exemplars[2]["messages"]),
        ("question", _chat(ask, "I do not know.")),
        ("question_inside", _chat(f"Solve this.\n\n{other}\n\nShow your work.", "I would rather not.")),
        ("empty", _chat("", "  ")),
        ("null", None),
        ("unknown_role", [{"role": "narrator", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]),
        ("long", _chat(long, texts[21])),
        ("no_answer", _chat(texts[30])),
        ("turns", _chat("Answer briefly.", texts[40], texts[41], first="system") + _chat(texts[42], texts[43])),
    ]


def _formats(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The same questions and answers in other row formats."""
    pairs = [tuple(turn["content"] for turn in row["messages"]) for row in rows]
    return {
        "queries.jsonl": [{"query": q, "reply": a} for q, a in pairs],
        "prompt.jsonl": [{"prompt": q, "completion": a} for q, a in pairs],
        "alpaca.jsonl": [
            {"instruction": q[: len(q) // 2], "input": q[len(q) // 2 :], "output": a, "system": "Be brief."}
            for q, a in pairs
        ],
        "sharegpt.jsonl": [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs
        ],
        "text.jsonl": [{"text": f"{q}\n{a}"} for q, a in pairs],
    }


# --------------------------------------------------------------------------------------------- lab
class Lab:
    """The folder that selections run in: rows, exemplars, and what several selections share, each made once."""

    def __init__(self, folder: Path) -> None:
        from datasets import Dataset

        self.folder = folder
        self._made: dict[str, Path] = {}
        self._mapped: dict[str, Any] = {}
        self._numbers = itertools.count()
        rows = pool_rows()
        self._data = {"pool.parquet": Dataset.from_list(rows)}
        plain = [row for row in rows if row["source"] != "planted"]
        for name, other in _formats(_spread(plain, FORMAT_ROWS)).items():
            self._data[name] = Dataset.from_list(other)
        for target in (*THREE, "tydiqa"):
            self._data[f"{target}.parquet"] = Dataset.from_list(exemplar_rows(target))
        asked = _formats(exemplar_rows("gsm8k"))["queries.jsonl"]
        self._data["queries.parquet"] = Dataset.from_list(asked)
        _write_moe(folder / "moe")
        for name, data in self._data.items():
            (data.to_parquet if name.endswith(".parquet") else data.to_json)(folder / name)

    def data(self, name: str) -> Any:
        """The rows of one of the files, as a ``Dataset``."""
        return self._data[name]

    def new(self, stem: str) -> Path:
        """A path that is not there yet."""
        return self.folder / f"{stem}_{next(self._numbers)}"

    def command(self, *words: str) -> None:
        """The command line, run in this process.

        Raises:
            RuntimeError: it ended with an error.
        """
        command, before, said = entry_point().load(), sys.argv, io.StringIO()
        sys.argv = ["neuronselect", *(word.replace("{lab}", str(self.folder)) for word in words)]
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                command()
        except SystemExit as end:
            if end.code:
                last = (said.getvalue().strip().splitlines() or ["nothing was said"])[-1]
                raise RuntimeError(f"neuronselect {words[0]}: {last}") from None
        finally:
            sys.argv = before

    def made(self, *words: str) -> Path:
        """The folder that ``extract`` or ``fit`` writes with these words; the same words, the same folder."""
        key = shlex.join(words)
        if key not in self._made:
            out = self.new(words[0])
            self.command(*words, "--out", str(out))
            self._made[key] = out
        return self._made[key]

    def extractor(self, features: Sequence[str], options: Options) -> Any:
        """An extractor of the bundled model and SAE."""
        from hf_neuronselect import NeuronFeatureExtractor

        options = {"device": "cpu", "max_length": MAX_LENGTH, "sae": str(assets() / "sae"), **options}
        return NeuronFeatureExtractor.from_pretrained(str(assets() / "model"), features=list(features), **options)

    def mapped(self, name: str, features: Sequence[str], options: Options) -> Any:
        """The rows of one of the files with feature columns."""
        key = f"{name} {features} {options}"
        if key not in self._mapped:
            extractor = self.extractor(features, options)
            self._mapped[key] = self.data(name).map(extractor, batched=True, batch_size=50, load_from_cache_file=False)
        return self._mapped[key]


def _write_moe(folder: Path) -> None:
    """A small mixture-of-experts model with the bundled tokenizer; always the same weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "olmoe", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=8192,
        num_key_value_heads=2, num_experts=6, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = np.random.default_rng(7)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            values = draw.normal(1.0 if parameter.ndim == 1 else 0.0, 0.15, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(assets() / "model" / name, folder)


# ------------------------------------------------------------------------------------------ arrays
COLUMNS = ("source_index", "score", "rank", "selected", "excluded", "n_tokens", "truncated")


def _array(column: pa.ChunkedArray) -> np.ndarray:
    """A column as int64 (null: -1), float64 (null: NaN), bool or text (null: empty)."""
    values, kind = column.to_pylist(), column.type
    if pa.types.is_boolean(kind):
        return np.asarray(values, dtype=bool)
    null: Any = -1 if pa.types.is_integer(kind) else np.nan if pa.types.is_floating(kind) else ""
    dtype = {int: np.int64, float: np.float64, str: np.str_}[type(null)]
    return np.asarray([null if value is None else value for value in values], dtype=dtype)


def _picked(rows: pa.Table) -> Arrays:
    """Of the selected rows: their numbers in the pool, the rows themselves (their ids), ranks and scores."""
    found = {"picked": _array(rows.column("source_index"))}
    for name in rows.column_names:
        if name == "id" or name.startswith(("neuron_score", "neuron_rank")):
            found[f"picked_{name.removeprefix('neuron_')}"] = _array(rows.column(name))
    return found


def _of_tables(scores: pa.Table, rows: pa.Table) -> Arrays:
    known = [name for name in scores.column_names if name in COLUMNS or name.startswith("score_")]
    return {name: _array(scores.column(name)) for name in known} | _picked(rows)


def _of_folder(folder: Path) -> Arrays:
    """What a selection folder holds."""
    files = sorted((folder / "data").glob("*.parquet"))
    return _of_tables(pq.read_table(folder / "scores.parquet"), pa.concat_tables([pq.read_table(f) for f in files]))


def _of_selection(selection: Any) -> Arrays:
    return _of_tables(selection.scores, selection.dataset.with_format("arrow")[:])


# -------------------------------------------------------------------------------------- selections
@dataclass(frozen=True)
class Command:
    """A selection by the command line.

    Args:
        words: of ``neuronselect select``; ``--k 12`` where they name no budget.
        options: of the extractor; ``extract`` and ``fit`` are given them too. ``{lab}`` is the lab's folder.
        targets: whose exemplars. pool: a file of the lab.
        store: methods extracted to a feature store beforehand, which is then read.
        capability: words of ``neuronselect fit``, which is given the exemplars instead.
        projected: the store holds each target's projections alone.
    """

    words: str = ""
    options: str = ""
    targets: Sequence[str] = ("gsm8k",)
    pool: str = "pool.parquet"
    store: str = ""
    capability: str = ""
    projected: bool = False

    def __call__(self, lab: Lab) -> Arrays:
        words, options = shlex.split(self.words), shlex.split(self.options)
        common = ["--device", "cpu", "--max-length", str(MAX_LENGTH), *options]  # of an option given twice, the last
        if not {"--k", "--ratio", "--threshold", "--max-tokens"} & {*words}:
            words += ["--k", "12"]
        exemplars = [f"--target={name}={{lab}}/{name}.parquet" for name in self.targets]
        given = exemplars
        if self.capability:
            fit = shlex.split(self.capability)
            given = [f"--target=capability:{lab.made('fit', *fit, *common, *exemplars)}"]
        pool = ["--pool", f"{{lab}}/{self.pool}"]
        if self.projected:
            fit = shlex.split(self.capability)
            alone = [f"--capability={lab.made('fit', *fit, *common, one)}" for one in exemplars]
            given += ["--features", str(lab.made("extract", *pool, *common, *alone, "--shard-rows", "50"))]
        elif self.store:
            extract = ["extract", *pool, *common, "--method", self.store, "--shard-rows", "50"]
            given = [*given, "--features", str(lab.made(*extract))]
        out = lab.new("selection")
        lab.command("select", *pool, *common, *given, *words, "--out", str(out))
        return _of_folder(out)


@dataclass(frozen=True)
class Call:
    """A selection by the Python interface.

    Args:
        method: with ``params`` its options. way: how the rows come in, one of :data:`WAYS`.
        options: of the extractor, which computes ``features`` (default: the method's name).
        budget: of ``select``, with its other keywords. again: the budget of a ``rethreshold`` afterwards.
        targets: whose exemplars. pool: a file of the lab.
    """

    method: str = "mona"
    way: str = "direct"
    params: Options = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    features: Sequence[str] = ()
    budget: Options = field(default_factory=lambda: {"k": 12})
    again: Options | None = None
    targets: Sequence[str] = ("gsm8k",)
    pool: str = "pool.parquet"

    def __call__(self, lab: Lab) -> Arrays:
        from hf_neuronselect import NeuronSelector

        selector = NeuronSelector(self.method, **self.params)
        if self.way.startswith("mapped"):  # then the selector has no model
            selector.fit({name: self.mapped(lab, f"{name}.parquet") for name in self.targets})
        else:
            extractor = lab.extractor(self.features or (self.method,), self.options)
            selector.fit({name: lab.data(f"{name}.parquet") for name in self.targets}, extractor=extractor)
        return WAYS[self.way](self, lab, selector)

    def mapped(self, lab: Lab, name: str) -> Any:
        return lab.mapped(name, self.features or (self.method,), self.options)


def _select(call: Call, selector: Any, pool: Any) -> Arrays:
    selection = selector.select(pool, **call.budget)
    return _of_selection(selection if call.again is None else selection.rethreshold(**call.again))


def _score(selector: Any, pool: Any) -> Arrays:
    rows = list(selector.score(pool))
    names = [name for name in rows[0] if name.startswith("neuron_score")]
    return {name.removeprefix("neuron_"): np.asarray([row[name] for row in rows], dtype=np.float64) for name in names}


def _above(call: Call, lab: Lab, selector: Any) -> Arrays:
    kept = call.mapped(lab, call.pool).filter(selector.above(**call.budget), batched=True, load_from_cache_file=False)
    return {"picked_id": np.asarray(kept["id"], dtype=np.str_)}


def _saved(call: Call, lab: Lab, selector: Any) -> Arrays:
    """By a capability that was saved and read again."""
    folder = lab.new("capability")
    selector.save_pretrained(folder)
    again = type(selector).from_pretrained(folder)
    extractor = lab.extractor((call.method,), call.options)
    return _of_selection(again.select(lab.data(call.pool), extractor=extractor, **call.budget))


def _reread(call: Call, lab: Lab, selector: Any) -> Arrays:
    """A selection that was saved and read again."""
    from hf_neuronselect import Selection

    folder = lab.new("selection")
    selector.select(lab.data(call.pool), **call.budget).save_pretrained(folder)
    return _of_selection(Selection.from_pretrained(folder))


WAYS: dict[str, Callable[[Call, Lab, Any], Arrays]] = {
    "direct": lambda call, lab, selector: _select(call, selector, lab.data(call.pool)),
    "stream": lambda call, lab, selector: _select(call, selector, lab.data(call.pool).to_iterable_dataset()),
    "mapped": lambda call, lab, selector: _select(call, selector, call.mapped(lab, call.pool)),
    "mapped_above": _above,
    "score": lambda call, lab, selector: _score(selector, lab.data(call.pool)),
    "score_stream": lambda call, lab, selector: _score(selector, lab.data(call.pool).to_iterable_dataset()),
    "score_mapped": lambda call, lab, selector: _score(selector, call.mapped(lab, call.pool)),
    "saved": _saved,
    "reread": _reread,
}

# A store of all features that one pass gives, where the way in is not what is frozen.
STORE = "mona,nait(reading=paper),polysemantic,hidden"
PAPER = "--method nait --method-option reading=paper"
MEAN = f"{PAPER} --method-option candidate=mean"
LAST = f"{PAPER} --method-option candidate=last --method-option normalize=true"

CASES: dict[str, Callable[[Lab], Arrays]] = {
    # Every method, in one pass over the pool.
    "mona": Command("--method mona"),
    "nait": Command(PAPER),
    "polysemantic": Command("--method polysemantic"),
    "hidden": Command("--method hidden"),
    "routing": Command("--method routing", options="--model {lab}/moe"),
    "random": Command("--method random"),
    "random.seed": Command("--method random --seed 3"),
    "random.no_target": Command("--method random --method-option seed=3", targets=()),
    "longest": Command("--method longest"),
    "shortest": Command("--method shortest --ratio 0.2"),
    "full": Command("--method full --ratio 1"),
    "defaults": Command("--ratio 0.05", options="--max-length 2048", targets=("tydiqa",)),
    # Methods' options.
    "mona.cosine": Command("--method mona --method-option metric=cosine", store=STORE),
    "mona.euclidean": Command("--method mona --method-option metric=euclidean", store=STORE),
    "polysemantic.cosine": Command("--method polysemantic --method-option metric=cosine", store=STORE),
    "polysemantic.euclidean": Command("--method polysemantic --method-option metric=euclidean", store=STORE),
    "content.nait": Command("--method nait"),
    "content.nait_last": Command("--method nait --method-option candidate=last"),
    "content.nait_mean": Command("--method nait --method-option candidate=mean"),
    "content.nait_answer": Command("--method nait --method-option ends=answer"),
    "content.projected": Command("--method nait", capability="--method nait", projected=True),
    "content.pooled": Command(options="--pool-tokens content"),
    "against_pool.nait_contrast": Command("--method nait-contrast"),
    "nag": Command("--method nag"),
    "rds_plus": Command("--method rds-plus"),
    "rds_plus.mean": Command("--method rds-plus --picker best-first"),
    "against_pool.mona": Command("--method mona --method-option centre=pool"),
    "against_pool.hidden": Command("--method hidden --method-option centre=pool"),
    "nait.mean": Command(MEAN),
    "nait.last": Command(f"{PAPER} --method-option candidate=last"),
    "nait.last.normalize": Command(LAST),
    "nait.normalize": Command(f"{PAPER} --method-option normalize=true", store=STORE),
    "nait.direction_mean": Command(f"{PAPER} --method-option direction=mean", store=STORE),
    "nait.normalize.direction_mean": Command(
        f"{PAPER} --method-option normalize=true --method-option direction=mean", store=STORE
    ),
    # Extraction options.
    "layer.hidden": Command("--method hidden", options="--layer 1"),
    "layer.polysemantic": Command("--method polysemantic", options="--layer -1"),
    "top_k_features.mona": Command("--method mona", options="--top-k-features 8"),
    "top_k_features.polysemantic": Command("--method polysemantic", options="--top-k-features 8"),
    "pool_tokens.no_special.mona": Command("--method mona", options="--pool-tokens no_special"),
    "pool_tokens.no_special.hidden": Command("--method hidden", options="--pool-tokens no_special"),
    "pool_tokens.assistant.mona": Command("--method mona", options="--pool-tokens assistant"),
    "pool_tokens.assistant.nait_mean": Command(MEAN, options="--pool-tokens assistant"),
    "pool_tokens.user.mona": Command("--method mona", options="--pool-tokens user"),
    "pool_tokens.user.polysemantic": Command("--method polysemantic", options="--pool-tokens user"),
    "pool_sum.mona": Call("mona", options={"pooling": "sum"}),
    "pool_sum.polysemantic": Call("polysemantic", options={"pooling": "sum"}),
    "site_mlp.nait": Call("nait", params={"reading": "paper"}, options={"site": "mlp"}, features=("nait_template",)),
    "site_mlp.nait_mean": Call(
        "nait",
        params={"reading": "paper", "candidate": "mean"},
        options={"site": "mlp"},
        features=("nait_template", "nait_mean"),
    ),
    "drift_mean.nait": Call(
        "nait", params={"reading": "paper"}, options={"drift": "mean"}, features=("nait_template",)
    ),
    "drift_per_token.nait": Call(
        "nait", params={"reading": "paper"}, options={"drift": "per_token"}, features=("nait_template",)
    ),
    "max_length.mona": Command("--method mona", options="--max-length 48"),
    "max_length.nait": Command(PAPER, options="--max-length 48"),
    "truncation_left.mona": Call("mona", options={"max_length": 48, "truncation_side": "left"}),
    "truncation_left.nait": Call(
        "nait",
        params={"reading": "paper"},
        options={"max_length": 48, "truncation_side": "left"},
        features=("nait_template",),
    ),
    "value_dtype.mona": Command("--method mona", options="--value-dtype float32"),
    "value_dtype.mona.store": Command("--method mona", options="--value-dtype float32", store="mona,polysemantic"),
    "value_dtype.polysemantic.store": Command(
        "--method polysemantic", options="--value-dtype float32", store="mona,polysemantic"
    ),
    "chat_template.mona": Call("mona", options={"chat_template": PLAIN_TEMPLATE}),
    "chat_template.nait": Call(
        "nait", params={"reading": "paper"}, options={"chat_template": PLAIN_TEMPLATE}, features=("nait_template",)
    ),
    "dtype_bfloat16.mona": Command("--method mona", options="--dtype bfloat16"),
    "dtype_bfloat16.nait": Command(PAPER, options="--dtype bfloat16"),
    "batch_tokens.mona": Command("--method mona", options="--batch-tokens 300"),
    # Row formats.
    "format.prompt": Command("--method mona", pool="prompt.jsonl"),
    "format.alpaca": Command("--method mona", pool="alpaca.jsonl"),
    "format.sharegpt": Command("--method mona", pool="sharegpt.jsonl"),
    "format.text": Command("--method mona", pool="text.jsonl"),
    "format.qa": Call("mona", pool="queries.jsonl", targets=("queries",), options=QUERIES),
    # Ways in.
    "store.mona": Command("--method mona", store=STORE),
    "store.nait": Command(PAPER, store=STORE),
    "store.polysemantic": Command("--method polysemantic", store=STORE),
    "store.hidden": Command("--method hidden", store=STORE),
    "store.routing": Command("--method routing", options="--model {lab}/moe", store="routing"),
    "stream.mona": Command("--method mona --streaming"),
    "stream.nait": Command(f"{PAPER} --streaming"),
    "stream.threshold": Command("--method mona --streaming --threshold 0.3"),
    "stream.several": Command("--method mona --streaming --aggregate round_robin", targets=THREE),
    "stream.python": Call("hidden", way="stream"),
    "mapped.mona": Call("mona", way="mapped"),
    "mapped.nait": Call("nait", params={"reading": "paper"}, way="mapped", features=("nait_template",)),
    "mapped.nait_last": Call(
        "nait",
        way="mapped",
        params={"reading": "paper", "candidate": "last"},
        features=("nait_template", "nait_template_last"),
    ),
    "mapped.polysemantic": Call("polysemantic", way="mapped"),
    "mapped.hidden": Call("hidden", way="mapped"),
    "mapped.above": Call("mona", way="mapped_above", budget={"threshold": 0.3}),
    "score.mona": Call("mona", way="score"),
    "score.nait": Call("nait", params={"reading": "paper"}, way="score", features=("nait_template",)),
    "score.several": Call("mona", way="score", targets=THREE),
    "score.stream": Call("mona", way="score_stream"),
    "score.mapped": Call("hidden", way="score_mapped"),
    "score.stream.several": Call("hidden", way="score_stream", targets=THREE),
    "saved.mona": Call("mona", way="saved"),
    "saved.nait": Call(
        "nait", way="saved", params={"reading": "paper", "normalize": True}, features=("nait_template",)
    ),
    "reread.hidden": Call("hidden", way="reread"),
    "capability.mona": Command("--method mona", capability="--method mona", store=STORE),
    "capability.nait": Command(PAPER, capability=PAPER, store=STORE),
    "capability.hidden": Command("--method hidden", capability="--method hidden", targets=THREE),
    "projected.nait": Command(PAPER, capability=PAPER, projected=True),
    "projected.nait_mean": Command(PAPER, capability=MEAN, projected=True),
    "projected.nait_last": Command(PAPER, capability=LAST, projected=True),
    "projected.several": Command(PAPER, capability=PAPER, projected=True, targets=THREE),
    # Several targets.
    "several.quota": Command("--method mona", targets=THREE, store=STORE),
    "several.round_robin": Command("--method mona --aggregate round_robin", targets=THREE, store=STORE),
    "several.mean": Command("--method mona --aggregate mean", targets=THREE, store=STORE),
    "several.max": Command("--method mona --aggregate max", targets=THREE, store=STORE),
    "several.weighted": Command(
        "--method mona --aggregate weighted --weight gsm8k=1 --weight mbpp=2.5 --weight humaneval=0",
        targets=THREE,
        store=STORE,
    ),
    "several.quota.ratio": Command(f"{PAPER} --ratio 0.25", targets=THREE, store=STORE),
    "several.quota.max_tokens": Command("--method hidden --max-tokens 1500", targets=THREE, store=STORE),
    "several.max.max_tokens": Command("--method mona --aggregate max --max-tokens 1500", targets=THREE, store=STORE),
    # Budgets, and what is left out.
    "budget.ratio": Command("--method mona --ratio 0.3", store=STORE),
    "budget.k": Command("--method mona --k 1", store=STORE),
    "budget.all": Command("--method mona --k 1000", store=STORE),
    "budget.threshold": Command("--method mona --threshold 0.3", store=STORE),
    "budget.max_tokens": Command("--method mona --max-tokens 2000", store=STORE),
    "keep.duplicate": Command("--method mona --keep duplicate --k 1000", store=STORE),
    "keep.leak": Command("--method mona --keep leak --k 1000", store=STORE),
    "keep.both": Command(f"{PAPER} --keep leak --keep duplicate --k 1000", store=STORE),
    "rethreshold.k": Call("hidden", again={"k": 30}),
    "rethreshold.ratio": Call("hidden", way="mapped", again={"ratio": 0.2}),
    "rethreshold.threshold": Call("hidden", way="mapped", again={"threshold": 0.9}),
    "rethreshold.max_tokens": Call("hidden", way="mapped", again={"max_tokens": 1000}),
    "rethreshold.several": Call(
        "mona", way="mapped", targets=THREE, budget={"k": 9, "aggregate": "mean"}, again={"ratio": 0.2}
    ),
}


# --------------------------------------------------------------------------------- run and compare
def run(
    names: Sequence[str] | None = None, failures: dict[str, Exception] | None = None, lab: Lab | None = None
) -> Arrays:
    """All selections, or those named: ``<selection>/<column>`` to its numbers; a line for each goes to stderr.

    Args:
        failures: where it is given, a selection that fails is put there and the others go on.
        lab: where the selections are made, with what earlier ones have left for others; default a new one.

    Raises:
        KeyError: no selection has that name.
        Exception: whatever a selection raises; its name is added.
    """
    chosen = list(CASES if names is None else names)
    if unknown := [name for name in chosen if name not in CASES]:
        raise KeyError(f"no selection {', '.join(unknown)}; there are {', '.join(CASES)}")
    arrays: Arrays = {}
    with tempfile.TemporaryDirectory(prefix="frozen_") as folder, _one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lab = lab or Lab(Path(folder))
        for name in chosen:
            started = time.perf_counter()
            try:
                found = CASES[name](lab)
            except Exception as error:
                error.add_note(f"in the frozen selection {name}")
                if failures is None:
                    raise
                failures[name] = error
                found = {}
            arrays |= {f"{name}/{column}": values for column, values in found.items()}
            said = f"{type(failures[name]).__name__}: {failures[name]}" if failures and name in failures else ""
            sys.stderr.write(f"{name:32} {time.perf_counter() - started:6.2f} s {said}\n")
    return arrays


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _unequal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which elements are not the same to the bit; NaN equals NaN."""
    if a.dtype.kind != "f":
        return a != b
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return (a.view(bits) != b.view(bits)) & ~(np.isnan(a) & np.isnan(b))


def _difference(a: np.ndarray | None, b: np.ndarray | None) -> str:
    """How two arrays differ, in words; empty where they do not."""
    if a is None or b is None:
        return f"only in the {'second' if a is None else 'first'} file"
    if a.shape != b.shape or a.dtype.kind != b.dtype.kind:
        return f"{a.dtype.kind}{list(a.shape)} is not {b.dtype.kind}{list(b.shape)}"
    if a.dtype != b.dtype and a.dtype.kind != "U":
        return f"{a.dtype} is not {b.dtype}"
    if not (unequal := _unequal(a, b)).any():
        return ""
    words = f"{int(unequal.sum())} of {a.size} elements differ"
    if a.dtype.kind in "fi":
        apart = np.abs(a[unequal].astype(np.float64) - b[unequal].astype(np.float64))
        numbers = apart[~np.isnan(apart)]
        words += f", largest absolute difference {numbers.max():.3g}" if len(numbers) else ""
        words += f", {len(apart) - len(numbers)} are NaN in one of them" if len(numbers) < len(apart) else ""
    return words


def compare(first: Arrays, second: Arrays) -> list[str]:
    """One line for each array that differs."""
    differences = {name: _difference(first.get(name), second.get(name)) for name in {**first, **second}}
    picks = ("/picked", "/picked_id")
    moved = {name.split("/")[0] for name, words in differences.items() if words and name.endswith(picks)}
    lines = []
    for name, words in differences.items():
        if words:
            same = name.split("/")[0] not in moved
            lines.append(f"{name}: {words}; {'picks are the same' if same else 'picks differ'}")
    return lines


def _settled(picked: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Picks in their order, neighbours of nearly equal scores by their numbers: their order may be another processor's."""
    if len(picked) < 2:
        return picked
    own = scores[picked]
    apart = ~(np.abs(np.diff(own)) <= NEARLY * np.abs(own[:-1]))  # NaN is apart from anything
    group = np.concatenate([[0], np.cumsum(apart)])
    return picked[np.lexsort((picked, group))]


def golden(arrays: Arrays) -> dict[str, dict[str, list[Any]]]:
    """A short extract: of each selection the first 20 picks, and every 7th score from the first on, 6 digits each."""
    found: dict[str, dict[str, list[Any]]] = {}
    for name, values in arrays.items():
        selection, column = name.split("/")
        if column in ("picked", "picked_id"):
            scores = arrays.get(f"{selection}/score") if column == "picked" else None
            first = values if scores is None else _settled(values, scores)
            found.setdefault(selection, {})[column] = first[:20].tolist()
        elif column == "score" or column.startswith("score_"):
            rounded = [None if np.isnan(value) else float(f"{value:.6g}") for value in values[::7]]
            found.setdefault(selection, {})[column] = rounded
    for content in found.values():
        if "picked" in content:
            content.pop("picked_id", None)
    return found


def _json(content: Mapping[str, Any]) -> str:
    """A line for each selection."""
    lines = (f"{json.dumps(name)}: {json.dumps(content[name], ensure_ascii=False)}" for name in content)
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, places in {"run": ("out",), "compare": ("first", "second"), "goldens": ("arrays", "out")}.items():
        one = commands.add_parser(name)
        for place in places:
            one.add_argument(place, type=Path)
        if name == "run":
            one.add_argument("names", nargs="*", metavar="NAME", help="Selections; default all.")
    given = parser.parse_args()
    if given.command == "compare":
        first, second = read(given.first), read(given.second)
        lines = compare(first, second)
        sys.stdout.write("\n".join(lines or [f"{len(first)} arrays are equal to the bit"]) + "\n")
        return int(bool(lines))
    if given.command == "goldens":
        given.out.write_text(_json(golden(read(given.arrays))), encoding="utf-8")
        return 0
    started, failures = time.perf_counter(), dict[str, Exception]()
    arrays = run(given.names or None, failures)
    write(given.out, arrays)
    selections = len({name.split("/")[0] for name in arrays})
    sys.stderr.write(f"{selections} selections in {time.perf_counter() - started:.0f} s, {len(failures)} failed\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
