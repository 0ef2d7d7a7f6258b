"""Features of tiny models against slow float64 references written from docs/methods.md."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import BLOCKS, HIDDEN, VOCAB, blocks_of, decoder_of, record, tiny_model, tiny_tokenizer

from hf_neuronselect import NeuronFeatureExtractor
from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.models.sae import Site, SparseAutoencoder

LAYER, LATENTS, K = 2, 64, 8
TOKENIZER = tiny_tokenizer()
CHATS = [
    [("user", "2+2?"), ("assistant", "4")],
    [("system", "Be brief."), ("user", "Name a fish with a long story behind it."), ("assistant", "Eel.")],
    [("user", "a"), ("assistant", "b c d"), ("user", "e"), ("assistant", "The quick brown fox jumps over it all.")],
    [("user", "Write out the numbers up to twelve, please."), ("assistant", "1 2 3 4 5 6 7 8 9 10 11 12")],
    [("user", "q"), ("assistant", "y")],
]
ROWS = [[{"role": role, "content": content} for role, content in chat] for chat in CHATS]
DENSE_FEATURES = ("mona", "nait", "nait_template", "nait_last", "polysemantic", "hidden", "rds_plus")


def _sae(activation: str = "topk") -> SparseAutoencoder:
    draw = torch.Generator().manual_seed(5)
    return SparseAutoencoder(
        W_enc=torch.randn(LATENTS, HIDDEN, generator=draw),
        b_enc=torch.randn(LATENTS, generator=draw) * 0.3,
        b_pre=torch.randn(HIDDEN, generator=draw) * 0.3,
        activation=activation,
        k=K if activation == "topk" else None,
        site=Site(f"layers.{LAYER}"),
    )


SAE = _sae()
MODELS = {name: tiny_model(name) for name in ("llama", "olmoe")}


def _extractor(features: Any, model: str | torch.nn.Module = "llama", **options: Any) -> NeuronFeatureExtractor:
    model = MODELS[model] if isinstance(model, str) else model
    options = {"sae": SAE, "layer": LAYER, "value_dtype": "float32"} | options
    return NeuronFeatureExtractor.from_model(model, options.pop("tokenizer", TOKENIZER), features=features, **options)


def _dense(result: dict[str, Any], name: str, row: int) -> np.ndarray:
    """A row's feature as a dense array."""
    if name in result:
        return np.asarray(result[name][row])
    out = np.zeros(LATENTS if name == "mona" else 48, dtype=np.float32)
    indices = result[f"{name}_indices"][row]
    assert indices.dtype == np.int32 and (np.diff(indices) > 0).all() and (result[f"{name}_values"][row] != 0).all()
    out[indices] = result[f"{name}_values"][row]
    return out


def _columns(name: str) -> list[str]:
    return [f"{name}_indices", f"{name}_values"] if name in ("mona", "polysemantic") else [name]


