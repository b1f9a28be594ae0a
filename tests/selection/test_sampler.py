"""The laws of the sampler, for every policy and for one to eight lanes; and its error messages."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from slap_stream import SlapConfig, SlapSampler
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.errors import AlignmentError, ConfigError, FeedbackError, ShardError, StateError
from slap_stream.selection.policies.registry import OURS, make_policy
from tests.laws import (
    FIRM,
    LossTable,
    as_json,
    config_of,
    drive,
    hold_epoch_laws,
    hold_proportionality,
    hold_resume_law,
)

POLICIES = tuple(OURS)
# Every policy, and the one that follows what it finds dispensable, on fewer steps and on as many.
RULES: list[dict[str, Any]] = [
    *({"policy": policy} for policy in POLICIES),
    {"policy": "slap", "keep": "auto", "keep_min": 0.4},
    {"policy": "slap", "keep": "auto", "keep_min": 0.4, "steps": "full"},
]
DIM = 8


def rule_name(rule: dict[str, Any]) -> str:
    """Its name in the list of tests."""
    return "-".join(str(value) for value in rule.values())


def embeddings(num_samples: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random float16 embeddings."""
    return np.random.default_rng(seed).normal(size=(num_samples, DIM)).astype(np.float16)


def make(
    sizes: list[int],
    *,
    counts: list[int] | None = None,
    batch_size: int = 24,
    sources: Any = None,
    mismatched: float | None = None,
    relevant: float | None = None,
    rank: int = 0,
    world_size: int = 1,
    **settings: Any,
) -> SlapSampler:
    """A sampler over random embeddings.

    Policies that measure every candidate do so. `mismatched`: share of targets of other prompts;
    `relevant`: of samples that are of the target set's kind.
    """
    policy = settings.get("policy", "slap")
    if make_policy(SlapConfig(policy=policy)).measures_all:
        settings.setdefault("probe_fraction", 1.0)
    rows: Any = embeddings(sum(sizes))
    columns = {}
    if mismatched is not None:
        columns["mismatch"] = np.random.default_rng(3).random(sum(sizes)) < mismatched
    if relevant is not None:
        rng = np.random.default_rng(4)
        kindred = rng.random(sum(sizes)) < relevant
        columns["relevance"] = np.where(kindred, 1.0 - 0.3 * rng.random(len(kindred)), 0.01)
    if policy == "rho_loss":
        columns["reference_loss"] = np.random.default_rng(2).gamma(4.0, 0.5, sum(sizes))
    if columns:
        features = np.stack(list(columns.values()), axis=1).astype(np.float16)
        rows = ArrayStore(rows, features=features, feature_names=list(columns))
    return SlapSampler(
        np.array(sizes),
        rows,
        batch_size=batch_size,
        shard_counts=None if counts is None else np.array(counts),
        sources=sources,
        config=config_of(**settings),
        rank=rank,
        world_size=world_size,
    )


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Shards, counts, lanes, batch size and keep that make at least one batch."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=10))
    weights = [draw(st.sampled_from([1.0, 1.0, 0.5, 2.0, 3.0, 0.0])) for _ in sizes]
    repeated = draw(st.booleans())
    counts = [int(size * w) for size, w in zip(sizes, weights, strict=True)] if repeated else None
    num_lanes = draw(st.integers(1, 8))
    batch_size = num_lanes * draw(st.integers(1, 6))
    keep = draw(st.sampled_from([1.0, 0.7, 0.5, 0.05]))
    full = keep >= 0.25 and draw(st.booleans())
    candidates = sum(sizes if counts is None else counts)
    assume(keep * candidates >= batch_size)
    steps = int(keep * candidates) // batch_size
    assume(counts is None or steps >= 3)
    return {
        "sizes": sizes,
        "counts": counts,
        "batch_size": batch_size,
        "num_lanes": num_lanes,
        "keep": keep,
        "steps": "full" if full else "fewer",
        "mismatched": draw(st.sampled_from([None, 0.3, 0.8])),
        "relevant": draw(st.sampled_from([None, 0.0, 0.3])),
        "pool_batches": draw(st.integers(2, 6)),
        "shards_per_block": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 99)),
    }


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
@settings(max_examples=20)
@given(run=runs())
@example(
    run={
        "sizes": [1, 1, 30],
        "counts": [3, 2, 30],
        "batch_size": 7,
        "num_lanes": 7,
        "keep": 1.0,
        "pool_batches": 2,
        "shards_per_block": 1,
        "seed": 0,
    }
)
def test_an_epoch_keeps_the_laws(rule: dict[str, Any], run: dict[str, Any]) -> None:
    run = run | rule
    candidates = sum(run["sizes"] if run["counts"] is None else run["counts"])
    keep = run["keep_min"] if run["keep"] == "auto" else run["keep"]
    assume(keep * candidates >= run["batch_size"] * (1 if run["counts"] is None else 3))
    sampler = make(**run)
    batches = drive([sampler], LossTable(sampler.table.num_samples, 16))
    hold_epoch_laws(sampler, batches)


