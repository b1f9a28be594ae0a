"""Room on a disk: asked for before work is done, and named when it is used up."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slap_stream.errors import CorpusError

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)


def require_room(name: str, path: Path, num_bytes: int, *, exact: bool) -> None:
    """Find out whether so much can be written.

    Args:
        name: What the path is called in an error.
        path: Where it will be; need not be there yet.
        num_bytes: What will be written.
        exact: Whether that is known. What is only guessed is warned of, and not refused.

    Raises:
        CorpusError: If it is known that there is not enough room.
    """
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if num_bytes <= free:
        return
    if exact:
        raise CorpusError(
            f"{name} must lie where {num_bytes:,} bytes are free, got {str(path)!r} with {free:,}; "
            "free some and run the same again, or choose another disk."
        )
    logger.warning(
        "%s: about %s bytes will be needed, and %s are free.", path, f"{num_bytes:,}", f"{free:,}"
    )


@contextmanager
def told_when_full(name: str, path: Path, num_bytes: int) -> Iterator[None]:
    """Say of a full disk which it is and what it takes.

    Args:
        name: What the path is called in an error.
        path: Where all is written that is written inside.
        num_bytes: What that comes to, about.

    Raises:
        CorpusError: Instead of the system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(path).free
        raise CorpusError(
            f"{name} must lie where about {num_bytes:,} bytes are free, got {str(path)!r}, which "
            f"has become full ({free:,} left); what is done is kept: free some and run the same "
            "again."
        ) from error
