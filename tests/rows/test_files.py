"""Files of rows give what was written, read whole or as a stream; a file that cannot be read gives a one-line error."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_neuronselect.core.errors import NeuronSelectError, NeuronSelectWarning
from hf_neuronselect.rows import table
from hf_neuronselect.rows.formats import read_row, row_format
from hf_neuronselect.rows.load import load_rows
from hf_neuronselect.rows.table import Columns, as_dataset

pytestmark = pytest.mark.usefixtures("own_cache")
QA = [{"question": f"Why {i}?", "answer": f"So {i}."} for i in range(4)]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def both(path: Path | str, **how: Any) -> list[dict[str, Any]]:
    """The rows of a file read whole, which must be those of the stream."""
    whole = load_rows(str(path), **how).data
    assert isinstance(whole, Dataset)
    found = list(whole)
    streamed = list(load_rows(str(path), streaming=True, **how).data)
    names = whole.column_names
    assert [{name: row.get(name) for name in names} for row in streamed] == found
    return found


def refused(path: Path, match: str) -> None:
    """The file is refused in one line with its name, whole and as a stream."""
    for streaming in (False, True):
        with pytest.raises(NeuronSelectError, match=match) as raised:
            list(load_rows(str(path), streaming=streaming).data)
        assert raised.value.value == path.name and "\n" not in str(raised.value)


# -------------------------------------------------------------------------------- what is written
@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.JSONL", "p.jsonl.gz", "p.json.xz", "data [v2] *.jsonl"])
@pytest.mark.parametrize("form", ["lines", "list", "pretty", "marked"])
def test_json_however_it_is_laid_out(tmp_path: Path, name: str, form: str) -> None:
    text = {
        "lines": "\n" + lines(QA) + "\n",
        "list": json.dumps(QA, indent=2),
        "pretty": "\n".join(json.dumps(row, indent=2) for row in QA),
        "marked": "\ufeff" + lines(QA),
    }[form]
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(packed(text.encode()))
    assert both(tmp_path / name) == QA


def test_zstandard(tmp_path: Path) -> None:
    packed = pa.compress(lines(QA).encode(), codec="zstd", asbytes=True)
    (tmp_path / "p.jsonl.zst").write_bytes(packed)
    assert both(tmp_path / "p.jsonl.zst") == QA
    (tmp_path / "cut.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    refused(tmp_path / "cut.jsonl.zst", "cannot be read: Truncated")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("2024-03-01", "2024-03-01"), ("2024-03-01T10:00:00Z", "2024-03-01T10:00:00Z"), ("12:30", "12:30"),
        (7, "7"), (1.5, "1.5"), (True, "true"), (2**80, str(2**80)), ("null", "null"), ("NaN", "NaN"), (None, None),
        ("a\u2028b\x85c", "a\u2028b\x85c"),
    ],
)  # fmt: skip
def test_json_texts(tmp_path: Path, answer: Any, text: str | None) -> None:
    rows = [{"question": "q", "answer": answer}, {"question": "q", "answer": "x"}, {"question": "q", "answer": 3}]
    (tmp_path / "p.jsonl").write_text(lines(rows))
    assert [row["answer"] for row in both(tmp_path / "p.jsonl")] == [text, "x", "3"]
    (tmp_path / "same.jsonl").write_text(lines(rows[:1] * 3))
    assert [row["answer"] for row in both(tmp_path / "same.jsonl")] == [text] * 3


def test_other_columns_keep_their_types_unless_they_are_used_as_texts(tmp_path: Path) -> None:
    rows = [{"ask": 1, "reply": "2024-03-01", "score": 1}, {"ask": 2.5, "reply": "x", "score": 0.5}]
    (tmp_path / "p.jsonl").write_text(lines(rows))
    assert both(tmp_path / "p.jsonl") == rows
    assert [row["ask"] for row in both(tmp_path / "p.jsonl", texts=["ask"])] == ["1", "2.5"]


def test_csv_cells_are_texts(tmp_path: Path) -> None:
    cells = ["None", "NA", "null", "nan", "N/A", "", "007", "1.50", "2024-03-01", 'a "quoted", line\nand more', "é"]
    body = "".join(f'q{i},"{cell.replace(chr(34), chr(34) * 2)}"\n' for i, cell in enumerate(cells))
    (tmp_path / "p.csv").write_text("question,answer\n" + body)
    assert [row["answer"] for row in both(tmp_path / "p.csv")] == cells
    (tmp_path / "i.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf,question,answer\r\n0,q,a\r\n\r\n"))
    assert both(tmp_path / "i.csv.gz") == [{"Unnamed: 0": "0", "question": "q", "answer": "a"}]


@pytest.mark.parametrize("late", [5, table.CHUNK_ROWS + 5])
@pytest.mark.parametrize("value", [{"deep": [1]}, "text", [1], 1.5, True, {}, None])
def test_later_rows_may_have_other_types_and_columns(tmp_path: Path, value: Any, late: int) -> None:
    rows: list[dict[str, Any]] = [{"text": f"t{i}", "note": i} for i in range(late)]
    rows += [{"text": "last", "note": value, "extra": value}]
    (tmp_path / "p.jsonl").write_text(lines(rows))
    found = both(tmp_path / "p.jsonl")
    assert found == [{"extra": None, **row} for row in rows]
    assert (
        load_rows(str(tmp_path / "p.jsonl")).data._fingerprint == load_rows(str(tmp_path / "p.jsonl")).data._fingerprint
    )


def test_calls_with_other_arguments_keep_their_own_keys(tmp_path: Path) -> None:
    calls: list[Any] = [
        {"name": "f", "arguments": arguments} for arguments in ({"a": 1}, {"b": "x", "c": None}, {"a": "1"})
    ]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]} for call in calls
    ]
    (tmp_path / "p.jsonl").write_text(lines(rows))
    data = load_rows(str(tmp_path / "p.jsonl")).data
    assert [row["messages"][1]["tool_calls"][0]["arguments"] for row in data] == [call["arguments"] for call in calls]
    fmt = row_format(data.column_names or [])
    assert [read_row(row, fmt).messages for row in data] == [read_row(row, fmt).messages for row in rows]


def test_keys_keep_their_order() -> None:
    rows = [{"x": None, "y": []}, {"x": {"b": [{"d": 1, "c": {"z": 1, "a": 2}}], "a": "t"}, "y": [{"k": 1, "b": 2}]}]
    assert json.dumps(list(as_dataset(rows))) == json.dumps(rows)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(st.lists(st.dictionaries(st.sampled_from("xyz"), VALUES, max_size=3), min_size=1, max_size=6), st.integers(1, 3))
def test_no_value_is_lost(rows: list[dict[str, Any]], size: int) -> None:
    """Whatever the values are, in chunks of any size they are as they were; a key that is not there is null."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "CHUNK_ROWS", size)
        data = as_dataset(rows)
    names = data.column_names
    assume(names)
    assert sorted(names) == sorted({name for row in rows for name in row})
    for got, row in zip(data, rows, strict=True):
        for name in names:
            assert _same(got[name], row.get(name)), (got, row)


