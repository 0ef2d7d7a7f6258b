"""Ctrl-C where workers run: one line and exit status 130 from the command, and nobody is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import rows

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")

# Ctrl-C reaches every process of the terminal's group, here from the first worker of a Dataset.map.
IN_A_WORKER = """
import functools, os, signal, sys, time
from datasets import Dataset

real = Dataset._map_single

@functools.wraps(real)
def single(*given, rank=None, **more):
    if rank == 0:
        time.sleep(0.3)
        os.killpg(0, signal.SIGINT)
    if rank is not None:
        time.sleep(60)
    return real(*given, rank=rank, **more)

Dataset._map_single = staticmethod(single)
"""
AT_A_STEP = """
import os, signal
from hf_neuronselect.training.callback import CardCallback

CardCallback.on_step_end = lambda self, *given, **more: os.killpg(0, signal.SIGINT)
"""
COMMAND = """
from hf_neuronselect.cli import main
main.main()
"""


def start(code: str, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def group(leader: int) -> list[int]:
    """Running processes of a group."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state, _, process_group = (place / "stat").read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(process_group) == leader and state != "Z":
            found.append(int(place.name))
    return found


def ended(process: subprocess.Popen[str]) -> str:
    """What it wrote to stderr; all of its group end."""
    try:
        err = process.communicate(timeout=90)[1]
        late = time.monotonic() + 10
        while group(process.pid) and time.monotonic() < late:
            time.sleep(0.05)
        assert not group(process.pid), err
        return err
    finally:
        if group(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("where", [IN_A_WORKER, AT_A_STEP], ids=["in a worker", "at a step"])
def test_train(where: str, tiny_folder: Path, tmp_path: Path) -> None:
    rows(24).to_json(tmp_path / "rows.jsonl")
    train = {"model": str(tiny_folder / "model"), "max_steps": 3, "max_length": 64, "use_cpu": True, "dataset_num_proc": 2,
             "per_device_train_batch_size": 2, "lora_r": 2}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps({"train": train}))
    run = start(where + COMMAND, "train", "--config", tmp_path / "recipe.yaml", "--data", tmp_path / "rows.jsonl", "--out",
                tmp_path / "run")  # fmt: skip
    err = ended(run)
    assert run.returncode == 130, err
    assert err.rstrip().endswith("stopped") and "Traceback" not in err
    assert not list((tmp_path / "run").rglob("training.json")) and not list((tmp_path / "run").rglob(".*.lock"))
