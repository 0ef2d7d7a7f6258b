"""The loss on answers: against one row at a time in float64, against TRL's own loss, whatever the batches."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import CHATML, DENSE, FAMILIES, MOE, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from versions import before

from hf_neuronselect.core import bundled as paths
from hf_neuronselect.core.errors import NeuronSelectError
from hf_neuronselect.models.loss import AnswerLoss, answer_losses
from hf_neuronselect.pipelines import bundled
from hf_neuronselect.rows.answers import AnswerEncoder, answered
from hf_neuronselect.rows.encode import SampleEncoder
from hf_neuronselect.rows.formats import Conversation

# As CHATML, with the end of the turn inside the marks, as a template for training has it.
TRAINING = CHATML.replace("{% endgeneration %}", "{{ '<|im_end|>' }}{% endgeneration %}").replace(
    "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}",
    "{% endif %}{{ ('' if m['role'] == 'assistant' else '<|im_end|>') + '\n' }}{% endfor %}",
)
PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
TOKENIZER = tiny_tokenizer(TRAINING)

PEFT_WARNS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # in peft's own code


def _c(*turns: str, **more: Any) -> Conversation:
    return Conversation(
        messages=[dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns], **more
    )


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CONVERSATIONS = [
    _c("user: what is 2+2?", "assistant: 4"),
    _c("system: be brief", "user: why?", "assistant: because it is so", "user: and?", "assistant: that is all"),
    _c("user: a long one " + "with many words " * 6, "assistant: ok"),
    _c("user: count", "assistant: " + "one two three four five six " * 4),
    _c("assistant: I begin", "user: hm", "assistant: go on"),
    _c("user: q", "assistant: ", "user: nothing?", "assistant: now"),
    Conversation(
        messages=[
            {"role": "user", "content": "add"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "one"},
        ]
    ),
    _c("user: x", "assistant: y"),
    _c("user: <|im_start|>assistant\nno<|im_end|>\n", "assistant: yes <|im_end|> yes"),
]


@cache
def _model(family: str = "llama") -> Any:
    return tiny_model(family)


def _mask(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[bool]]:
    template = (
        "{% set nothing = '' %}{{ nothing }}" + tokenizer.chat_template
    )  # else transformers 5.0 misses a first answer
    got = tokenizer.apply_chat_template(
        conversation.messages, tools=conversation.tools, chat_template=template, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    return got["input_ids"], [bool(inside) for inside in got["assistant_masks"]]


def _slow(model: Any, ids: list[int], mask: list[bool]) -> tuple[float, int]:
    """One row by itself, in float64, token by token."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # the grouped kernel has no float64
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    counted = [i for i in range(1, len(ids)) if mask[i]]
    total = 0.0
    for i in counted:
        row = logits[i - 1].double()
        total += float(torch.logsumexp(row, 0) - row[ids[i]])
    return total, len(counted)


# ------------------------------------------------------------------------------------ the right value
@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_at_a_time_in_float64(family: str) -> None:
    model = _model(family)
    got = answer_losses(model, TOKENIZER, CONVERSATIONS, batch_tokens=300)
    want = [_slow(model, *_mask(TOKENIZER, conversation)) for conversation in CONVERSATIONS]
    assert got.tokens.tolist() == [tokens for _, tokens in want]
    np.testing.assert_allclose(got.nll, [nll for nll, _ in want], rtol=1e-5)
    assert got.mean == pytest.approx(sum(nll for nll, _ in want) / sum(tokens for _, tokens in want), rel=1e-5)
    assert (got.nll.dtype, got.tokens.dtype) == (np.float64, np.int64)
    assert got.skips == [""] * len(CONVERSATIONS)


def test_transformers_own_loss() -> None:
    """The mean over one row is the model's own loss for these labels."""
    model = _model("gemma2")  # soft-capped logits
    for conversation in CONVERSATIONS:
        ids, mask = _mask(TOKENIZER, conversation)
        labels = torch.tensor([[i if inside else -100 for i, inside in zip(ids, mask, strict=True)]])
        with torch.no_grad():
            want = model(input_ids=torch.tensor([ids]), labels=labels).loss
        assert answer_losses(model, TOKENIZER, [conversation]).mean == pytest.approx(float(want), rel=1e-5)


