"""The laws that every sampler keeps, as functions that any run can be held to."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream import SlapConfig, SlapSampler

MakeSampler = Callable[[int, int], SlapSampler]


class LossTable:
    """Feedback that depends on the sample and on nothing else."""

    def __init__(self, num_samples: int, sketch_dim: int, *, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.losses = rng.gamma(4.0, 0.5, num_samples)
        self.sketches = rng.normal(size=(num_samples, sketch_dim)).astype(np.float32)
        self.norms = rng.gamma(4.0, 5.0, num_samples)

    def of(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n,) losses."""
        return self.losses[ids]

    def measured(self, ids: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """(n,) what policies ask for besides losses and sketches, by name."""
        return {"nuclear_norm": self.norms[ids]}


def drive(
    samplers: Sequence[SlapSampler], table: LossTable, *, epochs: int = 1, stop_after: int = -1
) -> list[NDArray[np.int64]]:
    """Run all ranks of a job in one process: compose, feed back, probe and merge.

    Returns:
        The global batches, one array each, in lane order.
    """
    batches: list[NDArray[np.int64]] = []
    probe_every = samplers[0].config.probe_every
    while True:
        if samplers[0].exhausted:
            if samplers[0].epoch + 1 >= epochs:
                return batches
            for sampler in samplers:
                sampler.start_next_epoch()
        parts = [sampler.compose() for sampler in samplers]
        assert all(part is not None for part in parts)
        for sampler, part in zip(samplers, parts, strict=True):
            sampler.observe(part, table.of(part))
        batches.append(np.concatenate(parts))
        if len(batches) % probe_every == 0:
            statistics = []
            for sampler in samplers:
                ids = sampler.probe_candidates(sampler.probe_budget())
                sampler.update(ids, table.of(ids), table.sketches[ids], table.measured(ids))
                statistics += sampler.statistics()
            for sampler in samplers:
                sampler.merge(copy.deepcopy(statistics))
        if len(batches) == stop_after:
            return batches


def as_json(state: dict[str, Any]) -> dict[str, Any]:
    """A state that has been through JSON: arrays come back as nested lists."""
    return json.loads(json.dumps(state, default=lambda value: value.tolist()))


def hold_epoch_laws(sampler: SlapSampler, batches: Sequence[NDArray[np.int64]]) -> None:
    """Offered once a pass, trained at most as often, equal steps, no two occurrences in a batch.

    Args:
        sampler: A sampler of world size 1 at the end of its first epoch.
        batches: The epoch's batches.
    """
    table, config = sampler.table, sampler.config
    size, steps = sampler.batch_size, len(batches)
    passes = 1
    if config.steps == "full":
        passes = math.ceil(1 / Fraction(repr(config.keep_least)))
        assert steps == len(sampler) == table.num_candidates // size
    elif config.keep == "auto":
        least = int(Fraction(repr(config.keep_min)) * table.num_candidates // size)
        # The pool's own rounding may leave a batch less than the least fraction would.
        assert least - 1 <= steps <= len(sampler) == table.num_candidates // size
    else:
        assert steps == int(Fraction(repr(config.keep)) * table.num_candidates // size)
    assert sampler.progress == 1.0
    assert all(len(batch) == size for batch in batches)
    metrics = sampler.metrics()
    if config.steps == "full":
        assert steps * size <= metrics["offered"] <= passes * table.num_candidates
    else:
        assert metrics["offered"] == table.num_candidates
    assert metrics["trained"] == steps * size
    assert metrics["pruned"] == metrics["offered"] - steps * size
    assert metrics["pooled"] == 0
    assert metrics["epochs_cut_short"] == metrics["batches_repeated"] == 0
    most = np.repeat(-(-table.counts // np.maximum(table.sizes, 1)), table.sizes)
    for sample_id, times in Counter(np.concatenate(batches).tolist()).items():
        assert times <= passes * most[sample_id]
    if not metrics["repeats_in_batch"]:
        assert all(len(set(batch.tolist())) == len(batch) for batch in batches)


def hold_proportionality(sampler: SlapSampler) -> None:
    """Each stratum was trained on in proportion to what was offered from it."""
    offered, trained = sampler.offered_by_stratum, sampler.trained_by_stratum
    share = offered * (trained.sum() / offered.sum())
    worst = np.abs(trained - share).max()
    assert worst <= sampler.num_lanes + 1, f"{worst:.2f} off its share"


def hold_resume_law(
    make: Callable[[], SlapSampler], table: LossTable, *, every: int, epochs: int = 1
) -> None:
    """Loading what was saved after any `every` batches makes the rest of the run as it was.

    Saving changes nothing either: the states are those of the run that is compared with.
    """
    sampler = make()
    # `drive` counts its batches from zero, so refreshes fall on other steps unless aligned.
    assert every % sampler.config.probe_every == 0
    parts, states = [], []
    while part := drive([sampler], table, epochs=epochs, stop_after=every):
        parts.append(part)
        states.append(as_json(sampler.state_dict()))
    assert len(states) > 2
    for number, state in enumerate(states[:-1], 1):
        again = make()
        again.load_state_dict(state)
        assert as_json(again.state_dict()) == state
        rest = [batch for part in parts[number:] for batch in part]
        for left, right in zip(rest, drive([again], table, epochs=epochs), strict=True):
            np.testing.assert_array_equal(left, right)


# Weights beside which the noise hardly counts.
FIRM = {"copy_weight": 40.0, "mismatch_weight": 40.0, "rank_weight": 2.0}


def config_of(**settings: Any) -> SlapConfig:
    """A config small enough for tests."""
    small: dict[str, Any] = {
        "num_clusters": 4,
        "shards_per_block": 2,
        "pool_batches": 4,
        "probe_every": 4,
        "warmup_losses": 32,
        "sketch_dim": 16,
        "metric_dim": 8,
        "recent_per_stratum": 16,
    }
    return SlapConfig.from_dict(small | settings)
