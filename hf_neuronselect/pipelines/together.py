"""One method of a comparison and all its targets: the pool is read and scored once, whatever is selected from it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from datasets import Dataset

from ..core.configs import CompareConfig
from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.progress import untracked
from ..core.provenance import Budget
from ..methods.base import Method, Target
from ..selection.selector import NeuronSelector
from ..selection.sweep import Sweep, sweep_pool
from .job import Job


def resampled(job: Job, config: CompareConfig) -> list[Target]:
    """Targets fitted on a job's exemplars drawn again, with replacement; none of a method that is fitted once or refuses so few."""
    (data,), method = (rows.data for rows in job.targets.values()), job.chosen.method
    if not config.resamples or not method.needs_target or method.fits_once or not isinstance(data, Dataset):
        return []
    draw = np.random.default_rng(config.seed)
    samples = {str(i): data.select(draw.integers(0, len(data), len(data))) for i in range(config.resamples)}
    with warnings.catch_warnings(), untracked():
        warnings.simplefilter("ignore", NeuronSelectWarning)
        try:
            return list(job.chosen.selector().fit(samples, extractor=job.extractor).targets.values())
        except NeuronSelectError:
            return []


def budget_of(job: Job, config: CompareConfig) -> Budget:
    """The budget asked for, or the method's own."""
    asked = (config.ratio, config.k, config.threshold, config.max_tokens)
    return job.chosen.method.default_budget if asked == (None,) * 4 else Budget(*asked)


@dataclass
class Together:
    """The jobs of one method, one a target.

    Attributes:
        jobs: by target. seconds: an equal share of the sweep, for each target; 0 before there is one.
    """

    jobs: Mapping[str, Job]
    seconds: float = 0.0
    _seeds: dict[int, Together] = field(default_factory=dict)

    @cached_property
    def sweep(self) -> Sweep:
        """The pool scored for all targets and, where a row has one score, for their resampled exemplars."""
        started = time.perf_counter()
        one = next(iter(self.jobs.values()))
        more = {} if one.fit().picker.each else {k: v for name in self.jobs for k, v in self._samples(name).items()}
        made = self._sweep(list(self.jobs.values()), more)
        self.seconds = (time.perf_counter() - started) / len(self.jobs)
        return made

    def _sweep(self, jobs: list[Job], more: Mapping[str, Target]) -> Sweep:
        one = jobs[0]
        assert isinstance(one.rows.data, Dataset)
        return sweep_pool([job.fit() for job in jobs], one.rows.data, one.store, one.rows.source, more)

    def _samples(self, name: str) -> dict[str, Target]:
        return {f"{name}~{i}": target for i, target in enumerate(self.jobs[name].samples)}  # no target has this name

    def forget(self) -> None:
        """Free the scores, once every target is selected for."""
        for job in self.jobs.values():
            job.sweep, job.samples = None, []

    def draw(self, name: str, seed: int, config: CompareConfig) -> np.ndarray:
        """Rows picked for a target with another seed. They are scored again only where scores depend on it."""
        job = self.jobs[name]
        chosen = job.chosen.with_seed(seed)
        if type(chosen.method).drawn is Method.drawn:
            if seed not in self._seeds:
                self._seeds[seed] = Together({of: one.again(chosen) for of, one in self.jobs.items()})
            other = self._seeds[seed]
            return self._pick(other.sweep, next(iter(job.fit().targets)), other.jobs[name].fit(), job, config)
        selector = chosen.selector()
        selector.extractor = job.extractor
        return self._pick(self.sweep, next(iter(job.fit().targets)), selector, job, config)

    def resamples(self, name: str, config: CompareConfig) -> list[np.ndarray]:
        """Rows picked with each resample of a target's exemplars."""
        job, samples = self.jobs[name], self._samples(name)
        if not samples:
            return []
        sweep = self._sweep([job], samples) if job.fit().picker.each else self.sweep
        return [self._pick(sweep, sample, job.fit(), job, config) for sample in samples]

    def _pick(self, sweep: Sweep, target: str, selector: NeuronSelector, job: Job, config: CompareConfig) -> np.ndarray:
        return sweep.pick(target, selector, budget_of(job, config), config.exclude, config.spread, job.marks)
