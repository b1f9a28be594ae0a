"""A corpus is embedded whole, aligned, in parallel, and again after a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slap_stream import embed
from slap_stream.cli.embed import main
from slap_stream.core.files import file_digest
from slap_stream.embeddings.corpus_texts import CorpusTexts, describe_corpus
from slap_stream.embeddings.features import FEATURE_NAMES
from slap_stream.embeddings.pretrained import torch_device
from slap_stream.embeddings.store import EmbeddingStore
from slap_stream.errors import ConfigError, CorpusError
from slap_stream.shards.writer import open_writer
from slap_stream.text.sample import TextSample, from_messages
from slap_stream.types import MISMATCH_COLUMN
from tests.embeddings.test_encoders import llama_path  # noqa: F401, a fixture
from tests.helpers.embed_samples import question
from tests.helpers.plain_corpora import files_of

# streaming's writer asks for the start method of processes it never starts.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:streaming.*")

ROOT = Path(__file__).parents[2]
RAW = {"id": "str", "source": "str", "messages": "json"}


def messages_of(number: int) -> list[dict[str, str]]:
    sample = question(number)
    return [
        {"role": "user", "content": sample.prompt},
        {"role": "assistant", "content": sample.target},
    ]


def write_corpus(path: Path, count: int) -> Path:
    with open_writer(path, RAW, shard_bytes=4_096) as writer:
        for number in range(count):
            source = ("books", "code", "chat")[number % 3]
            writer.write({"id": str(number), "source": source, "messages": messages_of(number)})
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c", 300)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--quiet"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments), "--quiet"]) == 1
    return capsys.readouterr().err


def test_every_row_belongs_to_its_sample(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.zarr"
    report = run(capsys, corpus, "--out", out, "--dim", 64, "--rows-per-chunk", 128)
    assert report["num_samples"] == report["embedded"] == 300
    assert report["num_sources"] == 3
    store = EmbeddingStore(out)
    store.verify(file_digest(corpus / "index.json"), 300)
    assert store.shape == (300, 64)
    assert store.feature_names == (*FEATURE_NAMES, MISMATCH_COLUMN)
    assert store.source_names == ("books", "chat", "code")
    assert store.length_unit == "characters / 4"
    assert store.encoder["name"] == "hashing"
    assert store.attributes["command"].startswith("slap-embed ")
    rows = store.read(0, 300)
    samples = [from_messages(messages_of(number), None) for number in range(300)]
    np.testing.assert_array_equal(rows.length, [sample.length for sample in samples])
    np.testing.assert_array_equal(rows.source[:6], [0, 2, 1, 0, 2, 1])
    np.testing.assert_allclose(
        rows.feature[:, 0], np.log([sample.length for sample in samples]), rtol=1e-3
    )
    np.testing.assert_allclose(np.linalg.norm(rows.embedding.astype(float), axis=1), 1, atol=2e-3)


def test_what_is_finished_is_left_alone_and_other_settings_are_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (corpus, "--out", tmp_path / "e.zarr", "--dim", 16)
    assert run(capsys, *given)["embedded"] == 300
    assert run(capsys, *given)["embedded"] == 0
    assert "with another encoder; pass overwrite" in refuse(capsys, *given[:-1], 32)
    assert run(capsys, *given[:-1], 32, "--overwrite")["embedded"] == 300


def test_a_target_set_adds_a_column_and_another_one_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(name: str, numbers: range) -> Path:
        records = [json.dumps({"messages": messages_of(number)}) for number in numbers]
        (tmp_path / name).write_text("\n".join(records))
        return tmp_path / name

    given = (corpus, "--out", tmp_path / "e.zarr", "--dim", 16, "--rows-per-chunk", 64, "--target")
    # Of the same making as the corpus: all of it is of their kind.
    report = run(capsys, *given, lines("some.jsonl", range(1_000, 1_040)))
    assert report["feature_names"] == [*FEATURE_NAMES, MISMATCH_COLUMN, "relevance"]
    assert report["relevant_share"] > 0.8
    store = EmbeddingStore(tmp_path / "e.zarr")
    relevance = store.read(0, 300).feature[:, -1].astype(np.float64)
    assert relevance.mean() == pytest.approx(report["relevant_share"], abs=0.01)
    # Wherever they stand, and however they are ordered, they are the same.
    again = run(capsys, *given, lines("turned.jsonl", range(1_039, 999, -1)))
    assert (again["embedded"], again["relevant_share"]) == (0, report["relevant_share"])
    other = lines("other.jsonl", range(1_001, 1_041))
    assert "with another encoder; pass overwrite" in refuse(capsys, *given, other)
    assert "with another encoder, feature_names; pass overwrite" in refuse(capsys, *given[:-1])
    assert "must be a file or a directory" in refuse(capsys, *given, tmp_path / "none")


def test_nothing_but_embeddings_is_ever_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    with open_writer(corpus, {"text": "str"}) as writer:
        writer.write({"text": "a few words"})
    kept = sorted(path.name for path in corpus.iterdir())
    given = (corpus, "--text-column", "text", "--dim", 8, "--overwrite")
    assert "must not replace anything but embeddings" in refuse(capsys, *given, "--out", corpus)
    assert sorted(path.name for path in corpus.iterdir()) == kept
    thesis = tmp_path / "thesis.partial" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years")
    assert "which must be free" in refuse(capsys, *given, "--out", tmp_path / "thesis")
    assert thesis.read_text() == "years"


def arrays_of(store: Path) -> dict[str, bytes]:
    """Every file but the group's own, which says what command made it."""
    files = files_of(store)
    del files["zarr.json"]
    return files