@pytest.mark.parametrize("num_lanes", [1, 4])
def test_steps_that_pruning_frees_are_spent_on_what_is_kept(num_lanes: int) -> None:
    # Three in ten are mismatched, and all of these are told.
    batches, found = {}, {}
    table = LossTable(1200, 16)
    for steps in ("fewer", "full"):
        sampler = make(
            [50] * 24, num_lanes=num_lanes, mismatched=0.3, keep="auto", steps=steps, **FIRM
        )
        batches[steps], found[steps] = drive([sampler], table), sampler.metrics()
    assert len(batches["full"]) == 50 > 1.4 * len(batches["fewer"])
    # Until the shorter one's pool runs dry they are the same.
    np.testing.assert_array_equal(batches["full"][:28], batches["fewer"][:28])
    bad = np.random.default_rng(3).random(1200) < 0.3
    visits = np.bincount(np.concatenate(batches["full"]), minlength=1200)
    assert visits[bad].mean() < 0.2
    # What is worth it is visited, and four in ten of that once more.
    assert np.mean(visits[~bad] >= 1) > 0.95
    assert np.mean(visits[~bad] == 2) == pytest.approx(1 / 0.7 - 1, abs=0.1)
    assert visits.max() == 2
    assert found["full"]["offered"] == pytest.approx(1200 / (~bad).mean(), rel=0.05)


def test_where_nothing_is_dispensable_full_steps_train_on_everything_once() -> None:
    # None is nearer to another than the others are.
    config = config_of(keep="auto", steps="full", num_lanes=2)
    sampler = SlapSampler([50] * 6, np.eye(300), batch_size=20, config=config)
    for _ in range(2):
        assert sorted(np.concatenate(list(sampler))) == list(range(300))


def test_repeated_samples_never_share_a_batch_when_there_is_room() -> None:
    for num_lanes in range(1, 9):
        sampler = make(
            [5, 17, 9, 30],
            counts=[15, 34, 9, 75],
            batch_size=8 * num_lanes if num_lanes < 4 else num_lanes,
            num_lanes=num_lanes,
            keep=1.0,
        )
        batches = drive([sampler], LossTable(sampler.table.num_samples, 16))
        hold_epoch_laws(sampler, batches)
        assert sampler.metrics()["repeats_in_batch"] == 0


@pytest.mark.parametrize("policy", ["slap", "uniform"])
@pytest.mark.parametrize("num_lanes", range(1, 9))
def test_strata_are_trained_in_proportion(policy: str, num_lanes: int) -> None:
    sizes = [60] * 20
    sources = np.random.default_rng(1).choice(3, 1200, p=[0.7, 0.25, 0.05])
    sampler = make(
        sizes, batch_size=num_lanes * 6, num_lanes=num_lanes, policy=policy, sources=sources
    )
    drive([sampler], LossTable(1200, 16))
    hold_proportionality(sampler)


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
@pytest.mark.parametrize("num_lanes", [1, 4])
def test_a_saved_run_goes_on_as_the_unbroken_one(rule: dict[str, Any], num_lanes: int) -> None:
    # Several streams' worth of weights: repeated, left out, once.
    sizes, counts = [30, 20, 25, 30, 15], [30, 40, 12, 60, 15]

    def fresh() -> SlapSampler:
        evidence = {"mismatched": 0.3, "relevant": 0.4}
        return make(sizes, counts=counts, batch_size=8, num_lanes=num_lanes, **evidence, **rule)

    hold_resume_law(fresh, LossTable(sum(sizes), 16), every=4, epochs=2)


