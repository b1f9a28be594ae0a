"""Speed of composing, and memory that a large corpus takes.

    python -m tools.bench.composer            # candidates per second, and where the time goes
    python -m tools.bench.composer --memory   # start and memory for up to 1e9 virtual samples

The corpus is made up and stored nowhere; losses and sketches of it are fed back, so that the
regression is fitted and the metric learnt. Each measurement has a process of its own, on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from statistics import median_high
from typing import Any

from slap_stream import Advanced, SlapConfig
from slap_stream.cli.command_line import CommandLine, ended, in_own_process, share, whole
from slap_stream.errors import ConfigError

# NumPy's libraries read these when they are loaded; sums are single-threaded on purpose.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

PROGRAM = "tools.bench.composer"
SIZES = (10**5, 10**6, 10**7, 10**8, 10**9)
STREAMING_SIZES = SIZES[:4]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `config` holds the settings of the sampler."""
    line = CommandLine(prog=PROGRAM, description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("--memory", action="store_true", help="memory instead of speed")
    line.add_argument("--samples", type=whole(1), default=400_000, help="of the corpus, for speed")
    line.add_argument("--sizes", type=whole(1), nargs="+", default=SIZES, help="for memory")
    line.add_argument("--streaming-sizes", type=whole(1), nargs="*", default=STREAMING_SIZES)
    line.add_argument("--batch-size", type=whole(1), default=256)
    line.add_argument("--dim", type=whole(1), default=384, help="of the embeddings")
    line.add_argument("--keep", type=share, default=0.7)
    line.add_argument("--pool-batches", type=whole(2), default=16)
    line.add_argument("--metric-dim", type=whole(1), default=64)
    line.add_argument("--policy", default="slap")
    line.add_argument("--log", action="store_true", help="keep a run's log beside")
    line.add_argument("--warmup", type=whole(0), default=96, help="batches before the clock starts")
    line.add_argument("--steps", type=whole(1), default=320, help="batches that are timed")
    line.add_argument("--repeats", type=whole(1), default=3, help="processes that measure speed")
    line.add_argument("--arm", default="", help=argparse.SUPPRESS)
    arguments = line.parse_args(argv)
    # Loads NumPy, which must find the variables above set.
    from slap_stream.selection.policies.registry import make_policy

    try:
        arguments.config = SlapConfig(
            keep=arguments.keep,
            policy=arguments.policy,
            advanced=Advanced(pool_batches=arguments.pool_batches, metric_dim=arguments.metric_dim),
        )
        make_policy(arguments.config)
    except ConfigError as error:
        line.error(str(error))
    name, sizes = (
        ("sizes", arguments.sizes) if arguments.memory else ("samples", [arguments.samples])
    )
    least = -int(-arguments.batch_size // arguments.keep)
    if min(sizes) < least:
        line.error(
            f"argument --{name}: must be at least {least}, which make one batch of "
            f"{arguments.batch_size} at keep {arguments.keep:g}, got {min(sizes)}"
        )
    every = arguments.config.probe_every
    if not (arguments.memory or arguments.arm) and arguments.steps < every:
        line.error(
            f"argument --steps: must be at least {every}, one of which refreshes, got "
            f"{arguments.steps}"
        )
    return arguments


def measure(arguments: argparse.Namespace, arm: str) -> dict[str, Any]:
    """One measurement, in this process."""
    from tools.bench.composer import arms

    config = arguments.config
    name, _, size = arm.partition(":")
    shape = {"dim": arguments.dim, "batch_size": arguments.batch_size}
    if name == "first_batch":
        return arms.first_batch(**shape, config=config)
    if name == "memory":
        return arms.memory(samples=int(size), steps=arguments.steps, **shape, config=config)
    if name == "streaming":
        return arms.streaming_memory(samples=int(size), batch_size=arguments.batch_size)
    return arms.speed(
        samples=arguments.samples,
        warmup=arguments.warmup,
        steps=arguments.steps,
        log=arguments.log,
        **shape,
        config=config,
    )


def measured(given: Sequence[str], arm: str) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    return in_own_process(arm, PROGRAM, [*given, "--arm", arm])


def speed(arguments: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """The median of every number over the repeats, printed and handed back."""
    # The first process may have to compile; the second finds the kernels compiled.
    measured(given, "first_batch")
    result = measured(given, "first_batch")
    runs = [measured(given, "speed") for _ in range(arguments.repeats)]
    parts = [run.pop("parts_ms_per_batch") for run in runs]
    result |= {name: median_high([run[name] for run in runs]) for name in runs[0]}
    result["parts_ms_per_batch"] = {
        name: median_high([part.get(name, 0.0) for part in parts]) for name in parts[0]
    }
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:42} {value:12,.2f}")
    print("\nCPU milliseconds per batch, refreshes spread over their batches:")
    for part, value in result["parts_ms_per_batch"].items():
        print(f"  {part:58} {value:6.2f}")
    return result


def memory(arguments: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """Tables of start time and memory against the number of samples."""
    ours, theirs = [], []
    names = ("shards", "start s", "first batch s", "MB", "growth MB")
    print(f"{'samples':>14} " + " ".join(f"{name:>13}" for name in names))
    for size in arguments.sizes:
        row = measured(given, f"memory:{size}")
        ours.append(row)
        print(
            f"{row['samples']:14,} {row['shards']:13,} {row['start_seconds']:13.2f} "
            f"{row['first_batch_seconds']:13.2f} {row['resident_mb']:13.1f} "
            f"{row['growth_mb']:13.1f}",
            flush=True,
        )
    print("\nmosaicml-streaming, the order of one epoch")
    print(f"{'samples':>14} {'start s':>13} {'MB':>13} {'peak MB':>13}")
    for size in arguments.streaming_sizes:
        row = measured(given, f"streaming:{size}")
        theirs.append(row)
        print(
            f"{row['samples']:14,} {row['start_seconds']:13.2f} {row['resident_mb']:13.1f} "
            f"{row['peak_mb']:13.1f}",
            flush=True,
        )
    return {"slap_stream": ours, "streaming": theirs}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(given)

    def run() -> int:
        if arguments.arm:
            result = measure(arguments, arguments.arm)
        else:
            result = (memory if arguments.memory else speed)(arguments, given)
        print(json.dumps(result))
        return 0

    return ended(PROGRAM, run)


if __name__ == "__main__":
    sys.exit(main())
