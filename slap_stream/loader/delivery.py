"""One iteration of a loader: pending batches, read by torch, to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch

from slap_stream.errors import SlapStreamError, WorkerError
from slap_stream.loader.accelerated import Accelerated
from slap_stream.loader.bad_samples import BadSamples, PartOfBatch
from slap_stream.loader.pending import PendingBatches
from slap_stream.loader.workers import describe_dead
from slap_stream.types import IntArray

SAMPLE_ID = "sample_id"


class Delivery(Iterator[Any]):
    """Yields the pending batches of an epoch, and has others composed ahead.

    A class, not a generator: an error that comes before `__next__` has returned is raised inside
    of it, and the batch is still pending. Where a generator yields, an interrupt that comes after
    the loop's body looks like one that comes before.

    Args:
        batches: Torch's iterator over the pending batches.
        workers: Its worker processes.
        pending: The pending batches.
        is_newest: Whether no other iteration has begun since, and no state was loaded.
        hold_shards: Says which shards are still needed; called before a batch is read.
        ended: Is called when the epoch has no more batches.
        bad_samples: Settles what becomes of a batch of which samples cannot be used.
        count: Takes note of a batch, of how many samples it has, and of the share of the epoch that
            is done after it.
        accelerated: What Accelerate is told of the batches, if it has prepared the loader.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        workers: Sequence[Any],
        pending: PendingBatches,
        *,
        is_newest: Callable[[], bool],
        hold_shards: Callable[[], None],
        ended: Callable[[], None],
        bad_samples: BadSamples,
        count: Callable[[Any, int, float], None],
        accelerated: Accelerated | None,
    ) -> None:
        self._batches: Iterator[Any] | None = batches
        self._pending, self._workers = pending, workers
        self._is_newest, self._hold_shards, self._count = is_newest, hold_shards, count
        self._accelerated, self._bad_samples, self._ended = accelerated, bad_samples, ended

    def __next__(self) -> Any:
        if not self._is_newest():
            raise RuntimeError(
                "an iterator of the loader must not be used on after load_state_dict or after "
                "a new iteration has begun, which has its batches now: start a new "
                "iteration or go on with the newest."
            )
        batches, before = self._batches, self._pending.delivered
        if batches is None:
            raise StopIteration
        try:
            oldest = self._pending.oldest()
            if oldest is None:
                if self._accelerated is not None:
                    self._accelerated.end()
                self._ended()
                raise StopIteration
            self._hold_shards()
            batch, ids = next(batches, None), oldest.ids
            if isinstance(batch, PartOfBatch):
                # Before anything is withdrawn: torch's prefetch may have had it composed already.
                self._pending.compose_ahead()
                batch, ids = self._bad_samples.settle(batch, ids)
            batch = with_ids(batch, ids)
            self._count(batch, len(ids), oldest.progress)
            self._pending.compose_ahead()
            self._pending.delivered = oldest
            if self._accelerated is not None:
                batch = self._accelerated.hand_over(batch, self._pending.finished)
            return batch
        except BaseException as error:
            self._pending.delivered = before
            # Whoever iterates anew pulls from the first pending batch on.
            self._batches = None
            # Torch's handler of a worker's death raises wherever the main thread is.
            if isinstance(error, RuntimeError | OSError | EOFError) and not isinstance(
                error, SlapStreamError
            ):
                message = describe_dead(self._workers, error)
                if message is not None:
                    raise WorkerError(message) from error
            raise


def with_ids(batch: Any, ids: IntArray) -> Any:
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


def on_cpu(values: Any) -> Any:
    """What a training loop hands back, as an array in this process's memory."""
    if isinstance(values, torch.Tensor):
        # Only then to float64, which NumPy has and Apple's GPUs have not; bfloat16 is the opposite.
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)
