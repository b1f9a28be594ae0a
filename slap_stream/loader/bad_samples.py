"""Samples that cannot be read or collated: left out of their batch, told of, and bounded.

What fails is found where it is read, in a worker or here; what comes of it is decided here, when
the batch is delivered: in the order of the batches, so that it does not depend on who read them,
nor on when. A lane that has nothing left of a batch takes a batch of before again, so that every
lane and rank still takes as many steps.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from slap_stream.config import OnBadSample
from slap_stream.core.background import BackgroundThread
from slap_stream.errors import ConfigError, SampleError, ShardError
from slap_stream.selection.sampler import SlapSampler
from slap_stream.selection.withdrawal import (
    composed_around,
    lane_probing,
    unusable_samples,
    withdraw_composed,
    withdraw_pooled,
)
from slap_stream.shards.fetch import ShardFetcher
from slap_stream.shards.view import ShardView
from slap_stream.types import IntArray

logger = logging.getLogger(__name__)

# Sample id, epoch, and batches of it composed before, of each.
Withdrawn = list[tuple[int, int, int]]
# Characters of an error that are told.
_TOLD_CHARACTERS = 400
# Batches around one of which nothing can be used that are tried, and first samples of a dataset.
_TRIED, _FIRST = 4, 32
# Modules whose errors are a network's, or a store's that is reached through one. Not all of
# `google`: protobuf, say, raises for what it cannot decode.
_OF_NETWORKS = tuple(
    f"{module}."
    for module in [
        "aiobotocore",
        "aiohttp",
        "azure.core",
        "boto3",
        "botocore",
        "gcsfs",
        "google.api_core",
        "google.auth",
        "http",
        "httpcore",
        "httpx",
        "huggingface_hub",
        "oci",
        "requests",
        "s3transfer",
        "socket",
        "ssl",
        "urllib",
        "urllib3",
    ]
)


class BadSample(NamedTuple):
    """Stands in a list of samples for one that cannot be read.

    Attributes:
        reason: What was raised.
    """

    reason: str


class PartOfBatch(NamedTuple):
    """What a batch is without those of its samples that cannot be used.

    Attributes:
        batch: Collated; None if there is nothing left.
        kept: Places of its samples in the batch that was asked for.
        reasons: What was raised, by the places of the others.
    """

    batch: Any
    kept: list[int]
    reasons: dict[int, str]


class LenientView(ShardView):
    """A `ShardView` that gives a `BadSample` for what cannot be read."""

    def __getitems__(self, sample_ids: Sequence[int] | IntArray) -> list[Any]:
        """Several samples, in the order asked."""
        try:
            return super().__getitems__(sample_ids)
        except Exception as error:
            if not is_of_sample(error):
                raise
        return [self._one(sample_id) for sample_id in sample_ids]

    def _one(self, sample_id: int) -> Any:
        try:
            return super().__getitems__([sample_id])[0]
        except Exception as error:
            if not is_of_sample(error):
                raise
            return BadSample(_told(error))


class LenientCollate:
    """A collate function that leaves out what it cannot collate, of a list with `BadSample`s.

    An error that no sample makes alone is raised as it is: nobody can say whose it is.

    Args:
        collate: Makes a batch of a list of samples.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        """The batch; a `PartOfBatch` if not all samples are in it."""
        reasons = {
            place: sample.reason
            for place, sample in enumerate(samples)
            if isinstance(sample, BadSample)
        }
        kept = [place for place in range(len(samples)) if place not in reasons]
        if kept:
            try:
                batch = self._of(samples, kept)
            except Exception as error:
                if not is_of_sample(error):
                    raise
                found = self._bad_alone(samples, kept)
                if not found:
                    raise
            else:
                return PartOfBatch(batch, kept, reasons) if reasons else batch
            reasons |= found
            kept = [place for place in kept if place not in found]
        return PartOfBatch(self._of(samples, kept) if kept else None, kept, reasons)

    def _of(self, samples: list[Any], places: Sequence[int]) -> Any:
        # Copies: what a function has taken out of a sample before it failed would be missed when it
        # is tried again.
        return self.collate(
            [
                copy.copy(samples[place]) if isinstance(samples[place], dict) else samples[place]
                for place in places
            ]
        )

    def _bad_alone(self, samples: list[Any], places: Sequence[int]) -> dict[int, str]:
        found = {}
        for place in places:
            try:
                self._of(samples, [place])
            except Exception as error:
                if not is_of_sample(error):
                    raise
                found[place] = _told(error)
        return found


