"""Samples from their bytes: codecs looked up once instead of for every value."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.errors import DamagedShardError
from slap_stream.shards.encodings import Codec


def sample_bounds(
    header: NDArray[np.uint32], samples: int, size: int, name: str
) -> NDArray[np.uint32]:
    """Where each sample of an MDS file begins and the last ends.

    Args:
        header: The file's first numbers: how many samples, then the bounds; of a short file, fewer.
        samples: How many samples its index says.
        size: Bytes of the file.
        name: What the file is called in an error.

    Returns:
        (samples + 1,) bytes from the start of the file, ascending; a view.

    Raises:
        DamagedShardError: If the header does not fit.
    """
    if len(header) and header[0] != samples:
        raise DamagedShardError(f"{name} holds {header[0]} samples, its index says {samples}")
    bounds = header[1:]
    if len(bounds) != samples + 1 or np.any(bounds[:-1] > bounds[1:]):
        raise DamagedShardError(f"{name} must say where its {samples} samples begin and end")
    if bounds[0] < 4 * (samples + 2):
        raise DamagedShardError(f"{name} must begin with where its samples are, not with a sample")
    if bounds[-1] != size:
        raise DamagedShardError(f"{name} should end after {bounds[-1]} bytes, but has {size}")
    return bounds


class SampleDecoder:
    """Makes samples of one set of columns; what it makes equals `MDSReader.decode_sample`'s.

    Holds one codec per column.

    Args:
        names: (num_columns,) column names.
        sizes: (num_columns,) bytes of a value, None where each value has its own size.
        codecs: (num_columns,) as `codec_of` finds them.
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int | None], codecs: Sequence[Codec]
    ) -> None:
        self._columns = [
            (name, size or 0, codec.decode)
            for name, size, codec in zip(names, sizes, codecs, strict=True)
        ]
        # A sample begins with the sizes of those of its values that have one of their own.
        self._sizes = struct.Struct(f"={sum(not size for size in sizes)}I")

    def __call__(self, samples: Sequence[bytes]) -> list[dict[str, Any]]:
        """Decode (n,) samples."""
        columns, header, read_sizes = self._columns, self._sizes.size, self._sizes.unpack_from
        decoded = []
        for data in samples:
            own_sizes, begin, values = iter(read_sizes(data)), header, {}
            for name, size, decode in columns:
                end = begin + (size or next(own_sizes))
                values[name] = decode(data[begin:end])
                begin = end
            if begin != len(data):
                # Not yet the shard's: whoever has read it compares that with its index.
                raise ValueError(
                    f"a sample must be as long as its values say, got {len(data)} bytes for {begin}"
                )
            decoded.append(values)
        return decoded
