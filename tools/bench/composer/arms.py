"""The measurements of tools/bench/composer, each in a process of its own."""

from __future__ import annotations

import atexit
import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from slap_stream import SlapConfig, SlapSampler
from slap_stream.core.kernels import unit_rows
from slap_stream.loader.run_log import RunLog
from tools.bench.clock import Clock
from tools.bench.composer.corpus import VirtualCorpus, shards_of

Result = dict[str, Any]


class Run:
    """A sampler that is fed back what a training would feed back.

    Args:
        corpus: What is sampled.
        config: Settings.
        batch_size: Samples of a batch.
    """

    def __init__(self, corpus: VirtualCorpus, config: SlapConfig, batch_size: int) -> None:
        self.corpus, self.config = corpus, config
        self.sampler = SlapSampler(
            shards_of(corpus.shape[0]), corpus, batch_size=batch_size, config=config
        )
        # Wall and CPU seconds of each batch, whether a refresh was part of it, and both of what
        # was fed back after it.
        self.composed: list[tuple[float, float, bool]] = []
        self.fed: list[tuple[float, float]] = []

    def keep_log(self) -> None:
        """Keep a run's log from now on, in a folder that nobody looks at."""
        sampler, folder = self.sampler, tempfile.mkdtemp(prefix="slap-bench-")
        atexit.register(shutil.rmtree, folder)
        log = RunLog(folder, sampler, about=dict, metrics=sampler.metrics, undelivered=int)
        log.begin()
        compose, observe = sampler.compose, sampler.observe

        def logged_compose() -> Any:
            began = time.perf_counter()
            ids = compose()
            log.composed(time.perf_counter() - began)
            return ids

        def logged_observe(ids: Any, losses: Any) -> None:
            observe(ids, losses)
            log.observed(losses, last=False)

        sampler.compose, sampler.observe = logged_compose, logged_observe  # type: ignore[method-assign]

    def step(self) -> None:
        """Compose a batch and feed its losses back; probe before each refresh."""
        sampler, corpus = self.sampler, self.corpus
        if sampler.exhausted:
            sampler.start_next_epoch()
        due = sampler.step > 0 and sampler.step % self.config.probe_every == 0
        wall, cpu, ids = timed(sampler.compose)
        self.composed.append((wall, cpu, due))
        assert ids is not None
        losses = corpus.losses(ids)
        wall, cpu, _ = timed(lambda: sampler.observe(ids, losses))
        if sampler.step % self.config.probe_every == self.config.probe_every - 1:
            more, more_cpu, ids = timed(lambda: sampler.probe_candidates(sampler.probe_budget()))
            losses, sketches = (
                corpus.losses(ids),
                corpus.sketches(ids, self.config.advanced.sketch_dim),
            )
            last, last_cpu, _ = timed(lambda: sampler.update(ids, losses, sketches))
            wall, cpu = wall + more + last, cpu + more_cpu + last_cpu
        self.fed.append((wall, cpu))


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall seconds, CPU seconds of this thread, and the result of a call."""
    wall, cpu = time.perf_counter(), time.thread_time()
    result = call()
    return time.perf_counter() - wall, time.thread_time() - cpu, result


def speed(
    *,
    samples: int,
    dim: int,
    batch_size: int,
    warmup: int,
    steps: int,
    config: SlapConfig,
    log: bool = False,
) -> Result:
    """Candidates per second and milliseconds per batch in the steady state, and where they go."""
    run = Run(VirtualCorpus(samples, dim=dim), config, batch_size)
    if log:
        run.keep_log()
    for _ in range(warmup):
        run.step()
    run.composed.clear()
    run.fed.clear()
    for _ in range(steps):
        run.step()
    metrics = run.sampler.metrics()
    composed, fed = np.array(run.composed), np.array(run.fed)
    plain, refreshed = composed[composed[:, 2] == 0], composed[composed[:, 2] == 1]
    offered = batch_size / float(config.keep)
    result: Result = {
        "fitted": metrics["fitted"],
        "metric_from_sketches": metrics["metric_from_sketches"],
        "strata": metrics["strata"],
    }
    for column, clock in enumerate(("wall", "cpu")):
        everything = composed[:, column].mean() + fed[:, column].mean()
        ms = 1e3 * plain[:, column]
        result |= {
            f"candidates_per_second_{clock}": offered / plain[:, column].mean(),
            f"candidates_per_second_with_all_{clock}": offered / everything,
            f"batch_ms_p50_{clock}": float(np.percentile(ms, 50)),
            f"batch_ms_p99_{clock}": float(np.percentile(ms, 99)),
            f"refresh_ms_{clock}": 1e3 * (refreshed[:, column].mean() - plain[:, column].mean()),
            f"feedback_ms_per_batch_{clock}": 1e3 * fed[:, column].mean(),
        }
    # Apart from the above: clocks cost a little themselves.
    clock_of_parts = Clock()
    watch_sampler(clock_of_parts, run.sampler)
    for _ in range(steps):
        run.step()
    result["parts_ms_per_batch"] = {
        part: 1e3 * seconds / steps for part, seconds in sorted(clock_of_parts.seconds.items())
    }
    return result


def watch_sampler(clock: Clock, sampler: SlapSampler) -> None:
    """Time the parts of a sampler's lanes, and of its refreshes."""
    clock.watch(sampler._refreshes, "refresh", "refresh: other")
    clock.watch(sampler, "observe", "feedback: observe")
    clock.watch(sampler, "update", "feedback: update")
    clock.watch(sampler._shared.model, "refresh", "refresh: regression and metric solved")
    clock.watch(sampler._policy, "select", "choose: shortlist and greedy composition")
    for lane in sampler.lanes:
        clock.watch(lane, "statistics", "refresh: sums over the answers")
        clock.watch(lane.feedback, "take_trained", "feedback: observe")
        clock.watch(lane.feedback, "take_probed", "feedback: update")
        clock.watch(lane._composer, "choose_probes", "feedback: who is probed")
        clock.watch(
            lane._composer, "_compare_with_uniform", "refresh: a batch beside a uniform one"
        )
        clock.watch(lane, "refresh", "refresh: pool scored anew")
        clock.watch(lane, "prepare", "other")
        clock.watch(lane, "_offer", "offer: strata, sums for centroids, place in the pool")
        clock.watch(lane.intake, "take", "offer: design rows")
        clock.watch(lane.intake, "_open", "offer: a block opened and read")
        clock.watch(lane.pool, "offer", "offer: strata, sums for centroids, place in the pool")
        clock.watch(lane, "_train", "train: book the batch")
        clock.watch(lane._scorer, "bring_near", "train: copies of the batch in the pool")
        clock.watch(lane._composer, "choose", "choose: quotas")
        clock.watch(lane._composer, "leaving", "drop: who leaves untrained")
        clock.watch(lane._scorer, "score", "offer: score")


