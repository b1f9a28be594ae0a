"""What happens at moments that a Trainer tells its callbacks of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from slap_stream.integrations.trainer_loader import TrainerLoader

METRICS_PREFIX = "slap/"


class Companion(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """What has to happen at moments that only callbacks are told of."""

    def __init__(self, begin: Callable[[TrainerLoader], None], step: Callable[[], None]) -> None:
        """
        Args:
            begin: Takes up a training, whose optimizer has been made and loaded, with its loader.
            step: Follows an optimizer step, before it is logged and saved.
        """
        self._begin, self._step = begin, step

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **others: Any
    ) -> None:
        """The optimizer has been made and loaded."""
        self._begin(train_dataloader)

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **others: Any
    ) -> None:
        """An optimizer step has been taken; it is logged and saved after this."""
        self._step()
        # The Trainer counts from where it resumed.
        state.epoch = train_dataloader.epochs_done

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **others: Any
    ) -> None:
        """The Trainer infers the epoch from the steps: wrong after one that ended early."""
        by_epochs = args.max_steps <= 0
        if by_epochs and train_dataloader.epoch >= math.ceil(args.num_train_epochs):
            control.should_training_stop = True

    def on_train_end(
        self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **others: Any
    ) -> None:
        """No more shards are needed; a new training has a loader of its own."""
        train_dataloader.close()


class HideMetrics(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Takes the loader's metrics out of what the callbacks after it are told."""

    def __init__(self) -> None:
        self.hidden: dict[str, float] = {}

    def on_log(
        self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **others: Any
    ) -> None:
        """Every callback is handed the same dict."""
        names = [name for name in logs if name.startswith(METRICS_PREFIX)]
        self.hidden = {name: logs.pop(name) for name in names}


class ShowMetrics(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Puts back what was hidden."""

    def __init__(self, quiet: HideMetrics) -> None:
        self._quiet = quiet

    def on_log(
        self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **others: Any
    ) -> None:
        """Every callback is handed the same dict."""
        logs.update(self._quiet.hidden)