# ----------------------------------------------------------------------- the reference, in float64
class Reference:
    """One row through a copy of the whole model by itself; everything after that in numpy float64."""

    def __init__(self, messages: list[dict[str, str]], pool_tokens: str = "all", model: str = "llama") -> None:
        got = TOKENIZER.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids = np.asarray(got["input_ids"])
        self.n = len(ids)
        self.pooled = {
            "all": np.ones(self.n, bool),
            "no_special": ~np.isin(ids, TOKENIZER.all_special_ids),
            "assistant": np.asarray(got["assistant_masks"], bool),
            "content": self._content(messages),
        }[pool_tokens]
        content = np.flatnonzero(self._content(messages))
        answer = np.flatnonzero(got["assistant_masks"])
        self.tokens = {"content": content, "answer": answer, "template": np.arange(self.n)}
        self.model = deepcopy(MODELS[model])
        self.seen = {name: value.double().numpy() for name, value in record(self.model, ids).items()}

    def _content(self, messages: list[dict[str, str]]) -> np.ndarray:
        """<s>, then a turn after the other: <|im_start|> role newline TEXT <|im_end|> newline, a token a character."""
        marks = [False]
        for turn in messages:
            marks += [False] * (len(turn["role"]) + 2) + [True] * len(turn["content"]) + [False, False]
        assert len(marks) == self.n
        return np.asarray(marks)

    def mean(self, values: np.ndarray) -> np.ndarray:
        return values[..., self.pooled, :].mean(axis=-2)

    @staticmethod
    def top_k(values: np.ndarray, k: int | None) -> np.ndarray:
        """The k largest of each token's values, negatives and the rest 0; ties to the lower index."""
        kept = np.zeros_like(values)
        for token, row in enumerate(values):
            best = np.argsort(-row, kind="stable")[:k]
            kept[token, best] = np.maximum(row[best], 0)
        return kept

    def mona(self, k: int | None = K, pooling: str = "mean") -> np.ndarray:
        w, b, b_pre = (t.double().numpy() for t in (SAE.W_enc, SAE.b_enc, SAE.b_pre))
        kept = self.top_k((self.seen["residual"][LAYER] - b_pre) @ w.T + b, k)
        return self.mean(kept) * (self.pooled.sum() if pooling == "sum" else 1)

    def polysemantic(self, k: int = K) -> np.ndarray:
        x = (
            self.seen["mlp_input"][LAYER]
            @ blocks_of(self.model)[LAYER].mlp.gate_proj.weight.detach().double().numpy().T
        )
        return self.mean(self.top_k(x / (1 + np.exp(-x)), k))

    def hidden(self) -> np.ndarray:
        return self.mean(self.seen["residual"][LAYER])

    def rds_plus(self) -> np.ndarray:
        norm, h = decoder_of(self.model).norm, self.seen["residual"][-1]
        h = (
            h
            / np.sqrt((h**2).mean(axis=1, keepdims=True) + norm.variance_epsilon)
            * norm.weight.detach().double().numpy()
        )
        place = np.arange(1, self.n + 1)
        vector = (place[:, None] * h).sum(axis=0) / place.sum()
        return vector / np.linalg.norm(vector)

    def nag(self) -> np.ndarray:
        """Of each block the 20 neurons with the largest mean magnitude, ties to the lower one."""
        found = []
        for layer, x in enumerate(self.seen["mlp_input"]):
            w = blocks_of(self.model)[layer].mlp.up_proj.weight.detach().double().numpy()
            means = self.mean(np.abs(x @ w.T))
            best = sorted(range(len(means)), key=lambda i: (-means[i], i))[:20]
            found += [layer * len(means) + i for i in sorted(best)]
        return np.asarray(found)

    def nait(self, drift: str = "endpoints", site: str = "residual", ends: str = "content") -> np.ndarray:
        h, at = self.seen["neurons" if site == "mlp" else "residual"], self.tokens[ends]
        if drift == "mean":
            return np.asarray(h[:, at].mean(axis=1) - h[:, at[0]])
        return (h[:, at[-1]] - h[:, at[0]]) / (len(at) if drift == "per_token" else 1)

    def nait_template(self, drift: str = "endpoints", site: str = "residual") -> np.ndarray:
        return self.nait(drift, site, "template")

    def nait_answer(self, drift: str = "endpoints", site: str = "residual") -> np.ndarray:
        return self.nait(drift, site, "answer")

    def nait_last(self) -> np.ndarray:
        return np.asarray(self.seen["residual"][:, self.tokens["content"][-1]])

    def nait_template_last(self) -> np.ndarray:
        return np.asarray(self.seen["residual"][:, -1])

    def nait_mean(self) -> np.ndarray:
        return self.mean(self.seen["residual"])

    def content_mean(self, site: str = "residual") -> np.ndarray:
        h = self.seen["neurons" if site == "mlp" else "residual"]
        return np.asarray(h[:, self.tokens["content"]].mean(axis=1))

    def answer_mean(self) -> np.ndarray:
        return np.asarray(self.seen["residual"][:, self.tokens["answer"]].mean(axis=1))

    def routing(self) -> np.ndarray:
        return np.concatenate(list(self.mean(self.seen["router"])))


def _assert_close(got: np.ndarray, want: np.ndarray, error: float = 1e-5) -> None:
    """Relative to the size of the vector: a coordinate near nought is no smaller an error."""
    assert got.shape == want.shape and got.dtype == np.float32
    assert np.abs(got - want).max() <= error * np.abs(want).max()