def test_trl_trains_on_the_same_tokens(tmp_path: Path) -> None:
    """SFT's evaluation with assistant_only_loss, all rows in one batch, is the mean over tokens."""
    conversations = [c for c in CONVERSATIONS if all(set(m) == {"role", "content"} for m in c.messages)]
    data = Dataset.from_list([{"messages": c.messages} for c in conversations])
    options = SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, max_length=60, per_device_eval_batch_size=len(data),
        use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False,
        **({} if before("transformers", "5.23") else {"activation_checkpointing": False}),
    )  # fmt: skip
    trainer = SFTTrainer(
        copy.deepcopy(_model()), options, train_dataset=data, eval_dataset=data, processing_class=TOKENIZER
    )
    got = answer_losses(_model(), TOKENIZER, conversations, max_length=60)
    assert "" in got.skips and any("max_length=60" in skip for skip in got.skips)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(got.mean, rel=1e-5)


@PEFT_WARNS
def test_an_adapter_counts() -> None:
    base = copy.deepcopy(_model())
    plain = answer_losses(base, TOKENIZER, CONVERSATIONS)
    torch.manual_seed(0)
    peft = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    got = answer_losses(peft, TOKENIZER, CONVERSATIONS)
    merged = copy.deepcopy(peft).merge_and_unload()
    np.testing.assert_allclose(got.nll, answer_losses(merged, TOKENIZER, CONVERSATIONS).nll, rtol=1e-4)
    assert np.abs(got.nll - plain.nll).min() > 1e-3
    with peft.disable_adapter():
        np.testing.assert_allclose(answer_losses(peft, TOKENIZER, CONVERSATIONS).nll, plain.nll, rtol=1e-6)


def test_the_cross_entropy_of_half_precision_is_float32() -> None:
    model = copy.deepcopy(_model()).bfloat16()
    got = answer_losses(model, TOKENIZER, CONVERSATIONS, batch_tokens=1)
    for conversation, nll in zip(CONVERSATIONS, got.nll, strict=True):
        ids, mask = _mask(TOKENIZER, conversation)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        assert nll == pytest.approx(float(losses[torch.tensor(mask[1:])].sum()), rel=1e-5)
    assert got.mean == pytest.approx(answer_losses(_model(), TOKENIZER, CONVERSATIONS).mean, rel=0.02)


