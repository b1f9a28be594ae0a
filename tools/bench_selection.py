"""Does selection pay? Fine-tunes one base model on the batches of many arms, over many seeds.

    python tools/bench_selection.py --data DATA --preset small --out runs/selection

DATA holds t0_50k, sgd, tatoeba and gsm8k as {name}.{train,test}.jsonl.gz. Results are JSON lines in
OUT/results.jsonl; what is there is not run again, so that the same command goes on where it was
stopped. Tables and figures are made of them at the end; --report makes them of what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slap_stream.errors import SlapStreamError
from slap_stream.tools.selection.schedule import PRESETS, Arm, Preset, RunKey, arms
from slap_stream.tools.selection.tasks import Condition


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("--data", type=Path, required=True, help="directory of the task files")
    line.add_argument("--out", type=Path, default=Path("runs/selection"))
    line.add_argument("--preset", choices=sorted(PRESETS), default="small")
    line.add_argument("--conditions", nargs="+", help="such as t0_50k or balanced+copies+shuffled")
    line.add_argument("--arms", nargs="+", help=f"of {', '.join(arms())}")
    line.add_argument("--keep", type=float, default=0.7, help="share of candidates trained on")
    line.add_argument("--seeds", type=int, help="how many seeds")
    line.add_argument("--first-seed", type=int, default=0, help="tune on other seeds than these")
    line.add_argument("--learning-rate", type=float, help="instead of the preset's")
    line.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE",
                      help="settings of SlapConfig, for every arm")  # fmt: skip
    line.add_argument("--jobs", type=int, default=1, help="runs side by side")
    line.add_argument("--report", action="store_true", help="only tables and figure")
    line.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return line


def keys(arguments: argparse.Namespace, preset: Preset) -> list[RunKey]:
    """Every run asked for, seed by seed, so that what is done first can be compared."""
    known = arms()
    unknown = set(arguments.arms or ()) - set(known)
    if unknown:
        raise ValueError(f"arms must be of {', '.join(known)}, got {sorted(unknown)}.")
    names = arguments.conditions or preset.conditions
    overrides = " ".join(sorted(arguments.set))
    result = []
    for seed in range(
        arguments.first_seed, arguments.first_seed + (arguments.seeds or preset.seeds)
    ):
        for name in names:
            for arm in arguments.arms or preset.arms:
                keep = known[arm].config.get("keep", arguments.keep)
                rate_keep = 1.0 if isinstance(keep, str) else keep
                result.append(
                    RunKey(
                        preset=preset.name,
                        condition=Condition.of(name).name,
                        arm=arm,
                        keep=keep,
                        seed=seed,
                        learning_rate=arguments.learning_rate or preset.rate_for(rate_keep),
                        overrides=overrides,
                    )
                )
    return result


def done_keys(results: Path) -> list[dict[str, object]]:
    """Keys of the runs in a results file."""
    if not results.exists():
        return []
    names = RunKey.__slots__
    return [{n: row[n] for n in names} for row in map(json.loads, results.read_text().splitlines())]


def overridden(arm: Arm, settings: Sequence[str]) -> Arm:
    """An arm with settings of the command line."""
    extra = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        extra[name] = json.loads(value)
    return replace(arm, config=dict(arm.config) | extra)


def work(arguments: argparse.Namespace, preset: Preset, part: int, parts: int) -> None:
    """Run every `parts`-th of the runs that are not done, from `part` on."""
    import torch

    from slap_stream.tools.selection.corpora import Workshop
    from slap_stream.tools.selection.training import run

    torch.set_num_threads(1)
    workshop = Workshop(arguments.data, arguments.out, preset)
    results = arguments.out / "results.jsonl"
    todo = keys(arguments, preset)
    for number, key in enumerate(todo):
        if number % parts != part or key.to_dict() in done_keys(results):
            continue
        row = run(workshop, key, overridden(arms()[key.arm], arguments.set))
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{number + 1}/{len(todo)} {key.condition} {key.arm} seed {key.seed}: "
            f"{row['loss']:.4f} on {row['samples']} samples, {row['seconds']}",
            flush=True,
        )


def run_all(arguments: argparse.Namespace, preset: Preset, given: Sequence[str]) -> int:
    """Do what is not done, in as many processes as jobs; the worst exit status."""
    if arguments.jobs == 1:
        work(arguments, preset, 0, 1)
        return 0
    command = [sys.executable, __file__, *given, "--worker"]
    workers = [
        subprocess.Popen([*command, f"{part}/{arguments.jobs}"]) for part in range(arguments.jobs)
    ]
    return max(worker.wait() for worker in workers)


def report(out: Path) -> int:
    """Tables and figure of what is there."""
    from slap_stream.tools.selection.report import draw, read_rows, summary, tables

    rows = read_rows(out / "results.jsonl")
    (out / "tables.md").write_text(tables(rows))
    draw(rows, out / "selection.png")
    print(tables(rows))
    print(json.dumps(summary(rows)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    preset = PRESETS[arguments.preset]
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        keys(arguments, preset)
        if arguments.worker:
            part, parts = map(int, arguments.worker.split("/"))
            work(arguments, preset, part, parts)
            return 0
        if not arguments.report and (failed := run_all(arguments, preset, given)):
            return failed
        return report(arguments.out)
    except (SlapStreamError, OSError, ValueError) as error:
        print(f"bench_selection.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench_selection.py: interrupted; run the same command to go on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
