"""The digest of rows depends on their content alone, and on all of it."""

from __future__ import annotations

import copy
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from datasets.table import InMemoryTable
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from versions import before

from hf_neuronselect.rows import identity
from hf_neuronselect.rows.formats import RowFormat, row_format
from hf_neuronselect.rows.identity import pool_digest, rows_digest
from hf_neuronselect.rows.load import load_rows

quickly = settings(max_examples=60, deadline=None)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.none() | texts},
    optional={"tool_calls": st.none() | st.lists(st.fixed_dictionaries({"name": texts, "n": st.integers(0, 9)}))},
)
pools = st.lists(st.fixed_dictionaries({"messages": st.none() | st.lists(turns, max_size=3)}), min_size=1, max_size=6)
strings = st.lists(st.none() | texts, min_size=1, max_size=8)
PLAIN = RowFormat("text", (("text", "text"),))
TURN = pa.struct(
    {
        "role": pa.string(),
        "content": pa.string(),
        "tool_calls": pa.list_(pa.struct({"name": pa.string(), "n": pa.int64()})),
    }
)
TYPE = pa.schema({"messages": pa.list_(TURN)})


def digest(table: pa.Table, rows: range | None = None) -> str:
    return rows_digest(Dataset(InMemoryTable(table)), row_format(table.column_names), rows or range(len(table)))


def of_strings(values: list[str | None], kind: pa.DataType | None = None) -> str:
    return digest(pa.table({"text": pa.array(values, kind or pa.string())}))