@pytest.mark.parametrize("head", [None, torch.nn.Linear(2, 2)], ids=["none", "another"])
def test_a_model_whose_head_cannot_be_hooked(head: torch.nn.Module | None) -> None:
    class Whole(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return self.model(input_ids=input_ids, use_cache=use_cache)

        def get_output_embeddings(self) -> torch.nn.Module | None:
            return head

    want = answer_losses(_model(), TOKENIZER, CONVERSATIONS)
    np.testing.assert_allclose(
        answer_losses(Whole(_model()), TOKENIZER, CONVERSATIONS, batch_tokens=4096).nll, want.nll, rtol=1e-6
    )


def test_the_head_computes_answer_positions_only_and_is_left_as_it_was() -> None:
    model = _model()
    head, seen = model.get_output_embeddings(), []
    watch = head.register_forward_hook(lambda _, given, found: seen.append(tuple(found.shape[:2])))
    found = answer_losses(model, TOKENIZER, CONVERSATIONS)
    assert sum(count for _, count in seen) == found.tokens.sum() and {rows for rows, _ in seen} == {1}
    watch.remove()
    assert not head._forward_pre_hooks
    broken = model.model.forward
    model.model.forward = lambda *a, **b: (_ for _ in ()).throw(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        answer_losses(model, TOKENIZER, CONVERSATIONS)
    model.model.forward = broken
    assert not head._forward_pre_hooks


# ------------------------------------------------------------------------------- batches and row order
@settings(deadline=None, max_examples=25)
@given(
    order=st.permutations(range(len(CONVERSATIONS))),
    batch_tokens=st.integers(1, 2000),
    family=st.sampled_from([*DENSE[:6:2], MOE[0]]),
)
def test_neither_batches_nor_order_change_it(order: list[int], batch_tokens: int, family: str) -> None:
    want = answer_losses(_model(family), TOKENIZER, CONVERSATIONS)
    got = answer_losses(_model(family), TOKENIZER, [CONVERSATIONS[i] for i in order], batch_tokens=batch_tokens)
    np.testing.assert_allclose(got.nll, want.nll[order], atol=1e-5 * want.tokens.max())
    np.testing.assert_allclose(got.nll / got.tokens, (want.nll / want.tokens)[order], atol=1e-5)
    assert got.tokens.tolist() == want.tokens[order].tolist()
    assert got.mean == pytest.approx(want.mean, abs=1e-5)


def test_chunks_of_the_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    want = answer_losses(_model(), TOKENIZER, CONVERSATIONS)
    monkeypatch.setattr("hf_neuronselect.models.loss._CHUNK", 3 * 128)
    np.testing.assert_allclose(answer_losses(_model(), TOKENIZER, CONVERSATIONS).nll, want.nll, rtol=1e-6)


def test_no_forward_is_larger_than_the_budget() -> None:
    model = copy.deepcopy(_model())
    shapes: list[tuple[torch.Size, torch.Size]] = []
    model.register_forward_hook(
        lambda _m, _a, kwargs, out: shapes.append((kwargs["input_ids"].shape, out.logits.shape)), with_kwargs=True
    )
    answer_losses(model, TOKENIZER, CONVERSATIONS, batch_tokens=200)
    assert sum(rows for (rows, _), _ in shapes) == len(CONVERSATIONS) and len(shapes) > 2
    assert all(rows * width <= 200 or rows == 1 for (rows, width), _ in shapes)
    # Logits are only computed where some row of the batch has an answer token.
    assert all(logits[1] <= ids[1] - 1 for ids, logits in shapes)
    shapes.clear()
    answer_losses(model, TOKENIZER, [CONVERSATIONS[2]])
    assert shapes[0][1][1] == len("ok") + 1


def test_the_model_is_left_as_it_was() -> None:
    model = copy.deepcopy(_model()).train()
    model.model.layers[1].eval()  # a part frozen by its owner
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    before = {name: module.training for name, module in model.named_modules()}
    got = answer_losses(model, TOKENIZER, CONVERSATIONS)
    np.testing.assert_allclose(got.nll, answer_losses(_model(), TOKENIZER, CONVERSATIONS).nll, rtol=1e-6)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with pytest.raises(NeuronSelectError):
        answer_losses(model, TOKENIZER, [])
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[:] = math.nan
    with pytest.raises(NeuronSelectError):
        answer_losses(broken, TOKENIZER, CONVERSATIONS)
    assert {name: module.training for name, module in broken.named_modules()} == before


# --------------------------------------------------------------------------------- which tokens count
def _counted(tokenizer: Any, conversation: Conversation, **options: Any) -> str:
    """The text of the tokens that count."""
    (row,) = AnswerEncoder(tokenizer, **options).encode([conversation])
    assert not row.skip
    return "".join(tokenizer.convert_ids_to_tokens(row.input_ids[row.pooled].tolist()))


def test_the_end_of_the_turn_counts() -> None:
    chat = CONVERSATIONS[1]
    assert _counted(TOKENIZER, chat) == "because it is so<|im_end|>that is all<|im_end|>"
    # ... where the marks hold it, as TRL has it, and not where they do not.
    assert _counted(tiny_tokenizer(CHATML), chat) == "because it is sothat is all"
    # Without marks, and without a template: the special token behind the turn.
    assert _counted(tiny_tokenizer(PLAIN), chat) == "because it is so<|im_end|>that is all<|im_end|>"
    assert _counted(tiny_tokenizer(None), chat) == "because it is so</s>that is all</s>"
    for template in (TRAINING, PLAIN):  # named variants: the default one, as in TRL
        named = tiny_tokenizer({"default": template, "other": CHATML})
        assert _counted(named, chat) == "because it is so<|im_end|>that is all<|im_end|>"
    no_end = PLAIN.replace("<|im_end|>", "")
    assert _counted(tiny_tokenizer(no_end), _c("user: q", "assistant: a")) == "a"


def test_a_template_without_marks_counts_what_the_same_with_marks_does() -> None:
    plain = tiny_tokenizer("{{ bos_token }}" + PLAIN)
    for conversation in CONVERSATIONS[:4]:
        ids, mask = _mask(TOKENIZER, conversation)
        (found,) = AnswerEncoder(plain).encode([conversation])
        assert (found.input_ids.tolist(), found.pooled.tolist()) == (ids, mask)
    np.testing.assert_array_equal(
        answer_losses(_model(), plain, CONVERSATIONS[:4]).nll, answer_losses(_model(), TOKENIZER, CONVERSATIONS[:4]).nll
    )


def test_the_bundled_template() -> None:
    """The encoder's own spans leave the turn's end out; the loss has it, as the template's marks do."""
    tokenizer = AutoTokenizer.from_pretrained(paths.MODEL)
    encoder = SampleEncoder(tokenizer, pool_tokens="assistant")
    model = AutoModelForCausalLM.from_pretrained(paths.MODEL, dtype=torch.float32)
    rows = [row["messages"] for row in bundled.targets()["gsm8k"].select(range(3))]
    conversations = [*map(Conversation, rows), CONVERSATIONS[1]]
    got = answer_losses(model, tokenizer, conversations)
    for i, (conversation, sample) in enumerate(zip(conversations, encoder.encode(conversations), strict=True)):
        ids, mask = _mask(tokenizer, conversation)
        assert ids == sample.input_ids.tolist()
        turns = sum(message["role"] == "assistant" for message in conversation.messages)
        left_out = [token for token, a, b in zip(ids, mask, sample.pooled, strict=True) if a and not b]
        assert left_out == [tokenizer.eos_token_id] * turns
        nll, tokens = _slow(model, ids, mask)
        assert got.tokens[i] == tokens == sample.pooled.sum() + turns
        assert got.nll[i] == pytest.approx(nll, rel=1e-5)
    assert 0.5 < got.mean < 6, "a trained model is far better than a uniform guess"


TEXT = st.text(st.sampled_from("abc xyz.<|>\n"), max_size=12)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(TURNS, st.integers(1, 120))
def test_any_turns_of_any_length(turns: list[tuple[str, str]], max_length: int) -> None:
    """Exactly the marked tokens within max_length count, or the row says why it is skipped."""
    conversation = Conversation(messages=[{"role": role, "content": text} for role, text in turns])
    ids, mask = _mask(TOKENIZER, conversation)
    mask = mask[:max_length]
    good = CONVERSATIONS[7]
    wanted = sum(mask[1:]) * answered(conversation)  # an end alone is no answer
    room = len(_mask(TOKENIZER, good)[0]) <= max_length
    if not wanted and not room:
        with pytest.raises(NeuronSelectError, match="no row has an answer"):
            answer_losses(_model(), TOKENIZER, [conversation], max_length=max_length)
        return
    if not room:
        got = answer_losses(_model(), TOKENIZER, [conversation], max_length=max_length)
    else:
        got = answer_losses(_model(), TOKENIZER, [conversation, good], max_length=max_length)
    assert got.tokens[0] == wanted and bool(got.skips[0]) == (wanted == 0) == math.isnan(got.nll[0])
    if wanted:
        nll, _ = _slow(_model(), ids[:max_length], mask)
        assert got.nll[0] == pytest.approx(nll, rel=1e-5)


def test_the_first_token_is_never_predicted() -> None:
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    got = answer_losses(_model(), tokenizer, [_c("assistant: abc"), _c("assistant: a"), _c("assistant: b", "user: c")])
    assert got.tokens.tolist() == [2, 0, 1] and "no assistant token" in got.skips[1]
    ids, mask = _mask(tokenizer, _c("assistant: abc"))
    assert all(mask) and got.nll[0] == pytest.approx(_slow(_model(), ids, mask)[0], rel=1e-5)


def test_a_cut_row_counts_what_is_left() -> None:
    chat = _c("user: count", "assistant: one two three")
    ids, mask = _mask(TOKENIZER, chat)
    cut = len(ids) - 6  # the newline, the end of the turn, and "hree" go
    assert _counted(TOKENIZER, chat, max_length=cut) == "one two t"
    got = answer_losses(_model(), TOKENIZER, [chat], max_length=cut)
    assert (got.nll[0], got.tokens[0]) == pytest.approx(_slow(_model(), ids[:cut], mask[:cut]), rel=1e-5)


# ----------------------------------------------------------------------------------- rows and options
def test_rows_without_an_answer_are_skipped_with_a_reason() -> None:
    good = CONVERSATIONS[0]
    strict = TRAINING.replace(
        "{% for m", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m", 1
    )
    tokenizer = tiny_tokenizer(strict)
    rows = [
        Conversation(skip="empty"),
        good,
        _c("user: nobody answers"),
        Conversation(text="a bare text"),
        _c("system: s", "user: q", "assistant: a"),
        _c("user: " + "long " * 40, "assistant: too late"),
        good,
    ]
    got = answer_losses(_model(), tokenizer, rows, max_length=60)
    assert got.skips == [
        "empty",
        "",
        "error: no assistant turn with an answer",
        "error: no assistant turn with an answer",
        "error: the chat template refused the row: no system",
        "error: no assistant token within max_length=60",
        "",
    ]
    used = [1, 6]
    assert np.isnan(np.delete(got.nll, used)).all() and not np.delete(got.tokens, used).any()
    alone = answer_losses(_model(), tokenizer, [good])
    np.testing.assert_allclose(got.nll[used], [alone.nll[0]] * 2, rtol=1e-6)
    assert got.mean == pytest.approx(alone.mean, rel=1e-6)
    for unmarked in (tiny_tokenizer(PLAIN), tiny_tokenizer(None)):
        skips = answer_losses(_model(), unmarked, rows[:4]).skips
        assert [bool(skip) for skip in skips] == [True, False, True, True] and "assistant" in skips[2]


def test_no_row_to_use() -> None:
    for rows, seen in (([], "0 rows"), ([_c("user: q")], "row 0: error: no assistant turn")):
        with pytest.raises(NeuronSelectError, match=seen) as error:
            answer_losses(_model(), TOKENIZER, rows)
        assert error.value.option == "data"


def test_a_loss_that_is_not_a_number_names_its_row() -> None:
    model = copy.deepcopy(_model())
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENIZER.convert_tokens_to_ids("Z")] = math.nan
    rows = [*CONVERSATIONS[:3], _c("user: Zebra", "assistant: yes"), *CONVERSATIONS[3:]]
    with pytest.raises(NeuronSelectError, match="row 3.*nan.*float32") as error:
        answer_losses(model, TOKENIZER, rows)
    assert error.value.option == "data"
    assert np.isfinite(answer_losses(model, TOKENIZER, CONVERSATIONS).nll).all()


@PEFT_WARNS
def test_options_that_cannot_be() -> None:
    for option in ("batch_tokens", "max_length"):
        with pytest.raises(NeuronSelectError, match="at least 1") as error:
            answer_losses(_model(), TOKENIZER, CONVERSATIONS, **{option: 0})
        assert error.value.option == option
    with pytest.raises(NeuronSelectError, match="fast tokenizer"):
        answer_losses(_model(), SimpleNamespace(is_fast=False), CONVERSATIONS)
    prompts = get_peft_model(copy.deepcopy(_model()), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(NeuronSelectError, match="LoRA"):
        answer_losses(prompts, TOKENIZER, CONVERSATIONS)


def test_the_mean_of_nothing_is_nan() -> None:
    assert math.isnan(AnswerLoss(np.full(2, np.nan), np.zeros(2, np.int64), ["empty"] * 2).mean)
