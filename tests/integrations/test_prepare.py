"""`prepare`: any dataset to a corpus with embeddings, made once, then found again."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from filelock import FileLock
from streaming import MDSWriter

from slap_stream import ChatCollator, SlapDataLoader, convert, embed, prepare
from slap_stream.corpus import shuffle, tokenising
from slap_stream.embeddings.store import EmbeddingStore
from slap_stream.errors import AlignmentError, ConfigError, CorpusError
from slap_stream.integrations import prepare as module
from slap_stream.integrations.prepare import Prepared
from slap_stream.shards.reader import iter_corpus
from slap_stream.shards.writer import open_writer
from slap_stream.text.chat import encode
from tests.helpers.plain_corpora import files_of
from tests.laws import config_of
from tests.test_training import byte_tokenizer, record

RECORDS = [record(number) for number in range(40)]


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages of a user and an assistant, in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


@pytest.fixture
def chats() -> Dataset:
    return Dataset.from_list(RECORDS)


@pytest.fixture
def made_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From the second corpus on, making one is an error."""
    left = [1]

    def once(*arguments: Any, **options: Any) -> Any:
        assert left.pop(), "converted again"
        return convert(*arguments, **options)

    monkeypatch.setattr(module, "convert", once)
    return


# The first four are TRL's formats: language modelling and prompt-completion, each standard and
# conversational.
@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"text": "a b"}, [{"role": "text", "content": "a b"}]),
        ({"messages": turns("a", "b")}, turns("a", "b")),
        ({"prompt": "a", "completion": "b"}, turns("a", "b")),
        ({"prompt": turns("a"), "completion": turns("x", "b")[1:]}, turns("a", "b")),
        ({"instruction": "a", "input": "c", "output": "b"}, turns("a\n\nc", "b")),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            turns("a", "b"),
        ),
    ],
    ids=["text", "messages", "prompt", "conversational prompt", "alpaca", "sharegpt"],
)
def test_rows_of_every_known_shape_arrive(
    tmp_path: Path, row: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    tokenizer = byte_tokenizer()
    prepared = prepare(Dataset.from_list([row] * 3), tmp_path, tokenizer=tokenizer)
    assert (prepared.num_samples, prepared.found) == (3, False)
    expected = encode(tokenizer, messages)
    for sample in iter_corpus(prepared.corpus, 0, 3):
        assert sample["input_ids"].tolist() == expected.input_ids
        assert sample["supervised"].tolist() == expected.supervised
    store = EmbeddingStore(prepared.embeddings)
    assert store.length_unit == "tokens"
    assert store.read(0, 3).length.tolist() == [len(expected.input_ids)] * 3


def test_rows_under_other_names_arrive_by_a_map(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"translation": {"en": "a", "de": "b"}}] * 3)
    fields = {"prompt": "translation.en", "completion": "translation.de"}
    prepared = prepare(rows, tmp_path, fields=fields)
    assert next(iter_corpus(prepared.corpus))["messages"] == turns("a", "b")
    assert prepare(rows, tmp_path, fields=fields).found


def test_what_it_returns_is_what_a_loader_takes(tmp_path: Path, chats: Dataset) -> None:
    tokenizer = byte_tokenizer()
    prepared = prepare(chats, tmp_path)
    loader = SlapDataLoader(
        prepared.dataset(8),
        embeddings=prepared.embeddings,
        config=config_of(keep=1.0),
        collate_fn=ChatCollator(tokenizer),
    )
    ids = [number for batch in loader for number in batch["sample_id"].tolist()]
    assert sorted(ids) == list(range(40))


def sources(tmp_path: Path) -> dict[str, Any]:
    """The same records in every form that is taken, made anew."""
    lines = tmp_path / "lines.jsonl"
    if not lines.exists():
        lines.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
        Dataset.from_list(RECORDS).to_parquet(tmp_path / "rows.parquet")
    return {
        "dataset": Dataset.from_list(RECORDS),
        "loaded": load_dataset(
            "json", data_files=str(lines), split="train", cache_dir=str(tmp_path / "cache")
        ),
        "stream": load_dataset("json", data_files=str(lines), split="train", streaming=True),
        "lines": str(lines),
        "parquet": tmp_path / "rows.parquet",
    }


