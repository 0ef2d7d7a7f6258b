"""Chat templates that behave like those of well-known models, in our own few words, and a tokenizer for each.

None marks the answers ({% generation %}), as the models' own do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from families import tiny_tokenizer
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Chat:
    """A template. Attributes:

    end: the mark that ends an answer. call: how an answer shows a call of ``f`` with ``{"x": 1}``; None where the
    template has no calls. marks: its own tokens. system: whether it takes a system turn. tools: whether it takes tools.
    """

    template: str
    end: str
    marks: tuple[str, ...]
    call: str | None = None
    system: bool = True

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return _tokenizer(self)


@cache
def _tokenizer(chat: Chat) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(chat.template)
    tokenizer.add_tokens(list(chat.marks), special_tokens=True)
    tokenizer.eos_token = chat.end
    return tokenizer


_CHATML_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"

SMOLLM2 = Chat(
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are small and helpful.<|im_end|>\n' }}{% endif %}" + _CHATML_TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    end="<|im_end|>",
    marks=("<|im_start|>", "<|im_end|>"),
)

# A header for every turn, a system turn with dates that is always there, contents trimmed, one call at a time.
LLAMA3 = Chat(
    "{{ bos_token }}{% set ns = namespace(text='', turns=messages) %}"
    "{% if messages[0].role == 'system' %}{% set ns.text = messages[0].content | trim %}"
    "{% set ns.turns = messages[1:] %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}{% if tools %}{{ 'Environment: ipython\n' }}{% endif %}"
    "{{ 'Knowledge until: May 2023\nToday: 3 May 2024\n\n' + ns.text + '<|eot_id|>' }}"
    "{% for m in ns.turns %}{% if m.role in ('tool', 'ipython') %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' }}"
    "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' }}{{ f.arguments | tojson }}{{ '}<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    end="<|eot_id|>",
    marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    call='{"name": "f", "parameters": {"x": 1}}',
)

_QWEN_HEAD = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}"
    "{% endif %}{{ '<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '\n</tools><|im_end|>\n' }}{% elif messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
)
_QWEN_CALLS = (
    "{% for call in m.tool_calls or [] %}{% if (loop.first and m.content) or not loop.first %}{{ '\n' }}{% endif %}"
    '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{% if call.function.arguments is string %}{{ call.function.arguments }}"
    "{% else %}{{ call.function.arguments | tojson }}{% endif %}{{ '}\n</tool_call>' }}{% endfor %}"
)
# Results of tools that follow each other share one user turn.
_QWEN_TOOL = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
)
_QWEN_CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
_QWEN_MARKS = ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")

QWEN25 = Chat(
    "{% if not tools and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are the default.<|im_end|>\n' }}{% endif %}" + _QWEN_HEAD + "{% for m in messages %}"
    "{% if m.role == 'tool' %}" + _QWEN_TOOL + "{% elif m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + m.content }}" + _QWEN_CALLS + "{{ '<|im_end|>\n' }}"
    "{% elif not (m.role == 'system' and loop.first) %}" + _CHATML_TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    end="<|im_end|>",
    marks=_QWEN_MARKS,
    call=_QWEN_CALL,
)

# Thoughts are kept after the last question only; the last answer always has them, empty if need be.
QWEN3 = Chat(
    _QWEN_HEAD + "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'tool' %}" + _QWEN_TOOL + "{% elif m.role == 'assistant' %}"
    "{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.reasoning_content or '' %}{% if not thought and '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ text }}"
    + _QWEN_CALLS
    + "{{ '<|im_end|>\n' }}"
    "{% elif not (m.role == 'system' and loop.first) %}" + _CHATML_TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    end="<|im_end|>",
    marks=_QWEN_MARKS,
    call=_QWEN_CALL,
)

_ALTERNATES = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
GEMMA = Chat(
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}" + _ALTERNATES + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}"
    "{{ '\n' + (m.content | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    end="<end_of_turn>",
    marks=("<start_of_turn>", "<end_of_turn>"),
    system=False,
)
MISTRAL = Chat(
    "{{ bos_token }}{% for m in messages %}" + _ALTERNATES + "{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
    end="</s>",
    marks=("[INST]", "[/INST]"),
    system=False,
)

CHATS = {
    "smollm2": SMOLLM2,
    "llama3": LLAMA3,
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
}