def reading(
    dataset: Any, collate: Callable[[list[Any]], Any], on_bad_sample: OnBadSample
) -> tuple[ShardView, Callable[[list[Any]], Any]]:
    """A dataset as samples by id, and what makes batches of them, strict or lenient."""
    if on_bad_sample == "raise":
        return ShardView(dataset), collate
    return LenientView(dataset), LenientCollate(collate)


def is_of_sample(error: BaseException) -> bool:
    """Whether an error may be a sample's: not one that says that something else is amiss.

    What the system says (a file, a network, memory) says nothing about the sample, and may be over
    soon; so does what a shard or a setting is to blame for. A network's error counts, too, where it
    is what another error comes of.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return False
    if isinstance(error, ShardError | ConfigError):
        return False
    # Libraries raise an OSError without a number also for what they cannot decode, a torn image
    # say.
    return not any(map(_is_outage, _behind(error)))


def _is_outage(error: BaseException) -> bool:
    """Whether an error says that a network or memory failed."""
    if isinstance(error, ConnectionError | TimeoutError | MemoryError | torch.OutOfMemoryError):
        return True
    # By name: none of these libraries need be there.
    return any(f"{kind.__module__}.".startswith(_OF_NETWORKS) for kind in type(error).__mro__)


def _behind(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it comes of."""
    left, seen = [error], set()
    while left:
        one = left.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            # Where urllib has it, and urllib3.
            reason = getattr(one, "reason", None)
            others = (one.__cause__, one.__context__, reason)
            left += [other for other in others if isinstance(other, BaseException)]


