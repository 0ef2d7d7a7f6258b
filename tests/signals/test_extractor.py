"""The extractor as datasets sees it: fingerprints, pickles, workers, single rows, streams."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from families import tiny_model, tiny_tokenizer
from tiny import SUPPORT, make_extractor, rows, write_sae

from hf_neuronselect import NeuronFeatureExtractor, NeuronSelectError, NeuronSelectWarning
from hf_neuronselect.core.options import ExtractionOptions, options_of
from hf_neuronselect.core.sources import Source
from hf_neuronselect.models import dtypes
from hf_neuronselect.models.backbone import Backbone
from hf_neuronselect.models.batching import TokenBatch
from hf_neuronselect.pipelines.parts import extractor_of
from hf_neuronselect.signals.extraction import Extraction


def test_two_processes_one_fingerprint_and_a_cache_hit(tmp_path: Path, tiny_folder: Path) -> None:
    """A second process finds the first one's result without loading weights."""
    script = f"""
import sys, json
sys.path.insert(0, {str(SUPPORT)!r})
from tiny import make_extractor, rows
from pathlib import Path
from datasets import Dataset
from datasets.fingerprint import Hasher
import hf_neuronselect.models.loading as module
file = Path({str(tmp_path / "pool.parquet")!r})
if not file.exists():
    rows(20).to_parquet(file)
pool = Dataset.from_parquet(str(file), cache_dir={str(tmp_path / "cache")!r})
extractor = make_extractor(Path({str(tiny_folder)!r}), features=["mona"])
fingerprint = Hasher.hash(extractor)
mapped = pool.map(extractor, batched=True)
print(json.dumps([fingerprint, extractor.identities, mapped._fingerprint, len(module._BACKBONES)]))
"""
    import json

    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    first, second = found
    assert first[:3] == second[:3]
    assert first[3] >= 1 and second[3] == 0, "the second process loaded the model: no cache hit"


def test_pickle_holds_no_weights(extractor: NeuronFeatureExtractor, pool: Dataset) -> None:
    extractor(pool[:3])  # loaded
    data = pickle.dumps(extractor)
    assert len(data) < 4000
    again = pickle.loads(data)
    assert again.identities == extractor.identities and again.extraction == extractor.extraction


ALL_SIGNALS = {"tokens", "mona", "polysemantic", "hidden", "nait", "nait_template", "answer_loss", "text", "embedding",
               "bidirectional", "llm2vec"}  # fmt: skip
NO_LM = {"text", "embedding"}
BOTH_WAYS = {"bidirectional", "llm2vec"}  # they read texts without a template
FORWARD = ALL_SIGNALS - {"answer_loss", *NO_LM, *BOTH_WAYS}
# Option -> a value other than the extractor's, and the signals whose numbers it moves. A new option needs a line here.
MOVES: dict[str, tuple[object, set[str]]] = {
    "row_format": ("messages", ALL_SIGNALS),
    "columns": ({"text": "body"}, ALL_SIGNALS),
    "chat_template": ("{{ messages }}", ALL_SIGNALS - NO_LM - BOTH_WAYS),
    "max_length": (7, ALL_SIGNALS - NO_LM - BOTH_WAYS),
    "truncation_side": ("left", ALL_SIGNALS - NO_LM - BOTH_WAYS),
    "pool_tokens": ("user", FORWARD),
    "dtype": ("bfloat16", ALL_SIGNALS - NO_LM),
    "quantize": ("4bit", ALL_SIGNALS - NO_LM),
    "attn_implementation": ("eager", ALL_SIGNALS - NO_LM),
    "layer": (1, {"hidden", "polysemantic"}),
    "top_k_features": (4, {"mona", "polysemantic"}),
    "pooling": ("sum", {"mona", "polysemantic"}),
    "value_dtype": ("float16", {"mona", "polysemantic"}),
    "site": ("mlp", {"nait", "nait_template"}),
    "drift": ("mean", {"nait", "nait_template"}),
    "encoder_window": (9, {"embedding"}),
    "encoder_prompt": ("words: ", {"embedding"}),
    "encoder_dtype": ("bfloat16", {"embedding"}),
}
# These name the model, SAE and encoder, whose pinned commits count, or move no number at all.
UNMOVED = {
    "model",
    "revision",
    "sae",
    "sae_revision",
    "encoder",
    "encoder_revision",
    "mntp_adapter",
    "mntp_revision",
    "device",
    "device_map",
    "batch_tokens",
}


