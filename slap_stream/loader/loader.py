"""SlapDataLoader: torch's DataLoader over batches that are composed while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from slap_stream.config import SlapConfig
from slap_stream.core.background import BackgroundThread
from slap_stream.core.rng import Purpose, generator
from slap_stream.embeddings.store import store_metrics
from slap_stream.errors import ConfigError
from slap_stream.loader.accelerated import Accelerated, never_divided
from slap_stream.loader.bad_samples import BadSamples, reading
from slap_stream.loader.checks import (
    aligned_embeddings,
    batch_size_of,
    check_arguments,
    check_cache_limit,
    check_launched,
    embedded_hashes,
    meet_ranks,
    prefetch_within,
)
from slap_stream.loader.delivery import SAMPLE_ID, Delivery, on_cpu
from slap_stream.loader.leaving import end_with, weakly
from slap_stream.loader.pending import PendingBatches
from slap_stream.loader.probe_link import ProbeLink
from slap_stream.loader.progress_bar import ProgressBar
from slap_stream.loader.ranks import TIMEOUT_SECONDS, join_ranks
from slap_stream.loader.run_log import RunLog, describe
from slap_stream.loader.state import check_loader_state, whole_state
from slap_stream.loader.tally import Tally
from slap_stream.loader.workers import WorkerStart
from slap_stream.probe.probe import LearnabilityProbe, check_probe_state
from slap_stream.selection.sampler import SlapSampler
from slap_stream.shards.fetch import ShardFetcher
from slap_stream.shards.settings import (
    dataset_shards,
    index_digests,
    launched_ranks,
    processes_per_node,
)
from slap_stream.types import Position, State


@never_divided
class SlapDataLoader(DataLoader[Any]):
    """Batches of a `StreamingDataset` that are composed while the model trains.

    Iterating yields one epoch of collated batches; breaking off and iterating again goes on with
    the epoch. `batch["sample_id"]`, (batch,) int64, goes back through `observe` with the losses.

    With several ranks every one makes a loader, and each gets its part of the global batches.
    Ranks talk to each other when the loader is made, at refreshes and in `state_dict`; all of them
    must do the same at the same step. Accelerate's `prepare` leaves the batches as they are.

    A thread of its own owns the sampler and does in it, one after the other, all that is called
    here. So any thread may call, and an interrupt (Ctrl-C, or torch's when a worker has died) ends
    the waiting for a call and never the call: what was begun is done whole, and a batch is either
    delivered or still pending. A process that was forked from this one (a worker, say) cannot use
    the loader. The loader waits for the thread before torch forks workers; who forks otherwise
    calls `metrics()` first, or forks while nothing is composed.

    Workers are seeded by (seed, epoch, batches delivered in it, rank) when they are started, so a
    resumed run does not draw again what an earlier part of it has drawn. What a worker draws for a
    sample depends on the samples it has read before: a run that is resumed, or has another number
    of workers, has the same batches and other draws. Persistent workers go on drawing from epoch to
    epoch. Without workers, draws come from this process's own generators.

    State: the sampler's, the composed and undelivered batches, and the attached probe's.

    Args:
        dataset: The dataset; its `batch_size`, if set, must be this one. Of a dataset with
            `replication`, so many consecutive processes get the same batches.
        batch_size: Samples in this rank's batch; default: the dataset's. The global batch,
            batch_size * world_size, is fixed for a run.
        embeddings: Path or URL of `embeddings.zarr`, an `EmbeddingStore`, an array, or a list of
            them in stream order; default: `embeddings.zarr` beside the shards of each stream.
        config: Settings; default `SlapConfig()`.
        collate_fn: Makes a batch, a mapping, of a list of samples; default torch's.
        num_workers: Processes that read and collate; 0 does it in this one. The batches are the
            same whatever their number.
        prefetch_factor: Batches that each worker works ahead; times workers at most
            `config.lookahead`. Default: 2, or less where the lookahead is short.
        persistent_workers: Whether workers live on between epochs.
        pin_memory: As for torch's DataLoader.
        timeout: As for torch's DataLoader, in seconds.
        worker_init_fn: As for torch's DataLoader.
        multiprocessing_context: `fork`, `spawn`, `forkserver` or a context.
        rank: Which part of the global batches this process gets; default: its rank in
            torch.distributed, or in `process_group`. Processes of equal rank get the same.
        world_size: Ranks; default likewise.
        process_group: Processes that have a loader; default: all.
        run_dir: Where a log of the run is kept, for `slap-report`; None: none is.
        progress: Whether rank 0 shows a bar, on a terminal or in a notebook.
        exchange_timeout: Deadline of everything that ranks tell each other, in seconds.

    Raises:
        ConfigError: If an argument is of a wrong kind, or contradicts another or the dataset.
        ExchangeError: If a rank does not answer in time.
        AlignmentError: If embeddings and dataset do not describe the same samples.
        TypeError: If the dataset is not a `StreamingDataset`.
    """

    needs_log = True  # a `run_dir` that cannot be written to ends the run, before it has begun

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = None,
        *,
        embeddings: Any = None,
        config: SlapConfig | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory: bool = False,
        timeout: float = 0.0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        rank: int | None = None,
        world_size: int | None = None,
        process_group: Any = None,
        run_dir: str | PathLike[str] | None = None,
        progress: bool = False,
        exchange_timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        config = check_arguments(config, num_workers, prefetch_factor, collate_fn)
        shards = dataset_shards(dataset)
        batch_size = batch_size_of(batch_size, dataset)
        prefetch_factor = prefetch_within(num_workers, prefetch_factor, config.lookahead)
        self._digests = index_digests(dataset)
        store = self._store = aligned_embeddings(dataset, embeddings, shards, self._digests)
        check_launched(dataset)
        self._ranks = join_ranks(
            rank=rank,
            world_size=world_size,
            process_group=process_group,
            replication=dataset.replication,
            timeout_seconds=exchange_timeout,
            expected=launched_ranks(dataset),
        )
        ranks_on_node = self._ranks.on_node(processes_per_node(dataset))
        self._fetcher = ShardFetcher(
            dataset,
            shards.counts,
            on_bad_shard=config.on_bad_shard,
            max_withdrawn=config.max_withdrawn,
            ranks_on_node=ranks_on_node,
            embedded=embedded_hashes(store, shards.stream_of_shard),
        )
        self._sampler = SlapSampler(
            shards.sizes,
            store,
            batch_size=batch_size,
            shard_counts=shards.counts,
            config=config,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            gate=self._fetcher,
            exchange=self._ranks,
        )
        self._owner = BackgroundThread("slap-sampler")
        self._log = RunLog(
            run_dir if self._ranks.speaks else None,
            self._sampler,
            about=partial(describe, dataset, store, self._sampler),
            metrics=weakly(self._metrics),
            undelivered=weakly(self._undelivered),
        )
        self._pending = PendingBatches(self._sampler, self._owner, self._log.composed)
        parties = self._ranks, self._sampler, self._digests, self._log, self.needs_log
        # Of the rank that needs most: then all are refused or none.
        needed = self._owner.call(partial(meet_ranks, *parties))
        end_with(self, self._log, self._owner)
        check_cache_limit(dataset, needed, ranks_on_node)
        self._probe: LearnabilityProbe | None = None
        self._probe_state: State | None = None
        # Which iterator may go on: none from before a new iteration or a loaded state.
        self._iteration = 0
        shows = progress and self._ranks.rank == 0 and self._ranks.speaks
        size = self._sampler.table.num_candidates, self._ranks.world_size
        bar = ProgressBar(*size, by_steps=config.steps == "full") if shows else None
        self._tally = Tally(bar)
        self._accelerated: Accelerated | None = None
        view, collate = reading(dataset, collate_fn or default_collate, config.on_bad_sample)
        self._bad_samples = BadSamples(
            self._sampler,
            self._owner,
            view=view,
            collate=collate,
            fetcher=self._fetcher,
            told=self._log.withdrawn,
        )
        super().__init__(
            view,  # type: ignore[arg-type]  # map-style by duck typing
            batch_sampler=self._pending,  # type: ignore[arg-type]  # arrays, which pickle faster
            collate_fn=collate,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory=pin_memory,
            timeout=timeout,
            worker_init_fn=WorkerStart(worker_init_fn),
            multiprocessing_context=multiprocessing_context,
            # Torch draws the workers' seed at every iteration: from the global generator, a resumed
            # run would draw once more than the unbroken one, and its dropout would differ.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the rest of this epoch's batches.

        Raises:
            RuntimeError: If this iterator is used on after a state was loaded or after another
                iteration has begun.
            WorkerError: If a worker has died, at most some 5 seconds ago. If it dies while the
                training step runs, the step itself ends with it.
        """
        self._iteration += 1
        iteration = self._iteration
        delivered = self._owner.call(self._begin)
        # Persistent workers of which one has died: the next iteration makes new ones.
        if any(worker.exitcode for worker in self._workers_of(self._iterator)):
            self._iterator = None
        place = self._pending.epoch, delivered, self._ranks.rank
        draws = generator(self.config.seed, Purpose.WORKERS, *place)
        self.generator.manual_seed(int(draws.integers(2**63)))
        batches = super().__iter__()
        trained = delivered * self._sampler.batch_size
        self._tally.begin(self._pending.epoch, trained, self._pending.delivered.progress)
        if Accelerated.is_due(self):
            self._accelerated = self._accelerated or Accelerated(SAMPLE_ID)
            self._accelerated.begin(self)
        return Delivery(
            batches,
            self._workers_of(batches),
            self._pending,
            is_newest=lambda: iteration == self._iteration,
            hold_shards=partial(self._pending.hold_shards, self._fetcher),
            ended=partial(self._owner.call, self._log.flush),
            bad_samples=self._bad_samples,
            count=partial(self._tally.count, self.metrics),
            accelerated=self._accelerated,
        )

    def _workers_of(self, batches: Any) -> list[Any]:
        """Worker processes of torch's iterator; one that reads in this process has none."""
        workers: list[Any] = batches._workers if self.num_workers and batches is not None else []
        return workers

    def _begin(self) -> int:
        if not self._log.begun:
            self._log.begin()
        delivered = self._pending.begin()
        if self.num_workers:
            # A fork in the middle of a read would copy whatever lock is held there.
            self._sampler.finish_reading()
        return delivered

    @property  # type: ignore[override]  # torch's is of single samples
    def sampler(self) -> SlapSampler:
        """Who composes the batches; waits until what is composed in the background is done.

        Ask for it anew every time: one that is kept from batch to batch is in use meanwhile.
        """
        return self._owner.call(lambda: self._sampler)

    @sampler.setter
    def sampler(self, torchs: Any) -> None:
        """Torch's constructor sets one of its own, which a loader with a batch sampler has no use
        for."""

    @property
    def config(self) -> SlapConfig:
        """Settings of the run."""
        return self._sampler.config

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, counted from 0."""
        return self._pending.epoch + int(self._pending.finished)

    @property
    def progress(self) -> float:
        """Share of the epoch that was delivered, in [0, 1]: of its candidates, or of its steps.

        As of the batch delivered last: 1 with the epoch's last one, until the next epoch begins.
        """
        return 1.0 if self._pending.finished else self._pending.delivered.progress

    @property
    def epochs_done(self) -> float:
        """Epochs delivered so far, such as 1.25; also after a resume.

        A learning rate that follows it is decayed fully whatever the number of batches comes to.
        """
        return self.epoch + self.progress % 1.0

    def observe(self, ids: Any, losses: Any) -> None:
        """Feed back the losses of samples that were trained on; free, the step has made them.

        Args:
            ids: (n,) `batch["sample_id"]`.
            losses: (n,) mean loss per supervised token, such as `per_sample_loss` gives.

        Raises:
            FeedbackError: If shapes differ, or an id was not yielded lately or already observed.
        """
        # First what waits for the model, while a batch is still composed in the background.
        self._owner.call(partial(self._observe, on_cpu(ids), on_cpu(losses)))

    def _observe(self, ids: Any, losses: Any) -> None:
        self._sampler.observe(ids, losses)
        self._tally.observed(losses)
        self._log.observed(losses, last=self._pending.finished)

    def note(self, **values: float) -> None:
        """Put numbers that were measured now, such as `held_out_loss=3.2`, into the run's log."""
        self._owner.call(partial(self._log.note, values))

    def loss_weights(self, ids: Any) -> torch.Tensor:
        """Weights of the losses of the batch at hand; call it before `observe`.

        Args:
            ids: (n,) `batch["sample_id"]`.

        Returns:
            (n,) float64 weights on the CPU: ones, unless the policy makes up for what it prunes.

        Raises:
            FeedbackError: If an id was not yielded lately or was already observed.
        """
        weigh = partial(self._sampler.loss_weights, on_cpu(ids))
        return torch.from_numpy(self._owner.call(weigh))

    def probe_host(self) -> ProbeLink:
        """What `LearnabilityProbe` asks of this loader and tells it: internal, the probe's."""
        return ProbeLink(
            self._sampler, self._owner, bad_samples=self._bad_samples, attach=self._attach
        )

    def _attach(self, probe: LearnabilityProbe) -> None:
        if self._probe is not None:
            raise ConfigError(
                "loader must have one probe, got a second one; step the first, or make a new "
                "loader, which goes on by load_state_dict."
            )
        if self._probe_state is not None:
            probe.load_state_dict(self._probe_state)
        self._probe, self._probe_state = probe, None
        # From now on the probe says when; a second clock would refresh twice.
        self._sampler.refreshes_itself = False

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Flat numbers about the run, ready for TensorBoard, Weights & Biases or trackio.

        `epoch` is what `epochs_done` says, such as 1.25.

        Args:
            prefix: Goes before each name: "slap/" makes a group of them.
        """
        metrics = self._owner.call(self._metrics)
        return {prefix + name: value for name, value in metrics.items()}

    def _undelivered(self) -> int:
        return len(self._pending.undelivered)

    def _metrics(self) -> dict[str, float]:
        metrics = self._sampler.metrics() | self._fetcher.metrics() | self._ranks.metrics()
        metrics["withdrawn_fraction"] += self._bad_samples.withdrawn_fraction
        # What was composed ahead has not been trained on yet.
        ahead = self._undelivered()
        metrics["undelivered"] = float(ahead)
        metrics["epoch"] = self.epochs_done
        metrics["trained"] -= float(ahead * self._sampler.batch_size)
        metrics["step"] -= float(ahead)
        metrics |= self._tally.metrics() | store_metrics(self._store)
        if self._probe is not None:
            metrics |= self._probe.metrics()
        return metrics | self._log.metrics()

    def state_dict(self) -> State:
        """Everything a resumed run needs: arrays, numbers and strings; only reads.

        With several ranks every one calls it at the same step, and all get the same: the state of
        all lanes, from which any world size can go on.

        Raises:
            ExchangeError: If a rank does not answer in time or is at another step.
        """
        return self._owner.call(self._state)

    def _state(self) -> State:
        self._log.flush(saved=True)
        return whole_state(
            self._ranks,
            Position(epoch=self._sampler.epoch, step=self._sampler.step, digest=0),
            index_digests=self._digests,
            sampler=self._sampler.state_dict(),
            pending=self._pending.state_dict(),
            probe=self._probe_state if self._probe is None else self._probe.state_dict(),
        )

    def load_state_dict(self, state: State) -> None:
        """Go on exactly where the state was saved; arrays may come back as nested lists.

        Every rank is given the whole state and takes its lanes; the world size may be another, as
        long as it divides the lanes and the global batch is the same.

        A probe's part is handed to the probe, now or when one is attached.

        Raises:
            StateError: If the state is of another version, config or dataset, or was cut or
                changed; nothing has changed then.
            ShardError: If a shard that the state needs cannot be fetched; likewise.
        """
        self._owner.call(partial(self._load, state))

    def _load(self, state: State) -> None:
        num_samples = self._sampler.table.num_samples
        probe = check_loader_state(state, index_digests=self._digests, num_samples=num_samples)
        if probe is not None:
            check_probe_state(probe, None if self._probe is None else self._probe.head_shape)
        # The last that may fail.
        self._sampler.load_state_dict(state["sampler"])
        self._pending.load_state_dict(state)
        self._iteration += 1
        if probe is None or self._probe is None:
            self._probe_state = probe
        else:
            self._probe.load_state_dict(probe)
        self._log.begin()

    def close(self) -> None:
        """End the threads that fetch shards, and the ranks' connections: the loader's end."""
        self._tally.close()
        self._owner.call(self._close)

    def _close(self) -> None:
        self._log.end()
        self._fetcher.close()
        self._ranks.close()
