"""Does selection pay? Fine-tunes one base model on the batches of many arms, over many seeds.

    python -m tools.bench.selection --data DATA --preset small --out runs/selection

DATA holds t0_50k, sgd, tatoeba and gsm8k as {name}.{train,test}.jsonl.gz. Results are JSON lines in
OUT/results.jsonl; what is there is not run again, so that the same command goes on where it was
stopped. Tables and figures are made of them at the end; --report makes them of what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slap_stream import SlapConfig
from slap_stream.cli.command_line import CommandLine, directory, ended, real, share, to_write, whole
from slap_stream.core.processes import usable_cores
from slap_stream.errors import ConfigError, CorpusError
from slap_stream.selection.policies.registry import make_policy
from tools.bench.selection.results import Row, append_row, key_of, read_rows
from tools.bench.selection.schedule import PRESETS, Arm, Preset, RunKey, arms, config_of
from tools.bench.selection.tasks import Condition

PROGRAM = "tools.bench.selection"
RESULTS = "results.jsonl"


def parser() -> CommandLine:
    """The command line."""
    line = CommandLine(prog=PROGRAM, description=__doc__.splitlines()[0] if __doc__ else None)
    line.add_argument("--data", type=directory, required=True, help="directory of the task files")
    line.add_argument("--out", type=to_write, default=Path("runs/selection"))
    line.add_argument("--preset", choices=sorted(PRESETS), default="small")
    line.add_argument("--model", type=directory, help="pretrained model for the preset real")
    line.add_argument("--lora", action="store_true", help="train low-rank adapters of it")
    line.add_argument("--conditions", nargs="+", help="such as t0_50k or balanced+copies+shuffled")
    line.add_argument("--arms", nargs="+", help=f"of {', '.join(arms())}")
    line.add_argument("--keep", type=share, default=0.7, help="share of candidates trained on")
    line.add_argument("--seeds", type=whole(1), help="how many seeds")
    line.add_argument(
        "--first-seed", type=whole(0), default=0, help="tune on other seeds than these"
    )
    line.add_argument("--learning-rate", type=real(0.0, above=True), help="instead of the preset's")
    line.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE",
                      help="settings of SlapConfig, for every arm")  # fmt: skip
    line.add_argument("--jobs", type=whole(1), default=1, help="runs side by side")
    line.add_argument("--report", action="store_true", help="only tables and figure")
    line.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return line


def keys(arguments: argparse.Namespace, preset: Preset) -> list[RunKey]:
    """Every run asked for, seed by seed, so that what is done first can be compared.

    Raises:
        ConfigError: If an arm, a condition or a setting is unknown or out of range.
    """
    known = arms()
    unknown = set(arguments.arms or ()) - set(known)
    if unknown:
        raise ConfigError(f"arms must be of {', '.join(known)}, got {sorted(unknown)}.")
    names = arguments.conditions or preset.conditions
    first, result = arguments.first_seed, []
    for seed in range(first, first + (arguments.seeds or preset.seeds)):
        for name in names:
            for arm in arguments.arms or preset.arms:
                keep = known[arm].config.get("keep", arguments.keep)
                make_policy(config_of(overridden(known[arm], arguments.set), keep, seed))
                rate_keep = 1.0 if isinstance(keep, str) else keep
                result.append(
                    RunKey(
                        preset=preset.name,
                        condition=Condition.of(name).name,
                        arm=arm,
                        keep=keep,
                        seed=seed,
                        learning_rate=arguments.learning_rate or preset.rate_for(rate_keep),
                        overrides=" ".join(sorted(arguments.set)),
                    )
                )
    return result


def overridden(arm: Arm, settings: Sequence[str]) -> Arm:
    """An arm with settings of the command line.

    Raises:
        ConfigError: If one is not NAME=VALUE, or there is no such setting.
    """
    names = list(SlapConfig().to_dict())
    extra = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in names:
            raise ConfigError(f"set must be NAME=VALUE of {', '.join(names)}, got {setting!r}.")
        try:
            extra[name] = json.loads(value)
        except ValueError:
            extra[name] = value
    return replace(arm, config=dict(arm.config) | extra)


def as_many_as(arm: str, key: RunKey, rows: Sequence[Row]) -> float | None:
    """The share of the candidates that another arm trained on, where it has run."""
    wanted = {**key.to_dict(), "arm": arm}
    for row in rows:
        if all(row[n] == wanted[n] for n in ("preset", "condition", "arm", "seed", "overrides")):
            return float(row["samples"] / row["candidates"])
    return None


def work(arguments: argparse.Namespace, preset: Preset, turn: str, part: int, parts: int) -> None:
    """Run every `parts`-th of the runs of this turn that are not done, from `part` on."""
    import torch

    from tools.bench.selection.corpora import Workshop
    from tools.bench.selection.training import run

    # A small model gains nothing from a second thread; results stay comparable.
    torch.set_num_threads(1 if preset.model is None else max(1, usable_cores() // parts))
    workshop = Workshop(arguments.data, arguments.out, preset)
    results = arguments.out / RESULTS
    known, first = arms(), turn == "first"
    mine = [k for k in keys(arguments, preset) if (known[k.arm].keeps_as is None) == first]
    for number, key in enumerate(mine):
        rows = read_rows(results)
        if number % parts != part or key.to_dict() in map(key_of, rows):
            continue
        arm = overridden(known[key.arm], arguments.set)
        if arm.keeps_as is not None:
            share = as_many_as(arm.keeps_as, key, rows)
            if share is None:
                print(f"{key.condition} {key.arm} seed {key.seed}: {arm.keeps_as} has not run")
                continue
            arm = replace(arm, config=dict(arm.config) | {"keep": share})
        row = run(workshop, key, arm)
        append_row(results, row)
        print(
            f"{number + 1}/{len(mine)} {key.condition} {key.arm} seed {key.seed}: "
            f"{row['loss']:.4f} on {row['samples']} samples, {row['seconds']}",
            flush=True,
        )


def run_all(arguments: argparse.Namespace, preset: Preset, given: Sequence[str]) -> int:
    """Do what is not done, in as many processes as jobs; the worst exit status."""
    jobs = arguments.jobs
    command = [sys.executable, "-m", PROGRAM, *given, "--worker"]
    # First what stands alone, then the arms that train on as many samples as another did.
    for turn in ("first", "last"):
        if jobs == 1:
            work(arguments, preset, turn, 0, 1)
            continue
        workers = [subprocess.Popen([*command, f"{turn}/{part}/{jobs}"]) for part in range(jobs)]
        try:
            failed = max(worker.wait() for worker in workers)
        except KeyboardInterrupt:
            # They were interrupted too; their half-made things are theirs until they end.
            for worker in workers:
                worker.wait()
            raise
        if failed:
            return failed
    return 0


def check_results(out: Path) -> None:
    """Refuse to report of nothing.

    Raises:
        CorpusError: If no run has ended, or the file holds something else.
    """
    if not read_rows(out / RESULTS):
        raise CorpusError(f"out must hold results, got none in {out / RESULTS}; run something.")


def report(out: Path) -> int:
    """Tables and figure of what is there."""
    from tools.bench.selection.report import draw, latest, summary, tables

    check_results(out)
    rows = latest(read_rows(out / RESULTS))
    (out / "tables.md").write_text(tables(rows))
    draw(rows, out / "selection.png")
    print(tables(rows))
    print(json.dumps(summary(rows)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = list(sys.argv[1:] if argv is None else argv)
    line = parser()
    arguments = line.parse_args(given)
    preset = PRESETS[arguments.preset]
    if (arguments.model is None) == (arguments.preset == "real") and not arguments.report:
        line.error("--model must be given with the preset real and with no other.")
    if arguments.lora and arguments.model is None:
        line.error("--lora must be given with --model; the small model is trained whole.")
    if arguments.model is not None:
        preset = preset.of_model(arguments.model, arguments.lora)
    try:
        if arguments.report:
            check_results(arguments.out)
        else:
            keys(arguments, preset)
    except (ConfigError, CorpusError) as error:
        line.error(str(error))

    def run() -> int:
        if arguments.report:
            return report(arguments.out)
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.worker:
            end_with_parent(os.getppid())
            turn, part, parts = arguments.worker.split("/")
            work(arguments, preset, turn, int(part), int(parts))
            return 0
        return run_all(arguments, preset, given) or report(arguments.out)

    # A worker's end is told by the process that started it.
    hint = "" if arguments.worker else "interrupted; the same command goes on"
    return ended(PROGRAM, run, interrupted=hint)


def end_with_parent(parent: int) -> None:
    """End this process soon after its parent, however that ended: nobody would start it again."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
