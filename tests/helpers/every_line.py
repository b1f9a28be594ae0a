"""What may happen between any two lines of the loader: another thread's turn, or an interrupt."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = Path(__file__).parents[2] / "slap_stream"
# Where batches pass from the sampler to the training loop.
PASSING = (PACKAGE / "loader" / "pending.py", PACKAGE / "core" / "background.py")
LOADER = (
    *PASSING,
    *(PACKAGE / "loader" / f"{name}.py" for name in ("loader", "delivery", "prepared")),
)


@contextmanager
def at_every_line(files: Iterable[Path], function: Callable[[], None]) -> Iterator[None]:
    """Context in which a function is called before every line of some files, in this thread and in
    those that are started meanwhile."""
    names = frozenset(map(str, files))

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in names:
            return None
        if event == "line":
            function()
        return trace

    before = sys.gettrace(), threading.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before[0])
        threading.settrace(before[1])  # type: ignore[arg-type]  # None switches it off
