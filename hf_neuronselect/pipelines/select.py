"""Select rows of a pool for targets, into a selection folder."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.configs import SelectConfig
from ..core.errors import NeuronSelectError
from ..core.folders import SELECTION
from ..core.options import AUTO, ExtractionOptions, options_of
from ..core.text import shown
from ..hub.push import check_write_access, push_folder
from ..pickers import picker_of
from ..rows.load import load_rows
from ..selection.auto_ratio import check_auto
from ..selection.avoid import check_whole
from ..selection.selection import Selection
from ..selection.selector import NeuronSelector
from ..signals.base import signals_of
from ..signals.extractor import NeuronFeatureExtractor
from ..store.store import FeatureStore
from .job import Job, avoided_specs, check_pick, check_rows, open_capability
from .methods import Chosen, method_of
from .parts import Say, check, extractor_of, hold, load_named, named_specs, quiet


def select(config: SelectConfig, *, say: Say = quiet, note: Say = quiet) -> Selection:
    """Select rows and write them to ``config.out``.

    Args:
        say: receives results. note: receives remarks.

    Raises:
        NeuronSelectError: bad input; found before a model is loaded wherever that is possible.
    """
    if config.push_to_hub is not None:
        check_write_access()
    with hold(config.out, SELECTION):
        job = prepare(config)
        job.prepare(extractor_for(config, job, job.chosen.signals, note))
        return finish(config, job, say=say, note=note)


def extractor_for(config: SelectConfig, job: Job, signals: Sequence[str], note: Say) -> NeuronFeatureExtractor:
    """The extractor that a saved capability was fitted with, if it matters, or else one made from the options."""
    texts_alone = not any(signal.stored for signal in signals_of(signals))
    if job.capability is None or not job.chosen.method.needs_target or texts_alone:
        return extractor_of(config, signals, note)
    given = {name: getattr(config, name) for name in config.given if name in options_of(ExtractionOptions)}
    return job.capability.make_extractor(**given)


def prepare(config: SelectConfig, *, like: Job | None = None) -> Job:
    """Check and load everything a selection needs but the model.

    Args:
        like: a job on the same pool and targets, whose rows are used.

    Raises:
        NeuronSelectError: bad input.
    """
    check(config.out, SELECTION)
    if config.features is not None and config.streaming:
        raise NeuronSelectError("a store holds a whole pool; remove --streaming", option="features",
                                value=config.features.name)  # fmt: skip
    specs = named_specs(config.target, "target")
    capability = open_capability(specs)
    chosen = _method(config, capability)
    avoid = avoided_specs(config, chosen.method)
    specs = specs if capability is None else {}
    check_pick(config, list(capability.targets if capability else specs), config.streaming)
    if config.ratio == AUTO:
        several = len(capability.targets if capability else specs) if chosen.method.needs_target else 1
        check_auto(chosen.method, several, config.streaming)
    if config.held_out is not None:
        from .auto_train import check_short_runs  # heavy

        if capability is not None and config.model is None:
            raise NeuronSelectError("name the model that is trained: --model", option="held_out", value=config.held_out)
        check_short_runs(config)
    texts = config.columns.values()
    rows = like.rows if like else load_rows(config.pool, streaming=config.streaming, texts=texts)
    check_whole(rows.data, avoid or (capability.avoided if capability else ()))
    known = {**like.targets, **like.avoided} if like and capability is None else {}
    targets, avoided = (
        {name: known[name] for name in named} if known else load_named(named, option, texts)
        for option, named in (("target", specs), ("avoid", avoid))
    )
    check_rows([rows, *targets.values(), *avoided.values()], config)
    store = None if config.features is None else FeatureStore(config.features)
    return Job(chosen, rows, targets, capability, store, avoided=avoided, avoid_weight=config.avoid_weight)


def finish(config: SelectConfig, job: Job, *, say: Say = quiet, note: Say = quiet) -> Selection:
    """Select, write and push, and say so."""
    selection = job.select(config)
    if config.held_out is not None:
        from .auto_train import by_short_runs  # heavy

        selection = by_short_runs(selection, config, note)
    selection.save_pretrained(config.out, messages=config.messages, examples=config.examples)
    report(selection, config, say=say, note=note)
    if config.push_to_hub is not None:
        say(push_folder(config.out, config.push_to_hub, private=config.private, allow_public=config.allow_public))
    return selection


def _method(config: SelectConfig, capability: NeuronSelector | None) -> Chosen:
    """The method asked for, or the capability's."""
    own = capability.method if capability is not None else None
    if own is None or ("method" in config.given and config.method != own.name):
        chosen = method_of(config.method, config.method_option, config.seed, config.picker)
        if own is not None and chosen.method.needs_target:  # a control needs none: it only leaves out the same rows
            raise NeuronSelectError(
                f"the capability is of method {own.name}; leave --method out", option="method", value=config.method
            )
        return chosen
    assert capability is not None
    chosen = method_of(own.name, own.options | config.method_option, config.seed, str(capability.picker))
    if config.picker is not None and str(picker_of(config.picker)) != str(capability.picker):
        raise NeuronSelectError(f"the capability was fitted with {capability.picker}; remove it", option="picker",
                                value=config.picker)  # fmt: skip
    if chosen.method.options != own.options:
        raise NeuronSelectError(f"the capability was fitted with {own.options}; remove it",
                                option="method_option", value=", ".join(config.method_option))  # fmt: skip
    return chosen


def report(selection: Selection, config: SelectConfig, *, say: Say, note: Say) -> None:
    """Say what was selected and what was left out."""
    made = selection.provenance
    counts, tokens, timing = made.counts, made.tokens, made.timing
    say(
        f"{len(selection)} of {counts.rows} rows selected by {made.method.name} in {timing.seconds:.1f} s -> {config.out}"
    )
    if made.auto is not None:
        say(f"ratio {made.auto.line}")
    if tokens.selected_mean is not None:
        rate = f", {timing.tokens_per_second:,} tokens/s" if timing.tokens_per_second else ""
        say(f"tokens a row: {tokens.selected_mean:.0f} selected, {tokens.pool_mean:.0f} in the pool{rate}")
    left_out = counts.left_out | ({"truncated": counts.truncated} if counts.truncated else {})
    if left_out:
        note("Left out or noted: " + ", ".join(f"{value} {kind}" for kind, value in left_out.items()))
    for reason in counts.reasons:
        note(f"  {shown(reason)}")