def test_python_and_its_workers_write_what_the_tool_writes(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"dim": 16, "rows_per_chunk": 128, "progress": True}
    run(capsys, corpus, "--out", tmp_path / "tool.zarr", "--dim", 16, "--rows-per-chunk", 128)
    tool = arrays_of(tmp_path / "tool.zarr")
    attributes = EmbeddingStore(tmp_path / "tool.zarr").attributes
    for workers in (0, 2):
        out = tmp_path / f"{workers}.zarr"
        report = embed(corpus, out=out, num_workers=workers, **options)
        assert (report.path, report.num_samples, report.embedded) == (str(out), 300, 300)
        assert "300/300" in capsys.readouterr().err
        assert arrays_of(out) == tool
        assert EmbeddingStore(out).attributes == attributes | {"command": ""}


def test_cores_are_counted_where_no_process_is_kept_off_some(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    assert embed(corpus, out=tmp_path / "e.zarr", dim=16).embedded == 300


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ("--dim 4", {"dim": 4}, "dim must be a whole number >= 8, got 4; try 384."),
        ("--encoder best", {"encoder": "best"}, "encoder must be one of hashing, hf:PATH, got 'b"),
        (
            "--num-workers -1",
            {"num_workers": -1},
            "num_workers must be a whole number >= 0, got -1",
        ),
        ("--rows-per-chunk 0", {"rows_per_chunk": 0}, "rows_per_chunk must be a whole number >= 1"),
        ("--tokenizer x", {"tokenizer": "x"}, "tokenizer must be None for a corpus of text, got"),
        (
            "--source-column shelf",
            {"source_column": "shelf"},
            "source_column must be one of id, messages, source, got 'shelf'; None tells",
        ),
        (
            "--text-column id --prompt-column id --completion-column id",
            dict.fromkeys(("text_column", "prompt_column", "completion_column"), "id"),
            "text_column must be None beside prompt_column, got 'id'",
        ),
    ],
)
def test_python_says_of_wrong_arguments_what_the_tool_says(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    options: dict[str, Any],
    said: str,
) -> None:
    out = tmp_path / "e.zarr"
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        embed(corpus, out=out, **options)
    assert refuse(capsys, corpus, "--out", out, *arguments.split()) == (
        f"slap-embed: {raised.value}\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device must be one of torch's, got 'tpu'"):
        torch_device("tpu")
    with pytest.raises(ConfigError, match="device must be here, got 'cuda:99' on a machine with"):
        torch_device("cuda:99")


def test_a_killed_embedding_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", 800)
    script = (
        "import sys, time\n"
        "from slap_stream.embeddings.store import EmbeddingWriter\n"
        "write = EmbeddingWriter.write\n"
        "def slow(*arguments):\n"
        "    write(*arguments)\n"
        "    time.sleep(0.2)\n"
        "EmbeddingWriter.write = slow\n"
        "from slap_stream.cli.embed import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    given = [str(corpus), "--dim", "16", "--rows-per-chunk", "64", "--quiet"]
    process = subprocess.Popen([sys.executable, "-c", script, *given], cwd=ROOT)
    partial = corpus / "embeddings.zarr.partial"
    deadline = time.monotonic() + 90
    while len(list(partial.glob("block-*.json"))) < 3:
        assert time.monotonic() < deadline, "embedding did not start"
        assert process.poll() is None, "embedding ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (corpus / "embeddings.zarr").exists()
    assert main(given) == 0
    assert main([*given, "--out", str(tmp_path / "unbroken.zarr")]) == 0
    broken = arrays_of(corpus / "embeddings.zarr")
    assert len(broken) > 4 * 12
    assert broken == arrays_of(tmp_path / "unbroken.zarr")
    assert not (corpus / "embeddings.zarr.partial").exists()


def test_only_missing_blocks_are_embedded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "c", 100)
    reads, read = [], CorpusTexts.read

    def failing(texts: CorpusTexts, start: int, stop: int) -> Iterator[TextSample]:
        reads.append((start, stop))
        if (start, stop) == (40, 60) and bad:
            raise CorpusError("shard is gone")
        return read(texts, start, stop)

    monkeypatch.setattr(CorpusTexts, "read", failing)
    bad = True
    with pytest.raises(CorpusError, match="shard is gone"):
        embed(corpus, dim=16, rows_per_chunk=20)
    assert not (corpus / "embeddings.zarr").exists()
    reads.clear()
    bad = False
    assert embed(corpus, dim=16, rows_per_chunk=20).embedded == 60
    # Read to count words, to learn from pairs, and to embed what is missing.
    assert reads == [(0, 1), (0, 100), (0, 100), (40, 60), (60, 80), (80, 100)]


