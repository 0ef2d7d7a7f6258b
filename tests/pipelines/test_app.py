"""The app: what it finds and tells, that it serves this machine alone, loads nothing from elsewhere and runs no text."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chromium import launched
from datasets import Dataset
from reports import EVIL
from tiny import chat, rows

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.cli.main import main
from hf_neuronselect.core.configs import AppConfig
from hf_neuronselect.pipelines.browse import Browser
from hf_neuronselect.pipelines.serve import _free_port, serve

HOSTILE = [
    EVIL,
    "${alert(3)} {{alert(4)}}",
    "[x](javascript:alert(5)) $x^2$",
    "\x1b[31m\u202eevil",
    "<b onclick=alert(6)>",
]
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio")


@pytest.fixture(scope="module")
def folder(extractor: NeuronFeatureExtractor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selection of rows that are told apart by their numbers, from sources with hostile names."""
    pool = Dataset.from_list(
        [{"messages": chat(f"{HOSTILE[i % 5]} Number{i}", "yes"), "source": HOSTILE[i % 3]} for i in range(20)]
    )
    folder = tmp_path_factory.mktemp("app") / "selection"
    NeuronSelector("mona").fit({"t": rows(6, seed=1)}, extractor=extractor).select(pool, k=8).save_pretrained(folder)
    return folder


@pytest.fixture
def config(folder: Path, tiny_folder: Path) -> AppConfig:
    return AppConfig(
        folder=str(folder), model=str(tiny_folder / "model"), sae=str(tiny_folder / "sae"), device="cpu", port=0
    )


# ------------------------------------------------------------------------------------------- what it finds
def test_rows_are_found_by_words_source_and_score(config: AppConfig) -> None:
    browser = Browser(config)
    dataset = Selection.from_pretrained(config.folder).dataset
    texts = [" ".join(turn["content"] for turn in messages) for messages in dataset["messages"]]
    for place, text in enumerate(texts):
        number = text.split("Number")[1].split()[0]
        assert place in browser.find(f"yes NUMBER{number}") and place not in browser.find(f"number{number} no")
    assert browser.find() == list(range(8))
    for source in HOSTILE[:3]:
        assert browser.find(sources=[source]) == [i for i in range(8) if dataset["source"][i] == source]
    middle = browser.score[3]
    assert browser.find(low=middle) == [i for i in range(8) if browser.score[i] >= middle]
    assert browser.find(high=middle) == [i for i in range(8) if browser.score[i] <= middle]
    assert browser.find(low=float(browser.score.min()), high=float(browser.score.max())) == list(range(8))
    assert set(browser.sources) == set(dataset["source"])


def test_tools_answer_in_json_and_words(config: AppConfig) -> None:
    browser = Browser(config)
    about = json.loads(browser.about())
    assert (about["rows"], about["pool_rows"], about["method"], about["for"]) == (8, 20, "mona", "t")
    found = json.loads(browser.search(most=3))
    assert [one["place"] for one in found] == [0, 1, 2]
    assert [one["pool_row"] for one in found] == browser.selection.indices[:3].tolist()
    assert json.loads(browser.search(source=HOSTILE[0], most=0)) == []
    same = browser.selection.explain
    browser.selection.selector.make_extractor(model=config.model, sae=config.sae, device="cpu")  # type: ignore[union-attr]
    assert browser.why(2).splitlines()[0] == str(same(2)).splitlines()[0]
    assert f"Row {browser.near()[0][0]} of the pool" in browser.why_not(browser.near()[0][0])
    assert "A - B" in browser.contrast(0, 1)
    assert "\x1b" not in "".join(browser.row(i) + browser.why(i) for i in range(8))
    with pytest.raises(NeuronSelectError, match="^place=8: the selection has places 0 to 7$"):
        browser.row(8)
    assert [score for _, score in browser.near()] == sorted((score for _, score in browser.near()), reverse=True)


