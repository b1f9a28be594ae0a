"""A loader's checkpoint, put together from all ranks, and refused if it is another's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slap_stream.core.saved import Saved
from slap_stream.core.state_bytes import from_bytes, to_bytes
from slap_stream.errors import StateError
from slap_stream.loader.pending import join_pending
from slap_stream.loader.ranks import Ranks
from slap_stream.types import Position, State

STATE_VERSION = 6


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
    shared = sampler["shared"]
    learnt = to_bytes(shared["model"]) if ranks.learns else None
    shared = {**shared, "model": from_bytes(ranks.tell(learnt, position))}
    # Tuples: torch.distributed.checkpoint takes dicts and lists of dicts apart, and loads only
    # those parts that the state before loading has too, so of as many lanes; a tuple stays whole.
    lanes = tuple(lane for state in everyones for lane in state["lanes"])
    return {
        "version": STATE_VERSION,
        "index_digests": list(index_digests),
        "sampler": {**sampler, "shared": shared, "lanes": lanes},
        # Without a probe an empty one, so that one that was cut off is missed.
        "probe": (probe or {},),
        **join_pending([state["pending"] for state in everyones]),
    }


def check_loader_state(
    state: Any, *, index_digests: Sequence[str], num_samples: int
) -> State | None:
    """Refuse a state that is of another version or dataset, or whose pending batches were cut; the
    sampler and the probe check their own parts.

    Args:
        state: What a loader's `state_dict` gave.
        index_digests: Of each stream's index.
        num_samples: Samples of the dataset.

    Returns:
        The probe's part, None if there was no probe.

    Raises:
        StateError: If it does not fit.
    """
    saved = Saved(state)
    saved.check_version(STATE_VERSION)
    run = saved.part("sampler").part("run")
    digests = saved.sequence("index_digests")
    if len(digests) != len(index_digests) or not all(
        isinstance(one, str) and one == other
        for one, other in zip(digests, index_digests, strict=True)
    ):
        raise StateError(
            "index_digests must be those of this dataset, got others; the state belongs to "
            "another dataset, or this one was converted again."
        )
    saved.number("progress", least=0.0, most=1.0)
    pending = saved.sequence("pending")
    # Of another size the sampler refuses it, with all that differs.
    global_batch = run.whole("global_batch", least=1)
    batches = Saved({str(place): ids for place, ids in enumerate(pending)}, "state.pending")
    for place in range(len(pending)):
        batches.wholes(str(place), global_batch, below=num_samples)
    saved.numbers("pending_progress", len(pending), least=0.0, most=1.0)
    grouping = saved.part("grouping")
    grouping.whole("window", least=1)
    grouping.whole("origin")
    grouping.whole("undealt", most=len(pending))
    probe = saved.parts("probe")
    if len(probe) != 1:
        raise saved.refusal("probe", "a list of one", saved["probe"])
    return state["probe"][0] or None
