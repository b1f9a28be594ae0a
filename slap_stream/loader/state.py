"""A loader's checkpoint, put together from all ranks, and refused if it is another's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slap_stream.core.state_bytes import from_bytes, to_bytes
from slap_stream.errors import StateError
from slap_stream.loader.pending import PENDING, join_pending
from slap_stream.loader.ranks import Ranks
from slap_stream.selection.state import require_keys
from slap_stream.types import Position, State

STATE_VERSION = 4


def whole_state(
    ranks: Ranks,
    position: Position,
    *,
    index_digests: Sequence[str],
    sampler: State,
    pending: State,
    probe: State | None,
) -> State:
    """The state of all lanes, the same on every rank; every rank calls it at the same step.

    Args:
        ranks: Who hosts the lanes.
        position: Where this rank is.
        index_digests: Of each stream's index.
        sampler: State of this rank's sampler.
        pending: State of this rank's pending batches.
        probe: State of the attached probe, if there is one.

    Raises:
        ExchangeError: If a rank does not answer in time or is at another step.
    """
    mine = to_bytes({"lanes": sampler["lanes"], "pending": pending})
    everyones = [from_bytes(data) for data in ranks.gather(mine, position)]
    learnt = to_bytes(sampler["model"]) if ranks.learns else None
    model = from_bytes(ranks.tell(learnt, position))
    # Tuples: torch.distributed.checkpoint takes dicts and lists of dicts apart, and loads only
    # those parts that the state before loading has too, so of as many lanes; a tuple stays whole.
    lanes = tuple(lane for state in everyones for lane in state["lanes"])
    return {
        "version": STATE_VERSION,
        "index_digests": list(index_digests),
        "sampler": {**sampler, "model": model, "lanes": lanes},
        "probe": () if probe is None else (probe,),
        **join_pending([state["pending"] for state in everyones]),
    }


def check_loader_state(state: Any, index_digests: Sequence[str]) -> None:
    """Refuse a state that is of another version or dataset; the sampler checks its own part.

    Raises:
        StateError: If it is.
    """
    require_keys(state, ("version", "index_digests", "sampler", "probe", *PENDING))
    if state.get("version") != STATE_VERSION:
        raise StateError(
            f"version must be {STATE_VERSION}, got {state.get('version')!r}; the state was "
            "written by another version of slap_stream."
        )
    if list(state["index_digests"]) != list(index_digests):
        raise StateError(
            "index_digests must be those of this dataset, got others; the state belongs to "
            "another dataset, or this one was converted again."
        )
