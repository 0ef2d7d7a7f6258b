"""The command line on real files: selection folders, and one clear line with exit status 2 for bad input."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from tiny import rows

from hf_neuronselect.cli import main as cli


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    rows(40).to_json(folder / "pool.jsonl")
    rows(40).to_json(folder / "pool.jsonl.gz", compression="gzip")
    rows(40).to_parquet(folder / "pool.parquet")
    rows(40).save_to_disk(folder / "disk")
    rows(5, seed=1).to_json(folder / "target.jsonl")
    (folder / "other.jsonl").write_text('{"x": 1}\n')
    (folder / "broken.jsonl").write_text('{"messages": [\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "notes.txt").write_text("no rows")
    found = {p.name: str(p) for p in folder.iterdir()}
    return found | {"model": str(tiny_folder / "model"), "sae": str(tiny_folder / "sae")}


def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["neuronselect", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def base(files: dict[str, str], out: Path, pool: str = "pool.jsonl") -> list[str]:
    return ["select", "--pool", files[pool], "--target", f"t={files['target.jsonl']}", "--model", files["model"],
            "--sae", files["sae"], "--out", str(out)]  # fmt: skip


@pytest.mark.parametrize("pool", ["pool.jsonl", "pool.jsonl.gz", "pool.parquet", "disk"])
def test_select_writes_a_folder(pool: str, files: dict[str, str], tmp_path: Path, capsys, monkeypatch) -> None:
    code, out, err = run(capsys, monkeypatch, *base(files, tmp_path / "sel", pool), "--ratio", "0.1")
    assert code == 0, err
    assert out.startswith("4 of 40 rows selected by mona")
    assert len(load_dataset(str(tmp_path / "sel"), split="train")) == 4
    names = {p.relative_to(tmp_path / "sel").as_posix() for p in (tmp_path / "sel").rglob("*") if p.is_file()}
    assert names == {
        "README.md",
        "data/train-00000-of-00001.parquet",
        "scores.parquet",
        "selection.json",
        "capability/config.json",
        "capability/capability.safetensors",
        "report.html",
    }
    made = json.loads((tmp_path / "sel" / "selection.json").read_text())
    assert made["pool"]["id"] == Path(files[pool]).name and made["pool"]["commit"].startswith("content:")
    assert made["method"]["name"] == "mona" and made["budget"] == {"ratio": 0.1}
    assert str(tmp_path) not in json.dumps(made)


def test_store_then_select_equals_select(files: dict[str, str], tmp_path: Path, capsys, monkeypatch) -> None:
    same = ["--model", files["model"], "--sae", files["sae"]]
    code, out, err = run(capsys, monkeypatch, "extract", "--pool", files["pool.jsonl"], "--method", "mona,nait", *same,
                         "--shard-rows", "16", "--out", str(tmp_path / "store"))  # fmt: skip
    assert code == 0 and out.startswith("40 rows"), err
    for method in ("mona", "nait"):
        words = [*base(files, tmp_path / f"a-{method}"), "--method", method, "--k", "6"]
        assert run(capsys, monkeypatch, *words)[0] == 0
        words = [
            *base(files, tmp_path / f"b-{method}"),
            "--method",
            method,
            "--k",
            "6",
            "--features",
            str(tmp_path / "store"),
        ]
        code, _, err = run(capsys, monkeypatch, *words)
        assert code == 0, err
        a, b = (load_dataset(str(tmp_path / f"{x}-{method}"), split="train")["source_index"] for x in "ab")
        assert a == b
    code, out, _ = run(capsys, monkeypatch, "extract", "--pool", files["pool.jsonl"], "--method", "mona,nait", *same,
                       "--shard-rows", "16", "--out", str(tmp_path / "store"))  # fmt: skip
    assert code == 0 and "3 shards were there already" in out


def test_fit_then_capability(files: dict[str, str], tmp_path: Path, capsys, monkeypatch) -> None:
    same = ["--model", files["model"], "--sae", files["sae"]]
    code, out, err = run(
        capsys, monkeypatch, "fit", "--target", f"t={files['target.jsonl']}", *same, "--out", str(tmp_path / "cap")
    )
    assert code == 0 and "t (5 exemplars)" in out, err
    words = ["select", "--pool", files["pool.jsonl"], "--target", f"capability:{tmp_path / 'cap'}", *same, "--k", "5"]
    assert run(capsys, monkeypatch, *words, "--out", str(tmp_path / "a"))[0] == 0
    assert run(capsys, monkeypatch, *base(files, tmp_path / "b"), "--k", "5")[0] == 0
    a, b = (load_dataset(str(tmp_path / x), split="train")["source_index"] for x in "ab")
    assert a == b


def test_streaming_selects_the_same(files: dict[str, str], tmp_path: Path, capsys, monkeypatch) -> None:
    assert run(capsys, monkeypatch, *base(files, tmp_path / "a"), "--k", "5")[0] == 0
    code, _, err = run(capsys, monkeypatch, *base(files, tmp_path / "b"), "--k", "5", "--streaming")
    assert code == 0, err
    a, b = (load_dataset(str(tmp_path / x), split="train") for x in "ab")
    assert a["source_index"] == b["source_index"] and a["messages"] == b["messages"]


def test_a_recipe_gives_defaults_and_flags_win(files: dict[str, str], tmp_path: Path, capsys, monkeypatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"select:\n  pool: {files['pool.jsonl']}\n  target: ['t={files['target.jsonl']}']\n  model: {files['model']}\n"
        f"  sae: {files['sae']}\n  k: 7\n  max-length: 64\n"
    )
    words = ["select", "--config", str(recipe), "--out"]
    code, out, err = run(capsys, monkeypatch, *words, str(tmp_path / "a"))
    assert code == 0 and out.startswith("7 of 40"), err
    assert run(capsys, monkeypatch, *words, str(tmp_path / "b"), "--k", "3")[1].startswith("3 of 40")
    recipe.write_text("select:\n  poool: x\n")
    code, _, err = run(capsys, monkeypatch, *words, str(tmp_path / "c"))
    assert code == 2 and err == "error: --config poool: unknown key of section select; did you mean pool or pooling?\n"


def test_sae_inspect(files: dict[str, str], capsys, monkeypatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "sae", "inspect", files["sae"])
    assert code == 0
    assert "sparsify" in out and "output of layers.2" in out and "topk, k = 6" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--ratio", "1.5"], "error: --ratio 1.5: must lie in (0, 1]"),
        (["--ratio", "nan"], "error: --ratio nan: must be a finite number"),
        (["--threshold", "inf"], "error: --threshold inf: must be a finite number"),
        (["--ratio", "0.1", "--k", "3"], "exactly one of ratio, k, threshold, max_tokens"),
        (["--k", "0"], "error: --k 0: must be at least 1"),
        (["--method", "mono"], "error: --method mono: unknown method; did you mean mona"),
        (
            ["--method-option", "metric=dot"],
            "error: --method-option metric=dot: must be one of jaccard, cosine, euclidean",
        ),
        (["--method-option", "metric"], "NAME=VALUE is needed"),
        (["--layer", "7"], "error: --layer 7: out of range: the model has 4 blocks"),
        (["--batch-tokens", "many"], "error: --batch-tokens many: must be a whole number (tokens), or auto"),
        (["--pool", "{other.jsonl}"], "columns missing: other.jsonl has x"),
        (["--columns", "text=body"], "error: --columns body: no such column; pool.jsonl has"),
        (["--device", "gpu"], "error: --device gpu: no such device here; use auto, cpu, cuda, cuda:1 or mps"),
        (["--device", "meta"], "error: --device meta: computes no numbers; use auto, cpu"),
        (["--pool", "{broken.jsonl}"], "error: --pool broken.jsonl: cannot be read"),
        (["--pool", "{empty.jsonl}"], "error: --pool"),
        (["--pool", "{notes.txt}"], "error: --pool notes.txt: needs .jsonl, .json, .csv, .parquet"),
        (["--pool", ""], "error: --pool : no rows are named; give a file, a folder or a Hub id"),
        (["--target", "u="], "error: --target : no rows are named"),
        (
            ["--config", "./nowhere.yaml"],
            "error: --config nowhere.yaml: cannot be read: No such file or directory; check the path\n",
        ),
        (["--pool", "./nowhere.jsonl"], "error: --pool ./nowhere.jsonl: no such file or folder"),
        (["--pool", "who/what"], "HF_HUB_OFFLINE is set"),
        (["--target", "t={target.jsonl}"], "error: --target t: is the name of two"),
        (["--target", "bad name!={target.jsonl}"], "error: --target"),
        (["--model", "./nowhere"], "error: --model ./nowhere: no such folder"),
        (["--model", "gone/model"], "error: --model gone/model: no such path here"),
        (["--sae", "./nowhere"], "error: --sae ./nowhere: no such folder"),
        (["--dtype", "int8"], "error: --dtype int8: must be one of auto, float32, bfloat16, float16"),
        (["--ratio", "a lot"], "error: --ratio a lot: must be a number"),
        (["--aggregate", "median"], "error: --aggregate median: must be one of quota, round_robin, mean"),
        (["--keep", "all"], "error: --keep all: must be one of duplicate, leak"),
        (["--wrong"], "error: No such option"),
        (["--weight", "t=1"], "error: --weight t: belongs to aggregate weighted"),
        (["--aggregate", "weighted", "--weight", "u=1"], "error: --weight u: needs one weight for each of t"),
        (["--aggregate", "weighted", "--weight", "t=much"], "error: --weight much: must be a number"),
        (["--target", "u={pool.jsonl}", "--threshold", "0.1"], "error: --threshold 0.1: unclear with 2 targets"),
        (["--target", "capability:./nowhere"], "error: --target capability:./nowhere: a capability is used alone"),
        (["--max-tokens", "9", "--streaming"], "error: --max-tokens 9: a stream needs k or threshold"),
        (["--row-format", "alpaca"], "columns missing"),
        (["--pool", "bundled:pol"], "error: --pool bundled:pol: unknown bundled rows; did you mean bundled:pool"),
        (["--features", "./nowhere"], "not a feature store"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    change: list[str], message: str, files: dict[str, str], tmp_path: Path, capsys, monkeypatch
) -> None:
    for name, path in files.items():
        change = [part.replace(f"{{{name}}}", path) for part in change]
    words = base(files, tmp_path / "sel")
    if change[0] in ("--pool", "--model", "--sae"):
        at = words.index(change[0])
        words[at : at + 2] = change
    else:
        words += change
    code, out, err = run(capsys, monkeypatch, *words)
    last = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and message in err and "Traceback" not in err, err
    assert len(last) == 1
    assert not (tmp_path / "sel").exists()


def test_a_folder_of_something_else_is_left_alone(files: dict[str, str], tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    code, _, err = run(capsys, monkeypatch, *base(files, tmp_path / "mine"))
    assert code == 2 and "error: --out mine: exists and is not a selection folder" in err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_skipped_rows_are_said(files: dict[str, str], tmp_path: Path, capsys, monkeypatch) -> None:
    pool = tmp_path / "pool.jsonl"
    good = [json.dumps({"messages": r["messages"]}) for r in rows(4)]
    bad = json.dumps({"messages": [{"role": "elf", "content": "x"}]})
    pool.write_text("\n".join([*good, '{"messages": null}', bad]) + "\n")
    words = base(files, tmp_path / "sel")
    words[words.index("--pool") + 1] = str(pool)
    code, out, err = run(capsys, monkeypatch, *words, "--ratio", "1.0")
    assert code == 0
    assert out.startswith("4 of 6 rows")
    assert "1 empty, 1 error" in err and "row 5: messages[0] has the unknown role 'elf'" in err


def test_sae_train_then_select_with_it(files: dict[str, str], tmp_path: Path, capsys, monkeypatch) -> None:
    """A selection without an SAE names the commands: the one that trains it, and what to add then."""
    monkeypatch.chdir(tmp_path)
    rows(60, seed=5).to_json(tmp_path / "my [own] text.jsonl")
    chosen = ["select", "--pool", "my [own] text.jsonl", "--target", f"t={files['target.jsonl']}", "--model",
              files["model"], "--out", "sel"]  # fmt: skip
    code, _, err = run(capsys, monkeypatch, *chosen, "--k", "3")
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "sel").exists()
    training, adding = re.fullmatch(
        r"error: --sae: mona needs a .*`neuronselect (sae train .*)`, then add `(.*)` .*\n", err
    ).groups()
    words = [*shlex.split(training), "--expansion-factor", "4", "--k", "5", "--context", "64", "--tokens", "4e3", "--batch",
             "256", "--learning-rate", "0.003", "--dtype", "float32", "--buffer-gb", "0.001"]  # fmt: skip
    code, out, err = run(capsys, monkeypatch, *words)
    assert code == 0, err
    assert out.startswith("layers.2: ") and "% of 128 latents dead, loss " in out and "tokens/s" in err
    assert "warning: " in err and "different tokens are few for 128 latents" in err
    record = json.loads((tmp_path / "sae" / "layers.2" / "training.json").read_text())
    assert 0 < record["fvu"] < 1 and record["verdict"] in out and record["training"]["batch"] == 256
    assert f"{record['fvu']:.4f} on" in (tmp_path / "sae" / "README.md").read_text()
    code, _, err = run(capsys, monkeypatch, *chosen, "--k", "3", *shlex.split(adding))
    assert code == 0, err
    assert ("the SAE is poor" in err) == record["verdict"].startswith("poor")
    assert json.loads((tmp_path / "sel" / "selection.json").read_text())["extractor"]["options"]["layer"] == 2
    _, out, _ = run(capsys, monkeypatch, "sae", "inspect", str(tmp_path / "sae"))
    assert record["verdict"] in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "select --pool pol.jsonl --out o",
            "--pool pol.jsonl: no such file or folder (did you mean pool.jsonl?), and not",
        ),
        ("select --pool none --out o", "--pool none: is empty: it needs .jsonl, .json, .csv, .parquet"),
        ("select --pool pool.jsonl --method mano --out o", "--method mano: unknown method; did you mean mona or "),
        ("select --pool pool.jsonl --k 3 --out o", "--target: method mona needs exemplars, 10 to 100 rows"),
        (
            "select --pool pool.jsonl --target pool.jsonl --sae s --out o",
            "--sae s: belongs to a model: give --model, too",
        ),
        (
            "select --pool pool.jsonl --target pool.jsonl --model who/typo --out o",
            "check the name, or unset HF_HUB_OFFLINE",
        ),
        ("export gone --format trl", "selection gone: no such path here"),
        ("push gone who/what", "FOLDER gone: no such folder; check the path"),
        ("run gone.yaml --out o", "RECIPE gone.yaml: cannot be read: "),
        ("run recipe.yaml --out o", "pool pol.jsonl: no such file or folder (did you mean pool.jsonl?)"),
    ],
)
def test_an_error_names_what_was_typed_and_the_mend(
    words: str, message: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    """What is no flag of the command, such as a key of a recipe, is named without dashes."""
    monkeypatch.chdir(tmp_path)
    rows(4).to_json("pool.jsonl")
    Path("none").mkdir()
    Path("recipe.yaml").write_text("select: {pool: pol.jsonl, method: longest, k: 2}\ntrain: {max_steps: 1}\n")
    code, out, err = run(capsys, monkeypatch, *words.split())
    line = err.splitlines()[-1]
    assert code == 2 and out == "" and line.startswith("error: ") and message in line, err


def test_a_device_map_changes_no_number(capsys, monkeypatch, files: dict[str, str], tmp_path: Path) -> None:
    for name, more in (("plain", []), ("mapped", ["--device-map", "auto"])):
        status, _, err = run(capsys, monkeypatch, *base(files, tmp_path / name), "--k", "3", *more)
        assert status == 0, err
    one, other = ((tmp_path / name / "scores.parquet").read_bytes() for name in ("plain", "mapped"))
    assert one == other
    status, _, err = run(
        capsys, monkeypatch, *base(files, tmp_path / "x"), "--k", "3", "--device-map", "auto", "--device", "cpu"
    )
    assert status == 2 and err.startswith("error: --device-map auto: replaces device, which is cpu: give one of them")


def test_a_store_of_other_values_is_refused(files: dict[str, str], tmp_path: Path, capsys, monkeypatch) -> None:
    """--value-dtype is part of what a number is: a store in float32 does not serve a target in float16."""
    words = ["extract", "--pool", files["pool.jsonl"], "--model", files["model"], "--sae", files["sae"]]
    code, _, err = run(capsys, monkeypatch, *words, "--value-dtype", "float32", "--out", str(tmp_path / "store"))
    assert code == 0, err
    (shard,) = (tmp_path / "store").glob("mona-*/shard-00000.parquet")
    schema = pq.read_schema(shard)
    assert schema.field("mona_values").type == pa.list_(pa.float32())
    select = [*base(files, tmp_path / "out"), "--k", "3", "--features", str(tmp_path / "store")]
    code, _, err = run(capsys, monkeypatch, *select)
    assert code == 2 and "its signal mona comes from another extraction" in err and err.count("\n") == 1
    assert run(capsys, monkeypatch, *select, "--value-dtype", "float32")[0] == 0
