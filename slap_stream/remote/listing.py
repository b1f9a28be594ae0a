"""Files below a URL, chosen by a pattern or as a folder, each quacking like a path."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from slap_stream.errors import RemoteError
from slap_stream.remote.bucket import RemoteFile, describe, list_below
from slap_stream.remote.urls import Url

logger = logging.getLogger(__name__)

_WILD = re.compile(r"[*?\[]")
# A wild card, a choice of characters, or anything else.
_WILD_CARDS = re.compile(r"\*|\?|\[!?[^\]!][^\]]*\]|.", re.DOTALL)


class Stat(NamedTuple):
    """What changes when a file does, under the names of a local one.

    Attributes:
        st_size: In bytes.
        st_mtime_ns: Version as its store tells it, a text.
    """

    st_size: int
    st_mtime_ns: str


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file elsewhere, with what is asked of the path of an input.

    Attributes:
        file: As its store describes it.
    """

    file: RemoteFile

    def __str__(self) -> str:
        return str(self.file.url)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.file.url.name

    @property
    def suffix(self) -> str:
        """Last ending of the name."""
        return PurePosixPath(self.name).suffix

    @property
    def suffixes(self) -> list[str]:
        """Endings of the name."""
        return PurePosixPath(self.name).suffixes

    @property
    def parts(self) -> tuple[str, ...]:
        """Bucket, folders and name."""
        return (self.file.url.host, *PurePosixPath(self.file.url.key).parts)

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    def resolve(self) -> RemotePath:
        """Itself."""
        return self

    def stat(self) -> Stat:
        """Size and version, as they were when it was found."""
        return Stat(self.file.num_bytes, self.file.version)


def listed(url: Url) -> tuple[list[RemotePath], bool]:
    """The file of this URL; or those that a pattern fits, or that lie in a folder.

    Args:
        url: With `*`, `?` and `[...]` inside a part of the path, `**` for any folders: a pattern.

    Returns:
        Files, by name; and whether the URL names one of them itself.

    Raises:
        RemoteError: If there are none, or the store cannot be reached.
    """
    wild = _WILD.search(url.key)
    if wild is None or url.scheme in ("https", "http"):
        try:
            return [RemotePath(describe(url))], True
        except RemoteError as error:
            if not error.missing or url.scheme in ("https", "http"):
                raise
        below = list_below(url)
        found = [file for file in below if "/" not in _below(url, file)]
        if found and len(found) < len(below):
            logger.warning(
                "%s: %d files in its sub-folders are not read; name them, too, if they are inputs, "
                "or write %s/**/*.",
                url,
                len(below) - len(found),
                url,
            )
    else:
        folder = url.key[: wild.start()].rpartition("/")[0]
        fits = _pattern(url.key)
        found = [
            file for file in list_below(Url(url.scheme, url.host, folder)) if fits(file.url.key)
        ]
    if not found:
        raise RemoteError(
            f"file or folder must be there, got {str(url)!r}, below which nothing was found; check "
            "the address and the permissions.",
            missing=True,
        )
    return [RemotePath(file) for file in found], False


def _below(url: Url, file: RemoteFile) -> str:
    return file.url.key[len(url.key) :].strip("/")


def _pattern(pattern: str) -> Callable[[str], object]:
    """What fits a pattern whose wild cards stay within a part of the path, but for `**`.

    `fnmatch` lets them run over slashes.
    """
    parts = [
        "(?:[^/]+/)*" if part == "**" else _WILD_CARDS.sub(_as_regex, part) + "/"
        for part in pattern.split("/")
    ]
    return re.compile("".join(parts).removesuffix("/"), re.DOTALL).fullmatch


def _as_regex(found: re.Match[str]) -> str:
    text = found[0]
    if text in ("*", "?"):
        return "[^/]*" if text == "*" else "[^/]"
    if len(text) > 1:
        inside = text[1:-1].replace("\\", r"\\").replace("[", r"\[")
        return f"[^/{inside[1:]}]" if inside[0] == "!" else f"[{inside}]"
    return re.escape(text)
