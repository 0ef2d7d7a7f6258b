"""Read block outputs, MLP neurons and router weights of any Hugging Face causal LM, through hooks on its blocks.

``h[l]`` is the output of decoder block ``l`` before the model's final norm. Hooks read it from the block itself,
because the last entry of ``output_hidden_states`` is already normed. The forward pass stops at the deepest requested
site, so deeper blocks and the lm_head never run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..core.errors import NeuronSelectError
from .batching import TokenBatch
from .sae import Site

logger = logging.getLogger(__name__)

Observer = Callable[[torch.Tensor], None]

_BLOCK_LISTS = ("layers", "h", "blocks")
FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f")
# Names of the projection whose INPUT is the MLP's neurons act(gate) * up, and of the gate projection.
_DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out")
_GATE = ("gate_proj", "gate_up_proj")
_UP = ("up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in")
_ROUTER = ("gate", "router")


class _Stop(Exception):
    """Raised by the last hook to end the forward pass."""


class Backbone:
    """A decoder's blocks and the sites in them that can be read.

    Args:
        model: a transformers causal LM (or its bare decoder), in eval mode.
        depth: number of blocks to keep; deeper ones are dropped from memory. ``None`` leaves the model unchanged, as
            is right for a model the user passed in.

    Attributes:
        num_layers: number of blocks in the whole model. hidden_size: width of the residual stream.
        device: device of batches and activations; the last block's if the model is spread over several devices.

    Raises:
        NeuronSelectError: the model has no decoder blocks.
    """

    def __init__(self, model: Any, depth: int | None = None) -> None:
        self.config: Any = model.config
        text_config = self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config
        self.decoder, self.blocks_name = find_decoder(model)
        blocks = getattr(self.decoder, self.blocks_name)
        self.num_layers: int = getattr(text_config, "num_hidden_layers", None) or len(blocks)
        self.hidden_size: int = text_config.hidden_size
        if depth is not None and depth < len(blocks):
            setattr(self.decoder, self.blocks_name, blocks[:depth])
        self.blocks: Sequence[nn.Module] = getattr(self.decoder, self.blocks_name)
        self.device: torch.device = next(self.decoder.parameters()).device

    # ------------------------------------------------------------------------------------- sites
    def layer(self, layer: int, option: str = "layer") -> int:
        """A layer as a 0-based number; negative ones count from the end.

        Raises:
            NeuronSelectError: out of range.
        """
        return resolve_layer(layer, self.num_layers, option)

    def residual(self, layer: int) -> Site:
        """The block's output."""
        return Site(f"{self.blocks_name}.{layer}")

    def final_norm(self) -> Site:
        """The output of the norm after the last block.

        Raises:
            NeuronSelectError: the model has none.
        """
        name = next((n for n in FINAL_NORMS if isinstance(getattr(self.decoder, n, None), nn.Module)), None)
        if name is None:
            raise NeuronSelectError("the model has no norm after its last block", option="features", value="rds_plus")
        return Site(name)

    def neurons(self, layer: int) -> Site:
        """The MLP's neurons ``act(gate) * up`` (non-gated: ``act(W_in x)``): its down projection's input.

        Raises:
            NeuronSelectError: a mixture-of-experts block.
        """
        name, mlp = self._mlp(layer)
        down = next((n for n in _DOWN if isinstance(getattr(mlp, n, None), nn.Module)), None)
        if down is None or self.router(layer) is not None:
            raise NeuronSelectError(
                f"block {layer} is a mixture of experts ({type(mlp).__name__}); its neurons cannot be read as one "
                "MLP: use the residual site, or the routing method",
                option="site",
                value="mlp",
            )
        return Site(f"{self.blocks_name}.{layer}.{name}.{down}", "input")

    def gate(self, layer: int) -> tuple[Site, Callable[[torch.Tensor], torch.Tensor]]:
        """The site to read, and the function that turns its activation into ``act(W_gate x)``.

        Raises:
            NeuronSelectError: a mixture-of-experts block.
        """
        neurons = self.neurons(layer)
        name, mlp = self._mlp(layer)
        gate = next((n for n in _GATE if hasattr(mlp, n)), None)
        if gate is None:
            return neurons, lambda x: x
        act = next(getattr(mlp, n) for n in ("act_fn", "activation_fn", "act") if hasattr(mlp, n))

        def activate(x: torch.Tensor) -> torch.Tensor:
            return act(x.chunk(2, dim=-1)[0] if gate == "gate_up_proj" else x)

        return Site(f"{self.blocks_name}.{layer}.{name}.{gate}"), activate

    def up(self, layer: int) -> tuple[Site, Callable[[torch.Tensor], torch.Tensor]]:
        """The site to read, and the function that takes the up projection's output from it (non-gated: ``W_in x``).

        Raises:
            NeuronSelectError: a mixture-of-experts block, or no such projection.
        """
        self.neurons(layer)
        name, mlp = self._mlp(layer)
        up = next((n for n in _UP if isinstance(getattr(mlp, n, None), nn.Module)), None)
        if up is None:
            raise NeuronSelectError(
                f"no up projection found in block {layer} ({type(mlp).__name__})",
                option="features",
                value="strongest_neurons",
            )

        def take(x: torch.Tensor) -> torch.Tensor:
            return x.chunk(2, dim=-1)[1] if up == "gate_up_proj" else x

        return Site(f"{self.blocks_name}.{layer}.{name}.{up}"), take

    def router(self, layer: int) -> tuple[Site, Callable[[torch.Tensor], torch.Tensor]] | None:
        """The router's input site, and the function that turns it into weights over ALL experts; None if dense."""
        try:
            name, mlp = self._mlp(layer)
        except NeuronSelectError:
            return None
        for attribute in _ROUTER:
            module = getattr(mlp, attribute, None)
            weight = getattr(module, "weight", None)
            if weight is None or weight.ndim != 2 or not hasattr(mlp, "experts"):
                continue
            if weight.is_meta:
                raise NeuronSelectError(
                    f"offloads the router of block {layer}, which must be read; place it on a device",
                    option="device_map",
                )
            bias = getattr(module, "bias", None)
            sigmoid = getattr(self.config, "scoring_func", "softmax") == "sigmoid" or hasattr(
                module, "e_score_correction_bias"
            )

            def weigh(
                x: torch.Tensor, weight: torch.Tensor = weight, bias: Any = bias, sigmoid: bool = sigmoid
            ) -> torch.Tensor:
                logits = F.linear(x, weight.to(x), None if bias is None else bias.to(x.device)).float()
                if sigmoid:
                    scores = logits.sigmoid()
                    return scores / scores.sum(dim=-1, keepdim=True)
                return logits.softmax(dim=-1)

            # Read the MoE block's input: the router itself gets it flattened to [B * L, d].
            return Site(f"{self.blocks_name}.{layer}.{name}", "input"), weigh
        return None

    def _mlp(self, layer: int) -> tuple[str, nn.Module]:
        block = self.blocks[layer]
        for name in ("mlp", "block_sparse_moe", "feed_forward", "ffn"):
            module = getattr(block, name, None)
            if isinstance(module, nn.Module):
                return name, module
        raise NeuronSelectError(f"no MLP found in block {layer} ({type(block).__name__})", option="site", value="mlp")

    def resolve(self, site: Site) -> nn.Module:
        """The module that a site names.

        Raises:
            NeuronSelectError: the model has no such module.
        """
        # SAE files say `layers`; GPT-2-like models call them `h`.
        name = site.module
        if name.startswith("layers.") and self.blocks_name != "layers":
            name = f"{self.blocks_name}.{name.removeprefix('layers.')}"
        try:
            return self.decoder.get_submodule(name)
        except AttributeError:
            raise NeuronSelectError(
                f"the model has no module {name!r} (it has {self.num_layers} blocks named {self.blocks_name}.N)",
                option="sae",
                value=site.module,
            ) from None

    # ----------------------------------------------------------------------------------- forward
    @torch.inference_mode()
    def run(self, batch: TokenBatch, observers: Sequence[tuple[Site, Observer]]) -> None:
        """Run one forward pass; each observer is called with its site's activation ``[B, L, width]``.

        The activation is on :attr:`device`. It is the model's own tensor, so observers must reduce or copy it at once.
        """
        waiting = len(observers)
        shape = batch.input_ids.shape

        def seen(observer: Observer, activation: Any) -> None:
            nonlocal waiting
            tensor = activation[0] if isinstance(activation, tuple) else activation
            observer(tensor.reshape(*shape, tensor.shape[-1]).to(self.device))
            waiting -= 1
            if not waiting:
                raise _Stop

        handles = []
        try:
            for site, observer in observers:
                module = self.resolve(site)
                if site.io == "output":
                    handles.append(
                        module.register_forward_hook(lambda _m, _i, out, observer=observer: seen(observer, out))
                    )
                else:

                    def before(_m: Any, args: Any, kwargs: Any, observer: Observer = observer) -> None:
                        seen(observer, args[0] if args else kwargs["hidden_states"])

                    handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            try:
                self.decoder(input_ids=batch.input_ids, use_cache=False)
            except _Stop:
                return
        finally:
            for handle in handles:
                handle.remove()
        raise NeuronSelectError(
            f"{waiting} activation sites were never reached; is the model a decoder-only causal LM?"
        )


