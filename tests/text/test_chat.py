"""Which tokens of a conversation are learnt, with any tokenizer; batches of them."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from slap_stream.errors import ConfigError, CorpusError, SlapStreamError
from slap_stream.text import template as chat_template
from slap_stream.text.chat import DEFAULT_CHAT_TEMPLATE, Encoded, cut, encode
from slap_stream.text.collate import ChatCollator

TEXT = ["The quick brown fox jumps over the lazy dog.\n", "def area(r): return 3 * r ** 2  # äöü"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{%- for m in messages -%}\n"
    "{{- '<|im_start|>' + m['role'] + '\\n' -}}\n"
    "{%- if m['role'] == 'assistant' -%}\n"
    "    {%- generation -%}\n"
    "    {{- m['content'] + '<|im_end|>' -}}\n"
    "    {%- endgeneration -%}\n"
    "    {{- '\\n' -}}\n"
    "{%- else -%}{{- m['content'] + '<|im_end|>\\n' -}}{%- endif -%}\n"
    "{%- endfor -%}"
)
# Writes an empty thinking block into the last turn only, so that a shorter conversation is no
# prefix of a longer one.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].strip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<s>", "<pad>"]


def byte_level(template: str | None, **tokens: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return as_hugging_face(core, template, **tokens)


def metaspace(template: str | None, **tokens: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    return as_hugging_face(core, template, **tokens)


def as_hugging_face(core: Tokenizer, template: str | None, **tokens: Any) -> Any:
    names = {"eos_token": "<|im_end|>", "bos_token": "<s>", "pad_token": "<pad>", **tokens}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = template
    return tokenizer


class CharacterTokenizer(PreTrainedTokenizer):
    """A slow tokenizer: no offsets. `merge` makes one token of a string that crosses turns."""

    def __init__(self, merge: str = "", **tokens: Any) -> None:
        self.merge = merge
        super().__init__(eos_token="<|im_end|>", pad_token="<pad>", **tokens)

    @property
    def vocab_size(self) -> int:
        return 70_000

    def get_vocab(self) -> dict[str, int]:
        return dict(self.added_tokens_encoder)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self.merge and self.merge in text:
            before, after = text.split(self.merge, 1)
            return [*before, self.merge, *after]
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token[0]) + 1000 * (len(token) > 1)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


TOKENIZERS = {"byte_level": byte_level, "metaspace": metaspace}
TEMPLATES = {"chatml": CHATML, "marked": CHATML_MARKED, "qwen3": QWEN3, "default": None}


def learnt(tokenizer: Any, encoded: Any) -> list[str]:
    """Text of each run of supervised tokens."""
    runs: list[list[int]] = []
    previous = False
    for token, flag in zip(encoded.input_ids, encoded.supervised, strict=True):
        if flag and not previous:
            runs.append([])
        if flag:
            runs[-1].append(token)
        previous = flag
    return [tokenizer.decode(run) for run in runs]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


DIALOGUE = [
    turn("system", "Be brief."),
    turn("user", "The fox?"),
    turn("assistant", "jumps over"),
    turn("user", "The dog?"),
    turn("assistant", "lazy"),
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_exactly_the_assistants_words_and_their_end_mark_are_learnt(
    kind: str, template: str
) -> None:
    tokenizer = TOKENIZERS[kind](TEMPLATES[template])
    encoded = encode(tokenizer, DIALOGUE)
    thinking = "<think>\n\n</think>\n\n" if template == "qwen3" else ""
    # "\nj" starts a metaspace piece; the blank that a decoder drops or adds is not the question.
    assert [text.strip() for text in learnt(tokenizer, encoded)] == [
        "jumps over<|im_end|>",
        thinking + "lazy<|im_end|>",
    ]
    assert not encoded.truncated


def test_the_ids_are_those_of_the_whole_conversation() -> None:
    tokenizer = byte_level(CHATML)
    whole = tokenizer.apply_chat_template(DIALOGUE, return_dict=False)
    assert encode(tokenizer, DIALOGUE).input_ids == whole
    marked = byte_level(CHATML_MARKED)
    theirs = marked.apply_chat_template(
        DIALOGUE, return_assistant_tokens_mask=True, return_dict=True
    )
    ours = encode(marked, DIALOGUE)
    assert ours.input_ids == theirs["input_ids"]
    assert ours.supervised == [bool(flag) for flag in theirs["assistant_masks"]]


def test_a_prompt_at_inference_is_a_prefix_of_what_was_trained_on() -> None:
    tokenizer = byte_level(None)
    encoded = encode(tokenizer, DIALOGUE)
    prompt = tokenizer.apply_chat_template(
        DIALOGUE[:-1],
        chat_template=DEFAULT_CHAT_TEMPLATE,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert encoded.input_ids[: len(prompt)] == prompt
    assert all(encoded.supervised[len(prompt) : -1])
    assert not encoded.supervised[len(prompt) - 1]
    assert not encoded.supervised[-1]


def test_a_turn_that_starts_with_a_blank_is_learnt_whole() -> None:
    # Hugging Face's own mask loses this turn: its first character lies in no token's range.
    for template in TEMPLATES.values():
        tokenizer = byte_level(template)
        messages = [turn("user", "fox"), turn("assistant", "   over   the  ")]
        text = learnt(tokenizer, encode(tokenizer, messages))
        wanted = "over   the" if template == QWEN3 else "   over   the  "
        assert text[0].lstrip("\n").removeprefix("<think>\n\n</think>\n\n") == wanted + "<|im_end|>"


words = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="<>|[]\ufdd0"),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(words, words.filter(str.strip)), min_size=1, max_size=3),
    template=st.sampled_from([CHATML, CHATML_MARKED, DEFAULT_CHAT_TEMPLATE, MISTRAL]),
)
def test_any_conversation_is_split_at_its_turns(
    turns: list[tuple[str, str]], template: str, tokenizers: dict[str, Any]
) -> None:
    tokenizer = tokenizers[template]
    messages = [
        message
        for question, answer in turns
        for message in (turn("user", question), turn("assistant", answer))
    ]
    encoded = encode(tokenizer, messages)
    found = learnt(tokenizer, encoded)
    assert len(found) == len(turns)
    for text, (_, answer) in zip(found, turns, strict=True):
        # A token may straddle the blank between a header and a turn, and nothing else.
        assert text.endswith(answer + "<|im_end|>")
        assert not text.removesuffix(answer + "<|im_end|>").strip()


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    templates = (CHATML, CHATML_MARKED, DEFAULT_CHAT_TEMPLATE, MISTRAL)
    return {template: byte_level(template) for template in templates}


def test_a_plain_document_is_learnt_whole_and_ended() -> None:
    tokenizer = byte_level(CHATML)
    encoded = encode(tokenizer, [turn("text", "The quick brown fox")])
    assert tokenizer.decode(encoded.input_ids) == "The quick brown fox<|im_end|>"
    assert all(encoded.supervised)


def test_a_tokenizer_without_template_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level(None)
    chat_template._tell_of_default.cache_clear()
    for _ in range(2):
        encode(tokenizer, [turn("user", "Hi."), turn("assistant", "Yes.")])
    [record] = caplog.records
    assert "has no chat_template: turns are written as '<|user|>" in record.getMessage()


def test_a_template_that_ends_no_turn_is_ended() -> None:
    glm = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_level(glm)
    assert learnt(tokenizer, encode(tokenizer, DIALOGUE)) == ["jumps over", "lazy<|im_end|>"]
    asked = [*DIALOGUE, turn("user", "Why?")]
    assert learnt(tokenizer, encode(tokenizer, asked)) == ["jumps over", "lazy"]


def test_truncation_keeps_the_start_and_is_told() -> None:
    tokenizer = byte_level(CHATML)
    whole = encode(tokenizer, DIALOGUE)
    cut = encode(tokenizer, DIALOGUE, max_length=10)
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[:10]
    assert cut.supervised == whole.supervised[:10]
    assert not encode(tokenizer, DIALOGUE, max_length=len(whole.input_ids)).truncated


def test_a_slow_tokenizer_works_without_offsets() -> None:
    tokenizer = CharacterTokenizer()
    encoded = encode(tokenizer, DIALOGUE)
    text = tokenizer.apply_chat_template(
        DIALOGUE, chat_template=DEFAULT_CHAT_TEMPLATE, tokenize=False
    )
    # One id per character, but one for each end mark.
    end = tokenizer.eos_token_id
    assert len(encoded.input_ids) == len(text) - 2 * (len("<|im_end|>") - 1)
    assert "".join(
        "$" if token == end else chr(token)
        for token, flag in zip(encoded.input_ids, encoded.supervised, strict=True)
        if flag
    ) == ("jumps over$lazy$")


def test_a_slow_tokenizer_that_merges_across_turns_is_refused() -> None:
    with pytest.raises(CorpusError, match="tokenizer must split the text at the borders of turns"):
        encode(CharacterTokenizer(merge=">\nj"), DIALOGUE)


PADDING = (
    "{% for m in messages %}{{ m['content'] }}{% if ' ' in m['content'] %} Amen.{% endif %}"
    "<|im_end|>{% endfor %}"
)
TAIL = "{% for m in messages %}{{ (m['content'] ~ '').split(' ')[-1] }}<|im_end|>{% endfor %}"
HEAD = "{% for m in messages %}{{ (m['content'] ~ '').split(' ')[0] }}{% endfor %}"
SHOUTING = "{% for m in messages %}{{ m['content'] | upper }}{{ loop.last }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            CHATML,
            [turn("user", "fox")],
            "at least one turn of role 'assistant' that is to be learnt, got roles",
        ),
        (CHATML, [], "at least one turn of role 'assistant' that is to be learnt, got roles"),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
            [turn("user", "fox"), turn("assistant", "")],
            "all its turns are empty",
        ),
        (CHATML, [turn("text", "fox"), turn("user", "fox")], "all of role 'text' or none"),
        (MISTRAL, DIALOGUE, "it says: Only user and assistant roles are supported!"),
        (SHOUTING, DIALOGUE[2:], "where it can be located; it leaves a turn out"),
        (PADDING, DIALOGUE, "where it can be located; it adds to what the assistant says"),
        (TAIL, DIALOGUE, "where it can be located; it begins a turn in another way than others"),
        (HEAD, DIALOGUE, "where it can be located; it cuts off how a turn ends"),
        (
            CHATML_MARKED,
            [turn("user", "a\ufdd0"), turn("assistant", "b")],
            "must not hold the noncharacters",
        ),
    ],
)
def test_a_record_that_cannot_be_learnt_from_says_why(
    template: str, messages: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        encode(byte_level(template), messages)


def test_a_tokenizer_that_cannot_end_a_turn_is_refused() -> None:
    with pytest.raises(ConfigError, match="a chat_template or an eos_token, got neither"):
        encode(byte_level(None, eos_token=None), DIALOGUE)
    with pytest.raises(ConfigError, match="max_length must be a positive number"):
        encode(byte_level(CHATML), DIALOGUE, max_length=0)


TOKENISED = {"input_ids": [5, 6, 7, 8], "supervised": [1, 0, 1, 1]}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_pads_and_labels_only_what_is_learnt(side: Any) -> None:
    tokenizer = byte_level(CHATML)
    records = [DIALOGUE, DIALOGUE[:3]]
    encoded = [encode(tokenizer, messages) for messages in records]
    collate = ChatCollator(tokenizer, padding_side=side, pad_to_multiple_of=8)
    batch = collate([{"id": "a", "messages": messages} for messages in records])
    width = batch["input_ids"].shape[1]
    assert width % 8 == 0
    assert width - 8 < max(len(record.input_ids) for record in encoded) <= width
    for row, record in enumerate(encoded):
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == record.input_ids
        assert (batch["input_ids"][row][~real] == tokenizer.pad_token_id).all()
        assert (batch["labels"][row] != -100)[real].tolist() == record.supervised
        assert (batch["labels"][row][~real] == -100).all()
        learnt_here = batch["labels"][row] != -100
        assert torch.equal(batch["labels"][row][learnt_here], batch["input_ids"][row][learnt_here])
        padding = len(record.input_ids) if side == "right" else width - len(record.input_ids)
        first, second = real[:padding], real[padding:]
        assert first.all() if side == "right" else second.all()
        assert not (second if side == "right" else first).any()
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_without_padding_records_follow_each_other_in_one_row() -> None:
    tokenizer = byte_level(CHATML)
    samples = [{"messages": DIALOGUE}, {"messages": DIALOGUE[:3]}, TOKENISED]
    padded = ChatCollator(tokenizer, max_length=40)(samples)
    row = ChatCollator(tokenizer, max_length=40, packing="padding_free")(samples)
    real = padded["attention_mask"].bool()
    assert torch.equal(row["input_ids"][0], padded["input_ids"][real])
    assert torch.equal(row["position_ids"][0], (real.cumsum(1) - 1)[real])
    first = row["position_ids"][0] == 0
    # The third record is learnt from its first token on, which nothing may predict here.
    assert padded["labels"][2, 0] == 5
    assert (row["labels"][0][first] == -100).all()
    assert torch.equal(row["labels"][0][~first], padded["labels"][real][~first])
    # With a cache transformers' models would let the records see each other.
    assert row.keys() == {"input_ids", "position_ids", "labels", "use_cache"}
    assert row["use_cache"] is False


@given(length=st.integers(2, 60), begins=st.booleans(), prompt=st.integers(1, 60))
def test_a_long_record_keeps_what_truncate_says(length: int, begins: bool, prompt: int) -> None:
    tokenizer = byte_level(CHATML)
    tokenizer.bos_token = tokenizer.eos_token
    first = [tokenizer.bos_token_id] if begins else []
    ids = [*first, *range(5, 5 + prompt + 6)]
    supervised = [False] * (len(ids) - 6) + [True] * 6
    whole = Encoded(input_ids=ids, supervised=supervised, truncated=False)
    right = cut(whole, tokenizer, length, "right")
    left = cut(whole, tokenizer, length, "left")
    fits = len(ids) <= length
    assert cut(whole, tokenizer, length, "drop") == (whole if fits else None)
    assert cut(whole, tokenizer, None, "left") is whole
    if fits:
        assert left == right == whole
        return
    assert right.truncated
    assert left.truncated
    assert right.input_ids == ids[:length]
    assert right.supervised == supervised[:length]
    assert len(left.input_ids) == len(left.supervised) == length
    assert left.input_ids[len(first) :] == ids[len(ids) - length + len(first) :]
    assert left.input_ids[: len(first)] == first
    # The target is kept as far as it fits.
    assert sum(left.supervised) == min(6, length - len(first))


def test_a_prompt_that_fills_max_length_is_cut_from_the_left() -> None:
    tokenizer = byte_level(CHATML)
    chat = {
        "id": "r7",
        "messages": [
            {"role": "user", "content": "why " * 40},
            {"role": "assistant", "content": "because"},
        ],
    }
    whole = encode(tokenizer, chat["messages"])
    tokens = {"input_ids": whole.input_ids, "supervised": whole.supervised}
    for sample in (chat, tokens):
        batch = ChatCollator(tokenizer, max_length=32, truncate="left")([sample])
        learnt = batch["labels"][0][batch["labels"][0] != -100].tolist()
        assert tokenizer.decode(learnt) == "because<|im_end|>"
        assert batch["input_ids"].shape == (1, 32)
    with pytest.raises(CorpusError, match="keep the end with truncate='left', or leave"):
        ChatCollator(tokenizer, max_length=32)([chat])
    with pytest.raises(
        CorpusError,
        match=rf"at most max_length = 32 tokens with truncate='drop', got {len(whole.input_ids)} in"
        " record 'r7'; raise max_length",
    ):
        ChatCollator(tokenizer, max_length=32, truncate="drop")([chat])
    assert ChatCollator(tokenizer, max_length=999, truncate="drop")([chat])["labels"].any()
    with pytest.raises(ConfigError, match="truncate must be one of right, left, drop, got 'both'"):
        ChatCollator(tokenizer, max_length=32, truncate="both")
    with pytest.raises(ConfigError, match="truncate must be 'right' without max_length, got 'lef"):
        ChatCollator(tokenizer, truncate="left")


def test_tokenised_and_raw_records_collate_alike() -> None:
    tokenizer = byte_level(CHATML)
    encoded = encode(tokenizer, DIALOGUE)
    tokenised = {
        "id": "a",
        "input_ids": np.array(encoded.input_ids, dtype=np.int32),
        "supervised": np.array(encoded.supervised, dtype=np.uint8),
    }
    for length in (None, 40):
        collate = ChatCollator(tokenizer, max_length=length)
        raw = collate([{"messages": DIALOGUE}])
        assert all(torch.equal(raw[key], collate([tokenised])[key]) for key in raw)


def test_a_tokenizer_without_padding_token_still_pads() -> None:
    tokenizer = byte_level(CHATML, pad_token=None)
    batch = ChatCollator(tokenizer)([{"messages": DIALOGUE}, {"messages": DIALOGUE[:3]}])
    assert batch["attention_mask"].sum(dim=1).tolist() == [
        len(encode(tokenizer, messages).input_ids) for messages in (DIALOGUE, DIALOGUE[:3])
    ]


def test_a_collator_survives_the_way_to_a_worker() -> None:
    collate = ChatCollator(byte_level(CHATML_MARKED), max_length=64)
    again = pickle.loads(pickle.dumps(collate))
    assert torch.equal(
        again([{"messages": DIALOGUE}])["labels"], collate([{"messages": DIALOGUE}])["labels"]
    )


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"id": "r7", "messages": [turn("user", "x")]}, "record 'r7': messages must hold at least"),
        ({"text": "x"}, r"got the columns \['text'\] in a record"),
        (
            {"id": "r7", "messages": DIALOGUE},
            r"got none in record 'r7' \(max_length 8\); raise max_length, keep",
        ),
        (
            {"id": "r7", "input_ids": [1, 2], "supervised": [1]},
            r"supervised must be as long as input_ids \(2\), got 1 in record 'r7'",
        ),
        ({"input_ids": [1, 2], "supervised": [1, 0]}, "at least one token after the first"),
    ],
)
def test_a_bad_record_is_named(sample: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        ChatCollator(byte_level(CHATML), max_length=8)([sample])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"padding_side": "top"}, "padding_side must be one of right, left, got 'top'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be a positive number"),
        ({"packing": "bfd"}, "packing must be one of None, 'padding_free', got 'bfd'"),
        (
            {"packing": "padding_free", "pad_to_multiple_of": 8},
            "must be left out with packing, got 'right' and 8; there is no padding",
        ),
    ],
)
def test_a_collators_settings_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChatCollator(byte_level(CHATML), **arguments)
    with pytest.raises(SlapStreamError, match="at least one record"):
        ChatCollator(byte_level(CHATML))([])


@pytest.mark.parametrize("tokenizer", [None, "path/to/model"])
def test_what_is_no_tokenizer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="tokenizer must be a Hugging Face tokenizer, got"):
        ChatCollator(tokenizer)