@pytest.mark.parametrize("form", ["dataset", "loaded", "stream", "lines", "parquet"])
def test_what_was_made_is_found_again_and_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    first = prepare(sources(tmp_path)[form], tmp_path / "out")
    assert (first.num_samples, first.found) == (40, False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.delattr(module, "convert")
    monkeypatch.delattr(module, "embed")
    again = prepare(sources(tmp_path)[form], tmp_path / "out")
    assert again.found
    assert again.embeddings == first.embeddings
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    # The folder may be moved.
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = prepare(sources(tmp_path)[form], tmp_path / "moved")
    assert moved.found
    assert moved.corpus == tmp_path / "moved" / first.corpus.name


def test_all_that_decides_what_the_corpus_holds_decides_its_name(
    tmp_path: Path, chats: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_tokenizer()
    prepare(chats, tmp_path)
    assert not caplog.records
    options: list[dict[str, Any]] = [
        {"dataset": chats.select(range(39))},
        {"seed": 1},
        {"source_field": None},
        {"fields": {"id": "number"}},
        {"tokenizer": tokenizer},
        {"tokenizer": tokenizer, "max_length": 60},
    ]
    for option in options:
        assert not prepare(**{"dataset": chats, "out": tmp_path, **option}).found
        # Once: after that it is known.
        assert caplog.text.count(f"{tmp_path} holds 1 corpora of other data or settings, and") == 1
    assert caplog.text.count(" corpora of other data") == 1
    assert "3 of 40 samples are cut to max_length=60 tokens" in caplog.text
    assert len(list(tmp_path.glob("corpus-*/index.json"))) == 7
    # It was used in the meantime, which leaves its settings in it, and comes from elsewhere.
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    assert prepare(chats, tmp_path, tokenizer=tokenizer).found
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    assert prepare(chats, tmp_path, tokenizer=tmp_path / "elsewhere").found
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert not prepare(chats, tmp_path, tokenizer=tokenizer).found


class CutOff(Exception):
    """Stands for whatever ends a run."""


def test_what_was_cut_off_goes_on(
    tmp_path: Path, chats: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    whole = prepare(chats, tmp_path / "whole", tokenizer=tokenizer)

    def cut_off(*_: Any, **__: Any) -> Any:
        raise CutOff

    def read_again(*_: Any, **__: Any) -> Any:
        raise AssertionError("read again")

    for place, name in ((shuffle, "_texts"), (module, "embed")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, cut_off)
            with pytest.raises(CutOff):
                prepare(chats, tmp_path / "broken", tokenizer=tokenizer)
        monkeypatch.setattr("slap_stream.corpus.convert.scatter", read_again)
    monkeypatch.setattr(module, "convert", read_again)
    broken = prepare(chats, tmp_path / "broken", tokenizer=tokenizer)
    assert broken.corpus.name == whole.corpus.name
    same, other = files_of(whole.corpus), files_of(broken.corpus)
    assert same.keys() == other.keys()
    assert [name for name in same if same[name] != other[name]] == ["corpus.json"]


def test_while_another_process_makes_the_same_it_is_waited_for(
    tmp_path: Path, chats: Dataset, caplog: pytest.LogCaptureFixture, made_once: None
) -> None:
    first = prepare(chats, tmp_path)
    first.embeddings.rename(tmp_path / "hidden")
    done: list[Any] = []
    with FileLock(tmp_path / f"{first.corpus.name}.lock", thread_local=False):
        thread = threading.Thread(target=lambda: done.append(prepare(chats, tmp_path)))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert f"another process makes {first.corpus}; waiting for it" in caplog.text
        # As that process would.
        (tmp_path / "hidden").rename(first.embeddings)
    thread.join(20)
    assert [prepared.embeddings for prepared in done] == [first.embeddings]


def test_records_that_are_left_out_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": turns("a", "b")}] * 3 + [{"messages": turns("a")}]
    prepare(Dataset.from_list(rows), tmp_path)
    assert "1 of the records are left out: no assistant turn, as in dataset[3]" in caplog.text


@pytest.mark.parametrize("form", ["dataset", "stream"])
def test_what_is_not_used_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    rows = [{"messages": turns("a", "b"), "images": ["a.png"], "grade": n} for n in range(3)]
    rows[0]["images"] = None
    dataset = Dataset.from_list(rows)
    prepare(dataset if form == "dataset" else dataset.to_iterable_dataset(), tmp_path)
    # Columns of a dataset that is loaded are counted, and not read.
    images = 3 if form == "dataset" else 2
    assert caplog.messages == [
        "fields that are not used, with the number of records that have them: "
        f"grade (3), images ({images})"
    ]


def test_answers_that_share_a_token_with_the_header_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["\n\n"])
    rows = [{"messages": turns("a", said)} for said in ("yes", "\nyes")]
    prepare(Dataset.from_list(rows), tmp_path, tokenizer=tokenizer)
    assert "1 answers share their first token with the header before them" in caplog.text


def test_shards_are_taken_as_they_are(
    tmp_path: Path, chats: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(chats, tmp_path / "shards")
    before = files_of(tmp_path / "shards")
    prepared = prepare(tmp_path / "shards", tmp_path / "out")
    assert not prepared.found
    assert prepared.corpus == tmp_path / "shards"
    assert prepared.embeddings.parent == tmp_path / "out"
    assert files_of(tmp_path / "shards") == before
    assert prepare(str(tmp_path / "shards"), tmp_path / "out").found
    # Embeddings of their own are preferred, and looked at.
    embed(tmp_path / "shards", dim=8)
    own = prepare(tmp_path / "shards", tmp_path / "out")
    assert own.found
    assert own.embeddings == tmp_path / "shards" / "embeddings.zarr"
    convert(chats, tmp_path / "others", seed=1)
    shutil.copytree(own.embeddings, tmp_path / "others" / "embeddings.zarr")
    with pytest.raises(AlignmentError, match="run slap-embed on this dataset again"):
        prepare(tmp_path / "others", tmp_path / "out")


def test_shards_without_hashes_that_were_written_again_are_embedded_again(tmp_path: Path) -> None:
    def written(numbers: range) -> Prepared:
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        with MDSWriter(out=str(tmp_path / "shards"), columns={"messages": "json"}) as writer:
            for number in numbers:
                writer.write({"messages": turns(f"q{number % 10}", f"a{number % 10}")})
        return prepare(tmp_path / "shards", tmp_path / "out", num_workers=1)

    first, again, other = map(written, (range(20), range(20), range(20)[::-1]))
    assert first.index_digest == other.index_digest, "it tells nothing"
    assert again.found
    assert not other.found
    rows = [EmbeddingStore(each.embeddings).shard_hashes for each in (first, other)]
    assert rows[0] != rows[1]
    loader = SlapDataLoader(
        other.dataset(4),
        embeddings=other.embeddings,
        collate_fn=lambda samples: {"count": len(samples)},
        config=config_of(num_lanes=1),
    )
    assert next(iter(loader))["count"] == 4


def test_embeddings_of_shards_of_tokens_are_those_of_their_tokenizer(
    tmp_path: Path, chats: Dataset
) -> None:
    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    other.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    convert(chats, tmp_path / "shards", tokenizer=tmp_path / "tokenizer")
    first = prepare(tmp_path / "shards", tmp_path / "out", tokenizer=other)
    second = prepare(tmp_path / "shards", tmp_path / "out", tokenizer=tokenizer)
    assert not second.found
    assert first.embeddings != second.embeddings
    assert prepare(tmp_path / "shards", tmp_path / "out", tokenizer=other).found
    # No text of theirs hangs on a tokenizer.
    convert(chats, tmp_path / "texts")
    assert not prepare(tmp_path / "texts", tmp_path / "out", tokenizer=other).found
    assert prepare(tmp_path / "texts", tmp_path / "out", tokenizer=tokenizer).found


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_length": 9}, "max_length must be None for MDS shards, got 9; they are left as"),
        ({"source_field": None}, "source_field must be 'source' for MDS shards, got None; they"),
        ({"source_field": "origin"}, "source_field must be 'source' for MDS shards, got 'origin'"),
        ({"fields": {"text": "a"}}, "fields must be None for MDS shards, got {'text': 'a'}; they"),
    ],
)
def test_what_changes_nothing_about_shards_is_refused(
    tmp_path: Path, chats: Dataset, option: dict[str, Any], message: str
) -> None:
    convert(chats, tmp_path / "shards", num_workers=1)
    with pytest.raises(ConfigError, match=message):
        prepare(tmp_path / "shards", tmp_path / "out", tokenizer=byte_tokenizer(), **option)
    assert not (tmp_path / "out").exists()


def test_shards_of_other_columns_are_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    with open_writer(tmp_path / "shards", {"body": "str"}, shard_bytes=1000) as writer:
        writer.write({"body": "a text"})
    with pytest.raises(CorpusError, match=r"got \['body'\] in .* run slap-embed on them with --te"):
        prepare(tmp_path / "shards", tmp_path / "out")
    embed(tmp_path / "shards", text_column="body", dim=8)
    assert prepare(tmp_path / "shards", tmp_path / "out").num_samples == 1


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        ([{"text": "a"}], {}, TypeError, r"got list; datasets.Dataset.from_list makes one"),
        (None, {}, TypeError, r"dataset must be a datasets.Dataset, an IterableDataset or a path"),
        ("s3://bucket/c", {}, CorpusError, r"must be a path on this machine, got 's3://bucket/c'"),
        ("owner/name", {}, CorpusError, r"load_dataset\('owner/name', split='train'\)"),
        ("here", {"max_length": 9}, ConfigError, "max_length must be None without a tokenizer"),
        (
            "here",
            {"out": Path("file")},
            CorpusError,
            "out must be a directory, got the file 'file'",
        ),
        ("here", {"fields": {"body": "a"}}, ConfigError, r"map names out of id, .* got \['body'\]"),
        (
            Dataset.from_dict({"a": ["b"]}),
            {"fields": {"text": "c"}},
            CorpusError,
            r"columns of one of the known shapes, got \['a'\]",
        ),
        ("here", {"seed": -1}, ConfigError, "seed must be a whole number >= 0, got -1"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dataset: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(error, match=message):
        prepare(**{"dataset": dataset, "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_does_not_come_back_is_refused(tmp_path: Path, chats: Dataset) -> None:
    class Forgetful(type(byte_tokenizer())):  # type: ignore[misc]  # a class of its own
        def save_pretrained(self, folder: Any, **options: Any) -> Any:
            lasting = byte_tokenizer()
            lasting.chat_template = "{{ 'another' }}"
            return lasting.save_pretrained(folder, **options)

    tokenizer = Forgetful(tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="<|end|>")
    with pytest.raises(ConfigError, match=r"after save_pretrained .*got a Forgetful that is not"):
        prepare(chats, tmp_path, tokenizer=tokenizer)
    assert not list(tmp_path.glob("corpus-*/"))


def test_a_tokenizer_that_another_process_has_kept_meanwhile_is_taken(
    tmp_path: Path, chats: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, tokenizer = tokenising.load_tokenizer, byte_tokenizer()

    def meanwhile(name: str) -> Any:
        path = Path(name)
        if path.name.startswith(".tokenizer-"):
            tokenizer.save_pretrained(tmp_path / path.name.split(".")[1])
        return load(name)

    monkeypatch.setattr(tokenising, "load_tokenizer", meanwhile)
    assert prepare(chats, tmp_path, tokenizer=tokenizer, num_workers=1).num_samples == 40
    assert len(list(tmp_path.glob("tokenizer-*"))) == 1
    assert not list(tmp_path.glob(".tokenizer-*"))


def test_a_tokenizer_that_cannot_be_kept_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        tokenising.keep_tokenizer(byte_tokenizer(), tmp_path / "tokenizer-x")
    assert not list(tmp_path.iterdir())


def test_a_stream_is_left_as_it_was(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(RECORDS))
    prepare(stream, tmp_path)
    assert prepare(stream, tmp_path).found
    assert list(stream) == RECORDS


def test_it_says_what_it_makes(
    tmp_path: Path, chats: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "slap_stream")
    name = prepare(chats, tmp_path).corpus.name
    prepare(chats, tmp_path)
    told = [message for message in caplog.messages if name in message]
    assert [message.split()[0] for message in told] == ["making", "made", "found"]
