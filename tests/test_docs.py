"""README and docs: examples run, commands and options exist, links lead somewhere, every method is described."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hub import Hub
from typer.main import get_command

from hf_neuronselect.cli.app import app
from hf_neuronselect.core import bundled
from hf_neuronselect.core.configs import SelectConfig
from hf_neuronselect.core.options import options_of
from hf_neuronselect.methods import METHODS
from hf_neuronselect.pipelines.comparison import Comparison, Line

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NETWORK = "<!-- needs the network -->"
# Names in examples -> what is at hand offline.
OFFLINE = {
    '"meta-llama/Meta-Llama-3-8B"': repr(str(bundled.MODEL)),
    '"EleutherAI/sae-llama-3-8b-32x"': repr(str(bundled.SAE)),
    'load_dataset("teknium/OpenHermes-2.5", split="train")': f'load_dataset("parquet", data_files={str(bundled.POOL)!r}, '
    'split="train[:40]")',
    'load_dataset("openai/gsm8k", "main", split="train[:100]")': f'load_dataset("parquet", '
    f'data_files={str(bundled.TARGETS["gsm8k"])!r}, split="train[:8]")',
}


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str
    network: bool

    def __str__(self) -> str:
        return f"{self.page}-{self.text.strip().splitlines()[-1][:40]}"


def blocks() -> Iterator[Block]:
    """Every fenced block of every page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            before = text[: found.start()].rstrip().splitlines()
            yield Block(page.name, found[1], found[2], bool(before) and before[-1] == NETWORK)


