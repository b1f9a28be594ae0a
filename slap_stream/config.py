"""Every setting of the sampler, validated when it is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from slap_stream.errors import ConfigError

OnBadShard = Literal["raise", "skip"]

_WEIGHTS = ("copy_weight", "mismatch_weight", "curvature", "diversity")
_FLOATS = ("keep_min", "probe_fraction", "decay", "temperature", "rank_cap", *_WEIGHTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class SlapConfig:
    """Settings of a run; the defaults are meant to work without tuning.

    Attributes:
        keep: Fraction of the candidates that is trained on, in (0, 1]; "auto": what is not shown
            to be dispensable, followed online.
        keep_min: Least fraction that "auto" goes down to, in (0, 1].
        policy: Rule that picks a batch from the pool.
        seed: Seed of every draw.
        num_lanes: Independent composers; None means the world size at the first construction.
            Fixed for a run: it is what the batches depend on, so that the world size is free.
        num_clusters: Embedding clusters; a stratum is one cluster of one source.
        shards_per_block: Shards whose candidates are interleaved, at least (small shards: more,
            until a block fills the pool).
        pool_batches: Lane batches of candidates that wait in the pool, at most.
        lookahead: Batches composed ahead of the one that is asked for; feedback is late by this.
        probe_every: Optimizer steps between two refreshes.
        probe_fraction: Fraction of the offered candidates that the probe reads, in [0, 0.15]; in
            [0, 1] for policies that are meant to measure every candidate.
        sketch_dim: Length of a gradient sketch, a power of two.
        metric_dim: Dimensions of the learned metric space, in which batches are made diverse.
        warmup_losses: Losses that must have been seen before a batch is composed by them; until
            then batches are drawn uniformly at the same `keep`.
        decay: Factor on the old statistics at every refresh, in (0, 1].
        temperature: Utilities are divided by this before the Gumbel noise is added.
        rank_weight: Weight of the rank of the length-residual loss inside the stratum, or of what
            it is above a reference model's where the embeddings have `reference_loss`. None: 0.1,
            more loses to uniform batches on clean data; with a reference 2, which tells what can be
            learnt from what is noise.
        rank_cap: Ranks above this count as this: the very highest losses are mostly noise.
        copy_weight: Weight of being a near-copy of what was trained on lately and is learnt.
        mismatch_weight: Weight of the probability that the target belongs to another prompt.
        curvature: Weight of shared gradient directions inside a batch, relative to the scores.
        diversity: Weight of the distance to the nearest neighbour, relative to the scores.
        shortlist: Candidates examined per slot when a batch is composed.
        recent_per_stratum: Samples of a stratum trained on last that distances look at.
        on_bad_shard: Whether a shard that cannot be read raises, or is withdrawn and counted.
    """

    keep: float | Literal["auto"] = 0.7
    keep_min: float = 0.5
    policy: str = "slap"
    seed: int = 0
    num_lanes: int | None = None
    num_clusters: int = 16
    shards_per_block: int = 8
    pool_batches: int = 16
    lookahead: int = 8
    probe_every: int = 16
    probe_fraction: float = 0.1
    sketch_dim: int = 512
    metric_dim: int = 64
    warmup_losses: int = 256
    decay: float = 0.9
    temperature: float = 0.25
    rank_weight: float | None = None
    rank_cap: float = 0.9
    copy_weight: float = 2.0
    mismatch_weight: float = 2.0
    curvature: float = 0.25
    diversity: float = 0.25
    shortlist: int = 2
    recent_per_stratum: int = 256
    on_bad_shard: OnBadShard = "raise"

    def __post_init__(self) -> None:
        given = () if self.rank_weight is None else ("rank_weight",)
        for name in (*_FLOATS, *given):
            if not _is_finite(getattr(self, name)):
                raise ConfigError(f"{name} must be a finite number, got {getattr(self, name)!r}.")
        if self.keep != "auto" and not (_is_finite(self.keep) and 0.0 < self.keep <= 1.0):
            raise ConfigError(
                f'keep must be in (0, 1] or "auto", got {self.keep!r}; it is the fraction of '
                "candidates that is trained on."
            )
        if not isinstance(self.policy, str) or not self.policy:
            raise ConfigError(
                f'policy must be the name of a policy, got {self.policy!r}; such as "slap".'
            )
        if self.on_bad_shard not in get_args(OnBadShard):
            raise ConfigError(
                f"on_bad_shard must be one of {', '.join(get_args(OnBadShard))}, got "
                f"{self.on_bad_shard!r}."
            )
        if self.num_lanes is not None:
            self._require_int("num_lanes", 1)
        self._require_int("seed", 0)
        if self.seed >= 2**63:
            raise ConfigError(f"seed must be below 2**63, got {self.seed!r}.")
        self._require_int("lookahead", 0)
        for name in (
            "num_clusters",
            "shards_per_block",
            "pool_batches",
            "probe_every",
            "metric_dim",
            "warmup_losses",
            "shortlist",
            "recent_per_stratum",
        ):
            self._require_int(name, 1)
        self._require_int("sketch_dim", 16)
        if self.sketch_dim & (self.sketch_dim - 1):
            raise ConfigError(
                f"sketch_dim must be a power of two, got {self.sketch_dim!r}; try 512."
            )
        if self.pool_batches < 2:
            raise ConfigError(
                f"pool_batches must be at least 2, got {self.pool_batches!r}; with fewer there is "
                "nothing to choose from."
            )
        if not 0.0 <= self.probe_fraction <= 1.0:
            raise ConfigError(f"probe_fraction must be in [0, 1], got {self.probe_fraction!r}.")
        for name in ("keep_min", "decay", "rank_cap"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must be in (0, 1], got {getattr(self, name)!r}.")
        if not self.temperature > 0.0:
            raise ConfigError(
                f"temperature must be positive, got {self.temperature!r}; a small one, such as "
                "0.01, all but removes the noise."
            )
        for name in (*_WEIGHTS, *given):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(
                    f"{name} must not be negative, got {getattr(self, name)!r}; 0 switches it off."
                )

    def _require_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number >= {least}, got {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of the settings, for checkpoints."""
        return asdict(self)

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """Settings in which a saved config differs, as `name: saved -> current`."""
        return [
            f"{f.name}: {saved.get(f.name)!r} -> {getattr(self, f.name)!r}"
            for f in fields(self)
            if saved.get(f.name) != getattr(self, f.name)
        ]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