def first_batch(*, dim: int, batch_size: int, config: SlapConfig) -> Result:
    """Seconds from the end of the imports to the first batch, and to the first one by losses."""
    corpus = VirtualCorpus(200_000, dim=dim, table_rows=8192)
    begin = time.perf_counter()
    run = Run(corpus, config, batch_size)
    run.step()
    first = time.perf_counter() - begin
    slowest = 0.0
    for _ in range(2 * config.probe_every + 2):
        run.step()
        slowest = max(slowest, run.composed[-1][0])
    return {"first_batch_seconds": first, "slowest_of_the_next_seconds": slowest}


def memory(*, samples: int, dim: int, batch_size: int, steps: int, config: SlapConfig) -> Result:
    """Seconds to start, and resident memory above the imports, over a run of so many batches.

    Numba imports its compiler when the first kernel is called; that is an import like the others,
    and is counted apart.
    """
    corpus = VirtualCorpus(samples, dim=dim, table_rows=8192)
    gc.collect()
    imported = resident_bytes()
    unit_rows(np.ones((1, 1), np.float32))
    before = resident_bytes()
    begin = time.perf_counter()
    run = Run(corpus, config, batch_size)
    made = time.perf_counter() - begin
    run.step()
    first = time.perf_counter() - begin
    held = []
    for _ in range(steps):
        run.step()
        held.append(resident_bytes() - before)
    third = max(1, len(held) // 3)
    return {
        "samples": samples,
        "shards": len(run.sampler.table.sizes),
        "start_seconds": made,
        "first_batch_seconds": first,
        "resident_mb": max(held) / 2**20,
        "numba_mb": (before - imported) / 2**20,
        "growth_mb": (max(held[-third:]) - max(held[third:-third] or held)) / 2**20,
    }


def streaming_memory(*, samples: int, batch_size: int) -> Result:
    """The same of one epoch's order as mosaicml-streaming makes it, by its own code."""
    from streaming import StreamingDataset
    from streaming.base.batching import generate_work

    sizes = shards_of(samples)
    dataset = SimpleNamespace(
        num_canonical_nodes=1,
        batch_size=batch_size,
        partition_algo="relaxed",
        epoch_size=samples,
        initial_physical_nodes=None,
        shuffle=True,
        shuffle_algo="py1e",
        shuffle_seed=9176,
        shuffle_block_size=4_000_000,
        sampling_method="balanced",
        sampling_granularity=1,
        epoch_seed_change=True,
        num_streams=1,
        streams=[SimpleNamespace(choose=samples)],
        shard_offset_per_stream=np.zeros(1, np.int64),
        shards_per_stream=np.array([len(sizes)]),
        samples_per_shard=sizes,
        sample_offset_per_shard=np.cumsum(sizes) - sizes,
    )
    dataset.resample_streams = lambda epoch: StreamingDataset.resample_streams(dataset, epoch)
    world = SimpleNamespace(num_nodes=1, ranks_per_node=1, workers_per_rank=1)
    before = resident_bytes()
    begin = time.perf_counter()
    work = generate_work("random", dataset, world, 0, 0)
    return {
        "samples": samples,
        "start_seconds": time.perf_counter() - begin,
        "resident_mb": (resident_bytes() - before) / 2**20,
        "peak_mb": (peak_bytes() - before) / 2**20,
        "batches": work.size // batch_size,
    }


def resident_bytes() -> int:
    """Memory that this process holds."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that it has held."""
    return _status("VmHWM")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return int(file.read().split(f"{name}:")[1].split()[0]) * 1024
