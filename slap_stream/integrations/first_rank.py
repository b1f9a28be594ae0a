"""Work that one rank does while the others wait, for however long it takes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from slap_stream.errors import CorpusError

_Found = TypeVar("_Found")
# A corpus may take hours, in which the training's own groups would give up; should the first rank
# die, its connections end, and so does the waiting.
_PATIENCE = timedelta(days=30)
MEETING = default_pg_timeout
"""How long ranks wait for one that has not come yet."""


def first_rank_first(first: Callable[[], _Found], others: Callable[[_Found], _Found]) -> _Found:
    """Let the first rank work, then the others with what it found; all ranks call this.

    Where torch.distributed is not initialised, every process is a first one. What may fail on one
    rank and not on others belongs in here: a rank that does not come lets the others wait.

    Args:
        first: What the first rank does; what it returns is pickled.
        others: What each other rank does afterwards.

    Raises:
        CorpusError: On every rank, if one of them has failed (on that one, what it has raised); or
            if one never comes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return first()
    # Made first, because the patient group would wait patiently for a rank that never comes.
    try:
        meeting = dist.new_group(timeout=MEETING, backend="gloo")
    except RuntimeError as error:
        raise CorpusError(
            f"all ranks must come to prepare their dataset, got an error on waiting for them: "
            f"{error}; see what the others say."
        ) from error
    dist.destroy_process_group(meeting)
    group = dist.new_group(timeout=_PATIENCE, backend="gloo")
    try:
        return _in_turn(first, others, group)
    finally:
        dist.destroy_process_group(group)


def _in_turn(first: Callable[[], _Found], others: Callable[[_Found], _Found], group: Any) -> _Found:
    found: Any = None
    error: Exception | None = None
    rank = dist.get_rank()
    if rank == 0:
        # Raised again below, when the others know.
        try:
            found = first()
        except Exception as raised:
            error = raised
    told = [(found, error is None)]
    dist.broadcast_object_list(told, src=0, group=group)
    found, has_begun = told[0]
    if rank and has_begun:
        try:
            found = others(found)
        except Exception as raised:
            error = raised
    failures: list[str | None] = [None] * dist.get_world_size()
    mine = None if error is None else f"{type(error).__name__}: {error}"
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
