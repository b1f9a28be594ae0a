"""A bar that shows how far an epoch is, what was kept and pruned, and the loss."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from slap_stream.types import FloatArray

logger = logging.getLogger(__name__)

# Weight of the latest batch in the loss that is shown.
_LATEST = 0.1


class ProgressBar:
    """Tqdm's bar, on a terminal or in a notebook; elsewhere nothing is shown.

    It counts candidates, of which an epoch has a known number whatever is kept: batches it has
    fewer than planned where `keep="auto"` finds that much can go. A bar that cannot be drawn (its
    terminal is gone) is given up with a warning; it is not worth a training.

    Where an epoch has as many steps as full data, and offers candidates again until then, it counts
    samples: how many of them are there is known, and not how many are offered.

    Holds the bar of the epoch, samples trained on in it, and the mean loss lately.

    Args:
        candidates: Of an epoch, over all ranks.
        ranks: Ranks that train on as many samples as this one.
        by_steps: Whether an epoch ends after as many steps as full data has.
    """

    def __init__(self, candidates: int, ranks: int, *, by_steps: bool = False) -> None:
        self._candidates, self._ranks, self._by_steps = candidates, ranks, by_steps
        self._bar: Any = None
        self._epoch, self._trained = -1, 0
        self._loss: float | None = None
        self._failed = False

    def begin(self, epoch: int, trained: int, progress: float) -> None:
        """An iteration begins: of a new epoch, or of the rest of one.

        Args:
            epoch: Which, counted from 0.
            trained: Samples of this rank that were delivered in it.
            progress: Share of it that is done, in [0, 1].
        """
        self._guarded(lambda: self._begin(epoch, trained * self._ranks, progress))

    def _begin(self, epoch: int, trained: int, progress: float) -> None:
        done = round(progress * self._candidates)
        if self._bar is not None and (epoch, done) == (self._epoch, self._bar.n):
            # What was done since the loop was left (an evaluation, say) took no time of the epoch.
            self._bar.unpause()
            return
        self._close()
        # Not on top: it takes a while to load, and who shows no bar has no use for it.
        from tqdm.auto import tqdm

        self._epoch, self._trained = epoch, trained
        self._bar = tqdm(
            total=self._candidates,
            initial=done,
            desc=f"epoch {epoch}",
            unit=" samples" if self._by_steps else " candidates",
            dynamic_ncols=True,
            # Where there is neither terminal nor notebook.
            disable=None,
        )

    def count(self, samples: int, progress: float) -> None:
        """Samples of this rank were delivered, after which so much of the epoch is done."""
        self._guarded(lambda: self._count(samples * self._ranks, progress))

    def _count(self, samples: int, progress: float) -> None:
        if self._bar is None:
            return
        self._trained += samples
        done = round(progress * self._candidates)
        told: dict[str, str | int] = {}
        if not self._by_steps:
            told = {"kept": f"{self._trained / max(1, done):.0%}", "pruned": done - self._trained}
        if self._loss is not None:
            told["loss"] = f"{self._loss:.3f}"
        self._bar.set_postfix(told, refresh=False)
        self._bar.update(done - self._bar.n)
        if progress >= 1.0:
            self._bar.refresh()

    def observed(self, losses: FloatArray) -> None:
        """Losses of a batch have come back; another thread may say so."""
        finite = losses[np.isfinite(losses)]
        if len(finite):
            mean = float(finite.mean())
            before = mean if self._loss is None else self._loss
            self._loss = before + _LATEST * (mean - before)

    def close(self) -> None:
        """Leave the bar as it is; the next iteration begins another."""
        self._guarded(self._close)

    def _close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def _guarded(self, draw: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            draw()
        except Exception as error:
            bar, self._failed, self._bar = self._bar, True, None
            if bar is not None:
                # Or it would draw once more when it is collected.
                bar.disable = True
            logger.warning("the progress bar is not drawn any more: %r", error)
