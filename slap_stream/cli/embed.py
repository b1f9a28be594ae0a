"""Embed a corpus: CORPUS/*.mds -> CORPUS/embeddings.zarr. The last line printed is JSON."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slap_stream.cli.command_line import CommandLine, add_common, device, ended, output, to_write

if TYPE_CHECKING:
    from slap_stream.embeddings.embed import EmbedReport


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = CommandLine(
        prog="slap-embed",
        description=__doc__,
        epilog="""examples:
  slap-embed corpus                                         no model, no download
  slap-embed shards --text-column text                      shards of your own
  slap-embed corpus --encoder hf:path/to/encoder --overwrite
  slap-embed s3://bucket/corpus                             embeddings beside its shards""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    line.add_argument(
        "corpus", help="directory with index.json, or its URL: s3://, gs://, az://, hf://"
    )
    line.add_argument("--out", type=output, help="default: CORPUS/embeddings.zarr")
    line.add_argument("--encoder", default="hashing", help="hashing (default) or hf:PATH")
    line.add_argument("--dim", type=int, help="length of a hashing vector (default 384)")
    line.add_argument("--reference-model", help="adds the column reference_loss")
    line.add_argument(
        "--judge-model", help="adds the column judge_loss, and finds targets that stand out by it"
    )
    line.add_argument(
        "--target", help="examples of what the model is to become good at: adds relevance to them"
    )
    line.add_argument(
        "--device", type=device, help="of the models; default: the GPU if there is one"
    )
    line.add_argument("--tokenizer", help="decodes input_ids; default: what corpus.json names")
    line.add_argument("--text-column", help="column with plain text")
    line.add_argument("--prompt-column", help="column with the prompt")
    line.add_argument("--completion-column", help="column with the target")
    line.add_argument("--source-column", default="source", help="default: source, if there is one")
    line.add_argument(
        "--no-source",
        action="store_const",
        const=None,
        dest="source_column",
        help="do not tell sources apart",
    )
    line.add_argument("--num-workers", type=int, help="processes; default: up to one per core")
    line.add_argument(
        "--rows-per-chunk",
        type=int,
        help="rows of one file of the store; default 16384, a quarter of that for models",
    )
    line.add_argument("--overwrite", action="store_true", help="replace embeddings that are there")
    line.add_argument(
        "--scratch-dir",
        type=to_write,
        help="where to work for a URL; default: below the folder for temporary files",
    )
    add_common(line, quiet="no progress bar, no table")
    return line


def describe(report: EmbedReport) -> str:
    """What was made, for people."""
    share = report.misplaced_share
    lines = [
        f"{report.num_samples:>9,}  samples in {report.path}",
        f"{report.embedded:>9,}  of them embedded now, the others before",
        f"{report.dim:>9,}  numbers for each, and {len(report.feature_names)} columns: "
        f"{', '.join(report.feature_names)}",
    ]
    if share is not None:
        lines.append(f"{share:>9.1%}  of the targets, or fewer, may belong to other prompts")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `slap-embed`."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    debug = vars(arguments).pop("debug")

    def run_and_tell() -> int:
        # Not on top: it takes seconds to load, which nobody need wait for to read the help.
        from slap_stream.embeddings.embed import embed

        report = embed(**vars(arguments), command=shlex.join(["slap-embed", *given]))
        if arguments.progress is not False:
            print(describe(report))
        print(json.dumps(report.to_dict()))
        return 0

    hint = "interrupted; run the same command to go on"
    return ended("slap-embed", run_and_tell, interrupted=hint, debug=debug)


if __name__ == "__main__":
    sys.exit(main())
