"""Cards: valid metadata, one part of the package's own, nothing that a text can break, and a command that runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from hub import Hub
from hub import card as as_the_hub_reads_it
from huggingface_hub import DatasetCard, HfApi, ModelCard, RepoCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tiny import chat, rows
from versions import before

from hf_neuronselect import FeatureLibrary, NeuronFeatureExtractor, NeuronSelector, Selection
from hf_neuronselect.cli import main as cli
from hf_neuronselect.core import bundled
from hf_neuronselect.core.digests import model_hash, sae_hash
from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.core.folders import DATA_FILE
from hf_neuronselect.core.provenance import (
    CapabilityRecord,
    EvaluationRow,
    MethodRecord,
    Provenance,
    SelectionSummary,
    SourceRecord,
    TargetRecord,
    TrainingRecord,
)
from hf_neuronselect.hub import cards
from hf_neuronselect.hub.cards import (
    AdapterCard,
    CapabilityCard,
    CardTemplate,
    LibraryCard,
    SelectionCard,
    write_card,
)
from hf_neuronselect.hub.command import select_command
from hf_neuronselect.hub.markdown import BEGIN, END, PLACE, cell, fenced, merge_card
from hf_neuronselect.hub.push import push_folder
from hf_neuronselect.metrics import METRICS, metric_path
from hf_neuronselect.training.sft import write_record

NUMBERS = count()
OWN_HEAD = "---\nlicense: cc-by-4.0\ntags:\n- mine\npretty_name: My rows\nextra: 1\n---\n"
OWN_TEXT = "# My title\n\nRead this first: a---b.\n"
EVALUATION = tuple(
    EvaluationRow(model=model, data=data, metric=metric, value=value)
    for model, data, metric, value in (
        ("base", "gsm8k", "target_loss", 2.5),
        ("tuned", "gsm8k", "target_loss", 1.25),
        ("tuned", "gsm8k", "exact match", 0.125),
        ("tuned", "my rows/dev", "target_loss", 1.75),
    )
)
RECORD = TrainingRecord(
    name="tuned",
    base_model=SourceRecord(id="me/base", commit="0" * 40),
    selection=SelectionSummary(
        repo_id="me/rows",
        method=MethodRecord(name="mona"),
        targets={"gsm8k": TargetRecord()},
        pool=SourceRecord(id="me/pool"),
    ),
    hyperparameters={"LoRA r": 8, "learning_rate": 2e-4, "packing": False},
    results={"rows": 40, "steps": 5, "answer_tokens": 900, "seconds": 1.5},
    losses=((1, 2.0), (5, 1.5)),
    evaluation=EVALUATION,
    packages={"trl": "1.16.0"},
)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"me/{request.node.originalname.removeprefix('test_')}-{next(NUMBERS)}"


@pytest.fixture
def clean(hub: Hub) -> Iterator[Hub]:
    yield hub
    assert hub.unknown == [] and hub.faults == []


@pytest.fixture(scope="module")
def selector(extractor: NeuronFeatureExtractor, target: Dataset) -> NeuronSelector:
    sources = {
        "math": SourceRecord(id="math.jsonl", commit="content:0"),
        "code": SourceRecord(id="me/code", commit="1" * 40, split="train"),
    }
    exemplars = {"math": target, "code": rows(5, seed=2)}
    return NeuronSelector("mona").fit(exemplars, extractor=extractor, sources=sources)


@pytest.fixture(scope="module")
def selection(selector: NeuronSelector, pool: Dataset) -> Selection:
    source = SourceRecord(id="me/pool", commit="0" * 40, config="main", split="dev", license="mit")
    return selector.select(pool, k=9, exclude=["leak"], source=source)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, selection: Selection, selector: NeuronSelector
) -> dict[str, Path]:
    """A folder of each kind that has a card."""
    root = tmp_path_factory.mktemp("cards")
    selection.save_pretrained(root / "selection")
    selector.save_pretrained(root / "capability")
    FeatureLibrary({"all": selector, "again": selector}).save_pretrained(root / "library")
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text("{}")
    write_record(root / "adapter", RECORD)
    return {path.name: path for path in root.iterdir()} | {f"metric {name}": metric_path(name) for name in METRICS}


KINDS = ("selection", "capability", "library", "adapter")


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def few(seed: int = 0, **pool_about: Any) -> Selection:
    return NeuronSelector("random", seed=seed).select(rows(20), k=3, source=SourceRecord(**pool_about))


def once(text: str) -> bool:
    """One part of the package's own, closed; the head's values may say anything."""
    text = text.split("\n---\n", 1)[1]
    return text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)


# -- the head


@pytest.mark.parametrize("kind", [*KINDS, *(f"metric {name}" for name in METRICS)])
def test_the_head_is_valid(clean: Hub, folders: dict[str, Path], kind: str) -> None:
    text = text_of(folders[kind])
    data, errors, warnings = as_the_hub_reads_it(text)
    assert errors == [] and warnings == [] and "neuronselect" in data["tags"]
    repo_type = "dataset" if kind == "selection" else "space" if kind.startswith("metric") else "model"
    read = {"dataset": DatasetCard, "space": RepoCard, "model": ModelCard}[repo_type](text)
    if not before("huggingface_hub", "2.2"):  # it asks the public Hub, whatever the endpoint
        start = len(clean.requests)
        read.validate(repo_type=repo_type)
        assert clean.requests[start:] == ["POST /api/validate-yaml"]
    if kind in KINDS:
        assert once(text)
        assert read.data.to_dict() == data


def test_what_the_heads_say(folders: dict[str, Path]) -> None:
    data = DatasetCard(text_of(folders["selection"])).data
    assert data.license == "mit" and data.source_datasets == ["me/pool"]
    assert data.tags == ["neuronselect", "neuronselect-mona"]
    assert [config["config_name"] for config in data.configs] == ["default", "scores"]
    data = ModelCard(text_of(folders["library"])).data
    assert data.library_name == "hf_neuronselect" and data.license is None and "neuronselect-library" in data.tags
    assert "| all | mona |" in text_of(folders["library"])


def test_the_adapters_numbers_are_its_model_index(folders: dict[str, Path]) -> None:
    text = text_of(folders["adapter"])
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.library_name) == ("me/base", ["me/rows"], "peft")
    assert data.model_name == "tuned" and data.license is None
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    assert found == {(row.data, row.metric): row.value for row in EVALUATION if row.model == "tuned"}
    assert "| base |  | 2.5000 |  |" in text and "| tuned | 0.1250 | 1.2500 | 1.7500 |" in text
    assert "No licence is claimed for this adapter." in text


@pytest.mark.parametrize(("license", "said"), [
    ("mit", "The pool states `mit`; it holds for these rows."),
    (None, "The pool states no licence. Look at where its rows come from before you use them."),
])  # fmt: skip
def test_a_licence_is_stated_or_not_claimed(license: str | None, said: str, tmp_path: Path) -> None:
    few(id="me/pool", commit="0" * 40, license=license).save_pretrained(tmp_path / "s")
    text = text_of(tmp_path / "s")
    assert DatasetCard(text).data.get("license") == license and said in text


# -- a text of its own


@pytest.mark.parametrize("kind", KINDS)
def test_own_text_outlives_a_rewrite(folders: dict[str, Path], kind: str, tmp_path: Path, selection: Selection,
                                     selector: NeuronSelector) -> None:  # fmt: skip
    def write() -> None:
        if kind == "selection":
            selection.save_pretrained(tmp_path)
        elif kind == "capability":
            selector.save_pretrained(tmp_path)
        elif kind == "library":
            FeatureLibrary({"all": selector}).save_pretrained(tmp_path)
        else:
            write_record(tmp_path, RECORD)

    write()
    first = text_of(tmp_path)
    write()
    assert text_of(tmp_path) == first  # nothing of its own: nothing changes
    head, body = first.removeprefix("---\n").split("---\n", 1)
    head = head.replace("tags:\n", "tags:\n- mine\n").replace("license: mit\n", "")
    text = f"---\nlicense: cc-by-4.0\nextra: 1\n{head}---\n{OWN_TEXT}{body}\nMore of mine.\n"
    (tmp_path / "README.md").write_text(text.replace("# ", "# Old ", 1))
    write()
    again = text_of(tmp_path)
    data = RepoCard(again).data.to_dict()
    assert once(again) and data["license"] == "cc-by-4.0" and data["extra"] == 1
    assert set(data["tags"]) == {*RepoCard(first).data.tags, "mine"}
    assert again.count("Read this first") == again.count("More of mine") == 1
    assert again.index("Read this first") < again.index(BEGIN) < again.index(END) < again.index("More of mine")
    assert first[first.index(BEGIN) : first.index(END)] in again
    write()
    assert text_of(tmp_path) == again


def test_own_text_of_a_repository_outlives_pushes(clean: Hub, name: str) -> None:
    clean.add("datasets", name, {"README.md": f"{OWN_HEAD}{OWN_TEXT}".encode()})
    for seed in (0, 1):
        few(seed).push_to_hub(name)
        text = clean.files("datasets", name)["README.md"].decode()
        data = DatasetCard(text).data
        assert once(text) and text.count("Read this first: a---b.") == 1
        assert (data.license, data.pretty_name, data.extra) == ("cc-by-4.0", "My rows", 1)
        assert set(data.tags) == {"mine", "neuronselect", "neuronselect-random"}
        assert len(load_dataset(name, split="train")) == 3
    assert f"seed={1}" in text and "seed=0" not in text
    assert len(clean.history("datasets", name)) == 4


def test_windows_line_ends_and_no_head(clean: Hub, name: str, tmp_path: Path) -> None:
    for i, own in enumerate((f"{OWN_HEAD}{OWN_TEXT}".replace("\n", "\r\n").encode(), OWN_TEXT.encode(), b"")):
        clean.add("datasets", f"{name}-{i}", {"README.md": own})
        few().push_to_hub(f"{name}-{i}")
        text = clean.files("datasets", f"{name}-{i}")["README.md"].decode()
        assert once(text) and text.startswith("---\n") and text.count("\n---\n") == 1
        assert ("Read this first" in text) == bool(own) and "configs" in DatasetCard(text).data
        assert DatasetCard(text).data.license == ("cc-by-4.0" if i == 0 else None)


def test_dashes_in_a_value_do_not_end_the_head(tmp_path: Path) -> None:
    few().save_pretrained(tmp_path / "s")
    readme = tmp_path / "s" / "README.md"
    readme.write_text("---\npretty_name: before --- after\nlicense: mit\n---\n# Mine\n")
    few().save_pretrained(tmp_path / "s")
    data = DatasetCard(text_of(tmp_path / "s")).data
    assert (data.pretty_name, data.license) == ("before --- after", "mit")


def test_a_byte_order_mark_hides_no_head(tmp_path: Path) -> None:
    few().save_pretrained(tmp_path / "s")
    (tmp_path / "s" / "README.md").write_text(OWN_HEAD + OWN_TEXT, encoding="utf-8-sig")
    few().save_pretrained(tmp_path / "s")
    text = text_of(tmp_path / "s")
    assert DatasetCard(text).data.license == "cc-by-4.0" and text.count("license:") == 1


def test_the_packages_own_metadata_is_not_kept(clean: Hub, name: str) -> None:
    """Rows of another pool do not stay under the first one's licence, source and method."""
    few(id="me/pool", commit="0" * 40, license="mit").push_to_hub(name)
    NeuronSelector("full").select(rows(20), source=SourceRecord(id="local.jsonl")).push_to_hub(name)
    text = clean.files("datasets", name)["README.md"].decode()
    assert "The pool states no licence." in text
    data = DatasetCard(text).data.to_dict()
    assert "license" not in data and "source_datasets" not in data and "neuronselect-random" not in data["tags"]


