"""Embed a corpus: CORPUS/*.mds -> CORPUS/embeddings.zarr. The last line printed is JSON."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from slap_stream.cli.command_line import CommandLine, device, ended, to_write, whole
from slap_stream.core.files import file_digest
from slap_stream.corpus.tokenising import find_tokenizer
from slap_stream.embeddings.corpus_texts import CorpusTexts, describe_corpus
from slap_stream.embeddings.embed import EmbedReport, embed, source_names
from slap_stream.embeddings.encoders import open_encoder
from slap_stream.embeddings.reference import ReferenceLoss
from slap_stream.errors import CorpusError
from slap_stream.shards.index import corpus_columns, corpus_size
from slap_stream.shards.reader import iter_corpus


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = CommandLine(prog="slap-embed", description=__doc__)
    line.add_argument("corpus", type=Path, help="directory with index.json")
    line.add_argument("--out", type=to_write, help="default: CORPUS/embeddings.zarr")
    line.add_argument("--encoder", default="hashing", help="hashing (default) or hf:PATH")
    line.add_argument("--dim", type=int, help="length of a hashing vector (default 384)")
    line.add_argument("--reference-model", help="adds the column reference_loss")
    line.add_argument(
        "--device", type=device, help="of the models; default: the GPU if there is one"
    )
    line.add_argument("--tokenizer", help="decodes input_ids; default: what corpus.json names")
    line.add_argument("--text-column", help="column with plain text")
    line.add_argument("--prompt-column", help="column with the prompt")
    line.add_argument("--completion-column", help="column with the target")
    line.add_argument("--source-column", help="default: source, if there is one")
    line.add_argument("--no-source", action="store_true", help="do not tell sources apart")
    line.add_argument("--num-workers", type=whole(0), help="processes; default: up to one per core")
    line.add_argument("--rows-per-shard", type=int, help="rows of one file of the store")
    line.add_argument("--overwrite", action="store_true", help="replace embeddings that are there")
    line.add_argument("--quiet", action="store_true", help="no progress bar")
    return line


def run(arguments: argparse.Namespace, command: str) -> EmbedReport:
    """Embed as the command line says."""
    corpus: Path = arguments.corpus
    index = corpus / "index.json"
    if not index.is_file():
        raise CorpusError(
            f"corpus must be a directory with an index.json, got {str(corpus)!r}; make one with "
            "slap-convert."
        )
    described = describe_corpus(corpus)
    columns = corpus_columns(corpus)
    tokenised = "input_ids" in columns and not (arguments.text_column or arguments.prompt_column)
    if arguments.tokenizer is not None and not tokenised:
        raise CorpusError(
            f"tokenizer must be None for a corpus of text, got {arguments.tokenizer!r}; it decodes "
            "the column input_ids."
        )
    tokenizer = (arguments.tokenizer or described.get("tokenizer")) if tokenised else None
    if tokenizer is not None:
        tokenizer = find_tokenizer(tokenizer)
    if arguments.source_column not in (None, *columns):
        raise CorpusError(
            f"source column must be one of {', '.join(columns)}, got {arguments.source_column!r}."
        )
    source = None if arguments.no_source else arguments.source_column or "source"
    texts = CorpusTexts(
        corpus_dir=corpus,
        iter_corpus=iter_corpus,
        text_column=arguments.text_column,
        prompt_column=arguments.prompt_column,
        completion_column=arguments.completion_column,
        source_column=source if source in columns else None,
        tokenizer=tokenizer,
    )
    size = corpus_size(corpus)
    reference = None
    if arguments.reference_model is not None:
        reference = ReferenceLoss(arguments.reference_model, arguments.device, tokenizer=tokenizer)
    return embed(
        texts,
        arguments.out or corpus / "embeddings.zarr",
        open_encoder(arguments.encoder, dim=arguments.dim, device=arguments.device),
        num_samples=size,
        index_digest=file_digest(index),
        source_names=source_names(texts, size, described),
        reference=reference,
        num_workers=arguments.num_workers,
        rows_per_shard=arguments.rows_per_shard,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
        command=command,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `slap-embed`."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)

    def run_and_tell() -> int:
        report = run(arguments, shlex.join(["slap-embed", *given]))
        print(json.dumps(report.to_dict()))
        return 0

    hint = "interrupted; run the same command to go on"
    return ended("slap-embed", run_and_tell, interrupted=hint)


if __name__ == "__main__":
    sys.exit(main())
