"""Refusals of a SlapTrainer before any work is done: arguments and data that do not fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import TrainingArguments

from slap_stream.config import SlapConfig
from slap_stream.errors import ConfigError
from slap_stream.selection.policies.registry import make_policy
from slap_stream.shards.settings import dataset_shards

logger = logging.getLogger(__name__)

_BY_LENGTH, _STRATEGY = "group_by_length", "train_sampling_strategy"


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what cannot be honoured, by name."""
    if args.n_gpu > 1:
        raise ConfigError(
            f"SlapTrainer must have one device in each process, got {args.n_gpu}; start one "
            "process for each (torchrun --nproc-per-node), or show this one a single device "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
    refused = {
        "auto_find_batch_size": "the batch size is fixed for a run; find it beforehand",
        "include_tokens_per_second": "it would read an epoch in advance; use "
        "include_num_input_tokens_seen",
        "fsdp": "probe and optimizer must see the same weights; with fully_shard in a loop of your "
        "own they do (examples/04_torchrun.py)",
        "parallelism_config": "ranks that share a sample must be told apart; give SlapDataLoader "
        "rank and world_size in a loop of your own",
        "deepspeed": "its engine takes over the optimizer step, which the probe follows",
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
            f"policy must not be {config.policy!r} with SlapTrainer, got it; its losses need "
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


def check_dataset(dataset: Any, embeddings: Any, args: TrainingArguments) -> None:
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
