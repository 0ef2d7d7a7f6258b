"""One hostile string through every channel: nothing of it reaches a terminal, a page or a card as it is."""

from __future__ import annotations

import json
import logging
import pickle
import sys
import unicodedata
from pathlib import Path

import pytest
from tiny import rows

from hf_neuronselect import NeuronSelectError
from hf_neuronselect.cli import main as cli
from hf_neuronselect.cli import run_app
from hf_neuronselect.cli.flags import note, say
from hf_neuronselect.core.errors import NeuronSelectWarning
from hf_neuronselect.core.provenance import SourceRecord
from hf_neuronselect.core.sae_record import SaeRecord
from hf_neuronselect.core.text import replaced, shown
from hf_neuronselect.explain.report import page, text_table
from hf_neuronselect.hub.cards import SaeCard

CODES = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
HOSTILE = "\x1b[2J\x1b]0;title\x07\r\x9b31m\u202eevil\u2066\u2028\u0000\x85"
FINE = "naïve café 中文 עברית क्षि 👩‍👩‍👧 می‌خواهم"


def clean(text: str) -> bool:
    return not [one for one in text if ord(one) in CODES and one not in "\n\t"]


def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["neuronselect", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out + out.err


def test_every_character_that_moves_or_turns_text_is_an_escape() -> None:
    for code in [*CODES, *range(0xD800, 0xE000)]:
        assert shown(f"a{chr(code)}b").isascii() and chr(code) not in shown(chr(code))
        assert replaced(chr(code)) in ("\ufffd", "\n", "\t")
    assert shown(FINE) == replaced(FINE) == FINE
    assert shown("a\n\tb", lines=True) == "a\n\tb" and shown("a\n\tb") == r"a\n\tb"
    missed = [
        code for code in range(sys.maxunicode) if unicodedata.bidirectional(chr(code)) in
        ("LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI", "B") and code not in CODES
    ]  # fmt: skip
    assert not missed


def test_errors_warnings_and_remarks(capsys: pytest.CaptureFixture) -> None:
    error = NeuronSelectError(f"no {HOSTILE}\nerror: all is well", option="pool", value=HOSTILE + "\n")
    for text in (str(error), error.as_command_line(), str(pickle.loads(pickle.dumps(error)))):
        assert clean(text) and "\n" not in text
    assert clean(str(NeuronSelectWarning(HOSTILE)))
    say(HOSTILE)
    note(HOSTILE)
    said = capsys.readouterr()
    assert clean(said.out) and clean(said.err) and "evil" in said.out and "evil" in said.err


def test_tables_pages_and_cards() -> None:
    table = text_table(["a", HOSTILE], [[HOSTILE + "\n", "1"], [FINE, "2"]])
    assert clean(table) and table.count("\n") == 3
    assert clean(page(HOSTILE, f"<p>{HOSTILE}</p>")) and FINE in page("t", FINE)
    card = SaeCard(
        {"layers.1": SaeRecord(model=HOSTILE, verdict=HOSTILE, fvu=0.5, dead=0.0, latents=2, tokens=3, l0=1.0)}
    )
    assert clean(card.render())


def test_logs_and_tracebacks_of_every_library(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    def fails(**_: object) -> int:
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("some.library")
        logger.addHandler(handler)
        logger.error("bad %s", HOSTILE)
        logger.removeHandler(handler)
        raise KeyError(HOSTILE)

    monkeypatch.setattr(run_app, "app", fails)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(KeyError) as crash:
        run_app.run_app()
    sys.excepthook(crash.type, crash.value, crash.tb)
    err = capsys.readouterr().err
    assert clean(err) and err.count("evil") >= 2
    assert type(logging.LogRecord("a", 1, "b", 1, "%s", ("c",), None).getMessage()) is str


def test_data_in_a_command(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = HOSTILE.replace("\0", "")
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps({hostile: 1, "b": 2}) + "\n")
    pool = tmp_path / "pool.jsonl"
    good = [json.dumps({"messages": row["messages"], "source": hostile}) for row in rows(4)]
    said = [{"role": "user", "content": hostile}, {"role": "assistant", "content": hostile * 3}]
    good.append(json.dumps({"messages": said, "source": hostile}))
    bad = json.dumps({"messages": [{"role": hostile, "content": "x"}], "source": hostile})
    pool.write_text("\n".join([*good, bad]) + "\n")
    base = ["select", "--method", "longest", "--k", "4", "--pool"]
    code, said_all = run(capsys, monkeypatch, *base, str(odd), "--out", str(tmp_path / "a"))
    assert code == 2 and clean(said_all) and "evil" in said_all, said_all
    for word in (f"--{hostile}", f"--keep={hostile}", f"--pool={hostile}", f"--method={hostile}"):
        code, said_all = run(capsys, monkeypatch, *base, str(pool), "--out", str(tmp_path / "a"), word)
        assert code == 2 and clean(said_all) and "evil" in said_all and said_all.count("error:") == 1
    folder = tmp_path / f"s{hostile.replace('/', '')}"
    code, said_all = run(capsys, monkeypatch, *base, str(pool), "--out", str(folder))
    assert code == 0 and clean(said_all) and "evil" in said_all, said_all
    for name in ("README.md", "report.html", "selection.json"):
        assert clean((folder / name).read_text()), name
    code, said_all = run(capsys, monkeypatch, "export", str(folder), "--format", "axolotl", "--base-model", "a/b",
                         "--out", str(tmp_path / "x"))  # fmt: skip
    assert code == 0 and clean(said_all) and clean((tmp_path / "x" / "axolotl.yaml").read_text())


def test_a_source_with_a_hostile_name() -> None:
    record = SourceRecord(id=HOSTILE, license=HOSTILE)
    assert clean(repr(record))
