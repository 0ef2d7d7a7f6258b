"""Whatever happens to a file of ours: it is refused in one line, or gives the same numbers. Never others."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import damage
from datasets import Dataset
from tiny import rows, write_sae

from hf_neuronselect import FeatureLibrary, NeuronFeatureExtractor, NeuronSelectError, NeuronSelector, Selection
from hf_neuronselect.core.digests import SAE_FILES
from hf_neuronselect.core.seals import write_checksums
from hf_neuronselect.models.sae_formats import load_sae
from hf_neuronselect.store.store import FeatureStore, write_store

TIMES = 40


class Works:
    """A folder of each kind, and the numbers that are read from it."""

    def __init__(self, root: Path, pool: Dataset, extractor: NeuronFeatureExtractor) -> None:
        self.pool, self.extractor = pool, extractor
        write_store(pool, extractor, root / "store", pool_about={"id": "pool"}, shard_rows=8)
        self.fitted = NeuronSelector("mona").fit({"t": rows(4, seed=1)}, extractor=extractor)
        self.fitted.save_pretrained(root / "capability")
        FeatureLibrary({"a": self.fitted, "b": self.of("nait")}).save_pretrained(root / "library")
        self.whole = FeatureStore(root / "store")
        self.fitted.select(pool, k=5, features=self.whole).save_pretrained(root / "selection")
        write_sae(root / "sae" / "layers.2", 32)
        write_checksums(root / "sae" / "layers.2", SAE_FILES)
        self.tokens = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))

    def of(self, method: str) -> NeuronSelector:
        return NeuronSelector(method).fit({"t": rows(4, seed=2)}, extractor=self.extractor)

    def scores(self, selector: NeuronSelector, store: FeatureStore) -> Any:
        return selector.select(self.pool, k=5, features=store).scores.to_pydict()

    def store(self, folder: Path) -> Any:
        return self.scores(self.fitted, FeatureStore(folder))

    def capability(self, folder: Path) -> Any:
        return self.scores(NeuronSelector.from_pretrained(folder), self.whole)

    def library(self, folder: Path) -> Any:
        found = FeatureLibrary.from_pretrained(folder)
        return [self.scores(found[name], self.whole) for name in ("a", "b")]

    def selection(self, folder: Path) -> Any:
        found = Selection.from_pretrained(folder)
        assert found.selector is not None
        return found.scores.to_pydict(), found.dataset[:], self.scores(found.selector, self.whole)

    def sae(self, folder: Path) -> Any:
        found = load_sae(folder)
        return found.site, found.sum_rows(self.tokens, torch.arange(64) // 8, 8).tolist()


@pytest.fixture(scope="module")
def made(extractor: NeuronFeatureExtractor, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Works]:
    root = tmp_path_factory.mktemp("whole")
    return root, Works(root, rows(24), extractor)


@pytest.mark.parametrize("kind", ["store", "selection", "capability", "library", "sae"])
def test_damage_changes_no_number(kind: str, made: tuple[Path, Works], tmp_path: Path) -> None:
    root, works = made
    read: Callable[[Path], Any] = getattr(works, kind)
    right = read(root / kind)
    draw = np.random.default_rng(sum(kind.encode()))
    refused = 0
    for number in range(TIMES):
        folder = tmp_path / str(number)
        shutil.copytree(root / kind, folder)
        how = damage(folder, draw)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a damaged cost
                assert read(folder) == right, how
        except NeuronSelectError as cause:
            line = cause.as_command_line()
            assert line.isprintable() and len(line) < 600, how
            refused += 1
        except Exception as cause:
            raise AssertionError(how) from cause
    assert refused > TIMES // 4
