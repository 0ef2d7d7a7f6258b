"""The record of an SAE: verdicts, doubts, damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_sae

from hf_neuronselect.core import bundled
from hf_neuronselect.core.digests import SAE_FILES, model_hash
from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.core.sae_record import SAE_RECORD, SaeRecord, quality_of, verdict_of
from hf_neuronselect.core.seals import CHECKSUMS, encode, write_checksums
from hf_neuronselect.models.sae_formats import load_sae

CASES = [(0.2, 0.0, "good"), (0.4, 0.0, "usable"), (0.2, 0.2, "usable"), (0.66, 0.2, "poor"), (0.1, 0.21, "poor")]


@pytest.mark.parametrize(("fvu", "dead", "quality"), CASES)
def test_quality_verdict_and_doubt_agree(fvu: float, dead: float, quality: str) -> None:
    assert quality_of(fvu, dead) == quality
    assert verdict_of(fvu, dead).startswith(f"{quality}: it explains {100 * (1 - fvu):.0f} % of")
    assert ("more tokens" in verdict_of(fvu, dead)) == (quality != "good")
    assert bool(SaeRecord(fvu=fvu, dead=dead, latents=9, tokens=9).doubt) == (quality == "poor")


def test_the_shipped_records_are_of_their_files() -> None:
    """Load checks the files; the bundled SAE's model is the bundled one, as it is now."""
    record = load_sae(next(bundled.SAE.iterdir())).record
    assert record is not None and record.commit == f"content:{model_hash(bundled.MODEL)}"
    other = load_sae(bundled.SAES[1]).record
    assert other is not None and other.layer == 28
    for one in (record, other):
        assert one.verdict == verdict_of(one.fvu, one.dead) and not one.doubt


def recorded(folder: Path, text: str = "") -> Path:
    write_sae(folder, 8)
    (folder / SAE_RECORD).write_text(text or encode(SaeRecord(fvu=0.2, dead=0.0, latents=96, tokens=9)))
    write_checksums(folder, (*SAE_FILES, SAE_RECORD))
    return folder


def test_a_changed_record_is_refused(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "layers.1")
    assert load_sae(folder).record is not None
    path = folder / SAE_RECORD
    path.write_text(path.read_text().replace("0.2", "0.1"))
    with pytest.raises(NeuronSelectError, match=f"{SAE_RECORD} was changed"):
        load_sae(folder)


ODD = ["{", "[]", encode({"fvu": "low"}), encode({"fvu": 1, "dead": 1.5, "latents": 1, "tokens": 1})]


@pytest.mark.parametrize("text", ODD)
def test_a_record_of_another_kind_is_refused(text: str, tmp_path: Path) -> None:
    recorded(tmp_path / "layers.1", text)
    with pytest.raises(NeuronSelectError, match=f"not an SAE folder|its {SAE_RECORD} has") as error:
        load_sae(tmp_path)
    assert "\n" not in str(error.value)


def test_an_sae_made_elsewhere_has_no_record(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "layers.1", "its own notes")
    (folder / CHECKSUMS).unlink()
    assert load_sae(folder).record is None
