"""What is run: sizes, arms, and the list of runs of a preset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from slap_stream.tools.selection.tasks import Condition


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Sizes of a benchmark, and what it runs unless told otherwise.

    Attributes:
        name: Name.
        size: Clean training records.
        epochs: Epochs.
        hidden, layers, vocabulary: Of the model.
        max_tokens: Tokens kept of a record.
        batch_size: Samples of a batch.
        learning_rate: By keep: that of the nearest keep is used.
        conditions, arms: Names.
        seeds: How many.
    """

    name: str
    size: int = 3_000
    epochs: int = 2
    hidden: int = 128
    layers: int = 3
    vocabulary: int = 2_048
    max_tokens: int = 160
    batch_size: int = 16
    micro_batches: int = 4
    evaluations: int = 6
    heldout_per_task: int = 150
    pretraining_per_task: int = 3_000
    pretraining_steps: int = 400
    pretraining_rate: float = 3e-3
    learning_rate: Mapping[float, float] = field(default_factory=lambda: {1.0: 2e-3, 0.7: 2e-3})
    shard_bytes: int = 100_000
    device: str = "cpu"
    conditions: tuple[str, ...] = ("balanced", "imbalanced+copies+shuffled")
    arms: tuple[str, ...] = ("full", "uniform", "max_loss", "slap_paper", "slap", "slap_auto")
    seeds: int = 5

    def rate_for(self, keep: float) -> float:
        """The learning rate tuned on uniform batches at the nearest keep."""
        return self.learning_rate[min(self.learning_rate, key=lambda known: abs(known - keep))]

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the forward runs in."""
        if self.device == "cpu":
            return nullcontext()
        return torch.autocast(self.device, dtype=torch.bfloat16)


def rate(progress: float) -> float:
    """Share of the learning rate at a share of the run: short warm-up, cosine down to zero."""
    warmup = 0.05
    if progress < warmup:
        return (progress + 0.002) / (warmup + 0.002)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way of choosing batches.

    Attributes:
        name: Name.
        config: Settings of `SlapConfig` in which it differs from the default.
        probe: Whether the probe runs.
        knows: Whether what is dispensable is told to it: the oracle.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    probe: bool = True
    knows: bool = False


def arms() -> dict[str, Arm]:
    """All arms by name."""
    without = {
        "rank": {"rank_weight": 0.0},
        "copies": {"copy_weight": 0.0},
        "mismatch": {"mismatch_weight": 0.0},
        "curvature": {"curvature": 0.0},
        "diversity": {"diversity": 0.0},
        "composition": {"curvature": 0.0, "diversity": 0.0},
        "clusters": {"num_clusters": 1},
    }
    known = [
        Arm(name="full", config={"policy": "uniform", "keep": 1.0}, probe=False),
        Arm(name="uniform", config={"policy": "uniform"}, probe=False),
        Arm(name="max_loss", config={"policy": "max_loss"}),
        Arm(name="slap_paper", config={"policy": "slap_paper"}),
        Arm(name="slap"),
        Arm(name="slap_auto", config={"keep": "auto"}),
        Arm(name="oracle", config={"rank_weight": 0.0}, knows=True),
        *(Arm(name=f"slap-{term}", config=config) for term, config in without.items()),
    ]
    return {arm.name: arm for arm in known}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunKey:
    """What identifies a run; results with the same key are not made again."""

    preset: str
    condition: str
    arm: str
    keep: float | str
    seed: int
    learning_rate: float
    overrides: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


PRESETS = {
    "small": Preset(name="small"),
}


def conditions_of(preset: Preset) -> list[Condition]:
    """The preset's conditions."""
    return [Condition.of(name) for name in preset.conditions]
