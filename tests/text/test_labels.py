"""The law of labels: learnt are the assistant's turns and what ends them, with any template."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from slap_stream.errors import ConfigError, CorpusError
from slap_stream.text.chat import DEFAULT_CHAT_TEMPLATE, encode
from tests.helpers.templates import (
    ADDED,
    BOS,
    EOS,
    FAMILIES,
    LOSES_EMPTY,
    READS_REASONING,
    SPECIAL,
    Message,
)

CORPUS = [
    "\n\nassistant\n user\n\n\n  Hi there, yes  no\n",
    "  def area(r):\n    return 3\n\n   x ",
]


def byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False),
    )
    return core


def sentencepiece(*, prefix: bool, legacy: bool = False) -> Tokenizer:
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if legacy:
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        scheme = "first" if prefix else "never"
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    spelt = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=460, special_tokens=spelt, show_progress=False)
    )
    # The trainer makes special tokens of the bytes; they are none.
    state = json.loads(core.to_str()) | {"added_tokens": []}
    return Tokenizer.from_str(json.dumps(state))


def finished(core: Tokenizer) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token="<pad>"
    )
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return tokenizer


TOKENIZERS = {
    "byte-level": finished(byte_level()),
    "sentencepiece": finished(sentencepiece(prefix=False)),
    "sentencepiece, prefix": finished(sentencepiece(prefix=True)),
    "sentencepiece, legacy": finished(sentencepiece(prefix=True, legacy=True)),
}

# How a byte-level tokenizer spells bytes; GPT-2's table.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(byte): byte for byte in _PLAIN} | {
    chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in _PLAIN)
}


def surface(token: str, added: dict[str, int], spelling: str) -> bytes:
    """What a token stands for, a blank that its tokenizer made up included."""
    if token in added:
        return token.encode()
    if spelling == "byte-level":
        return bytes(_BYTE_OF[letter] for letter in token)
    if token.startswith("<0x"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


def wanted_labels(
    tokenizer: Any, spelling: str, pieces: list[tuple[str, bool]]
) -> tuple[list[int], list[bool]]:
    """Ids of the text, and which of them hold a byte that is learnt, told by how they are spelt."""
    text = "".join(text for text, _ in pieces).encode()
    learnt = b"".join(bytes([flag]) * len(text.encode()) for text, flag in pieces)
    ids = list(tokenizer(text.decode(), add_special_tokens=False)["input_ids"])
    added, labels, at = tokenizer.get_added_vocab(), [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        spelt = surface(token, added, spelling)
        while not text.startswith(spelt, at):
            assert spelt.startswith(b" "), (token, text[at:])
            spelt = spelt[1:]
        # A blank that was made up, and nothing else, belongs to what follows it.
        labels.append(any(learnt[at : at + max(len(spelt), 1)]))
        at += len(spelt)
    assert at == len(text)
    return ids, labels


SAID = [
    *("Hi there", "yes", " lead", "trail ", "\n\nboth\n", "a\n   b", "", " ", "\n", "ü漢 x"),
    *("<think>\nhm\n</think>\n\nyes", "<think>no", "call </tool_call>", "assistant\n", "   "),
]
said = st.sampled_from(SAID)
lengths = st.none() | st.none() | st.integers(1, 60)


@st.composite
def dialogues(draw: st.DrawFn, reasoning: bool = False) -> list[Message]:
    """Usual and unusual ones; half of them take turns as all templates want it."""
    if draw(st.booleans()):
        roles = ["system"] * draw(st.booleans())
        roles += ["user", "assistant"] * draw(st.integers(1, 3)) + ["user"] * draw(st.booleans())
    else:
        some = st.sampled_from(["user", "assistant", "assistant", "tool"])
        roles = ["system"] * draw(st.booleans()) + draw(st.lists(some, min_size=1, max_size=5))
    messages: list[Message] = [{"role": role, "content": draw(said)} for role in roles]
    asked = False
    for message in messages:
        asked = asked or message["role"] == "user"
        if message["role"] == "assistant":
            if draw(st.integers(0, 5)) == 0:
                message["train"] = False
            # Qwen 3 loses what was thought before any question: refused.
            if reasoning and asked and draw(st.booleans()):
                message["reasoning_content"] = draw(st.sampled_from(["hm", "so\nso", " b "]))
    return messages


@pytest.mark.parametrize("family", FAMILIES)
def test_learnt_are_exactly_the_assistants_turns_and_their_ends(family: str) -> None:
    template, twin = FAMILIES[family]

    @settings(max_examples=60, deadline=None)
    @given(dialogues(family in READS_REASONING), st.sampled_from(list(TOKENIZERS)), lengths)
    def law(messages: list[Message], spelling: str, length: int | None) -> None:
        tokenizer = TOKENIZERS[spelling]
        tokenizer.chat_template = template
        pieces = twin(messages)
        if pieces is None or not any(flag and text for text, flag in pieces):
            with pytest.raises(CorpusError):
                encode(tokenizer, messages)
            return
        if family in LOSES_EMPTY:
            assume(all(m["content"].strip() for m in messages))
        ids, labels = wanted_labels(tokenizer, spelling, pieces)
        encoded = encode(tokenizer, messages, max_length=length)
        assert tokenizer.decode(encoded.input_ids) == tokenizer.decode(ids[:length])
        assert encoded.input_ids == ids[:length]
        assert encoded.supervised == labels[:length]
        assert encoded.truncated == (length is not None and len(ids) > length)

    law()


def turn(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


ASKED = turn("user", "Hi there")
BYTE_LEVEL = TOKENIZERS["byte-level"]


def learnt(template: str, *messages: Message) -> list[str]:
    """Text of each run of learnt tokens, by a byte-level tokenizer."""
    BYTE_LEVEL.chat_template = template
    encoded = encode(BYTE_LEVEL, list(messages))
    runs: list[list[int]] = []
    for n, flag in enumerate(encoded.supervised):
        if flag:
            if not n or not encoded.supervised[n - 1]:
                runs.append([])
            runs[-1].append(encoded.input_ids[n])
    return [BYTE_LEVEL.decode(run) for run in runs]


# Each was learnt otherwise once, without a word, or shut out.
@pytest.mark.parametrize(
    ("family", "messages", "wanted"),
    [
        ("qwen 3", [ASKED, turn("assistant", "yes\n")], ["<think>\n\n</think>\n\nyes\n<|im_end|>"]),
        ("llama 3 original", [ASKED, turn("assistant", "yes")], ["yes<|eot_id|>"]),
        ("chatml without generation prompt", [ASKED, turn("assistant", "yes")], ["yes<|im_end|>"]),
        ("smollm2", [turn("assistant", "yes")], ["yes<|im_end|>"]),
        ("llama 3", [turn("assistant", "yes"), ASKED], ["yes<|eot_id|>"]),
        ("phi 3", [ASKED, turn("assistant", "yes ")], ["yes <|end|>"]),
        ("chatglm 3", [ASKED, turn("assistant", "</tool_call>")], ["\n </tool_call></s>"]),
        (
            "qwen 3",
            [
                ASKED,
                turn("assistant", "<think>\nhm\n</think>\n\nno"),
                ASKED,
                turn("assistant", "x"),
            ],
            ["no<|im_end|>", "<think>\n\n</think>\n\nx<|im_end|>"],
        ),
        (
            "qwen 3",
            [ASKED, turn("assistant", "no"), turn("assistant", "yes")],
            ["no<|im_end|>", "<think>\n\n</think>\n\nyes<|im_end|>"],
        ),
        (
            "gpt-oss",
            [ASKED, turn("assistant", "no"), ASKED, turn("assistant", "x", thinking="hm")],
            [
                "<|channel|>final<|message|>no<|end|>",
                "<|channel|>analysis<|message|>hm<|end|>"
                "<|start|>assistant<|channel|>final<|message|>x<|return|>",
            ],
        ),
        ("deepseek r1", [ASKED, turn("assistant", "<think>\nhm</think>yes")], ["yes</s>"]),
        (
            "mistral 3",
            [turn("system", "x"), ASKED, turn("assistant", "a"), ASKED, turn("assistant", "b")],
            ["a</s>", "b</s>"],
        ),
        (
            "chatml",
            [ASKED, turn("assistant", "wrong", weight=0), ASKED, turn("assistant", "x", weight=1)],
            ["x<|im_end|>"],
        ),
    ],
)
def test_a_label_that_was_wrong_is_right(
    family: str, messages: list[Message], wanted: list[str]
) -> None:
    assert learnt(FAMILIES[family].template, *messages) == wanted


def test_a_turn_that_is_not_to_be_learnt_is_left_out_of_generation_blocks() -> None:
    template = DEFAULT_CHAT_TEMPLATE
    wrong = turn("assistant", "no", train=False)
    assert learnt(template, ASKED, wrong, ASKED, turn("assistant", "yes")) == ["yes</s>"]
    assert learnt(template, ASKED, turn("assistant", "a"), wrong) == ["a</s>"]
    one_block = (
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    )
    with pytest.raises(CorpusError, match="a block holds a turn that is learnt and one that is no"):
        learnt(one_block, ASKED, wrong, ASKED, turn("assistant", "yes"))
    none = "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}x{% endgeneration %}"
    with pytest.raises(CorpusError, match="a turn that is not to be learnt lies in no block"):
        learnt(none, ASKED, wrong, turn("assistant", "yes"))


def test_an_answer_that_ends_a_generation_block_is_ended() -> None:
    # Where a block ends with the answer itself and nothing follows, nothing would end the turn.
    template = (
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "\n{% endfor %}"
    )
    said = turn("assistant", "call </tool_call>")
    assert learnt(template, ASKED, said, ASKED, said) == [said["content"], said["content"] + EOS]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("chatml", [ASKED, turn("assistant", "x", weight=0.5)], "weight of a turn must be true, f"),
        ("chatml", [ASKED, turn("assistant", "x", train="no")], "train of a turn must be true, f"),
        ("chatml", [ASKED, turn("assistant", "x", train=False)], "one turn of role 'assistant' th"),
        (
            "chatml",
            [ASKED, turn("assistant", "x", reasoning="y")],
            "must write 'reasoning_content'",
        ),
        (
            "chatml",
            [ASKED | {"tools": [{"a": 1}]}, turn("assistant", "x")],
            "must write 'tools' wh",
        ),
        ("llama 2", [ASKED, ASKED, turn("assistant", "x")], "it says: Conversation roles must alt"),
        ("qwen 2.5", [ASKED, turn("assistant", None)], "must fit the tokenizer's chat template, g"),
    ],
)
def test_what_cannot_be_used_is_refused(
    template: str, messages: list[Message], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        learnt(FAMILIES[template].template, *messages)


TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.name }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = turn("assistant", "", tool_calls=[{"function": {"name": "area", "arguments": {}}}])


def test_tools_are_written_and_calls_are_learnt() -> None:
    tools = [{"type": "function", "function": {"name": "area"}}]
    messages = [ASKED | {"tools": tools}, CALL, turn("tool", "12"), turn("assistant", "x")]
    assert learnt(TOOLS, *messages) == ["<tool_call>area</tool_call><|im_end|>", "x<|im_end|>"]
    written = BYTE_LEVEL.decode(encode(BYTE_LEVEL, messages).input_ids)
    assert written.startswith(f"<|im_start|>system\n{json.dumps(tools)}<|im_end|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TOOLS.replace("call.function.name", "''"), "it leaves a tool call out"),
        (
            TOOLS.replace("m.content or ''", "m.content|tojson if m.role == 'tool' else m.content"),
            "a tool's answer in another form",
        ),
        (TOOLS.replace("<|im_end|>", ""), "it ends a tool call by no token of a turn"),
    ],
)
def test_a_call_that_is_not_written_where_it_can_be_found_is_refused(
    template: str, message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        learnt(template, ASKED, CALL | {"content": "y"}, turn("tool", "12"), turn("assistant", "x"))


def test_answers_that_share_their_first_token_with_the_header_are_counted() -> None:
    def shared(family: str, *said: str) -> int:
        BYTE_LEVEL.chat_template = FAMILIES[family].template
        messages = [message for text in said for message in (ASKED, turn("assistant", text))]
        return encode(BYTE_LEVEL, messages).shared

    assert shared("chatml", "yes", "\n\nyes", "yes", "\n\nyes\n\n") == 2
    assert shared("llama 3", "\n\nyes") == 0
    # A blank of the template's own: every answer begins so, also at inference.
    assert shared("llama 2", "yes") == 0
    assert shared("mistral 1", "yes") == 0


def test_a_header_that_swallows_an_answers_blanks_is_not_learnt() -> None:
    # As Phi-3's tokens do.
    core = sentencepiece(prefix=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)
    tokenizer.add_tokens([AddedToken("<|assistant|>", rstrip=True), "<|end|>", "<|user|>"])
    tokenizer.chat_template = FAMILIES["phi 3"].template
    encoded = encode(tokenizer, [ASKED, turn("assistant", "\n yes")])
    header = encoded.input_ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>"))
    assert not any(encoded.supervised[: header + 1])
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids[header + 1]) == "yes"
    assert encoded.supervised[header + 1 :] == [True, True, False, False]
    assert encoded.shared == 1


def test_no_end_of_a_turn_at_all_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="an eos_token, or a chat_template that ends turns"):
        encode(tokenizer, [ASKED, turn("assistant", "yes")])


def test_special_tokens_that_change_change_what_is_learnt() -> None:
    tokenizer = finished(byte_level())
    tokenizer.chat_template = FAMILIES["mistral 1"].template
    messages = [ASKED, turn("assistant", "yes")]
    assert encode(tokenizer, messages).input_ids[-2] == tokenizer.convert_tokens_to_ids(EOS)
    tokenizer.eos_token = "<|end|>"
    encoded = encode(tokenizer, messages)
    assert encoded.input_ids[-2] == tokenizer.convert_tokens_to_ids("<|end|>")
    assert encoded.supervised[-2:] == [True, False]


def test_labels_are_those_of_trl() -> None:
    trl = find_spec("trl")  # importing it takes seconds
    if trl is None or trl.origin is None:
        pytest.skip("TRL is not of the pinned stack")
    folder = Path(trl.origin).parent / "chat_templates"
    names = ("qwen3", "llama3", "gemma", "phi3", "qwen2_5", "cohere2", "deepseekv3", "gptoss")
    messages = [ASKED, turn("assistant", "no"), ASKED, turn("assistant", "yes  no")]
    for name in names:
        template = (folder / f"{name}_training.jinja").read_text()
        tokenizer = finished(byte_level())
        tokens = re.findall(r"<[|\uff5c][^<>\s'{}]+[|\uff5c]>", template)
        tokenizer.add_tokens(sorted(set(tokens)), special_tokens=True)
        tokenizer.chat_template = template
        theirs = tokenizer.apply_chat_template(
            messages, return_assistant_tokens_mask=True, return_dict=True
        )
        ours = encode(tokenizer, messages)
        assert ours.input_ids == theirs["input_ids"]
        assert ours.supervised == [bool(flag) for flag in theirs["assistant_masks"]], name
        # Without their marks: what they mark, but for headers and what follows the end.
        tokenizer.chat_template = (folder / f"{name}.jinja").read_text()
        found = encode(tokenizer, messages)
        for said in ("no", "yes  no"):
            run = tokenizer(said, add_special_tokens=False)["input_ids"]
            assert _learnt_after(found, run) == _learnt_after(ours, run), name


def _learnt_after(encoded: Any, run: list[int]) -> list[int]:
    """These learnt ids and the learnt special tokens that follow them."""
    ids = encoded.input_ids
    at = max(n for n in range(len(ids)) if ids[n : n + len(run)] == run and encoded.supervised[n])
    assert all(encoded.supervised[at : at + len(run)])
    stop = at + len(run)
    newline = BYTE_LEVEL.convert_tokens_to_ids("Ċ")
    while stop < len(ids) and encoded.supervised[stop] and ids[stop] != newline:
        stop += 1
    return ids[at:stop]
