"""An SAE and a model that do not belong together."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import make_extractor, write_sae

from hf_neuronselect import NeuronSelector
from hf_neuronselect.core.digests import SAE_FILES, model_hash
from hf_neuronselect.core.errors import NeuronSelectError, NeuronSelectWarning
from hf_neuronselect.core.sae_record import SAE_RECORD, SaeRecord
from hf_neuronselect.core.seals import encode, write_checksums
from hf_neuronselect.core.sources import Source
from hf_neuronselect.models.sae import Site, SparseAutoencoder
from hf_neuronselect.models.sae_match import check_match

RECORD = SaeRecord(model="org/lm", commit="a" * 40, layer=2, fvu=0.2, dead=0.0, latents=8, tokens=9)
HUB = Source("org/lm", "a" * 40, "org/lm")
FOLDER = Source("lm", "content:1", "lm")


def sae(record: SaeRecord | None = RECORD, block: int = 2, told: str | None = None) -> SparseAutoencoder:
    weight = torch.zeros(8, 4)
    return SparseAutoencoder(weight, torch.zeros(8), Site(f"layers.{block}"), "topk", 2, model_name=told, record=record)


LOCAL = replace(RECORD, model="lm", commit="content:1")
CASES = {
    "the same commit": (RECORD, HUB, ""),
    "the same bytes in a folder of another name": (LOCAL, replace(FOLDER, id="copy"), ""),
    "an adapter on the same model": (RECORD, Source("tuned", "content:9", "tuned", base=HUB), ""),
    "an adapter on a folder's bytes": (LOCAL, Source("tuned", "content:9", "tuned", base=FOLDER), ""),
    "no commit is known": (replace(RECORD, commit=None), HUB, ""),
    "a mirror on the Hub": (RECORD, Source("mirror/LM", "b" * 40, "mirror/LM"), "other files of org/lm"),
    "another commit": (RECORD, replace(HUB, commit="b" * 40), "other files of org/lm"),
    "other bytes in a folder of that name": (LOCAL, replace(FOLDER, commit="content:2"), "other files of lm"),
    "its instruct model": (RECORD, Source("org/lm-instruct", "b" * 40, "x"), "its latents may not fit"),
    "a folder, where only a Hub commit is known": (RECORD, replace(FOLDER, id="other"), "its latents may not fit"),
    "a model in memory": (RECORD, Source("other", "state:1", ""), "its latents may not fit"),
}  # fmt: skip
REFUSED = {
    "another model on the Hub": (RECORD, Source("org/other", "b" * 40, "org/other")),
    "other bytes in a folder of another name": (LOCAL, Source("other", "content:2", "other")),
    "an adapter on another model": (RECORD, Source("t", "c" * 40, "t", base=Source("org/other", "b" * 40, "x"))),
}


@pytest.mark.parametrize("case", CASES)
def test_belongs_or_is_doubted(case: str) -> None:
    record, model, doubt = CASES[case]
    found = check_match(sae(record), model, 4, "layers.2")
    assert doubt in found and bool(doubt) == bool(found)


@pytest.mark.parametrize("case", REFUSED)
def test_another_model_is_refused(case: str) -> None:
    record, model = REFUSED[case]
    with pytest.raises(NeuronSelectError, match="was trained on (org/)?lm, not on .*neuronselect sae train") as error:
        check_match(sae(record), model, 4, "layers.2")
    assert "\n" not in str(error.value)


def test_another_block_is_refused() -> None:
    with pytest.raises(NeuronSelectError, match="record says block 2, its folder block 1"):
        check_match(sae(block=1), HUB, 4, "layers.1")
    with pytest.raises(NeuronSelectError, match="reads block 9, org/lm has 4 blocks"):
        check_match(sae(None, block=9), HUB, 4, "layers.9")


def with_record(folder: Path, record: SaeRecord) -> Path:
    (write_sae(folder / "layers.2", 32) / SAE_RECORD).write_text(encode(record))
    write_checksums(folder / "layers.2", (*SAE_FILES, SAE_RECORD))
    return folder


def test_a_poor_sae_is_said_in_terminal_record_card_and_report(
    tiny_folder: Path, tmp_path: Path, pool: Dataset, target: Dataset
) -> None:
    commit = f"content:{model_hash(tiny_folder / 'model')}"
    poor = with_record(tmp_path / "poor", replace(RECORD, model="model", commit=commit, fvu=0.66, dead=0.21))
    with pytest.warns(NeuronSelectWarning, match="the SAE is poor .FVU 0.66, 21 % .*neuronselect sae train"):
        extractor = make_extractor(tiny_folder, sae=str(poor))
    selection = NeuronSelector("mona").fit(target, extractor=extractor).select(pool, k=4)
    selection.save_pretrained(tmp_path / "s")
    assert "FVU 0.66" in json.loads((tmp_path / "s" / "selection.json").read_text())["extractor"]["doubts"][0]
    for page in ("README.md", "report.html"):
        text = (tmp_path / "s" / page).read_text()
        assert "Before you use these rows" in text and "the SAE is poor" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error", NeuronSelectWarning)
        hidden = make_extractor(tiny_folder, sae=str(poor), features=["hidden"])  # reads no latent
        good = replace(RECORD, model="model", commit=commit)
        made = make_extractor(tiny_folder, sae=str(with_record(tmp_path / "good", good)))
    assert not hidden.doubts and not made.doubts
