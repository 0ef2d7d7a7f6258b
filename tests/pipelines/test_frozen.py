"""Scores and picks of every kind of selection are those on record, to four digits, whatever is changed inside."""

from __future__ import annotations

import json
from pathlib import Path

import frozen
import numpy as np
import pytest
from reports import without_reports

GOLDENS = json.loads((Path(frozen.__file__).parent / "frozen_goldens.json").read_text(encoding="utf-8"))
LOOSE = ("dtype_bfloat16",)  # three digits, and they differ between processors


def kinds() -> list[str]:
    """The first part of the selections' names: one test each, so that a failure says where."""
    return sorted({name.split(".")[0] for name in GOLDENS} - set(LOOSE))


def test_every_selection_is_on_record() -> None:
    assert set(GOLDENS) == set(frozen.CASES)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> frozen.Lab:
    return frozen.Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("kind", kinds())
def test_the_numbers_stay(kind: str, lab: frozen.Lab) -> None:
    names = [name for name in frozen.CASES if name.split(".")[0] == kind]
    with without_reports():
        found = frozen.golden(frozen.run(names, lab=lab))
    assert set(found) == set(names)
    for name in names:
        assert set(found[name]) == set(GOLDENS[name]), name
        for column, want in GOLDENS[name].items():
            if column.startswith("score"):
                np.testing.assert_allclose(
                    np.asarray(found[name][column], float),
                    np.asarray(want, float),
                    rtol=1e-4,
                    err_msg=f"{name} {column}",
                )
            else:
                assert found[name][column] == want, f"{name} {column}"
