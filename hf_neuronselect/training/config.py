"""A recipe's section ``train``: TRL's own keys and a few of ours; unknown ones are refused."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import ModelConfig, SFTConfig, get_peft_config

from ..core.errors import NeuronSelectError, one_of, unknown
from ..core.options import underscored
from ..methods import METHODS

_SFT = {f.name for f in dataclasses.fields(SFTConfig) if f.init}
_MODEL = {f.name for f in dataclasses.fields(ModelConfig) if f.init} - {"model_name_or_path", "model_revision"}
_OURS = {"model", "revision", "data", "controls", "name"}
_OPTIONS = {action.dest: action for action in HfArgumentParser((SFTConfig, ModelConfig))._actions}  # type: ignore[arg-type]
# Keys whose names are newer than the oldest transformers that can be installed, and what they were called.
_OLD_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "train_sampling_strategy": "group_by_length",
}
_RENAMED = {new: old for new, old in _OLD_NAMES.items() if new not in _SFT}
_SFT |= _RENAMED.keys()
# Keys of TRL that another place sets, or that do not apply here.
_NOT_HERE = {
    "output_dir": "the folder is --out",
    **dict.fromkeys(
        ["push_to_hub", *(key for key in _SFT if key.startswith("hub_"))],
        "name the repository in the section push; the token is HF_TOKEN or the one of `hf auth login`",
    ),
    "resume_from_checkpoint": "a run that was stopped resumes by itself",
    "completion_only_loss": "the loss is on the answers of every turn already (TRL ignores this key on messages)",
    "dataset_text_field": "rows become messages",
    "dataset_kwargs": "rows become messages",
    "formatting_func": "rows become messages",
    "model_init_kwargs": "use dtype, attn_implementation, load_in_4bit",
    "trust_remote_code": "code from a repository is never run",
    "gradient_checkpointing": "it is called activation_checkpointing now",
    "group_by_length": "write train_sampling_strategy: group_by_length",
    "warmup_ratio": "it is called warmup_steps now",
    "use_peft": "only LoRA is trained; for full fine-tuning, neuronselect export DIR --format trl",
}


def _defaults(on_cpu: bool) -> dict[str, Any]:
    """Our defaults where they differ from TRL's, and why."""
    return {
        "max_length": 2048,  # as in extraction
        "packing": not on_cpu,  # without a variable-length kernel, attention over a packed row costs its whole square
        "train_sampling_strategy": "group_by_length" if on_cpu else "random",  # without packing, padding costs
        "learning_rate": 2e-4,  # usual for LoRA; TRL's 2e-5 is for full fine-tuning
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 100,
        "save_total_limit": 1,
        "disable_tqdm": not sys.stderr.isatty(),
        "activation_checkpointing": not on_cpu,
    }


def _installed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names that the installed transformers has."""
    found = {_RENAMED.get(key, key): value for key, value in options.items()}
    if "train_sampling_strategy" in _RENAMED and "train_sampling_strategy" in options:
        strategy = one_of(options["train_sampling_strategy"], ("random", "group_by_length"), "train_sampling_strategy")
        found["group_by_length"] = strategy == "group_by_length"
    return found


def _read(key: str, value: Any) -> Any:
    """A value as TRL's own command line reads it: YAML reads ``2e-4`` as text."""
    option = _OPTIONS.get(key)
    if option is None or not isinstance(value, str):
        return value
    try:
        found = option.type(value) if callable(option.type) else value
    except (TypeError, ValueError, argparse.ArgumentTypeError) as cause:
        raise NeuronSelectError(f"TRL refuses it: {cause}", option=key, value=value) from cause
    return one_of(str(found), option.choices, key) if option.choices else found


