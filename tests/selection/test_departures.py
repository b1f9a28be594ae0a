"""What leaves a pool is told once, with the reason that weighed most; watching changes nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_stream import SlapConfig, SlapSampler
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.selection.departures import LEAST_SHOWN, OUTCOMES, Rows, reasons
from slap_stream.selection.policies.registry import OURS, make_policy
from slap_stream.selection.scoring import EVIDENCE
from tests.laws import LossTable, as_json, config_of, drive
from tests.selection.test_sampler import make

SIZES, DIM = [40] * 8, 8
TABLE = LossTable(sum(SIZES), 16)


def watched(sampler: SlapSampler) -> SlapSampler:
    for lane in sampler.lanes:
        lane.watch_departures()
    return sampler


def departed(sampler: SlapSampler) -> Rows:
    """What has left all lanes since this was last asked."""
    return np.concatenate([lane.departures.take() for lane in sampler.lanes if lane.departures])


@pytest.mark.parametrize("policy", OURS)
def test_every_candidate_that_leaves_is_told_once_and_nothing_else_changes(policy: str) -> None:
    options: dict[str, Any] = {"batch_size": 16, "num_lanes": 2, "policy": policy}
    sampler = watched(make(SIZES, **options))
    batches, unwatched = drive([sampler], TABLE), drive([make(SIZES, **options)], TABLE)
    np.testing.assert_array_equal(batches, unwatched)
    rows, metrics = departed(sampler), sampler.metrics()
    assert sorted(rows["sample_id"].tolist()) == list(range(sum(SIZES)))
    trained = rows[rows["outcome"] == 0]
    assert len(trained) == metrics["trained"]
    for step, batch in enumerate(batches):
        assert Counter(trained["sample_id"][trained["step"] == step]) == Counter(batch.tolist())
    assert len(departed(sampler)) == 0


def test_a_resumed_run_tells_what_the_unbroken_one_does() -> None:
    def new() -> SlapSampler:
        return make(SIZES, batch_size=16, num_lanes=2)

    sampler = watched(new())
    drive([sampler], TABLE, stop_after=8)
    departed(sampler)
    state = as_json(sampler.state_dict())
    again = new()
    again.load_state_dict(state)
    watched(again)
    drive([sampler], TABLE)
    drive([again], TABLE)
    np.testing.assert_array_equal(departed(again), departed(sampler))


def test_a_copy_names_what_it_copies_and_a_target_of_another_prompt_is_called_so() -> None:
    """Every sample is there twice, and one in eight has another prompt's target."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(160, DIM))
    unit = np.concatenate([half, half + 0.001 * rng.normal(size=half.shape)])[rng.permutation(320)]
    wrong = (rng.random((320, 1)) < 0.125).astype(np.float16)
    store = ArrayStore(unit.astype(np.float16), features=wrong, feature_names=["mismatch"])
    settings = config_of(num_lanes=1, keep=0.5, copy_weight=40.0)
    sampler = watched(SlapSampler(SIZES, store, batch_size=16, config=settings))
    drive([sampler], TABLE)
    rows = departed(sampler)
    copies = rows[rows["outcome"] == OUTCOMES.index("copy")]
    assert len(copies) > 40
    seen = {row["sample_id"]: row for row in rows}
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for row in copies:
        original = seen[row["nearest"]]
        assert original["outcome"] == 0
        assert original["step"] <= row["step"]
        assert np.linalg.norm(unit[row["sample_id"]] - unit[row["nearest"]]) < 0.2
    mismatched = rows["sample_id"][rows["outcome"] == OUTCOMES.index("mismatch")]
    assert len(mismatched) > 10
    assert np.all(wrong[mismatched] == 1)


@settings(max_examples=50)
@given(data=st.data(), policy=st.sampled_from(["slap", "uniform"]))
def test_the_reason_is_what_took_most_from_the_score(data: st.DataObject, policy: str) -> None:
    rule = make_policy(SlapConfig(policy=policy))
    share = st.floats(0.0, 1.0)
    rank, noise = data.draw(share), data.draw(st.floats(-3.0, 6.0))
    shown = {name: data.draw(share) for name in EVIDENCE}

    def worth(rank: float, shown: dict[str, float]) -> float:
        noise = 1.0 - (1.0 - shown["mismatch"]) * (1.0 - shown["outlier"])
        told = {"copy": np.array([shown["copy"]]), "mismatch": np.array([noise])}
        utility = float(rule.utility(rank=np.array([rank]), loss=np.ones(1), **told)[0])
        return utility - (8.0 * shown["unrelated"] if policy == "slap" else 0.0)

    arrays = {name: np.array([value]) for name, value in shown.items()}
    found = reasons(rule, np.array([rank]), np.ones(1), np.array([noise]), arrays)
    name = OUTCOMES[int(found[0])]
    charges = {"drawn out": max(0.0, 0.5772 - noise)}
    charges["learnt"] = worth(max(rank, 0.5), shown) - worth(rank, shown)
    for one, value in shown.items():
        alike = [one] if one in ("copy", "unrelated") else ["mismatch", "outlier"]
        if value >= max(LEAST_SHOWN, *(shown[other] for other in alike)):
            charges[one] = worth(rank, {**shown, **dict.fromkeys(alike, 0.0)}) - worth(rank, shown)
    assert charges[name] == pytest.approx(max(charges.values()))
    assert policy == "slap" or name == "drawn out"
