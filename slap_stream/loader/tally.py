"""What is counted of the batches that are delivered, and shown of them while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slap_stream.loader.padding import Padding
from slap_stream.loader.progress_bar import ProgressBar
from slap_stream.loader.status_line import StatusLine
from slap_stream.types import FloatArray


class Tally:
    """Padding of the batches, a line of log now and then, and a bar if one is wanted.

    Args:
        bar: The bar; None: none is shown.
    """

    def __init__(self, bar: ProgressBar | None) -> None:
        self._line, self._padding, self._bar = StatusLine(), Padding(), bar

    def begin(self, epoch: int, trained: int, progress: float) -> None:
        """An iteration begins; as for `ProgressBar.begin`."""
        self._line.restart()
        if self._bar is not None:
            self._bar.begin(epoch, trained, progress)

    def count(
        self,
        metrics: Callable[[], dict[str, float]],
        batch: Mapping[str, Any],
        samples: int,
        progress: float,
    ) -> None:
        """Note a batch that is about to be delivered.

        Args:
            metrics: The loader's; called for a line of log only.
            batch: The batch.
            samples: Samples in it.
            progress: Share of the epoch that is done after it, in [0, 1].
        """
        self._padding.note(batch)
        self._line.count(samples, progress, metrics)
        if self._bar is not None:
            self._bar.count(samples, progress)

    def observed(self, losses: FloatArray) -> None:
        """Losses of a batch have come back; another thread may say so."""
        if self._bar is not None:
            self._bar.observed(losses)

    def close(self) -> None:
        """Nothing more is shown."""
        if self._bar is not None:
            self._bar.close()

    def metrics(self) -> dict[str, float]:
        """`padding_share`, once it is known."""
        return self._padding.metrics()