def test_every_option_moves_the_identities_of_its_signals_alone(extractor: NeuronFeatureExtractor) -> None:
    assert {*MOVES, *UNMOVED} == set(options_of(ExtractionOptions))
    pinned = replace(extractor.extraction, encoder=Source("encoder", "content:0", "/there"))
    extractor = NeuronFeatureExtractor(pinned, ALL_SIGNALS)
    before, extraction = extractor.identities, extractor.extraction

    def changed(other: Extraction) -> set[str]:
        now = NeuronFeatureExtractor(other, ALL_SIGNALS)
        moved = {name for name, identity in now.identities.items() if identity != before[name]}
        assert (Hasher.hash(now) != Hasher.hash(extractor)) == bool(moved)
        return moved

    for name, (value, moved) in MOVES.items():
        assert changed(replace(extraction, options=replace(extraction.options, **{name: value}))) == moved, name
    for name, value in {"device": "cpu", "batch_tokens": 64}.items():
        assert not changed(replace(extraction, options=replace(extraction.options, **{name: value})))
    assert changed(replace(extraction, model=replace(extraction.model, commit="content:1"))) == ALL_SIGNALS - NO_LM
    assert not changed(replace(extraction, model=replace(extraction.model, location="/elsewhere", id="renamed")))
    assert changed(replace(extraction, sae=replace(extraction.sae, commit="content:2"))) == {"mona"}
    assert changed(replace(extraction, sae_site="layers.1 output")) == {"mona"}
    assert changed(replace(extraction, encoder=Source("encoder", "content:1", "/there"))) == {"embedding"}
    assert changed(replace(extraction, mntp_adapter=Source("adapter", "content:1", "/there"))) == {"llm2vec"}


def test_what_is_computed_beside_it_moves_no_identity(extractor: NeuronFeatureExtractor) -> None:
    alone, beside = extractor.with_features(["hidden"]), extractor.with_features(["nait", "hidden"])
    assert alone.identities["hidden"] == beside.identities["hidden"] == extractor.identities["hidden"]
    assert Hasher.hash(alone) != Hasher.hash(beside)


def test_a_call_leaves_the_fingerprint_alone(extractor: NeuronFeatureExtractor, pool: Dataset) -> None:
    before = Hasher.hash(extractor)
    extractor(pool[:4])
    assert Hasher.hash(extractor) == before