def of_language(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


def commands() -> list[str]:
    """Every ``neuronselect`` command line in a shell block."""
    lines = [line for block in of_language("bash") for line in block.text.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part.startswith("neuronselect ")]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


# docs/extend.md has a test of its own, which registers what it defines: tests/methods/test_stages.py.
@pytest.mark.parametrize(
    "block", [b for b in of_language("python") if not b.network and b.page != "extend.md"], ids=str
)
def test_python_examples_run(block: Block, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = block.text
    for name, here in OFFLINE.items():
        code = code.replace(name, here)
    exec(compile(code, block.page, "exec"), {"__name__": "example"})


def test_examples_are_found() -> None:
    assert sum(not block.network for block in of_language("python") if block.page != "extend.md") >= 4
    assert len(commands()) >= 15


@pytest.mark.parametrize("line", commands())
def test_commands_have_these_options(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command: Any = get_command(app)
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def test_recipes_in_the_docs_have_these_options() -> None:
    sections = [yaml.safe_load(block.text) for block in of_language("yaml")]
    assert sections
    for section in sections:
        SelectConfig.from_mapping({"out": "selected", **section["select"]})


def test_every_method_and_option_is_described() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in METHODS.names():
        if METHODS[name].__module__.startswith("hf_neuronselect."):
            assert re.search(rf"^\| \[.*`{name}`", text, re.MULTILINE), name
            for option in options_of(METHODS[name]):
                assert f"| `{option}` |" in text, f"{name}: {option}"


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("benchmarks/*.md"), *ROOT.glob("recipes/**/*.md")],
                         ids=lambda page: page.relative_to(ROOT).as_posix())  # fmt: skip
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_the_tables_of_the_smollm2_recipe_are_its_figures() -> None:
    folder = ROOT / "recipes" / "smollm2"
    tables = runpy.run_path(str(folder / "tables.py"))["tables"](folder)
    text = (folder / "README.md").read_text()
    assert len(tables) == 3 and all(table in text for table in tables)


def test_the_tables_of_the_readings_are_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """In docs/benchmarks.md whole, in the README rounded, in the card of the SAE as averages."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    as_markdown = runpy.run_path(str(folder / "nait.py"))["as_markdown"]
    records = {path.stem.removeprefix("nait_"): json.loads(path.read_text()) for path in folder.glob("nait_*.json")}
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in ("bundled", "smollm2", "gemma3-270m"):
        lines = as_markdown(records[name])
        assert "\n".join(lines[: lines.index("", 2)]) in page

    def precision(name: str, label: str, ratio: str = "5%") -> list[float]:
        record = records[name]["targets"].values()
        if label.startswith("random"):
            return [one["random at 5%"]["95th" if "95" in label else "mean"] for one in record]
        return [one[label][ratio] for one in record]

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    usual = "nait (preset: content ends, svd)"
    rows = {"mona": "mona", "nait": usual, "nait-contrast": "nait-contrast", "nait(reading=paper)": "reading=paper",
            "hidden": "hidden", "random": "random", "random(95th)": "random 95", "longest": "longest"}  # fmt: skip
    for label, found in rows.items():
        cells = "|".join(f"{value:.2f}".removeprefix("0") for value in precision("smollm2", found))
        assert f"|{label}|{cells}|" in readme, label
    card = bundled.MODEL.parent / "saes" / "smollm2-135m-instruct" / "README.md"
    of_card = {"random, 95th percentile": "random 95", "longest": "longest", "hidden states, same block": "hidden",
               "hidden states, pool's mean taken off": "hidden, centre=pool", "nait": usual, "nait-contrast": "nait-contrast",
               "**MoNA**": "mona", "MoNA, `centre=pool`": "mona, centre=pool"}  # fmt: skip
    text = card.read_text(encoding="utf-8")
    for label, found in of_card.items():
        means = [
            f"{sum(one) / len(one):.3f}" for one in (precision("smollm2", found), precision("smollm2_no_system", found))
        ]
        assert f"| {label} | {means[0]} | {means[1]} |" in text, label
    both = [[f"{sum(p) / len(p):.3f}" for p in (precision(name, "rds-plus"), precision(name, "rds-plus, exemplars=mean"))]
            for name in ("smollm2", "smollm2_no_system")]  # fmt: skip
    assert f"| {' / '.join(both[0])} | {' / '.join(both[1])} |" in text


def test_the_tables_of_ratio_auto_are_their_record(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    as_markdown = runpy.run_path(str(folder / "auto_ratio.py"))["as_markdown"]
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    apart = []
    for name in ("auto_ratio", "auto_ratio_more"):
        record = json.loads((folder / f"{name}.json").read_text())
        assert "\n".join(as_markdown(record)) in page
        apart += [f"{value:.4f}".lstrip("0") for value in record["summary"]["repeated"].values()]
    assert "a loss {} apart, and in the second record {}.".format(*apart) in " ".join(page.split())


def test_the_tables_of_transfer_are_their_record(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    as_markdown = runpy.run_path(str(folder / "transfer.py"))["as_markdown"]
    record = json.loads((folder / "transfer_smollm2.json").read_text(encoding="utf-8"))
    lines = as_markdown(record)
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in page
    section = " ".join(page.split("## Picks for one task, measured at others\n")[1].split("\n## ")[0].split())
    minus, own = {}, {}
    for line in lines[lines.index("") :]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].endswith("own minus others"):
            own[cells[0].split(":")[0]] = [float(cell.split()[0]) for cell in cells[1:]]
        elif len(cells) == 4 and "(" in cells[1]:
            minus[cells[0]] = [float(cell.split()[0]) for cell in cells[1:]]
    gains = [-change for arm in own for change in minus[arm][:2]]
    apart = [-change for arm in own for change in own[arm][:2]]
    for least, most, words in ((min(gains), max(gains), "nats a token"), (min(apart), max(apart), "more than picks")):
        assert f"{least:.2f} to {most:.2f} {words}".replace("0.", ".") in section
    assert f"random rows at mmlu**, by {-minus['gist'][2]:.2f}:".replace("0.", ".") in section
    assert f"other picks do ({-own['less'][2]:.2f})".replace("0.", ".") in section
    of = {(one["arm"], one["picked_for"]): one for one in record["trained"]}
    right = [of[arm, "mmlu"]["accuracy"] for arm in own]
    before, random = of["random", "mmlu"]["accuracy_untouched"], of["random", "mmlu"]["accuracy"]
    told = (
        f"answers {before:.0%} right, after random rows {random:.0%}, after picks {min(right):.0%} to {max(right):.0%}"
    )
    assert (
        told.replace("%", " %").replace(
            f"{min(right):.0%}".replace("%", " %") + " to", f"{min(right):.0%}"[:-1] + " to"
        )
        in section
    )
    assert f"{of['gist', 'mmlu']['answers']:.0%}".replace("%", " %") + " of what it picks are answers" in section


RIVALS = {
    "Every rival on one real model": "compare_smollm2_5000",
    "Every rival on 5,000 rows without the target's own source": "compare_smollm2_5000_out",
    "Every rival on the whole pool": "compare_smollm2_full",
    "Every rival without the target's own source": "compare_smollm2_full_out",
    "Every rival with the bundled model": "compare_bundled_full",
    "The same without the target's own source": "compare_bundled_full_out",
    "Every rival on 5,000 rows with the bundled model": "compare_bundled_5000",
    "The same 5,000 rows without the target's own source": "compare_bundled_5000_out",
    "The gradient methods on one real model": "compare_smollm2_gradients",
}
"""Section -> its record."""
SAID = {"mona": "MoNA", "hidden(centre=pool)": "`hidden` with `centre=pool`"}
"""Method -> how a sentence calls it, where that is not its name."""


def every_rival(heading: str) -> tuple[list[dict[str, str]], str]:
    """The lines of the record, and the section that tells it."""
    with (ROOT / "benchmarks" / f"{RIVALS[heading]}.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    return lines, page.split(f"## {heading}\n")[1].split("\n## ")[0]


def ranks_of(lines: list[dict[str, str]]) -> list[Any]:
    """Mean ranks, as ``compare`` counts them."""
    found = Comparison(None, None)  # type: ignore[arg-type]
    found.lines = [
        Line(one["method"], one["target"], precision=float(one["precision"]) if one["precision"] else None,
             stand_in=one["stand_in"], reason=one["reason"])
        for one in lines
    ]  # fmt: skip
    return found.ranks()


@pytest.mark.parametrize("heading", RIVALS)
def test_the_ranks_of_every_rival_are_those_of_its_record(heading: str) -> None:
    lines, section = every_rival(heading)
    ranks = ranks_of(lines)
    first, second = (
        f"{SAID.get(one.method, f'`{one.method}`')} ({one.mean:.1f}, interval {one.low:.1f} to {one.high:.1f})"
        for one in ranks[:2]
    )
    assert f"{first.replace(' (', ' has the best mean rank (', 1)}, before {second}" in " ".join(section.split())
    assert "encoder" not in {one.method for one in ranks}, "a stand-in has no rank"


@pytest.mark.parametrize("heading", RIVALS)
def test_the_table_of_every_rival_is_its_record(heading: str) -> None:
    lines, section = every_rival(heading)
    head, *table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "
    ]
    targets = head[1:-2]
    names = {label: label.removesuffix(" (MiniLM)").split(", ")[0] for label, *_ in table}
    assert set(names.values()) == {line["method"] for line in lines if not line["reason"]}
    for label, *cells in table:
        found = {line["target"]: line for line in lines if line["method"] == names[label]}
        column = "high" if "95th" in label else "precision"
        values = [float(found[target][column]) for target in targets]
        told = [f"{value:.2f}" for value in values]
        tokens = sum(float(found[target]["picked_tokens"]) for target in targets) / len(targets)
        mean = sum(values) / len(values)
        assert cells == [*told, f"{mean:.3f}", "" if column == "high" else f"{tokens:.0f}"], label


def test_the_core_of_several_targets_is_its_record() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = page.split("## What several targets share\n")[1].split("\n## ")[0]
    with (ROOT / "benchmarks" / "core_bundled.csv").open(encoding="utf-8", newline="") as file:
        found = {(line["method"], line["least"]): line for line in csv.DictReader(file)}
    head, *table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "
    ]
    for method, *cells in table:
        name, column = ("nait", "by_chance") if method == "random picks" else (method, "share")
        assert cells == [f"{float(found[name, label[-1]][column]):.3f}" for label in head[1:]], method
    assert f"`nait-contrast` ({found['nait-contrast', '3']['rows']} rows" in section
    with (ROOT / "benchmarks" / "target_overlap_bundled.csv").open(encoding="utf-8", newline="") as file:
        pairs = {
            (one["target"], one["other"]): float(one["overlap"])
            for one in csv.DictReader(file)
            if one["method"] == "nait"
        }
    most, next_most = sorted({value for (one, other), value in pairs.items() if one != other}, reverse=True)[:2]
    assert most == pairs["xquad", "tydiqa"]
    assert f"xquad and tydiqa are {most:.2f} the same" in section and f"two targets at most {next_most:.2f}" in section


def test_what_the_passes_over_5000_rows_took_is_in_the_record() -> None:
    lines, section = every_rival("Every rival on one real model")
    took = {one["method"]: f"{float(one['pass_seconds']):,.0f}" for one in lines if one["pass_seconds"]}
    told = f"took {took['mona']} s of a core, the encoder {took['encoder']}, `bidirectional` {took['bidirectional']}."
    assert told in " ".join(section.split())
    lines, of_bundled = every_rival("Every rival on 5,000 rows with the bundled model")
    took = {one["method"]: f"{float(one['pass_seconds']):,.0f}" for one in lines if one["pass_seconds"]}
    told = (
        f"in {took['mona']} s of a core for MoNA and all that is read with it, in {took['bidirectional']} for "
        f"`bidirectional`, {took['ifd']} for `ifd` and {took['selectit']} for `selectit`."
    )
    assert told in " ".join(of_bundled.split())
    bundled, smollm2 = (
        next(float(one["picked_tokens"]) for one in found if "deita" in one["method"])
        for found in (lines, every_rival("Every rival on one real model")[0])
    )
    assert f"({bundled:.0f} tokens on average, beside SmolLM2 {smollm2:.0f})" in " ".join(of_bundled.split())
    whole = json.loads((ROOT / "benchmarks" / "compare_smollm2_5000_time.json").read_text(encoding="utf-8"))
    minutes, seconds = divmod(whole["seconds"]["whole"], 60)
    assert f"took {minutes:.0f} min {seconds:.0f} s on two cores" in " ".join(section.split())
    assert f"`{'` needs experts and `'.join(whole['settings']['did_not_run'])}` an adapter" in section
    with (ROOT / "benchmarks" / "compare_smollm2_1000.csv").open(encoding="utf-8", newline="") as file:
        took = {
            one["method"].split("(")[0]: float(one["pass_seconds"]) for one in csv.DictReader(file) if one["stand_in"]
        }
    told = f"1,000 rows took {took['deita']:.0f} s of a core for `deita` and {took['alpagasus']:.0f} s for `alpagasus`."
    assert told in " ".join(section.split())


def test_what_the_passes_over_the_whole_pool_took_is_in_the_record() -> None:
    lines, section = every_rival("Every rival on the whole pool")
    took = {one["method"]: f"{float(one['pass_seconds']):,.0f}" for one in lines if one["pass_seconds"]}
    assert f"for `bidirectional` in {took['bidirectional']} s of a core, and for `ifd` in {took['ifd']} s" in section
    shares = {float(one["answers"]) for one in lines if one["method"] == "ifd" and one["answers"]}
    (of_pool,) = {one["pool_answers"] for one in lines if one["pool_answers"]}
    assert f"({min(shares):.0%} of their characters, the pool has {float(of_pool):.0%})".replace("%", " %") in section
    found = {(one["method"], one["target"]): one for one in lines if one["precision"]}
    for (method, target), one in found.items():  # far fewer right rows than chance
        assert method != "ifd" or float(one["precision"]) < float(found["random", target]["low"]) / 2


def test_what_the_passes_of_the_bundled_model_took_is_in_the_record() -> None:
    lines, section = every_rival("Every rival with the bundled model")
    took = {one["method"]: f"{float(one['pass_seconds']) / 60:.0f}" for one in lines if one["pass_seconds"]}
    assert (
        f"methods took {took['mona']} minutes on two cores, the encoder {took['encoder']}, `bidirectional` "
        f"{took['bidirectional']}, `ifd` {took['ifd']}" in " ".join(section.split())
    )
    shares = {float(one["answers"]) for one in lines if one["method"] == "ifd" and one["answers"]}
    (of_pool,) = {one["pool_answers"] for one in lines if one["pool_answers"]}
    assert f"({min(shares):.0%} of their characters, the pool has {float(of_pool):.0%})".replace("%", " %") in section


def test_what_is_said_of_the_gradient_methods_is_in_their_record() -> None:
    lines, section = every_rival("The gradient methods on one real model")
    text, ranks = " ".join(section.split()), {one.method: f"{one.mean:.1f}" for one in ranks_of(lines)}
    igds = ranks["igds(measure=loss)"]
    assert f"`less` has {ranks['less']}, behind `bm25`, `gist` {ranks['gist']} and `igds` {igds}" in text
    assert float(ranks["bm25"]) < float(ranks["less"])
    of = {(one["method"], one["target"]): one for one in lines}
    told = re.findall(r"took ([\d,]+) s at (\d+) tokens/s.* ([\d,]+) s at (\d+) tokens/s", text)
    costs = [of[method, "gsm8k"] for method in ("less", "mona")]
    assert told == [
        tuple(f"{float(one[name]):,.0f}" for one in costs for name in ("pass_seconds", "tokens_per_second"))
    ]
    assert f"short answers, {float(of['gist', 'mmlu']['answers']):.0%}".replace("%", " %") in text
    probed = {target: one for (method, target), one in of.items() if method.startswith("mates")}
    assert len(probed) == 7 and {(one["stand_in"], one["draws"]) for one in probed.values()} == {("minilm", "20")}
    seconds = [float(one["pass_seconds"]) / 40 for one in probed.values()]
    assert f"A probe took {min(seconds):.0f} to {max(seconds):.0f} s of one core and target" in text
    assert f"200 probes for the seven targets are {200 * sum(seconds) / 3600:.0f} hours" in text
    assert all(
        abs(float(one["precision"]) - float(of["random", target]["precision"])) < 0.02
        for target, one in probed.items()
        if one["precision"]
    )
    causal = {target: one for (method, target), one in of.items() if method == "igds(measure=loss)"}
    assert f"**{float(causal['mmlu']['precision']):.2f} of mmlu's picks are right**" in text
    assert (
        max(float(one["precision"]) for (m, t), one in of.items() if t == "mmlu" and m != "igds(measure=loss)") < 0.85
    )
    assert (
        causal["gsm8k"]["picked_tokens"] == causal["xquad"]["picked_tokens"] and "for gsm8k and xquad the same" in text
    )
    norms = [one for (method, _), one in of.items() if method == "gradient-norm"]
    assert f"answers are {float(norms[0]['answers']):.0%}".replace("%", " %") in text
    assert "none is of the right source for four targets" in text
    assert sum(one["precision"] == "0.0" for one in norms) == 4


def test_the_table_of_gradients_is_its_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "gradients_smollm2.json").read_text(encoding="utf-8"))
    section = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").split("## Gradients of single rows\n")[1]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.split("\n`benchmarks/influence.py`")[0].splitlines()
        if line[:2] == "| "
    ][1:]
    rows = ("ours", "ours, Adam's steps too", "row by row", "row by row, projected", "vmap", "training pass")
    assert [cells[1:] for cells in table] == [
        [f"{record['tokens_per_s'][name]['median']:.0f}", f"{record['time_over_ours'][name]['median']:.2f}"]
        for name in rows
    ]
    assert f"takes {record['less_over_training']['median']:.2f} times the training pass" in section
    whole = json.loads((ROOT / "benchmarks" / "influence_smollm2.json").read_text(encoding="utf-8"))
    assert f"{whole['settings']['rows']} rows and {whole['settings']['exemplars']} exemplars" in section
    for found in whole["ratios"].values():
        assert f"| {found['median']:.2f} | {found['min']:.2f} to {found['max']:.2f} |" in section


def test_the_losses_with_targets_avoided_are_their_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "avoid.json").read_text(encoding="utf-8"))
    section = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").split("### What a model then loses\n")[1]
    for trained, losses in record["losses"].items():
        told = [
            f"{losses[t]['mean']:.3f} ({losses[t]['low']:.3f} to {losses[t]['high']:.3f})" for t in ("gsm8k", "mbpp")
        ]
        assert f"| {trained} | {' | '.join(told)} |" in section
    prose = " ".join(section.split("\n## ")[0].split())
    verdicts = record["verdicts"]
    avoiding, both = verdicts["gsm8k, avoiding mbpp"], verdicts["gsm8k and mbpp"]
    rise, mended = avoiding["rise"], avoiding["mended"]
    assert f"worse by {rise['mean']:.3f} ({rise['low']:.3f} to {rise['high']:.3f})" in prose
    assert f"{mended['mean']:.3f} better than that ({mended['low']:.3f} to {mended['high']:.3f})" in prose
    assert f"{avoiding['gain_kept'] * 100:.0f} % of the gain on GSM8K is kept" in prose
    assert (
        f"MBPP is then {both['mended']['mean']:.2f} better" in prose
        and f"and {both['gain_kept'] * 100:.0f} % of" in prose
    )
    kept = [f"{verdicts[name]['gain_kept'] * 100:.0f} %" for name in ("random", "longest")]
    assert f"of the gain {' and '.join(kept)} are kept" in prose
    assert f"{record['common_rows']['gsm8k, avoiding mbpp']} of the 200 rows stay" in prose
    assert [verdicts[name]["verdict"] for name in ("random", "longest")] == ["mends at too high a price"] * 2


def test_the_auc_of_a_feature_is_the_share_of_pairs_in_order() -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / "monosemanticity.py"))
    draw = np.random.default_rng(0)
    values, members = draw.integers(0, 4, (40, 3)).astype(np.float64), draw.random((40, 2)) < 0.3
    found = made["aucs"](values.T, members)
    for f in range(3):
        for s in range(2):
            inside, outside = values[members[:, s], f], values[~members[:, s], f]
            pairs = [(x > y) + (x == y) / 2 for x in inside for y in outside]
            assert found[f, s] == pytest.approx(np.mean(pairs))
    space = made["Space"](values, signed=True)
    assert space.best(np.asarray([[0.6, 0.4], [0.1, 0.5], [0.7, 0.55]])) == [(1, -1), (0, -1)]
    assert made["Space"](values).best(np.asarray([[0.6, 0.4], [0.1, 0.5]]), np.asarray([1])) == [(1, 1), (1, 1)]


def test_what_single_features_tell_is_its_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "monosemanticity.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").split("## What a single feature tells\n")[1]
    section = " ".join(page.split("\n## ")[0].split())
    table = [line for line in page.split("\n## ")[0].splitlines() if line[:2] == "| "][1:]
    spaces = ("sae", "sae, as many", "hidden", "hidden, turned", "gate")
    for line, name in zip(table, spaces, strict=True):
        one = record["mean"][name]
        low, high = one["interval"]
        cells = (f"{record['features'][name]:,}", f"{one['auc']:.3f}", f"{low:.3f}–{high:.3f}", f"{one['least']:.3f}")
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == list(cells), name
    for one in record["differences"]:
        low, high = one["interval"]
        assert f"{one['auc']:+.3f} ({low:.3f} to {high:.3f})" in section, one
    of, gate, few, _ = record["differences"]
    sources = len(record["sources"])
    assert f"the {sources} sources" in section and f"{record['rows']:,} rows" in section
    assert (
        f"better for {of['better_for']} of {sources} sources" in section
        and f"better for {gate['better_for']}." in section
    )
    assert f"and {few['better_for']} of {sources} sources" in section
    assert record["rows"] == 10_000 and of["interval"][0] > 0 < gate["interval"][0] and few["interval"][0] <= 0
    worst = sorted(record["by_source"], key=lambda name: record["by_source"][name]["sae"])[:3]
    assert all(f"`{name}`" in section for name in worst)


def test_the_tables_of_the_causal_check_are_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    as_markdown = runpy.run_path(str(folder / "causal.py"))["as_markdown"]
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = page.split("## Are the named features what the task uses?\n")[1].split("\n## ")[0]
    own, same, outcomes = [], [], []
    for name in ("causal_bundled", "causal_smollm2"):
        record = json.loads((folder / f"{name}.json").read_text())
        assert "\n".join(as_markdown(record)) in section
        for checks in record["checks"].values():
            pairs = (("gsm8k", "mbpp"), ("mbpp", "gsm8k"))
            own.append([checks[one][one]["above"][1] > checks[one][other]["above"][2] for one, other in pairs])
            outcomes.append([checks[one][one]["outcome"] for one, _ in pairs])
            named = [{feature[0] for feature in checks[one][one]["features"]} for one, _ in pairs]
            same.append(len(named[0] & named[1]))
    # what the words say: the bundled model, MoNA and centre=pool, then SmolLM2
    assert own == [[True, False], [True, False], [False, True], [True, True]]
    assert outcomes == [["used", "used"], ["used", "used"], ["below random", "used"], ["used", "used"]]
    assert same == [10, 6, 11, 0]
