"""Sizes, arms, and the list of runs of a preset."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from slap_stream import SlapConfig


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
        heldout_per_task, heldout_of: Test records of a task, and of single tasks.
        conditions, arms: Names.
        generated: Tasks of which what the model writes is scored too.
        seeds: How many.
        model: Folder of a pretrained model, which is fine-tuned instead of the small one.
        lora: Whether low-rank adapters are trained instead of all weights.
        ranked: Tasks of which the likeliest of a few answers is scored.
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
    heldout_of: Mapping[str, int] = field(default_factory=dict)
    pretraining_per_task: int = 3_000
    pretraining_steps: int = 400
    pretraining_rate: float = 3e-3
    learning_rate: Mapping[float, float] = field(default_factory=lambda: {1.0: 1e-3, 0.7: 1e-3})
    shard_bytes: int = 100_000
    device: str = "cpu"
    conditions: tuple[str, ...] = ("balanced", "imbalanced+copies+shuffled")
    arms: tuple[str, ...] = (
        *("full", "uniform", "rs2", "infobatch", "max_loss", "slap_paper"),
        *("slap", "slap_auto", "oracle", "uniform_as_auto"),
    )
    # Models of this size solve no maths problem: the share of exact answers would be zero.
    generated: tuple[str, ...] = ("tatoeba",)
    seeds: int = 5
    model: Path | None = None
    lora: bool = False
    ranked: tuple[str, ...] = ()

    def rate_for(self, keep: float) -> float:
        """The learning rate tuned on uniform batches at the nearest keep."""
        return self.learning_rate[min(self.learning_rate, key=lambda known: abs(known - keep))]

    def of_model(self, model: Path, lora: bool) -> Preset:
        """The same for a pretrained model, after which it is named."""
        name = f"{self.name}-{model.name}{'-lora' if lora else ''}"
        return replace(self, name=name, model=model, lora=lora)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the forward runs in."""
        if self.device == "cpu" and self.model is None:
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
        knows: Kinds of samples that are told to it as dispensable, for certain: the oracles.
        keeps_as: Arm that must have run before, on as many samples of which this one trains.
        target: Whether a target set of clean records is shown to it.
        aim: Task that it is to become good at: examples of it are known before.
        visits: Share of full data's steps that it makes, whatever it keeps; None: as many as that
            gives.
        reference: Whether it is told the losses of a reference model.
        judged: Whether the base model has read the corpus before (`slap-embed --judge-model`).
        choice: Of `subsets.CHOICES`; what is trained on was chosen before.
        share: What a choice with a budget keeps.
        equal_steps: Whether it makes as many steps as full data: it goes round what it keeps until
            then, and its learning rate decays over them.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    probe: bool = True
    knows: tuple[str, ...] = ()
    keeps_as: str | None = None
    target: bool = False
    aim: str | None = None
    visits: float | None = None
    reference: bool = False
    judged: bool = False
    choice: str | None = None
    share: float = 0.7
    equal_steps: bool = False


# A batch is chosen from exactly what was measured since the last one, and every candidate is.
MEASURED = {"probe_fraction": 1.0, "probe_every": 1, "pool_batches": 2, "lookahead": 0}


# Tasks that arms are aimed at, and the share of full data's steps that these arms have.
AIMS, AIMED_AT = ("sgd", "gsm8k", "tatoeba"), 0.4
_ALL_OF_IT: Any = {"config": {"policy": "uniform", "keep": 1.0}, "probe": False}