@pytest.mark.parametrize("pool_tokens", ["all", "no_special", "assistant", "content"])
@pytest.mark.parametrize(
    ("name", "options", "given"),
    [
        ("mona", {}, {}),
        ("mona", {"top_k_features": 3}, {"k": 3}),
        ("mona", {"top_k_features": 500}, {"k": 500}),
        ("mona", {"pooling": "sum"}, {"pooling": "sum"}),
        ("mona", {"sae": _sae("relu")}, {"k": None}),
        ("polysemantic", {}, {}),
        ("polysemantic", {"top_k_features": 3}, {"k": 3}),
        ("polysemantic", {"sae": None}, {"k": 192}),
        ("hidden", {}, {}),
        ("rds_plus", {}, {}),
        *[
            (name, {"drift": drift, "site": site}, {"drift": drift, "site": site})
            for name in ("nait", "nait_template", "nait_answer")
            for drift in ("endpoints", "mean", "per_token")
            for site in ("residual", "mlp")
        ],
        *[(name, {}, {}) for name in ("nait_last", "nait_template_last", "nait_mean", "content_mean", "answer_mean")],
        ("content_mean", {"site": "mlp"}, {"site": "mlp"}),
        ("routing", {}, {}),
    ],
)
def test_feature_equals_the_reference(name: str, options: dict, given: dict, pool_tokens: str) -> None:
    model = "olmoe" if name == "routing" else "llama"
    result = _extractor([name], model, pool_tokens=pool_tokens, **options)({"messages": ROWS})
    assert result["neuron_skip"] == [""] * len(ROWS)
    for row, messages in enumerate(ROWS):
        reference = Reference(messages, pool_tokens, model)
        assert result["n_tokens"][row] == reference.n and not result["truncated"][row]
        _assert_close(_dense(result, name, row), getattr(reference, name)(**given))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "phi3", "gpt_neox", "olmoe"])