def test_a_run_without_probe_resumes_at_every_step() -> None:
    def fresh() -> SlapSampler:
        return make([30] * 4, batch_size=8, num_lanes=2)

    table, sampler = LossTable(120, 16), fresh()
    states, unbroken = [as_json(sampler.state_dict())], []
    for batch in observed(sampler, table):
        unbroken.append(batch)
        states.append(as_json(sampler.state_dict()))
    for at, state in enumerate(states):
        again = fresh()
        again.load_state_dict(state)
        assert list(observed(again, table))[: len(unbroken) - at] == unbroken[at:]


def observed(sampler: SlapSampler, table: LossTable) -> Any:
    """The batches of two epochs, each observed before it is handed out."""
    while sampler.epoch < 1 or not sampler.exhausted:
        for batch in sampler:
            sampler.observe(batch, table.of(np.array(batch)))
            yield batch


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
@pytest.mark.parametrize("num_lanes", [4, 6, 8])
def test_the_world_size_is_free(rule: dict[str, Any], num_lanes: int) -> None:
    sizes, counts = [30, 20, 25, 30, 15], [30, 40, 12, 60, 15]
    table = LossTable(sum(sizes), 16)

    def run(world_size: int) -> list[Any]:
        ranks = [
            make(
                sizes,
                counts=counts,
                batch_size=24 // world_size,
                num_lanes=num_lanes,
                mismatched=0.3,
                relevant=0.4,
                rank=rank,
                world_size=world_size,
                **rule,
            )
            for rank in range(world_size)
        ]
        return drive(ranks, table, epochs=2)

    alone = run(1)
    for world_size in (w for w in (2, 3, 4, 8) if num_lanes % w == 0):
        for left, right in zip(alone, run(world_size), strict=True):
            np.testing.assert_array_equal(left, right)


def test_state_dict_only_reads() -> None:
    sampler = make([40] * 5, batch_size=8)
    iterator = iter(sampler)
    for _ in range(6):
        batch = next(iterator)
        sampler.observe(batch, np.ones(8))
    state = sampler.state_dict()
    kept = copy.deepcopy(state)
    next(iterator)
    assert as_json(state) == as_json(kept)


def test_breaking_off_and_iterating_again_goes_on_with_the_epoch() -> None:
    whole = list(make([40] * 5, batch_size=8))
    sampler = make([40] * 5, batch_size=8)
    parts = [next(iter(sampler)) for _ in range(5)]
    assert parts + list(sampler) == whole
    assert len(sampler) == len(whole)
    assert list(sampler) != whole, "the next epoch has another order"


def test_epochs_differ_and_seeds_differ() -> None:
    sampler = make([40] * 5, batch_size=8)
    first, second = list(sampler), list(sampler)
    assert first != second
    assert list(make([40] * 5, batch_size=8, seed=1)) != first


def test_slap_prefers_what_has_excess_loss() -> None:
    table = LossTable(2400, 16)
    vectors = embeddings(2400)
    table.losses = 2.0 + vectors[:, 0].astype(float)
    sampler = SlapSampler(
        [200] * 12, vectors, batch_size=32, config=config_of(num_clusters=1, **FIRM)
    )
    trained = np.concatenate(drive([sampler], table)[10:])
    pruned = np.setdiff1d(np.arange(2400), trained)
    assert table.of(trained).mean() > table.of(pruned).mean() + 0.3
    assert sampler.metrics()["prediction_correlation"] > 0.9
    assert sampler.metrics()["batch_learnability"] > sampler.metrics()["uniform_learnability"]


def test_a_reference_gives_the_rank_more_weight() -> None:
    def batches(reference: bool, **options: Any) -> list[Any]:
        rows = ArrayStore(
            embeddings(800),
            features=np.zeros((800, 1), np.float16),
            feature_names=["reference_loss" if reference else "another"],
        )
        sampler = SlapSampler([200] * 4, rows, batch_size=16, config=config_of(**options))
        return [batch.tolist() for batch in drive([sampler], LossTable(800, 16))]

    assert batches(True) == batches(True, rank_weight=8.0) != batches(True, rank_weight=0.4)
    assert batches(False) == batches(False, rank_weight=0.4) != batches(False, rank_weight=8.0)


def test_probes_come_by_length_lane_by_lane() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 800)
    rows = ArrayStore(embeddings(800), lengths=lengths.astype(np.int32))
    sampler = SlapSampler([100] * 8, rows, batch_size=16, config=config_of(num_lanes=2))
    next(iter(sampler))
    probed = lengths[sampler.probe_candidates(24)].reshape(2, 12)
    assert np.all(np.diff(probed, axis=1) >= 0)
    assert probed[0, -1] > probed[1, 0]


