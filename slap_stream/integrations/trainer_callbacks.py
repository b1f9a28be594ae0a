"""What happens at moments that a Trainer tells its callbacks of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from transformers import TrainerCallback

from slap_stream.integrations.trainer_loader import TrainerLoader

METRICS_PREFIX = "slap/"


def held_out_losses(logs: Mapping[str, Any]) -> dict[str, float]:
    """What of a Trainer's logs is a loss on an evaluation set, and a number."""
    losses = {name: n for name, n in logs.items() if name.startswith("eval_") and "loss" in name}
    return {name: float(n) for name, n in losses.items() if isinstance(n, Real)}


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
        self._end_with_data(args, state, control, train_dataloader)

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **others: Any
    ) -> None:
        """After the last step a few batches may have come that made no step more."""
        if not control.should_training_stop:
            self._end_with_data(args, state, control, train_dataloader)

    def on_train_end(
        self, args: Any, state: Any, control: Any, *, train_dataloader: Any, **others: Any
    ) -> None:
        """No more shards are needed; a new training has a loader of its own."""
        train_dataloader.close()

    @staticmethod
    def _end_with_data(args: Any, state: Any, control: Any, loader: TrainerLoader) -> None:
        """With the last of the data do what the Trainer does at the last step that it planned."""
        if args.max_steps > 0 or not loader.has_done(args.num_train_epochs):
            return
        control.should_training_stop = True
        if args.save_strategy == "steps":
            control.should_save = True
        if args.eval_strategy == "steps" and args.eval_delay <= state.global_step:
            # If it was due at this step anyway, it has been asked for, or done.
            control.should_evaluate |= state.global_step % state.eval_steps != 0


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
