"""Raw samples of a corpus on local disk, in the order of their ids."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slap_stream.core.files import local_path, path_inside
from slap_stream.errors import CorpusError, DamagedShardError
from slap_stream.remote.cache import FileCache
from slap_stream.shards.decode import SampleDecoder, sample_bounds
from slap_stream.shards.encodings import UNSAFE_ENCODINGS, codec_of
from slap_stream.shards.index import INDEX_NAME, PathLike, ShardInfo, digest_of, read_index

if TYPE_CHECKING:
    from slap_stream.shards.library import Reader

# What comes of bytes that are not those of a value.
_OF_BYTES = (
    *(ValueError, TypeError, LookupError, OverflowError, RecursionError, EOFError),
    *(struct.error, DamagedShardError),
)
# Samples that are read and decoded together, and their bytes unless a sample is larger.
_GROUP_SAMPLES = 512
_GROUP_BYTES = 4 << 20


def iter_corpus(
    corpus_dir: PathLike,
    start: int = 0,
    stop: int | None = None,
    *,
    remote: FileCache | None = None,
) -> Iterator[dict[str, Any]]:
    """Raw samples of a corpus on local disk, in sample-id order.

    Shards of which only the compressed files are there are unpacked into a temporary directory,
    one at a time; the corpus is not changed.

    Args:
        corpus_dir: Directory with an index.json.
        start: First sample id.
        stop: Sample id to stop before; None reads to the end.
        remote: Fetches the shards, of which the directory then needs none.

    Yields:
        Samples as dicts of their columns.

    Raises:
        CorpusError: If the index is missing or unusable, the range is not inside the corpus, a
            shard is missing, or a column would have to be unpickled.
        DamagedShardError: If a shard does not hold what its index says.
    """
    directory = local_path("corpus", corpus_dir)
    index = read_index(directory)
    sizes = np.array([shard["samples"] for shard in index], np.int64)
    num_samples = int(sizes.sum())
    stop = num_samples if stop is None else stop
    if not 0 <= start <= stop <= num_samples:
        raise CorpusError(
            f"range must lie inside [0, {num_samples}), got [{start}, {stop}) in "
            f"{str(directory)!r}."
        )
    first_id = np.cumsum(sizes) - sizes
    for shard_id, shard in enumerate(index):
        low = max(start - int(first_id[shard_id]), 0)
        high = min(stop - int(first_id[shard_id]), int(sizes[shard_id]))
        if low >= high:
            continue
        with ExitStack() as stack:
            try:
                decoder = _decoder(shard)
                foreign = None if decoder is not None else _foreign_reader(directory, shard)
            except (KeyError, TypeError, ValueError) as error:
                raise CorpusError(
                    f"shard {shard_id} of {str(directory)!r} must be readable without unpickling, "
                    f"got an entry in index.json that is not: {error}"
                ) from error
            there = directory if remote is None else _fetched(remote, shard, stack)
            at = _unpacked(there, shard, stack)
            if decoder is not None:
                path = at / shard["raw_data"]["basename"]
                yield from _samples(path, shard, decoder, low, high)
            elif foreign is not None:
                foreign.dirname, foreign.split = str(at), ""
                for row in range(low, high):
                    try:
                        sample = foreign[row]
                    except _OF_BYTES as error:
                        raise _damaged(shard["raw_data"]["basename"], error) from error
                    yield sample


def _damaged(name: str, error: Exception) -> DamagedShardError:
    return DamagedShardError(
        f"shard {name!r} must hold samples of the columns that index.json names, got one that is "
        f"not ({type(error).__name__}: {error}); fetch it or write it again."
    )


def _decoder(shard: ShardInfo) -> SampleDecoder | None:
    """Decodes samples of an MDS shard; None for other formats."""
    if shard["format"] != "mds":
        return None
    missing = {"basename", "bytes"} - set(shard["raw_data"])
    if missing:
        raise KeyError(*missing)
    encodings = shard["column_encodings"]
    unsafe = [encoding for encoding in encodings if encoding in UNSAFE_ENCODINGS]
    if unsafe:
        raise ValueError(f"columns encoded as {unsafe!r}")
    codecs = list(map(codec_of, encodings))
    return SampleDecoder(shard["column_names"], shard["column_sizes"], codecs)


def _foreign_reader(directory: Path, shard: ShardInfo) -> Reader:
    """Streaming's reader of a shard that is not MDS."""
    from slap_stream.shards.library import reader_from_json

    reader = reader_from_json(str(directory), None, shard)
    reader.validate(allow_unsafe_types=False)
    return reader


