"""A causal LM with LoRA factors whose weights change while the model stays: for warm-ups and for gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import NeuronSelectError
from .loading import ModelSpec, Place, fresh_lm, on_forget, quiet_peft

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MODELS: dict[tuple[ModelSpec, str, LoraShape], LoraModel] = {}
on_forget(_MODELS.clear)


@dataclass(frozen=True)
class LoraShape:
    """LoRA as LESS has it (arXiv 2402.04333, app. B): rank, scale, dropout, and the seed of the first factors."""

    rank: int = 128
    alpha: int = 512
    dropout: float = 0.1
    seed: int = 0

    def state(self) -> dict[str, Any]:
        """What moves gradients at the factors, in JSON's own types."""
        return asdict(self)


class LoraModel:
    """A model with LoRA on its attention's linear layers; on all of its linear layers where those have other names.

    Attributes:
        model: the ``PeftModel``, in eval mode, no parameter of which asks for a gradient.
        factors: name -> weight, in the model's order; ``…lora_A`` is ``[rank, in]``, ``…lora_B`` ``[out, rank]``.
        modules: name -> the linear layer that holds the weight.
    """

    def __init__(self, base: nn.Module, shape: LoraShape) -> None:
        from peft import LoraConfig, get_peft_model  # a second, for gradients alone

        last = {name.rsplit(".", 1)[-1] for name, _ in base.named_modules()}
        targets = list(ATTENTION) if last.issuperset(ATTENTION) else "all-linear"
        gpt2 = any(isinstance(module, Conv1D) for module in base.modules())  # its linear layers lie on their side
        lora = LoraConfig(
            r=shape.rank, lora_alpha=shape.alpha, lora_dropout=shape.dropout, target_modules=targets,
            fan_in_fan_out=gpt2, task_type="CAUSAL_LM",
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]), quiet_peft():
            torch.manual_seed(shape.seed)
            self.model: Any = get_peft_model(base, lora, autocast_adapter_dtype=False)
        self.modules = {
            name.removeprefix("base_model.model.").removesuffix(".default"): module
            for name, module in self.model.named_modules()
            if ".lora_A." in name or ".lora_B." in name
        }
        self.factors: dict[str, torch.Tensor] = {name: module.weight for name, module in self.modules.items()}
        self._first = {name: weight.detach().clone() for name, weight in self.factors.items()}
        self.model.enable_input_require_grads()  # the factors are frozen: gradients reach them through the activations
        self.model.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(iter(self.factors.values())).device

    def set(self, weights: Mapping[str, torch.Tensor] | None) -> None:
        """Take other weights; None: the first ones, with which the model is the untouched one."""
        with torch.no_grad():
            for name, weight in (self._first if weights is None else weights).items():
                self.factors[name].copy_(weight)


def lora_model_of(spec: ModelSpec, place: Place, shape: LoraShape) -> LoraModel:
    """A model with LoRA factors, from the cache or loaded; no other model of this process is touched.

    Raises:
        NeuronSelectError: the model is in memory or an adapter, or is spread over devices.
    """
    if spec.in_memory or spec.source.base is not None:
        what = "is an adapter: merge it into its base" if spec.source.base else "is in memory: save it"
        raise NeuronSelectError(f"{what}, and name its folder", option="model", value=spec.source.id)
    if not isinstance(place, torch.device):
        raise NeuronSelectError("gradients need the model on one device; name it with device", option="device_map",
                                value=str(place))  # fmt: skip
    key = (spec, str(place), shape)
    if key not in _MODELS:
        _MODELS.clear()  # before another one is loaded
        _MODELS[key] = LoraModel(fresh_lm(spec, place), shape)
    return _MODELS[key]


def batch_tokens(device: torch.device) -> int:
    """Padded tokens of a backward pass; few on a CPU, where rows of one length save more than large products (measured)."""
    return 512 if device.type == "cpu" else 8192
