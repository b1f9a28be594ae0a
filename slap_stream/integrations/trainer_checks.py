"""Refusals of a Trainer before any work is done: arguments and data that do not fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer, TrainerState, TrainingArguments

from slap_stream.config import SlapConfig
from slap_stream.errors import ConfigError
from slap_stream.integrations.trainer_loader import TrainerLoader
from slap_stream.loader.checks import check_batches, check_run
from slap_stream.selection.policies.registry import make_policy
from slap_stream.shards.settings import dataset_shards

logger = logging.getLogger(__name__)

_BY_LENGTH, _STRATEGY = "group_by_length", "train_sampling_strategy"


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what cannot be honoured, by name."""
    if args.n_gpu > 1:
        raise ConfigError(
            f"the trainer must have one device in each process, got {args.n_gpu}; start one "
            "process for each (torchrun --nproc-per-node), or show this one a single device "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
    refused = {
        "auto_find_batch_size": "the batch size is fixed for a run; find it beforehand",
        "include_tokens_per_second": "it would read an epoch in advance; use "
        "include_num_input_tokens_seen",
        "parallelism_config": "ranks that share a sample must be told apart; give SlapDataLoader "
        "rank and world_size in a loop of your own",
    }
    for name, cure in refused.items():
        if getattr(args, name, None):
            raise ConfigError(f"{name} must be off, got {getattr(args, name)!r}; {cure}.")
    # Settings of transformers 5, and what they are where nothing is asked for.
    wanted = {
        "dataloader_in_order": (True, "a state says which batches were delivered: all up to one"),
    }
    for name, (usual, cure) in wanted.items():
        if getattr(args, name, usual) != usual:
            raise ConfigError(f"{name} must be {usual!r}, got {getattr(args, name)!r}; {cure}.")
    strategy = getattr(args, _STRATEGY, "random")
    if strategy not in ("random", _BY_LENGTH):
        raise ConfigError(
            f"{_STRATEGY} must be 'random' or {_BY_LENGTH!r}, got {strategy!r}; the "
            "sampler composes the batches."
        )


def check_sharding(trainer: Trainer, config: SlapConfig) -> None:
    """Refuse ways of sharding the model that cannot be honoured, by name.

    They are settled when the Trainer has been made: a launcher may have asked for them through the
    environment, where the arguments say nothing.
    """
    args, accelerator = trainer.args, trainer.accelerator
    # The oldest versions that are supported may not have the method.
    tensor_parallel = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
    if getattr(accelerator, "parallelism_config", None) is not None or tensor_parallel > 1:
        raise ConfigError(
            "parallelism_config and tp_plan must be off: ranks that share a sample must be told "
            "apart, and a Trainer does not tell; give SlapDataLoader rank and world_size in a loop "
            "of your own (docs/distributed.md)."
        )
    if args.fsdp and (args.fsdp_config or {}).get("xla"):
        raise ConfigError(
            "fsdp_config['xla'] must be False, got True; the probe reads models that torch's own "
            "FSDP2 has sharded."
        )
    if args.fsdp and not trainer.is_fsdp_enabled:
        raise ConfigError(
            f"fsdp must be off where accelerate does not shard, got {args.fsdp!r} and "
            f"{accelerator.distributed_type}; every process would hold the whole model: start them "
            "on accelerators, or shard with fully_shard in a loop of your own "
            "(examples/04_torchrun.py)."
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(accelerator.state.fsdp_plugin)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded and args.torch_compile:
        raise ConfigError(
            "torch_compile must be off with fsdp or deepspeed, got True; what compiled code hands "
            "to the head cannot be caught while its weights are gathered."
        )
    if trainer.is_deepspeed_enabled and not config.steps_are_known:
        asked = accelerator.state.deepspeed_plugin.deepspeed_config
        if "scheduler" in asked:
            raise ConfigError(
                'deepspeed must leave out "scheduler" with keep="auto", got '
                f"{asked['scheduler']!r}; it counts steps, and their number is not known: the "
                'Trainer\'s (lr_scheduler_type) follows the data. Or set steps="full".'
            )


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"fsdp_config['version'] must be 2, got {plugin.fsdp_version!r}; FSDP1 keeps what the "
            "optimizer knows of the head in flat pieces. transformers 4 takes it from the "
            "environment instead: FSDP_VERSION=2, which accelerate launch sets."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError(
            "fsdp_config['cpu_offload'] must be False, got True; the probe takes its device from "
            "the model's parameters: shard over more devices, or use activation_checkpointing."
        )


def check_resumed(args: TrainingArguments, state: TrainerState, loader: TrainerLoader) -> None:
    """Refuse a checkpoint whose steps were of other sizes than those that are to come.

    The Trainer has planned by steps, the last one included, before it was told of the checkpoint.
    """
    if args.max_steps > 0 or loader.has_done(args.num_train_epochs):
        return
    accumulation = args.gradient_accumulation_steps
    whole, begun = (-(-n // accumulation) for n in (loader.steps, loader.delivered))
    planned = loader.epoch * whole + begun
    # Epochs that ended early have taken fewer.
    early = not loader.config.steps_are_known or loader.metrics()["epochs_cut_short"] > 0
    if state.global_step > planned or (state.global_step < planned and not early):
        raise ConfigError(
            "gradient_accumulation_steps must be what the checkpoint was saved with, got "
            f"{accumulation}; it is of step {state.global_step}, after {loader.delivered} of "
            f"{loader.steps} batches of epoch {loader.epoch}: with max_steps a run may go on with "
            "another number."
        )


def check_config(config: Any) -> SlapConfig:
    """The settings of the selection; refuses those that the loss of a Trainer cannot follow."""
    config = config or SlapConfig()
    if not isinstance(config, SlapConfig):
        raise TypeError(
            f"slap_config must be a SlapConfig, got {type(config).__name__}; write "
            "SlapConfig(keep=0.7)."
        )
    if make_policy(config).weighs_losses:
        raise ConfigError(
            f"policy must not be {config.policy!r} with a Trainer, got it; its losses need "
            "weights, and the loss here is the stock Trainer's: use a loop of your own."
        )
    return config


def grouped_by_length(config: SlapConfig, args: TrainingArguments) -> SlapConfig:
    """The settings, with samples dealt by length over an optimizer step if the arguments ask for it
    (`group_by_length`; since transformers 5 a sampling strategy).

    Raises:
        ConfigError: If the settings name another number of batches in a step.
    """
    accumulated = args.gradient_accumulation_steps
    if config.length_grouping not in (1, accumulated):
        raise ConfigError(
            f"length_grouping must be gradient_accumulation_steps, {accumulated}, got "
            f"{config.length_grouping}; leave it out and set {_BY_LENGTH}."
        )
    if not getattr(args, _BY_LENGTH, False) and getattr(args, _STRATEGY, None) != _BY_LENGTH:
        return config
    if accumulated == 1:
        logger.warning(
            "%s changes nothing with gradient_accumulation_steps=1: samples are dealt over the "
            "batches of one optimizer step, and what they are is the sampler's to say.",
            _BY_LENGTH,
        )
    return replace(config, length_grouping=accumulated)


@contextmanager
def ungrouped(args: TrainingArguments) -> Iterator[None]:
    """Inside: the arguments ask for no grouping, which a Trainer refuses to a streamed set, or says
    that it ignores it. Afterwards they do as before, for evaluation sets."""
    usual = {_BY_LENGTH: False, _STRATEGY: "random"}
    asked = {name: getattr(args, name) for name in usual if hasattr(args, name)}
    for name in asked:
        setattr(args, name, usual[name])
    try:
        yield
    finally:
        for name, value in asked.items():
            setattr(args, name, value)


def check_steps(args: TrainingArguments, config: SlapConfig) -> None:
    """Refuse batches that cannot be composed, before anything is made of the training set."""
    check_batches(
        config,
        args.train_batch_size,
        world_size=args.world_size,
        num_workers=args.dataloader_num_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def check_dataset(
    dataset: Any, embeddings: Any, args: TrainingArguments, config: SlapConfig
) -> None:
    """Refuse a training set that cannot be streamed, or that does not fit the arguments."""
    dataset_shards(dataset)
    if embeddings is None:
        raise ConfigError(
            "embeddings must be given with a train_dataset, got None; slap-embed makes them."
        )
    if dataset.batch_size not in (None, args.per_device_train_batch_size):
        raise ConfigError(
            f"per_device_train_batch_size must be the dataset's batch_size, {dataset.batch_size}, "
            f"got {args.per_device_train_batch_size!r}; give both the same."
        )
    check_run(dataset, embeddings, config, args.train_batch_size, world_size=args.world_size)
