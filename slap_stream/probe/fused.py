"""Losses of a training forward whose output has no logits, because its loss is fused.

Fused losses (Liger's kernels, for one) multiply hidden states by the head's weight piece by piece
and keep no logits. What entered the head is caught where it left the body, and the head then works
on the supervised tokens alone, a block of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slap_stream.errors import HeadError
from slap_stream.probe.head import (
    find_body,
    find_head,
    head_weight,
    is_compiled,
    unwrap,
)
from slap_stream.probe.readout import CausalReader


class FusedLosses(CausalReader):
    """Each sample's loss, from what a model's body made in a forward of somebody else's."""

    def __init__(self, model: nn.Module, head: nn.Module | None = None) -> None:
        """
        Args:
            model: As for `LearnabilityProbe`.
            head: As for `LearnabilityProbe`.

        Raises:
            HeadError: If the head cannot be found.
        """
        inner = unwrap(model)
        super().__init__(inner, find_head(inner, head))

    def of(self, hidden: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of each sample over its supervised tokens, without gradient.

        Args:
            hidden: What left the body, (batch, tokens, hidden).
            labels: (batch, tokens) int64.
            positions: Of a batch without padding, as `packed_positions` gives them.

        Returns:
            (batch,) float32, as of `per_sample_loss`.

        Raises:
            HeadError: If the shapes do not belong together, or the head's weight is elsewhere.
        """
        weight = head_weight(self._head)
        # Sharded by FSDP, or emptied by DeepSpeed until its module is called, which it never is.
        if weight is not None and (isinstance(weight, DTensor) or not weight.numel()):
            raise HeadError(
                "the head's weight must be whole after a forward that does not call it, got a "
                "sharded one; switch fused losses (use_liger_kernel) off, or the sharding of "
                "weights."
            )
        with torch.no_grad():
            return self._read_tokens(hidden, labels, positions, None)[:, 0]


@contextmanager
def body_outputs(model: nn.Module) -> Iterator[list[Any]]:
    """Inside: what leaves the model's body in forwards with gradients goes to the list, as it is.

    Nothing is read of it here, in the forward of a model whose body may return what it likes:
    `hidden_of` does that, for whoever needs the states.

    Of a model that torch.compile wraps nothing does: a hook on a part of it would be compiled with
    it, and called no more or for ever.
    """
    caught: list[Any] = []

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            caught.append(output)

    body = None if is_compiled(model) else find_body(unwrap(model))
    handle = None if body is None else body.register_forward_hook(leave)
    try:
        yield caught
    finally:
        if handle is not None:
            handle.remove()
