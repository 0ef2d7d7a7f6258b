"""LoRA fine-tuning on a selection: TRL's SFTTrainer, guarded; the result is an adapter folder."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PrinterCallback, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import ModelConfig, SFTTrainer, get_quantization_config

from ..core.errors import NeuronSelectError
from ..core.folders import ADAPTER, TRAINING_RECORD
from ..core.progress import track, untracked
from ..core.provenance import SelectionSummary, SourceRecord, TrainingRecord, plain
from ..core.seals import checksums, encode
from ..core.sources import Source
from ..core.writing import put, reserve, writing
from ..hub.cards import AdapterCard, write_card
from ..hub.markdown import check_readme
from ..models.checkpoint import config_of, limits_of
from ..models.loading import quiet_peft
from ..rows.formats import Conversation
from ..rows.load import conversations_of
from .callback import CardCallback, StepCallback
from .config import TrainConfig
from .data import clip_length, encoder_of, learnt, tokenizer_for, training_rows
from .models import base_source, load_causal_lm

logger = logging.getLogger(__name__)

_PACKAGES = ("hf-neuronselect", "trl", "peft", "transformers", "torch", "datasets")


def train_adapter(
    data: Dataset | Sequence[Conversation],
    out: str | Path,
    config: TrainConfig,
    *,
    selection: SelectionSummary | None = None,
    name: str = "adapter",
    token: str | bool | None = None,
) -> TrainingRecord:
    """Fine-tune a LoRA adapter on rows of any format; the loss is on the answers alone, with any chat template.

    A stopped run continues from its last whole checkpoint, if rows and settings are the same.

    Args:
        data: the rows, or conversations read from them. out: adapter folder; checkpoints are in ``out/checkpoints`` meanwhile.
        selection: how the rows were selected, for the card. name: the adapter's name in the card.

    Returns:
        ``training.json``: base model, settings, rows, steps, tokens, losses, seconds.

    Raises:
        NeuronSelectError: no row can be trained on, or modules that the model lacks.
    """
    out = Path(out)
    with reserve(out, ADAPTER):
        check_readme(out)
        return _train(data, out, config, selection, name, token)


def _train(
    data: Dataset | Sequence[Conversation], out: Path, config: TrainConfig, selection: SelectionSummary | None, name: str,
    token: str | bool | None,
) -> TrainingRecord:  # fmt: skip
    base = base_source(config.model, config.revision, token, to_train=True)
    checkpoints = out / "checkpoints"
    arguments = config.arguments(checkpoints)
    tokenizer = tokenizer_for(base, config, token)
    conversations = conversations_of(data)
    limits = limits_of(config_of(base))
    rows, cut = training_rows(conversations, encoder_of(tokenizer, arguments, limits))
    clip_length(arguments, limits)
    set_seed(arguments.seed)
    options = ModelConfig(**config.model_options)
    model = load_causal_lm(
        base,
        token,
        dtype=options.dtype if options.dtype in ("auto", None) else getattr(torch, options.dtype),
        attn_implementation=options.attn_implementation,
        quantization_config=get_quantization_config(options),
    )
    lora = config.lora()
    _check_target_modules(model, lora)
    log = CardCallback()
    with _plain_errors():
        trainer = _Trainer(
            model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora,
            callbacks=[log],
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # where no bar is shown it prints every log
    prepared = trainer.train_dataset
    assert isinstance(prepared, Dataset)
    trainer.train_dataset, tokens, trained = learnt(prepared)
    key = _run_key(rows, base, config)
    started = time.perf_counter()
    # With bars, the trainer shows its own.
    with track("train", None, unit="steps") if arguments.disable_tqdm else untracked() as progress:
        if progress is not None:
            trainer.add_callback(StepCallback(progress))
        trainer.train(resume_from_checkpoint=_last_whole(checkpoints, key))
    seconds = round(time.perf_counter() - started, 1)

    tuned = trainer.model
    assert isinstance(tuned, PeftModel)
    stated = tuned.peft_config["default"]
    stated.base_model_name_or_path, stated.revision = base.id, base.revision  # never a path of this machine
    record = TrainingRecord(
        name=name,
        base_model=SourceRecord.of(base),
        selection=selection,
        settings=plain({name: _no_folder(value) for name, value in config.about().items()}),
        hyperparameters=plain(
            {f"LoRA {key}": getattr(lora, key) for key in ("r", "lora_alpha", "lora_dropout")} | log.hyperparameters
        ),
        results={
            "rows": len(rows),
            "truncated": cut,
            "tokens": tokens,
            "answer_tokens": trained,
            "seconds": seconds,
            "steps": log.steps,
        },  # fmt: skip
        losses=tuple(log.losses),
        packages={package: version(package) for package in _PACKAGES},
    )
    with writing(out, ADAPTER) as new:
        tuned.save_pretrained(str(new), save_embedding_layers=False)  # no vocabulary is resized here
        tokenizer.save_pretrained(new)
        written = sorted(path.relative_to(new).as_posix() for name in ADAPTER.files for path in new.glob(name))
        record = replace(record, files=checksums(new, written))
        write_record(new, record, before=out)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return record


class _Trainer(SFTTrainer):
    """Length-grouped order depends only on seed and epoch, so a resumed run sees the remaining rows."""

    def _get_train_sampler(self, *args: Any) -> Any:
        sampler = super()._get_train_sampler(*args)
        if isinstance(sampler, LengthGroupedSampler):
            generator = sampler.generator = torch.Generator()
            sampler.set_epoch = lambda epoch: generator.manual_seed(self.args.seed + epoch)  # type: ignore[attr-defined]
        return sampler


def _no_folder(value: Any) -> Any:
    """A file's name without its folder: records hold no local paths."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def write_record(folder: Path, record: TrainingRecord, before: Path | None = None) -> None:
    """Write ``README.md`` (what was added to the one ``before`` stays), then ``training.json``."""
    write_card(folder, AdapterCard(record), before or folder)
    put(folder / TRAINING_RECORD, encode(record))


