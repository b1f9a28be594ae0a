"""A state that was damaged is refused, and leaves the sampler as it was."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream import SlapSampler
from slap_stream.config import RUNNING
from slap_stream.errors import StateError
from tests.helpers.damage import DAMAGES, Path, damaged, entries
from tests.laws import LossTable, as_json, drive
from tests.selection.test_sampler import make

SIZES = [40] * 8
TABLE = LossTable(sum(SIZES), 16)


def new(policy: str) -> SlapSampler:
    return make(SIZES, batch_size=16, num_lanes=2, policy=policy)


@functools.cache
def saved_state(policy: str) -> dict[str, Any]:
    """In mid-epoch, with a fitted model, answers since the refresh, and a target."""
    sampler = new(policy)
    drive([sampler], TABLE, stop_after=9)
    sampler.set_target(TABLE.sketches[0])
    return sampler.state_dict()


@functools.cache
def untouched(policy: str) -> tuple[dict[str, Any], list[list[int]]]:
    """The state of a run of three batches that loads nothing, and the batches after it."""
    sampler = new(policy)
    drive([sampler], TABLE, stop_after=3)
    state = as_json(sampler.state_dict())
    return state, [batch.tolist() for batch in drive([sampler], TABLE, stop_after=2)]


def hold(policy: str, path: Path, damage: str, *, listed: bool) -> None:
    """A damaged state is refused by name and changes nothing, or makes the run that was saved."""
    state: Any = saved_state(policy)
    if listed:
        state = as_json(state)
    sampler, (before, batches) = new(policy), untouched(policy)
    drive([sampler], TABLE, stop_after=3)
    message = ""
    try:
        sampler.load_state_dict(damaged(state, path, damage))
    except StateError as error:
        message = str(error)
    if message:
        # Of two entries of equal length either may be named: at least the part is.
        names = [step for step in path if isinstance(step, str)][-2:]
        assert "must belong to this run" in message or any(name in message for name in names)
        assert as_json(sampler.state_dict()) == before
        after = drive([sampler], TABLE, stop_after=2)
        assert [batch.tolist() for batch in after] == batches
    else:
        assert as_json(sampler.state_dict()) == as_json(state)


@pytest.mark.parametrize("policy", ["slap", "uds"])
@settings(max_examples=100)
@given(data=st.data())
def test_what_was_cut_or_changed_is_refused_and_changes_nothing(
    policy: str, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(sorted(entries(saved_state(policy)), key=str)))
    damage = data.draw(st.sampled_from(list(DAMAGES)))
    hold(policy, path, damage, listed=data.draw(st.booleans()))


def test_every_entry_is_missed() -> None:
    sampler, (before, batches) = new("slap"), untouched("slap")
    drive([sampler], TABLE, stop_after=3)
    state = saved_state("slap")
    # A setting that was not given is as good as one that is not there, and one of running may be
    # another now.
    given = {name for name, value in state["config"].items() if value is not None} - {*RUNNING}
    for path in entries(state):
        if path[0] == "config" and len(path) > 1 and path[1] not in given:
            continue
        with pytest.raises(StateError):
            sampler.load_state_dict(damaged(state, path, "gone"))
    assert as_json(sampler.state_dict()) == before
    after = drive([sampler], TABLE, stop_after=2)
    assert [batch.tolist() for batch in after] == batches


@pytest.mark.parametrize("part", ["model", "strata", "keep"])
def test_a_part_that_is_missing_is_named(part: str) -> None:
    state = damaged(saved_state("slap"), ("shared", part), "gone")
    with pytest.raises(StateError, match=f"state.shared.{part} must be there, got none; the state"):
        new("slap").load_state_dict(state)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("lanes", 1, "pool", "sample_id"), 320, r"lanes\[1\].pool.sample_id must be whole .* 320"),
        (("lanes", 1, "pool", "slots"), 0, "slots must be all different"),
        (("lanes", 0, "pool", "stratum"), 2, r"stratum must be whole numbers in \[0, 2\)"),
        (("lanes", 0, "recent", "sample_id"), -2, "recent.sample_id must be whole"),
        (("lanes", 0, "feedback", "counters", "observed"), -1, "observed must be a whole number"),
        (("lanes", 0, "intake", "position"), 10**6, "position must be a whole number in"),
        (("shared", "keep", "value"), 0.0, "value must be a finite number in"),
    ],
)
def test_numbers_out_of_range_are_refused(path: Path, value: Any, message: str) -> None:
    state = as_json(saved_state("slap"))
    holder: Any = state
    for step in path[:-1]:
        holder = holder[step]
    entry = holder[path[-1]]
    if isinstance(entry, list):
        changed = np.array(entry)
        changed.flat[:2] = value
        value = changed.tolist()
    holder[path[-1]] = value
    with pytest.raises(StateError, match=message):
        new("slap").load_state_dict(state)


def test_what_was_loaded_is_the_samplers_own() -> None:
    state = saved_state("slap")
    before = as_json(state)
    sampler = new("slap")
    sampler.load_state_dict(state)
    drive([sampler], TABLE, stop_after=6)
    assert as_json(state) == before


def test_a_number_of_lanes_beyond_all_memory_is_refused() -> None:
    rows = np.random.default_rng(0).normal(size=(160, 8)).astype(np.float16)
    # Lanes that nobody has asked for are taken over from the state.
    sampler = SlapSampler([40] * 4, rows, batch_size=8)
    state = sampler.state_dict()
    state["run"]["num_lanes"] = 10**12
    with pytest.raises(StateError, match=r"lanes: \[0\] of 1000000000000 -> \[0, 1000000000000\)"):
        sampler.load_state_dict(state)
