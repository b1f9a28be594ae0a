"""Batches without padding: samples that follow each other in one row, positions counted anew.

Such a batch has (1, tokens) `input_ids`, `labels` and `position_ids`, which begin with 0 at every
sample, and no `attention_mask`. What belongs to which sample is read from the positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slap_stream.errors import HeadError
from slap_stream.probe.head import call_inputs, quiet, run_to_head
from slap_stream.types import IGNORED_LABEL


def packed_positions(batch: Any) -> Tensor | None:
    """(1, tokens) positions of a batch without padding; None of one with a row for each sample."""
    if not isinstance(batch, Mapping) or batch.get("attention_mask") is not None:
        return None
    positions = batch.get("position_ids")
    one_row = isinstance(positions, Tensor) and positions.ndim == 2 and len(positions) == 1
    return positions if one_row else None


def sample_bounds(positions: Tensor) -> list[tuple[int, int]]:
    """Half-open ranges of tokens of the samples of (1, tokens) positions, in their order."""
    starts = torch.nonzero(positions[0] == 0)[:, 0].tolist()
    return list(zip(starts, [*starts[1:], positions.shape[1]], strict=True))


def count_samples(batch: Mapping[str, Any]) -> int:
    """Samples of a collated batch."""
    positions = packed_positions(batch)
    if positions is None:
        return len(next(iter(batch.values())))
    return int((positions == 0).sum())


def supervised_targets(labels: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens are predicted, as they lie in the batch and by sample.

    Args:
        labels: (rows, tokens) int64.
        positions: As `packed_positions` gives them.

    Returns:
        (rows, tokens - 1) mask of the targets, and (samples, n) mask of as many true values, in the
        same order, with a row for each sample.

    Raises:
        ValueError: If the positions are not (1, tokens) or do not begin with 0.
    """
    supervised = labels[:, 1:] != IGNORED_LABEL
    if positions is None:
        return supervised, supervised
    positions = positions.to(labels.device)
    if positions.shape != labels.shape or len(labels) != 1 or int(positions[0, 0]) != 0:
        raise ValueError(
            "position_ids must be (1, tokens) as the labels are, and begin with 0 at every sample, "
            f"got {tuple(positions.shape)!r} for labels {tuple(labels.shape)!r}; leave them out "
            "where every sample has a row."
        )
    starts = positions[0] == 0
    # A sample's first token is not predicted from the sample before.
    supervised = supervised & ~starts[1:]
    owner = starts.cumsum(0) - 1  # (tokens,)
    tokens = torch.bincount(owner[1:][supervised[0]], minlength=int(owner[-1]) + 1)
    columns = torch.arange(int(tokens.max()), device=labels.device)
    return supervised, columns < tokens[:, None]


def mean_by_sample(token_losses: Tensor, supervised: Tensor) -> Tensor:
    """(supervised tokens,) and their (samples, n) mask to (samples,) means, 0 where none."""
    dense = token_losses.new_zeros(supervised.shape).masked_scatter(supervised, token_losses)
    return dense.sum(1) / supervised.sum(1).clamp(min=1)


def token_weights(supervised: Tensor) -> Tensor:
    """(samples, n) mask to (samples, supervised tokens) weights of each sample's mean."""
    samples = torch.arange(len(supervised), device=supervised.device)[:, None]
    owner = samples.expand_as(supervised)[supervised]
    return (owner == samples) / supervised.sum(1, keepdim=True).clamp(min=1)


def check_apart(model: nn.Module, head: nn.Module, batch: Any) -> None:
    """Refuse a model that looks across the samples of a batch without padding.

    The first sample's tokens are changed: nothing may change after it. The model is called as the
    batch says: `use_cache`, where it is not in the batch, stays what the model's configuration has.
    Of one sample, or of a batch with a row for each, there is nothing to check.

    Args:
        model: Root module, unwrapped.
        head: Its head.
        batch: A collated batch on the model's device.

    Raises:
        HeadError: If the model does.
    """
    positions = packed_positions(batch)
    if positions is None or len(bounds := sample_bounds(positions)) < 2:
        return
    inputs, end = call_inputs(model, batch), bounds[0][1]
    if "use_cache" not in batch:
        inputs.pop("use_cache", None)
    other = inputs["input_ids"].clone()
    # Another token in each place.
    other[0, :end] = torch.where(other[0, :end] == 0, 1, other[0, :end] - 1)
    entered: list[Tensor] = []
    with torch.no_grad(), quiet(model, other.device):
        for ids in (inputs["input_ids"], other):
            run_to_head(model, head, {**inputs, "input_ids": ids}, entered.append)
    # (tokens, hidden), in whatever layout the head works on
    before, after = (hidden.reshape(-1, hidden.shape[-1])[end:].float() for hidden in entered)
    gap, size = float((before - after).abs().max()), float(before.abs().max())
    # As a rule nothing changes at all; but how experts share their work may depend on all tokens.
    full = entered[0].dtype in (torch.float32, torch.float64)
    full = full and not torch.is_autocast_enabled(other.device.type)
    if not gap <= (1e-6 if full else 1e-2) * size:
        raise HeadError(
            "samples of a batch without padding must not see each other, got hidden states that "
            f"change by {gap:.2g} (of {size:.2g}) with the tokens of the sample before; the model "
            "must divide attention by position_ids: have collate_fn add use_cache=False, try "
            "another attn_implementation (flash_attention_2, sdpa), or pad "
            "(ChatCollator without packing)."
        )
