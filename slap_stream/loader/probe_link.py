"""The questions of a probe to a loader, and its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from slap_stream.config import SlapConfig
from slap_stream.core.background import BackgroundThread
from slap_stream.loader.bad_samples import BadSamples, PartOfBatch
from slap_stream.loader.delivery import with_ids
from slap_stream.probe.probe import LearnabilityProbe
from slap_stream.selection.sampler import SlapSampler
from slap_stream.types import Float32Array, FloatArray, IntArray


class ProbeLink:
    """A loader as its probe sees it: a `ProbeHost`.

    Args:
        sampler: The loader's.
        owner: The thread that owns the sampler.
        bad_samples: Reads and collates samples by id, and settles what cannot be.
        attach: Keeps a probe, whose state travels in the loader's; the owner calls it.
    """

    def __init__(
        self,
        sampler: SlapSampler,
        owner: BackgroundThread,
        *,
        bad_samples: BadSamples,
        attach: Callable[[LearnabilityProbe], None],
    ) -> None:
        self._sampler, self._owner = sampler, owner
        self._bad_samples, self._attach = bad_samples, attach
        # Of what is being probed, with the ids that were asked for.
        self._parts: list[tuple[PartOfBatch, IntArray]] = []

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
        return self._owner.call(lambda: len(self._sampler.lanes))

    def probe_budget(self) -> int:
        """Candidates due to be probed now; 0 if none."""
        return self._owner.call(self._sampler.probe_budget)

    def probe_candidates(self, count: int) -> IntArray:
        """(count,) sample ids to probe, lane by lane, equally many per lane."""
        self._parts = []
        return self._owner.call(partial(self._sampler.probe_candidates, count))

    def read_batch(self, ids: Sequence[int] | IntArray) -> Any:
        """Read and collate samples by id, in this process; what others stand in for is left out of
        the next `update`."""
        batch, read, part = self._bad_samples.read_probed(np.array(ids, np.int64))
        if part is not None:
            self._parts.append((part, np.array(ids, np.int64)))
        return with_ids(batch, read)

    def update(
        self,
        ids: IntArray,
        losses: FloatArray,
        sketches: Float32Array | None,
        measurements: Mapping[str, FloatArray],
    ) -> None:
        """Feed back what the probe measured of the ids that `probe_candidates` gave; those that
        could not be read are withdrawn.

        Raises:
            SampleError: If more candidates are withdrawn than may be.
        """
        if self._parts:
            bad = np.concatenate([asked[list(part.reasons)] for part, asked in self._parts])
            fine = ~np.isin(ids, bad)
            ids, losses = ids[fine], losses[fine]
            sketches = None if sketches is None else sketches[fine]
            measurements = {name: values[fine] for name, values in measurements.items()}
        self._owner.call(partial(self._sampler.update, ids, losses, sketches, measurements))
        while self._parts:
            self._bad_samples.withdraw_probed(*self._parts.pop())

    def refresh(
        self,
        also: FloatArray | None = None,
        then: Callable[[FloatArray], None] | None = None,
    ) -> FloatArray:
        """Take in all feedback since the last refresh, of all ranks; every rank calls it.

        Args:
            also: (local lanes, n) more numbers to be added up over all lanes of all ranks.
            then: Is given their (n,) sums at once, in the thread that refreshes: an interrupt
                cannot come between.

        Returns:
            (n,) the sums.

        Raises:
            ExchangeError: If a rank does not answer in time or is at another step.
        """
        return self._owner.call(partial(self._refresh, also, then))

    def _refresh(
        self, also: FloatArray | None, then: Callable[[FloatArray], None] | None
    ) -> FloatArray:
        self._sampler.refreshes_itself = False
        total = self._sampler.refresh(also)
        if then is not None:
            then(total)
        return total

    def attach(self, probe: LearnabilityProbe) -> None:
        """Let a probe refresh the loader; its state travels in the loader's."""
        self._owner.call(partial(self._attach, probe))