def _told(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= _TOLD_CHARACTERS else text[:_TOLD_CHARACTERS] + " ..."


class BadSamples:
    """What becomes of samples that cannot be read or collated.

    Holds how many were withdrawn when it was last told of.

    Args:
        sampler: The loader's.
        owner: The thread that owns the sampler.
        view: Samples by id; a `LenientView` unless bad samples raise.
        collate: Makes a batch of them; likewise.
        fetcher: Knows which candidates damaged shards have taken.
        told: Is told of those that are withdrawn, each with what was raised.
    """

    def __init__(
        self,
        sampler: SlapSampler,
        owner: BackgroundThread,
        *,
        view: ShardView,
        collate: Callable[[list[Any]], Any],
        fetcher: ShardFetcher,
        told: Callable[[Sequence[tuple[int, int, int, str]]], None] = lambda samples: None,
    ) -> None:
        self._sampler, self._owner = sampler, owner
        self._view, self._collate, self._fetcher = view, collate, fetcher
        self._told, self._tell = 0, told

    def settle(self, part: PartOfBatch, ids: IntArray) -> tuple[Any, IntArray]:
        """What is delivered of a batch.

        Args:
            part: What was collated of it.
            ids: (batch,) the sample ids that it was to be made of, lane by lane.

        Returns:
            The batch, and the ids of the samples in it.

        Raises:
            SampleError: If more candidates are withdrawn than may be.
            Exception: What reading and collating a lane's samples raises, where nothing that the
                lane composed around them can be used either.
        """
        kept = np.zeros(len(ids), bool)
        kept[part.kept] = True
        lanes = self._owner.call(lambda: self._sampler.lanes)
        delivered: list[IntArray] = []
        withdrawals = []
        by_lane = zip(np.split(ids, len(lanes)), np.split(kept, len(lanes)), strict=True)
        for place, (mine, good) in enumerate(by_lane):
            again = None
            if not good.any():
                again = self._usable(self._composed_around(place, mine), mine)
            delivered.append(mine[good] if again is None else again)
            if not good.all():
                withdrawals.append(partial(withdraw_composed, lanes[place], mine[~good], again))
        found = np.concatenate(delivered)
        # With samples of another batch it must be collated again.
        batch = part.batch if len(found) == len(part.kept) else self._read_all(found)
        self._withdraw(withdrawals, ids, part)
        return batch, found

    def read_probed(self, ids: IntArray) -> tuple[Any, IntArray, PartOfBatch | None]:
        """A batch of as many samples as are asked for; others take the place of those that fail.

        Args:
            ids: (n,) sample ids.

        Returns:
            The batch; the (n,) ids of the samples in it; what was collated first, if not all.
        """
        made = self._read(ids)
        if not isinstance(made, PartOfBatch):
            return made, ids, None
        usable = ids[made.kept]
        if not len(usable):
            place = self._owner.call(lambda: lane_probing(self._sampler.lanes, ids))
            # Before anything is composed, a probe looks at the first samples.
            first = np.setdiff1d(np.arange(min(_FIRST, self._sampler.table.num_samples)), ids)
            usable = self._usable(self._composed_around(place, ids) or [first], ids)
        read = ids.copy()
        places = list(made.reasons)
        read[places] = np.resize(usable, len(places))
        return self._read_all(read), read, made

    def withdraw_probed(self, part: PartOfBatch, ids: IntArray) -> None:
        """Candidates that could not be probed leave the pool.

        Raises:
            SampleError: If more candidates are withdrawn than may be.
        """
        bad = ids[list(part.reasons)]
        lanes = self._owner.call(lambda: self._sampler.lanes)
        self._withdraw([partial(withdraw_pooled, lane, bad) for lane in lanes], ids, part)

    def _read(self, ids: IntArray) -> Any:
        """What is collated of samples; a `PartOfBatch` if some of them cannot be used."""
        return self._collate(self._view.__getitems__(ids))

    def _read_all(self, ids: IntArray) -> Any:
        """The same, but what a sample raises is raised."""
        collate = self._collate
        samples = ShardView.__getitems__(self._view, ids)
        return (collate.collate if isinstance(collate, LenientCollate) else collate)(samples)

    def _composed_around(self, place: int, ids: IntArray) -> list[IntArray]:
        return self._owner.call(lambda: composed_around(self._sampler.lanes[place], ids))

    def _usable(self, around: Sequence[IntArray], ids: IntArray) -> IntArray:
        """Samples to be had in the place of (n,) ids of which none is, out of batches around."""
        for others in around[:_TRIED]:
            made = self._read(others)
            usable = others[made.kept] if isinstance(made, PartOfBatch) else others
            if len(usable):
                return usable
        # So it is not the samples: raises what it is, unless it has just ended.
        self._read_all(ids)
        return ids

    @property
    def withdrawn_fraction(self) -> float:
        """Of this rank's candidates of the epoch, in [0, 1]; the owner asks for it."""
        share = len(self._sampler.lanes) / self._sampler.num_lanes
        once = self._sampler.table.num_candidates * share
        # An epoch of several passes meets a bad sample as often as it is offered.
        offered = float(self._sampler.offered_by_stratum.sum())
        return self._count / max(once, offered)

    @property
    def _count(self) -> int:
        return unusable_samples(self._sampler.lanes)

    def _withdraw(
        self, withdrawals: Sequence[Callable[[], Withdrawn]], ids: IntArray, part: PartOfBatch
    ) -> None:
        reasons = {int(ids[place]): reason for place, reason in part.reasons.items()}
        carried = self._owner.call(partial(self._carry_out, withdrawals, reasons))
        count, fraction, most = carried
        place, reason = next(iter(part.reasons.items()))
        if count and count >= 2 * self._told:
            self._told = count
            logger.warning(
                "sample %d cannot be used and is withdrawn: %s (%d of this epoch so far; told again"
                " when they are twice as many, and in metrics() as samples_withdrawn)",
                ids[place],
                reason,
                count,
            )
        if fraction > most:
            raise SampleError(
                f"withdrawn candidates must be at most max_withdrawn = {most:g} of the epoch's, got"
                f" {fraction:.3g}: {count} samples, and those of damaged shards; sample "
                f"{int(ids[place])} was the last: {reason}. Mend the samples, or go on from the "
                "last state with a larger max_withdrawn."
            )

    def _carry_out(
        self, withdrawals: Sequence[Callable[[], Withdrawn]], reasons: Mapping[int, str]
    ) -> tuple[int, float, float]:
        """Withdraw; how many samples and what fraction of the candidates are gone, and may be."""
        gone = [sample for withdraw in withdrawals for sample in withdraw()]
        self._tell([(*sample, reasons[sample[0]]) for sample in gone])
        fraction = self.withdrawn_fraction + self._fetcher.withdrawn_fraction
        return self._count, fraction, self._sampler.config.max_withdrawn
