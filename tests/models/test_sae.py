"""Properties of the encoder: the exact top-k, the pooled sums, and how K is resolved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.models.sae import Site, SparseAutoencoder, top_k

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 96, 100, 127, 128, 192, 1000, 1024, 4096]))


def whole(rng: np.random.Generator, *shape: int, low: int = -3, high: int = 4) -> torch.Tensor:
    """Small whole numbers: products and sums of them are exact in float32, and ties are many."""
    return torch.from_numpy(rng.integers(low, high, shape).astype(np.float32))


def make(rng: np.random.Generator, activation: str = "topk", m: int = 24, d: int = 5, **more: Any) -> SparseAutoencoder:
    """An SAE of small whole numbers."""
    extra: dict[str, Any] = {"threshold": whole(rng, m, low=0, high=12)} if activation == "jumprelu" else {}
    if activation == "gated":
        extra["gate"] = (whole(rng, m), torch.zeros(m), whole(rng, m))
    if activation in ("topk", "groupmax"):
        extra["k"] = 4
    weights = {"W_enc": whole(rng, m, d), "b_enc": whole(rng, m), "b_pre": whole(rng, d)}
    return SparseAutoencoder(**weights | extra | more, activation=activation, site=Site("layers.0"))


def best(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of each row's k largest, ties to the lower index: the slow way, sorted by index."""
    order = np.stack([np.lexsort((np.arange(len(row)), -row)) for row in values])
    return np.sort(order[:, :k], axis=-1)


def latents(sae: SparseAutoencoder, x: torch.Tensor, k: int | None) -> np.ndarray:
    """The kept latents ``[N, m]`` in float64, token by token."""

    def array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.double().numpy()

    product = (array(x) - array(sae.b_pre)) @ array(sae.W_enc).T
    z = product + array(sae.b_enc)
    acts = np.maximum(z, 0)
    if sae.activation == "jumprelu":
        acts = acts * (z > array(sae.threshold))
    elif sae.activation == "gated":
        b_gate, _, b_mag = map(array, sae.gate)
        acts = np.maximum(product + b_mag, 0) * (product + b_gate > 0)
    out = np.zeros_like(acts)
    for token, row in enumerate(acts):
        if sae.activation == "groupmax":
            size = len(row) // sae.k
            chosen = np.array([start + row[start : start + size].argmax() for start in range(0, len(row), size)])
        else:
            chosen = np.arange(len(row)) if k is None else best(row[None], k)[0]
        out[token, chosen] = row[chosen]
    return out


# ------------------------------------------------------------------------------------------ top_k
@DTYPES
@settings(deadline=None, max_examples=150)
@given(seed=SEEDS, n=st.integers(1, 4), m=WIDTHS, k=st.one_of(st.integers(1, 12), st.integers(1, 5000)),
       levels=st.sampled_from([1, 2, 4, 200]))  # fmt: skip
def test_top_k_is_exact_and_ties_go_low(dtype: torch.dtype, seed: int, n: int, m: int, k: int, levels: int) -> None:
    """A block skipped, or a tie broken by chance, would pool another feature in another batch."""
    numbers = np.random.default_rng(seed).integers(0, levels, (n, m)) / 8.0
    values, indices = top_k(torch.from_numpy(numbers).to(dtype), k)
    assert values.dtype == dtype and indices.dtype == torch.int64
    assert values.shape == indices.shape == (n, min(k, m))
    # Of the zeros that fill up a row, which ones are named makes no difference.
    for row, found, expected in zip(numbers, indices.numpy(), best(numbers, k), strict=True):
        assert len(set(found.tolist())) == min(k, m)
        assert sorted(i for i in found if row[i] > 0) == [i for i in expected if row[i] > 0]
    np.testing.assert_array_equal(values.double().numpy(), np.take_along_axis(numbers, indices.numpy(), -1))


@DTYPES
@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, m=WIDTHS, k=st.integers(1, 12))
def test_top_k_orders_all_magnitudes(dtype: torch.dtype, seed: int, m: int, k: int) -> None:
    """Keys made of bit patterns must order tiny, subnormal, huge and infinite values like the values."""
    rng = np.random.default_rng(seed)
    # 2^-132 is subnormal in bfloat16 and float32; values below 2^-133 would round to zeros, whose order is free.
    given_values = torch.from_numpy(np.exp2(rng.uniform(-132, 127, (2, m))).astype(np.float32)).to(dtype)
    given_values[:, rng.integers(0, m)] = torch.inf
    _, indices = top_k(given_values, k)
    np.testing.assert_array_equal(np.sort(indices.numpy(), axis=-1), best(given_values.double().numpy(), k))


