"""Processes of a job, forked from one that has imported everything."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def forked(run: Callable[..., None], *arguments: Any, own_session: bool = False) -> int:
    """Call a function in a process of its own; its pid.

    Args:
        run: What is called; the process ends with 0 after it, with 1 if it raises.
        arguments: For it.
        own_session: Whether it leads a session, so that it can be killed with all that it starts.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if own_session:
            os.setsid()
        run(*arguments)
        # As at a normal exit, which would go on after the parent's fork.
        atexit._run_exitfuncs()
        code = 0
    # Whatever it was: the parent's code must not go on here.
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_forked(processes: int, run: Callable[[int], None]) -> int:
    """Run each rank in a process of its own; 0 if all have come to their end."""
    children = [forked(run, rank) for rank in range(processes)]
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)
