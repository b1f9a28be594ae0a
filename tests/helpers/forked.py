"""Processes of a job, forked from one that has imported everything."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable


def run_forked(processes: int, run: Callable[[int], None]) -> int:
    """Run each rank in a process of its own; 0 if all have come to their end."""
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            try:
                run(rank)
            # Whatever it was: the parent's code must not go on here.
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            # As at a normal exit, which would go on after the parent's fork.
            atexit._run_exitfuncs()
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)