def _same(got: Any, want: Any) -> bool:
    if isinstance(got, float) and isinstance(want, (int, float)):
        return bool(got == pytest.approx(float(want), rel=1e-12, abs=1e-300))
    if isinstance(want, dict) and isinstance(got, dict):
        return want.keys() == got.keys() and all(_same(got[key], want[key]) for key in want)
    if isinstance(want, list) and isinstance(got, list):
        return len(want) == len(got) and all(map(_same, got, want))
    return bool(got == want)  # among decimals, Arrow takes true as 1


def test_numbers_among_texts_keep_their_digits() -> None:
    """Those after `0.0`, too, which the JSON reader of `datasets` cuts; texts that look like them are texts."""
    small = [0.00040376124323844413, -0.0123456789012345678, 0.1, 1e-300, 12345.678901234567]
    rows: list[dict[str, Any]] = [{"x": small}, {"x": "0.00040376124323844413"}, {"x": {'"0.0123456789012': 7}}]
    found = as_dataset(rows)["x"]
    assert list(found[1:]) == ["0.00040376124323844413", {'"0.0123456789012': 7}]
    assert found[0] == pytest.approx(small, rel=1e-14, abs=0)


def test_whole_numbers_of_more_than_64_bits_are_texts(tmp_path: Path) -> None:
    rows = [{"text": "t", "note": 2**70}, {"text": "t", "note": [-(2**63), {"a": 2**64, "b": "1" * 30}]}]
    (tmp_path / "p.jsonl").write_text(lines(rows))
    data = load_rows(str(tmp_path / "p.jsonl")).data
    assert [row["note"] for row in data] == [str(2**70), [-(2**63), {"a": str(2**64), "b": "1" * 30}]]


