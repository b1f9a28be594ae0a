"""Prompt and target of one sample, for whoever embeds it."""

from __future__ import annotations

import json

import pytest

from slap_stream.errors import CorpusError
from slap_stream.text.sample import from_messages

ASKED = {"role": "user", "content": "hi"}


def test_the_target_is_what_is_learnt() -> None:
    wrong = {"role": "assistant", "content": "no", "train": False}
    right = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    sample = from_messages([ASKED, wrong, ASKED, right], "web")
    assert sample.target == "hm\nyes"
    assert sample.prompt == "hi\nno\nhi"
    assert sample.length == 3  # 11 characters
    with pytest.raises(CorpusError, match="weight of a turn must be true, false, 0 or 1, got 2"):
        from_messages([ASKED, {"role": "assistant", "content": "no", "weight": 2}], None)


def test_tools_are_part_of_the_prompt() -> None:
    tools = [{"name": "größe", "description": "x" * 4000}]
    said = {"role": "assistant", "content": "yes"}
    sample = from_messages([ASKED | {"tools": tools}, said], None)
    written = f'[{{"name": "größe", "description": "{"x" * 4000}"}}]'
    assert sample.prompt == f"{written}\nhi"
    assert sample.target == "yes"
    assert sample.length == -(-(len(written) + 5) // 4)
    assert from_messages([ASKED | {"tools": []}, said], None).prompt == "hi"


def test_calls_of_tools_are_part_of_the_target() -> None:
    call = {"type": "function", "function": {"name": "uhr", "arguments": {"zone": "größte"}}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    sample = from_messages([ASKED, said], None)
    assert json.loads(sample.target) == [call]
    assert sample.length == -(-(len(sample.target) + 2) // 4)
    unlearnt = from_messages([ASKED, said | {"train": False}, {**said, "content": "yes"}], None)
    assert unlearnt.prompt == f"hi\n{sample.target}"
    assert unlearnt.target == f"yes\n{sample.target}"
