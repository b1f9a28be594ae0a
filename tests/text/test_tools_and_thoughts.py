"""Tools and thoughts of a conversation reach the text, or the record is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slap_stream.errors import CorpusError
from slap_stream.text.chat import encode
from tests.helpers.templates import FAMILIES

Message = dict[str, Any]

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = {"tools": [{"type": "function", "function": {"name": "area"}}]}
THOUGHT = {"reasoning_content": "area"}
SYSTEM = {"role": "system", "content": "x"}
ASKED = {"role": "user", "content": "area?"}
# Both are texts that stand in it anyway.
ANSWER = {"role": "assistant", "content": "area"}


def written(template: str, *messages: Message) -> str:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    text: str = tokenizer.decode(encode(tokenizer, list(messages)).input_ids)
    return text


def test_tools_of_any_turn_before_the_first_answer_are_written() -> None:
    first = written(TEMPLATE, SYSTEM | TOOLS, ASKED, ANSWER)
    assert first.startswith('[{"type": "function", "function": {"name": "area"}}]<|im_start|>sys')
    assert written(TEMPLATE, SYSTEM, ASKED | TOOLS, ANSWER) == first
    assert written(TEMPLATE, SYSTEM | TOOLS, ASKED, ANSWER | TOOLS) == first


def test_tools_that_differ_or_come_later_are_refused() -> None:
    with pytest.raises(CorpusError, match="one list before its first answer, got two lists that d"):
        written(TEMPLATE, ASKED | TOOLS, ANSWER, ASKED | {"tools": [{"name": "volume"}]})
    with pytest.raises(CorpusError, match="got a list after the first answer; put those of all tu"):
        written(TEMPLATE, ASKED, ANSWER, ASKED | TOOLS)


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        ("m.thinking", "m.thought", [ASKED, ANSWER | THOUGHT]),
        ("m.thinking", "enable_thinking", [ASKED, ANSWER | THOUGHT]),
        ("{{ m.thinking }}", "", [ASKED, ANSWER | THOUGHT, ASKED, ANSWER | THOUGHT]),
        ("tools | tojson", "tools | length", [ASKED | TOOLS, ANSWER]),
        ("tools | tojson", "'tools'", [ASKED | {"tools": [{"name": "area"}]}, ANSWER]),
    ],
)
def test_what_a_template_names_and_does_not_write_is_refused(
    old: str, new: str, messages: list[Message]
) -> None:
    assert written(TEMPLATE, *messages)
    name = "tools" if "tools" in old else "reasoning_content"
    with pytest.raises(CorpusError, match=f"must write '{name}' where messages hold it, and it wr"):
        written(TEMPLATE.replace(old, new), *messages)


def test_earlier_thoughts_may_be_left_out_and_others_not() -> None:
    thought = {"reasoning_content": "hm"}
    qwen = FAMILIES["qwen 3"].template
    assert "hm" not in written(qwen, ASKED, ANSWER | thought, ASKED, ANSWER)
    assert "<think>\nhm\n</think>" in written(qwen, ASKED, ANSWER | thought)
    with pytest.raises(CorpusError, match="must write 'reasoning_content'"):
        written(qwen, ANSWER | thought)
