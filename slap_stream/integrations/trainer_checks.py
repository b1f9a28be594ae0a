"""Refusals of a SlapTrainer before any work is done: arguments and data that do not fit."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from slap_stream.config import SlapConfig
from slap_stream.errors import ConfigError
from slap_stream.selection.policies.registry import make_policy
from slap_stream.shards.settings import dataset_shards


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what cannot be honoured, by name."""
    if args.n_gpu > 1:
        raise ConfigError(
            f"SlapTrainer must have one device in each process, got {args.n_gpu}; start one "
            "process for each (torchrun --nproc-per-node), or show this one a single device "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
    refused = {
        "group_by_length": "the sampler composes the batches",
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
        "train_sampling_strategy": ("random", "the sampler composes the batches"),
        "dataloader_in_order": (True, "a state says which batches were delivered: all up to one"),
    }
    for name, (usual, cure) in wanted.items():
        if getattr(args, name, usual) != usual:
            raise ConfigError(f"{name} must be {usual!r}, got {getattr(args, name)!r}; {cure}.")


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
