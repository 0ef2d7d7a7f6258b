"""For every option of ``select``: a value that is not its default, and where it must show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_neuronselect.core.configs import SelectConfig
from hf_neuronselect.core.options import flag_words

LM, SAE, ENCODER, MNTP = "me/options-lm", "me/options-sae", "me/options-encoder", "me/options-mntp"  # on the Hub
TEMPLATE = "{% for m in messages %}{{ m['role'] }} -> {{ m['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class Line:
    """What must show that an option was set.

    Attributes:
        value: not the default; ``{files}`` and ``{commit}`` are filled in. beside: options set in both runs.
        changes: what differs from the run without it: ``scores``, ``picks``, ``identity`` (a number may not move on
            this machine), ``record`` (a training decides whether picks do) or ``nothing``.
        record: path in ``selection.json``, and what is there. printed: words of the card's command.
        hub: whether it needs the Hub.
    """

    value: Any
    changes: str = "scores"
    record: tuple[str, Any] | None = None
    printed: tuple[str, ...] = ()
    beside: Mapping[str, Any] = field(default_factory=dict)
    hub: str = ""


NAIT, HIDDEN, FREE = {"method": "nait"}, {"method": "hidden"}, {"k": None}
TWO = {"target": ("t={files}/t.jsonl", "u={files}/u.jsonl")}
EMBEDDED = {"method": "encoder", "encoder": "{files}/embedder"}
ADAPTED = {"method": "llm2vec", "mntp_adapter": "{files}/mntp", "sae": None}
ESTIMATED = {"pool": "{files}/many.jsonl", "k": None, "ratio": "auto"}
PUSHED = {"push_to_hub": "me/rows"}


def of_extractor(name: str, value: Any, **beside: Any) -> Line:
    """An option of the extractor: recorded among its options and printed as it is."""
    words = flag_words(SelectConfig, {name: value})
    return Line(value, record=(f"extractor.options.{name}", value), printed=tuple(words), beside=beside)


LINES = {
    "pool": Line("{files}/u.jsonl", record=("pool.id", "u.jsonl"), printed=("--pool", "u.jsonl")),
    "target": Line(("t={files}/u.jsonl",), record=("targets.t.source.id", "u.jsonl"), printed=("--target", "t=u.jsonl")),
    "method": Line("hidden", record=("method.name", "hidden"), printed=("--method", "hidden")),
    "method_option": Line({"metric": "cosine"}, record=("method.options", {"metric": "cosine", "centre": "none"}),
                          printed=("--method-option", "metric=cosine")),
    "picker": Line("round-robin(taken=lose)", record=("method.picker", "round-robin(taken=lose)"),
                   printed=("--picker", "round-robin(taken=lose)")),
    "avoid": Line(("u={files}/u.jsonl",), record=("avoided.targets.u.source.id", "u.jsonl"),
                  printed=("--avoid", "u=u.jsonl", "--avoid-weight", "1.0")),
    "avoid_weight": Line(0.5, record=("avoided.weight", 0.5), printed=("--avoid-weight", "0.5"),
                         beside={"avoid": ("u={files}/u.jsonl",)}),
    "ratio": Line(0.25, "picks", ("budget", {"ratio": 0.25}), ("--ratio", "0.25"), FREE),
    "k": Line(7, "picks", ("budget", {"k": 7}), ("--k", "7"), FREE),
    "threshold": Line(0.2, "picks", ("budget", {"threshold": 0.2}), ("--threshold", "0.2"), FREE),
    "max_tokens": Line(90, "picks", ("budget", {"max_tokens": 90}), ("--max-tokens", "90"), FREE),
    "held_out": Line("{files}/u.jsonl", "record", ("auto.settings", {"max_steps": 50, "seed": 0}), ("--ratio",), ESTIMATED),
    "train": Line({"max_steps": "4"}, "record", ("auto.settings", {"max_steps": 4, "seed": 0}), ("--ratio",),
                  ESTIMATED | {"held_out": "{files}/u.jsonl"}),
    "source_share": Line(0.3, "picks", ("spread.source_share", 0.3), ("--source-share", "0.3")),
    "source_column": Line("id", "picks", ("spread.source_column", "id"), ("--source-column", "id"), {"source_share": 0.3}),
    "drop_near_copies": Line(True, "picks", ("spread.drop_near_copies", True), ("--drop-near-copies",),
                             {"k": 18, "keep": ("duplicate", "leak")}),
    "keep": Line(("leak",), "picks", ("exclude", ["duplicate"]), ("--keep", "leak"), {"k": 15}),
    "seed": Line(5, record=("method.options", {"seed": 5}), printed=("--method-option", "seed=5"),
                 beside={"method": "random"}),
    "aggregate": Line("mean", "picks", ("aggregate", "mean"), ("--aggregate", "mean"), TWO),
    "weight": Line({"t": 0.9, "u": 0.1}, "picks", ("weights", {"t": 0.9, "u": 0.1}),
                   ("--weight", "t=0.9", "--weight", "u=0.1"),
                   TWO | {"aggregate": "weighted", "weight": {"t": 0.1, "u": 0.9}}),
    "model": Line("{files}/model-2", record=("extractor.model.id", "model-2"), printed=("--model", "model-2")),
    "revision": Line("{commit}", record=("extractor.model.commit", "{commit}"), printed=("--revision", "{commit}"),
                     beside={"model": LM}, hub=LM),
    "sae": Line("{files}/sae-2", record=("extractor.sae.id", "sae-2"), printed=("--sae", "sae-2")),
    "sae_revision": Line("{commit}", record=("extractor.sae.commit", "{commit}"),
                         printed=("--sae-revision", "{commit}"), beside={"sae": SAE}, hub=SAE),
    "encoder": Line("{files}/embedder-2", record=("extractor.encoder.id", "embedder-2"),
                    printed=("--encoder", "embedder-2"), beside=EMBEDDED),
    "encoder_revision": Line("{commit}", record=("extractor.encoder.commit", "{commit}"),
                             printed=("--encoder-revision", "{commit}"), beside=EMBEDDED | {"encoder": ENCODER},
                             hub=ENCODER),
    "mntp_adapter": Line("{files}/mntp-2", record=("extractor.mntp_adapter.id", "mntp-2"),
                         printed=("--mntp-adapter", "mntp-2"), beside=ADAPTED),
    "mntp_revision": Line("{commit}", record=("extractor.mntp_adapter.commit", "{commit}"),
                          printed=("--mntp-revision", "{commit}"), beside=ADAPTED | {"mntp_adapter": MNTP}, hub=MNTP),
    "encoder_window": of_extractor("encoder_window", 9, **EMBEDDED),
    "encoder_prompt": of_extractor("encoder_prompt", "the apple", **EMBEDDED),
    "encoder_dtype": of_extractor("encoder_dtype", "bfloat16", **EMBEDDED),
    "dtype": of_extractor("dtype", "bfloat16"),
    "quantize": replace(of_extractor("quantize", "8bit"), changes="identity"),
    "attn_implementation": replace(of_extractor("attn_implementation", "eager"), changes="identity"),
    "row_format": of_extractor("row_format", "text"),
    "columns": of_extractor("columns", {"messages": "turns"}),
    "chat_template": of_extractor("chat_template", TEMPLATE),
    "max_length": of_extractor("max_length", 9),
    "truncation_side": of_extractor("truncation_side", "left", max_length=9),
    "pool_tokens": of_extractor("pool_tokens", "assistant"),
    "layer": of_extractor("layer", 1, **HIDDEN),
    "top_k_features": of_extractor("top_k_features", 3),
    "pooling": of_extractor("pooling", "sum"),
    "site": of_extractor("site", "mlp", **NAIT),
    "drift": of_extractor("drift", "mean", **NAIT),
    "value_dtype": of_extractor("value_dtype", "float32"),
    # These move neither scores nor picks: see the test that says what each does instead.
    "device": Line("cpu", "nothing"),
    "device_map": Line("auto", "nothing"),
    "batch_tokens": Line(64, "nothing"),
    "private": Line(True, "nothing", beside=PUSHED),
    "allow_public": Line(True, "nothing", beside=PUSHED),
    "out": Line("{files}/elsewhere", "nothing"),
    "features": Line("{files}/store", "nothing"),
    "streaming": Line(True, "nothing"),
    "messages": Line(False, "nothing", beside={"pool": "{files}/qa.jsonl"}),
    "examples": Line(False, "nothing"),
    "push_to_hub": Line("me/others", "nothing"),
}  # fmt: skip


def filled(value: Any, files: Path, commit: str = "") -> Any:
    """A value with its paths and commit filled in."""
    if isinstance(value, (str, Path)):
        return type(value)(str(value).replace("{files}", str(files)).replace("{commit}", commit))
    if isinstance(value, (list, tuple)):
        return type(value)(filled(one, files, commit) for one in value)
    if isinstance(value, Mapping):
        return {name: filled(one, files, commit) for name, one in value.items()}
    return value
