"""A clock around functions that are called over and over."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any


class Clock:
    """Seconds that named parts take, each without the parts inside it in the same thread.

    Args:
        now: What the seconds are read from; CPU time of the thread unless told otherwise.

    Attributes:
        seconds: Seconds by part.
    """

    def __init__(self, now: Callable[[], float] = time.thread_time) -> None:
        self._now = now
        self.seconds: defaultdict[str, float] = defaultdict(float)
        # Of each thread: seconds of the parts inside each part that is running.
        self._running = threading.local()

    def time(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, timed as this part."""

        @wraps(call)
        def timed(*args: Any, **options: Any) -> Any:
            inside: list[float] = vars(self._running).setdefault("inside", [])
            inside.append(0.0)
            begin = self._now()
            try:
                return call(*args, **options)
            finally:
                took = self._now() - begin
                self.seconds[part] += took - inside.pop()
                if inside:
                    inside[-1] += took

        return timed

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Time a method of one object from now on."""
        setattr(owner, method, self.time(part, getattr(owner, method)))
