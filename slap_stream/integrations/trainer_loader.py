"""What a Trainer draws its batches from: a loader whose length is what a Trainer counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from slap_stream.errors import ConfigError
from slap_stream.loader.loader import SlapDataLoader


class TrainerLoader(SlapDataLoader):
    """Its length is what the Trainer counts at the start of an epoch: the batches still to come.

    After a resume in mid-epoch that is less than an epoch. The Trainer would otherwise wait for
    batches that do not come, and never step on an epoch's last, shorter group of them.
    """

    # It lies in the Trainer's output_dir, which nobody has named for it.
    needs_log = False

    @property
    def steps(self) -> int:
        """Batches of a whole epoch; the most there can be, where their number is not known."""
        return len(self.sampler)

    @property
    def delivered(self) -> int:
        """Batches delivered in the epoch of the next batch."""
        finished = self.progress == 1.0
        return 0 if finished else int(self.metrics()["step"])

    def has_done(self, epochs: float) -> bool:
        """Whether as many epochs were delivered; the Trainer infers that from the steps.

        Wrong where an epoch ended early. Of a part of an epoch it is right where the number of
        steps is known.
        """
        if not self.config.steps_are_known:
            return self.epochs_done >= epochs
        return self.epoch >= math.ceil(epochs)

    def __len__(self) -> int:
        return self.steps - self.delivered


class ModelColumns:
    """Hands a collator the columns that the model takes, and none besides."""

    def __init__(self, collate: Callable[[list[Any]], Any], columns: list[str]) -> None:
        self._collate = collate
        self._columns = frozenset(columns)

    def __call__(self, samples: list[dict[str, Any]]) -> Any:
        kept = [
            {name: value for name, value in sample.items() if name in self._columns}
            for sample in samples
        ]
        if not kept[0]:
            raise ConfigError(
                "remove_unused_columns must be False where the collator makes the model's inputs "
                f"of other columns, got samples with only {sorted(samples[0])}; the model takes "
                "none of them."
            )
        return self._collate(kept)
