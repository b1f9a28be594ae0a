"""Datasets that are loaded are read as their users see them, and known again."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream import convert
from slap_stream.corpus import inputs
from slap_stream.corpus.inputs import cut, find_inputs
from slap_stream.corpus.loaded import check_loaded
from slap_stream.corpus.readers import read
from slap_stream.corpus.records import COLUMNS
from slap_stream.errors import CorpusError
from slap_stream.shards.reader import iter_corpus
from tests.helpers.plain_corpora import pair, shards_of

RECORDS = [{"id": f"r{n}", "source": f"s{n % 3}", **pair(n)} for n in range(100)]


def numbers(count: int) -> Iterator[dict[str, Any]]:
    """What a stream is made of."""
    for n in range(count):
        yield {"text": f"text {n}"}


def rows_of(dataset: Any) -> list[Any]:
    (entry,) = find_inputs([dataset])
    return [row for piece in cut(entry) for row in read(piece, COLUMNS)]


@settings(max_examples=25)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=30),
    order=st.randoms(use_true_random=False),
    piece_bytes=st.integers(1, 200),
)
def test_pieces_of_a_dataset_are_its_rows(texts: list[str], order: Any, piece_bytes: int) -> None:
    places = order.sample(range(len(texts)), order.randint(1, len(texts)))
    dataset = Dataset.from_dict({"content": texts, "unused": [b"x"] * len(texts)})
    dataset = dataset.select(places).rename_column("content", "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "PIECE_BYTES", piece_bytes)
        (entry,) = find_inputs([dataset])
        pieces = cut(entry)
        assert sum(piece.num_bytes for piece in pieces) <= entry.text_bytes
        assert (len(pieces) > 1) == (len(places) > 1 and entry.text_bytes > piece_bytes)
        assert rows_of(dataset) == [{"text": texts[place]} for place in places]


def test_a_dataset_makes_the_shards_that_its_lines_would_make(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    convert(tmp_path / "lines.jsonl", tmp_path / "lines")
    convert(Dataset.from_list(RECORDS), tmp_path / "dataset")
    assert shards_of(tmp_path / "dataset") == shards_of(tmp_path / "lines")


def test_a_stream_makes_a_corpus_of_its_rows(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(numbers, gen_kwargs={"count": 50}).skip(3).take(40)
    report = convert(stream, tmp_path / "out", progress=True)
    samples = list(iter_corpus(tmp_path / "out", 0, 40))
    found = {sample["id"]: sample["messages"][0]["content"] for sample in samples}
    assert found == {f"dataset-{n}": f"text {n + 3}" for n in range(40)}
    assert report.counts == {"dataset": 40}
    assert list(found) != sorted(found, key=lambda name: int(name.split("-")[1]))


def test_several_loaded_datasets_are_sources_of_their_own(tmp_path: Path) -> None:
    texts = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    report = convert([texts, texts.select([1])], tmp_path / "out")
    assert report.counts == {"dataset": 2, "dataset-2": 1}


def test_values_are_what_the_dataset_gives_for_them(tmp_path: Path) -> None:
    """Content of several kinds is stored as JSON, and is no JSON to its user."""
    mixed = [
        {"role": "user", "content": [{"type": "text", "text": "one"}]},
        {"role": "assistant", "content": "two"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": mixed}) + "\n")
    dataset = load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    (row,) = rows_of(dataset)
    assert row["messages"] == mixed


def test_a_dataset_on_disk_travels_by_its_name_and_one_in_memory_not_at_all(
    tmp_path: Path,
) -> None:
    in_memory = Dataset.from_list(RECORDS * 50)
    in_memory.save_to_disk(tmp_path / "saved")
    on_disk = Dataset.load_from_disk(tmp_path / "saved").select(range(5, 9))
    (entry,) = find_inputs([on_disk])
    assert entry.travels
    (piece,) = cut(entry)
    sent = pickle.dumps(piece)
    assert len(sent) < 20_000
    assert list(read(pickle.loads(sent), ["id"])) == [{"id": r["id"]} for r in RECORDS[5:9]]
    (entry,) = find_inputs([in_memory])
    assert not entry.travels


def fingerprint(dataset: Any) -> Any:
    (entry,) = find_inputs([dataset])
    return entry.fingerprint()


def _labelled(count: int) -> Iterator[dict[str, Any]]:
    for n in range(count):
        yield {"text": f"text {n}", "labels": [n] * 50}


@pytest.mark.parametrize("tokenised", [False, True])
def test_columns_beside_the_texts_that_are_not_read_change_nothing(tokenised: bool) -> None:
    rows = Dataset.from_generator(_labelled, gen_kwargs={"count": 50})
    (one,), (plain,) = (
        find_inputs([dataset], tokenised=tokenised)
        for dataset in (rows, rows.remove_columns("labels"))
    )
    assert one.text_bytes == plain.text_bytes
    stream = rows.to_iterable_dataset()
    (one,) = find_inputs([stream], tokenised=tokenised)
    assert one.columns == plain.columns
    (read,) = find_inputs([rows.rename_column("labels", "input_ids")], tokenised=tokenised)
    assert (read.text_bytes > plain.text_bytes) == tokenised


def test_the_same_dataset_is_known_again_and_another_is_not() -> None:
    def stream(count: int) -> Any:
        return IterableDataset.from_generator(numbers, gen_kwargs={"count": count})

    made = [
        Dataset.from_list(RECORDS),
        Dataset.from_list(RECORDS[1:]),
        Dataset.from_list(RECORDS).select(range(50)),
        stream(50),
        stream(51),
        stream(50).take(20),
        stream(50).take(21),
        stream(50).map(lambda row: {"text": row["text"] + "!"}),
    ]
    prints = [json.dumps(fingerprint(dataset)) for dataset in made]
    assert len(set(prints)) == len(made)
    assert json.dumps(fingerprint(Dataset.from_list(RECORDS))) == prints[0]
    assert json.dumps(fingerprint(stream(50))) == prints[3]
    # Neither finding out nor reading leaves anything behind.
    assert len(rows_of(made[3])) == 50
    assert json.dumps(fingerprint(made[3])) == prints[3]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            DatasetDict(test=Dataset.from_dict({"text": ["a"]}), train=None),
            r"must be one split, got a DatasetDict with the splits \['test', 'train'\]; .*"
            r"dataset\['train'\]",
        ),
        (DatasetDict(validation=None), r"dataset\['validation'\]"),
        (Dataset.from_dict({"text": []}), "dataset must hold at least one row, got 0"),
        (
            Dataset.from_dict({"headline": ["a"], "body": ["b"]}),
            r"known shapes, got \['headline', 'body'\]; rename_column\(\) or map\(\) to one of",
        ),
        (
            Dataset.from_dict({"input_ids": [[1]], "position_ids": [[0]]}),
            r"must hold one sample in a row, got a column 'position_ids' .* before it was packed",
        ),
        (
            Dataset.from_dict({"input_ids": [[1]], "seq_lengths": [[1]]}),
            r"must hold one sample in a row, got a column 'seq_lengths' beside input_ids",
        ),
        (
            Dataset.from_dict({"text": ["a"]}).with_transform(lambda rows: rows),
            r"must hold its rows, got one .*use map\(\) with the same function",
        ),
    ],
)
def test_what_cannot_be_read_as_it_is_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        check_loaded(dataset)


def test_a_stream_that_cannot_be_known_again_is_refused(tmp_path: Path) -> None:
    opened = numbers(3)
    stream = IterableDataset.from_generator(numbers, gen_kwargs={"count": 3})
    stream = stream.map(lambda row: next(opened))

    with pytest.raises(CorpusError, match=r"can be pickled, .* let its function open what it read"):
        convert(stream, tmp_path / "out")


def test_a_stream_of_unknown_columns_is_refused_by_its_first_rows(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter([{"body": "a"}]))
    with pytest.raises(CorpusError, match=r"got the fields \['body'\] at the start of 'dataset'"):
        convert(stream, tmp_path / "out")
    assert not (tmp_path / "out").exists()