@DTYPES
@pytest.mark.parametrize("m", [1 << 16, (1 << 16) + 1, 1 << 17])
def test_top_k_of_wide_rows(dtype: torch.dtype, m: int) -> None:
    """16-bit keys hold indices below 65536 only; beyond (an odd width is not cut into blocks), they lose latents."""
    numbers = np.random.default_rng(m).integers(0, 3, (2, m)).astype(np.float32)
    numbers[0, -1] = 9
    numbers[1] = 1
    for k in (1, 7):
        _, indices = top_k(torch.from_numpy(numbers).to(dtype), k)
        np.testing.assert_array_equal(np.sort(indices.numpy(), axis=-1), best(numbers, k))


def test_top_k_of_no_rows() -> None:
    """A batch without a token left is no error."""
    for m in (8, 1024):
        assert [t.shape for t in top_k(torch.zeros(0, m), 3)] == [(0, 3), (0, 3)]


# --------------------------------------------------------------------------------------- sum_rows
@DTYPES
@settings(deadline=None, max_examples=80)
@given(seed=SEEDS, activation=st.sampled_from(["relu", "topk", "groupmax", "jumprelu", "gated"]),
       k=st.sampled_from([None, 1, 3, 24, 50]), tokens=st.integers(0, 30), rows=st.integers(1, 5),
       chunk=st.sampled_from([None, 1, 2, 7, 30, 64]))  # fmt: skip
def test_sum_rows_is_the_slow_sum(
    dtype: torch.dtype, seed: int, activation: str, k: int | None, tokens: int, rows: int, chunk: int | None
) -> None:
    """A token lost at a chunk's edge or added to another row changes the pooled embedding."""
    rng = np.random.default_rng(seed)
    sae, x = make(rng, activation), whole(rng, tokens, 5)
    k = None if activation == "groupmax" else k
    row = torch.from_numpy(rng.integers(0, rows, tokens))
    got = sae.to("cpu", dtype).sum_rows(x, row, rows, k, chunk)
    expected = np.zeros((rows, sae.num_latents))
    np.add.at(expected, row.numpy(), latents(sae, x, sae.resolve_k(k)))
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("activation", ["relu", "topk", "groupmax", "jumprelu", "gated"])
def test_all_negative_gives_zeros(activation: str) -> None:
    """Where nothing fires, a top-k without the ReLU would pool negative numbers."""
    rng = np.random.default_rng(0)
    silent = {"gate": (torch.full((24,), -99.0), torch.zeros(24), torch.full((24,), -99.0))}
    more = silent if activation == "gated" else {}
    sae = make(rng, activation, b_enc=torch.full((24,), -99.0), **more)
    total = sae.sum_rows(whole(rng, 9, 5), torch.arange(9) % 2, 3)
    assert torch.equal(total, torch.zeros(3, 24))


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, activation=st.sampled_from(["relu", "topk", "groupmax", "jumprelu"]), tokens=st.integers(1, 40),
       chunk=st.sampled_from([None, 1, 5, 16]))  # fmt: skip
def test_row_sums_do_not_depend_on_the_batch(seed: int, activation: str, tokens: int, chunk: int | None) -> None:
    """Sums of a row, alone or among others, are the same bits: else ranks change with the batch size.

    Each latent reads one input, so its matrix product is exact; the sums over tokens are not.
    """
    rng = np.random.default_rng(seed)
    weight = torch.zeros(24, 24)
    weight[torch.arange(24), torch.from_numpy(rng.permutation(24))] = torch.from_numpy(rng.normal(size=24)).float()
    sae = make(rng, activation, d=24, W_enc=weight, b_enc=torch.zeros(24), b_pre=None)
    if activation == "jumprelu":
        sae = make(rng, "jumprelu", d=24, W_enc=weight, b_enc=torch.zeros(24), b_pre=None, threshold=torch.tensor(0.3))
    x = torch.from_numpy(rng.lognormal(0, 3, (tokens, 24)) * rng.choice([-1, 1], (tokens, 24))).float()
    alone = sae.sum_rows(x, torch.zeros(tokens, dtype=torch.int64), 1)[0]
    # The same tokens in the same order, those of two other rows strewn between them.
    row = np.concatenate([np.full(tokens, 1), rng.choice([0, 2], 50)])
    rng.shuffle(row)
    mixed = torch.from_numpy(rng.normal(size=(len(row), 24))).float()
    mixed[torch.from_numpy(row == 1)] = x
    among = sae.sum_rows(mixed, torch.from_numpy(row), 3, chunk=chunk)[1]
    assert torch.equal(alone, among) and not torch.isnan(among).any()