def test_content_hash_follows_the_weights(tmp_path: Path, tiny_folder: Path) -> None:
    one = make_extractor(tiny_folder).identities
    write_sae(tmp_path / "sae" / "layers.2", 32, seed=1)
    other = make_extractor(tiny_folder, sae=str(tmp_path / "sae")).identities
    assert {name for name in one if one[name] != other[name]} == {"mona"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes are forked")
def test_a_process_forked_after_a_model_ran(tmp_path: Path, tiny_folder: Path) -> None:
    """It uses one thread: it would wait for ever for those of its parent, which are not there."""
    script = f"""
import os, sys
sys.path.insert(0, {str(SUPPORT)!r})
from pathlib import Path
import torch
from tiny import make_extractor, rows
torch.set_num_threads(2)
extractor = make_extractor(Path({str(tiny_folder)!r}), features=["hidden"])
extractor(rows(4)[:])
if not os.fork():
    extractor(rows(4)[:])
    os._exit(torch.get_num_threads())
assert os.waitstatus_to_exitcode(os.wait()[1]) == 1 and torch.get_num_threads() == 2
"""
    (tmp_path / "fork.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "fork.py"], check=True, timeout=120)


def test_map_with_two_spawned_workers(tmp_path: Path, tiny_folder: Path) -> None:
    """num_proc=2 with spawn and with_rank: the same columns as one process."""
    script = f"""
import sys
sys.path.insert(0, {str(SUPPORT)!r})
import multiprocess
from pathlib import Path
from tiny import make_extractor, rows
import numpy as np
if __name__ == "__main__":
    multiprocess.set_start_method("spawn", force=True)
    pool = rows(12)
    extractor = make_extractor(Path({str(tiny_folder)!r}), features=["mona", "hidden"])
    two = pool.map(extractor, batched=True, num_proc=2, with_rank=True)
    one = pool.map(extractor, batched=True, with_rank=True)
    assert two.features == one.features
    for name in ("n_tokens", "neuron_signals", "mona_indices"):
        assert two[name] == one[name], name
    np.testing.assert_allclose(two["hidden"], one["hidden"], rtol=1e-4, atol=1e-6)
    print("agreed")
"""
    file = tmp_path / "spawn.py"
    file.write_text(script)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert done.stdout.strip().endswith("agreed"), done.stderr[-2000:]


def test_single_row_batch_and_stream(extractor: NeuronFeatureExtractor, pool: Dataset) -> None:
    batch = extractor(pool[:3])
    single = extractor(pool[1])
    assert single["n_tokens"] == batch["n_tokens"][1]
    np.testing.assert_array_equal(single["mona_indices"], batch["mona_indices"][1])
    np.testing.assert_allclose(single["mona_values"], batch["mona_values"][1], rtol=1e-4)
    stream = pool.to_iterable_dataset().map(extractor, batched=True, batch_size=16)
    mapped = pool.map(extractor, batched=True)
    for a, b in zip(stream, mapped, strict=True):
        assert a["id"] == b["id"] and a["n_tokens"] == b["n_tokens"]
        np.testing.assert_array_equal(a["mona_indices"], b["mona_indices"])
        np.testing.assert_allclose(np.asarray(a["nait"]), np.asarray(b["nait"]), rtol=1e-3, atol=1e-5)
    assert mapped.features["mona_values"].feature.dtype == "float32"
    assert np.asarray(mapped[0]["nait"]).shape == (4, 32)


def test_column_types_are_what_map_makes(tiny_folder: Path, pool: Dataset) -> None:
    extractor = make_extractor(tiny_folder, value_dtype="float16")
    mapped = pool.map(extractor, batched=True)
    for name, kind in extractor.column_types.items():
        assert mapped.features[name] == kind, name
    assert mapped.features["mona_values"].feature.dtype == "float16"


def test_a_batch_of_skipped_rows_keeps_the_types(extractor: NeuronFeatureExtractor) -> None:
    data = Dataset.from_dict({"text": ["", " ", "words here", "more"]}).map(extractor, batched=True, batch_size=2)
    assert data["neuron_skip"] == ["empty", "empty", "", ""]
    assert [len(v) for v in data["mona_indices"]][:2] == [0, 0]
    assert data.features["mona_indices"] == extractor.column_types["mona_indices"]


def test_an_in_memory_model_gives_the_same_numbers(tiny_folder: Path, pool: Dataset) -> None:
    ours = NeuronFeatureExtractor.from_model(
        tiny_model("llama"), tiny_tokenizer(), sae=str(tiny_folder / "sae"), features=["mona"], value_dtype="float32"
    )
    disk = make_extractor(tiny_folder, features=["mona"])
    a, b = ours(pool[:5]), disk(pool[:5])
    for x, y in zip(a["mona_values"], b["mona_values"], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    assert Hasher.hash(ours) == Hasher.hash(
        NeuronFeatureExtractor.from_model(
            tiny_model("llama"),
            tiny_tokenizer(),
            sae=str(tiny_folder / "sae"),
            features=["mona"],
            value_dtype="float32",
        )
    )
    changed = tiny_model("llama")
    next(changed.parameters()).data[0, 0] += 1
    other = NeuronFeatureExtractor.from_model(changed, tiny_tokenizer(), features=["hidden"])
    assert other.identities["tokens"] != ours.identities["tokens"]


def test_rank_must_be_an_int(extractor: NeuronFeatureExtractor, pool: Dataset) -> None:
    with pytest.raises(TypeError, match="with_rank=True"):
        extractor(pool[:2], [0, 1])
    assert extractor(pool[:2], 3)["n_tokens"].shape == (2,)


def test_bad_input(tmp_path: Path, tiny_folder: Path, extractor: NeuronFeatureExtractor, pool: Dataset) -> None:
    model = str(tiny_folder / "model")
    wide = write_sae(tmp_path / "wide" / "layers.2", 48)
    cases = [
        (lambda: extractor(pool[:2] | {"n_tokens": [1, 2]}), "already has the column 'n_tokens'"),
        (lambda: extractor({"words": ["a"]}), "columns missing: the data has words"),
        (lambda: make_extractor(tiny_folder, layer=9), "out of range: the model has 4 blocks"),
        (lambda: make_extractor(tiny_folder, features=["monna"]), "did you mean mona"),
        (lambda: make_extractor(tiny_folder, sae=str(wide)), "reads vectors of 48, model has 32"),
        (lambda: make_extractor(tiny_folder, sae=str(tmp_path / "nowhere")), "no such folder"),
        (lambda: NeuronFeatureExtractor.from_pretrained(model), "needs a sparse autoencoder"),
        (lambda: NeuronFeatureExtractor.from_pretrained("./nowhere"), "no such folder"),
        (lambda: NeuronFeatureExtractor.from_pretrained(str(tmp_path), features=["hidden"]), "not a model"),
        (lambda: NeuronFeatureExtractor.from_pretrained("who/what", features=["hidden"]), "nothing of that name is in"),
        (lambda: make_extractor(tiny_folder, dtype="int8"), "must be one of auto, float32"),
        (lambda: make_extractor(tiny_folder, batch_tokens=0), "at least 1"),
        (lambda: make_extractor(tiny_folder, top_k_features=0), "at least 1"),
        (lambda: make_extractor(tiny_folder, max_length=0), "at least 1"),
        (lambda: make_extractor(tiny_folder, max_lenght=9), "did you mean max_length"),
        (lambda: make_extractor(tiny_folder, features=["routing"])(pool[:1]), "no mixture-of-experts"),
        (lambda: make_extractor(tiny_folder, columns={"text": "body"})(pool[:1]), "no such column"),
    ]
    for call, message in cases:
        with pytest.raises(NeuronSelectError, match=message):
            call()


def test_an_sae_of_another_model_is_warned_of(tmp_path: Path, tiny_folder: Path) -> None:
    import json

    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "saelens"
    folder.mkdir()
    save_file(
        {"W_enc": torch.randn(32, 8), "b_enc": torch.zeros(8), "W_dec": torch.randn(8, 32), "b_dec": torch.zeros(32)},
        folder / "sae_weights.safetensors",
    )
    meta = {"model_name": "gemma-2-2b", "hook_name": "blocks.2.hook_resid_post"}
    (folder / "cfg.json").write_text(json.dumps({"architecture": "standard", "metadata": meta}))
    with pytest.warns(NeuronSelectWarning, match="trained on gemma-2-2b, the model is model"):
        make_extractor(tiny_folder, sae=str(folder))


def test_auto_is_bfloat16_for_a_large_model_where_the_cpu_has_it(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "lm")
    tiny_tokenizer().save_pretrained(tmp_path / "lm")

    def dtype(folder: Path, **options: object) -> tuple[str, bool]:
        said: list[str] = []
        made = extractor_of(ExtractionOptions(model=str(folder), **options), ["hidden"], said.append)
        return made.extraction.options.dtype, any("bfloat16" in line and "--dtype float32" in line for line in said)

    plain = ("float32", False)
    monkeypatch.setattr(dtypes, "cpu_has_bfloat16", lambda: True)
    assert dtype(tmp_path / "lm") == plain, "a small one"
    monkeypatch.setattr(dtypes, "LARGE", 1000)
    assert dtype(tmp_path / "lm") == ("bfloat16", True)
    assert dtype(tmp_path / "lm", dtype="float32") == plain
    assert dtype(tmp_path / "lm", dtype="bfloat16") == ("bfloat16", False), "asked for: nothing to say"
    assert dtype(tiny_folder / "model") == plain, "stored in float32"
    monkeypatch.setattr(dtypes, "cpu_has_bfloat16", lambda: False)
    assert dtype(tmp_path / "lm") == plain, "a CPU without it"


def test_an_sae_of_another_block_is_warned_of(tiny_folder: Path) -> None:
    with pytest.warns(NeuronSelectWarning, match="reads block 2, layer says 1"):
        make_extractor(tiny_folder, sae=str(tiny_folder / "sae" / "layers.2"), layer=1)


def test_one_model_is_loaded_for_all_feature_sets(tiny_folder: Path, pool: Dataset, monkeypatch) -> None:
    from hf_neuronselect.models import loading

    loading._BACKBONES.clear()
    loads = []
    real = loading._load_model
    monkeypatch.setattr(loading, "_load_model", lambda *words: loads.append(1) or real(*words))
    extractor = make_extractor(tiny_folder, features=["nait"])
    extractor(pool[:2])
    for names in (["mona"], ["hidden", "mona"], ["nait", "nait_template"]):
        extractor.with_features(names)(pool[:2])
    assert len(loads) == 1


def test_out_of_memory_halves_the_batch(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = rows(30)[:]
    plain = make_extractor(tiny_folder, batch_tokens=4096)(batch)
    run, seen = Backbone.run, []

    def tight(self: Backbone, tokens: TokenBatch, observers: list) -> None:
        seen.append(tokens.input_ids.numel())
        if seen[-1] > 300:
            raise torch.OutOfMemoryError("out of memory")
        run(self, tokens, observers)

    monkeypatch.setattr(Backbone, "run", tight)
    extractor = make_extractor(tiny_folder, batch_tokens=4096)
    before = extractor.identities
    with pytest.warns(NeuronSelectWarning, match="out of memory: going on with batches of"):
        got = extractor(batch)
    assert max(seen) > 300 and extractor.identities == before
    for name, column in plain.items():
        for a, b in zip(column, got[name], strict=True):
            if isinstance(a, np.ndarray) and a.dtype.kind == "f":
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # another batch rounds otherwise
            else:
                assert np.array_equal(a, b), name
    # What was learned is kept: the next batch starts small.
    seen.clear()
    extractor(batch)
    assert max(seen) <= 300
    monkeypatch.setattr(Backbone, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("can't allocate memory")))
    with pytest.raises(NeuronSelectError, match="one row of .* tokens does not fit into memory"):
        make_extractor(tiny_folder)(rows(1)[:])
    monkeypatch.setattr(Backbone, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        make_extractor(tiny_folder)(rows(1)[:])


def test_overflow_is_computed_again_in_float32(tmp_path: Path, tiny_folder: Path) -> None:
    """A word whose vectors float16 cannot hold: its rows are named and get float32's numbers, the others float16's."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    word = tokenizer("sky", add_special_tokens=False)["input_ids"][0]
    model.get_input_embeddings().weight.data[word] *= 60000 / model.get_input_embeddings().weight.data[word].abs().max()
    model.model.layers[0].mlp.down_proj.weight.data *= 2e4  # float16 ends at 65,504
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    make = partial(NeuronFeatureExtractor.from_pretrained, str(tmp_path / "model"), features=["hidden"],
                   value_dtype="float32")  # fmt: skip
    batch = {"text": ["the sky is blue", "two numbers", "why is the sky", "add 7"]}
    wide = make(dtype="float32")(batch)
    assert wide["neuron_skip"] == [""] * 4
    with pytest.warns(NeuronSelectWarning, match=r"of 4 rows .* overflow in float16 and are computed again in float32"):
        got = make(dtype="float16")(batch)
    assert got["neuron_skip"] == [""] * 4
    same = [np.array_equal(a, b) for a, b in zip(got["hidden"], wide["hidden"], strict=True)]
    assert same[0] and same[2]
