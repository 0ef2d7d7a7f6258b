"""The lower bounds of pyproject.toml as pins (`>=` made `==`), or (`check`) whether this environment has exactly those versions.

torch is the exception: its pin is the version given by `TORCH`, a CPU build (see .ci/run).
"""

import os
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
pins: dict[str, str] = {}
for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
    requirement = Requirement(line)
    (bound,) = requirement.specifier
    if bound.operator != ">=":
        sys.exit(f"pyproject.toml: {line}: give one lower bound, name>=version")
    name = requirement.name + (f"[{','.join(requirement.extras)}]" if requirement.extras else "")
    pins[name] = os.environ["TORCH"] if name == "torch" else bound.version

if sys.argv[1:] == ["check"]:
    wrong = [
        f"{name}: {found} is installed, {pin} is the bound"
        for name, pin in pins.items()
        if Version(found := version(name.partition("[")[0])) != Version(pin)
    ]
    sys.exit("\n".join(wrong) or None)
sys.stdout.write("".join(f"{name}=={pin}\n" for name, pin in pins.items()))
