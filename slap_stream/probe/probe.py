"""The probe: every few steps, what the current model makes of a few candidates.

For each candidate it reads the mean loss over supervised tokens and a sketch of the preconditioned
gradient of the output head, from a forward alone: the gradient of a sample's loss with respect to
the head is sum_t (p - y)_t (x) h_t over its supervised tokens, divided by their number, and both
factors are known after a forward.

Memory: the hidden states of supervised tokens go through the head in blocks of tokens, so that
logits of a bounded size are at hand at a time. Blocks of tokens rather than of the vocabulary: one
pass instead of two (a softmax needs its normaliser first), and the head is called as the module it
is, so that adapters, biases and quantised heads need no code of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from slap_stream.config import SlapConfig
from slap_stream.core.saved import Saved
from slap_stream.probe.head import (
    check_causal,
    find_head,
    head_weight,
    quiet,
    reshard,
    to_device,
    unwrap,
)
from slap_stream.probe.memory import FittingBatches
from slap_stream.probe.packing import count_samples
from slap_stream.probe.readout import (
    CausalReader,
    LossFn,
    LossFnReader,
    Reader,
    per_sample_loss,
)
from slap_stream.probe.second_moment import HasState, SecondMoment, read_factors
from slap_stream.probe.sink import GradientSink
from slap_stream.probe.sketch import TensorSketch
from slap_stream.types import IGNORED_LABEL, Float32Array, FloatArray, IntArray, State

__all__ = ["IGNORED_LABEL", "LearnabilityProbe", "ProbeHost", "per_sample_loss"]

_VERSION = 1
# What a state counts.
_SAVED_COUNTS = ("step", "samples", "nonfinite")
# What is counted of each lane at a probe, ahead of the curvature.
_COUNTS = ("samples", "finite losses", "sum of them")


class ProbeHost(Protocol):
    """What the probe needs of the loader."""

    @property
    def config(self) -> SlapConfig:
        """Settings of the run."""
        ...

    @property
    def measurements(self) -> Sequence[str]:
        """Names of what is wanted besides losses and sketches."""
        ...

    @property
    def num_local_lanes(self) -> int:
        """Lanes of this rank."""
        ...

    def probe_budget(self) -> int:
        """Candidates due now on this rank, a multiple of its lanes; 0: nothing to probe."""
        ...

    def probe_candidates(self, n: int, /) -> IntArray:
        """(n,) sample ids, equally many of each lane of this rank, lane by lane."""
        ...

    def read_batch(self, ids: IntArray, /) -> Any:
        """The collated batch of these samples, in this order."""
        ...

    def update(
        self,
        ids: IntArray,
        losses: FloatArray,
        sketches: Float32Array | None,
        measurements: Mapping[str, FloatArray],
        /,
    ) -> None:
        """Take (n,) losses, (n, sketch_dim) sketches and (n,) `measurements` of these samples."""
        ...

    def refresh(self, also: FloatArray, then: Callable[[FloatArray], None], /) -> FloatArray:
        """Exchange and apply what was seen since the last refresh; add up (local lanes, n) numbers
        of the probe's own over the lanes of all ranks, and give their sums to `then` where no
        interrupt can part the two."""
        ...

    def attach(self, probe: LearnabilityProbe, /) -> None:
        """Keep the probe, to save and load its state with the loader's own."""
        ...


def check_probe_state(state: Any, shape: tuple[int, int] | None) -> None:
    """Refuse what no probe can go on from.

    Args:
        state: What `LearnabilityProbe.state_dict` gave.
        shape: (vocabulary, hidden) of the head; None: of any.

    Raises:
        StateError: If it was written by another version or for another head, or was damaged.
    """
    saved = Saved(state, "probe")
    saved.check_version(_VERSION)
    for name in _SAVED_COUNTS:
        saved.whole(name)
    read_factors(saved.part("second_moment"), shape)


@runtime_checkable
class HasProbeHost(Protocol):
    """A loader, which does not show the probe's business among its own."""

    def probe_host(self) -> ProbeHost:
        """What the probe needs."""
        ...


