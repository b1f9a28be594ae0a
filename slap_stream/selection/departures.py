"""What leaves the lanes' pools, composed or pruned, and why: for whoever keeps a log of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.selection.loss_model import LOG_LENGTH
from slap_stream.selection.policies.base import Policy
from slap_stream.selection.pool import Pool
from slap_stream.selection.scoring import EVIDENCE, Scorer, either
from slap_stream.types import FloatArray, IntArray

TRAINED, DRAWN_OUT, LEARNT, WITHDRAWN = "trained", "drawn out", "learnt", "withdrawn"
# Why a candidate may have been pruned.
_REASONS = (DRAWN_OUT, LEARNT, *EVIDENCE)
# Outcomes of a candidate, by number. `withdrawn` is what could not be read or collated, or had a
# loss that is not finite.
OUTCOMES = (TRAINED, *_REASONS, WITHDRAWN)
# Evidence that says of a target, in one way or another, that it is noise.
_NOISE = ("mismatch", "outlier")
# Evidence below this is none that a person would call so.
LEAST_SHOWN = 0.5
# Probabilities and ranks are kept in steps of 1 / 255.
_STEPS = 255
# Mean of a Gumbel variable: noise below it has taken something from a score.
_MEAN_NOISE = 0.5772

# One that has left. `step`: batches composed in the epoch before. `nearest`: the sample that it was
# compared with, -1 if none was near. `length`: in the store's unit.
ROW = np.dtype(
    [
        ("sample_id", "<i8"),
        ("nearest", "<i8"),
        ("step", "<u4"),
        ("length", "<u4"),
        ("epoch", "<u2"),
        ("stratum", "<u2"),
    ]
    + [("session", "<u2"), ("outcome", "u1"), ("rank", "u1")]
    + [(name, "u1") for name in EVIDENCE]
)
Rows = NDArray[Any]
# Stands for all reasons, where a candidate leaves.
PRUNED = "pruned"
_KEPT, _KEPT_OF_PRUNED = ("sample_id", "nearest", "stratum", "rank"), ("loss", "gumbel")


@dataclass(kw_only=True, slots=True)
class Departures:
    """Notes what leaves a lane's pool: copies of a few columns, made sense of when asked for.

    Memory grows until `take`. Nothing that is decided depends on it, and no state holds it.

    Attributes:
        pool: The lane's pool.
        scorer: Who scores what is in it.
        policy: Rule that prunes.
    """

    pool: Pool
    scorer: Scorer
    policy: Policy
    _parts: list[tuple[str, int, int, dict[str, NDArray[Any]]]] = field(default_factory=list)
    _causes: list[tuple[int, int, int, str]] = field(default_factory=list)

    def note(
        self, slots: IntArray, outcome: str, *, epoch: int, step: int, cause: str = ""
    ) -> None:
        """Candidates in (n,) slots are about to leave.

        Args:
            slots: Their places in the pool.
            outcome: `TRAINED`, `WITHDRAWN`, or `PRUNED`, of which is asked why.
            epoch: Of the batch that they leave with.
            step: Batches of the epoch before it.
            cause: Of what is withdrawn, unless somebody else tells it.
        """
        if not len(slots):
            return
        columns = self.pool.columns
        kept: dict[str, NDArray[Any]] = self.scorer.evidence(slots)
        for name in _KEPT + _KEPT_OF_PRUNED if outcome == PRUNED else _KEPT:
            kept[name] = getattr(columns, name).take(slots)
        kept["log_length"] = self.pool.x[slots, LOG_LENGTH]
        self._parts.append((outcome, epoch, step, kept))
        if cause:
            self._causes += [(name, epoch, step, cause) for name in kept["sample_id"].tolist()]

    def take_causes(self) -> list[tuple[int, int, int, str]]:
        """Of what was noted with a cause since the last call: sample id, epoch, step and cause."""
        causes, self._causes = self._causes, []
        return causes

    def take(self) -> Rows:
        """(n,) of `ROW`, with session zero: what was noted since the last call, in that order, but
        the pruned last."""
        parts, self._parts = self._parts, []
        if not parts:
            return np.zeros(0, ROW)
        parts.sort(key=lambda part: part[0] == PRUNED)
        names = {name for *_, part in parts for name in part} - {*_KEPT_OF_PRUNED}
        told = {name: np.concatenate([part[name] for *_, part in parts]) for name in names}
        sizes = [len(part["sample_id"]) for *_, part in parts]
        rows = np.zeros(sum(sizes), ROW)
        for name in ("sample_id", "stratum"):
            rows[name] = told[name]
        rows["epoch"], rows["step"] = (
            np.repeat([part[place] for part in parts], sizes) for place in (1, 2)
        )
        known = [OUTCOMES.index(part[0]) for part in parts if part[0] != PRUNED]
        whole = sum(sizes[: len(known)])
        rows["outcome"][:whole] = np.repeat(known, sizes[: len(known)])
        evidence = {name: told.get(name, np.zeros(len(rows))) for name in EVIDENCE}
        for name, values in (*evidence.items(), ("rank", told["rank"])):
            rows[name] = np.round(np.clip(values, 0.0, 1.0) * _STEPS)
        # What is no copy is near to nothing.
        rows["nearest"] = np.where(evidence["copy"] > 0.0, told["nearest"], -1)
        pruned = [part for *_, part in parts[len(known) :]]
        if pruned:
            loss, noise = (np.concatenate([p[n] for p in pruned]) for n in _KEPT_OF_PRUNED)
            shown = {name: values[whole:] for name, values in evidence.items()}
            rows["outcome"][whole:] = reasons(self.policy, told["rank"][whole:], loss, noise, shown)
        # Design rows hold log(1 + length).
        rows["length"] = np.round(np.expm1(told["log_length"].astype(np.float64)))
        return rows


def reasons(
    policy: Policy,
    rank: FloatArray,
    loss: FloatArray,
    noise: FloatArray,
    evidence: dict[str, FloatArray],
) -> IntArray:
    """Why candidates were pruned: what has taken the most from their score.

    That is what the policy's own utility says of each on its own: of evidence that is shown, beside
    none of it; of a loss that ranks low, beside a middling one; of the noise of the draw, beside
    its mean. A policy with another rule than utility and noise prunes by that: all are drawn out.

    Args:
        policy: Rule that prunes.
        rank: (n,) ranks of the losses.
        loss: (n,) losses.
        noise: (n,) Gumbel noise.
        evidence: By name of `EVIDENCE`, (n,) probabilities.

    Returns:
        (n,) numbers in `OUTCOMES`, of those that are reasons.
    """

    # Taken from the utility by the scorer, if the policy weighs evidence.
    weight = policy.config.advanced.target_weight if "evidence" in policy.needs else 0.0

    def worth(rank: FloatArray, shown: dict[str, FloatArray]) -> FloatArray:
        noise = either(shown["mismatch"], shown["outlier"])
        utility = policy.utility(rank=rank, loss=loss, copy=shown["copy"], mismatch=noise)
        return utility - weight * shown["unrelated"]

    whole, none = worth(rank, evidence), np.zeros(len(rank))
    charges = {
        DRAWN_OUT: np.maximum(0.0, _MEAN_NOISE - noise),
        LEARNT: worth(np.maximum(rank, 0.5), evidence) - whole,
    }
    for name, values in evidence.items():
        # Of two kinds of noise in one sample neither would take anything more.
        kind = _NOISE if name in _NOISE else (name,)
        charge = worth(rank, evidence | dict.fromkeys(kind, none)) - whole
        strongest_kind = np.all([values >= evidence[other] for other in kind], axis=0)
        charges[name] = np.where((values >= LEAST_SHOWN) & strongest_kind, charge, 0.0)
    strongest: IntArray = np.argmax(np.stack([charges[name] for name in _REASONS]), axis=0)
    return strongest + 1
