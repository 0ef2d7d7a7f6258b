"""Causal LMs without their causal mask: every token sees every other one of its row.

The mask is given to the model as a whole, ``[B, 1, L, L]``, which transformers uses as it is, so that the model itself is
never changed. Sliding windows of local blocks are lifted with it; at the 512 tokens read they are no narrower in real models.
"""

from __future__ import annotations

import torch
from torch import nn

from ..core.errors import NeuronSelectError
from .backbone import find_decoder
from .checkpoint import config_of
from .loading import ModelSpec, causal_lm_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Model types whose blocks all attend by the mask they are given; each is tested against attention written out."""
ATTENTIONS = (None, "sdpa", "eager")


def check_family(spec: ModelSpec) -> None:
    """Refuse a model whose mask is not known to be lifted wholly: other families, other attention kernels.

    Raises:
        NeuronSelectError: it is one.
    """
    source = spec.source.base or spec.source
    config = causal_lm_of(spec, "cpu").config if spec.in_memory else config_of(source)
    if config.model_type not in FAMILIES:
        raise NeuronSelectError(
            f"is a {config.model_type}, whose causal mask cannot be lifted for sure; use a model of {', '.join(FAMILIES)}",
            option="model", value=spec.source.id,
        )  # fmt: skip
    if spec.attn_implementation not in ATTENTIONS:
        raise NeuronSelectError(
            "reads no mask of both directions; use sdpa or eager", option="attn_implementation",
            value=spec.attn_implementation,
        )  # fmt: skip


@torch.inference_mode()
def encode(decoder: nn.Module, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """States after the final norm, each token having seen all tokens of its row.

    Args:
        input_ids: int64 ``[B, L]``, padded on the right: positions are relative in all :data:`FAMILIES`, so the side is all
            one. lengths: int64 ``[B]``, tokens of each row.

    Returns:
        ``[B, L, width]``; states of padding mean nothing.
    """
    rows, width = input_ids.shape
    dtype = next(part.dtype for part in decoder.parameters() if part.dtype.is_floating_point)
    hidden = torch.arange(width, device=input_ids.device)[None, :] >= lengths.to(input_ids.device)[:, None]
    mask = torch.zeros((rows, width), dtype=dtype, device=input_ids.device).masked_fill_(hidden, torch.finfo(dtype).min)
    whole = mask[:, None, None, :].expand(rows, 1, width, width)
    found: torch.Tensor = decoder(input_ids=input_ids, attention_mask=whole, use_cache=False).last_hidden_state
    return found


@torch.inference_mode()
def check_lifted(decoder: nn.Module, name: str) -> None:
    """Make sure that the last token moves the first one's state, in the first block and in the end.

    Raises:
        NeuronSelectError: the model stayed causal.
    """
    device = next(decoder.parameters()).device
    module, blocks = find_decoder(decoder)
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: object, out: object) -> None:
        tensor = out[0] if isinstance(out, tuple) else out
        assert isinstance(tensor, torch.Tensor)
        seen.append(tensor.reshape(-1, tensor.shape[-1])[0].clone())

    handle = getattr(module, blocks)[0].register_forward_hook(keep)
    try:
        ids = torch.tensor([[3, 4, 5, 6, 7]], device=device)
        for last in (7, 8):
            ids[0, -1] = last
            seen.append(encode(decoder, ids, torch.tensor([5]))[0, 0].clone())
    finally:
        handle.remove()
    if torch.equal(seen[0], seen[2]) or torch.equal(seen[1], seen[3]):
        raise NeuronSelectError(
            "stays causal: its first token does not see the last, so it cannot be read in both directions; use another model",
            option="model", value=name,
        )  # fmt: skip
