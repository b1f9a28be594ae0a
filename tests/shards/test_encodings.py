"""Our own encodings, and the writer over them, leave the bytes that streaming's leave."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import MDSWriter
from streaming.base.format.mds.encodings import get_mds_encoded_size, mds_decode, mds_encode

from slap_stream.errors import CorpusError
from slap_stream.shards.encodings import codec_of
from slap_stream.shards.reader import iter_corpus
from slap_stream.shards.writer import open_writer
from tests.shards.test_decode import VALUES, alike

OWN = ("str", "int", "json", "ndarray:int32", "ndarray:uint16", "ndarray:float32:2,3")
# Written with more axes, and with axes of two bytes.
OWN_VALUES = {name: VALUES[name] for name in OWN}


@pytest.mark.parametrize("encoding", OWN)
def test_a_value_is_written_and_read_as_streaming_does(encoding: str) -> None:
    codec = codec_of(encoding)
    assert type(codec).__module__ == "slap_stream.shards.encodings"
    assert codec.size == get_mds_encoded_size(encoding)

    @settings(max_examples=50, deadline=None)
    @given(value=OWN_VALUES[encoding])
    def check(value: Any) -> None:
        data = codec.encode(value)
        assert data == mds_encode(encoding, value)
        assert alike(codec.decode(data), mds_decode(encoding, data))

    check()


def test_other_encodings_are_streamings() -> None:
    assert type(codec_of("str_decimal")).__module__.startswith("streaming.")
    with pytest.raises(ValueError, match="encoding must be one of MDS, got 'text'"):
        codec_of("text")


@pytest.mark.parametrize("shape", ["", "0", "-1", "2,0", "2,", "x", "2:3"])
def test_a_shape_that_streaming_refuses_is_refused(shape: str) -> None:
    encoding = f"ndarray:int32:{shape}"
    with pytest.raises((ValueError, AssertionError)):
        get_mds_encoded_size(encoding)
    with pytest.raises(ValueError, match="encoding must name a shape of whole numbers above 0"):
        codec_of(encoding)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(*(OWN_VALUES[name] for name in ("str", "json", "ndarray:int32", "int"))),
        max_size=40,
    ),
    shard_bytes=st.integers(600, 3000),
    compression=st.sampled_from([None, "zstd"]),
)
def test_a_corpus_is_to_the_byte_what_the_stock_writer_leaves(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[Any, ...]],
    shard_bytes: int,
    compression: str | None,
) -> None:
    columns = {"t": "str", "j": "json", "a": "ndarray:int32", "n": "int", "d": "str_int"}
    samples = [dict(zip(columns, (*row, row[3]), strict=True)) for row in rows]
    # The stock writer leaves an empty shard ahead of a sample that is larger than a shard.
    samples = [sample for sample in samples if sample["a"].nbytes < 200]
    folder = tmp_path_factory.mktemp("both")
    with open_writer(
        folder / "own", columns, shard_bytes=shard_bytes, compression=compression
    ) as writer:
        for sample in samples:
            writer.write(sample)
    stock = MDSWriter(
        columns=columns,
        out=str(folder / "stock"),
        hashes=["xxh64"],
        size_limit=shard_bytes,
        compression=compression,
    )
    for sample in samples:
        stock.write(sample)
    stock.finish()
    if all(shard["samples"] for shard in stock.shards):
        own, theirs = (
            {path.name: path.read_bytes() for path in (folder / name).iterdir()}
            for name in ("own", "stock")
        )
        assert own == theirs


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("t", 1, "column 't' must hold what can be encoded as str, got int"),
        ("t", "\ud800", "surrogates not allowed"),
        ("n", 1 << 63, "encoded as int, got int: int too big to convert"),
        ("j", {1, 2}, "encoded as json, got set"),
        ("a", [1], "encoded as ndarray:int32, got list"),
        ("a", np.zeros(0, np.int32), r"of the shape \(any, not empty\)"),
        ("a", np.zeros(1), "must be an array of int32"),
        ("t", b"\xff\xfe", "encoded as str, got bytes"),
        ("n", bytes(8), "encoded as int, got bytes"),
        ("j", b"{", "encoded as json, got bytes"),
        ("a", b"\xff", "encoded as ndarray:int32, got bytes"),
    ],
)
def test_a_value_that_does_not_fit_its_column_is_refused(
    tmp_path: Path, column: str, value: Any, message: str
) -> None:
    columns = {"t": "str", "n": "int", "j": "json", "a": "ndarray:int32"}
    good = {"t": "x", "n": 1, "j": [], "a": np.ones(1, np.int32)}
    with (
        open_writer(tmp_path / "c", columns) as writer,
        pytest.raises(CorpusError, match=message),
    ):
        writer.write(good | {column: value})


def test_what_is_encoded_already_is_written_as_it_is(tmp_path: Path) -> None:
    columns = {"t": "str", "n": "int", "j": "json"}
    with open_writer(tmp_path / "c", columns) as writer:
        writer.write_encoded({"t": b"x", "n": 1, "j": b"[2]"}, {"t", "j"})
        with pytest.raises(CorpusError, match="column 'n' must take 8 bytes, got 1"):
            writer.write_encoded({"t": "x", "n": b"1", "j": []}, {"n"})
    assert list(iter_corpus(tmp_path / "c")) == [{"t": "x", "n": 1, "j": [2]}]


def test_all_shards_are_there_when_the_writer_ends_and_nothing_runs_on(tmp_path: Path) -> None:
    # Streaming's has threads, which its end cancels with shards under way.
    before = threading.active_count()
    with open_writer(tmp_path / "c", {"t": "str"}, shard_bytes=200) as writer:
        for number in range(40):
            writer.write({"t": f"{number:03}" * 5})
            assert threading.active_count() == before
    assert len(list((tmp_path / "c").glob("*.mds"))) > 20
    assert [s["t"][:3] for s in iter_corpus(tmp_path / "c")] == [f"{n:03}" for n in range(40)]


def test_converting_and_embedding_do_not_load_streaming(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a b c", "completion": "d e"}\n' * 3)
    script = (
        "import sys; from slap_stream import convert, embed; convert('in.jsonl', 'corpus'); "
        "embed('corpus'); print(sorted({'streaming', 'torch'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"
