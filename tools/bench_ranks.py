"""What many ranks cost: numbers exchanged, state of the lanes, and the sampler's CPU time.

    python tools/bench_ranks.py --ranks 4 --lanes 4

On random embeddings, with processes of this machine connected by gloo. Prints JSON as last line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from slap_stream import SlapConfig, SlapSampler
from slap_stream.distributed import Ranks, join_ranks
from slap_stream.lane_statistics import StatisticsLayout
from slap_stream.state_bytes import to_bytes
from slap_stream.tools.command_line import CommandLine, ended, whole

PROGRAM = "bench_ranks.py"
SAMPLES, SHARD = 40_000, 500


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    line = CommandLine(prog=PROGRAM, description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("--ranks", type=whole(1), default=4)
    line.add_argument("--lanes", type=whole(1), default=8)
    line.add_argument("--dim", type=whole(1), default=384, help="embedding dimensions")
    line.add_argument("--features", type=whole(0), default=7, help="feature columns")
    line.add_argument(
        "--lane-batch", type=whole(1), default=32, help="samples of a lane in a batch"
    )
    line.add_argument("--steps", type=whole(1), default=96)
    arguments = line.parse_args(argv)
    every = SlapConfig().probe_every
    if arguments.lanes % arguments.ranks:
        line.error(
            f"ranks must divide lanes, got {arguments.ranks} ranks of {arguments.lanes} lanes"
        )
    most = int(0.7 * SAMPLES) // (arguments.lane_batch * arguments.lanes)
    if not every < arguments.steps <= most:
        line.error(
            f"steps must be above {every}, which are not timed, and at most the {most} of an "
            f"epoch, got {arguments.steps}"
        )
    return arguments


def new_sampler(arguments: argparse.Namespace, ranks: Ranks | None = None) -> SlapSampler:
    """A sampler over random rows, one rank's or all lanes'."""
    rng = np.random.default_rng(0)
    world_size = 1 if ranks is None else ranks.world_size
    return SlapSampler(
        np.full(SAMPLES // SHARD, SHARD),
        rng.normal(size=(SAMPLES, arguments.dim)).astype(np.float16),
        batch_size=arguments.lane_batch * arguments.lanes // world_size,
        features=rng.normal(size=(SAMPLES, arguments.features)).astype(np.float16),
        config=SlapConfig(num_lanes=arguments.lanes),
        rank=0 if ranks is None else ranks.rank,
        world_size=world_size,
        exchange=ranks,
    )


def run(sampler: SlapSampler, steps: int) -> dict[str, float]:
    """CPU milliseconds a step, without refreshes and with them, and the first lane's state."""
    losses = np.random.default_rng(1).gamma(4.0, 0.5, SAMPLES)
    sampler.refreshes_itself = False
    every = sampler.config.probe_every
    composing = refreshing = 0.0
    for step in range(1, steps + 1):
        began = time.process_time()
        batch = sampler.compose()
        assert batch is not None, "nothing is withdrawn"
        sampler.observe(batch, losses[batch])
        middle = time.process_time()
        if step % every == 0:
            sampler.refresh()
        # The first batches also compile.
        if step > every:
            composing += middle - began
            refreshing += time.process_time() - middle
    counted = steps - every
    return {
        "compose_cpu_ms": 1e3 * composing / counted,
        "refresh_cpu_ms_per_step": 1e3 * refreshing / counted,
    }


def run_rank(rank: int, folder: Path, arguments: argparse.Namespace) -> None:
    """One process of several; its result goes to a file."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=arguments.ranks)
    ranks = join_ranks()
    found = run(new_sampler(arguments, ranks), arguments.steps) | ranks.metrics()
    (folder / str(rank)).write_text(json.dumps(found))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = parse(argv)
    return ended(PROGRAM, lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    alone = new_sampler(arguments)
    result: dict[str, Any] = {"one_rank": run(alone, arguments.steps)}
    state = alone.state_dict()
    result["bytes_per_lane_and_refresh"] = 8 * StatisticsLayout(alone.statistics()[0]).size
    result["state_bytes"] = len(to_bytes(state))
    result["state_bytes_per_lane"] = len(to_bytes(state["lanes"][0]))
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(arguments.ranks):
            child = os.fork()
            if not child:
                code = 1
                try:
                    run_rank(rank, Path(folder), arguments)
                    code = 0
                except Exception:
                    # Nothing may run past here in a fork; the parent sees the code.
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            return 1
        found = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(len(codes))]
    result["each_rank"] = {name: float(np.mean([f[name] for f in found])) for name in found[0]}
    print(json.dumps(result | vars(arguments)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