def test_the_last_adapters_numbers_are_not_kept(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    write_record(tmp_path, replace(RECORD, evaluation=(), selection=None, base_model=SourceRecord(id="local")))
    data = RepoCard(text_of(tmp_path)).data.to_dict()
    assert "model-index" not in data and "datasets" not in data and "base_model" not in data


def test_own_text_of_the_folder_is_pushed(clean: Hub, name: str, tmp_path: Path) -> None:
    few().save_pretrained(tmp_path / "s")
    push_folder(tmp_path / "s", name)
    readme = tmp_path / "s" / "README.md"
    readme.write_text(text_of(tmp_path / "s") + "\n## My notes\n\nUse them well.\n")
    push_folder(tmp_path / "s", name, commit_message="notes")
    text = clean.files("datasets", name)["README.md"].decode()
    assert once(text) and text.count("Use them well.") == 1
    assert [commit.title for commit in clean.history("datasets", name)][:1] == ["notes"]


BROKEN = ("---\nlicense: [\n---\n# Mine\n", "---\na: b: c\n---\n", "---\n\tx: 1\n---\n")


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_head_is_said_and_left(clean: Hub, name: str, text: str, tmp_path: Path) -> None:
    few().save_pretrained(tmp_path / "s")
    (tmp_path / "s" / "README.md").write_text(text)
    with pytest.raises(NeuronSelectError, match="its YAML head cannot be read .*; mend it or remove it") as caught:
        few().save_pretrained(tmp_path / "s")
    assert caught.value.option == "README.md" and "\n" not in str(caught.value)
    assert text_of(tmp_path / "s") == text
    clean.add("datasets", name, {"README.md": text.encode()})
    with pytest.raises(NeuronSelectError, match="its YAML head cannot be read"):
        few().push_to_hub(name)
    assert clean.files("datasets", name)["README.md"].decode() == text
    assert len(clean.history("datasets", name)) == 2


@pytest.mark.parametrize(
    "text", ["---\nlicense: 3\n---\n", "---\nlanguage: no\n---\n", "---\ntags: x\nlicense: {}\n---\n"]
)
def test_metadata_that_the_hub_refuses(clean: Hub, name: str, text: str) -> None:
    clean.add("datasets", name, {"README.md": text.encode()})
    with pytest.raises(NeuronSelectError, match="README.md") as caught:
        few().push_to_hub(name)
    assert caught.value.as_command_line().isprintable() and "must be" in str(caught.value)
    assert len(clean.history("datasets", name)) == 2


@pytest.mark.parametrize("where", ["folder", "repository"])
def test_a_readme_that_is_no_text(clean: Hub, name: str, where: str, tmp_path: Path) -> None:
    clean.add("datasets", name, {"README.md": b"\xff\xfe\x00"})
    few().save_pretrained(tmp_path / "s")
    (tmp_path / "s" / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NeuronSelectError) as caught:
        if where == "folder":
            few().save_pretrained(tmp_path / "s")
        else:
            few().push_to_hub(name)
    assert caught.value.option == "README.md"


# -- hostile text

VISIBLE = (
    "`", "```", "````", "~~~", "---", BEGIN, END, "<!--", "-->", "</script>", "<script>alert(1)", "{{ x }}", "{% raw %}",
    "{% endraw %}", "{#", "|", "\\", "\\|", "\\[x](http://e)", "[x](http://e)", "![x](y)", "*b*", "<b>", "&lt;", "&#x3c;",
    "# H", "=", "- a", "1. x", "> q", "    code", "x" * 3000, "'", '"', "$(x)", "$HOME", " --out x", "%", ": ", "&a", "*a", "?",
    "!!python/object:x", "http://e.org", "<http://e.org>",
)  # fmt: skip
CONTROL = (
    "\n---\n", "\n```\n", "\n# H\n", "\n===\n", "a\\\n b", "\t", "\r\n", "\r", "\v", "\x1b[31m", "\x07", "\x85", "\u2028",
    "\u202e", "\u200f", "\u2066", "\ufeff", "\0", "<!\u200b--",
)  # fmt: skip
hostile = st.lists(st.sampled_from(VISIBLE + CONTROL) | st.text(max_size=6), max_size=5).map(
    lambda t: "".join([*t, "e"])
)
# Names of files and the like, as a shell takes them.
seen = st.text(st.characters(exclude_categories=("C", "Z")), max_size=6)
names = st.lists(st.sampled_from(VISIBLE) | seen, max_size=5).map(lambda texts: "".join([*texts, "e"]))
# For values of a head: PyYAML itself writes these three so that it reads plain line ends.
values = hostile.map(lambda text: re.sub("[\x85\u2028\u2029]", "", text))
MARKDOWN = MarkdownIt("commonmark").enable("table")
PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def structure(text: str) -> list[tuple[str, str]]:
    """Blocks of a card's text as a Markdown reader sees them, and that none of them has markup from outside."""
    tokens = MARKDOWN.parse(text.split("\n---\n", 1)[1])
    found = []
    for token in tokens:
        for child in token.children or []:
            assert child.type not in ("html_inline", "link_open", "image"), token.content
        if token.type == "html_block":
            assert token.content.strip() in (BEGIN, END)
        found.append((token.type, token.tag + (token.info if token.type == "fence" else "")))
    return found


def check(card: CardTemplate, like: CardTemplate) -> str:
    """A card of hostile values is read as the same card of tame ones."""
    text = card.render()
    assert once(text) and "\0" not in text
    assert all(c.isprintable() or c in "\n\t" for c in text.split("\n---\n", 1)[1])
    data = RepoCard(text, ignore_metadata_errors=False).data
    assert data.to_dict() == card.to_dict() == as_the_hub_reads_it(text)[0]
    assert as_the_hub_reads_it(text)[1] == []
    assert structure(text) == structure(like.render())
    # Written again, over itself and over a text of its own.
    assert merge_card(text, text) == text
    own = merge_card(OWN_HEAD + OWN_TEXT, text)
    assert once(own) and own.count("Read this first") == 1
    merged = RepoCard(own).data.to_dict()
    assert merged["tags"] == [*card.to_dict()["tags"], "mine"] and merged["license"] == "cc-by-4.0"
    assert {key: merged[key] for key in card.to_dict() if key not in ("tags", "license")} == {
        key: value for key, value in card.to_dict().items() if key not in ("tags", "license")
    }
    return text


def provenance(selection: Selection, word: Callable[[], str]) -> Provenance:
    made = selection.provenance
    assert made.extractor is not None
    model, sae = (SourceRecord(id=word(), commit=f"content:{word()}") for _ in range(2))
    source = SourceRecord(id=word(), commit=f"content:{word()}")
    return replace(
        made,
        pool=replace(made.pool, id=word(), config=word(), split=word(), license=word()),
        method=replace(made.method, options=made.method.options | {"option": word()}),
        targets={word(): TargetRecord(exemplars=1, used=1, source=source)},
        extractor=replace(made.extractor, model=model, sae=sae),
        packages={"numpy": word()},
        files={DATA_FILE: "0" * 32},
    )


BASH = """neuronselect() { printf '%s\\0' neuronselect "$@"; }
"""


def words_of(text: str) -> list[str]:
    """The command of a card, as a shell takes it apart."""
    blocks = [token for token in MARKDOWN.parse(text) if token.type == "fence" and token.info == "bash"]
    assert len(blocks) == 1
    told = subprocess.run(["bash", "-c", BASH + blocks[0].content], capture_output=True, check=True, text=True).stdout
    return told.split("\0")[:-1]


@PROPERTY
@given(st.data())
def test_a_selection_card_is_not_broken(selection: Selection, data: st.DataObject) -> None:
    made = provenance(selection, lambda: data.draw(names))
    examples = data.draw(st.lists(hostile, min_size=2, max_size=2))
    tame = provenance(selection, lambda: "word")
    text = check(SelectionCard(made, examples), SelectionCard(tame, ["some text", "other"]))
    assert words_of(text) == select_command(made).words


@PROPERTY
@given(st.data())
def test_a_capability_and_a_library_card_are_not_broken(selector: NeuronSelector, data: st.DataObject) -> None:
    def about(word: Callable[[], str]) -> CapabilityRecord:
        record = selector.about()
        model, sae = SourceRecord(id=word(), commit="content:0"), SourceRecord(id=word(), commit="content:1")
        return replace(
            record,
            targets={word(): TargetRecord(exemplars=1, used=1)},
            method=replace(record.method, options={"metric": word()}),
            extractor=replace(record.extractor, model=model, sae=sae, signals={word(): word()}),
        )

    made, tame = about(lambda: data.draw(hostile)), about(lambda: "word")
    check(CapabilityCard(made), CapabilityCard(tame))
    check(LibraryCard({"a": made, "b": tame}), LibraryCard({"a": tame, "b": tame}))


@PROPERTY
@given(st.data())
def test_an_adapter_card_is_not_broken(data: st.DataObject) -> None:
    def made(word: Callable[[], str]) -> AdapterCard:
        name = word()
        evaluation = tuple(EvaluationRow(model=model, data=word(), metric=word(), value=0.5) for model in (name, name))
        rows = SelectionSummary(
            pool=SourceRecord(id=word(), license=word()),
            method=MethodRecord(name=word()),
            targets={word(): TargetRecord()},
        )
        record = TrainingRecord(
            name=name, base_model=SourceRecord(id=word(), commit=word()), hyperparameters={"lr": word()},
            selection=rows, evaluation=evaluation, losses=((1, 2.0),), packages={"trl": word()},
        )  # fmt: skip
        return AdapterCard(record)

    numbers = count()
    check(made(lambda: f"{data.draw(values)}{next(numbers)}"), made(lambda: f"word{next(numbers)}"))


def test_metadata_is_as_the_card_shows_it() -> None:
    """A name that turns its line around is replaced in the metadata as in the text."""
    results = (EvaluationRow(model="me", data="held out", metric="\u202eloss", value=0.5),)
    card = AdapterCard(TrainingRecord(name="me", base_model=SourceRecord(id="base"), evaluation=results))
    data = RepoCard(card.render(), ignore_metadata_errors=False).data.to_dict()
    assert data == card.to_dict()
    assert "\ufffdloss" in str(data) and "\u202e" not in str(data)


@settings(max_examples=200, deadline=None)
@given(hostile)
def test_a_cell_and_a_fence_hold_any_text(text: str) -> None:
    tokens = MARKDOWN.parse(f"| a | b |\n|---|---|\n| {cell(text)} | end |\n")
    assert sum(token.type == "td_open" for token in tokens) == 2
    inline = [token for token in tokens if token.type == "inline"]
    assert not [c for token in inline for c in token.children if c.type not in ("text", "em_open", "em_close", "strong_open",
                                                                                "strong_close", "text_special")]  # fmt: skip
    tokens = MARKDOWN.parse(f"before\n\n{fenced(text)}\n\nafter\n")
    assert [token.type for token in tokens if token.type in ("fence", "inline")] == ["inline", "fence", "inline"]
    block = next(token for token in tokens if token.type == "fence").content
    assert len(block.splitlines()) <= 9 and all(len(line) <= 252 for line in block.splitlines())


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)


