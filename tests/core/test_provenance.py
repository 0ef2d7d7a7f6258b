"""Records: the same after a round trip, and one clear line for a damaged one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hf_neuronselect.core.cost import Cost, Meter, PassCost
from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.core.options import NumberOptions
from hf_neuronselect.core.provenance import (
    AutoRatio,
    Avoided,
    Budget,
    CapabilityRecord,
    Counts,
    ExtractionRecord,
    Lengths,
    MethodRecord,
    Provenance,
    SourceRecord,
    TargetRecord,
    Timing,
    plain,
)
from hf_neuronselect.core.seals import decode, encode

MADE = Provenance(
    method=MethodRecord(name="m", paper="p", options={"a": None, "b": 1, "c": 0.5, "d": "x", "e": True, "f": [1, "y"]}),
    targets={"t": TargetRecord(exemplars=3, used=2, source=SourceRecord(id="o/n", commit="0" * 40, split="dev"))},
    avoided=Avoided(
        targets={"u": TargetRecord(exemplars=4, used=4, hit=0.5, held_out=(0.5, 0.25), doubts=("no",))}, weight=0.5
    ),
    budget=Budget(ratio=0.05),
    auto=AutoRatio(
        ratio=0.05, estimates={"knee": 0.05}, absent={"b": "none"}, shares=(0.1, 1.0), curves={"knee": (0.5, 0.0)}
    ),
    aggregate="weighted",
    weights={"t": 1.0},
    exclude=("leak",),
    pool=SourceRecord(id="p.jsonl", commit="content:1", rows=7, derived_from=SourceRecord(id="o/p")),
    capability=SourceRecord(id="o/c", name="t"),
    extractor=ExtractionRecord(
        model=SourceRecord(id="m", commit="state:1"),
        options=NumberOptions(layer=3, columns={"prompt": "q"}, chat_template="{{ x }}"),
        signals={"m": "abc"},
    ),
    counts=Counts(rows=7, selected=1, leak=2, reasons=("row 1: no",)),
    tokens=Lengths(pool_mean=3.25),
    packages={"numpy": "2"},
    timing=Timing(seconds=0.1, tokens_per_second=5, finished="2026-01-01T00:00:00Z"),
    cost=Cost(passes={"a": PassCost(engine="forward", signals=("m",), seconds={"compute": 0.5}, tokens=3)}),
    files={"a": "b"},
)


def read(text: str | bytes) -> Provenance:
    return decode(text, Provenance, what="a selection folder", option="selection", value="name")


def test_a_record_survives_json() -> None:
    text = encode(MADE)
    assert read(text) == MADE and encode(read(text)) == text
    found = json.loads(text)
    assert found["method"]["options"]["a"] is None  # an option's own None is kept
    assert "capability" in found and "sae" not in found["extractor"]  # a field's None is not written
    assert found["extractor"]["options"]["layer"] == 3 and found["budget"] == {"ratio": 0.05}


def changed(*path: str, value: object) -> str:
    """A record with another value, under a seal of its own."""
    found = json.loads(encode(MADE))
    del found["seal"]
    inner = found
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return encode(found)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[1]", "got `array`"),
        ('"text"', "got `str`"),
        ("null", "got `null`"),
        ("{", "truncated"),
        (b"\xff", "malformed"),
        ("{}", "it has no seal"),
        (encode({}), "missing required field `method`"),
        (changed("method", value="mona"), "at `$.method`"),
        (changed("counts", "rows", value="7"), "at `$.counts.rows`"),
        (changed("targets", value=None), "at `$.targets`"),
        (changed("budget", value={"k": 1, "ratio": 0.5}), "give exactly one of ratio, k"),
        (changed("extractor", "options", "dtype", value="int8"), "at `$.extractor.options.dtype`"),
        (changed("extractor", "options", "max_length", value=0), "max_length=0: must be at least 1"),
        (changed("cost", "passes", value=[]), "at `$.cost.passes`"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(text: str | bytes, where: str) -> None:
    with pytest.raises(NeuronSelectError) as caught:
        read(text)
    message = caught.value.as_command_line()
    assert message.startswith("--selection name: not a selection folder (") and where in message
    assert message.isprintable()


def test_a_record_that_was_changed_is_refused() -> None:
    text = encode(MADE)
    assert read(json.dumps(json.loads(text))) == MADE  # other spaces, the same values
    for before, after in (('"rows": 7', '"rows": 8'), ('"seal": "', '"seal": "0'), ('"aggregate"', '"aggregatf"')):
        assert text.count(before) == 1 or before == '"rows": 7'
        with pytest.raises(NeuronSelectError) as caught:
            read(text.replace(before, after, 1))
        line = caught.value.as_command_line()
        assert line == "--selection name: its record was changed after it was written; make it again"


def test_numbers_of_numpy_are_plain() -> None:
    assert plain({"a": np.int64(3), "b": (np.float32(0.5), None)}) == {"a": 3, "b": [0.5, None]}


def test_a_capability_without_an_extractor() -> None:
    made = CapabilityRecord(method=MethodRecord(name="m"), targets={})
    assert decode(encode(made), CapabilityRecord, what="a capability", option="target", value="x") == made


def test_a_summary_is_of_the_same_selection() -> None:
    said = MADE.summary("me/rows")
    assert (said.method, said.pool, said.files, said.repo_id) == (MADE.method, MADE.pool, MADE.files, "me/rows")
    assert said.counts is not None and said.counts.reasons == () and said.counts.leak == 2


# -- cost


def test_a_pass_counts_once() -> None:
    a, b = PassCost(engine="forward", tokens=10), PassCost(engine="text", rows=5)
    one = Cost(passes={"1": a, "2": b}, fit_seconds=1.0)
    other = Cost(passes={"2": b, "3": a}, score_seconds=0.5)
    both = one.merge(other)
    assert both.passes == {"1": a, "2": b, "3": a} and (both.fit_seconds, both.score_seconds) == (1.0, 0.5)
    assert both.merge(one) == Cost(passes=both.passes, fit_seconds=2.0, score_seconds=0.5)
    # The same pass, computed here and read back from the store it was written to: computed here.
    assert one.as_reused().merge(one).passes == one.passes == one.merge(one.as_reused()).passes


def test_parts_of_a_pass_are_folded() -> None:
    part = PassCost(engine="forward", signals=("a",), seconds={"compute": 1.5}, tokens=10, rows=2, peak_bytes=7)
    more = PassCost(
        engine="forward", signals=("b",), seconds={"compute": 1.0, "read": 0.5}, tokens=5, rows=1, peak_bytes=9
    )
    folded = Cost(passes={"x.0": part, "x.1": more, "y": part}).folded().passes
    assert list(folded) == ["x", "y"] and folded["y"] == part
    assert folded["x"] == PassCost(
        engine="forward", signals=("a", "b"), seconds={"compute": 2.5, "read": 0.5}, tokens=15, rows=3, peak_bytes=9
    )


def test_no_rate_of_stored_work() -> None:
    stored = Cost(passes={"1": PassCost(engine="forward", seconds={"compute": 2.0}, tokens=100)})
    assert stored.tokens_per_second() == 50 and stored.computed_tokens == 100
    assert stored.as_reused().tokens_per_second() is None and stored.as_reused().computed_tokens == 0
    assert Cost(passes={"2": PassCost(engine="text", seconds={"compute": 1.0})}).tokens_per_second() is None


def test_a_meter_measures_also_what_fails() -> None:
    meter = Meter("judge", ["quality"], part="3", name="p")
    assert meter.cost() == Cost()  # nothing was done
    with pytest.raises(ZeroDivisionError), meter.stage("compute"):
        1 / 0  # noqa: B018
    meter.add_rows(2)
    meter.add_requests(1, 0.25)
    meter.add_requests(1, 0.5)
    found = meter.cost().passes["p.3"]
    assert (found.engine, found.signals, found.rows, found.requests, found.money) == ("judge", ("quality",), 2, 2, 0.75)
    assert set(found.seconds) == {"compute"} and found.peak_bytes is not None and found.peak_bytes > 10**7
    assert Meter("text").name != Meter("text").name
