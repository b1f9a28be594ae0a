"""Datasets opened: those of several jobs on one machine, one after the other."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

WAIT_SECONDS = 120.0


@contextmanager
def one_at_a_time(*, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Make a `StreamingDataset` inside, and no other job of this machine makes one meanwhile.

    Streaming names a dataset's shared memory by the first number that is free. Two jobs that look
    at the same moment find the same one, and one of them ends with FileExistsError, or both with
    one memory. Here they take turns, as far as all of them do this.

    One process of a job takes the turn, the first on the machine (`LOCAL_RANK` 0): streaming lets
    the others of its job wait for it.

    Args:
        wait_seconds: How long to wait for a turn; after it one goes ahead, with a warning.
    """
    if int(os.environ.get("LOCAL_RANK", "0")):
        yield
        return
    path = Path(tempfile.gettempdir(), "slap_stream_opening.lock")
    # Another user's jobs take turns too. One lock for the process: who has the turn may ask again.
    lock = FileLock(path, mode=0o666, is_singleton=True)
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        logger.warning(
            "%s is held by another process for more than %.0f s; going ahead without a turn.",
            path,
            wait_seconds,
        )
    try:
        yield
    finally:
        lock.release()


def open_local(corpus: Path, batch_size: int) -> Any:
    """A `StreamingDataset` over a directory of shards, made in turn with those of other jobs."""
    # Not on top: streaming takes seconds to load.
    from slap_stream.shards.library import StreamingDataset

    with one_at_a_time():
        return StreamingDataset(local=str(corpus), batch_size=batch_size)


def is_stock(dataset: Any) -> bool:
    """Whether a dataset is a `StreamingDataset` whose samples are as they stand in the shards."""
    from slap_stream.shards.library import StreamingDataset

    is_one = isinstance(dataset, StreamingDataset)
    return is_one and type(dataset).__getitem__ is StreamingDataset.__getitem__