def resolve_layer(layer: int, num_layers: int, option: str = "layer") -> int:
    """A layer as a 0-based number; negative ones count from the end.

    Raises:
        NeuronSelectError: out of range.
    """
    resolved = layer + num_layers if layer < 0 else layer
    if not 0 <= resolved < num_layers:
        raise NeuronSelectError(
            f"out of range: the model has {num_layers} blocks, 0 to {num_layers - 1} (or -1 to -{num_layers})",
            option=option,
            value=layer,
        )
    return resolved


def find_decoder(model: Any) -> tuple[nn.Module, str]:
    """The module that has the decoder blocks, and the name of the attribute."""
    candidates = [model]
    if hasattr(model, "get_base_model"):  # a PEFT wrapper; the adapters stay active inside the layers
        candidates.insert(0, model.get_base_model())
    if hasattr(candidates[0], "get_decoder"):
        candidates.insert(0, candidates[0].get_decoder())
    candidates += [module for _, module in candidates[-1].named_modules()]
    for candidate in candidates:
        for name in _BLOCK_LISTS:
            if isinstance(getattr(candidate, name, None), nn.ModuleList):
                return candidate, name
    raise NeuronSelectError(
        f"{type(model).__name__} has no list of decoder blocks; a decoder-only causal LM is needed", option="model"
    )
