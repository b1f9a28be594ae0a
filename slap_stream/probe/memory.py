"""Forwards of a probe that fit into memory: smaller batches where one does not.

A probe runs beside a training step's leftovers, at moments when nobody looks, and on whatever
samples are due. That it takes too much memory now and then says nothing about the run.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from slap_stream.errors import ProbeMemoryError
from slap_stream.types import IntArray

logger = logging.getLogger(__name__)

_Made = TypeVar("_Made")

# What says so and has no class of its own: MPS, a CPU, cuBLAS.
_TOLD = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


class FittingBatches:
    """Samples in batches of at most so many, halved whenever memory is too short for one.

    The size stays what it has come to: whatever else needs the memory needs it at the next step,
    too.

    Args:
        most: Samples in a batch, to begin with.

    Attributes:
        size: Samples in a batch now.
        failed: Batches that did not fit.
    """

    def __init__(self, most: int) -> None:
        self.size = most
        self.failed = 0

    def each(
        self,
        ids: IntArray,
        make: Callable[[IntArray], _Made],
        *,
        model: nn.Module,
    ) -> Iterable[_Made]:
        """What is made of (n,) samples, batch by batch, in order.

        Args:
            ids: (n,) sample ids.
            make: Reads a batch; leaves nothing behind if it fails.
            model: Whom `make` calls.

        Raises:
            ProbeMemoryError: If a batch does not fit and there is no smaller one.
        """
        start = 0
        while start < len(ids):
            chunk = ids[start : start + self.size]
            made = self._made(chunk, make, model)
            if made:
                yield made[0]
                start += len(chunk)

    def _made(
        self, chunk: IntArray, make: Callable[[IntArray], _Made], model: nn.Module
    ) -> list[_Made]:
        """What is made of a batch; nothing if it does not fit, and the next ones are smaller."""
        try:
            return [make(chunk)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.failed += 1
            pieces = in_pieces(model)
            if len(chunk) == 1 or pieces:
                why = (
                    "the model's weights are in pieces on several ranks, which must all make the "
                    "same calls, so that one cannot try again alone: make it with a smaller "
                    "batch_size"
                    if pieces
                    else "there is no smaller batch: shorten the samples"
                )
                # Other ranks are at the exchange already, and this one has counted its step.
                cure = (
                    "The other ranks wait for this one: start all ranks from the last state."
                    if _has_peers()
                    else "Nothing is lost: go on from here or from the last state."
                )
                raise ProbeMemoryError(
                    f"probe must have memory for a batch of {len(chunk)} samples, got {error}; "
                    f"{why}, or do without it (probe_fraction=0). {cure}"
                ) from error
            if self.failed == 1:
                logger.warning(
                    "memory is too short for a probe's batch of %d samples, smaller ones are tried "
                    "from now on (told once; metrics() has probe_batch_size and "
                    "probe_out_of_memory): %s",
                    len(chunk),
                    error,
                )
            self.size = len(chunk) // 2
        # Out of the handler, whose error holds the frames that hold the tensors.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return []


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of whichever device, was too short."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(told in str(error) for told in _TOLD)


def _has_peers() -> bool:
    """Whether there are other ranks; without torch.distributed a loader has none."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def in_pieces(model: nn.Module) -> bool:
    """Whether other ranks hold pieces of the weights (FSDP, tensor parallel, ZeRO 3), so that a
    forward of one is a forward of all."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters()
    )