def test_near_copies_of_what_was_trained_on_are_pruned() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1600, 16))
    copies = rng.random(1600) < 0.3
    templates = rng.normal(size=(10, 16))
    vectors[copies] = templates[rng.integers(0, 10, copies.sum())]
    vectors[copies] += 0.01 * rng.normal(size=(copies.sum(), 16))
    sampler = SlapSampler(
        [200] * 8,
        vectors.astype(np.float16),
        batch_size=32,
        config=config_of(num_clusters=1, recent_per_stratum=256, metric_dim=16, rank_weight=0.0),
    )
    table = LossTable(1600, 16)
    # Copies are learnt: that is what makes them dispensable.
    table.losses = np.where(copies, 0.5, 2.0) + 0.1 * rng.random(1600)
    table.sketches = vectors.astype(np.float32)
    trained = np.concatenate(drive([sampler], table)[10:])
    assert copies[trained].mean() < 0.5 * copies.mean()


def test_losses_that_are_not_finite_are_counted_and_left_out() -> None:
    sampler = make([40] * 5, batch_size=8)
    batch = next(iter(sampler))
    losses = np.ones(8)
    losses[:3] = [np.nan, np.inf, -np.inf]
    sampler.observe(batch, losses)
    assert sampler.metrics()["nonfinite"] == 3
    assert sampler.metrics()["observed"] == 5
    ids = sampler.probe_candidates(4)
    sampler.update(ids, np.full(4, np.nan), np.ones((4, 16)))
    assert sampler.metrics()["withdrawn"] == 4
    rest = list(sampler)
    assert not set(ids.tolist()) & {i for later in rest for i in later}
    assert len(rest) == len(sampler) - 1
    assert np.isfinite(list(sampler.metrics().values())).all()


def test_an_epoch_ends_at_the_last_batch_that_all_lanes_can_fill() -> None:
    sampler = make([40] * 5, batch_size=8, keep=1.0, probe_fraction=0.1)
    batches = iter(sampler)
    next(batches)
    # Exactly one batch less; it is known at the refresh before the fifth.
    sampler.update(sampler.probe_candidates(8), np.full(8, np.nan), np.ones((8, 16)))
    assert len(list(batches)) == 23
    assert sampler.exhausted
    metrics = sampler.metrics()
    assert (metrics["epochs_cut_short"], metrics["batches_repeated"]) == (1, 0)
    assert len(list(sampler)) == 25, "the next epoch is whole"


def test_what_is_missing_before_ranks_can_agree_is_a_repeated_batch() -> None:
    sampler = make([40] * 2, batch_size=8, keep=1.0, probe_every=7, num_lanes=2)
    batches = iter(sampler)
    first = next(batches)
    # Lane 1 loses all that is left to it, and no refresh comes in time.
    lane = sampler.lanes[1]
    lane.pool.clear()
    lane.intake.position = lane.num_candidates
    rest = list(batches)
    assert len(rest) == 6, "up to the refresh"
    assert sampler.metrics()["batches_repeated"] == 6
    assert {tuple(batch[4:]) for batch in rest} == {tuple(first[4:])}
    assert len({tuple(batch[:4]) for batch in rest}) == 6
    # A repeated sample's loss is asked for again.
    for batch in [first, *rest]:
        sampler.observe(batch, np.ones(8))


class Stumbling:
    """A gate that withdraws half of the shards, and may fail once for every block before."""

    def __init__(self, *, fails: bool) -> None:
        self.fails, self.failed = fails, set[tuple[int, ...]]()

    def hint(self, shard_ids: Any) -> None:
        pass

    def require(self, shard_ids: Any) -> Any:
        block = tuple(shard_ids.tolist())
        if self.fails and block not in self.failed:
            self.failed.add(block)
            raise ShardError(f"shards {block} cannot be fetched now.")
        return shard_ids[shard_ids % 2 == 1]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("lanes", [1, 4])