def test_types_settle() -> None:
    columns = Columns()
    columns.batch([{"a": None, "b": 1}])
    assert not columns.widened
    columns.batch([{"a": "x", "b": 0.5}])
    assert columns.widened and columns.types == {"a": pa.string(), "b": pa.float64()}
    columns.widened = False
    columns.batch([{"a": None, "b": 1}])
    assert not columns.widened


# ------------------------------------------------------------------------------ what cannot be read
@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("p.jsonl", lines(QA).encode() + b'{"question": "caf\xe9", "answer": "a"}\n', "line 5 is not UTF-8"),
        ("p.jsonl", b'{"question": "caf\xe9"}\n', "line 1 is not UTF-8"),
        ("p.csv", b"question,answer\ncaf\xe9,a\n", "line 2 is not UTF-8"),
        ("p.jsonl", lines(QA).encode("utf-16"), "UTF-16"),
        ("p.csv", b"question,answer\n".decode().encode("utf-16-le"), "UTF-16"),
        ("p.jsonl", lines(QA).encode() + b'{"question": "q", "ans', "line 5 is no JSON"),
        ("p.json", b'[{"question": "q",\n "answer": "a"},\n {"question" "q"}]', "line 3 is no JSON"),
        ("p.json", b'{\n"question": "q",\n', "line 3 is no JSON"),
        ("p.json", b'[{"question": "q"}] {"question": "q"}', "more behind the end of the list"),
        ("p.jsonl", lines([*QA, [1]]).encode(), "line 5 is list, not an object"),
        ("p.json", b'[{"question": "q"}, 5]', "row 1 is int, not an object"),
        ("p.jsonl", b"5\n", "line 1 is int, not an object"),
        ("p.jsonl", b"[" * 100_000, "nested too deeply"),
        ("p.jsonl", b'{"question": "\\ud83d", "answer": "a"}\n', "line 1 has half of a surrogate pair"),
        ("p.csv", b"question,answer\nq,a\nq\n", "line 3 has 1 cells, the first line 2"),
        ("p.csv", b"question,answer\nq,a,b\n", "line 2 has 3 cells"),
        ("p.csv", b'question,answer\nq,"a\n', "line 2: unexpected end of data"),
        ("p.csv", b"question,question\nq,a\n", "two columns have the name 'question'"),
        ("p.jsonl.gz", gzip.compress(lines(QA * 99).encode(), mtime=0)[:-30], "damaged or cut off"),
        ("p.jsonl.xz", lzma.compress(lines(QA * 99).encode())[:-30], "damaged or cut off"),
        ("p.csv.gz", gzip.compress(b"question,answer\n" + b"q,a\n" * 999, mtime=0)[:-9], "damaged or cut off"),
        ("p.jsonl.gz", lines(QA).encode(), "damaged or cut off"),
        ("p.jsonl", b"", "there are no rows"),
        ("p.json", b"[]", "there are no rows"),
        ("p.json", b" \n", "there are no rows"),
        ("p.csv", b"question,answer\n", "there are no rows"),
        ("p.parquet", b"PAR1 and no more", "cannot be read"),
        ("p.txt", b"some text", "needs .jsonl"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, match)
    assert not list(tmp_path.rglob("*.arrow*"))


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "p.parquet")
    refused(tmp_path / "p.parquet", "there are no rows")


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.jsonl").write_text(lines(QA))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("hf_neuronselect.rows.files.cache_dir", lambda: tmp_path / "file")
    assert both(tmp_path / "p.jsonl") == QA