# -------------------------------------------------------------------------------------------- guards
def _check_target_modules(model: torch.nn.Module, lora: LoraConfig) -> None:
    wanted = lora.target_modules
    if wanted is None or isinstance(wanted, str):  # all-linear, or a pattern that peft checks
        return
    names = {name for name, _ in model.named_modules()}
    for target in wanted:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
            raise NeuronSelectError(
                f"the model has no such module; its linear layers are {', '.join(linear)}",
                option="lora_target_modules", value=target,
            )  # fmt: skip


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors of SFTTrainer in one line with the mend."""
    try:
        with quiet_peft():
            yield
    except (ValueError, RuntimeError) as cause:
        raise NeuronSelectError(f"TRL refuses it: {' '.join(str(cause).split())[:300]}", option="train") from cause


# -------------------------------------------------------------------------------------------- resume
def _run_key(rows: Dataset, base: Source, config: TrainConfig) -> str:
    """Hash of all that a checkpoint must share with a run that continues from it."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(
        json.dumps([base.commit, config.about(), config.chat_template()], sort_keys=True, default=str).encode()
    )
    for batch in rows.iter(1000):
        digest.update(json.dumps(batch, default=str).encode())
    return digest.hexdigest()


def _last_whole(folder: Path, key: str) -> str | None:
    """The last whole checkpoint of the same run; all others are removed."""
    mark = folder / "key"
    if folder.exists() and (not mark.is_file() or mark.read_text() != key):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(key)
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True)
    for checkpoint in found:
        if _whole(checkpoint):
            logger.warning("going on from %s", checkpoint.name)
            return str(checkpoint)
        shutil.rmtree(checkpoint)
    return None


def _whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as file:
            return bool(file.keys()) and (checkpoint / "optimizer.pt").stat().st_size > 0
    except (OSError, ValueError, SafetensorError):
        return False
