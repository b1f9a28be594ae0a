"""All that we use of mosaicml-streaming; the only module that imports it."""

from __future__ import annotations

from streaming import StreamingDataset
from streaming.base.compression import decompress
from streaming.base.format import MDSWriter, Reader, reader_from_json
from streaming.base.format.mds import MDSReader
from streaming.base.format.mds.encodings import (
    _get_coder as coder_of,
)
from streaming.base.format.mds.encodings import (
    get_mds_encodings,
    is_mds_encoding,
    is_mds_encoding_safe,
)

__all__ = [
    "MDSReader",
    "MDSWriter",
    "Reader",
    "StreamingDataset",
    "coder_of",
    "decompress",
    "get_mds_encodings",
    "is_mds_encoding",
    "is_mds_encoding_safe",
    "reader_from_json",
]
