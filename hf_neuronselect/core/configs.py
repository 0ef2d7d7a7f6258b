"""The options of each command, composed of groups; ``pipelines`` runs them, the command line only fills them in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import NeuronSelectError
from .options import AUTO, Dtype, ExtractionOptions, Options, opt
from .spread import Spread

POOL_HELP = "File, folder, Hub id org/name[@revision][:config[:split]], or bundled:pool."
TARGET_HELP = "[NAME=]rows (file, folder, Hub id or bundled:NAME), or capability:FOLDER_OR_ID[:NAME]; repeatable."
AVOID_HELP = "[NAME=]rows of a target that must not be served: rows lose what they score for it; repeatable."
EXEMPLARS_HELP = "[NAME=]rows (file, folder, Hub id or bundled:NAME); repeatable."
PICKERS_HELP = "best-first, global-max, round-robin, knn, kde, transport, diverse, cover; name(option=value,...)"
CAPABILITY = "capability:"
"""Prefix of a target that was fitted before."""
DEFAULT_METHOD = "mona"
Aggregate = Literal["quota", "round_robin", "mean", "max", "weighted"]
Trainer = Literal["trl", "axolotl", "llamafactory", "unsloth"]


def check_avoid_weight(weight: float) -> None:
    """Refuse a weight that takes nothing off.

    Raises:
        NeuronSelectError: it is not above 0, or not finite.
    """
    if not (weight > 0 and math.isfinite(weight)):
        raise NeuronSelectError(
            "must be a finite number above 0; without --avoid nothing is taken off", option="avoid_weight", value=weight
        )


@dataclass(frozen=True, kw_only=True)
class TargetOptions(Options):
    """What to select for, and by which method."""

    target: tuple[str, ...] = opt((), TARGET_HELP, metavar="[NAME=]ROWS")
    method: str = opt(DEFAULT_METHOD, "mona, nait, polysemantic, hidden, ifd, random, longest, ...")
    method_option: dict[str, Any] = opt(
        default_factory=dict, help="Option of the method; repeatable.", metavar="NAME=VALUE"
    )
    picker: str | None = opt(None, f"In which order rows are taken: {PICKERS_HELP}; default the method's own.")
    avoid: tuple[str, ...] = opt((), AVOID_HELP, metavar="[NAME=]ROWS")
    avoid_weight: float = opt(1.0, "How much of the score for an avoided target is taken off.")

    def check(self) -> None:
        super().check()
        check_avoid_weight(self.avoid_weight)
        if self.avoid_weight != 1 and not self.avoid:
            raise NeuronSelectError("belongs to avoid: add --avoid NAME=rows, or remove it", option="avoid_weight",
                                    value=self.avoid_weight)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(Options):
    """How many rows are kept: at most one of the four; default the method's own ratio."""

    ratio: float | Literal["auto"] | None = opt(
        None, "Share of the pool kept, in (0, 1]; auto: estimated from the scores."
    )
    k: int | None = opt(None, "Rows kept.", unit="rows", minimum=1)
    threshold: float | None = opt(None, "Keep rows scoring at least this.")
    max_tokens: int | None = opt(None, "Keep the best rows that fit into so many tokens.", unit="tokens", minimum=1)

    def check(self) -> None:
        super().check()
        given = [name for name in ("ratio", "k", "threshold", "max_tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise NeuronSelectError(f"give exactly one of ratio, k, threshold, max_tokens (got {', '.join(given)})")
        if isinstance(self.ratio, float) and not 0 < self.ratio <= 1:
            raise NeuronSelectError("must lie in (0, 1]; 0.05 keeps 5 %", option="ratio", value=self.ratio)


@dataclass(frozen=True, kw_only=True)
class KeepOptions(BudgetOptions):
    """How scores become picks, for one target."""

    keep: tuple[Literal["duplicate", "leak"], ...] = opt((), "Rows to keep that are left out otherwise; repeatable.")
    seed: int = opt(0, "Seed of methods that draw.", minimum=0)
    source_share: float | None = opt(None, "Largest share of the picks from one source, in (0, 1].")
    source_column: str = opt("source", "Column with a row's source.")
    drop_near_copies: bool = opt(
        False, "Pass over rows nearly equal to a better one (pip install 'hf-neuronselect[rivals]')."
    )

    @property
    def spread(self) -> Spread:
        """How picks are kept apart."""
        return Spread(self.source_share, self.source_column, self.drop_near_copies)

    def check(self) -> None:
        super().check()
        _ = self.spread

    @property
    def exclude(self) -> list[str]:
        """Kinds of rows that are left out."""
        return [kind for kind in ("duplicate", "leak") if kind not in self.keep]


@dataclass(frozen=True, kw_only=True)
class PickOptions(KeepOptions):
    """How scores become picks, for one target or several."""

    aggregate: Aggregate = opt("quota", "How several targets share the budget.")
    weight: dict[str, float] = opt(
        default_factory=dict, help="Weight of a target, for aggregate weighted; repeatable.", metavar="NAME=NUMBER"
    )

    def check(self) -> None:
        super().check()
        if self.weight and self.aggregate != "weighted":
            raise NeuronSelectError(
                "belongs to aggregate weighted; add --aggregate weighted, or remove it",
                option="weight",
                value=next(iter(self.weight)),
            )


@dataclass(frozen=True, kw_only=True)
class HubOptions(Options):
    """How something is pushed."""

    private: bool | None = opt(None, "Visibility of a repository that is created.", flag="private/public", moves=False)
    allow_public: bool = opt(False, "Push publicly although the rows' source is private or gated.", moves=False)


@dataclass(frozen=True, kw_only=True)
class SelectConfig(TargetOptions, PickOptions, ExtractionOptions, HubOptions):
    """Select the rows of a pool that serve the targets best."""

    pool: str = opt(help=POOL_HELP)
    out: Path = opt(help="Selection folder to write.", moves=False)
    held_out: str | None = opt(
        None, "Held-out rows of the target: with ratio auto, short trainings choose by their loss."
    )
    train: dict[str, Any] = opt(
        default_factory=dict, help="Key of TRL's SFTConfig or of LoRA, for held_out; default 50 steps; repeatable.",
        metavar="KEY=VALUE",
    )  # fmt: skip
    features: Path | None = opt(None, "Feature store of this pool: no forward pass over it.", moves=False)
    streaming: bool = opt(False, "Read the pool as a stream; memory is O(selected).", moves=False)
    messages: bool = opt(
        True, "Add a messages column where the rows have none.", flag="messages/no-messages", moves=False
    )
    examples: bool = opt(
        True, "Show beginnings of rows in the card and the report.", flag="examples/no-examples", moves=False
    )
    push_to_hub: str | None = opt(None, "Dataset repository to push the selection to.", moves=False)

    def check(self) -> None:
        super().check()
        if self.held_out is not None and self.ratio != AUTO:
            raise NeuronSelectError("chooses a ratio by training: add --ratio auto, or remove it", option="held_out",
                                    value=self.held_out)  # fmt: skip
        if self.train and self.held_out is None:
            raise NeuronSelectError("is for trainings that choose the ratio: add --held-out ROWS", option="train",
                                    value=next(iter(self.train)))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FitConfig(TargetOptions, ExtractionOptions):
    """Fit a reusable capability (prototype or directions) on exemplars."""

    out: Path = opt(help="Capability folder to write.", moves=False)


@dataclass(frozen=True, kw_only=True)
class WorkerOptions(Options):
    """How many processes read a pool at once."""

    num_workers: int | Literal["auto"] = opt(
        "auto", "Processes that read the pool, with a model each; auto: one a GPU.", minimum=1, moves=False
    )

    @property
    def processes(self) -> int | None:
        """As :func:`~hf_neuronselect.store.store.write_store` takes it; None: auto."""
        return None if self.num_workers == "auto" else self.num_workers


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(WorkerOptions, ExtractionOptions):
    """Compute a pool's signals into a resumable store; `select --features STORE` then needs no forward pass."""

    pool: str = opt(help=POOL_HELP)
    out: Path = opt(help="Feature store to write, to finish or to add signals to.", moves=False)
    method: str | None = opt(
        None, f"Methods whose signals are computed, separated by commas; default {DEFAULT_METHOD}."
    )
    method_option: dict[str, Any] = opt(
        default_factory=dict, help="Option of the (single) method; repeatable.", metavar="NAME=VALUE"
    )
    capability: tuple[str, ...] = opt(
        (), "FOLDER_OR_ID[:NAME]: store only what its score needs (nait: a number per block); repeatable."
    )
    shard_rows: int = opt(4096, "Rows of a shard.", unit="rows", minimum=1, moves=False)
    shard: str = opt(
        "0/1", "Only every N-th shard, from the I-th (0-based): N jobs, one store.", metavar="I/N", moves=False
    )
    backend: Literal["local", "ray"] = opt(
        "local", "ray: as actors of a Ray cluster (pip install 'hf-neuronselect[ray]').", moves=False
    )

    def check(self) -> None:
        super().check()
        i, slash, n = self.shard.partition("/")
        if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
            raise NeuronSelectError("I/N is needed, I from 0 to N - 1", option="shard", value=self.shard)

    @property
    def part(self) -> tuple[int, int]:
        """The shard option as two numbers."""
        i, _, n = self.shard.partition("/")
        return int(i), int(n)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(KeepOptions, WorkerOptions, ExtractionOptions):
    """Compare methods on one pool and its targets, with one pass over the pool for all of them."""

    pool: str = opt(help=POOL_HELP)
    target: tuple[str, ...] = opt((), EXEMPLARS_HELP, metavar="[NAME=]ROWS")
    ratio: float | None = opt(None, "Share of the pool kept, in (0, 1].")  # no auto: all methods keep as many rows
    methods: str = opt(
        "mona,random,longest",
        "Methods separated by commas, or all but those that take hours; name(option=value,...) sets options.",
    )
    picker: str | None = opt(
        None,
        f"Run each method that has a target once with each of these, separated by commas: {PICKERS_HELP}; default its own.",
    )
    draws: int = opt(1, "Draws of each method that has a seed; the table shows their mean.", minimum=1, moves=False)
    resamples: int = opt(
        0,
        "Fits on exemplars drawn again, for the interval of each method's precision; 20 are enough.",
        minimum=0,
        moves=False,
    )
    related: dict[str, str] = opt(
        default_factory=dict,
        help="Sources of the pool that count as right for a target, separated by commas; repeatable.",
        metavar="NAME=SOURCES",
        moves=False,
    )
    held_out: tuple[str, ...] = opt(
        (),
        "[NAME=]held-out rows of a target: all its picks are then trained on; repeatable.",
        metavar="[NAME=]ROWS",
        moves=False,
    )
    train: dict[str, Any] = opt(
        default_factory=dict, help="Key of TRL's SFTConfig or of LoRA, for held_out; default 50 steps; repeatable.",
        metavar="KEY=VALUE", moves=False,
    )  # fmt: skip
    train_seeds: int = opt(1, "Trainings on each method's picks.", minimum=1, moves=False)
    transfer: bool = opt(
        False, "Measure each trained model at every target with held-out rows, not only at its own.", moves=False
    )
    features: Path | None = opt(None, "Feature store to use and to add missing signals to.", moves=False)
    examples: bool = opt(
        True, "Show beginnings of rows and their sources in the page.", flag="examples/no-examples", moves=False
    )
    out: Path = opt(help="Folder for a selection per method and target, and the tables.", moves=False)


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Options):
    """Run the whole main job on the bundled data: with the bundled model and SAE, offline, or with a real model."""

    model: str | None = opt(
        None,
        "smollm2, or a model whose SAE is known (folder, GGUF file or Hub id); default the bundled one.",
        moves=False,
    )
    out: Path = opt(Path("neuronselect-demo"), "Folder for selections, picture and report.", moves=False)


@dataclass(frozen=True, kw_only=True)
class EvidenceOptions(Options):
    """What reasons are found with, where a saved selection does not bring it."""

    features: Path | None = opt(
        None, "Feature store of the pool: saves a pass, and tells how rare a feature is and where else it fires."
    )
    pool: str | None = opt(None, "The pool, for texts of rows that were not selected; default where it came from.")
    model: str | None = opt(None, "Folder of the model, where it is not on the Hub.")
    sae: str | None = opt(None, "Folder of the SAE, where it is not on the Hub.")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1 or mps.")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(EvidenceOptions):
    """Write a selection's report.html again, with all that these options tell of its rows."""

    folder: Path = opt(help="Selection folder.")
    target: tuple[str, ...] = opt(
        (), "Exemplars of its targets, which are then shown; repeatable.", metavar="[NAME=]ROWS"
    )
    examples: bool = opt(True, "Show texts of the data.", flag="examples/no-examples")


@dataclass(frozen=True, kw_only=True)
class AppConfig(EvidenceOptions):
    """Browse a selection in a web browser: its rows, why each was picked, why another was not."""

    folder: str = opt(help="Selection: folder, or data set on the Hub.")
    target: str | None = opt(None, "Target to explain, NAME; NAME=ROWS also tells which exemplars have a feature.")
    host: str = opt(
        "127.0.0.1",
        "Address to listen at; with another one, others may read the rows: there is no password.",
        moves=False,
    )
    port: int = opt(7860, "Port to listen at; 0: any free one.", minimum=0, moves=False)
    mcp: bool = opt(False, "Serve the same as tools of an MCP server, too.", moves=False)


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(EvidenceOptions):
    """Say why a selection has a row, why it has not another, or why one beats another, or check its reasons. Give one of --row, --why-not, --contrast, --causal."""

    folder: str = opt(help="Selection: folder, or data set on the Hub.")
    row: int | None = opt(None, "Place in the selection, 0 is the best: why it has its score.", minimum=0)
    why_not: int | None = opt(None, "Number of a row in the pool, 0 is the first: why it was not selected.", minimum=0)
    contrast: tuple[int, int] | None = opt(
        None, "Two places in the selection: why the first scores higher.", metavar="A B", minimum=0
    )
    target: str | None = opt(None, "Target to explain, NAME; NAME=ROWS also tells which exemplars have a feature.")
    top: int = opt(10, "Parts of the score that are told.", minimum=1)
    causal: int | None = opt(
        None, "Zero this many features that explain the picks, and tell how much the task's loss rises.", minimum=1
    )
    held_out: str | None = opt(None, "Rows of the task whose loss is read for causal; default its exemplars.")
    draws: int = opt(10, "Sets of random features of like activity, for causal.", minimum=1)
    seed: int = opt(0, "Seed of these draws.", minimum=0)

    def check(self) -> None:
        super().check()
        if sum(one is not None for one in (self.row, self.why_not, self.contrast, self.causal)) != 1:
            raise NeuronSelectError("give one of --row, --why-not, --contrast and --causal")
        if self.held_out is not None and self.causal is None:
            raise NeuronSelectError("is for the causal check: add --causal 16", option="held_out", value=self.held_out)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Options):
    """Run a recipe: select, train, evaluate, push. Finished steps are skipped when it is run again."""

    recipe: Path = opt(help="Recipe with sections select, train (TRL's keys), evaluate, push.")
    out: Path = opt(help="Folder of the run; run again to go on.", moves=False)
    data: str | None = opt(None, "Train on this selection, or these rows, instead of the section select.")
    push: bool = opt(True, "Run the section push.", flag="push/no-push", moves=False)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Options):
    """What is measured, and how; a recipe's section `evaluate`."""

    data: tuple[str, ...] = opt((), "[NAME=]held-out rows; repeatable.", metavar="[NAME=]ROWS")
    tasks: tuple[str, ...] = opt((), "Task of lm-evaluation-harness; repeatable.")
    include_path: Path | None = opt(None, "Folder of more task files.")
    limit: int | None = opt(None, "Rows of a task.", unit="rows", minimum=1)
    num_fewshot: int | None = opt(None, "Examples in a task's prompt.", minimum=0)
    max_rows: int | None = opt(None, "Held-out rows of each data set.", unit="rows", minimum=1)
    max_length: int = opt(2048, "Tokens kept of a row.", unit="tokens", minimum=1)
    dtype: Dtype = opt("auto", "Weights and activations; auto: the checkpoint's on a GPU, float32 on a CPU.")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1 or mps.", moves=False)
    batch_size: int = opt(8, "Rows a batch, of tasks.", minimum=1, moves=False)
    apply_chat_template: bool = opt(True, "Ask tasks as chat turns.", flag="apply-chat-template/no-apply-chat-template")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluateOptions):
    """Compare a base model and its adapters: loss on held-out answers, accuracy on tasks."""

    out: Path = opt(help="Folder for evaluation.json and evaluation.png.", moves=False)
    model: str | None = opt(None, "Base model; default the bundled one.")
    revision: str | None = opt(None, "Branch, tag or commit of the model.")
    adapter: tuple[str, ...] = opt((), "[NAME=]folder or Hub id; repeatable.", metavar="[NAME=]ADAPTER")

    def check(self) -> None:
        super().check()
        if not self.data and not self.tasks:
            raise NeuronSelectError("name held-out rows (--data) or tasks (--tasks)", option="data")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Options):
    """Write a selection as another trainer reads it, with a configuration that runs."""

    folder: Path = opt(help="Selection folder.")
    format: Trainer = opt(help="Whose data and configuration.")
    out: Path | None = opt(None, "Default: the selection's name and the format.")
    base_model: str | None = opt(None, "Model to be trained, for the configuration.")


@dataclass(frozen=True, kw_only=True)
class CommitOptions(HubOptions):
    """How a folder is committed to the Hub."""

    revision: str | None = opt(None, "Branch; created where it is missing.")
    create_pr: bool = opt(False, "Propose it as a pull request instead.")
    commit_message: str | None = opt(None, "Message of the one commit.")
    examples: bool = opt(True, "Show beginnings of rows in the card and the report.", flag="examples/no-examples")


@dataclass(frozen=True, kw_only=True)
class PushConfig(CommitOptions):
    """Push any folder this package wrote to the Hub, in one commit."""

    folder: Path = opt(help="Selection, capability, feature library, adapter, SAE, store or metric.")
    repo: str = opt(help="Repository, org/name or name.")


@dataclass(frozen=True, kw_only=True)
class PushSection(CommitOptions):
    """A recipe's section `push`."""

    selection: str | None = opt(None, "Dataset repository of the selection.")
    adapter: str | None = opt(None, "Model repository of the adapter.")
