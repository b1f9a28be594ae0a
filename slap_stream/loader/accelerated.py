"""A loader that Accelerate has prepared: what it does then, and what it must not let be done."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from typing import Any, TypeVar

# What Accelerate sets on all that it has prepared, and leaves as it is where it finds it.
_MARK = "_is_accelerate_prepared"
# What it calls the argument, and the attribute of its own that stands in for it.
_PLACEMENT = "device_placement"
_Loader = TypeVar("_Loader")


def never_divided(kind: type[_Loader]) -> type[_Loader]:
    """Class decorator: `Accelerator.prepare` hands loaders of the class back as they are.

    It would deal out the batches of each rank over the ranks once more, and leave out their ids.
    """
    setattr(kind, _MARK, _Mark())
    return kind


class _Mark:
    """True: a loader is prepared. Whoever asks is about to say where its batches are to be.

    Accelerate says that to the loaders that it makes, and to nobody else: not to a loader that it
    leaves as it is, and an `Accelerator` is found nowhere. So the arguments of the public
    `Accelerator.prepare_data_loader` are read where it asks.
    """

    def __get__(self, loader: Any, kind: type) -> bool:
        frame = inspect.currentframe()
        asking = frame.f_back.f_locals if frame is not None and frame.f_back is not None else {}
        accelerator = asking.get("self")
        if loader is not None and _PLACEMENT in asking and hasattr(accelerator, _PLACEMENT):
            asked = asking[_PLACEMENT]
            places = getattr(accelerator, _PLACEMENT) if asked is None else asked
            vars(loader)[_PLACEMENT] = bool(places)
        return True

    def __set__(self, loader: Any, value: bool) -> None:
        vars(loader)[_MARK] = value


class Accelerated:
    """What Accelerate's own loaders do for a training loop besides dividing.

    Batches are moved to its device, unless it is to place nothing, and it is told which is an
    epoch's last: its `accumulate` then steps on a shorter group of batches.

    Args:
        ids_name: Of the ids in a batch, which stay on the CPU, where they go back to.

    Attributes:
        end_of_dataloader: Whether the batch at hand is the epoch's last; Accelerate asks for it.
        remainder: Samples of the last batch, where it was filled up; Accelerate asks for it. Ours
            are whole, which is -1.
    """

    def __init__(self, ids_name: str) -> None:
        # Not before it is known that it is installed.
        from accelerate.state import (
            GradientState,
            PartialState,
        )

        self._gradients: Any = GradientState()
        self._device = PartialState().device
        self._ids_name, self._places = ids_name, True
        self._begun = False
        self.end_of_dataloader, self.remainder = False, -1

    @staticmethod
    def is_due(loader: object) -> bool:
        """Whether Accelerate has prepared the loader."""
        return _MARK in vars(loader)

    def begin(self, loader: object) -> None:
        """An iteration of a loader begins, and ends another that was broken off."""
        self._places = vars(loader).get(_PLACEMENT, True)
        self.end()
        self.end_of_dataloader = False
        self._gradients._add_dataloader(self)
        self._begun = True

    def hand_over(self, batch: Any, is_last: bool) -> Any:
        """The batch on Accelerate's device, unless batches are to stay where they are."""
        from accelerate.utils import send_to_device

        self.end_of_dataloader = is_last
        if not self._places:
            return batch
        if not isinstance(batch, MutableMapping):
            return send_to_device(batch, self._device)
        # Not by `skip_keys`, which is not heeded where a batch moves itself (transformers').
        ids = batch.pop(self._ids_name)
        moved = send_to_device(batch, self._device)
        moved[self._ids_name] = ids
        return moved

    def end(self) -> None:
        """The epoch has no more batches."""
        if self._begun:
            self._begun = False
            self._gradients._remove_dataloader(self)
