"""Work that one rank does while the others wait, for however long it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from slap_stream.core.background import BackgroundThread
from slap_stream.errors import CorpusError

_Found = TypeVar("_Found")
MEETING = default_pg_timeout
"""How long ranks wait for one that they hear nothing of."""
_PAUSE_SECONDS = 1.0


def first_rank_first(first: Callable[[], _Found], others: Callable[[_Found], _Found]) -> _Found:
    """Let the first rank work, then the others with what it found; all ranks call this.

    Where torch.distributed is not initialised, every process is a first one. What may fail on one
    rank and not on others belongs in here: a rank that does not come lets the others wait.

    Args:
        first: What the first rank does; what it returns is pickled.
        others: What each other rank does afterwards.

    Raises:
        CorpusError: On every rank, if one of them has failed (on that one, what it has raised); or
            if one never comes, or ends before all are done.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return first()
    with _explained():
        group = dist.new_group(timeout=MEETING, backend="gloo")
    try:
        return _in_turn(first, others, group)
    finally:
        dist.destroy_process_group(group)


def _in_turn(first: Callable[[], _Found], others: Callable[[_Found], _Found], group: Any) -> _Found:
    rank = dist.get_rank()
    found, error = _together(None if rank else first, group)
    told = [(found, error is None)]
    with _explained():
        dist.broadcast_object_list(told, src=0, group=group)
    begun, has_begun = told[0]
    if rank and has_begun:
        found, error = _together(partial(others, begun), group)
    elif has_begun:
        _together(None, group)
    failures: list[str | None] = [None] * dist.get_world_size()
    mine = None if error is None else f"{type(error).__name__}: {error}"
    with _explained():
        dist.all_gather_object(failures, mine, group=group)
    if error is not None:
        raise error
    failed = [number for number, failure in enumerate(failures) if failure is not None]
    if failed:
        raise CorpusError(
            f"all ranks must have the corpus, got an error on rank {failed[0]} ({len(failed)} in "
            f"all): {failures[failed[0]]}"
        )
    result: _Found = found
    return result


def _together(work: Callable[[], Any] | None, group: Any) -> tuple[Any, Exception | None]:
    """Do this rank's work, if it has any, and wait until all ranks have done theirs.

    What it comes to, or what it has raised: that is to be told to the others before it is raised.
    """
    found, error = None, None
    with _signs_of_life(group):
        try:
            found = None if work is None else work()
        except Exception as raised:
            error = raised
    return found, error


@contextmanager
def _signs_of_life(group: Any) -> Iterator[None]:
    """Left when all ranks have left it, however long one of them works inside.

    A corpus may take hours. A collective with as much patience would wait as long for a rank that
    has died while the ranks connected; so they say every second that they are there.
    """
    done, given_up = threading.Event(), threading.Event()

    def say() -> None:
        working = True
        while working and not given_up.is_set():
            ranks_at_work = torch.tensor([int(not done.is_set())])
            dist.all_reduce(ranks_at_work, group=group)
            working = bool(ranks_at_work)
            if working:
                # Those who are done wait for the others in the collective.
                done.wait(_PAUSE_SECONDS)

    thread = BackgroundThread("slap-signs-of-life")
    signs = thread.post(say)
    try:
        yield
    except BaseException:
        # An interrupt: nobody is waited for.
        given_up.set()
        done.set()
        raise
    done.set()
    with _explained():
        signs.get()


@contextmanager
def _explained() -> Iterator[None]:
    """Say what the errors of connections mean here."""
    try:
        yield
    except RuntimeError as error:
        raise CorpusError(
            "all ranks must come to prepare their dataset and stay until it is there, got an error "
            f"on waiting for them: {error}; see what the others say."
        ) from error
