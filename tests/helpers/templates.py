"""Chat templates of the families of models, written here after their documentation; their twins.

A twin says in Python what a template writes and what of it is learnt: pieces of (text, learnt). It
gives None for a dialogue that the template refuses. Twins import nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Message = dict[str, Any]
Pieces = list[tuple[str, bool]]

BOS, EOS = "<s>", "</s>"
SPECIAL = [
    *(BOS, EOS, "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<|end|>", "<|tool|>", "[gMASK]", "sop", "<|observation|>", "<User>", "<Assistant>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|return|>", "[INST]", "[/INST]"),
]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


class Family(NamedTuple):
    """A template and its twin."""

    template: str
    twin: Callable[[list[Message]], Pieces | None]


def _alternating(messages: list[Message], *, system: bool) -> bool:
    roles = [message["role"] for message in messages]
    if system and roles[:1] == ["system"]:
        roles = roles[1:]
    return all(role == ("user", "assistant")[n % 2] for n, role in enumerate(roles))


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant"


def _learns(message: Message) -> bool:
    return _is_answer(message) and message.get("train", True)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def _chatml(messages: list[Message]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        pieces += [
            (f"<|im_start|>{m['role']}\n", False),
            (f"{m['content']}<|im_end|>", _learns(m)),
            ("\n", False),
        ]
    return pieces


SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are small.<|im_end|>\n"
    "{% endif %}" + CHATML + _ASK
)


def _smollm2(messages: list[Message]) -> Pieces:
    if messages[0]["role"] == "system":
        return _chatml(messages)
    return _chatml([{"role": "system", "content": "You are small."}, *messages])


QWEN25 = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are Q.<|im_end|>\n' }}"
    "{%- endif %}{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}"
    "{%- endif %}{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}"
    "{%- endif %}{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def _qwen25(messages: list[Message]) -> Pieces:
    pieces: Pieces = []
    if messages[0]["role"] != "system":
        pieces.append(("<|im_start|>system\nYou are Q.<|im_end|>\n", False))
    for n, m in enumerate(messages):
        if m["role"] == "tool":
            pieces.append(("" if n and messages[n - 1]["role"] == "tool" else _QWEN_USER, False))
            pieces.append((f"\n<tool_response>\n{m['content']}\n</tool_response>", False))
            more = n + 1 < len(messages) and messages[n + 1]["role"] == "tool"
            pieces.append(("" if more else "<|im_end|>\n", False))
        else:
            pieces += _chatml([m])
    return pieces


_QWEN_USER = "<|im_start|>user"

QWEN3 = (
    "{%- set ns = namespace(last=messages|length - 1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' "
    "+ content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def _qwen3(messages: list[Message]) -> Pieces:
    users = [n for n, m in enumerate(messages) if m["role"] == "user"]
    asked = users[-1] if users else len(messages) - 1
    pieces: Pieces = []
    for n, m in enumerate(messages):
        said, thought = m["content"], m.get("reasoning_content")
        if _is_answer(m):
            if thought is None and "</think>" in said:
                before, *_, said = said.split("</think>")
                thought, said = before.rstrip("\n").split("<think>")[-1], said.lstrip("\n")
            if n > asked and (n == len(messages) - 1 or thought):
                thinking = (thought or "").strip("\n")
                said = f"<think>\n{thinking}\n</think>\n\n" + said.lstrip("\n")
        pieces += _chatml([m | {"content": said}])
    return pieces


# Macros and whitespace control, as newer templates have them; always asked for thinking.
QWEN35 = (
    "{%- macro written(content) %}{{- content }}{%- endmacro %}"
    "{%- for m in messages %}{%- set content = written(m.content)|trim %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1]|trim %}"
    "{%- endif %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)


def _qwen35(messages: list[Message]) -> Pieces:
    said = [m["content"].strip().split("</think>")[-1].strip() for m in messages]
    return _chatml([m | {"content": text} for m, text in zip(messages, said, strict=True)])


LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
)


def _llama2(messages: list[Message]) -> Pieces | None:
    if not _alternating(messages, system=True):
        return None
    pieces: Pieces = []
    before = ""
    for m in messages:
        said = before + m["content"]
        if m["role"] == "system":
            before = f"<<SYS>>\n{said}\n<</SYS>>\n\n"
        elif _is_answer(m):
            pieces += [(" ", False), (f"{said.strip()} {EOS}", _learns(m))]
        else:
            pieces.append((f"{BOS}[INST] {said.strip()} [/INST]", False))
            before = ""
    return pieces


LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n'+ m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}"
)
_LLAMA3_ASK = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"


def _llama3(messages: list[Message]) -> Pieces:
    pieces: Pieces = [(BOS, False)]
    for m in messages:
        pieces += [
            (f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False),
            (f"{m['content'].strip()}<|eot_id|>", _learns(m)),
        ]
    return pieces


def _llama3_original(messages: list[Message]) -> Pieces:
    return [*_llama3(messages), ("<|start_header_id|>assistant<|end_header_id|>\n\n", False)]


MISTRAL1 = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
)


def _mistral1(messages: list[Message]) -> Pieces | None:
    if not _alternating(messages, system=False):
        return None
    pieces: Pieces = [(BOS, False)]
    for m in messages:
        if _is_answer(m):
            pieces += [(m["content"] + EOS, _learns(m)), (" ", False)]
        else:
            pieces.append((f"[INST] {m['content']} [/INST]", False))
    return pieces


# A system text goes before the last question, so that no dialogue is a prefix of a longer one.
MISTRAL3 = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set turns = messages[1:] %}{%- else %}{%- set turns = messages %}{%- endif %}"
    "{%- set ns = namespace(last=-1) %}{%- for m in turns %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{{- bos_token }}"
    "{%- for m in turns %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{%- endif %}{%- if m.role == 'user' %}"
    "{%- if loop.index0 == ns.last and system is defined %}"
    "{{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content|trim + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles') }}{%- endif %}{%- endfor %}"
)


def _mistral3(messages: list[Message]) -> Pieces | None:
    if not _alternating(messages, system=True):
        return None
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    users = [n for n, m in enumerate(messages) if m["role"] == "user"]
    pieces: Pieces = [(BOS, False)]
    for n, m in enumerate(messages):
        if m["role"] == "user":
            told = system if n == users[-1] else ""
            pieces.append((f"[INST] {told}{m['content']}[/INST]", False))
        elif _is_answer(m):
            pieces += [(" ", False), (m["content"].strip() + EOS, _learns(m))]
    return pieces


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _gemma(messages: list[Message]) -> Pieces | None:
    if not _alternating(messages, system=False):
        return None
    pieces: Pieces = [(BOS, False)]
    for m in messages:
        pieces += [
            (f"<start_of_turn>{'model' if _is_answer(m) else 'user'}\n", False),
            (m["content"].strip() + "<end_of_turn>", _learns(m)),
            ("\n", False),
        ]
    return pieces


ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}\n{% endif %}{% endfor %}"
)


def _zephyr(messages: list[Message]) -> Pieces:
    # trim_blocks: the line break after the last tag of a line goes.
    pieces: Pieces = []
    for m in messages:
        pieces += [(f"<|{m['role']}|>\n", False), (m["content"] + EOS, _learns(m)), ("\n", False)]
    return pieces


PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)


def _phi3(messages: list[Message]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        pieces += [
            (f"<|{m['role']}|>\n", False),
            (m["content"] + "<|end|>", _learns(m)),
            ("\n", False),
        ]
    return [*pieces, (EOS, False)]


# Nothing ends a turn but the next one's header; the model begins with a line break itself.
CHATGLM3 = (
    "{% for m in messages %}{% if loop.first %}[gMASK]sop{% endif %}<|{{ m['role'] }}|>\n "
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _chatglm3(messages: list[Message]) -> Pieces:
    pieces: Pieces = [("[gMASK]sop", False)]
    for m in messages:
        pieces += [(f"<|{m['role']}|>", False), (f"\n {m['content']}", _learns(m))]
    return [*pieces, (EOS, True)] if _learns(messages[-1]) else pieces


# R1: asked with <think>, written without.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<User>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<Assistant>' + content + eos_token }}"
    "{% else %}{{ raise_exception('Unknown role') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
)


def _deepseek_r1(messages: list[Message]) -> Pieces | None:
    pieces: Pieces = [(BOS, False)]
    for m in messages:
        if m["role"] == "tool":
            return None
        if _is_answer(m):
            said = m["content"].split("</think>")[-1]
            pieces += [("<Assistant>", False), (said + EOS, _learns(m))]
        else:
            pieces.append(("<User>" * (m["role"] == "user") + m["content"], False))
    return pieces


# The last turn ends in another token than earlier ones, and thinking is a message of its own.
GPT_OSS = (
    "<|start|>system<|message|>You are G.<|end|>{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% if m.thinking is string and m.thinking and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{% if loop.last and not add_generation_prompt %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}"
    "{% endif %}{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def _gpt_oss(messages: list[Message]) -> Pieces:
    pieces: Pieces = [("<|start|>system<|message|>You are G.<|end|>", False)]
    for n, m in enumerate(messages):
        if not _is_answer(m):
            pieces.append((f"<|start|>{m['role']}<|message|>{m['content']}<|end|>", False))
            continue
        last = n == len(messages) - 1
        thought = m.get("reasoning_content") if last else None
        said = f"<|channel|>final<|message|>{m['content']}{'<|return|>' if last else '<|end|>'}"
        if thought:
            said = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" + said
        pieces += [("<|start|>assistant", False), (said, _learns(m))]
    return pieces


FAMILIES = {
    "chatml": Family(CHATML + _ASK, _chatml),
    "chatml without generation prompt": Family(CHATML, _chatml),
    "smollm2": Family(SMOLLM2, _smollm2),
    "qwen 2.5": Family(QWEN25, _qwen25),
    "qwen 3": Family(QWEN3, _qwen3),
    "qwen 3.5": Family(QWEN35, _qwen35),
    "llama 2": Family(LLAMA2, _llama2),
    "llama 3": Family(
        LLAMA3 + "{% if add_generation_prompt %}" + _LLAMA3_ASK + "{% endif %}", _llama3
    ),
    "llama 3 original": Family(LLAMA3 + _LLAMA3_ASK, _llama3_original),
    "mistral 1": Family(MISTRAL1, _mistral1),
    "mistral 3": Family(MISTRAL3, _mistral3),
    "gemma": Family(GEMMA, _gemma),
    "zephyr": Family(ZEPHYR, _zephyr),
    "phi 3": Family(PHI3, _phi3),
    "chatglm 3": Family(CHATGLM3, _chatglm3),
    "deepseek r1": Family(DEEPSEEK_R1, _deepseek_r1),
    "gpt-oss": Family(GPT_OSS, _gpt_oss),
}
LOSES_EMPTY = {"qwen 3.5"}
"""A macro's result that is empty does not always say of what: refused then."""

READS_REASONING = {"qwen 3", "gpt-oss"}