def test_a_batch_that_failed_is_composed_again_as_it_would_have_been(
    lanes: int, resume: bool
) -> None:
    table = LossTable(960, 16)
    config = config_of(num_lanes=lanes, pool_batches=2, shards_per_block=1, probe_every=2)

    def run(gate: Any) -> tuple[list[Any], int]:
        def made() -> SlapSampler:
            rows = embeddings(960)
            return SlapSampler([10] * 96, rows, batch_size=24, config=config, gate=gate)

        sampler, batches, failures = made(), [], 0
        while not sampler.exhausted:
            try:
                batch = sampler.compose()
            except ShardError:
                failures += 1
                if resume:
                    state, sampler = as_json(sampler.state_dict()), made()
                    sampler.load_state_dict(state)
                continue
            if batch is None:
                break
            sampler.observe(batch, table.of(batch))
            batches.append(batch.tolist())
        return batches, failures

    unbroken, none = run(Stumbling(fails=False))
    again, failures = run(Stumbling(fails=True))
    assert none == 0
    assert failures >= 12
    assert again == unbroken


def test_a_lane_with_nothing_to_begin_with_says_so() -> None:
    sampler = make([40] * 2, batch_size=8, keep=1.0)
    sampler.lanes[0].intake.position = 80
    with pytest.raises(ShardError, match="lane 0 must have candidates for a first batch, got 0"):
        next(iter(sampler))


def test_a_lane_without_candidates_is_still_probed_as_often() -> None:
    sampler = make([40] * 5, batch_size=8, keep=1.0, probe_fraction=0.1, probe_every=100)
    batches = iter(sampler)
    last = [next(batches) for _ in range(20)][-1]
    lane = sampler.lanes[0]
    lane.pool.clear()
    budget = sampler.probe_budget()
    assert budget > 0
    ids = sampler.probe_candidates(budget)
    assert len(ids) == budget
    assert set(ids.tolist()) <= set(last)
    sampler.update(ids, np.ones(budget), np.ones((budget, 16)))


def test_rows_that_are_not_finite_are_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    vectors = embeddings(200)
    vectors[::10] = np.nan
    sampler = SlapSampler([40] * 5, vectors, batch_size=8, config=config_of())
    assert len(list(sampler)) == len(sampler)
    assert sampler.metrics()["nonfinite_rows"] == 20
    assert caplog.text.count("hold NaN or infinity") == 1


