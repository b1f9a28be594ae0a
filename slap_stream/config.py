"""Every setting of the sampler, validated when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

from slap_stream.errors import ConfigError

OnBadShard = Literal["raise", "skip"]
OnBadSample = Literal["raise", "skip"]
Steps = Literal["fewer", "full"]

# Visits of a sample in an epoch, at most, where an epoch has as many steps as full data.
MAX_VISITS = 4

# Settings of running: they may be others when a run goes on from a checkpoint.
RUNNING = ("lookahead", "length_grouping", "on_bad_shard", "on_bad_sample", "max_withdrawn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Advanced:
    """Settings of the method, which seldom need another value; `SlapConfig(advanced=...)`.

    Attributes:
        num_clusters: Embedding clusters; a stratum is one cluster of one source.
        shards_per_block: Shards whose candidates are interleaved, at least (small shards: more,
            until a block fills the pool; of shards with many samples, parts).
        pool_batches: Lane batches of candidates that wait in the pool, at most.
        sketch_dim: Length of a gradient sketch, a power of two.
        metric_dim: Dimensions of the learned metric space, in which batches are made diverse.
        warmup_losses: Losses that must have been seen before a batch is composed by them; until
            then batches are drawn uniformly at the same `keep`.
        decay: Factor on the old statistics at every refresh, in (0, 1].
        rank_weight: Weight of the rank of the length-residual loss inside the stratum, or of what
            it is above a reference model's where the embeddings have `reference_loss`. None: 0.4,
            more loses to uniform batches on clean data; with a reference 8, which tells what can be
            learnt from what is noise.
        rank_cap: Ranks above this count as this: the very highest losses are mostly noise.
        copy_weight: Weight of being a near-copy of what was trained on lately and is learnt.
        mismatch_weight: Weight of the probability that the target belongs to another prompt.
        target_weight: Utility taken from candidates that are not of the target set's kind.
        curvature: Weight of shared gradient directions inside a batch, relative to the scores.
        diversity: Weight of the distance to the nearest neighbour, relative to the scores.
        shortlist: Candidates examined per slot when a batch is composed.
        recent_per_stratum: Samples of a stratum trained on last that distances look at.
    """

    num_clusters: int = 16
    shards_per_block: int = 8
    pool_batches: int = 16
    sketch_dim: int = 512
    metric_dim: int = 64
    warmup_losses: int = 256
    decay: float = 0.9
    rank_weight: float | None = None
    rank_cap: float = 0.9
    copy_weight: float = 8.0
    mismatch_weight: float = 8.0
    target_weight: float = 8.0
    curvature: float = 0.25
    diversity: float = 0.25
    shortlist: int = 2
    recent_per_stratum: int = 256

    def __post_init__(self) -> None:
        for name in (
            "num_clusters",
            "shards_per_block",
            "pool_batches",
            "metric_dim",
            "warmup_losses",
            "shortlist",
            "recent_per_stratum",
        ):
            _take_whole(self, name, 1)
        _take_whole(self, "sketch_dim", 16)
        if self.sketch_dim & (self.sketch_dim - 1):
            raise ConfigError(
                f"sketch_dim must be a power of two, got {self.sketch_dim!r}; try 512."
            )
        if self.pool_batches < 2:
            raise ConfigError(
                f"pool_batches must be at least 2, got {self.pool_batches!r}; with fewer there is "
                "nothing to choose from."
            )
        for name in ("decay", "rank_cap"):
            _take_fraction(self, name)
        given = () if self.rank_weight is None else ("rank_weight",)
        weights = ("copy_weight", "mismatch_weight", "target_weight")
        for name in (*weights, "curvature", "diversity", *given):
            if _take_number(self, name) < 0.0:
                raise ConfigError(
                    f"{name} must not be negative, got {getattr(self, name)!r}; 0 switches it off."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class SlapConfig:
    """Settings of a run; the defaults are meant to work without tuning.

    The last five before `advanced` are settings of running, which may be others when a run goes
    on from a checkpoint. All others decide which samples come, and stay.

    Attributes:
        keep: Fraction of the candidates that is trained on, in (0, 1]; "auto": what is not shown
            to be dispensable, followed online.
        keep_min: Least fraction that "auto" goes down to, in (0, 1].
        steps: "fewer": an epoch offers every candidate once, and has the fewer steps the less is
            kept. "full": it has as many as full data would; the candidates are offered again, one
            pass after the other, until these are done. A sample is trained on once a pass at most.
        policy: Name of the rule that picks a batch from the pool.
        seed: Seed of every draw.
        num_lanes: Independent composers; None means the world size at the first construction.
            Fixed for a run: it is what the batches depend on, so that the world size is free.
        probe_every: Optimizer steps between two refreshes.
        probe_fraction: Fraction of the offered candidates that the probe reads, in [0, 0.15]; in
            [0, 1] for policies that are meant to measure every candidate.
        lookahead: Batches composed ahead of the one that is asked for; feedback is late by this.
        length_grouping: Batches of one optimizer step (gradient accumulation), among which the
            loader deals samples by length, the longest first, so that less is padding; 1: they stay
            where they were composed. What an optimizer step trains on stays the same.
        on_bad_shard: Whether a damaged shard raises, or is withdrawn and counted. A shard that
            cannot be fetched raises in any case.
        on_bad_sample: Whether a sample that cannot be read or collated is withdrawn and counted,
            or raises. A shard is storage, which can be mended; a record is as it is, and hours of
            training are worth more.
        max_withdrawn: Fraction of the dataset's candidates, in [0, 1], that a process may withdraw
            with damaged shards, and of an epoch's as samples; beyond it, the run stops.
        advanced: Settings of the method.
    """

    keep: float | Literal["auto"] = 0.7
    keep_min: float = 0.5
    steps: Steps = "fewer"
    policy: str = "slap"
    seed: int = 0
    num_lanes: int | None = None
    probe_every: int = 16
    probe_fraction: float = 0.1
    lookahead: int = 8
    length_grouping: int = 1
    on_bad_shard: OnBadShard = "raise"
    on_bad_sample: OnBadSample = "skip"
    max_withdrawn: float = 0.01
    advanced: Advanced = field(default_factory=Advanced)

    def __new__(cls, **settings: Any) -> SlapConfig:
        misplaced = [name for name in settings if name in Advanced.__slots__]
        if misplaced:
            raise TypeError(
                f"{misplaced[0]} must be given to Advanced, got it for SlapConfig; write "
                f"SlapConfig(advanced=Advanced({misplaced[0]}={settings[misplaced[0]]!r}))."
            )
        # Not super(): with slots the decorator makes another class of this one.
        return object.__new__(cls)

    def __post_init__(self) -> None:
        if self.keep != "auto":
            if not _is_finite(self.keep) or not 0.0 < self.keep <= 1.0:
                raise ConfigError(
                    f'keep must be in (0, 1] or "auto", got {self.keep!r}; it is the fraction of '
                    "candidates that is trained on."
                )
            _take_number(self, "keep")
        _take_fraction(self, "keep_min")
        if self.steps == "full" and self.keep_least * MAX_VISITS < 1.0:
            name = "keep_min" if self.keep == "auto" else "keep"
            raise ConfigError(
                f'{name} must be at least {1 / MAX_VISITS} with steps="full", got '
                f"{self.keep_least!r}; else a sample would be trained on more than {MAX_VISITS} "
                "times an epoch."
            )
        if not isinstance(self.policy, str) or not self.policy:
            raise ConfigError(
                f'policy must be the name of a policy, got {self.policy!r}; such as "slap".'
            )
        if self.num_lanes is not None:
            _take_whole(self, "num_lanes", 1)
        _take_whole(self, "seed", 0)
        if self.seed >= 2**63:
            raise ConfigError(f"seed must be below 2**63, got {self.seed!r}.")
        _take_whole(self, "lookahead", 0)
        if self.length_grouping is True:
            raise ConfigError(
                "length_grouping must be a whole number >= 1, got True; it is the batches of an "
                "optimizer step: write length_grouping=8 where 8 of them are accumulated."
            )
        _take_whole(self, "length_grouping", 1)
        _take_whole(self, "probe_every", 1)
        for name in ("probe_fraction", "max_withdrawn"):
            if not 0.0 <= _take_number(self, name) <= 1.0:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)!r}.")
        for name, choices in (
            ("steps", Steps),
            ("on_bad_shard", OnBadShard),
            ("on_bad_sample", OnBadSample),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"{name} must be one of {', '.join(get_args(choices))}, got "
                    f"{getattr(self, name)!r}."
                )
        if not isinstance(self.advanced, Advanced):
            raise ConfigError(
                f"advanced must be an Advanced, got {self.advanced!r}; write "
                "advanced=Advanced(pool_batches=8)."
            )

    @property
    def keep_least(self) -> float:
        """The least fraction that is ever kept."""
        return self.keep_min if self.keep == "auto" else self.keep

    @property
    def steps_are_known(self) -> bool:
        """Whether it is known beforehand how many batches an epoch has."""
        return self.keep != "auto" or self.steps == "full"

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, those of `advanced` among the others: for checkpoints."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "advanced"}
        return own | {f.name: getattr(self.advanced, f.name) for f in fields(Advanced)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SlapConfig:
        """Inverse of `to_dict`; what is not given is as by default."""
        advanced = {f.name for f in fields(Advanced)} & settings.keys()
        return cls(
            **{name: settings[name] for name in settings.keys() - advanced},
            advanced=Advanced(**{name: settings[name] for name in advanced}),
        )

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """Settings in which a saved config differs, as `name: saved -> current`; those of running
        are left out."""
        return [
            f"{name}: {saved.get(name)!r} -> {value!r}"
            for name, value in self.to_dict().items()
            if name not in RUNNING and saved.get(name) != value
        ]


def _is_finite(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _take_number(settings: Advanced | SlapConfig, name: str) -> float:
    """Have a setting be a plain float: NumPy's do not go into JSON."""
    value = getattr(settings, name)
    if not _is_finite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}.")
    object.__setattr__(settings, name, float(value))
    return float(value)


def _take_fraction(settings: Advanced | SlapConfig, name: str) -> None:
    if not 0.0 < _take_number(settings, name) <= 1.0:
        raise ConfigError(f"{name} must be in (0, 1], got {getattr(settings, name)!r}.")


def _take_whole(settings: Advanced | SlapConfig, name: str, least: int) -> None:
    """Have a setting be a plain int, likewise."""
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name} must be a whole number >= {least}, got {value!r}.")
    object.__setattr__(settings, name, int(value))