class LearnabilityProbe:
    """Reads the model for the loader: losses and gradient sketches of the candidates it asks for.

    Any Hugging Face causal language model works as it is. Any other torch model works with
    `head=`, the module whose gradient is sketched, and `loss_fn=`, which calls the model on a batch
    and returns one loss per sample: gradients are then taken from the head's output on, never
    further back.

    A candidate without supervised tokens gets loss 0 and a sketch of zeros. A loss that is not
    finite is passed on as it is; its tokens are left out of sketches and second moment.

    With several ranks every rank makes a probe and calls it alike. Each reads candidates of its own
    lanes, in as many forwards as the others; what they saw is added up over all lanes.

    State, the same on every rank: steps taken, samples read, losses that were not finite, and the
    Gauss-Newton estimate of the second moment.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: HasProbeHost | ProbeHost,
        *,
        head: nn.Module | None = None,
        loss_fn: LossFn | None = None,
        optimizer: HasState | None = None,
        sketches: bool = True,
        batch_size: int = 32,
        check_ids: Sequence[int] = (0, 1),
    ) -> None:
        """Find the head, and check on one batch that the probe sees the model's own loss.

        Args:
            model: The model in training; DDP and torch.compile wrappers are looked through.
            loader: The `SlapDataLoader`, or whatever else asks for candidates and takes what the
                probe saw.
            head: Module that makes the logits; None: the model's output embeddings.
            loss_fn: (model, batch) -> (batch,) losses, each a function of its own sample alone;
                None: cross-entropy of the next token, as in `per_sample_loss`.
            optimizer: The one that trains the model; its second moment of the head then
                preconditions the sketches, else a decayed Gauss-Newton estimate of the probe's.
            sketches: Whether sketches are made; without them a policy has losses only.
            batch_size: Samples in one forward; a lane with more candidates takes several. Where
                memory is too short for one, smaller ones are tried.
            check_ids: Samples of the batch that is checked.

        Raises:
            HeadError: If the head cannot be found or read, or the losses differ.
            ConfigError: If the policy wants a measurement that the probe cannot make.
            ValueError: If batch_size is not positive or check_ids is empty.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size!r}.")
        if not len(check_ids):
            raise ValueError("check_ids must name at least one sample, got none.")
        self._model = unwrap(model)
        self._loader = host = loader.probe_host() if isinstance(loader, HasProbeHost) else loader
        self._batches = FittingBatches(batch_size)
        self._device = next(self._model.parameters()).device
        self._step = 0
        self._samples = 0
        self._nonfinite = 0
        self._seconds = 0.0
        self._last_loss = 0.0

        if loss_fn is None:
            check_causal(self._model)
        reshard(self._model)
        found = find_head(self._model, head)
        weight = head_weight(found)
        wanted = host.measurements
        self._reader: Reader = (
            CausalReader(self._model, found, measurements=wanted)
            if loss_fn is None
            else LossFnReader(self._model, found, loss_fn, measurements=wanted)
        )
        checked = np.asarray(check_ids, np.int64)
        with quiet(self._model, self._device):
            batch = to_device(host.read_batch(checked), self._device)
            vocabulary, hidden, device = self._reader.check(batch, len(checked))
        reshard(self._model)
        config = host.config
        self._sketch: TensorSketch | None = None
        self._optimizer_given = optimizer is not None
        self._moment = SecondMoment(
            (vocabulary, hidden),
            decay=config.advanced.decay,
            device=device,
            weight=weight,
            optimizer=optimizer,
        )
        if sketches:
            self._sketch = TensorSketch(
                vocabulary, hidden, config.advanced.sketch_dim, seed=config.seed, device=device
            )
            # A first estimate of the second moment, so that the first sketches are preconditioned.
            self._moment.update(self._read(checked[None])[3][0])
        host.attach(self)

    def step(self) -> bool:
        """Count an optimizer step; every `probe_every` of them, probe and refresh the loader.

        Call it after `optimizer.step()`, on every rank. Inside a `torch.autocast` region it
        forwards in that precision.

        Returns:
            Whether this step was one of those.
        """
        self._step += 1
        if self._step % self._loader.config.probe_every:
            return False
        lanes, budget = self._loader.num_local_lanes, self._loader.probe_budget()
        seen = np.zeros((lanes, len(_COUNTS)))
        if budget:
            began = time.perf_counter()
            ids = np.asarray(self._loader.probe_candidates(budget), np.int64)
            if len(ids) % lanes:
                raise ValueError(
                    f"probe_candidates must be equally many of {lanes} lanes, got {len(ids)} ids."
                )
            losses, sketches, measured, curvature = self._read(ids.reshape(lanes, -1))
            by_lane = losses.reshape(lanes, -1)
            finite = np.isfinite(by_lane)
            counts = finite.sum(axis=1), np.where(finite, by_lane, 0.0).sum(axis=1)
            seen = np.column_stack([np.full(lanes, finite.shape[1]), *counts, curvature])
            self._seconds += time.perf_counter() - began
            self._loader.update(ids, losses, sketches, measured)
        # Also without anything probed: a refresh is an exchange that every rank takes part in.
        self._loader.refresh(seen, self._take)
        return True

    def _take(self, total: FloatArray) -> None:
        """Take in what all ranks have seen: sums of the counts and of the curvature."""
        samples, known, loss = total[: len(_COUNTS)]
        if samples:
            self._samples += int(samples)
            self._nonfinite += int(samples - known)
            self._last_loss = float(loss / known) if known else 0.0
            self._moment.update(total[len(_COUNTS) :])

    def mean_sketch(self, batches: Iterable[Mapping[str, Any]]) -> Float32Array:
        """Mean gradient sketch of a target set under the present model, for `set_target`.

        Args:
            batches: Collated batches of the target set; every value's first axis is the samples,
                unless there is no padding.

        Returns:
            (sketch_dim,) mean over all samples; comparable with the candidates' sketches until the
            preconditioner moves on.

        Raises:
            ValueError: If there is no batch, or the probe makes no sketches.
        """
        if self._sketch is None:
            raise ValueError("mean_sketch needs sketches, got a probe made with sketches=False.")
        sink = GradientSink(self._sketch, self._moment)
        parts = []
        with quiet(self._model, self._device):
            for batch in batches:
                size = count_samples(batch)
                self._reader.read(to_device(batch, self._device), size, sink)
                parts.append(sink.take(size).cpu().numpy())
        if not parts:
            raise ValueError("batches must hold at least one batch, got none.")
        reshard(self._model)
        # The sink's curvature is left: the second moment is of what is trained on.
        mean: Float32Array = np.concatenate(parts).mean(axis=0)
        return mean

    @property
    def head_shape(self) -> tuple[int, int]:
        """(vocabulary, hidden) of the head that a saved state must be of."""
        return self._moment.shape

    def metrics(self) -> dict[str, float]:
        """Flat numbers about the probe's work.

        `probe_moment_fallback` is 1 when an optimizer was handed over that cannot tell the head's
        second moment, so that the probe's own estimate is used.
        """
        from_optimizer = self._moment.from_optimizer
        fell_back = self._optimizer_given and self._sketch is not None and not from_optimizer
        return {
            "probe_steps": float(self._step),
            "probe_samples": float(self._samples),
            "probe_nonfinite": float(self._nonfinite),
            "probe_loss": self._last_loss,
            "probe_seconds": self._seconds,
            "probe_batch_size": float(self._batches.size),
            "probe_out_of_memory": float(self._batches.failed),
            "probe_moment_from_optimizer": float(from_optimizer),
            "probe_moment_fallback": float(fell_back),
        }

    def state_dict(self) -> State:
        """Plain numbers and arrays; reads only."""
        return {
            "version": _VERSION,
            "step": self._step,
            "samples": self._samples,
            "nonfinite": self._nonfinite,
            "second_moment": self._moment.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved state; arrays may come back as nested lists.

        Raises:
            StateError: If it was written by another version or for another head, or was damaged;
                nothing has changed then.
        """
        check_probe_state(state, self.head_shape)
        saved = Saved(state, "probe")
        self._step, self._samples, self._nonfinite = (saved.whole(name) for name in _SAVED_COUNTS)
        self._moment.load_state_dict(saved.part("second_moment"))

    def _read_chunk(self, chunk: IntArray, sink: GradientSink | None) -> Float32Array:
        """(samples, numbers + sketch_dim) of one forward; nothing stays in the sink if it fails."""
        batch = to_device(self._loader.read_batch(chunk), self._device)
        undo = None if sink is None else sink.mark()
        try:
            columns = [self._reader.read(batch, len(chunk), sink)]
            if sink is not None:
                columns.append(sink.take(len(chunk)))
            # One copy to the CPU per batch.
            made: Float32Array = torch.cat(columns, 1).cpu().numpy()
        except BaseException:
            if undo is not None:
                undo()
            raise
        return made

    def _read(
        self, ids: IntArray
    ) -> tuple[FloatArray, Float32Array | None, dict[str, FloatArray], FloatArray]:
        """Losses, sketches and wanted measurements of (lanes, n) samples, and the (lanes, ...)
        curvature seen.

        One preconditioner serves all of them.

        Lanes never share a forward, so that padding, and with it the last bits of a loss, does not
        depend on how lanes are spread over ranks.
        """
        sink = None if self._sketch is None else GradientSink(self._sketch, self._moment)
        rows: list[Float32Array] = []
        curvature: list[FloatArray] = []
        with quiet(self._model, self._device):
            for lane in ids:
                rows += self._batches.each(
                    lane, partial(self._read_chunk, sink=sink), model=self._model
                )
                curvature.append(np.zeros(0) if sink is None else sink.take_curvature())
        reshard(self._model)
        table: Float32Array = np.concatenate(rows)
        wanted = self._loader.measurements
        numbers = table[:, : 1 + len(wanted)].astype(np.float64).T
        sketches = None if sink is None else np.ascontiguousarray(table[:, len(numbers) :])
        measured = dict(zip(wanted, numbers[1:], strict=True))
        return numbers[0], sketches, measured, np.stack(curvature)