def test_probe_budget_stays_within_its_fraction_and_is_the_same_on_every_lane() -> None:
    sampler = make([50] * 20, batch_size=12, num_lanes=3, probe_fraction=0.1)
    table, probed = LossTable(1000, 16), 0
    for step, batch in enumerate(sampler):
        sampler.observe(batch, table.of(np.array(batch)))
        if step % 4 == 3:
            budget = sampler.probe_budget()
            assert budget % 3 == 0
            ids = sampler.probe_candidates(budget)
            assert len(ids) == budget
            sampler.update(ids, table.of(ids), table.sketches[ids])
            sampler.merge(sampler.statistics())
            probed += budget
    assert 0 < probed <= 0.1 * 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [10], "batch_size": 24}, r"keep \* candidates must fill a global batch of 24"),
        (
            {"sizes": [10], "batch_size": 24, "steps": "full"},
            "^candidates must fill a global batch of 24, got 10; use a smaller",
        ),
        ({"sizes": [100], "batch_size": 9, "num_lanes": 2}, "divisible by num_lanes, got 9"),
        ({"sizes": [100], "num_lanes": 3, "world_size": 2}, "multiple of the world size 2, got 3"),
        ({"sizes": [100], "batch_size": 0}, "batch_size must be a positive whole number, got 0"),
        ({"sizes": [100], "rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
        (
            {"sizes": [3], "counts": [100], "batch_size": 4},
            "must not be offered more often than an epoch has batches, got 34",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**arguments)


@pytest.mark.parametrize("rows", [99, 101])
def test_embeddings_must_have_a_row_per_sample(rows: int) -> None:
    with pytest.raises(AlignmentError, match=f"one row per sample, got {rows} rows for 100"):
        SlapSampler([100], embeddings(rows), batch_size=4)


def test_feedback_for_ids_that_were_never_yielded_is_refused() -> None:
    sampler = make([40] * 5, batch_size=8)
    batch = next(iter(sampler))
    other = [i for i in range(200) if i not in batch][:3]
    with pytest.raises(FeedbackError, match=r"observe: ids of yielded batches must.*got 3 others"):
        sampler.observe(other, np.ones(3))
    sampler.observe(batch, np.ones(8))
    with pytest.raises(FeedbackError, match="not answered yet, got 8 others"):
        sampler.observe(batch, np.ones(8))
    with pytest.raises(FeedbackError, match=r"\(n,\) losses, got int64 \(8,\) and \(7,\)"):
        sampler.observe(batch, np.ones(7))
    with pytest.raises(FeedbackError, match="update: ids to be probed must be of late and not"):
        sampler.update(batch, np.ones(8))
    with pytest.raises(FeedbackError, match=r"sketches must be \(n, sketch_dim\) = \(2, 16\)"):
        sampler.update(sampler.probe_candidates(2), np.ones(2), np.ones((2, 5)))


def test_statistics_must_be_complete() -> None:
    sampler = make([40] * 5, batch_size=8, num_lanes=2)
    with pytest.raises(FeedbackError, match=r"lanes 0 to 1 once each, in order, got \[1, 0\]"):
        sampler.merge(sampler.statistics()[::-1])
    for damage in ({"gram": np.ones(3)}, {"count": None}, {"lane": "first"}, {"last_step": []}):
        first, second = sampler.statistics()
        with pytest.raises(FeedbackError, match=r"must hold what statistics\(\) gives"):
            sampler.merge([first | damage, second])
        del first[next(iter(damage))]
        with pytest.raises(FeedbackError, match=f"KeyError: '{next(iter(damage))}'"):
            sampler.merge([first, second])


def test_ranks_that_nobody_connects_do_not_refresh_on_their_own() -> None:
    sampler = make([40] * 5, batch_size=8, num_lanes=2, world_size=2)
    batches = iter(sampler)
    for _ in range(4):
        next(batches)
    with pytest.raises(ConfigError, match="a sampler of 2 ranks must be refreshed by merge"):
        next(batches)


def test_a_state_of_another_run_is_refused_and_changes_nothing() -> None:
    sampler = make([40] * 5, batch_size=8)
    next(iter(sampler))
    state = as_json(sampler.state_dict())
    for other, difference in [
        (make([40] * 5, batch_size=8, keep=0.5), "keep: 0.7 -> 0.5"),
        (make([40] * 5, batch_size=8, steps="full"), "steps: 'fewer' -> 'full'"),
        (make([40] * 5, batch_size=10), "global_batch: 8 -> 10"),
        (make([50] * 4, batch_size=8), "shards: "),
        (make([40] * 4, batch_size=8), "num_samples: 200 -> 160"),
        (make([40] * 5, batch_size=8, num_lanes=2), "num_lanes: "),
        (
            SlapSampler([40] * 5, embeddings(200, seed=1), batch_size=8, config=config_of()),
            "embeddings: ",
        ),
    ]:
        before = as_json(other.state_dict())
        with pytest.raises(StateError, match=difference):
            other.load_state_dict(state)
        assert as_json(other.state_dict()) == before
    with pytest.raises(StateError, match="version must be 9, got 0"):
        sampler.load_state_dict({**state, "version": 0})


def test_a_run_goes_on_with_the_same_batches_on_another_world_size() -> None:
    sizes, table = [40] * 6, LossTable(240, 16)

    def ranks(world_size: int, num_lanes: int | None) -> list[SlapSampler]:
        return [
            make(
                sizes,
                batch_size=24 // world_size,
                rank=rank,
                world_size=world_size,
                num_lanes=num_lanes,
            )
            for rank in range(world_size)
        ]

    # Lanes default to the world size at the first construction, and stay so.
    unbroken = drive(ranks(4, None), table, epochs=2)
    saved = ranks(4, None)
    head = drive(saved, table, stop_after=4)
    states = [as_json(sampler.state_dict()) for sampler in saved]
    whole = {**states[0], "lanes": [lane for state in states for lane in state["lanes"]]}
    for world_size in (1, 2, 4):
        again = ranks(world_size, None)
        for sampler in again:
            sampler.load_state_dict(whole)
            assert sampler.num_lanes == 4
        for left, right in zip(unbroken, head + drive(again, table, epochs=2), strict=True):
            np.testing.assert_array_equal(left, right)
    with pytest.raises(StateError, match=r"lanes: \[0\] of 4 -> \[0, 2\) of rank 0 in 2"):
        ranks(2, None)[0].load_state_dict(states[0])
    with pytest.raises(StateError, match="num_lanes: 4 -> 2"):
        ranks(2, 2)[0].load_state_dict(whole)


def test_num_lanes_defaults_to_the_world_size() -> None:
    sampler = SlapSampler([100], embeddings(100), batch_size=4, config=SlapConfig(), world_size=2)
    assert sampler.num_lanes == 2
