"""Tiny random-initialised causal LMs of many families, and a tiny tokenizer: what the tests run on."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

BLOCKS = 4
HIDDEN = 32
VOCAB = 128

_MOE = {"num_experts": 6, "num_experts_per_tok": 2}
_SLIDING = {"sliding_window": 6}
# family -> (transformers' model_type, what differs from _COMMON)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", _SLIDING),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8} | _SLIDING),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "query_pre_attn_scalar": 8}
        | _SLIDING
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {"n_inner": 48}),
    "olmoe": ("olmoe", _MOE),
    "mixtral": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, "moe_intermediate_size": 16, "decoder_sparse_step": 1} | _MOE),
}
MOE = ("olmoe", "mixtral", "qwen3_moe")
FAMILIES = tuple(_CONFIGS)
DENSE = tuple(family for family in FAMILIES if family not in MOE)

_COMMON = {
    "num_hidden_layers": BLOCKS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_model(family: str, **changes: Any) -> nn.Module:
    """A causal LM of 4 blocks, float32, eval; always the same weights.

    Args:
        family: one of :data:`FAMILIES`. changes: config values that differ.
    """
    model_type, own = _CONFIGS[family]
    values = _COMMON | ({} if family in ("gpt2", "gpt_neox") else {"num_key_value_heads": 2}) | own | changes
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values), dtype=torch.float32)
    with torch.no_grad():  # norm weights of one and biases of nought would hide mistakes
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def decoder_of(model: nn.Module) -> nn.Module:
    """The bare decoder, found by the family's own attribute."""
    return next(getattr(model, name) for name in ("model", "gpt_neox", "transformer") if hasattr(model, name))


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks."""
    decoder = decoder_of(model)
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def norm_of(model: nn.Module) -> nn.Module:
    """The final norm."""
    decoder = decoder_of(model)
    return next(getattr(decoder, n) for n in ("norm", "final_layer_norm", "ln_f") if hasattr(decoder, n))


def gate_by_hand(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``act(W_gate x)`` of a dense MLP (non-gated: ``act(W_in x)``), from its own modules."""
    if hasattr(mlp, "gate_up_proj"):
        return mlp.activation_fn(mlp.gate_up_proj(x).chunk(2, dim=-1)[0])
    if hasattr(mlp, "gate_proj"):
        return mlp.act_fn(mlp.gate_proj(x))
    return mlp.act(mlp.c_fc(x) if hasattr(mlp, "c_fc") else mlp.dense_h_to_4h(x))


def neurons_by_hand(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``act(gate) * up`` of a dense MLP (non-gated: ``act(W_in x)``), from its own modules."""
    gate = gate_by_hand(mlp, x)
    if hasattr(mlp, "gate_up_proj"):
        return gate * mlp.gate_up_proj(x).chunk(2, dim=-1)[1]
    return gate * mlp.up_proj(x) if hasattr(mlp, "gate_proj") else gate


def router_weights(logits: torch.Tensor) -> torch.Tensor:
    """Softmax of a router's logits; transformers 5.0 gives the weights by that name."""
    given = bool((logits >= 0).all()) and torch.allclose(logits.sum(dim=-1), torch.ones(()), atol=1e-4)
    return logits if given else logits.softmax(dim=-1)


@torch.no_grad()
def record(model: nn.Module, ids: Any) -> dict[str, torch.Tensor]:
    """One unpadded row through the whole, unmodified model.

    Returns:
        ``residual [blocks, n, d]``, ``mlp_input [blocks, n, d]``, ``hidden_states [blocks + 1, n, d]``
        as transformers gives them, and for dense families ``neurons`` and ``gate [blocks, n, width]``, for
        mixtures of experts ``router [blocks, n, experts]``.
    """
    seen: dict[str, list[torch.Tensor]] = {"residual": [], "mlp_input": [], "router_logits": []}
    handles = []
    for block in blocks_of(model):
        handles += [
            block.register_forward_hook(
                lambda _m, _a, out: seen["residual"].append((out[0] if isinstance(out, tuple) else out)[0])
            ),
            block.mlp.register_forward_pre_hook(
                lambda _m, args, kwargs: seen["mlp_input"].append((args[0] if args else kwargs["hidden_states"])[0]),
                with_kwargs=True,
            ),
        ]
        if hasattr(block.mlp, "experts"):
            handles.append(
                block.mlp.gate.register_forward_hook(lambda _m, _a, out: seen["router_logits"].append(out[0]))
            )
    try:
        out = model(input_ids=torch.as_tensor(ids)[None], output_hidden_states=True, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    mlps = [block.mlp for block in blocks_of(model)]
    found = {"residual": torch.stack(seen["residual"]), "mlp_input": torch.stack(seen["mlp_input"])}
    found["hidden_states"] = torch.stack([h[0] for h in out.hidden_states])
    if seen["router_logits"]:
        found["router"] = router_weights(torch.stack(seen["router_logits"]))
    if all(not hasattr(mlp, "experts") for mlp in mlps):
        pairs = list(zip(mlps, found["mlp_input"], strict=True))
        found["gate"] = torch.stack([gate_by_hand(mlp, x) for mlp, x in pairs])
        found["neurons"] = torch.stack([neurons_by_hand(mlp, x) for mlp, x in pairs])
    return found


CHATML = (
    "{{ bos_token }}"
    "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ '<call>' + (call | tojson) + '</call>' }}{% endfor %}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer(chat_template: str | None = CHATML, *, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A token a character (printable ASCII and newline), six special tokens, ids below 128.

    Args:
        chat_template: ChatML with ``{% generation %}`` marks, another, or None.
        adds_bos: whether ``add_special_tokens=True`` puts the BOS first, as Llama's tokenizer does.
    """
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *characters])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=chat_template,
    )
