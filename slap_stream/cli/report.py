"""A page about a run, or about a corpus before training. The last line printed is JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from slap_stream.cli.command_line import CommandLine, add_common, ended


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = CommandLine(
        prog="slap-report",
        description=__doc__,
        epilog="""examples:
  slap-report corpus                            what is in it: copies, clusters, suspects
  slap-report trained                           what a run has pruned and why; also while it runs
  slap-report trained --export pruned.csv       all that was pruned, with reasons""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    line.add_argument("path", metavar="RUN_DIR_OR_CORPUS", help="a run's directory, or a corpus")
    line.add_argument("--out", help="the page; default: _slap_report.html in the directory")
    line.add_argument("--export", dest="export_to", help="list of the pruned: .csv or .parquet")
    line.add_argument("--corpus", nargs="+", help="where a run's shards lie now, stream by stream")
    line.add_argument("--embeddings", help="of a corpus; default: embeddings.zarr in it")
    line.add_argument("--tokenizer", help="decodes input_ids; default: what corpus.json names")
    line.add_argument("--text-column", help="column with plain text")
    line.add_argument("--prompt-column", help="column with the prompt")
    line.add_argument("--completion-column", help="column with the target")
    add_common(line, quiet="no summary")
    return line


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count:,} {name}" for name, count in value.items()) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return "unknown" if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `slap-report`."""
    arguments = parser().parse_args(argv)
    options = vars(arguments)
    debug, told = options.pop("debug"), options.pop("progress") is not False

    def run_and_tell() -> int:
        # Not on top: it takes seconds to load, which nobody need wait for to read the help.
        from slap_stream.report.report import report

        made = report(**options)
        if told:
            for name, value in made.summary.items():
                print(f"{name.replace('_', ' '):>20}  {_told(value)}")
            for label, sentences in (("to do", made.todo), ("warning", made.warnings)):
                for sentence in sentences:
                    print(f"{label:>20}  {sentence}")
            print(f"                page  {made.page}")
        print(json.dumps(asdict(made)))
        return 0

    return ended("slap-report", run_and_tell, debug=debug)


if __name__ == "__main__":
    sys.exit(main())
