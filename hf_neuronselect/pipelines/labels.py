"""Label the features of a sparse autoencoder, by words or by a chat model's phrases."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset

from ..core import progress
from ..core.configs import EvidenceOptions
from ..core.errors import NeuronSelectError, NeuronSelectWarning
from ..core.intervals import Interval, balanced_accuracy_of
from ..core.options import AUTO, ExtractionOptions
from ..core.sae_configs import SaeDescribeConfig, SaeLabelConfig
from ..core.sources import Source
from ..explain.described import (
    Contexts,
    asked_what,
    asked_whether,
    context_text,
    contexts_of,
    read_phrase,
    read_yes,
    words_fit,
)
from ..explain.firings import Firings, firings_of, terms_of
from ..explain.labels import Description, Label, Labels, check_labels_file, labels_of, labels_path, make_labels
from ..explain.report import text_table
from ..models.chat import JudgeSpec, Messages
from ..models.judge import Judge, Rating
from ..rows.formats import Conversation, read_row, row_format
from ..rows.load import Rows, load_rows
from ..selection.causal import feature_shares, ranked_by
from ..selection.selection import Selection
from ..signals.activations import Mona
from ..signals.base import signals_of
from ..signals.extractor import NeuronFeatureExtractor
from .explain import explainer_of
from .parts import Say, extractor_of, quiet

LOCAL_TOKENS = 48
T = TypeVar("T")


def label_sae(config: SaeLabelConfig, *, say: Say = quiet, note: Say = quiet) -> Labels:
    """Label an SAE's features from random rows of a pool, and keep the labels where ``explain`` finds them.

    Descriptions that a chat model made before are kept beside the new words.

    Raises:
        NeuronSelectError: bad input, or no row can be read.
    """
    rows, extractor, sae = _read(config, note)
    found = make_labels(extractor, _shuffled(rows, config.seed), tokens=config.tokens, about=_about(config, rows))
    if not found.found:
        raise NeuronSelectError("too few to label any feature; give more rows, or read more tokens", option="tokens",
                                value=config.tokens)  # fmt: skip
    auc = np.asarray([label.auc for label in found.found.values()])
    before = labels_of(sae, config.out)
    if before is not None:
        found = found.with_descriptions(before.found)
    path = config.out or labels_path(sae)
    found.save(path)
    say(
        f"{len(auc):,} features labelled from {found.about['tokens']:,} tokens; how well a label predicts where its feature "
        f"fires (AUC on held-out rows): median {np.median(auc):.2f}, {np.mean(auc >= 0.8):.0%} of them at least 0.80 -> {path}"
    )
    return found


def _read(config: SaeLabelConfig, note: Say) -> tuple[Rows, NeuronFeatureExtractor, Source]:
    """The pool, the extractor with the SAE, and the SAE."""
    if config.out is not None:
        check_labels_file(config.out)
    rows = load_rows(config.pool)
    bundled = config.model is None and config.sae == AUTO
    options = ExtractionOptions(
        model=config.model, revision=config.revision, sae=None if bundled else config.sae, sae_revision=config.sae_revision,
        layer=config.layer, max_length=config.max_length, dtype=config.dtype, device=config.device,
    )  # fmt: skip
    extractor = extractor_of(options, (Mona(),), note)
    assert extractor.extraction.sae is not None
    return rows, extractor, extractor.extraction.sae


def _about(config: SaeLabelConfig, rows: Rows) -> dict[str, Any]:
    return {
        "pool": rows.source.id,
        "pool_commit": rows.source.commit,
        "max_length": config.max_length,
        "seed": config.seed,
    }


def _shuffled(rows: Rows, seed: int) -> Iterator[Conversation]:
    """All rows in a random order, read as they are asked for."""
    assert isinstance(rows.data, Dataset)
    data, fmt = rows.data, row_format(rows.data.column_names)
    texts = data.with_format(None).select_columns(fmt.used)
    order = np.random.default_rng(seed).permutation(len(data))
    return (read_row(row, fmt) for row in texts.select(order))


# ------------------------------------------------------------------------------------ a chat model's phrases
@dataclass(frozen=True)
class Described:
    """A feature with its new label, and how the words of its old one do on the same contexts.

    Attributes:
        words: balanced accuracy of saying that it fires where one of its words is; no value without words.
    """

    feature: int
    label: Label
    contexts: Contexts
    words: Interval


def describe_sae(config: SaeDescribeConfig, *, say: Say = quiet, note: Say = quiet) -> Labels:
    """Let a chat model describe features of an SAE, check its phrases, and keep them where ``explain`` finds labels.

    The model sees the contexts in which a feature is strongest and answers with a phrase. Then it sees the phrase with one held-out
    context at a time and says whether the feature fires there. Every answer is kept on disk, and none is asked for twice.

    Returns:
        All labels of the SAE, with the new descriptions; words that were there stay.

    Raises:
        NeuronSelectError: bad input; no feature that can be described; the judge cannot be reached, or nothing that it says can be
            read. No label is then changed.
    """
    spec = JudgeSpec.of(config, begin="", local_tokens=LOCAL_TOKENS)
    spec.check()
    rows, extractor, sae = _read(config, note)
    wanted = _wanted(config, extractor, sae, note)
    old = labels_of(sae, config.out) or Labels({}, {"sae": sae.key, "model": extractor.extraction.spec.source.key})
    seen = firings_of(extractor, _shuffled(rows, config.seed), config.tokens, wanted)
    contexts = _contexts(config, seen, wanted)
    found = _described(Judge(spec), seen, contexts, old, extractor.forward.tokenizer, note)
    labels = old.with_descriptions({one.feature: one.label for one in found})
    path = config.out or labels_path(sae)
    labels.save(path)
    say(_table(found))
    say(
        f"{len(found):,} of {len(wanted):,} features described by {spec.name}. Balanced accuracy of its yes and no on held-out contexts, "
        f"0.5 is chance, with 95 % intervals; of the words, on the same contexts -> {path}"
    )
    return labels


def _wanted(config: SaeDescribeConfig, extractor: NeuronFeatureExtractor, sae: Source, note: Say) -> list[int]:
    """The features to describe.

    Raises:
        NeuronSelectError: one that the SAE has not, or a selection that was not made with it.
    """
    if config.selection is not None:
        return _of_selection(config, config.selection, sae, note)
    _, encoder = extractor.forward.loaded([Mona()])
    assert encoder is not None
    if wrong := [one for one in config.numbers if one >= encoder.num_latents]:
        raise NeuronSelectError(f"the SAE {sae.id} has features 0 to {encoder.num_latents - 1}", option="features",
                                value=wrong[0])  # fmt: skip
    return list(config.numbers)


def _of_selection(config: SaeDescribeConfig, folder: str, sae: Source, note: Say) -> list[int]:
    """The features that explain most of what a selection's picks score for its first target, as the causal check ranks them."""
    selection, name = Selection.from_pretrained(folder), Path(folder).name
    made, selector = selection.provenance.extractor, selection.selector
    known = made.sae if made is not None else None
    of_sae = selector is not None and any(one.needs_sae for one in signals_of(selector.method.signals))
    if not of_sae or known is None or known.id is None or known.commit is None:
        raise NeuronSelectError(
            f"{selection.provenance.method.name} does not score by features of an SAE: name a selection by a method that reads an "
            "SAE's latents, or give --features", option="selection", value=name,
        )  # fmt: skip
    if Source(known.id, known.commit, "").key != sae.key:
        raise NeuronSelectError(
            f"was made with the SAE {known.id} at {known.commit}, and this is {sae.id} at {sae.commit}: name that one "
            "(--model, --sae)", option="selection", value=name,
        )  # fmt: skip
    given = EvidenceOptions(model=config.model, sae=None if config.sae == AUTO else config.sae, device=config.device)
    explainer = explainer_of(given, None, selection)
    shares, _ = feature_shares(explainer)
    if not shares:
        raise NeuronSelectError("has no pick to explain", option="selection", value=name)
    target = explainer.evidence.target
    if others := [one for one in explainer.evidence.selector.targets if one != target]:
        note(f"these features explain what the picks of {name} score for {target}, not for {', '.join(others)}")
    return ranked_by(shares)[: config.most]


