"""SAEs of a model: recognised by content, norms or Hub id, from the package, the machine or the catalogue."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny_model, tiny_tokenizer
from hub import Hub
from tiny import rows, write_sae

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, NeuronSelectWarning
from hf_neuronselect.core import bundled
from hf_neuronselect.core.digests import SAE_FILES, model_hash
from hf_neuronselect.core.options import ExtractionOptions
from hf_neuronselect.core.sae_configs import SaeFindConfig
from hf_neuronselect.core.sae_record import SAE_RECORD, SaeRecord, read_record
from hf_neuronselect.core.seals import encode, write_checksums
from hf_neuronselect.core.sources import Source
from hf_neuronselect.models import find_sae
from hf_neuronselect.models.find_sae import LOCAL, PUBLISHED, SHIPPED, FoundSae, catalogue, find_saes, pick_sae
from hf_neuronselect.models.pin import pin_model
from hf_neuronselect.models.sae_formats import _READERS
from hf_neuronselect.models.sae_match import norms_hash
from hf_neuronselect.pipelines.sae import find_sae as list_saes

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def pinned(folder: Path) -> Source:
    return pin_model(str(folder), revision=None, token=None)


def save(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, noise: float = 0.0) -> Path:
    """A model whose norms come from the seed, and whose matrices have noise."""
    model = tiny_model("llama")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # exact in bfloat16, as a real model's are
                weight.copy_((1 + torch.randn(weight.shape, generator=draw)).bfloat16())
            else:
                weight.add_(noise * torch.randn(weight.shape))
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sae_of(of: Path, folder: Path, *, model: str | None = None) -> Path:
    """An SAE folder with a record of that model."""
    write_sae(folder / "layers.2", 32)
    source = pinned(of)
    record = SaeRecord(model=model or of.name, commit=source.commit, norms=norms_hash(source), layer=2, license="mit",
                       fvu=0.2, dead=0.0, latents=96, tokens=9)  # fmt: skip
    (folder / "layers.2" / SAE_RECORD).write_text(encode(record))
    write_checksums(folder / "layers.2", (*SAE_FILES, SAE_RECORD))
    return folder


def test_the_shipped_saes_know_their_models(tmp_path: Path) -> None:
    records = [read_record(path.parent, "x") for root in bundled.SAES for path in root.rglob("cfg.json")]
    assert records[0] and records[1] and records[0].commit == f"content:{model_hash(bundled.MODEL)}"
    assert records[1].model == SMOLLM2 and records[1].norms and all(record and record.license for record in records)
    copied = shutil.copytree(bundled.MODEL, tmp_path / "called otherwise")
    (found,) = find_saes(pinned(copied))
    assert found.place == SHIPPED and list(found.sae) == [3] and not found.doubt
    changed = shutil.copytree(bundled.MODEL, tmp_path / "model")  # the bundled one's name
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rope_parameters": None}))
    assert find_saes(replace(pinned(changed), location=str(bundled.MODEL))) == []


def test_a_hub_id_is_not_a_folders_name(tmp_path: Path) -> None:
    def shipped(source: Source) -> list[str]:
        return [found.doubt for found in find_saes(source, (SHIPPED,))]

    assert shipped(Source(SMOLLM2, "a" * 40, SMOLLM2)) == [""]
    assert shipped(Source(f"me/{SMOLLM2.split('/')[1]}", "a" * 40, "elsewhere")) == []
    save(tmp_path / SMOLLM2.split("/")[1])
    assert shipped(pinned(tmp_path / SMOLLM2.split("/")[1])) == []
    cached = tmp_path / f"models--{SMOLLM2.replace('/', '--')}" / "snapshots" / ("b" * 40)
    assert shipped(pinned(save(cached))) == [""]
    adapter = Source("me/adapter", "c" * 40, "me/adapter", base=Source(SMOLLM2, "a" * 40, SMOLLM2))
    assert shipped(adapter) == [""], "the SAE of its base"


def test_rounded_weights_are_recognised_by_their_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = sae_of(save(tmp_path / "a"), tmp_path / "sae", model="org/original")
    monkeypatch.setattr(bundled, "SAES", (sae,))
    (same,) = find_saes(pinned(tmp_path / "a"))
    assert same == FoundSae(SHIPPED, {2: str(sae / "layers.2")}, "sparsify", "mit")
    for name, dtype in {"b": torch.bfloat16, "c": torch.float16}.items():
        (rounded,) = find_saes(pinned(save(tmp_path / name, dtype=dtype, noise=0.01)))
        assert "org/original, which has the model's norms" in rounded.doubt
    assert find_saes(pinned(save(tmp_path / "d", seed=1))) == []


def test_beside_the_model_and_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = save(tmp_path / "lm"), save(tmp_path / "other", seed=1)
    monkeypatch.setattr(find_sae, "cache_dir", lambda: tmp_path / "cache")
    sae_of(other, tmp_path / "lm-sae")
    sae_of(other, tmp_path / "cache" / "saes" / "x")
    assert find_saes(pinned(model)) == [], "of another model"
    sae_of(model, tmp_path / "cache" / "saes" / "y")
    assert [(one.place, one.doubt) for one in find_saes(pinned(model))] == [(LOCAL, "")]
    write_sae(model / "sae" / "layers.1", 32)
    unsaid = find_saes(pinned(model))[0]
    assert list(unsaid.sae) == [1] and "no record says" in unsaid.doubt
    damaged = tmp_path / "cache" / "saes" / "y" / "layers.2" / SAE_RECORD
    damaged.write_text(damaged.read_text().replace("lm", "ln"))
    with pytest.raises(NeuronSelectError, match="layers.2"):
        find_saes(pinned(model))


def test_every_entry_of_the_catalogue_can_be_used() -> None:
    text = json.loads(find_sae.CATALOGUE.read_text())
    formats = {reader.__name__.removeprefix("_") for reader in _READERS.values()}
    assert len(catalogue()) == len(text) >= 20
    for said, entry in zip(text, catalogue(), strict=True):
        assert set(said) - {"l0", "neuronpedia"} == {"models", "repo", "folder", "layers", "format", "license"}, said
        assert entry.format in formats and entry.license and entry.repo.count("/") == 1 and entry.models
        assert all(model.count("/") == 1 for model in entry.models)
        assert len(set(entry.layers)) == len(entry.layers) and entry.layers == tuple(sorted(entry.layers))
        names = entry.by_layer()
        assert len(set(names.values())) == len(entry.layers), "a folder a layer"
        assert all(name.startswith(f"{entry.repo}/") and "{" not in name for name in names.values())
    assert catalogue()[0].by_layer()[30] == "EleutherAI/sae-llama-3-8b-32x/layers.30"


def test_the_nearest_and_surest_is_picked() -> None:
    near, far = FoundSae(PUBLISHED, {9: "n/n/9", 20: "n/n/20"}, "x", "y"), FoundSae(PUBLISHED, {3: "f/f/3"}, "x", "y")
    doubted, sure = FoundSae(PUBLISHED, {20: "d/d"}, "x", "y", "why"), FoundSae(SHIPPED, {1: "s"}, "x", "y")
    assert pick_sae([far, near], 18) == (near, 20)
    assert pick_sae([doubted, near], 20) == (near, 20)
    assert pick_sae([doubted, sure], 20) == (sure, 1)
    assert pick_sae([], 3) is None


def test_auto_loads_what_the_catalogue_names(
    hub: Hub, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("models", "me/auto-lm", {p.name: p.read_bytes() for p in (tiny_folder / "model").iterdir()})
    files = {f"layers.2/{p.name}": p.read_bytes() for p in (tiny_folder / "sae" / "layers.2").iterdir()}
    hub.add("models", "me/auto-sae", files)
    entry = {
        "models": ["ME/auto-lm"],
        "folder": "layers.{layer}",
        "layers": ["1-2"],
        "format": "sparsify",
        "license": "mit",
    }
    monkeypatch.setattr(find_sae, "CATALOGUE", tmp_path / "saes.json")
    find_sae.catalogue.cache_clear()

    def extractor(repo: str) -> NeuronFeatureExtractor:
        (tmp_path / "saes.json").write_text(json.dumps([entry | {"repo": repo}]))
        find_sae.catalogue.cache_clear()
        return NeuronFeatureExtractor.from_pretrained("me/auto-lm", sae="auto")

    try:
        found = extractor("me/auto-sae").extraction
        assert found.sae is not None and found.sae.id == "me/auto-sae/layers.2" and "on the Hub" in found.sae_found
        with pytest.raises(
            NeuronSelectError, match="names me/gone/layers.2, which cannot be had .*name another"
        ) as gone:
            extractor("me/gone")
        assert "\n" not in str(gone.value) and "sae train --model me/auto-lm" in str(gone.value)
        with pytest.raises(NeuronSelectError, match="mona needs.*sae find me/auto-lm"):  # nothing large unasked
            NeuronFeatureExtractor.from_pretrained("me/auto-lm")
    finally:
        monkeypatch.undo()
        find_sae.catalogue.cache_clear()


def test_the_shipped_sae_is_taken_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path / "lm")
    with pytest.raises(NeuronSelectError, match="mona needs.*sae find.*sae train --model .*hours"):
        NeuronFeatureExtractor.from_pretrained(str(model))
    with pytest.raises(NeuronSelectError, match="no SAE of lm is known"):
        NeuronFeatureExtractor.from_pretrained(str(model), sae="auto")
    monkeypatch.setattr(bundled, "SAES", (sae_of(model, tmp_path / "sae"),))
    extractor = NeuronFeatureExtractor.from_pretrained(str(model))
    assert "in this package" in extractor.extraction.sae_found and extractor.extraction.sae is not None
    assert NeuronFeatureExtractor.from_pretrained(str(model), features=["hidden"]).extraction.sae is None
    selection = NeuronSelector("mona").fit({"t": rows(3)}, extractor=extractor).select(rows(9, seed=2), k=2)
    selection.save_pretrained(tmp_path / "out")
    assert "--sae auto" in (tmp_path / "out" / "README.md").read_text()
    save(tmp_path / "rounded", dtype=torch.bfloat16, noise=0.01)
    with pytest.warns(NeuronSelectWarning, match="trained on lm, whose norms rounded has"):
        NeuronFeatureExtractor.from_pretrained(str(tmp_path / "rounded"), sae="auto")
    with pytest.raises(NeuronSelectError, match="sae_revision"):
        NeuronFeatureExtractor.from_pretrained(str(model), sae="auto", sae_revision="main")
    assert NeuronFeatureExtractor.from_options(ExtractionOptions(sae="auto"), ["mona"])


def test_saelens_own_directory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sae_lens").mkdir()
    (tmp_path / "sae_lens" / "__init__.py").write_text("raise ImportError('is never imported')")
    (tmp_path / "sae_lens" / "pretrained_saes.yaml").write_text(
        "one:\n  model: gpt2-small\n  repo_id: me/gpt2-saes\n  saes:\n"
        "  - {id: blocks.3.hook_resid_post, path: three}\n  - {id: blocks.4.hook_z, path: four}\n"
        "  - {id: blocks.5.hook_resid_post, path: five.pt}\n"
        "two:\n  model: gpt2-small\n  conversion_func: other\n  repo_id: me/x\n  saes: []\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    find_sae._lens_directory.cache_clear()
    try:
        (found,) = find_saes(Source("openai-community/gpt2", "a" * 40, "openai-community/gpt2"))
        assert found.sae == {3: "me/gpt2-saes/three"} and found.format == "saelens resid_post"
    finally:
        find_sae._lens_directory.cache_clear()


def test_sae_find_lists_or_says_how_to_train(tmp_path: Path) -> None:
    def found(model: str) -> tuple[list[tuple[str, ...]], str]:
        said: list[str] = []
        return list_saes(SaeFindConfig(model=model), say=said.append), "\n".join(said)

    lines, text = found(SMOLLM2)
    assert lines == [("--sae auto", "28", "sparsify", "apache-2.0", SHIPPED)] and "could not be read" in text
    lines, text = found("google/gemma-2-2b")
    assert ("--sae google/gemma-scope-2b-pt-res/layer_24/width_16k/average_l0_73", "0-25") == lines[0][:2]
    assert "--sae auto takes google/gemma-scope-2b-pt-res/layer_24/" in text
    model = save(tmp_path / "lm")
    lines, text = found(str(model))
    assert not lines and f"sae train --model {model} --pool" in text and "0.1 hours" in text
    assert "12 hours for each billion parameters" in found("me/unheard-of")[1]
    with pytest.raises(NeuronSelectError, match="no such folder"):
        found("./nowhere")


def test_norms_are_asked_before_an_sae_is_refused(tmp_path: Path) -> None:
    """A copy in another precision, in a folder of another name, is doubted; another model is refused."""
    sae = str(sae_of(save(tmp_path / "a"), tmp_path / "sae", model="org/original"))
    with pytest.warns(NeuronSelectWarning, match="trained on org/original, whose norms b has"):
        NeuronFeatureExtractor.from_pretrained(str(save(tmp_path / "b", noise=0.01)), sae=sae)
    with pytest.raises(NeuronSelectError, match="trained on org/original, not on c"):
        NeuronFeatureExtractor.from_pretrained(str(save(tmp_path / "c", seed=1)), sae=sae)