@dataclass(frozen=True)
class TrainConfig:
    """A checked ``train`` section.

    Attributes:
        model: base model to fine-tune, folder or Hub id; None for the one that the rows are selected with. revision: its
            branch, tag or commit.
        data: a selection (folder or Hub id) or rows; None where the recipe selects.
        controls: methods without a target, whose selections are trained on the same way for comparison.
        name: the adapter's name in cards and tables.
        sft, model_options: keys of TRL's ``SFTConfig`` and ``ModelConfig``.
    """

    model: str | None = None
    revision: str | None = None
    data: str | None = None
    controls: tuple[str, ...] = ()
    name: str | None = None
    sft: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> TrainConfig:
        """Read a section.

        Raises:
            NeuronSelectError: a key that is unknown or does not belong here, or a value TRL refuses.
        """
        values = underscored(section)
        for key in values:
            if key in _NOT_HERE:
                raise NeuronSelectError(f"does not belong in train: {_NOT_HERE[key]}", option=key)
            if key not in _OURS | _SFT | _MODEL:
                raise unknown("key of section train", key, _OURS | _SFT | _MODEL, "config")
        values = {key: _read(key, value) for key, value in values.items()}
        if not values.pop("assistant_only_loss", True):
            raise NeuronSelectError("questions would be trained on; remove it", option="assistant_only_loss",
                                    value=False)  # fmt: skip
        controls = values.get("controls") or ()
        controls = (controls,) if isinstance(controls, str) else tuple(controls)
        known = [name for name in METHODS.names() if not (METHODS[name].needs_target or METHODS[name].source_option)]
        for name in controls:
            if name not in known:
                raise unknown("control", name, known, "controls")
        config = cls(
            model=values.get("model"),
            revision=values.get("revision"),
            data=values.get("data"),
            controls=controls,
            name=values.get("name"),
            sft={key: value for key, value in values.items() if key in _SFT},
            model_options={key: value for key, value in values.items() if key in _MODEL - _SFT},
        )
        config.chat_template()
        config.lora()  # values that TRL or PEFT refuses are refused now, not after hours
        config.arguments(Path("unused"))
        return config

    def lora(self) -> LoraConfig:
        """PEFT's configuration; every linear layer of the blocks unless ``lora_target_modules`` says otherwise."""
        options = {"lora_target_modules": ["all-linear"]} | dict(self.model_options)
        try:
            found = get_peft_config(ModelConfig(use_peft=True, **options))
        except (TypeError, ValueError) as cause:
            raise NeuronSelectError(f"TRL refuses it: {cause}", option="train") from cause
        assert isinstance(found, LoraConfig)
        wanted = options["lora_target_modules"]
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        if all(re.fullmatch(r"[\w.]+", name) for name in names):  # else a pattern, or all-linear
            # TRL makes a pattern of a single name, and it matches nothing. peft keeps a set.
            found.target_modules = set(names)  # type: ignore[assignment]
        return found

    def arguments(self, checkpoints: Path) -> SFTConfig:
        """TRL's arguments, with checkpoints in this folder."""
        on_cpu = bool(self.sft.get("use_cpu")) or not (torch.cuda.is_available() or torch.backends.mps.is_available())
        options = _defaults(on_cpu) | dict(self.sft)
        if on_cpu:
            options |= {"use_cpu": True, "dataloader_pin_memory": False}
        try:
            return SFTConfig(output_dir=str(checkpoints), **_installed(options))
        except (TypeError, ValueError) as cause:
            raise NeuronSelectError(f"TRL refuses it: {' '.join(str(cause).split())[:300]}", option="train") from cause

    def chat_template(self) -> str | None:
        """The text of ``chat_template_path``; None for the tokenizer's own template.

        Raises:
            NeuronSelectError: no such file. A model's name is refused: its template may need tokens the base lacks.
        """
        path = self.sft.get("chat_template_path")
        if path is None:
            return None
        if not str(path).endswith((".jinja", ".j2")) or not Path(path).is_file():
            raise NeuronSelectError("a file is needed, .jinja or .j2", option="chat_template_path", value=path)
        return Path(path).read_text(encoding="utf-8")

    def about(self) -> dict[str, Any]:
        """TRL's keys as given, for cards and for the keys of steps."""
        return {**self.sft, **self.model_options}
