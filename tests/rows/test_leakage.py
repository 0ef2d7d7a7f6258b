"""The set of keys by which duplicates are found: what a plain set says, at 16 bytes a key."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_neuronselect.rows.leakage import KEY_BYTES, Seen, key

# Few values of either half, so that keys share their first half and differ in the second.
keys = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda k: b"".join(i.to_bytes(8, "little") for i in k))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sets(keys, max_size=8), max_size=12))
def test_it_says_what_a_set_says(batches: list[set[bytes]]) -> None:
    seen, plain = Seen(), set[bytes]()
    for batch in batches:
        asked = sorted(batch)
        assert seen.contains(asked).tolist() == [one in plain for one in asked]
        seen.add(batch - plain)
        plain |= batch
        assert len(seen) == len(plain)


def test_it_takes_sixteen_bytes_a_key() -> None:
    seen = Seen()
    texts = [f"row {i}" for i in range(20_000)]
    for start in range(0, len(texts), 700):
        seen.add([key(text) for text in texts[start : start + 700]])
    assert len(seen) == len(texts) and seen.nbytes == KEY_BYTES * len(texts)
    assert len(seen._runs) <= np.log2(len(texts))  # few runs to look a key up in
    assert seen.contains([key(text) for text in texts]).all()
    assert not seen.contains([key(f"other {i}") for i in range(1000)]).any()
