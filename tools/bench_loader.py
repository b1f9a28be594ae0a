"""How fast do samples arrive? Compares slap_stream with the loader that it wraps, and with others.

    python tools/bench_loader.py --data runs/loader

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
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slap_stream.errors import SlapStreamError
from slap_stream.tools.loading import arms, corpora, report


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("--data", type=Path, default=Path("runs/loader"), help="for the corpora")
    line.add_argument("--samples", type=int, default=200_000, help="in each corpus")
    line.add_argument("--corpora", nargs="+", choices=sorted(corpora.KINDS), metavar="NAME",
                      default=list(corpora.KINDS), help=", ".join(corpora.KINDS))  # fmt: skip
    line.add_argument("--arms", nargs="+", choices=list(arms.ARMS), metavar="NAME",
                      default=list(arms.ARMS), help=", ".join(arms.ARMS))  # fmt: skip
    line.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    line.add_argument("--places", nargs="+", choices=["local", "remote"],
                      default=["local", "remote"])  # fmt: skip
    line.add_argument("--rounds", type=int, default=3)
    line.add_argument("--seconds", type=float, default=10.0, help="most of an epoch to read")
    line.add_argument("--latency", type=float, default=0.0,
                      help="seconds that each download takes at least (remote only)")  # fmt: skip
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
        RuntimeError: If a run fails.
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
        RuntimeError: If it fails.
    """
    command = [sys.executable, "-W", "ignore", __file__, "--run", json.dumps(asdict(run))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{run.arm} must run to its end, got {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = parser().parse_args(argv)
    if arguments.run:
        arms.main(arguments.run)
        return 0
    results: list[report.Result] = []
    status = 0
    try:
        measure_all(arguments, results)
    except (SlapStreamError, OSError, RuntimeError) as error:
        print(f"bench_loader.py: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    if results:
        table = report.rows(results)
        print(report.text(table))
        print(json.dumps(table))
    return status


if __name__ == "__main__":
    sys.exit(main())