def _contexts(config: SaeDescribeConfig, seen: Firings, wanted: Sequence[int]) -> dict[int, Contexts]:
    """Feature -> its contexts. Warns of features that are left out.

    Raises:
        NeuronSelectError: all are.
    """
    found = {feature: contexts_of(seen, feature, config.contexts, config.seed) for feature in wanted}
    left_out = {feature: why for feature, why in found.items() if isinstance(why, str)}
    said = "; ".join(f"feature {feature} {why}" for feature, why in left_out.items())
    if len(left_out) == len(found):
        raise NeuronSelectError(f"has no context to describe: {said}; give other rows, or read more (--tokens)", option="pool",
                                value=Path(config.pool).name)  # fmt: skip
    if said:
        warnings.warn(f"left out: {said}; other rows (--pool), or more of them (--tokens), may do", NeuronSelectWarning,
                      stacklevel=3)  # fmt: skip
    return {feature: one for feature, one in found.items() if not isinstance(one, str)}


def _described(
    judge: Judge, seen: Firings, contexts: Mapping[int, Contexts], old: Labels, tokenizer: Any, note: Say
) -> list[Described]:
    """Ask for phrases, then whether they fit the held-out contexts.

    Raises:
        NeuronSelectError: nothing that the judge says can be read.
    """

    def texts(places: Sequence[int]) -> list[str]:
        return [context_text(seen, place, tokenizer.decode) for place in places]

    checked = {feature: texts(one.held_out) for feature, one in contexts.items()}
    first = [asked_what(texts(one.shown)) for one in contexts.values()]
    if judge.estimate(first).requests:
        later = [asked_whether(" " * 60, text) for of in checked.values() for text in of]
        note(
            f"First a phrase for each of {len(first):,} features, then yes or no to each context: {judge.estimate([*first, *later])}."
        )
    phrases = dict(zip(contexts, _rated(judge, first, read_phrase, "features"), strict=True))
    told = {feature: one.value for feature, one in phrases.items() if one.value is not None}
    if not told:
        raise _unread(judge, f"{len(first)} answers can be read as a phrase")
    second = [asked_whether(phrase, text) for feature, phrase in told.items() for text in checked[feature]]
    answers = iter(_rated(judge, second, read_yes, "contexts"))
    said = {feature: [next(answers).value for _ in checked[feature]] for feature in told}
    if all(one is None for of in said.values() for one in of):
        raise _unread(judge, f"{len(second)} answers can be read as yes or no")
    terms = terms_of(tokenizer)
    return [
        _scored(judge.spec.name, seen, old, terms, feature, told[feature], contexts[feature], said[feature])
        for feature in told
    ]