def test_an_empty_corpus_and_a_wrong_description_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="at least one sample, got 0"):
        embed(write_corpus(tmp_path / "empty", 0))
    corpus = write_corpus(tmp_path / "c", 3)
    (corpus / "corpus.json").write_text(json.dumps({"counts": {"films": 3}}))
    with pytest.raises(CorpusError, match="source must be one of the corpus's 1, got 'books'"):
        embed(corpus, dim=16)


def test_a_tokenised_corpus_counts_tokens_and_takes_a_reference_model(
    tmp_path: Path,
    llama_path: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    corpus = tmp_path / "tokens"
    columns = {
        "id": "str",
        "source": "str",
        "input_ids": "ndarray:int32",
        "supervised": "ndarray:uint8",
    }
    with open_writer(corpus, columns) as writer:
        for number in range(20):
            ids = np.arange(2, 7 + number % 3, dtype=np.int32)
            supervised = (ids > 4).astype(np.uint8)
            record = {"id": str(number), "source": "only"}
            writer.write(record | {"input_ids": ids, "supervised": supervised})
    assert "tokenizer must be given for a tokenised corpus" in refuse(capsys, corpus)
    described = {"format": "tokens", "tokenizer": str(llama_path), "counts": {"only": 20}}
    (corpus / "corpus.json").write_text(json.dumps(described))
    model = ("--reference-model", llama_path, "--device", "cpu")
    said = refuse(capsys, corpus, *model, "--num-workers", 2)
    assert "num_workers must be 1 with a model, got 2; the model uses all cores." in said
    report = run(capsys, corpus, "--dim", 16, *model)
    assert report["feature_names"] == [*FEATURE_NAMES, MISMATCH_COLUMN, "reference_loss"]
    store = EmbeddingStore(corpus / "embeddings.zarr")
    rows = store.read(0, 20)
    assert store.length_unit == "tokens"
    assert rows.length[:3].tolist() == [5, 6, 7]
    assert store.source_names == ("only",)
    assert store.encoder["reference_model"]["name"] == str(llama_path)
    assert (rows.feature[:, -1] > 1).all()
    judge = ("--judge-model", llama_path, "--device", "cpu", "--overwrite")
    report = run(capsys, corpus, "--dim", 16, *judge)
    assert report["feature_names"] == [*FEATURE_NAMES, MISMATCH_COLUMN, "judge_loss"]
    assert 0 < report["judge_tokens"] <= rows.length.sum()
    store = EmbeddingStore(corpus / "embeddings.zarr")
    assert store.encoder["judge_model"]["name"] == str(llama_path)
    assert (store.read(0, 20).feature[:, -1] > 1).all()


def test_any_mds_corpus_is_embedded_by_naming_its_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "foreign"
    with open_writer(corpus, {"q": "str", "a": "str", "label": "int"}) as writer:
        for number in range(12):
            sample = question(number)
            writer.write({"q": sample.prompt, "a": sample.target, "label": number % 2})
    out = ("--out", tmp_path / "e.zarr", "--overwrite")
    assert "must have a column messages or input_ids" in refuse(capsys, corpus)
    assert "column z must hold text" in refuse(capsys, corpus, "--text-column", "z")
    assert "must be given together" in refuse(capsys, corpus, "--prompt-column", "q")
    assert run(capsys, corpus, *out, "--text-column", "a")["num_sources"] == 0
    pairs = ("--prompt-column", "q", "--completion-column", "a", "--source-column", "label")
    assert run(capsys, corpus, *out, *pairs)["num_sources"] == 2
    assert EmbeddingStore(tmp_path / "e.zarr").source_names == ("0", "1")


def test_a_directory_that_is_no_corpus_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "must be a directory with an index.json" in refuse(capsys, tmp_path)
    (tmp_path / "corpus.json").write_text("[]")
    with pytest.raises(CorpusError, match=r"corpus.json must hold a JSON object, got list"):
        describe_corpus(tmp_path)
    for text in ("{", "[" * 200_000):
        (tmp_path / "corpus.json").write_text(text)
        with pytest.raises(CorpusError, match=r"corpus.json must be JSON"):
            describe_corpus(tmp_path)