def test_sources_are_found_by_the_names_that_are_shown(
    target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    names = ["\x1b[31m\u202eevil", "a\r\nb", "plain"]
    pool = Dataset.from_list([{"messages": chat(f"Number{i}", "yes"), "source": names[i % 3]} for i in range(9)])
    made = NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(pool, k=9)
    made.provenance = replace(made.provenance, pool=replace(made.provenance.pool, id="me/\x9b31mpool"))
    made.save_pretrained(tmp_path / "s")
    browser = Browser(AppConfig(folder=str(tmp_path / "s")))
    about = json.loads(browser.about())
    assert not set("".join([*about["sources"], about["pool"]])) & set("\x1b\x9b\u202e\r")
    assert len(about["sources"]) == 3
    for name in about["sources"]:
        found = json.loads(browser.search(source=name))
        assert len(found) == 3 and {one["source"] for one in found} == {name}


def test_rows_without_sources(
    pool: Dataset, target: Dataset, extractor: NeuronFeatureExtractor, tmp_path: Path
) -> None:
    bare = NeuronSelector("mona").fit({"t": target}, extractor=extractor).select(pool.select_columns(["messages"]), k=2)
    bare.save_pretrained(tmp_path / "s")
    browser = Browser(AppConfig(folder=str(tmp_path / "s")))
    assert browser.sources == [] and "source" not in browser.line(0)


def test_a_column_of_many_values_names_no_sources(config: AppConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_neuronselect.pipelines.browse.MOST_SOURCES", 2)
    browser = Browser(config)
    assert browser.sources == [] and "source" not in browser.line(0) and browser.find() == list(range(8))


@pytest.mark.parametrize(
    ("missing", "words", "name"), [("gradio", [], "Gradio"), ("mcp", ["--mcp"], "the package mcp")]
)
def test_a_missing_package_is_one_line(
    missing: str, words: list[str], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda one, *more: None if one == missing else there(one, *more) or 1
    )
    monkeypatch.setattr(sys, "argv", ["neuronselect", "app", "nowhere", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: app needs {name}: pip install 'hf-neuronselect[app]'\n"


# ------------------------------------------------------------------------------------------- as it is served
def served(config: AppConfig, visit: Callable[[str], Any]) -> list[str]:
    """Visit the app at its address; returns what was said."""
    said: list[str] = []

    def wait() -> None:
        visit(next(line.split(": ")[1].split()[0] for line in said if "http" in line))

    serve(config, say=said.append, note=said.append, wait=wait)
    return said


@needs_gradio
def test_tools_are_its_only_functions(config: AppConfig) -> None:
    from gradio_client import Client

    def visit(url: str) -> None:
        client = Client(url, verbose=False)
        tools = {"/about", "/search", "/row", "/why", "/why_not", "/contrast"}
        assert set(client.view_api(return_format="dict")["named_endpoints"]) == tools
        assert json.loads(client.predict("number", most=2, api_name="/search"))[1]["place"] == 1
        assert client.predict(0, api_name="/why").startswith("Row ")
        with pytest.raises(Exception, match="the selection has places 0 to 7"):
            client.predict(99, api_name="/row")
        settings = json.loads(urllib.request.urlopen(f"{url}config").read())
        assert not settings["analytics_enabled"] and not settings.get("is_space")
        with pytest.raises(urllib.error.HTTPError, match="400"):  # a name that points here
            urllib.request.urlopen(urllib.request.Request(url, headers={"Host": "elsewhere.example"}))
        port = int(url.rsplit(":", 1)[1].strip("/"))
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}
        for address in others - {"127.0.0.1", "127.0.1.1"}:
            with pytest.raises(OSError, match="refused|timed out"):
                socket.create_connection((address, port), timeout=2)

    said = served(config, visit)
    assert len(said) == 1 and "http://127.0.0.1:" in said[0]


@needs_gradio
def test_a_port_that_is_taken_is_named(config: AppConfig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = AppConfig(folder=config.folder, port=port)
        with pytest.raises(NeuronSelectError, match=f"^port={port}: cannot be listened at: it is taken"):
            served(given, lambda url: None)


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(NeuronSelectError, match=r"^host='203\.0\.113\.1': is no address of this machine \(.+\); 127"):
        _free_port("203.0.113.1")


@needs_gradio
@pytest.mark.skipif(importlib.util.find_spec("mcp") is None, reason="needs mcp")
def test_the_tools_are_served_over_mcp(config: AppConfig) -> None:
    import asyncio

    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def ask(url: str) -> None:
        async with streamablehttp_client(f"{url}gradio_api/mcp/") as (reading, writing, _):
            async with ClientSession(reading, writing) as session:
                await session.initialize()
                tools = {tool.name: tool for tool in (await session.list_tools()).tools}
                assert set(tools) == {"about", "search", "row", "why", "why_not", "contrast"}
                place = tools["why"].inputSchema["properties"]["place"]
                assert place == {"type": "integer", "description": "place in the selection, 0 is the best"}
                assert tools["why"].description and tools["why"].description.startswith("Say why a row was selected")
                found = await session.call_tool("search", {"words": "number", "most": 1})
                assert json.loads(found.content[0].text)[0]["place"] == 0  # type: ignore[union-attr]
                refused = await session.call_tool("row", {"place": 99})
                assert refused.isError and "places 0 to 7" in refused.content[0].text  # type: ignore[union-attr]

    given = AppConfig(folder=config.folder, port=0, mcp=True)
    said = served(given, lambda url: asyncio.run(ask(url)))
    assert said[1].startswith("MCP (streamable HTTP): http://127.0.0.1:") and len(said) == 2


@needs_gradio
def test_the_page_in_a_browser(config: AppConfig) -> None:
    """Texts that would do something are shown; nothing is loaded from elsewhere, and no error is logged."""
    found: list[str] = []

    def visit(url: str) -> None:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda one: found.append(one.text) if one.type in ("error", "warning") else 0)
        page.on("pageerror", lambda error: found.append(str(error)))
        page.on("dialog", lambda dialog: (found.append(dialog.message), dialog.dismiss()))
        page.on(
            "request", lambda request: found.append(request.url) if not request.url.startswith((url, "data:")) else 0
        )
        page.goto(url)
        text = page.locator(".neuronselect-text")
        text.wait_for()
        shown = Browser(config)

        def shows(place: int) -> None:
            same = "(text) => document.querySelector('.neuronselect-text').textContent === text"
            page.wait_for_function(same, arg=shown.row(place), timeout=30_000)

        for place in range(8):
            page.get_by_label("Place (0 is the best)").fill(str(place))
            shows(place)
        page.get_by_role("button", name="Why was it picked?").click()
        page.get_by_text("Its score:").wait_for(timeout=60_000)
        page.get_by_label("Search").fill("number")
        page.get_by_text("8 of 8 rows").wait_for()
        page.get_by_label("Search").fill(f"number{int(shown.row(1).split('Number')[1].split()[0])}")
        page.get_by_text("1 of 8 rows").wait_for(timeout=30_000)
        page.locator("[data-row='0'][data-col='0']").first.click()
        shows(1)
        page.get_by_role("tab", name="Why not?").click()
        page.get_by_role("button", name="Why was it not picked?").click()
        page.get_by_text("below the cut at").first.wait_for(timeout=60_000)
        page.get_by_role("tab", name="Compare two").click()
        page.get_by_role("button", name="Why does A score higher?").click()
        page.get_by_text("adds to the score").wait_for(timeout=60_000)

    with launched() as browser:
        served(config, visit)
    assert found == []
