"""A checkpoint that was damaged is refused by loader, sampler and probe alike, or by none."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream.errors import StateError
from slap_stream.probe.probe import LearnabilityProbe
from tests.helpers.damage import DAMAGES, damaged, entries
from tests.laws import as_json
from tests.test_training import Job, folder  # noqa: F401  (a fixture)


class Pair:
    """A job that is handed damaged states after three batches, and one that is not."""

    def __init__(self, folder: Path) -> None:  # noqa: F811
        other = Job(folder)
        list(islice(other.steps(), 9))
        self.state: Any = other.loader.state_dict()
        self.job, self.untouched = Job(folder), Job(folder)
        for job in (self.job, self.untouched):
            list(islice(job.steps(), 3))
        self.before = as_json(self.job.loader.state_dict())

    def hold(self, state: Any) -> None:
        """It is refused and changes nothing, or makes the run that was saved."""
        loader = self.job.loader
        try:
            loader.load_state_dict(state)
            expected = as_json(self.state)
        except StateError:
            expected = self.before
        assert as_json(loader.state_dict()) == expected
        loader.load_state_dict(self.before)
        assert as_json(loader.state_dict()) == self.before


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:  # noqa: F811
    return Pair(folder)


@settings(max_examples=150)
@given(data=st.data())
def test_what_was_cut_or_changed_is_refused_and_changes_nothing(
    pair: Pair, data: st.DataObject
) -> None:
    state = as_json(pair.state) if data.draw(st.booleans()) else pair.state
    every = sorted(entries(state), key=str)
    # The sampler's part has a test of its own; here it is one of several that must agree.
    outside = [path for path in every if path[0] != "sampler" or len(path) < 3]
    path = data.draw(st.sampled_from(outside) | st.sampled_from(every))
    pair.hold(damaged(state, path, data.draw(st.sampled_from(list(DAMAGES)))))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("pending", 1), r"state.pending.1 must be int64 \(8,\), got int64"),
        (("pending",), r"pending_progress must be float64 \(3,\)"),
        (("probe",), "state.probe must be a list of one"),
        (("probe", 0, "second_moment", "rows"), "probe.second_moment must be of a head of shape"),
        (("sampler", "lanes", 1, "pool", "loss"), r"state.lanes\[1\].pool.loss must be float64"),
    ],
)
def test_the_message_says_what_was_cut(pair: Pair, path: Any, message: str) -> None:
    with pytest.raises(StateError, match=message):
        pair.job.loader.load_state_dict(damaged(pair.state, path, "cut"))


def test_after_all_that_training_goes_on_as_if_nothing_had_been(pair: Pair) -> None:
    for path in entries(pair.state):
        if len(path) < 3:
            pair.hold(damaged(pair.state, path, "gone"))
    ours, others = (list(islice(job.steps(), 8)) for job in (pair.job, pair.untouched))
    assert [ids for ids, _ in ours] == [ids for ids, _ in others]
    np.testing.assert_allclose([loss for _, loss in ours], [loss for _, loss in others])


def test_a_probe_that_a_state_does_not_fit_is_not_attached(pair: Pair, folder: Path) -> None:  # noqa: F811
    job = Job(folder)
    job.loader._probe = None
    job.loader.load_state_dict(damaged(pair.state, ("probe", 0, "second_moment", "rows"), "cut"))
    with pytest.raises(StateError, match="of a head of shape"):
        LearnabilityProbe(job.model, job.loader)
    assert "probe_steps" not in job.loader.metrics()
