"""The loss of a causal LM, with or without an adapter, on held-out answers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import datasets
import evaluate
import torch

from hf_neuronselect.core.errors import NeuronSelectError, NeuronSelectWarning
from hf_neuronselect.models.checkpoint import read_tokenizer
from hf_neuronselect.models.loading import load_adapter
from hf_neuronselect.models.loss import answer_losses
from hf_neuronselect.models.pin import pin_model
from hf_neuronselect.rows.formats import Conversation, read_row, row_format
from hf_neuronselect.training.models import adapter_source, load_causal_lm

_DESCRIPTION = """\
The mean negative log-likelihood, in nats per token, that a causal LM assigns to the answers of held-out rows, each
given the turns before it. Only tokens that TRL trains with assistant_only_loss=True count.
"""

_KWARGS_DESCRIPTION = """
Args:
    data: list of rows. A row is a list of messages ({"role": ..., "content": ...}), or a dict of the columns of any
        format that hf_neuronselect reads (messages and tools; prompt and completion; instruction and output; ...).
    model_id: str, a causal LM: a Hub id or a local folder.
    adapter_id: str, a PEFT adapter of the model. If it has a tokenizer, that one is used.
    revision: str, branch, tag or commit of the model.
    max_length: int, tokens kept of a row, from its beginning. Default 2048.
    dtype: str, "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
    device: str, "auto", "cpu", "cuda", "cuda:1", "mps".
    batch_tokens: int, padded tokens per forward pass; changes memory, not the result; by default at most 4,096.
Returns:
    target_loss: float, nats per answer token over all rows used.
    answer_tokens: int, the number of tokens in that mean.
    rows: int, rows used.
    skipped: int, rows without an answer within max_length, or that cannot be read.
"""

_CITATION = """\
@misc{hf_neuronselect,
  title={hf_neuronselect: instruction data selection by a model's own neurons},
  author={{The hf\\_neuronselect developers}}
}
"""

DTYPES = ("auto", "float32", "bfloat16", "float16")


def target_loss(
    data: Sequence[Any],
    model_id: str,
    adapter_id: str | None = None,
    revision: str | None = None,
    max_length: int = 2048,
    dtype: str = "auto",
    device: str = "auto",
    batch_tokens: int | Literal["auto"] = "auto",
) -> dict[str, Any]:
    """Compute the loss of a saved model on the answers of rows.

    Args:
        data: message lists, or dicts of columns. model_id: Hub id or folder. adapter_id: Hub id or folder.
        revision: branch, tag or commit of the model. max_length: tokens kept of a row.
        dtype, device, batch_tokens: how the model runs.

    Returns:
        ``target_loss`` (nats per answer token), ``answer_tokens``, ``rows`` and ``skipped``.

    Raises:
        NeuronSelectError: rows of an unknown format, no row with an answer, or a model or adapter that cannot be
            loaded.
    """
    if dtype not in DTYPES:
        raise NeuronSelectError(f"must be one of {', '.join(DTYPES)}", option="dtype", value=dtype)
    conversations = [conversation(row, i) for i, row in enumerate(data)]
    model, tokenizer = load(model_id, adapter_id, revision, dtype, device)
    got = answer_losses(model, tokenizer, conversations, max_length=max_length, batch_tokens=batch_tokens)
    skipped = [i for i, reason in enumerate(got.skips) if reason]
    if skipped:
        warnings.warn(
            f"{len(skipped)} of {len(conversations)} rows are left out (row {skipped[0]}: "
            f"{got.skips[skipped[0]]}); mend or remove them",
            NeuronSelectWarning,
            stacklevel=2,
        )
    return {
        "target_loss": got.mean,
        "answer_tokens": int(got.tokens.sum()),
        "rows": len(conversations) - len(skipped),
        "skipped": len(skipped),
    }


def conversation(row: Any, i: int = 0) -> Conversation:
    """Read a list of messages, or a row of any known format."""
    if isinstance(row, Sequence) and not isinstance(row, str):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise NeuronSelectError(
            "must be a list of messages ({'role': ..., 'content': ...}) or a dict of columns",
            option="data",
            value=f"row {i}: {type(row).__name__}",
        )
    return read_row(row, row_format(row))


def load(
    model_id: str, adapter_id: str | None, revision: str | None, dtype: str = "auto", device: str = "auto"
) -> tuple[Any, Any]:
    """Load a model, with its adapter if one is named, and the tokenizer it was trained with."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with _called("model_id", model_id):
        source = pin_model(model_id, revision=revision, token=None)
        model = load_causal_lm(source, dtype=dtype)
        tokenizer = read_tokenizer(source) if adapter_id is None else None
    if adapter_id is not None:
        with _called("adapter_id", adapter_id):
            adapter = adapter_source(adapter_id)
            model = load_adapter(model, adapter, adapter_id, "adapter_id")
        with _called("model_id", model_id):
            tokenizer = read_tokenizer(replace(adapter, base=source))  # the base's where the adapter has none
    return model.to(device), tokenizer


@contextmanager
def _called(option: str, value: str) -> Iterator[None]:
    """Errors name the metric's own argument."""
    try:
        yield
    except NeuronSelectError as cause:
        raise NeuronSelectError(cause.message, option=option, value=value) from cause


class TargetLoss(evaluate.Measurement):
    """The loss on held-out answers as an ``evaluate`` measurement."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # Rows as JSON text: columns of role and content would drop tool calls, tools, other formats.
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def add_batch(self, *, data: Sequence[Any] = (), **wrong: Any) -> None:
        """Add rows."""
        super().add_batch(data=[json.dumps(row) for row in data], **wrong)

    def add(self, *, data: Any, **wrong: Any) -> None:
        """Add a row."""
        super().add(data=json.dumps(data), **wrong)

    def _compute(self, data: Sequence[str], model_id: str | None = None, **options: Any) -> dict[str, Any]:
        if model_id is None:
            raise NeuronSelectError("give the Hub id or the folder of a causal LM", option="model_id")
        return target_loss([json.loads(row) for row in data], model_id, **options)