def _rated(judge: Judge, asked: Sequence[Messages], read: Callable[[str], T | None], what: str) -> list[Rating[T]]:
    with progress.track("judge", judge.estimate(asked).requests, unit=what) as told:
        return judge.rate(asked, read, what=what, unread="error: the answer is not of the form asked for",
                          done=lambda _: told.done(1))  # fmt: skip


def _unread(judge: Judge, what: str) -> NeuronSelectError:
    return NeuronSelectError(f"none of its {what}: no label was changed; ask a larger model", option="judge",
                             value=judge.spec.name)  # fmt: skip


def _scored(
    by: str, seen: Firings, old: Labels, terms: Sequence[str], feature: int, phrase: str, contexts: Contexts,
    said: Sequence[bool | None],
) -> Described:  # fmt: skip
    """A feature's label with a phrase and its score.

    Args:
        said: of each held-out context, whether the feature fires there; None of an answer that cannot be read.
    """
    fires = np.arange(len(said)) < len(contexts.fires)
    usable = np.asarray([one is not None for one in said])
    own = seen.latent == feature
    known = old.get(feature) or Label(
        (), (), (), None, float(own.sum() / len(seen.token)),
        len(np.unique(seen.row[seen.place[own]])) / seen.rows,
    )  # fmt: skip

    def accuracy(values: Sequence[bool | None]) -> Interval:
        yes = np.asarray([bool(one) for one in values])
        return balanced_accuracy_of(yes[fires & usable], yes[~fires & usable])

    words = (
        accuracy([words_fit(known, terms, seen, place) for place in contexts.held_out])
        if known.auc is not None
        else Interval(None)
    )
    told = Description(phrase, by, accuracy(said), int(usable.sum()))
    return Described(feature, replace(known, described=told), contexts, words)


def _table(found: Sequence[Described]) -> str:
    rows = []
    for one in found:
        told = one.label.described
        assert told is not None
        rows.append([
            f"feature {one.feature}: {told.text}", told.score.told() or "too few", f"{told.usable} of {len(one.contexts.held_out)}",
            str(len(one.contexts.hard)), one.words.told(),
        ])  # fmt: skip
    return text_table(["", "balanced accuracy", "answers read", "look-alikes", "its words"], rows)
