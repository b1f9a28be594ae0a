"""The interface of policies: what one is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slap_stream.config import SlapConfig
from slap_stream.core.sorting import first_of_each, sort_candidates
from slap_stream.errors import ConfigError
from slap_stream.selection.pool import RecentlyTrained
from slap_stream.types import BoolArray, Float32Array, FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolView:
    """Candidates that may enter a batch, as parallel arrays.

    Attributes:
        sample_id: (n,) sample ids, all different.
        occurrence: (n,) which copy of the sample each is.
        stratum: (n,) strata.
        offered_at: (n,) number of candidates that the lane was offered before.
        gumbel: (n,) noise of the candidate in this epoch.
        loss: (n,) predicted loss, or the candidate's own where it was probed lately.
        utility: (n,) utility u as `Policy.utility` made it, less what is taken from candidates that
            are not of a target set's kind.
        z: Makes the (m, metric_dim) float32 unit vectors of the metric space of (m,) positions.
        recent: What was trained on lately, by stratum.
        typical: Typical distance to the nearest neighbour of the same stratum.
        epoch: Epoch that the batch belongs to.
        embedding: Makes the (n, dim) float32 unit embeddings.
        measured: Makes (n,) whether a candidate's loss was measured.
        sketch: Makes the (n, sketch_dim) float32 measured gradient sketches, zero where there is
            none; without columns unless the policy needs sketches.
        measurement: Makes the (n,) numbers of this name that were measured, 0 where there is none.
        chosen: Makes the (m, sketch_dim) float32 sketches of what was chosen last, oldest first;
            without rows unless the policy needs them.
        reference_loss: Makes the (n,) losses of the reference model.
        target: (sketch_dim,) float32 mean gradient sketch of a target set, if one was given.
        rng: Makes the generator of this batch.

    What is made costs a copy, so only policies that need it call for it. A policy that reads what
    it has not declared gets a ConfigError: nobody keeps that for it.
    """

    sample_id: IntArray
    occurrence: IntArray
    stratum: IntArray
    offered_at: IntArray
    gumbel: FloatArray
    loss: FloatArray
    utility: FloatArray
    z: Callable[[IntArray], Float32Array]
    recent: RecentlyTrained
    typical: float
    epoch: int
    embedding: Callable[[], Float32Array]
    measured: Callable[[], BoolArray]
    sketch: Callable[[], Float32Array]
    measurement: Callable[[str], FloatArray]
    chosen: Callable[[], Float32Array]
    reference_loss: Callable[[], FloatArray]
    target: Float32Array | None
    rng: Callable[[], np.random.Generator]

    def __len__(self) -> int:
        return len(self.sample_id)

    def restricted_to(self, needs: frozenset[str]) -> PoolView:
        """The view itself, once it has forgotten what is not among these of `NEEDS`."""
        for name, declared in _TOLD_FOR.items():
            if needs.isdisjoint(declared):
                object.__delattr__(self, name)
        return self

    def __getattr__(self, name: str) -> Any:
        # Only asked for what is not there.
        if name not in _TOLD_FOR:
            raise AttributeError(name)
        declared = " or ".join(map(repr, _TOLD_FOR[name]))
        raise ConfigError(
            f"needs must hold {declared} for a policy that reads view.{name}, got a policy without "
            "it; declare it: what no policy needs is not kept."
        )


# Of what a view holds: which declaration it is there for.
_TOLD_FOR = {
    "loss": ("losses",),
    "z": ("losses",),
    "typical": ("losses",),
    "utility": ("losses", "evidence"),
    "recent": ("recent",),
    "embedding": ("embeddings",),
    "sketch": ("sketches",),
    "chosen": ("chosen_sketches",),
    "reference_loss": ("reference_loss",),
}

# What a policy may ask to be told, besides who its candidates are.
NEEDS = {
    "losses": "predicted losses, their ranks and the metric space, once losses can be predicted",
    "evidence": "near-copies and mismatches; what can be spared yields its strata's slots",
    "recent": "what was trained on lately",
    "embeddings": "unit embeddings",
    "sketches": "the candidates' own gradient sketches",
    "chosen_sketches": "gradient sketches of what was chosen last",
    "reference_loss": "the losses of a reference model",
}


class Policy(ABC):
    """A pure rule; all state lives in the lane, which asks the rule what it needs.

    Args:
        config: Settings.
        columns: Names of the feature columns that the embeddings have.

    Attributes:
        needs: What it is to be told, of `NEEDS`.
        measurements: Names of the numbers besides losses and sketches that are to be measured of
            each probed candidate, for `PoolView.measurement`.
        proportional: Whether strata get slots in proportion to what was offered. If not, quotas
            are ignored and only their sum counts.
        waits_for_losses: Whether batches are drawn uniformly until losses can be predicted.
        measures_all: Whether it is meant to see a measurement of every candidate:
            `probe_fraction` may then be up to 1, and what was measured stays as long as the
            candidate does.
        weighs_losses: Whether losses are to be weighted as `loss_weights` says.
        compares_batches: Whether `learnability` says what whole batches are worth.
    """

    needs: frozenset[str] = frozenset()
    measurements: tuple[str, ...] = ()
    proportional = False
    waits_for_losses = False
    measures_all = False
    weighs_losses = False
    compares_batches = False

    def __init__(self, config: SlapConfig, columns: Sequence[str] = ()) -> None:
        self.config = config
        self.columns = tuple(columns)

    @property
    def learns_losses(self) -> bool:
        """Whether losses are learnt from at all."""
        return self.waits_for_losses or "losses" in self.needs

    @property
    def sees_vectors(self) -> bool:
        """Whether it, or what is learnt for it, looks at embeddings, features or losses."""
        return self.learns_losses or not self.needs.isdisjoint(("evidence", "recent", "embeddings"))

    @property
    def keeps_sketches(self) -> bool:
        """Whether candidates carry their gradient sketches."""
        return not self.needs.isdisjoint(("sketches", "chosen_sketches"))

    def utility(
        self, *, rank: FloatArray, loss: FloatArray, copy: FloatArray, mismatch: FloatArray
    ) -> FloatArray:
        """What one candidate is worth on its own, before noise; zero unless a policy says more.

        Args:
            rank: (n,) rank in [0, 1] of the excess loss inside the stratum.
            loss: (n,) predicted loss.
            copy: (n,) likelihood of being a near-copy of what was trained on lately.
            mismatch: (n,) probability that the target belongs to another prompt.
        """
        return np.zeros(len(rank))

    @abstractmethod
    def score(self, view: PoolView) -> FloatArray:
        """(n,) the one number that decides: the lowest are pruned."""

    @abstractmethod
    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        """(sum of quota,) positions in the view, all different.

        Args:
            view: Candidates to choose from.
            quota: (num_strata,) slots of each stratum, each at most what the view has of it.
        """

    def loss_weights(self, view: PoolView) -> FloatArray:
        """(n,) weight that each candidate's loss has if it is trained on now."""
        raise NotImplementedError("a policy that weighs losses says how")

    def learnability(self, view: PoolView, batches: Sequence[IntArray]) -> list[float]:
        """What several batches, (n,) positions in the view each, are worth per member."""
        raise NotImplementedError("a policy that compares batches says how")