def tags_of(page: str) -> set[str]:
    tags = Tags()
    tags.feed(page)
    return tags.seen


@settings(max_examples=25, deadline=None)
@given(st.lists(hostile, min_size=3, max_size=3))
def test_hostile_rows_are_saved_and_shown(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    data = Dataset.from_list([{"messages": chat(text, text), "id": i} for i, text in enumerate(texts)])
    made = NeuronSelector("random").select(data, k=3, exclude=[], source=SourceRecord(id=texts[0]))
    folder = tmp_path_factory.mktemp("hostile") / "s"
    made.save_pretrained(folder)
    text = text_of(folder)
    assert once(text) and DatasetCard(text).data.tags == ["neuronselect", "neuronselect-random"]
    assert len(Selection.from_pretrained(folder)) == 3
    plain = NeuronSelector("random").select(rows(3).select_columns("messages"), k=3, exclude=[])
    assert tags_of(made.report()) <= tags_of(plain.report()), "no text made an element"


# -- the command


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., None]:
    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["neuronselect", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capsys.readouterr().err

    return run


def same_rows(first: Path, second: Path) -> None:
    """Bit-equal rows and scores, and a record that differs in its times alone."""
    for file in (DATA_FILE, "scores.parquet"):
        assert pq.read_table(first / file).equals(pq.read_table(second / file))
    records = [json.loads((folder / "selection.json").read_text()) for folder in (first, second)]
    for record in records:
        del record["timing"], record["cost"], record["seal"], record["pool"]["fingerprint"]  # of a file's path, too
    assert records[0] == records[1]


POOL, AWKWARD = "pool.jsonl", "my pool --k 3 'a' `b` $.jsonl"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Local files by the names that cards give them: their last part."""
    folder = tmp_path_factory.mktemp("files")
    rows(40).to_json(folder / POOL)
    rows(40).to_json(folder / AWKWARD)
    rows(5, seed=1).to_json(folder / "math.jsonl")
    rows(5, seed=2).to_json(folder / "code.jsonl")
    (folder / "model").symlink_to(tiny_folder / "model")
    (folder / "layers.2").symlink_to(tiny_folder / "sae" / "layers.2")
    return folder


TINY = ("--model", "{}/model", "--sae", "{}/layers.2")
ONE, TWO = ("--target", "math={}/math.jsonl"), ("--target", "math={}/math.jsonl", "--target", "code={}/code.jsonl")
COMMANDS = {
    "mona": (*ONE, *TINY, "--ratio", "0.2"),
    "options": (*ONE, *TINY, "--method-option", "metric=cosine", "--k", "7", "--layer", "2", "--top-k-features", "4",
                "--pool-tokens", "assistant", "--max-length", "64", "--dtype", "float32"),
    "nait": (*ONE, *TINY, "--method", "nait", "--max-tokens", "500"),
    "threshold": (*ONE, *TINY, "--threshold", "0.05", "--keep", "duplicate"),
    "weighted": (*TWO, *TINY, "--k", "6", "--aggregate", "weighted", "--weight", "math=0.7", "--weight", "code=0.3",
                 "--keep", "leak"),
    "random": (*TINY, "--method", "random", "--seed", "7", "--k", "5"),
    "longest": (*TINY, "--method", "longest", "--k", "5"),
    "bundled": (*ONE, "--k", "5"),
}  # fmt: skip


@pytest.mark.parametrize(("how", "pool"), [*((how, POOL) for how in COMMANDS), ("mona", AWKWARD)])
def test_the_command_of_a_card_makes_the_same_rows(
    how: str, pool: str, files: Path, tmp_path: Path, command_line: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word.format(files) for word in COMMANDS[how]]
    command_line("select", "--pool", str(files / pool), *words, "--out", str(tmp_path / "first"))
    text = text_of(tmp_path / "first")
    assert str(files) not in text
    made = words_of(text)
    assert made[:2] == ["neuronselect", "select"] and made[-2:] == ["--out", "selected"]
    work = tmp_path / "work"
    work.mkdir()
    for path in files.iterdir():
        (work / path.name).symlink_to(path)
    monkeypatch.chdir(work)
    command_line(*made[1:])
    same_rows(tmp_path / "first", work / "selected")
    assert words_of(text_of(work / "selected")) == made
    local = any(word.startswith("math=") and "bundled" not in word for word in words)
    assert (f"give `--target capability:{PLACE}` in their place" in text_of(tmp_path / "first")) == local


def parquet(data: Dataset, path: Path) -> bytes:
    data.to_parquet(path)
    return path.read_bytes()


def test_the_command_of_rows_from_the_hub_runs_as_it_stands(
    clean: Hub, name: str, tiny_folder: Path, tmp_path: Path, command_line: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pool = parquet(rows(40), tmp_path / "p")
    head = b"---\nconfigs:\n- config_name: chat\n  data_files:\n  - {split: train, path: a.parquet}\n  - {split: dev, path: b.parquet}\n---\n"
    other = parquet(rows(30, seed=9), tmp_path / "o")
    commit = clean.add("datasets", f"{name}-pool", {"README.md": head, "a.parquet": other, "b.parquet": pool})
    exemplars = clean.add("datasets", f"{name}-math", {"train.parquet": parquet(rows(5, seed=1), tmp_path / "t")})
    model = clean.add("models", f"{name}-lm", {p.name: p.read_bytes() for p in (tiny_folder / "model").iterdir()})
    sae = {f"layers.2/{p.name}": p.read_bytes() for p in (tiny_folder / "sae" / "layers.2").iterdir()}
    sae_commit = clean.add("models", f"{name}-sae", sae)
    command_line("select", "--pool", f"{name}-pool:chat:dev", "--target", f"math={name}-math", "--model", f"{name}-lm",
                 "--sae", f"{name}-sae", "--k", "6", "--out", str(tmp_path / "first"), "--push-to-hub", name)  # fmt: skip
    # All that it came from is changed since.
    for kind, what, file in (("dataset", "pool", "b.parquet"), ("dataset", "math", "train.parquet"), ("model", "lm", "x"),
                             ("model", "sae", "layers.2/sae.safetensors")):  # fmt: skip
        HfApi().upload_file(path_or_fileobj=other, path_in_repo=file, repo_id=f"{name}-{what}", repo_type=kind)
    words = words_of(clean.files("datasets", name)["README.md"].decode())
    for option, value in (("--pool", f"{name}-pool@{commit}:chat:dev"), ("--target", f"math={name}-math@{exemplars}"),
                          ("--model", f"{name}-lm"), ("--revision", model), ("--sae", f"{name}-sae"),
                          ("--sae-revision", sae_commit)):  # fmt: skip
        assert words[words.index(option) + 1] == value
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    command_line(*words[1:])
    same_rows(tmp_path / "first", tmp_path / "work" / "selected")


@pytest.mark.parametrize("where", ["folder", "Hub"])
def test_the_command_of_a_capabilitys_rows_names_it(
    clean: Hub, name: str, where: str, files: Path, tmp_path: Path, command_line: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tiny = [word.format(files) for word in TINY]
    words = [word.format(files) for word in ONE]
    command_line("fit", *words, *tiny, "--out", str(tmp_path / "work" / "math"))
    capability = str(tmp_path / "work" / "math")
    if where == "Hub":
        NeuronSelector.from_pretrained(capability).push_to_hub(name)
        capability = name
    command_line("select", "--pool", str(files / "pool.jsonl"), "--target", f"capability:{capability}", *tiny, "--k", "5",
                 "--out", str(tmp_path / "first"))  # fmt: skip
    made = words_of(text_of(tmp_path / "first"))
    for path in files.iterdir():
        (tmp_path / "work" / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path / "work")
    assert "--target" in made
    command_line(*made[1:])
    same_rows(tmp_path / "first", tmp_path / "work" / "selected")


def test_a_command_that_cannot_know_the_exemplars_says_so(
    extractor: NeuronFeatureExtractor, pool: Dataset, target: Dataset, tmp_path: Path
) -> None:
    selector = NeuronSelector("mona").fit({"math": target, "code": rows(5, seed=2)}, extractor=extractor)
    selector.select(pool, k=3).save_pretrained(tmp_path / "s")
    text = text_of(tmp_path / "s")
    words = words_of(text)
    assert "- the pool: `ROWS`\n" in text and "exemplars of math" not in text.partition("## Make it again")[2]
    assert f"- the model: `model`, recorded with the hash {extractor.extraction.model.commit}\n" in text
    assert words[words.index("--pool") + 1] == "ROWS"  # a place to fill
    assert [words[i + 1] for i, word in enumerate(words) if word == "--target"] == [f"capability:{PLACE}"]
    unsaved = select_command(selector.select(pool, k=3).provenance)
    assert ("exemplars of math", "ROWS", "") in unsaved.fill_in and "math=ROWS" in unsaved.words


def test_write_card_makes_what_render_gives(tmp_path: Path, selector: NeuronSelector) -> None:
    made = CapabilityCard(selector.about())
    write_card(tmp_path, made)
    assert text_of(tmp_path) == made.render() == str(RepoCard(made.render()))
    assert re.fullmatch(r"---\n.*\n---\n<!-- .*-->\n", made.render(), re.DOTALL)


def test_a_card_names_what_the_package_brings() -> None:
    """A folder called ``layers.28`` says nothing to a reader; of which model the SAE is does."""
    (shipped,) = (folder for folder in bundled.SAES[1].iterdir() if folder.is_dir())
    of_bundled, other = f"content:{model_hash(bundled.MODEL)}", f"content:{sae_hash(shipped)}"
    assert cards._pinned(SourceRecord(id="model", commit=of_bundled)) == f"bundled at {of_bundled}"
    named = cards._pinned(SourceRecord(id=shipped.name, commit=other))
    assert named == f"smollm2-135m-instruct (in the package) at {other}"
    assert cards._pinned(SourceRecord(id="my/model", commit="content:0")) == "my/model at content:0"