def _samples(
    path: Path, shard: ShardInfo, decoder: SampleDecoder, low: int, high: int
) -> Iterator[dict[str, Any]]:
    """Samples `low` to `high` of an MDS file, a group of them with one read."""
    name, samples, size = path.name, int(shard["samples"]), int(shard["raw_data"]["bytes"])
    with path.open("rb") as file:
        header = np.frombuffer(file.read(4 * (samples + 2)), np.uint32)
        bounds = sample_bounds(header, samples, size, f"shard {name!r}")
        while low < high:
            limit = int(bounds[low]) + _GROUP_BYTES
            until = int(np.searchsorted(bounds, limit, side="right")) - 1
            until = min(max(until, low + 1), low + _GROUP_SAMPLES, high)
            ends = bounds[low : until + 1].tolist()
            file.seek(ends[0])
            data = file.read(ends[-1] - ends[0])
            if len(data) < ends[-1] - ends[0]:
                raise DamagedShardError(
                    f"shard {name!r} must keep its size while it is read, got it cut short; "
                    "something else wrote to it."
                )
            packed = [data[begin - ends[0] : end - ends[0]] for begin, end in pairwise(ends)]
            try:
                decoded = decoder(packed)
            except _OF_BYTES as error:
                raise _damaged(name, error) from error
            yield from decoded
            low = until


def _fetched(remote: FileCache, shard: ShardInfo, stack: ExitStack) -> Path:
    """Where a shard's files are as long as the stack, though others may be thrown away by then."""
    remote.directory.mkdir(parents=True, exist_ok=True)
    folder = tempfile.TemporaryDirectory(prefix=".reading-", dir=remote.directory)
    reading = Path(stack.enter_context(folder))
    keys = ("zip_data", "zip_meta") if shard.get("zip_data") else ("raw_data", "raw_meta")
    for file in (shard[key] for key in keys if shard.get(key)):
        remote.link(file["basename"], file["bytes"], digest_of(file), reading)
    return reading


def _unpacked(directory: Path, shard: ShardInfo, stack: ExitStack) -> Path:
    """Where a shard's raw files are: in their place, or unpacked and there as long as the stack."""
    raw = [shard[key] for key in ("raw_data", "raw_meta") if shard.get(key)]
    for file in raw:
        path_inside(INDEX_NAME, directory, file["basename"])
    if all((directory / file["basename"]).is_file() for file in raw):
        for file in raw:
            size = (directory / file["basename"]).stat().st_size
            if size != file["bytes"]:
                raise CorpusError(
                    f"shard {file['basename']!r} must have the {file['bytes']} bytes that "
                    f"index.json says, got {size}; fetch it or write the corpus again."
                )
        return directory
    packed = [shard[key] for key in ("zip_data", "zip_meta") if shard.get(key)]
    if len(packed) != len(raw) or not all(
        (directory / file["basename"]).is_file() for file in packed
    ):
        missing = next(file for file in raw if not (directory / file["basename"]).is_file())
        raise CorpusError(
            f"shards of {str(directory)!r} must be on local disk, got no "
            f"{Path(missing['basename']).name!r}; download the corpus first, or write it again."
        )
    from slap_stream.shards.library import UNPACK_ERRORS, decompress

    unpacked = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slap-shard-")))
    for file, zipped in zip(raw, packed, strict=True):
        target = unpacked / file["basename"]
        target.parent.mkdir(parents=True, exist_ok=True)
        data = path_inside(INDEX_NAME, directory, zipped["basename"]).read_bytes()
        try:
            unzipped = decompress(shard["compression"], data)
        except UNPACK_ERRORS as error:
            raise DamagedShardError(f"{zipped['basename']} cannot be unpacked: {error}") from error
        if len(unzipped) != file["bytes"]:
            raise DamagedShardError(
                f"{zipped['basename']} must hold the {file['bytes']} bytes that index.json says, "
                f"got {len(unzipped)}; fetch it or write the corpus again."
            )
        target.write_bytes(unzipped)
    return unpacked
