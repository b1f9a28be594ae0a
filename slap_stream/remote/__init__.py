"""Files in object stores and on the web, as far as a tool or a training needs them.

in   URLs: s3://, gs://, az:// (read and write), https://, http://, hf:// (read)
out  bytes of them; whole files in a bounded folder; a local folder, published when it is whole

urls.py     what is a URL here, and how it may be printed
bucket.py   requests, tried again for a while; the only importer of obstore and fsspec
listing.py  files below a URL, by pattern or as a folder
reading.py  one file, read by position
cache.py    whole files on local disk within a bound, shared by processes
output.py   a folder that is written locally, then uploaded, with what makes it whole last
"""

from __future__ import annotations

# What other folders may import, by module; tests/test_architecture.py holds it.
EXPORTS = {
    "urls": ("is_remote", "parse_url"),
    "bucket": ("download",),
    "listing": ("RemotePath", "listed"),
    "reading": ("open_remote",),
    "cache": ("CACHE_BYTES", "FileCache", "scratch"),
    "output": ("Output", "check_output", "output_to"),
}