# ------------------------------------------------------------------------------------------ folders
def jsonl(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(rows))


def parquet(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(path)


@pytest.mark.parametrize("write", [jsonl, parquet])
@pytest.mark.parametrize(
    ("train", "other"),
    [("train.{}", "test.{}"), ("train/a.{}", "validation/a.{}"), ("data/train-00000-of-00001.{}", "data/test-0.{}"),
     ("Training_set.{}", "x/DEV.{}"), ("my-train.v2.{}", "my-val.v2.{}")],
)  # fmt: skip
def test_a_folder_of_splits_gives_its_train_split(tmp_path: Path, write: Callable, train: str, other: str) -> None:
    ending = {"jsonl": "jsonl", "parquet": "parquet"}[write.__name__]
    write(tmp_path / "[a] b" / train.format(ending), QA[:3])
    write(tmp_path / "[a] b" / other.format(ending), QA[3:])
    assert both(tmp_path / "[a] b") == QA[:3]
    word = "test" if "test" in other else "validation"
    assert both(f"{tmp_path}/[a] b:{word}") == QA[3:]
    assert load_rows(f"{tmp_path}/[a] b:{word}").about["split"] == word


@pytest.mark.parametrize(
    ("files", "spec", "match"),
    [
        (["test.jsonl"], "", "has test, not train; name one: FOLDER:SPLIT"),
        (["test.jsonl", "dev.jsonl"], "", "has validation and test, not train"),
        (["more.jsonl", "test.jsonl"], "", "holds files of the split test and more.jsonl, which is of none"),
        (["train.jsonl", "test.jsonl"], ":validation", "has test and train, not validation"),
        (["a.jsonl"], ":test", "has no split by its files' names"),
        (["a.jsonl", "b.csv"], "", "a folder of one kind"),
        (["a.txt"], "", "needs .jsonl"),
    ],
)
def test_a_folder_whose_rows_are_unclear(tmp_path: Path, files: list[str], spec: str, match: str) -> None:
    for name in files:
        (tmp_path / name).write_text(lines(QA))
    with pytest.raises(NeuronSelectError, match=match):
        load_rows(f"{tmp_path}{spec}")


def test_a_folder_without_splits_is_read_whole(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", QA[:2])
    jsonl(tmp_path / "contest" / "b.jsonl", QA[2:])
    jsonl(tmp_path / ".cache" / "c.jsonl", QA)
    (tmp_path / "dataset_info.json").write_text("{}")
    assert both(tmp_path) == QA


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    splits = DatasetDict({"train": Dataset.from_list(QA[:3]), "test": Dataset.from_list(QA[3:])})
    splits.save_to_disk(tmp_path / "saved")
    assert both(tmp_path / "saved") == both(tmp_path / "saved" / "train") == QA[:3]
    assert both(f"{tmp_path}/saved:test") == QA[3:]
    DatasetDict({"a": splits["train"], "b": splits["test"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(NeuronSelectError, match="has a and b, not train"):
        load_rows(str(tmp_path / "other"))


def test_columns_of_an_earlier_selection_are_left_out(tmp_path: Path) -> None:
    before = {"neuron_score": 1.0, "neuron_rank": 0, "source_index": 4, "neuron_score_t": 0.5, "messages": []}
    jsonl(tmp_path / "selected.jsonl", [row | before for row in QA])
    assert both(tmp_path / "selected.jsonl") == QA
    parquet(tmp_path / "selected.parquet", [row | before for row in QA])
    assert both(tmp_path / "selected.parquet") == QA
    jsonl(tmp_path / "exported.jsonl", [row | {"source_index": 4} for row in QA])
    with pytest.warns(NeuronSelectWarning, match="source_index"):
        assert both(tmp_path / "exported.jsonl") == QA
    jsonl(tmp_path / "own.jsonl", [row | {"neuron_rank": 4} for row in QA])
    assert both(tmp_path / "own.jsonl")[0]["neuron_rank"] == 4
    assert isinstance(load_rows(str(tmp_path / "own.jsonl"), streaming=True).data, IterableDataset)