def arms() -> dict[str, Arm]:
    """All arms by name."""
    without: dict[str, dict[str, Any]] = {
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
        Arm(
            name="uniform_as_auto",
            config={"policy": "uniform"},
            probe=False,
            keeps_as="slap_auto",
        ),
        Arm(name="subset", config={"policy": "subset"}, probe=False),
        Arm(name="rs2", config={"policy": "rs2"}, probe=False),
        Arm(name="infobatch", config={"policy": "infobatch"}),
        Arm(name="k_centre", config={"policy": "k_centre"}, probe=False),
        Arm(name="max_loss", config={"policy": "max_loss"}),
        Arm(name="slap_paper", config={"policy": "slap_paper"}),
        # As their sources have it: every candidate is measured, and that is paid for.
        *(
            Arm(
                name=name,
                config={"policy": policy, **MEASURED},
                target=policy == "greats",
                reference=policy == "rho_loss",
            )
            for name, policy in (
                *((policy, policy) for policy in ("rho_loss", "greats", "divbs", "uds")),
                ("max_loss_measured", "max_loss"),
            )
        ),
        Arm(name="slap"),
        Arm(name="slap_auto", config={"keep": "auto"}),
        Arm(name="slap_full_steps", config={"steps": "full"}),
        Arm(name="slap_auto_full_steps", config={"keep": "auto", "steps": "full"}),
        Arm(name="slap_judge", judged=True),
        Arm(name="slap_judge_auto", config={"keep": "auto"}, judged=True),
        # Ranks by the loss beyond the reference model's: it tells noise from what can be learnt.
        Arm(name="slap_reference", reference=True),
        Arm(name="oracle", config={"rank_weight": 0.0}, knows=("copy", "shuffled")),
        Arm(name="oracle_shuffled", config={"rank_weight": 0.0}, knows=("shuffled",)),
        *(Arm(name=f"slap-{term}", config=config) for term, config in without.items()),
        # Chosen once, before the training, and then everything that is left.
        *(
            Arm(name=name, config={"policy": "uniform", "keep": 1.0}, probe=False, choice=choice)
            for name, choice in (
                ("dedupe", "minhash"),
                ("dedupe_embedding", "embedding"),
                ("removal", "truth"),
                ("longest", "longest"),
                ("top_ifd", "top_ifd"),
            )
        ),
    ]
    for task in AIMS:
        known += [
            Arm(name=f"slap_target_{task}", aim=task),
            # As much of what is nearest as the budget holds; and all that is of the task, gone
            # through as often as the others go through theirs, or until the budget is spent.
            Arm(name=f"nearest_{task}", choice="nearest", share=AIMED_AT, aim=task, **_ALL_OF_IT),
            Arm(name=f"only_{task}", choice="of_task", aim=task, **_ALL_OF_IT),
            Arm(
                name=f"only_{task}_budget",
                choice="of_task",
                aim=task,
                visits=AIMED_AT,
                **_ALL_OF_IT,
            ),
        ]
    # The steps that are saved are spent on what is kept.
    spent = (
        *("uniform", "dedupe", "dedupe_embedding", "removal", "longest"),
        *("slap", "slap_auto", "slap_judge", "slap_judge_auto"),
    )
    known += [
        replace(arm, name=f"{arm.name}_equal", equal_steps=True)
        for arm in known
        if arm.name in spent
    ]
    return {arm.name: arm for arm in known}


def config_of(arm: Arm, keep: float | str, seed: int) -> SlapConfig:
    """Settings of one run of an arm.

    Raises:
        ConfigError: If one is out of range.
    """
    return SlapConfig.from_dict({"keep": keep, "seed": seed} | dict(arm.config))


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
    preset.name: preset
    for preset in (
        # About 90 minutes on two cores.
        Preset(name="small"),
        # What pruning costs a model that has seen everything often: three times as many epochs.
        Preset(
            name="long",
            epochs=6,
            conditions=("t0_50k", "balanced"),
            arms=("full", "uniform", "slap", "slap_auto"),
            seeds=3,
        ),
        # Four sources, of which one is what the model is to become good at; a model so small that
        # a run takes some 20 seconds.
        Preset(
            name="target",
            hidden=64,
            layers=2,
            vocabulary=1_024,
            max_tokens=96,
            micro_batches=2,
            evaluations=1,
            heldout_per_task=100,
            pretraining_per_task=1_500,
            pretraining_steps=300,
            learning_rate={1.0: 2e-3, 0.7: 2e-3},
            generated=(),
            conditions=("balanced",),
            arms=(
                "uniform",
                *(
                    name
                    for task in AIMS
                    for name in (
                        *(f"slap_target_{task}", f"nearest_{task}", f"only_{task}"),
                        f"only_{task}_budget",
                    )
                ),
            ),
            seeds=3,
        ),
        # Five times the parameters: does it carry over?
        Preset(
            name="medium",
            hidden=256,
            layers=4,
            vocabulary=4_096,
            conditions=("imbalanced+copies+shuffled",),
            arms=("full", "uniform", "slap", "slap_auto"),
            seeds=3,
        ),
        # Every task, condition and arm; days on two cores, in pieces.
        Preset(
            name="full",
            size=6_000,
            conditions=(
                *("t0_50k", "sgd", "tatoeba", "gsm8k", "questions", "balanced", "imbalanced"),
                *(f"{mixture}+{dirt}" for mixture in ("balanced", "imbalanced")
                  for dirt in ("copies", "shuffled", "copies+shuffled")),
            ),
            arms=tuple(arms()),
            seeds=10,
        ),
        # A pretrained model, given by --model, in bf16. A full arm is some 230,000 tokens, of which
        # 80,000 go through the head.
        Preset(
            name="real",
            size=1_200,
            max_tokens=192,
            evaluations=1,
            heldout_per_task=60,
            # The loss of a record is that of a word or two: it scatters most.
            heldout_of={"t0_50k": 200},
            learning_rate={1.0: 2e-4, 0.7: 2e-4},
            conditions=("five+mixed30",),
            arms=("full", "uniform", "dedupe", "removal", "removal_equal", "slap", "slap_auto"),
            generated=(),
            ranked=("t0_50k",),
            seeds=5,
        ),
        # 34 million parameters in bf16; several jobs side by side on one large GPU.
        Preset(
            name="gpu",
            size=9_000,
            hidden=512,
            layers=8,
            vocabulary=8_192,
            batch_size=32,
            micro_batches=1,
            pretraining_steps=1_500,
            pretraining_rate=1e-3,
            learning_rate={1.0: 3e-4, 0.7: 3e-4},
            shard_bytes=400_000,
            device="cuda",
            generated=("tatoeba", "gsm8k"),
            seeds=3,
        ),
    )
}  # fmt: skip
