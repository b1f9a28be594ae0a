"""SlapDataLoader: torch's DataLoader over batches that are composed while a model trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from slap_stream.config import SlapConfig
from slap_stream.core.interrupts import ready_to_wait, undisturbed
from slap_stream.embeddings.store import open_embeddings
from slap_stream.errors import WorkerError
from slap_stream.loader.checks import (
    check_alignment,
    check_arguments,
    check_batch_size,
    check_cache_limit,
    prefetch_within,
)
from slap_stream.loader.pending import PendingBatches
from slap_stream.loader.ranks import TIMEOUT_SECONDS, join_ranks
from slap_stream.loader.state import check_loader_state, whole_state
from slap_stream.loader.status_line import StatusLine
from slap_stream.loader.workers import describe_dead, watch
from slap_stream.probe.probe import LearnabilityProbe, check_probe_state
from slap_stream.selection.sampler import SlapSampler
from slap_stream.selection.state import check_ranks_agree
from slap_stream.shards.fetch import ShardFetcher
from slap_stream.shards.settings import (
    dataset_shards,
    index_digests,
    launched_ranks,
    processes_per_node,
)
from slap_stream.shards.view import ShardView
from slap_stream.types import FloatArray, IntArray, Position, State

SAMPLE_ID = "sample_id"


class SlapDataLoader(DataLoader[Any]):
    """Batches of a `StreamingDataset` that are composed while the model trains.

    Iterating yields one epoch of collated batches; breaking off and iterating again goes on with
    the epoch. `batch["sample_id"]`, (batch,) int64, goes back through `observe` with the losses.

    With several ranks every one makes a loader, and each gets its part of the global batches.
    Ranks talk to each other when the loader is made, at refreshes and in `state_dict`; all of them
    must do the same at the same step.

    State: the sampler's, the composed and undelivered batches, and the attached probe's.

    Args:
        dataset: The dataset; its `batch_size`, if set, must be this one. Of a dataset with
            `replication`, so many consecutive processes get the same batches.
        batch_size: Samples in this rank's batch; the global batch, batch_size * world_size, is
            fixed for a run.
        embeddings: Path of `embeddings.zarr`, an `EmbeddingStore`, an array, or a list of them in
            stream order.
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
        exchange_timeout: Deadline of everything that ranks tell each other, in seconds.

    Raises:
        ConfigError: If an argument is of a wrong kind, or contradicts another or the dataset.
        ExchangeError: If a rank does not answer in time.
        AlignmentError: If embeddings and dataset do not describe the same samples.
        TypeError: If the dataset is not a `StreamingDataset`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        embeddings: Any,
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
        exchange_timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        config = check_arguments(config, num_workers, prefetch_factor, collate_fn)
        shards = dataset_shards(dataset)
        check_batch_size(batch_size, dataset)
        prefetch_factor = prefetch_within(num_workers, prefetch_factor, config.lookahead)
        store = open_embeddings(embeddings)
        self._digests = index_digests(dataset)
        check_alignment(store, self._digests, shards.sizes, shards.stream_of_shard)
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
        self._pending = PendingBatches(self._sampler)
        # Of the rank that needs most: then all are refused or none.
        check_cache_limit(dataset, self._meet_ranks(), ranks_on_node)
        self._probe: LearnabilityProbe | None = None
        self._probe_state: State | None = None
        # Which iterator may go on: none from before a new iteration or a loaded state.
        self._iteration = 0
        self._line = StatusLine()
        super().__init__(
            ShardView(dataset),  # type: ignore[arg-type]  # map-style by duck typing
            batch_sampler=self._pending,  # type: ignore[arg-type]  # arrays, which pickle faster
            collate_fn=collate_fn or default_collate,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory=pin_memory,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            # Torch draws the workers' seed at every iteration: from the global generator, a resumed
            # run would draw once more than the unbroken one, and its dropout would differ.
            generator=torch.Generator().manual_seed(config.seed),
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
        self._pending.begin()
        # Persistent workers of which one has died: the next iteration makes new ones.
        if any(worker.exitcode for worker in getattr(self._iterator, "_workers", ())):
            self._iterator = None
        batches = super().__iter__()
        if self.num_workers:
            watch(batches)
        self._line.restart()
        with ready_to_wait():
            yield from self._deliver(batches)

    def _deliver(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield what torch's iterator over the pending batches gives, and compose ahead."""
        iteration = self._iteration
        while self._pending.ask():
            self._hold_shards()
            try:
                batch = next(batches)
            except WorkerError:
                raise
            except (RuntimeError, OSError, EOFError) as error:
                message = describe_dead(getattr(batches, "_workers", ()), error)
                if message is None:
                    raise
                raise WorkerError(message) from error
            with self._pending.delivering() as ids:
                batch = _with_ids(batch, ids)
                self._line.count(len(ids), self.progress, self.metrics)
            yield batch
            if iteration != self._iteration:
                raise RuntimeError(
                    "an iterator of the loader must not be used on after load_state_dict or after "
                    "a new iteration has begun, which has its batches now: start a new "
                    "iteration or go on with the newest."
                )

    @property
    def composer(self) -> SlapSampler:
        """Who composes the batches; waits until what is composed in the background is done.

        Ask for it anew every time: one that is kept from batch to batch is in use meanwhile.
        """
        self._pending.settle()
        return self._sampler

    @property
    def config(self) -> SlapConfig:
        """Settings of the run."""
        return self._sampler.config

    @property
    def measurements(self) -> tuple[str, ...]:
        """Names of what the policy wants measured besides losses and sketches."""
        return self._sampler.measurements

    @property
    def num_local_lanes(self) -> int:
        """Lanes of this rank."""
        return len(self._sampler.lanes)

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, counted from 0."""
        return self._sampler.epoch + int(self._pending.finished)

    @property
    def progress(self) -> float:
        """Share of the epoch's candidates that were trained on or pruned, in [0, 1].

        As of the batch delivered last: 1 with the epoch's last one, until the next epoch begins.
        """
        return 1.0 if self._pending.finished else self._pending.progress

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
        ids, losses = _on_cpu(ids), _on_cpu(losses)
        self.composer.observe(ids, losses)

    def loss_weights(self, ids: Any) -> torch.Tensor:
        """Weights of the losses of the batch at hand; call it before `observe`.

        Args:
            ids: (n,) `batch["sample_id"]`.

        Returns:
            (n,) float64 weights on the CPU: ones, unless the policy makes up for what it prunes.

        Raises:
            FeedbackError: If an id was not yielded lately or was already observed.
        """
        return torch.from_numpy(self.composer.loss_weights(_on_cpu(ids)))

    def probe_budget(self) -> int:
        """Candidates due to be probed now; 0 if none."""
        return self.composer.probe_budget()

    def probe_candidates(self, count: int) -> IntArray:
        """(count,) sample ids to probe, lane by lane, equally many per lane."""
        return self.composer.probe_candidates(count)

    def read_batch(self, ids: Sequence[int] | IntArray) -> Any:
        """Read and collate samples by id, in this process."""
        view: ShardView = self.dataset  # type: ignore[assignment]
        collate = self.collate_fn
        assert collate is not None, "set in the constructor"
        ids = np.array(ids, np.int64)
        return _with_ids(collate(view.__getitems__(ids)), ids)

    def update(
        self, ids: IntArray, losses: FloatArray, sketches: Any = None, measurements: Any = None
    ) -> None:
        """Feed back what the probe measured of the ids that `probe_candidates` gave."""
        self.composer.update(ids, losses, sketches, measurements)

    def refresh(self, also: FloatArray | None = None) -> FloatArray:
        """Take in all feedback since the last refresh, of all ranks; every rank calls it.

        Args:
            also: (local lanes, n) more numbers to be added up over all lanes of all ranks.

        Returns:
            (n,) their sums.

        Raises:
            ExchangeError: If a rank does not answer in time or is at another step.
        """
        self.composer.refreshes_itself = False
        return self.composer.refresh(also)

    def _hold_shards(self) -> None:
        """Under a `cache_limit`, say which shards composed and pooled samples still need."""
        if not self._fetcher.limited:
            return
        first_id = self.composer.table.first_id
        now = [np.searchsorted(first_id, self._pending.ids, side="right") - 1]
        soon = []
        for lane in self.composer.lanes:
            pooled, following = lane.intake.shards_in_use()
            now.append(pooled)
            soon.append(following)
        self._fetcher.hold(np.unique(np.concatenate(now)), np.concatenate(soon))

    def attach(self, probe: LearnabilityProbe) -> None:
        """Let a probe refresh this loader; its state travels in the loader's."""
        if self._probe_state is not None:
            probe.load_state_dict(self._probe_state)
        self._probe, self._probe_state = probe, None
        # From now on the probe says when; a second clock would refresh twice.
        self.composer.refreshes_itself = False

    def metrics(self) -> dict[str, float]:
        """Flat numbers about the run, ready for TensorBoard or Weights & Biases."""
        metrics = self.composer.metrics() | self._fetcher.metrics() | self._ranks.metrics()
        # What was composed ahead has not been trained on yet.
        ahead = self._pending.undelivered
        metrics["undelivered"] = float(ahead)
        metrics["trained"] -= float(ahead * self.composer.batch_size)
        metrics["step"] -= float(ahead)
        if self._probe is not None:
            metrics |= self._probe.metrics()
        return metrics

    def state_dict(self) -> State:
        """Everything a resumed run needs: arrays, numbers and strings; only reads.

        With several ranks every one calls it at the same step, and all get the same: the state of
        all lanes, from which any world size can go on.

        Raises:
            ExchangeError: If a rank does not answer in time or is at another step.
        """
        # Interrupts that came between the parts of an exchange would part the ranks.
        with undisturbed():
            return whole_state(
                self._ranks,
                self._position(),
                index_digests=self._digests,
                sampler=self.composer.state_dict(),
                pending=self._pending.state_dict(),
                probe=self._probe_state if self._probe is None else self._probe.state_dict(),
            )

    def _meet_ranks(self) -> int:
        """Check that all ranks were given the same run; most shards that one needs at a time."""
        run = self.config.to_dict() | self.composer.describe()
        mine = run | {"index_digests": self._digests}, self.composer.shards_at_hand
        everyones = self._ranks.gather(json.dumps(mine).encode(), self._position())
        runs, needs = zip(*map(json.loads, everyones), strict=True)
        check_ranks_agree(runs)
        return int(max(needs))

    def _position(self) -> Position:
        return Position(epoch=self.composer.epoch, step=self.composer.step, digest=0)

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
        sampler = self.composer
        probe = check_loader_state(
            state,
            index_digests=self._digests,
            global_batch=sampler.batch_size * sampler.world_size,
            num_samples=sampler.table.num_samples,
        )
        if probe is not None:
            check_probe_state(probe, None if self._probe is None else self._probe.head_shape)
        # The last that may fail.
        sampler.load_state_dict(state["sampler"])
        self._pending.load_state_dict(state)
        self._iteration += 1
        if probe is None or self._probe is None:
            self._probe_state = probe
        else:
            self._probe.load_state_dict(probe)

    def close(self) -> None:
        """End the threads that fetch shards, and the ranks' connections: the loader's end."""
        self._fetcher.close()
        self._ranks.close()


def _with_ids(batch: Any, ids: IntArray) -> Any:
    """Add `sample_id` to what the user's function made of the samples.

    Here, not in the worker, which would send back what this process knows: a tensor more costs
    more than all the ids of a batch.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"collate_fn must make a mapping, got {type(batch).__name__}; sample_id is added to it."
        )
    if not isinstance(batch, MutableMapping):
        batch = dict(batch)
    # A copy: what a training loop does to its batch must not change what is checkpointed.
    batch[SAMPLE_ID] = torch.tensor(ids)
    return batch


def _on_cpu(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        values = values.detach()
        # NumPy has no bfloat16.
        values = values.double() if values.is_floating_point() else values
        return values.cpu().numpy()
    return np.asarray(values)
