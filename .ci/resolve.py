"""Whether a wheel can be installed beside each trainer, and on each Python: uv resolves, and installs nothing.

Usage: resolve.py WHEEL, with `uv` on the path.
"""

import subprocess
import sys
from pathlib import Path

TRAINERS = ("axolotl==0.19.0", "llamafactory==0.9.5", "unsloth==2026.10.*", "ms-swift==4.6.0", "vllm==0.33.0")
PYTHONS = ("3.11", "3.12", "3.13")

wheel = f"hf-neuronselect @ {Path(sys.argv[1]).resolve().as_uri()}"
cases = [(trainer, "3.11") for trainer in TRAINERS] + [("", python) for python in PYTHONS]
failed = False
for trainer, python in cases:
    done = subprocess.run(
        ["uv", "pip", "compile", "-q", "--no-header", "--no-annotate", "--python-version", python, "-"],
        input=f"{wheel}\n{trainer}\n", capture_output=True, text=True,
    )  # fmt: skip
    pins = dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)
    wanted = trainer.partition("==")[2].removesuffix("*")
    got = pins.get(trainer.partition("==")[0], "")
    good = done.returncode == 0 and got.startswith(wanted) and {"transformers", "datasets", "trl", "peft"} <= set(pins)
    failed |= not good
    about = ", ".join(f"{name} {pins.get(name)}" for name in ("transformers", "datasets", "trl", "peft", "torch"))
    sys.stdout.write(f"beside {trainer or 'nothing'}, Python {python}: {about if good else done.stderr or got}\n")
sys.exit(failed)