def table_of(pool: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(pool, TYPE)


def retyped(kind: pa.DataType, text: pa.DataType, large: bool) -> pa.DataType:
    """The type with other strings and lists."""
    if pa.types.is_string(kind):
        return text
    if pa.types.is_integer(kind):
        return pa.int32()
    if pa.types.is_list(kind):
        return (pa.large_list if large else pa.list_)(retyped(kind.value_type, text, large))
    return pa.struct([(field.name, retyped(field.type, text, large)) for field in kind])


# ---------------------------------------------------------------------------- what does not change it
@quickly
@given(pools, st.data())
def test_chunks_do_not_matter(pool: list[dict[str, Any]], data: st.DataObject) -> None:
    whole = table_of(pool)
    cut = data.draw(st.integers(0, len(pool)))
    parts = pa.concat_tables([table_of(pool[:cut]), table_of(pool[cut:])])
    assert parts.column(0).num_chunks == 2 and digest(parts) == digest(whole)


@quickly
@given(pools, pools, pools)
def test_a_slice_is_as_its_rows_alone(before: Any, pool: list[dict[str, Any]], after: Any) -> None:
    """By row numbers, as an offset into Arrow's buffers, and by an index mapping."""
    alone = digest(table_of(pool))
    longer = table_of([*before, *pool, *after])
    rows = range(len(before), len(before) + len(pool))
    assert digest(longer, rows) == alone
    assert digest(longer.slice(rows.start, len(rows))) == alone
    picked = Dataset(InMemoryTable(longer)).select([*rows][::-1]).select(range(len(rows))[::-1])
    assert rows_digest(picked, row_format(["messages"]), range(len(rows))) == alone


@quickly
@given(pools, st.sampled_from([pa.string(), pa.large_string()]), st.booleans())
def test_type_widths_do_not_matter(pool: list[dict[str, Any]], text: pa.DataType, large: bool) -> None:
    table = table_of(pool)
    other = pa.Table.from_pylist(table.to_pylist(), pa.schema({"messages": retyped(TYPE.field(0).type, text, large)}))
    assert digest(other) == digest(table)


ENCODINGS = [pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
if not before("datasets", "4.1"):  # which has no such type
    ENCODINGS.append(pa.string_view())


@quickly
@given(strings, st.sampled_from(ENCODINGS))
def test_encodings_of_text_do_not_matter(values: list[str | None], kind: pa.DataType) -> None:
    array = pa.array(values, pa.string())
    array = array.dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values, kind)
    assert digest(pa.table({"text": array})) == of_strings(values)


@quickly
@given(pools, st.data())
def test_keys_that_are_absent_are_as_null(pool: list[dict[str, Any]], data: st.DataObject) -> None:
    """A struct's keys, and columns that a format does without."""
    filled = copy.deepcopy(pool)
    for turn in (turn for row in filled for turn in row["messages"] or []):
        turn.setdefault("tool_calls", None)
    assert digest(table_of(filled)) == digest(table_of(pool))
    used = {name for row in pool for turn in row["messages"] or [] for name, value in turn.items() if value is not None}
    kind = pa.struct([field for field in TURN if field.name in used] + [pa.field("weight", pa.float64())])
    rows = [
        row["messages"] and [{k: v for k, v in turn.items() if k in used} for turn in row["messages"]] for row in pool
    ]
    other = pa.table({"messages": pa.array(rows, pa.list_(kind)), "tools": pa.nulls(len(pool))})
    assert digest(other) == digest(table_of(pool))


@quickly
@given(pools)
def test_the_order_of_keys_does_not_matter(pool: list[dict[str, Any]]) -> None:
    table = table_of(pool)
    kind = pa.schema({"messages": pa.list_(pa.struct(list(TURN)[::-1]))})
    assert digest(pa.Table.from_pylist(table.to_pylist(), kind)) == digest(table)


@settings(max_examples=15, deadline=None)
@given(pools)
def test_the_file_format_does_not_matter(tmp_path_factory: pytest.TempPathFactory, pool: list[dict[str, Any]]) -> None:
    assume(any(turn.get("content") for row in pool for turn in row["messages"] or []))  # JSON alone tells no types
    folder = tmp_path_factory.mktemp("files")
    pq.write_table(table_of(pool), folder / "pool.parquet")
    Dataset(InMemoryTable(table_of(pool))).to_json(folder / "pool.jsonl")
    found = {
        rows_digest(data, row_format(data.column_names), range(len(pool)))
        for data in (
            Dataset.from_parquet(str(folder / "pool.parquet"), cache_dir=str(folder)),
            Dataset.from_json(str(folder / "pool.jsonl"), cache_dir=str(folder)),
        )
    }
    assert found == {digest(table_of(pool))}


def test_names_and_other_columns_do_not_matter() -> None:
    """Columns are hashed by the format's own names."""
    values = ["a", "b"]
    data = Dataset.from_dict({"query": values, "reply": values, "id": [1, 2]})
    fmt = row_format(data.column_names, "qa", {"question": "query", "answer": "reply"})
    own = Dataset.from_dict({"answer": values, "question": values})
    assert rows_digest(data, fmt, range(2)) == rows_digest(own, row_format(own.column_names), range(2))


# -------------------------------------------------------------------------------- what does change it
@quickly
@given(pools, pools)
def test_other_rows_have_another_digest(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    same = table_of(one).to_pylist() == table_of(other).to_pylist()
    assert (digest(table_of(one)) == digest(table_of(other))) == same


@quickly
@given(strings, st.data())
def test_every_character_counts(values: list[str | None], data: st.DataObject) -> None:
    long = [i for i, value in enumerate(values) if value]
    assume(long)
    row = data.draw(st.sampled_from(long))
    text = values[row] or ""
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.characters(exclude_categories=("Cs",)).filter(lambda character: character != text[at]))
    other = [*values]
    other[row] = text[:at] + new + text[at + 1 :]
    assert of_strings(other) != of_strings(values)


@quickly
@given(strings.filter(lambda values: len(set(values)) > 1), st.randoms())
def test_order_counts(values: list[str | None], draw: Any) -> None:
    other = [*values]
    draw.shuffle(other)
    assert (of_strings(other) == of_strings(values)) == (other == values)


@quickly
@given(texts, texts, texts)
def test_a_boundary_between_rows_counts(a: str, b: str, c: str) -> None:
    assume(b)
    assert of_strings([a + b, c]) != of_strings([a, b + c])
    turns = [[{"role": "user", "content": text} for text in row] for row in ([a, b], [c])]
    moved = [[turns[0][0]], [turns[0][1], *turns[1]]]
    assert digest(table_of([{"messages": row} for row in turns])) != digest(
        table_of([{"messages": row} for row in moved])
    )


@pytest.mark.parametrize(
    "one, other",
    [
        ([""], [None]),
        (["a", None], ["a", ""]),
        ([None, "a"], ["a", None]),
        (["a"], ["a", None]),
        (["a"], ["a", ""]),
        ([None], [None, None]),
        (["1"], [1]),
        ([1], [True]),
        ([[]], [None]),
        ([["a"], []], [[], ["a"]]),
        ([{"a": "x", "b": None}], [{"a": None, "b": "x"}]),
        ([{"a": None, "b": "x"}, None], [None, {"a": None, "b": "x"}]),
    ],
)
def test_values_that_look_alike(one: list[Any], other: list[Any]) -> None:
    found = [rows_digest(Dataset(InMemoryTable(pa.table({"text": v}))), PLAIN, range(len(v))) for v in (one, other)]
    assert found[0] != found[1]


def test_which_column_counts() -> None:
    one, other = (Dataset.from_dict({"question": q, "answer": a}) for q, a in ((["x"], ["y"]), (["y"], ["x"])))
    fmt = row_format(["question", "answer"])
    assert rows_digest(one, fmt, range(1)) != rows_digest(other, fmt, range(1))


# ------------------------------------------------------------------------------------- rows as they are loaded
ROWS = [{"question": f"q{i}", "answer": f"a{i}", "id": i} for i in range(5)]
OTHER = [*ROWS[:2], ROWS[2] | {"answer": "a9"}, *ROWS[3:]]  # of the same size


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(
        ["question,answer,id", *(f"{row['question']},{row['answer']},{row['id']}" for row in rows)]
    ).encode()


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FILES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "pool.csv": as_csv,
    "pool.jsonl": as_jsonl,
    "pool.parquet": as_parquet,
    "pool.jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows)),
    "pool.jsonl.xz": lambda rows: lzma.compress(as_jsonl(rows)),
    "deep/er/pool.csv": as_csv,
}


