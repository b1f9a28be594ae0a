"""Convert a corpus: INPUT... -> MDS shards in OUT, shuffled. The last line printed is JSON."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence

from slap_stream.cli.command_line import CommandLine, add_common, ended, output, to_write
from slap_stream.corpus.convert import convert
from slap_stream.corpus.field_map import parse_map
from slap_stream.corpus.records import KNOWN_SHAPES
from slap_stream.corpus.report import ConvertReport
from slap_stream.shards.index import SHARD_BYTES

_SHOWN = 10


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = CommandLine(
        prog="slap-convert",
        description=__doc__,
        epilog=f"""Records may be {"; ".join(KNOWN_SHAPES)}.
Run the same command again to go on with a conversion that was cut off.

examples:
  slap-convert chats.jsonl.gz more.parquet saved_dataset/ corpus
  slap-convert chats.jsonl corpus --tokenizer path/to/tokenizer --max-length 2048
  slap-convert table.csv corpus --map instruction=question,output=answer
  slap-convert 's3://bucket/chats/*.jsonl.zst' s3://bucket/corpus""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    line.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=".jsonl, .json, .csv, .tsv (plain, .gz, .zst), .parquet, .arrow, .feather, a dataset "
        "saved to disk, a directory of files; files of s3://, gs://, az://, https:// and hf://",
    )
    line.add_argument(
        "out",
        metavar="OUT",
        type=output,
        help="directory of the corpus, or its URL: s3://, gs://, az://",
    )
    line.add_argument("--tokenizer", help="path or name; writes tokens instead of messages")
    line.add_argument("--max-length", type=int, help="tokens kept of a record; default: all")
    line.add_argument(
        "--truncate",
        choices=("right", "left", "drop"),
        default="right",
        help="what is done with a longer one: keep its start (right), its end (left), or none",
    )
    line.add_argument("--seed", type=int, default=0, help="of the shuffle")
    line.add_argument("--num-workers", type=int, help="processes; default: one per core")
    line.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, help="default %(default)s")
    line.add_argument(
        "--source-field",
        type=lambda name: name or None,
        default="source",
        help="field that names a record's source (default source); '': each input is a source",
    )
    line.add_argument(
        "--map",
        action="append",
        dest="fields",
        metavar="NAME=FIELD,...",
        help="what known names are called in the data; a.b is b inside of a",
    )
    line.add_argument(
        "--scratch-dir",
        type=to_write,
        help="where to work for a URL; default: below the folder for temporary files",
    )
    add_common(line, quiet="no progress bar, no table")
    return line


def describe(report: ConvertReport) -> str:
    """What was kept and what was dropped, for people."""
    lines = [f"{report.num_samples:>9,}  samples in {report.out}"]
    largest = sorted(report.counts.items(), key=lambda item: (-item[1], item[0]))
    lines += [f"{count:>9,}    {source}" for source, count in largest[:_SHOWN]]
    if len(largest) > _SHOWN:
        rest = sum(count for _, count in largest[_SHOWN:])
        lines.append(f"{rest:>9,}    in {len(largest) - _SHOWN} more sources")
    if report.truncated:
        lines.append(f"{report.truncated:>9,}  cut to max_length")
    if report.shared:
        lines.append(f"{report.shared:>9,}  answers whose first token also ends the header")
    fields = sorted(report.unused.items(), key=lambda item: (-item[1], item[0]))
    lines += [
        f"{count:>9,}  with a field that is not used: {name}" for name, count in fields[:_SHOWN]
    ]
    if len(fields) > _SHOWN:
        lines.append(f"           and {len(fields) - _SHOWN} more fields that are not used")
    for reason, count in report.dropped.items():
        lines.append(f"{count:>9,}  dropped: {reason}, as in {', '.join(report.examples[reason])}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `slap-convert`."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    debug = vars(arguments).pop("debug")

    def run_and_tell() -> int:
        if arguments.fields is not None:
            arguments.fields = parse_map(",".join(arguments.fields))
        report = convert(**vars(arguments), command=shlex.join(["slap-convert", *given]))
        if arguments.progress is not False:
            print(describe(report))
        # There may be thousands of sources; corpus.json names them.
        summary = report.to_dict() | {"num_sources": len(report.counts)}
        del summary["counts"]
        print(json.dumps(summary))
        return 0

    hint = "interrupted; run the same command to go on"
    return ended("slap-convert", run_and_tell, interrupted=hint, debug=debug)


if __name__ == "__main__":
    sys.exit(main())