class SlidingPolicy(Policy):
    """What the policies share that choose from a window of the candidates offered last."""

    def score(self, view: PoolView) -> FloatArray:
        """How late a candidate was offered: what was not chosen in time leaves, oldest first."""
        return view.offered_at.astype(np.float64)


class SketchPolicy(SlidingPolicy):
    """What the policies share that compare the candidates' own gradient sketches.

    Candidates without one come last, oldest first: nothing else that is known of them is of the
    same kind.
    """

    needs = frozenset({"sketches"})
    waits_for_losses = True
    measures_all = True

    def select(self, view: PoolView, quota: IntArray) -> IntArray:
        """The measured candidates that `pick` takes, then the others."""
        slots = int(quota.sum())
        # By identity, so that neither ties nor rounding depend on where a candidate lies.
        order: IntArray = np.lexsort((view.occurrence, view.sample_id))
        sketch = view.sketch()[order].astype(np.float64)
        measured = np.any(sketch != 0.0, axis=1)
        known, others = order[measured], order[~measured]
        others = others[np.argsort(view.offered_at[others], kind="stable")]
        count = min(slots, len(known))
        picked = self.pick(view, known, sketch[measured], count) if count else known[:0]
        return np.concatenate([known[picked], others[: slots - count]])

    def pick(self, view: PoolView, known: IntArray, sketch: FloatArray, count: int) -> IntArray:
        """(count,) positions in `known`, all different.

        Args:
            view: Candidates to choose from.
            known: (n,) positions in the view of those that were measured.
            sketch: (n, sketch_dim) their gradient sketches, none of them zero.
            count: How many to pick, from 1 to n.
        """
        raise NotImplementedError


def checked_choice(policy: Policy, chosen: IntArray, view: PoolView, wanted: int) -> IntArray:
    """What a policy has selected, (wanted,) positions in the view, if it has kept its word.

    Raises:
        ConfigError: If they are not so many, all different, in the view.
    """
    positions = np.asarray(chosen)
    fits = positions.shape == (wanted,) and positions.dtype.kind in "iu"
    if fits and wanted:
        fits = positions.min() >= 0 and positions.max() < len(view)
    if not (fits and np.bincount(positions, minlength=1).max() <= 1):
        raise ConfigError(
            f"{type(policy).__name__}.select must give {wanted} positions in [0, {len(view)}), all "
            f"different, got {positions.shape} {positions.dtype}, first {positions[:5].tolist()}; "
            "else a sample would be trained on twice, or a batch be short."
        )
    return positions


def checked_score(policy: Policy, score: FloatArray, view: PoolView) -> FloatArray:
    """The (n,) scores that a policy gives to a view, if they can be put in order.

    Raises:
        ConfigError: If they are of another shape, or one is NaN.
    """
    scores = np.asarray(score)
    if scores.shape != (len(view),) or scores.dtype.kind != "f" or np.isnan(scores).any():
        raise ConfigError(
            f"{type(policy).__name__}.score must give {len(view)} floats without NaN, got "
            f"{scores.dtype} {scores.shape}; the lowest are pruned, so they must have an order."
        )
    return scores


def recency(view: PoolView) -> FloatArray:
    """(n,) in [0, 1): the later a candidate was offered, the higher."""
    late: FloatArray = view.offered_at / (1.0 + view.offered_at.max(initial=0))
    return late


def top_of_each_stratum(score: FloatArray, view: PoolView, quota: IntArray) -> IntArray:
    """The highest scores of each stratum, as many as its quota (or all there are)."""
    order = sort_candidates(-score, view.sample_id, view.occurrence, group=view.stratum)
    return first_of_each(view.stratum[order], quota, order)


def top(
    score: FloatArray, view: PoolView, count: int, *, last: BoolArray | bool = False
) -> IntArray:
    """The highest scores over all strata; those in `last` (n,) only after all others."""
    later = np.broadcast_to(last, score.shape)
    order: IntArray = np.lexsort((view.occurrence, view.sample_id, -score, later))
    return order[:count]


def unmeasured(view: PoolView, config: SlapConfig) -> BoolArray:
    """(n,) candidates whose loss is only predicted so far, where each is going to be measured."""
    if config.probe_fraction < 1.0:
        return np.zeros(len(view), bool)
    return ~view.measured()
