"""URLs of files that lie elsewhere: what they name, and how they may be printed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote

from slap_stream.errors import CorpusError

WRITABLE = ("s3", "gs", "az")
READABLE = (*WRITABLE, "https", "http", "hf")
_WEB = ("https", "http")
# What a path on the web may hold as it is.
_PLAIN = "/~!$&'()*+,;=:@"
# A `Path` has made one slash of two.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Url:
    """A place in an object store or on the web; `str` gives a URL that holds no credentials.

    `parse_url` makes the same of that again.

    Attributes:
        scheme: One of `READABLE`.
        host: Bucket, container, host, or what comes first in a repository's address.
        key: The rest, without a slash at either end; of the web, unquoted.
    """

    scheme: str
    host: str
    key: str

    def __str__(self) -> str:
        key = quote(self.key, _PLAIN) if self.scheme in _WEB else self.key
        return f"{self.scheme}://{self.host}/{key}".rstrip("/")

    def below(self, name: str) -> Url:
        """A file or folder below this one."""
        return replace(self, key=f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]


def is_remote(path: object) -> bool:
    """Whether a path is a URL of a kind that is served here."""
    if not isinstance(path, str | os.PathLike):
        return False
    found = _URL.match(str(path))
    return found is not None and found[1].lower() in READABLE


def parse_url(name: str, path: str | os.PathLike[str]) -> Url:
    """The parts of a URL that `is_remote`.

    Args:
        name: What the path is called in an error.
        path: As it was given.

    Raises:
        CorpusError: If it names no bucket or host, or holds what may be a credential.
    """
    found = _URL.match(str(path))
    assert found is not None
    scheme = found[1].lower()
    host, _, key = found[2].partition("/")
    query = ""
    if scheme in _WEB:
        key, _, query = key.partition("?")
        key = unquote(key.partition("#")[0])
    if "@" in host or query:
        shown = f"{scheme}://{host.rpartition('@')[2]}/{key}"
        raise CorpusError(
            f"{name} must be a URL without user, password and query, got one for {shown!r} that "
            "has some, which logs and reports would show; give credentials by the environment, or "
            "download the file first."
        )
    if not host:
        raise CorpusError(
            f"{name} must name a bucket or a host, got {str(path)!r}; write {scheme}://NAME/PATH."
        )
    return Url(scheme, host, key.strip("/"))
