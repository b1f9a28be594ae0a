"""Reports: a run's directory, or a corpus, to a page of HTML."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slap_stream.core.files import file_to_write, local_path, write_text
from slap_stream.embeddings.corpus_texts import CorpusTexts
from slap_stream.errors import ConfigError
from slap_stream.loader.run_files import find_log
from slap_stream.report.corpus_page import corpus_page
from slap_stream.report.picked import check_export, export
from slap_stream.report.run_page import Run, run_page
from slap_stream.shards.index import INDEX_NAME

PAGE_NAME = "_slap_report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What `report` did.

    Attributes:
        kind: `run` or `corpus`.
        page: The page.
        exported: Lines of the exported list; None if none was asked for.
        summary: The numbers on top of the page, by name.
        todo: What the page says is to be done.
        warnings: What somebody should look into.
        seconds: Wall-clock time.
    """

    kind: str
    page: str
    exported: int | None
    summary: dict[str, Any]
    todo: list[str]
    warnings: list[str]
    seconds: float


def report(
    path: str | Path,
    *,
    out: str | Path | None = None,
    export_to: str | Path | None = None,
    corpus: Sequence[str | Path] | None = None,
    embeddings: str | Path | None = None,
    tokenizer: str | Path | None = None,
    text_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
) -> Report:
    """Make a page about a run, which may be going on, or about a corpus before any training.

    Args:
        path: The directory of a run (a loader's `run_dir`, a Trainer's `output_dir`), or of a
            corpus with its embeddings.
        out: Where the page goes; None means `_slap_report.html` in the directory.
        export_to: Where the list of what was pruned or withdrawn goes, with reasons: .csv or
            .parquet.
        corpus: Where a run's shards lie now, stream by stream; None means where they lay.
        embeddings: Where a corpus's embeddings lie; None means in the corpus.
        tokenizer: Path or name of the tokenizer that decodes `input_ids`; None means the one that
            corpus.json names.
        text_column: Column with plain text, of a corpus that has neither `messages` nor
            `input_ids`.
        prompt_column: Column with the prompt, likewise; goes with `completion_column`.
        completion_column: Column with the target.

    Raises:
        ConfigError: If the path is neither, an argument does not fit it, or page or list cannot be
            written where they should go.
        RunLogError: If the log was written by another version.
        CorpusError: If the columns contradict each other.
        AlignmentError: If a corpus has no embeddings.
    """
    began, path = time.perf_counter(), local_path("path", path)
    columns = CorpusTexts(
        corpus_dir=path,
        tokenizer=tokenizer,
        text_column=text_column,
        prompt_column=prompt_column,
        completion_column=completion_column,
    )
    is_run = find_log(path) is not None
    if not is_run and not (path / INDEX_NAME).is_file():
        raise ConfigError(
            "path must be the directory of a run, with _slap_log, or of a corpus, with "
            f"{INDEX_NAME}, got {str(path)!r}; give the loader run_dir=, or convert and embed a "
            "corpus."
        )
    if not is_run and (export_to is not None or corpus is not None):
        raise ConfigError(
            f"export and corpus must be left out for a corpus, got them with {str(path)!r}; only a "
            "run has pruned anything."
        )
    page_path = file_to_write("out", path / PAGE_NAME if out is None else out)
    exported: int | None = None
    if is_run:
        list_path = None if export_to is None else check_export(export_to)
        run = Run(path, None if corpus is None else [Path(one) for one in corpus], columns)
        if list_path is not None:
            events = run.events
            exported = export(list_path, events.rows, run.outcomes, run.sources, events.errors)
        made = run_page(run)
    else:
        made = corpus_page(path, embeddings, columns)
    write_text(page_path, made.html)
    return Report(
        kind="run" if is_run else "corpus",
        page=str(page_path),
        exported=exported,
        summary=made.summary,
        todo=list(made.todo),
        warnings=made.warnings,
        seconds=round(time.perf_counter() - began, 3),
    )
