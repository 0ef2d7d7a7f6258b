"""What a model's files say before its weights are read: configuration, tokenizer, limits, whether it can run here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..core.errors import NeuronSelectError
from ..core.seals import json_object
from ..core.sources import Source, hub_errors
from ..rows.encode import Limits, SampleEncoder
from ..rows.formats import Conversation
from .prefix import fetched
from .sizes import check_counts

CONFIG = "config.json"
_TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
_PROBE = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def config_of(source: Source) -> Any:
    """A model's configuration; of an adapter, its base's.

    Raises:
        NeuronSelectError: the files are no model, or none that reads its tokens from left to right.
    """
    base = source.base or source
    stated = _json(base, CONFIG)
    check_counts(base, stated)
    if "auto_map" in stated and stated.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise _wrong(source, "needs code of its own, which is never run: name a model that transformers knows")
    try:
        with hub_errors("model", base.id):
            config = AutoConfig.from_pretrained(base.location, revision=base.revision, trust_remote_code=False)
        text = config.get_text_config()
        for name in ("num_hidden_layers", "hidden_size", "vocab_size"):  # not every transformers looks at types
            if not isinstance(value := getattr(text, name, 0), int | None):
                raise TypeError(f"{name} is {value!r}, not a number")
    except NeuronSelectError:
        raise
    except Exception as cause:  # transformers raises errors of many kinds on such files
        raise _wrong(
            source, f"its {CONFIG} is not of a model that transformers can load: {_short(cause, source)}"
        ) from cause
    if what := _unreadable(config, text):
        raise _wrong(source, f"is {what} ({config.model_type}): name a decoder-only causal LM, as Llama, Qwen or GPT-2")
    return config


def _unreadable(config: Any, text: Any) -> str:
    """What a model is that cannot be read from left to right, block by block; "" for one that can."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if getattr(text, "is_decoder", None) is False and (kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or "bert" in kind):
        return "an encoder"
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "no causal language model"
    if not (getattr(text, "num_hidden_layers", None) and getattr(text, "hidden_size", None)):
        return "without a list of blocks of one width"
    return ""


def check_runs(source: Source, config: Any) -> None:
    """Refuse a quantised checkpoint that this machine cannot run, before it is opened.

    Raises:
        NeuronSelectError: its package or device is missing.
    """
    parts = (config, config.get_text_config())
    stated = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    if stated is None:
        return
    from transformers.quantizers.auto import get_hf_quantizer  # loads torch.distributed: a second

    try:
        get_hf_quantizer(copy.deepcopy(config), None, None, True, {})
    except Exception as cause:  # each kind of quantisation has errors of its own
        method = stated.get("quant_method") if isinstance(stated, Mapping) else getattr(stated, "quant_method", None)
        raise _wrong(
            source,
            f"is stored quantised ({getattr(method, 'value', method)}) and cannot run here: {_short(cause, source)}; install "
            "what is missing, or name the model it was made from",
        ) from cause


def block_parameters(config: Any) -> int:
    """About how many parameters all blocks have, as far as the configuration tells."""
    text = config.get_text_config()
    width = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * width
    return int(text.num_hidden_layers * (4 * width**2 + 3 * width * inner))


def limits_of(config: Any) -> Limits:
    """How many positions and embeddings a model has, as far as its configuration tells."""
    if config is None:
        return Limits()
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not isinstance(positions, int) or positions < 1:
        return Limits(None, getattr(text, "vocab_size", None))
    rope = getattr(text, "rope_parameters", None) or {}
    for one in (rope, *rope.values()):  # rotary positions may be stretched, by all blocks alike or by some
        if isinstance(one, Mapping) and isinstance(factor := one.get("factor"), int | float):
            positions = max(positions, int(factor * (one.get("original_max_position_embeddings") or positions)))
    return Limits(positions, getattr(text, "vocab_size", None))


def read_tokenizer(source: Source) -> Any:
    """A new tokenizer of a model; an adapter without one has its base's.

    Raises:
        NeuronSelectError: there is none, or it cannot be read.
    """
    with hub_errors("model", source.id):
        found = source if fetched(source, *_TOKENIZERS) else source.base or source
        if fetched(found, *_TOKENIZERS) is None:
            raise _wrong(source, f"has no tokenizer: put {_TOKENIZERS[0]} and {_TOKENIZERS[1]} beside its {CONFIG}")
    try:
        with hub_errors("model", source.id):
            tokenizer = AutoTokenizer.from_pretrained(found.location, revision=found.revision, trust_remote_code=False)
            tokenizer(["a"], add_special_tokens=False)  # damaged settings show only now
            return tokenizer
    except NeuronSelectError:
        raise
    except Exception as cause:  # a damaged tokenizer.json raises exactly that
        raise _wrong(source, f"its tokenizer cannot be read: {_short(cause, source)}") from cause


def check_tokens(source: Source, tokenizer: Any, limits: Limits, chat_template: str | None = None) -> None:
    """Refuse a tokenizer whose ids go beyond the model's embeddings.

    Some added tokens may, as Gemma's for images: rows that hold one are left out. Not tokens that every row holds.

    Raises:
        NeuronSelectError: it belongs to another model, or tokens were added without embeddings.
    """
    added = tokenizer.get_added_vocab()
    last = max((number for token, number in tokenizer.get_vocab().items() if token not in added), default=0)
    (probe,) = SampleEncoder(tokenizer, chat_template=chat_template).encode([_PROBE])
    if beyond := limits.beyond(tokenizer, [last]) or limits.beyond(tokenizer, probe.input_ids):
        raise _wrong(source, f"{beyond}; use the tokenizer that belongs to the model, or resize_token_embeddings")


def _json(source: Source, name: str) -> dict[str, Any]:
    """A JSON file of a model.

    Raises:
        NeuronSelectError: it is missing, or no JSON object.
    """
    with hub_errors("model", source.id):
        path = fetched(source, name)
    if path is None:
        raise _wrong(source, f"has no {name}: not a model saved by save_pretrained")
    try:
        return json_object(path)
    except ValueError as cause:
        raise _wrong(source, f"its {cause}: save or download it again") from cause


def _wrong(source: Source, message: str) -> NeuronSelectError:
    return NeuronSelectError(message, option="model", value=source.id)


def _short(cause: BaseException, source: Source) -> str:
    """The beginning of a library's error, in one line and without the local path."""
    text = " ".join(str(cause).replace(source.location, source.id).split()) or type(cause).__name__
    return text[:240].rsplit(". ", 1)[0].rstrip(".") if len(text) > 240 else text.rstrip(".")