@DTYPES
def test_sums_of_dense_weights_agree_across_batches(dtype: torch.dtype) -> None:
    """Real weights: BLAS may round otherwise for another batch size, by float32 rounding and no more."""
    rng = np.random.default_rng(3)
    weight = torch.from_numpy(rng.normal(size=(64, 32))).float()
    sae = make(rng, m=64, d=32, W_enc=weight, b_enc=torch.zeros(64), b_pre=None).to("cpu", dtype)
    x = torch.from_numpy(rng.normal(size=(90, 32))).float()
    whole_batch = sae.sum_rows(x, torch.arange(90) // 30, 3)
    for row in range(3):
        alone = sae.sum_rows(x[row * 30 : row * 30 + 30], torch.zeros(30, dtype=torch.int64), 1)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(whole_batch[row], alone[0], **tolerance)


# -------------------------------------------------------------------------------------- resolve_k
@pytest.mark.parametrize(
    ("activation", "k", "resolved"),
    [
        ("topk", None, 4), ("topk", 2, 2), ("topk", 99, 99), ("groupmax", None, 4), ("groupmax", 4, 4),
        ("relu", None, None), ("relu", 3, 3), ("jumprelu", None, None), ("jumprelu", 3, 3), ("gated", None, None),
        ("gated", 3, 3),
    ],
)  # fmt: skip
def test_resolve_k(activation: str, k: int | None, resolved: int | None) -> None:
    """The explicit K, else the SAE's own, else what its nonlinearity leaves."""
    sae = make(np.random.default_rng(0), activation)
    assert sae.resolve_k(k) == resolved
    values, indices = sae.encode(torch.zeros(2, 5), k)
    assert values.shape == (2, min(resolved or 24, 24)) and (indices is None) == (resolved is None)


@pytest.mark.parametrize(
    ("activation", "k", "message"),
    [("topk", 0, "at least 1"), ("relu", -1, "at least 1"), ("groupmax", 0, "at least 1"),
     ("groupmax", 3, "its 4 groups"), ("groupmax", 24, "its 4 groups")],
)  # fmt: skip
def test_resolve_k_refuses(activation: str, k: int, message: str) -> None:
    """K is refused by the name the user gave it."""
    with pytest.raises(NeuronSelectError, match=message) as caught:
        make(np.random.default_rng(0), activation).resolve_k(k)
    assert (caught.value.option, caught.value.value) == ("top_k_features", k)


def test_explicit_k_comes_after_the_nonlinearity() -> None:
    """Chosen before the threshold, the largest pre-activation would take the place and then be zeroed."""
    sae = make(np.random.default_rng(0), "jumprelu", m=3, d=3, W_enc=torch.eye(3), b_enc=torch.zeros(3), b_pre=None,
               threshold=torch.tensor([9.0, 1.0, 1.0]))  # fmt: skip
    values, indices = sae.encode(torch.tensor([[5.0, 2.0, 3.0]]), 1)
    assert (values.tolist(), indices.tolist()) == ([[3.0]], [[2]])


def test_k_beyond_the_width_keeps_everything() -> None:
    """K > m is every latent, as the ReLU leaves them."""
    rng = np.random.default_rng(1)
    sae, x = make(rng), whole(rng, 6, 5)
    values, indices = sae.encode(x, 1000)
    assert torch.equal(values, sae.activations(x)) and torch.equal(indices, torch.arange(24).expand(6, 24))
    row = torch.zeros(6, dtype=torch.int64)
    assert torch.equal(sae.sum_rows(x, row, 1, 1000)[0], sae.activations(x).sum(0))


@pytest.mark.parametrize(("latents", "tokens"), [(5120, 819), (131_072, 512), (1 << 20, 64), (1 << 24, 64)])
def test_tokens_encoded_at_once(latents: int, tokens: int) -> None:
    """Wide encoders take more than what stays near the caches, and no more than 64 M elements while a chunk can be less."""
    sae = SparseAutoencoder(torch.empty(latents, 1, device="meta"), torch.empty(0), Site("layers.0"), "relu")
    assert sae.chunk_tokens == tokens
