"""Samples decoded a group at a time are those that streaming decodes one by one."""

from __future__ import annotations

import io
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from streaming.base.format.mds import MDSReader
from streaming.base.format.mds.encodings import get_mds_encodings, mds_encode

from slap_stream.shards.view import ShardView, _decoders

# Streaming leaves the compressed files that it unpacks to the garbage collector.
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file.*shard\.:ResourceWarning")

INTS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
FLOATS = [f"float{bits}" for bits in (16, 32, 64)]


def _array(dtype: str, shape: Any) -> st.SearchStrategy[Any]:
    return npst.arrays(dtype, shape)


def _image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (3 + seed, 5, 3), np.uint8)
    return Image.fromarray(pixels)


def _jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="JPEG")
    return out.getvalue()


IMAGES = st.integers(0, 5).map(_image)
SHAPES = npst.array_shapes(max_dims=3, max_side=300).filter(lambda shape: np.prod(shape) < 2000)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "bytes": st.binary(),
    "str": st.text(),
    "int": st.integers(-(2**63), 2**63 - 1),
    "ndarray": st.sampled_from(INTS + FLOATS).flatmap(lambda dtype: _array(dtype, SHAPES)),
    "str_int": st.integers(),
    "str_float": st.floats(allow_nan=False),
    "str_decimal": st.decimals(allow_nan=False),
    "pil": IMAGES,
    "jpeg": IMAGES,
    "png": IMAGES,
    "jpeg_array": st.lists(IMAGES.map(_jpeg), min_size=1, max_size=3),
    "jpegarray": st.lists(IMAGES.map(_jpeg), min_size=1, max_size=3),
    "list[pil]": st.lists(IMAGES, max_size=3),
    "list[jpeg]": st.lists(IMAGES, max_size=3),
    "list[png]": st.lists(IMAGES, max_size=3),
    "pkl": JSON,
    "json": JSON,
    # Not every encoding that a shard may name, but each way in which one is written.
    "ndarray:int32": _array("int32", SHAPES),
    "ndarray:uint16": _array("uint16", st.integers(1, 70_000).map(lambda n: (n,))),
    "ndarray:float32:2,3": _array("float32", (2, 3)),
    "ndarray:int64:4": _array("int64", 4),
    **{name: npst.from_dtype(np.dtype(name)) for name in INTS + FLOATS},
}


def alike(left: Any, right: Any) -> bool:
    """Equal, of the same type, and alike in what a user could come to depend on."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        flags = ("WRITEABLE", "ALIGNED", "C_CONTIGUOUS")
        return (
            (left.dtype, left.shape) == (right.dtype, right.shape)
            and left.tobytes() == right.tobytes()
            and all(left.flags[flag] == right.flags[flag] for flag in flags)
        )
    if isinstance(left, np.generic):
        return left.dtype == right.dtype and left.tobytes() == right.tobytes()
    if isinstance(left, Image.Image):
        return (left.mode, left.size) == (right.mode, right.size) and (
            left.tobytes() == right.tobytes()
        )
    if isinstance(left, list):
        return len(left) == len(right) and all(map(alike, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(alike(left[key], right[key]) for key in left)
    return bool(left == right)


def test_every_encoding_of_streaming_is_tried() -> None:
    assert {name.partition(":")[0] for name in VALUES} == get_mds_encodings()


def _reader(columns: dict[str, str], folder: Path) -> MDSReader:
    writer = MDSWriter(columns=columns, out=str(folder))
    writer.cancel_future_jobs()
    obj = {
        "column_names": writer.column_names,
        "column_encodings": writer.column_encodings,
        "column_sizes": writer.column_sizes,
        "raw_data": {"basename": "shard.00000.mds", "bytes": 0, "hashes": {}},
    }
    fixed = {"version": 2, "format": "mds", "compression": None, "hashes": [], "samples": 1}
    return MDSReader.from_json("", None, {**fixed, **obj, "size_limit": None, "zip_data": None})


def _encode(reader: MDSReader, sample: dict[str, Any]) -> bytes:
    columns = zip(reader.column_names, reader.column_encodings, reader.column_sizes, strict=True)
    parts = [(size, mds_encode(encoding, sample[name])) for name, encoding, size in columns]
    sizes = np.array([len(data) for size, data in parts if not size], np.uint32)
    return sizes.tobytes() + b"".join(data for _, data in parts)


@pytest.mark.parametrize("encoding", VALUES)
def test_a_value_decodes_as_streaming_decodes_it(encoding: str, tmp_path: Path) -> None:
    reader = _reader({"before": "str", "value": encoding, "with": "int"}, tmp_path)

    @settings(max_examples=25, deadline=None)
    @given(value=VALUES[encoding], before=st.text(max_size=5))
    def check(value: Any, before: str) -> None:
        data = _encode(reader, {"before": before, "value": value, "with": -3})
        [decoder] = _decoders([reader])
        assert decoder is not None
        assert alike(decoder([data, data]), [reader.decode_sample(data)] * 2)

    check()


def test_what_tells_samples_apart_can_tell() -> None:
    floats = np.zeros(3, np.float32)
    assert not alike(floats, floats.astype(np.float64))
    assert not alike(floats, np.frombuffer(floats.tobytes(), np.float32))
    assert not alike(
        floats, np.frombuffer(b"." + floats.tobytes(), np.float32, offset=1).copy()[:2]
    )
    assert not alike({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert not alike(_image(1), _image(2))
    assert not alike(np.int32(1), 1)


@pytest.mark.parametrize("compression", [None, "zstd", "gz"])
def test_samples_of_a_corpus_are_those_of_the_dataset(
    tmp_path: Path, compression: str | None
) -> None:
    columns = {"a": "str", "b": "ndarray:int32", "c": "json", "d": "str_decimal", "e": "jpeg"}
    with MDSWriter(
        columns=columns, out=str(tmp_path / "c"), compression=compression, size_limit=2500
    ) as writer:
        for n in range(12):
            writer.write(
                {
                    "a": "é" * n,
                    "b": np.arange(n + 1, dtype=np.int32),
                    "c": {"n": n},
                    "d": Decimal(n) / 7,
                    "e": _image(n % 5),
                }
            )
    dataset = StreamingDataset(local=str(tmp_path / "c"), batch_size=4)
    assert len(dataset.shards) > 2
    ids = [11, 0, 7, 3, 3]
    samples = ShardView(dataset).__getitems__(ids)
    assert all(alike(dataset[i], value) for i, value in zip(ids, samples, strict=True))


class OwnDecoding(MDSReader):
    """A reader that does something of its own with the bytes."""

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        return {"bytes": len(data)}


def test_a_reader_that_decodes_by_itself_still_does(tmp_path: Path) -> None:
    with MDSWriter(columns={"a": "str"}, out=str(tmp_path / "c")) as writer:
        for n in range(3):
            writer.write({"a": "x" * n})
    dataset = StreamingDataset(local=str(tmp_path / "c"), batch_size=4)
    dataset.shards[0].__class__ = OwnDecoding
    assert ShardView(dataset).__getitems__([2, 0]) == [{"bytes": 6}, {"bytes": 4}]
