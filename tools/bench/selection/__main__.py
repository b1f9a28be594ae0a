"""Does selection pay? Fine-tunes one base model on the batches of many arms, over many seeds.

    python -m tools.bench.selection --data DATA --preset small --out runs/selection

DATA holds t0_50k, sgd, tatoeba and gsm8k as {name}.{train,test}.jsonl.gz. Results are JSON lines in
OUT/results.jsonl; what is there is not run again, so that the same command goes on where it was
stopped. Tables and figures are made of them at the end; --report makes them of what is there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from slap_stream.cli.command_line import CommandLine, directory, ended, real, share, to_write, whole
from slap_stream.errors import ConfigError, CorpusError
from tools.bench.selection.corpora import Workshop
from tools.bench.selection.evidence import table as evidence_table
from tools.bench.selection.results import RESULTS, read_rows
from tools.bench.selection.runs import keys, run_all
from tools.bench.selection.schedule import PRESETS, arms

PROGRAM = "tools.bench.selection"


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
    line.add_argument("--evidence", action="store_true",
                      help="only what is held against each kind of dirt")  # fmt: skip
    return line


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
    line = parser()
    arguments = line.parse_args(argv)
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
        if arguments.evidence:
            first = arguments.first_seed
            seeds = range(first, first + (arguments.seeds or preset.seeds))
            workshop = Workshop(arguments.data, arguments.out, preset)
            print(evidence_table(workshop, arguments.conditions or preset.conditions, seeds))
            return 0
        if arguments.report:
            return report(arguments.out)
        arguments.out.mkdir(parents=True, exist_ok=True)
        run_all(arguments, preset)
        return report(arguments.out)

    return ended(PROGRAM, run, interrupted="interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
