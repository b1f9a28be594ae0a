"""How much of the batches was padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Padding:
    """Counts positions of the batches delivered, and those that were padding.

    Measured, not predicted: from `attention_mask`; a batch of (1, tokens) `input_ids` with
    `position_ids` and no mask holds none. Batches that say nothing of it are not counted.
    """

    def __init__(self) -> None:
        # Replaced as a whole: another thread may read it at any time.
        self._counted = (0, 0)

    def note(self, batch: Mapping[str, Any]) -> None:
        """Count a collated batch."""
        mask, ids = batch.get("attention_mask"), batch.get("input_ids")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            positions, padded = mask.numel(), int((mask == 0).sum())
        elif isinstance(ids, torch.Tensor) and "position_ids" in batch and mask is None:
            positions, padded = ids.numel(), 0
        else:
            return
        self._counted = (self._counted[0] + positions, self._counted[1] + padded)

    def metrics(self) -> dict[str, float]:
        """`padding_share`, of all positions since the loader was made; nothing if none was seen."""
        positions, padded = self._counted
        return {"padding_share": padded / positions} if positions else {}