def commit_of(place: Path, rows: list[dict[str, Any]], name: str, **options: Any) -> str:
    """What a pool is called whose file has these rows, now; the time of the file never changes."""
    file = place / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(FILES[name](rows))
    os.utime(file, ns=(10**18, 10**18))
    return str(load_rows(str(place if place.name == "folder" else file), **options).about["commit"])


@pytest.mark.parametrize("place", ["folder", "alone"])
@pytest.mark.parametrize("name", FILES)
def test_local_rows_are_what_they_hold(tmp_path: Path, name: str, place: str) -> None:
    """In files of one size and one time: nothing cached of the rows before is used."""
    one, other = (commit_of(tmp_path / place, rows, name) for rows in (ROWS, OTHER))
    assert len({one, other, commit_of(tmp_path / place, ROWS[::-1], name)}) == 3
    twin = name if ".csv" in name else "pool.parquet"  # a number is a text in CSV
    assert commit_of(tmp_path / "elsewhere", ROWS, twin) == one == commit_of(tmp_path / place, ROWS, name)


@pytest.mark.parametrize("place", ["folder", "alone"])
@pytest.mark.parametrize("name", ["pool.csv", "pool.jsonl.gz", "deep/er/pool.csv"])
def test_a_local_stream_is_the_bytes_of_its_files(tmp_path: Path, name: str, place: str) -> None:
    one, other = (commit_of(tmp_path / place, rows, name, streaming=True) for rows in (ROWS, OTHER))
    assert one != other and commit_of(tmp_path / place, ROWS, name, streaming=True) == one


def test_a_saved_dataset_is_what_it_holds(tmp_path: Path) -> None:
    for name, rows in (("one", ROWS), ("other", OTHER)):
        Dataset.from_list(rows).save_to_disk(tmp_path / name)
    one, other = (load_rows(str(tmp_path / name)).about["commit"] for name in ("one", "other"))
    assert one != other and one == f"content:{pool_digest(Dataset.from_list(ROWS))}"
    streams = [load_rows(str(tmp_path / name), streaming=True).about["commit"] for name in ("one", "other")]
    assert streams[0] != streams[1]


@pytest.mark.parametrize("name", ["question", "id"])
def test_every_column_is_part_of_a_pool(name: str) -> None:
    before = Dataset.from_list(ROWS)
    after = Dataset.from_list([ROWS[0] | {name: type(ROWS[0][name])("7")}, *ROWS[1:]])
    assert pool_digest(after) != pool_digest(before)
    assert pool_digest(before.select_columns(["id", "question", "answer"])) == pool_digest(before)
    assert pool_digest(before.remove_columns(name)) != pool_digest(before)


def test_blocks_do_not_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "BLOCK", 2)
    whole = Dataset.from_list(ROWS)
    found = {pool_digest(data) for data in (whole, whole.select([2, 3, 0, 1, 4]), whole.select(range(4)))}
    assert len(found) == 3
