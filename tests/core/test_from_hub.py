"""Models, SAEs and rows from a Hub over HTTP by the real clients, and one clear line for what a Hub refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import Hub, running
from tiny import rows

SCRIPT = """
import json, os, sys, time
if "IMPATIENT" in os.environ:
    time.sleep = lambda seconds: None  # between its tries the Hub's client waits 23 s in all
from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError
from hf_neuronselect.rows.load import load_rows

calls = json.loads(sys.stdin.read())
found = {}
for name, (what, options) in calls.items():
    try:
        if what == "rows":
            loaded = load_rows(**options)
            found[name] = [len(list(loaded.data)), loaded.about]
        else:
            extractor = NeuronFeatureExtractor.from_pretrained(**options)
            out = extractor({"text": ["some words", "others"]})
            pinned = {"model": extractor.extraction.model, "sae": extractor.extraction.sae}
            numbers = {key: one and {"id": one.id, "commit": one.commit} for key, one in pinned.items()}
            found[name] = [numbers, [v.tolist() for v in out["mona_values"]] if "mona_values" in out else 0]
    except NeuronSelectError as error:
        found[name] = error.as_command_line()
print(json.dumps(found))
"""


def ask(endpoint: str, home: Path, calls: dict, **environment: str) -> dict:
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret",
                        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"} | environment  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(calls), env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hf_secret" not in done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def hub(tiny_folder: Path) -> Hub:
    made = Hub()
    made.add("models", "me/tiny", {p.name: p.read_bytes() for p in (tiny_folder / "model").iterdir() if p.is_file()})
    sae = {f"layers.2/{p.name}": p.read_bytes() for p in (tiny_folder / "sae" / "layers.2").iterdir()}
    made.add("models", "me/sae", {**sae, "layers.1/sae.safetensors": b"unused", "layers.1/cfg.json": b"{}"})
    buffer = io.BytesIO()
    rows(20).to_parquet(buffer)
    made.add("datasets", "me/pool", {"data/train-00000-of-00001.parquet": buffer.getvalue()})
    return made


def test_downloads_pins_and_goes_offline(hub: Hub, tmp_path: Path, tiny_folder: Path) -> None:
    calls = {
        "sae in a repository": ("model", {"model": "me/tiny", "sae": "me/sae"}),
        "sae folder": ("model", {"model": "me/tiny", "sae": "me/sae/layers.2"}),
        "local": ("model", {"model": str(tiny_folder / "model"), "sae": str(tiny_folder / "sae")}),
        "rows": ("rows", {"spec": "me/pool"}),
        "slice": ("rows", {"spec": "me/pool@main:default:train[:7]"}),
        "stream": ("rows", {"spec": "me/pool", "streaming": True}),
    }
    with running(hub) as endpoint:
        found = ask(endpoint, tmp_path, calls)
        # Only the SAE asked for was fetched, not the repository's others.
        assert not any("/layers.1/sae.safetensors" in request for request in hub.requests)
    for name in ("sae in a repository", "sae folder"):
        numbers, values = found[name]
        assert numbers["model"] == {"id": "me/tiny", "commit": hub.commit("models", "me/tiny")}
        assert numbers["sae"]["commit"] == hub.commit("models", "me/sae")
        assert values == found["local"][1]
    assert found["rows"][0] == 20 and found["slice"][0] == 7 and found["stream"][0] == 20
    assert found["rows"][1] == {
        "id": "me/pool", "commit": hub.commit("datasets", "me/pool"), "config": None, "split": "train",
    }  # fmt: skip
    # The Hub is gone: what is cached is used, under the same commits.
    offline = ask(endpoint, tmp_path, {k: calls[k] for k in ("sae folder", "rows")}, HF_HUB_OFFLINE="1")
    assert offline["sae folder"] == found["sae folder"]
    assert offline["rows"][0] == 20


def test_refusals_are_one_clear_line(hub: Hub, tmp_path: Path) -> None:
    names = ["gated", "private", "forbidden", "broken", "missing"]
    calls = {name: ("model", {"model": f"me/{name}", "features": ["hidden"]}) for name in names}
    calls["revision"] = ("model", {"model": "me/tiny", "revision": "nope", "features": ["hidden"]})
    calls["no config"] = ("model", {"model": "me/sae", "features": ["hidden"]})
    calls["sae"] = ("model", {"model": "me/tiny", "sae": "me/gated"})
    calls["rows"] = ("rows", {"spec": "me/missing"})
    calls["rows revision"] = ("rows", {"spec": "me/pool@nope"})
    with running(hub) as endpoint:
        found = ask(endpoint, tmp_path, calls)
    expected = {
        "gated": f"--model me/gated: the repository is gated: accept its terms at {endpoint}/me/gated",
        "private": "--model me/private: no such path here and no such repository on the Hub, or it is private",
        "forbidden": "--model me/forbidden: the Hub answered 403; the token may not read it",
        "broken": "--model me/broken: the Hub answered 501; try again later",
        "missing": "--model me/missing: no such path here and no such repository",
        "revision": "--model me/tiny: the repository has no such revision",
        "no config": "--model me/sae: a file is missing in the repository",
        "sae": "--sae me/gated: the repository is gated",
        "rows": "--pool me/missing: no such path here and no such repository",
        "rows revision": "--pool me/pool@nope: the repository has no such revision",
    }
    for name, message in expected.items():
        assert found[name].startswith(message), (name, found[name])


def test_an_unreachable_hub_says_so(tmp_path: Path) -> None:
    found = ask(
        "http://127.0.0.1:9",
        tmp_path,
        {"model": ("model", {"model": "me/tiny", "features": ["hidden"]})},
        IMPATIENT="1",
    )
    assert found["model"].startswith("--model me/tiny: ") and "cannot be reached" in found["model"]