def test_the_final_norm_is_loaded_where_it_is_read(family: str, tmp_path: Path) -> None:
    """RDS+ reads behind the last block. A model cut at an earlier block comes without the norm, and is not used for it."""
    tiny_model(family).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    first = NeuronFeatureExtractor.from_pretrained(str(tmp_path), features=["hidden"], layer=LAYER)
    first({"messages": ROWS[:1]})
    found = NeuronFeatureExtractor.from_pretrained(str(tmp_path), features=["rds_plus"])({"messages": ROWS})
    want = _extractor(["rds_plus"], tiny_model(family), sae=None)({"messages": ROWS})
    for row in range(len(ROWS)):
        _assert_close(_dense(found, "rds_plus", row), _dense(want, "rds_plus", row))
        ids = TOKENIZER.apply_chat_template(ROWS[row], return_dict=True, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            last = tiny_model(family)(ids, output_hidden_states=True).hidden_states[-1][0].double().numpy()
        place = np.arange(1, len(last) + 1)
        vector = (place[:, None] * last).sum(axis=0)
        _assert_close(_dense(found, "rds_plus", row), (vector / np.linalg.norm(vector)).astype(np.float32))


@pytest.mark.parametrize("pool_tokens", ["all", "assistant"])
@pytest.mark.parametrize("batch_tokens", [1, 64, "auto"])
def test_the_strongest_neurons_equal_the_reference(batch_tokens: Any, pool_tokens: str) -> None:
    result = _extractor(["strongest_neurons"], pool_tokens=pool_tokens, batch_tokens=batch_tokens)({"messages": ROWS})
    for row, messages in enumerate(ROWS):
        assert result["strongest_neurons"][row].dtype == np.int32
        assert result["strongest_neurons"][row].tolist() == Reference(messages, pool_tokens).nag().tolist()
    with pytest.raises(NeuronSelectError, match="mixture of experts"):
        _extractor(["strongest_neurons"], "olmoe")({"messages": ROWS})


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "gemma3", "qwen3"])
def test_the_up_projection_of_other_families(family: str) -> None:
    """Read from the weights themselves: of a fused projection the half behind the gate's."""
    model = tiny_model(family)
    (found,) = _extractor(["strongest_neurons"], model, sae=None)({"messages": ROWS[:1]})["strongest_neurons"]
    ids = TOKENIZER.apply_chat_template(ROWS[0], return_dict=True)["input_ids"]
    x = record(deepcopy(model), np.asarray(ids))["mlp_input"][0].double().numpy()
    mlp = blocks_of(model)[0].mlp
    name = next(n for n in ("up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h") if hasattr(mlp, n))
    weight = getattr(mlp, name).weight.detach().double().numpy()
    out = x @ (weight if name == "c_fc" else weight.T)
    bias = getattr(getattr(mlp, name), "bias", None)
    out = out if bias is None else out + bias.detach().double().numpy()
    out = out[:, out.shape[1] // 2 :] if name == "gate_up_proj" else out
    assert found[:20].tolist() == sorted(np.argsort(-np.abs(out).mean(axis=0), kind="stable")[:20].tolist())


def test_routing_adds_to_one_a_block() -> None:
    result = _extractor(["routing"], "olmoe")({"messages": ROWS})
    for row in result["routing"]:
        np.testing.assert_allclose(row.reshape(BLOCKS, 6).sum(axis=1), 1, rtol=1e-6)
    with pytest.raises(NeuronSelectError, match="no mixture-of-experts"):
        _extractor(["routing"])({"messages": ROWS})
    with pytest.raises(NeuronSelectError, match="mixture of experts"):
        _extractor(["polysemantic"], "olmoe")({"messages": ROWS})


@pytest.mark.parametrize(("model", "features"), [("llama", DENSE_FEATURES), ("olmoe", ("mona", "nait", "routing"))])
def test_batch_size_and_row_order_change_nothing(model: str, features: tuple[str, ...]) -> None:
    base = _extractor(features, model, batch_tokens=1)({"messages": ROWS})
    for batch_tokens in (64, "auto"):
        for order in (range(len(ROWS)), [3, 1, 4, 0, 2]):
            batch = {"messages": [ROWS[i] for i in order]}
            result = _extractor(features, model, batch_tokens=batch_tokens)(batch)
            for place, i in enumerate(order):
                for name in features:
                    _assert_close(_dense(result, name, place), _dense(base, name, i), 2e-6)


def test_a_row_is_the_same_alone_and_among_others() -> None:
    extractor = _extractor(DENSE_FEATURES)
    together = extractor({"messages": ROWS})
    for i, messages in enumerate(ROWS):
        alone = extractor({"messages": messages})
        assert alone["neuron_skip"] == "" and alone["n_tokens"] == together["n_tokens"][i]
        for name in DENSE_FEATURES:
            _assert_close(_dense({k: [v] for k, v in alone.items()}, name, 0), _dense(together, name, i), 2e-6)


@pytest.mark.parametrize("pool_tokens", ["all", "assistant"])
def test_features_in_one_pass_equal_each_alone(pool_tokens: str) -> None:
    together = _extractor(DENSE_FEATURES, pool_tokens=pool_tokens)({"messages": ROWS})
    for name in DENSE_FEATURES:
        for alone in (
            _extractor([name], pool_tokens=pool_tokens),
            _extractor(DENSE_FEATURES, pool_tokens=pool_tokens).with_features([name]),
        ):
            result = alone({"messages": ROWS})
            assert result["neuron_skip"] == together["neuron_skip"]
            for column in _columns(name):
                for a, b in zip(result[column], together[column], strict=True):
                    np.testing.assert_array_equal(a, b)


def test_rows_without_text_keep_their_place() -> None:
    empty = [{"role": "user", "content": "  "}, {"role": "assistant", "content": ""}]
    mixed = [None, ROWS[0], empty, [], ROWS[1], [{"role": "wizard", "content": "x"}], ROWS[2]]
    result, clean = _extractor(DENSE_FEATURES)({"messages": mixed}), _extractor(DENSE_FEATURES)({"messages": ROWS[:3]})
    role = "error: messages[0] has the unknown role 'wizard'"
    assert result["neuron_skip"] == ["empty", "", "empty", "empty", "", role, ""]
    assert (result["n_tokens"] > 0).tolist() == [not skip for skip in result["neuron_skip"]]
    for name in DENSE_FEATURES:
        for column in _columns(name):
            assert [len(result[column][i]) for i in (0, 2, 3, 5)] == [0] * 4
        for place, i in ((1, 0), (4, 1), (6, 2)):
            np.testing.assert_allclose(_dense(result, name, place), _dense(clean, name, i), atol=1e-6, rtol=2e-6)


def test_a_batch_of_nothing_but_empty_rows() -> None:
    result = _extractor(DENSE_FEATURES)({"messages": [None, []]})
    assert result["neuron_skip"] == ["empty", "empty"] and result["n_tokens"].tolist() == [0, 0]


def test_truncated_rows_are_recorded() -> None:
    for side in ("right", "left"):
        result = _extractor(["hidden"], max_length=20, truncation_side=side)({"messages": ROWS})
        lengths = [Reference(messages).n for messages in ROWS]
        assert result["truncated"].tolist() == [n > 20 for n in lengths]
        assert result["n_tokens"].tolist() == [min(n, 20) for n in lengths]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_name_every_row(bad: float) -> None:
    model = deepcopy(MODELS["llama"])
    blocks_of(model)[1].mlp.down_proj.weight.data[3, 4] = bad
    result = _extractor(DENSE_FEATURES, model)({"messages": ROWS})
    assert all(skip.startswith("error: NaN or infinite activations") for skip in result["neuron_skip"])
    assert not any(len(value) for name in DENSE_FEATURES for column in _columns(name) for value in result[column])


def test_a_damaged_token_names_only_its_rows() -> None:
    model = deepcopy(MODELS["llama"])
    decoder_of(model).embed_tokens.weight.data[TOKENIZER.convert_tokens_to_ids("q")] = float("nan")
    result, clean = (
        _extractor(DENSE_FEATURES, model)({"messages": ROWS}),
        _extractor(DENSE_FEATURES)({"messages": ROWS}),
    )
    damaged = [any("q" in turn["content"] for turn in messages) for messages in ROWS]
    assert [bool(skip) for skip in result["neuron_skip"]] == damaged and sum(damaged) == 2
    for name in DENSE_FEATURES:
        for i, broken in enumerate(damaged):
            if broken:
                assert not any(len(result[column][i]) for column in _columns(name))
            else:
                np.testing.assert_array_equal(_dense(result, name, i), _dense(clean, name, i))


def test_damage_below_the_last_site_is_never_read() -> None:
    model = deepcopy(MODELS["llama"])
    blocks_of(model)[LAYER + 1].mlp.down_proj.weight.data[:] = float("nan")
    features = ("mona", "polysemantic", "hidden")
    assert _extractor(features, model)({"messages": ROWS})["neuron_skip"] == [""] * len(ROWS)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_damaged_gate_neuron_is_never_a_number(sign: float) -> None:
    """Both NaNs: x86 makes the one with the sign bit set (inf - inf, 0 * inf)."""
    model = deepcopy(MODELS["llama"])
    blocks_of(model)[LAYER].mlp.gate_proj.weight.data[7] = torch.copysign(
        torch.tensor(float("nan")), torch.tensor(sign)
    )
    result = _extractor(["polysemantic"], model)({"messages": ROWS})
    assert all(skip.startswith("error: NaN") for skip in result["neuron_skip"])


def test_float16_values_that_overflow_are_named() -> None:
    sae = SparseAutoencoder(
        W_enc=SAE.W_enc * 1e6, b_enc=SAE.b_enc, site=SAE.site, activation="topk", k=K, b_pre=SAE.b_pre
    )
    result = _extractor(["mona"], sae=sae, value_dtype="float16")({"messages": ROWS})
    assert all("value_dtype float32" in skip for skip in result["neuron_skip"])


def test_a_pad_id_outside_the_vocabulary_does_no_harm() -> None:
    """Many a tokenizer got its pad token later than the model its embeddings."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad2>"})
    tokenizer.add_tokens([f"<extra{i}>" for i in range(VOCAB)])
    tokenizer.pad_token = f"<extra{VOCAB - 1}>"
    assert tokenizer.pad_token_id >= VOCAB
    result, want = (_extractor(["hidden"], tokenizer=t)({"messages": ROWS}) for t in (tokenizer, TOKENIZER))
    for i in range(len(ROWS)):
        np.testing.assert_array_equal(_dense(result, "hidden", i), _dense(want, "hidden", i))


def test_the_users_model_is_left_as_it_is() -> None:
    model = deepcopy(MODELS["llama"])
    _extractor(DENSE_FEATURES, model)({"messages": ROWS})
    assert len(blocks_of(model)) == BLOCKS
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
