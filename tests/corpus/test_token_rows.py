"""Rows that were tokenised before: what is learnt is what their labels or masks say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slap_stream.corpus import convert as convert_module
from slap_stream.corpus import peeking, records
from slap_stream.corpus.convert import convert
from slap_stream.corpus.messages import RecordDropped
from slap_stream.corpus.records import normalise
from slap_stream.corpus.token_rows import TOKEN_FIELDS, holds_tokens, read_tokens
from slap_stream.embeddings.corpus_texts import CorpusTexts
from slap_stream.errors import ConfigError, CorpusError
from slap_stream.integrations.prepare import prepare
from slap_stream.shards.reader import iter_corpus
from slap_stream.text.collate import ChatCollator
from tests.test_training import byte_tokenizer

datasets = pytest.importorskip("datasets")

TOKEN = st.integers(3, 90)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, list[int]]:
    """Ids with any of the fields that say what is learnt; padding on either side."""
    ids = draw(st.lists(TOKEN, min_size=2, max_size=9))
    bits = st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids))
    row = {"input_ids": ids}
    for name in draw(st.sets(st.sampled_from(["completion_mask", "assistant_masks", "labels"]))):
        row[name] = draw(bits)
    if "labels" in row:
        pairs = zip(ids, row["labels"], strict=True)
        row["labels"] = [token if bit else -100 for token, bit in pairs]
    if draw(st.booleans()):
        hidden, before = draw(st.integers(0, len(ids) - 1)), draw(st.booleans())
        mask = [0] * hidden + [1] * (len(ids) - hidden)
        row["attention_mask"] = mask if before else mask[::-1]
    return row


def learnt(row: dict[str, list[int]], at: int) -> bool:
    """The obvious twin: whether a token of a row is learnt."""
    if "labels" in row:
        return row["labels"][at] != -100
    return all(row[name][at] for name in ("completion_mask", "assistant_masks") if name in row)


@given(row=rows())
def test_labels_are_those_of_the_row_without_its_padding(row: dict[str, list[int]]) -> None:
    tokens = normalise({**row, "text": "not used"}, tokenised=True).tokens
    assert tokens is not None
    shown = row.get("attention_mask", [1] * len(row["input_ids"]))
    kept = [at for at, one in enumerate(shown) if one]
    expected = [row["input_ids"][at] if learnt(row, at) else -100 for at in kept]
    if not any(label != -100 for label in expected[1:]):
        with pytest.raises(CorpusError, match="supervised must mark at least one token"):
            ChatCollator(byte_tokenizer())([tokens])
        return
    batch = ChatCollator(byte_tokenizer())([tokens])
    assert batch["input_ids"].tolist() == [[row["input_ids"][at] for at in kept]]
    assert batch["labels"].tolist() == [expected]
    assert batch["attention_mask"].tolist() == [[1] * len(kept)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"position_ids": [0, 1, 0]}, "several samples in one row: position_ids"),
        ({"seq_lengths": [2, 1]}, "several samples in one row: seq_lengths"),
        ({"labels": [6, 7, -100]}, "labels that are neither the token ids nor -100"),
        ({"labels": [5, 6]}, "token ids that do not go together: 3 ids, 2 of labels"),
        ({"attention_mask": [1, 1, 1, 1]}, "do not go together: 3 ids, 4 of attention_mask"),
        ({"input_ids": [[5], [6]]}, "input_ids that is no list of whole numbers"),
        ({"completion_mask": [0.5, 1.0, 1.0]}, "completion_mask that is no list of whole numbers"),
    ],
)
def test_rows_that_hold_no_one_sample_are_left_out_by_name(
    row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RecordDropped, match=reason):
        read_tokens({"input_ids": [5, 6, 7], **row})


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_rows_of_a_dataset_with_a_format_are_rows(form: str) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 0]}
    masked = {"input_ids": [5, 6], "completion_mask": [0, 1], "labels": [], "position_ids": []}
    for plain in (row, masked):
        [formatted] = datasets.Dataset.from_list([plain]).with_format(form)
        assert not isinstance(formatted["input_ids"], list)
        assert read_tokens(formatted) == read_tokens(plain)
        assert holds_tokens(formatted)
    [empty] = datasets.Dataset.from_list([{"input_ids": []}]).with_format(form)
    assert not holds_tokens(empty)
    with pytest.raises(RecordDropped, match="input_ids that is no list of whole numbers"):
        read_tokens(datasets.Dataset.from_list([{"input_ids": [0.5]}]).with_format(form)[0])


def test_a_corpus_of_tokens_is_cut_and_embedded_by_the_texts(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    text = [int(token) for token in tokenizer("What is it? It is a test.")["input_ids"]]
    padding = [tokenizer.pad_token_id] * 3
    table = [
        {
            "id": f"row {n}",
            "input_ids": text + padding,
            "attention_mask": [1] * len(text) + [0] * 3,
            "labels": [-100] * 11 + text[11:] + [-100] * 3,
            "number": n,
        }
        for n in range(3)
    ]
    table.append({**table[0], "id": "unknown", "input_ids": [*text, 99_999, *padding[:2]]})
    table[-1] |= {"labels": None, "attention_mask": None}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    dataset = datasets.Dataset.from_list(table)
    made = {
        length: convert(
            dataset, tmp_path / str(length), tokenizer=tmp_path / "tokenizer", max_length=length
        )
        for length in (None, 15)
    }
    for length, report in made.items():
        assert report.num_samples == 3
        assert report.dropped == {
            "token ids that do not go together: the tokenizer has no 99999": 1
        }
        assert report.unused == {"number": 4}
        samples = list(iter_corpus(tmp_path / str(length)))
        assert {sample["id"] for sample in samples} == {"row 0", "row 1", "row 2"}
        for sample in samples:
            row = table[int(sample["id"][-1])]
            whole = length is None
            assert sample["input_ids"].tolist() == (row["input_ids"] if whole else text[:15])
            assert sample["attention_mask"].tolist() == (
                row["attention_mask"] if whole else [1] * 15
            )
        [first, *_] = CorpusTexts(corpus_dir=tmp_path / str(length)).found().read(0, 3)
        assert first.length == (length or len(text))
        assert first.prompt == tokenizer.decode(text[:11])
        assert first.target == tokenizer.decode(text[11:length])


def test_without_the_tokenizer_tokens_are_refused_and_texts_beside_them_count(
    tmp_path: Path,
) -> None:
    rows = [{"text": f"text {n}", "input_ids": [5, 6, 7 + n]} for n in range(4)]
    both = datasets.Dataset.from_list(rows)
    for make in (prepare, convert):
        with pytest.raises(ConfigError, match="tokenizer must be the one that made the dataset's"):
            make(both.remove_columns("text"), tmp_path / "none")
    lines = tmp_path / "tokens.jsonl"
    lines.write_text('{"input_ids": [5, 6]}\n')
    with pytest.raises(CorpusError, match=r"known shapes, got the fields .*if there is a tokeni"):
        convert(lines, tmp_path / "none")
    assert "messages" in next(iter_corpus(prepare(both, tmp_path / "texts").corpus))
    found = prepare(both, tmp_path / "tokens", tokenizer=byte_tokenizer())
    ids = [sample["input_ids"].tolist() for sample in iter_corpus(found.corpus)]
    assert sorted(ids) == [row["input_ids"] for row in rows]
    assert set(TOKEN_FIELDS) & set(both.column_names) == {"input_ids"}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_corpus_of_the_texts_beside_tokens_is_not_taken_for_one_of_tokens(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = datasets.Dataset.from_list(
        [{"text": f"text {n}", "input_ids": [5, 6, 7 + n]} for n in range(4)]
    )
    files = tmp_path / f"rows.{ending}"
    (rows.to_json if ending == "jsonl" else rows.to_parquet)(files)
    # As it was: the texts counted, whatever stood beside them.
    with monkeypatch.context() as before:
        for module in (convert_module, peeking, records):
            before.setattr(module, "holds_tokens", lambda _: False)
        made = prepare(files, tmp_path / "prepared", tokenizer=tokenizer)
        convert(files, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    found = prepare(files, tmp_path / "prepared", tokenizer=tokenizer)
    assert found.corpus != made.corpus
    ids = [sample["input_ids"].tolist() for sample in iter_corpus(found.corpus)]
    assert sorted(ids) == rows["input_ids"]
    with pytest.raises(CorpusError, match="out must be new, empty or left by the same call"):
        convert(files, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert prepare(files, tmp_path / "prepared", tokenizer=tokenizer).found
