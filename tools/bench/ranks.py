"""The cost of many ranks: the sampler's CPU time, numbers exchanged, and state of the lanes.

    python -m tools.bench.ranks --ranks 4 --lanes 4

On random embeddings, twice. First one rank of all lanes beside all ranks, in one process, in turns
from one refresh to the next: the ratio of their CPU times is that of what they execute, whatever
else the machine does. Then in processes connected by gloo, with what is sent and waited for.
Prints JSON as last line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from tqdm import tqdm

from slap_stream import SlapConfig, SlapSampler
from slap_stream.cli.command_line import CommandLine, ended, whole
from slap_stream.core.processes import run_jobs
from slap_stream.core.state_bytes import to_bytes
from slap_stream.loader.ranks import Ranks, join_ranks
from slap_stream.selection.shared import StatisticsLayout, sum_in_order
from slap_stream.types import FloatArray, LaneExchange, Position

PROGRAM = "tools.bench.ranks"
SAMPLES, SHARD = 40_000, 500
# Batches that compile and warm up, and are not timed.
WARMUP = 32


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    every = SlapConfig().probe_every
    line = CommandLine(prog=PROGRAM, description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("--ranks", type=whole(1), default=4)
    line.add_argument("--lanes", type=whole(1), default=8)
    line.add_argument("--dim", type=whole(1), default=384, help="embedding dimensions")
    line.add_argument("--features", type=whole(0), default=7, help="feature columns")
    line.add_argument(
        "--lane-batch", type=whole(1), default=32, help="samples of a lane in a batch"
    )
    line.add_argument(
        "--steps",
        type=whole(4 * every),
        default=320,
        help="timed batches, of four refreshes at least; epochs follow on",
    )
    arguments = line.parse_args(argv)
    if arguments.lanes % arguments.ranks:
        line.error(
            f"ranks must divide lanes, got {arguments.ranks} ranks of {arguments.lanes} lanes"
        )
    most = int(0.7 * SAMPLES) // arguments.lanes
    if arguments.lane_batch > most:
        line.error(
            f"lane-batch must be at most {most}, so that {arguments.lanes} lanes have a batch, got "
            f"{arguments.lane_batch}"
        )
    return arguments


class Handed:
    """An exchange between ranks of one process, the first of which comes first: adds up a rank's
    slice, and is handed the rest.

    Attributes:
        table: What the ranks have handed in, for all of them: (lanes, size) `rows` of all lanes,
            their (size,) `total`, the `least` whole number, and what the first was `told` by them.
    """

    table: SimpleNamespace

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size

    def sum_lanes(
        self, rows: FloatArray, least: int, position: Position
    ) -> tuple[FloatArray | None, int]:
        """As `Ranks.sum_lanes`."""
        table = self.table
        part = -(-table.rows.shape[1] // self._world_size)
        sum_in_order(table.rows[:, self._rank * part : (self._rank + 1) * part])
        return (None if self._rank else table.total), table.least

    def tell(self, data: bytes | None, position: Position) -> bytes:
        """As `Ranks.tell`."""
        if data is not None:
            self.table.told = data
        told: bytes = self.table.told
        return told


def sampler_maker(arguments: argparse.Namespace) -> Callable[..., SlapSampler]:
    """Makes samplers over the same random rows: of one rank, of several with an exchange."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(SAMPLES, arguments.dim)).astype(np.float16)
    features = rng.normal(size=(SAMPLES, arguments.features)).astype(np.float16)

    def make(rank: int = 0, world_size: int = 1, exchange: LaneExchange | None = None) -> Any:
        sampler = SlapSampler(
            np.full(SAMPLES // SHARD, SHARD),
            rows,
            batch_size=arguments.lane_batch * arguments.lanes // world_size,
            features=features,
            config=SlapConfig(num_lanes=arguments.lanes),
            rank=rank,
            world_size=world_size,
            exchange=exchange,
        )
        sampler.refreshes_itself = False
        return sampler

    return make


def timed_step(sampler: SlapSampler, losses: FloatArray) -> float:
    """CPU milliseconds of composing and observing a batch."""
    if sampler.exhausted:
        sampler.start_next_epoch()
    began = time.process_time()
    batch = sampler.compose()
    middle = time.process_time()
    assert batch is not None, "nothing is withdrawn"
    fed_back = losses[batch]
    again = time.process_time()
    sampler.observe(batch, fed_back)
    return 1e3 * (middle - began + time.process_time() - again)


def timed_refresh(sampler: SlapSampler) -> float:
    """CPU milliseconds of a refresh."""
    began = time.process_time()
    sampler.refresh()
    return 1e3 * (time.process_time() - began)


def in_turns(arguments: argparse.Namespace, make: Callable[..., SlapSampler]) -> dict[str, Any]:
    """CPU milliseconds a step of one rank and of all ranks together, and their ratio, without
    refreshes and with them."""
    ranks, losses = arguments.ranks, np.random.default_rng(1).gamma(4.0, 0.5, SAMPLES)
    exchanges = [Handed(rank, ranks) for rank in range(ranks)]
    teams = [[make()], [make(rank, ranks, exchanges[rank]) for rank in range(ranks)]]
    layout = StatisticsLayout(teams[0][0].statistics()[0])
    every = teams[0][0].config.probe_every
    # (steps and refreshes, 2): of one rank, and of all ranks together.
    composed, refreshed = [], []
    for turn in range(-(-(WARMUP + arguments.steps) // every)):
        spent = np.zeros((every, 2))
        # Who goes second finds more of the code in the caches.
        for team in (turn % 2, 1 - turn % 2):
            for sampler in teams[team]:
                # One after the other: on its own core a rank would have the caches for itself.
                spent[:, team] += [timed_step(sampler, losses) for _ in range(every)]
        states = [state for sampler in teams[1] for state in sampler.statistics()]
        rows = np.stack([layout.pack(state) for state in states])
        least = min(state["last_step"] for state in states)
        table = SimpleNamespace(rows=rows, total=sum_in_order(rows), least=least, told=b"")
        for exchange in exchanges:
            exchange.table = table
        composed.append(spent)
        refreshed.append([sum(map(timed_refresh, team)) for team in teams])
    timed = slice(-(-WARMUP // every), None)
    composing = np.concatenate(composed[timed])
    refreshes = np.array(refreshed[timed]) / every
    whole = composing.reshape(-1, every, 2).mean(axis=1) + refreshes
    return {
        "one_rank": {
            "compose_cpu_ms": float(np.median(composing[:, 0])),
            "refresh_cpu_ms_per_step": float(np.median(refreshes[:, 0])),
        },
        "all_ranks": {
            "compose_cpu_ms": float(np.median(composing[:, 1])),
            "refresh_cpu_ms_per_step": float(np.median(refreshes[:, 1])),
        },
        "ratio_composing": median_with_interval(composing[:, 1] / composing[:, 0]),
        "ratio_refreshing": median_with_interval(refreshes[:, 1] / refreshes[:, 0]),
        "ratio_together": median_with_interval(whole[:, 1] / whole[:, 0]),
    }


def median_with_interval(values: NDArray[np.float64]) -> list[float]:
    """Median, and the ends of its 95 % interval, which single values that are far off leave alone.

    The ends are order statistics, by the normal approximation of the binomial distribution.
    """
    ordered, count = np.sort(values), len(values)
    low = max(0, int(count / 2 - 0.98 * count**0.5))
    return [float(np.median(ordered)), float(ordered[low]), float(ordered[count - 1 - low])]


def run_rank(job: tuple[int, Path, argparse.Namespace], advance: Callable[[int], None]) -> None:
    """One process of several; its result goes to a file."""
    rank, folder, arguments = job
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=arguments.ranks)
    ranks: Ranks = join_ranks()
    sampler = sampler_maker(arguments)(rank, arguments.ranks, ranks)
    losses = np.random.default_rng(1).gamma(4.0, 0.5, SAMPLES)
    composing, refreshing = [], []
    for step in range(-WARMUP, arguments.steps):
        spent = timed_step(sampler, losses)
        if step >= 0:
            composing.append(spent)
        if step % sampler.config.probe_every == sampler.config.probe_every - 1:
            spent = timed_refresh(sampler)
            if step >= 0:
                refreshing.append(spent / sampler.config.probe_every)
    found = {
        "compose_cpu_ms": float(np.median(composing)),
        "refresh_cpu_ms_per_step": float(np.median(refreshing)),
    }
    (folder / str(rank)).write_text(json.dumps(found | ranks.metrics()))


def in_processes(arguments: argparse.Namespace) -> dict[str, float]:
    """Means over the processes of what each has measured."""
    with tempfile.TemporaryDirectory() as folder, tqdm(disable=True) as bar:
        jobs = [(rank, Path(folder), arguments) for rank in range(arguments.ranks)]
        run_jobs(run_rank, jobs, [1] * len(jobs), num_workers=len(jobs), bar=bar)
        found = [json.loads(Path(folder, str(rank)).read_text()) for rank, _, _ in jobs]
    return {name: float(np.mean([f[name] for f in found])) for name in found[0]}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = parse(argv)
    return ended(PROGRAM, lambda: measure(arguments))


def measure(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit status."""
    make = sampler_maker(arguments)
    result: dict[str, Any] = in_turns(arguments, make)
    each = in_processes(arguments)
    alone = make()
    for _ in range(WARMUP):
        timed_step(alone, np.ones(SAMPLES))
    state = alone.state_dict()
    result["each_process"] = each
    result["bytes_per_lane_and_refresh"] = 8 * StatisticsLayout(alone.statistics()[0]).size
    result["state_bytes"] = len(to_bytes(state))
    result["state_bytes_per_lane"] = len(to_bytes(state["lanes"][0]))
    print(json.dumps(result | vars(arguments)))
    return 0


if __name__ == "__main__":
    # Worker processes look for `run_rank` in a module that they can import.
    from tools.bench import ranks

    raise SystemExit(ranks.main())
