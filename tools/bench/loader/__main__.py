"""Samples per second of slap_stream, of the loader that it wraps, and of others.

    python -m tools.bench.loader --data runs/loader

Makes its corpora in DATA (short: texts of 0.3 to 0.7 kB; tokens: 2,048 int32; mixed: 0.1 to 20 kB
and two more columns) and reads each with every arm in turn, each in a process of its own, round by
round, so that whatever else the machine does meets all arms alike. Ratios are to the stock loader
of the same round. The last line printed is JSON; an interrupted run reports what it has.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from slap_stream.cli.command_line import CommandLine, ended, in_own_process, real, to_write, whole
from tools.bench.loader import arms, corpora, report

PROGRAM = "tools.bench.loader"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = CommandLine(prog=PROGRAM, description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("--data", type=to_write, default=Path("runs/loader"), help="for the corpora")
    line.add_argument("--samples", type=whole(arms.LEAST_SAMPLES), default=200_000,
                      help="in each corpus")  # fmt: skip
    line.add_argument("--corpora", nargs="+", choices=sorted(corpora.KINDS), metavar="NAME",
                      default=list(corpora.KINDS), help=", ".join(corpora.KINDS))  # fmt: skip
    line.add_argument("--arms", nargs="+", choices=list(arms.ARMS), metavar="NAME",
                      default=list(arms.ARMS), help=", ".join(arms.ARMS))  # fmt: skip
    line.add_argument("--workers", nargs="+", type=whole(0), default=[0, 1, 2])
    line.add_argument("--places", nargs="+", choices=["local", "remote"],
                      default=["local", "remote"])  # fmt: skip
    line.add_argument("--rounds", type=whole(1), default=3)
    line.add_argument("--seconds", type=real(0.0, above=True), default=10.0,
                      help="most of an epoch to read")  # fmt: skip
    line.add_argument("--latency", type=real(0.0), default=0.0,
                      help="seconds that each download takes at least (remote only)")  # fmt: skip
    line.add_argument("--step", type=real(0.0), default=0.0,
                      help="seconds that a batch is trained on elsewhere; not counted")  # fmt: skip
    line.add_argument("--run", help=argparse.SUPPRESS)
    return line


def installed(names: Sequence[str]) -> list[str]:
    """Those of the arms that can run here; says which cannot."""
    found = []
    for name in names:
        module = arms.EXTRAS.get(name)
        if module is None or importlib.util.find_spec(module) is not None:
            found.append(name)
        else:
            print(f"{name}: skipped, it is not installed (pip install {module})")
    return found


def measure_all(arguments: argparse.Namespace, results: list[report.Result]) -> None:
    """Append what every run measured, as it comes.

    Raises:
        ChildProcessError: If a run fails.
    """
    names = installed(arguments.arms)
    for kind in arguments.corpora:
        corpus = corpora.write_corpus(arguments.data, kind, arguments.samples)
        for name in set(names).intersection(arms.EXTRAS):
            arms.prepare_extra(name, corpus, kind, arguments.samples)
        cases = itertools.product(arguments.places, arguments.workers, range(arguments.rounds))
        for place, num_workers, number in cases:
            for name in names:
                if place == "remote" and name in arms.EXTRAS:
                    continue
                run = arms.Run(
                    arm=name,
                    corpus=str(corpus),
                    kind=kind,
                    remote=place == "remote",
                    num_workers=num_workers,
                    seconds=arguments.seconds,
                    latency_seconds=arguments.latency,
                    step_seconds=arguments.step,
                )
                result = {**asdict(run), "round": number, **measure(run)}
                results.append(result)
                print(
                    f"{kind} {place} {num_workers} workers, round {number}: {name} "
                    f"{result['samples_per_second']:,.0f} samples/s",
                    flush=True,
                )


def measure(run: arms.Run) -> dict[str, Any]:
    """Run one arm in a process of its own.

    Raises:
        ChildProcessError: If it fails.
    """
    # Not the run's own: threads of it may still download when it wants to remove what it has.
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as cache:
        given = json.dumps(asdict(replace(run, cache=cache)))
        return in_own_process(run.arm, PROGRAM, ["--run", given])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = parser().parse_args(argv)
    results: list[report.Result] = []

    def run() -> int:
        if arguments.run:
            arms.main(arguments.run)
        else:
            measure_all(arguments, results)
        return 0

    status = ended(PROGRAM, run)
    if results:
        table = report.rows(results)
        print(report.text(table))
        print(json.dumps(table))
    return status


if __name__ == "__main__":
    sys.exit(main())
