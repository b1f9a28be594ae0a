"""Pairs of ranks that prepare something together, and of which one dies on the way.

Rank 1 ends without a word where it would call torch.distributed. What comes of it for rank 0 goes
to OUT, a file for each death.

    python -m tests.helpers.dying_ranks OUT
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from slap_stream.errors import CorpusError
from slap_stream.integrations import first_rank
from tests.helpers.forked import run_forked

# The first rank works for longer than ranks that are silent are waited for.
SILENT_SECONDS, WORK_SECONDS = 2.5, 3.5
# Which call, and how many of its kind are made before.
DEATHS = (
    ("new_group", 0),
    ("all_reduce", 0),
    ("all_reduce", 2),
    ("broadcast_object_list", 0),
    ("all_gather_object", 0),
    ("never", 0),
)


def dies_at(name: str, after: int) -> None:
    """End this process when it makes such a call."""
    call: Callable[..., Any] = getattr(dist, name)
    left = [after]

    def counted(*arguments: Any, **options: Any) -> Any:
        if not left[0]:
            os._exit(0)
        left[0] -= 1
        return call(*arguments, **options)

    setattr(dist, name, counted)


def main(rank: int, out: Path, name: str, after: int) -> None:
    first_rank.MEETING = timedelta(seconds=SILENT_SECONDS)
    store = f"file://{out}/{name}{after}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    if rank and name != "never":
        dies_at(name, after)

    def first() -> str:
        time.sleep(WORK_SECONDS)
        return "found"

    began = time.monotonic()
    try:
        told = first_rank.first_rank_first(first, lambda found: found)
    except CorpusError as error:
        told = str(error)
    found = {"told": told, "seconds": time.monotonic() - began}
    (out / f"{name}{after}-rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    pairs = [(rank, *death) for death in DEATHS for rank in range(2)]
    folder = Path(sys.argv[1])

    def run(number: int) -> None:
        rank, name, after = pairs[number]
        main(rank, folder, name, after)

    sys.exit(run_forked(len(pairs), run))
