"""From a corpus to its `embeddings.zarr`: fit, encode block by block, go on after a kill."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from slap_stream.core.processes import usable_cores
from slap_stream.embeddings.corpus_texts import CorpusTexts
from slap_stream.embeddings.encoders import Encoder
from slap_stream.embeddings.features import FEATURE_NAMES, FIT_SAMPLES, HashedTfidf, feature_columns
from slap_stream.embeddings.layout import ROWS_PER_CHUNK, ROWS_PER_SHARD, StoreLayout
from slap_stream.embeddings.pairing import PairModel, cut_sides
from slap_stream.embeddings.reference import ReferenceLoss
from slap_stream.embeddings.store import EmbeddingStore, EmbeddingWriter
from slap_stream.errors import CorpusError
from slap_stream.text.sample import TextSample
from slap_stream.types import MAX_SOURCES, MISMATCH_COLUMN, Rows

# Samples held as text at once, per process.
_BATCH = 512
SAMPLES_PER_WORKER = 65_536
# Stretches of the corpus that document frequencies are counted on.
_FIT_STRETCHES = 20
# Characters of the samples that pairs are learnt from; all of them are in memory at once.
_PAIR_CHARACTERS = 3_000_000


class Texts(Protocol):
    """Reads any range of a corpus; pickles."""

    def read(self, start: int, stop: int) -> Iterator[TextSample]:
        """Samples `start` to `stop` (half-open), in sample-id order."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedReport:
    """What `embed` did.

    Attributes:
        path: The finished store.
        num_samples: Rows in it.
        embedded: Rows that this call wrote; the others were there from an earlier one.
        dim: Length of an embedding.
        feature_names: Names of the feature columns.
        num_sources: Sources told apart; 0 if the corpus has none.
        length_unit: `tokens`, or `characters / 4`.
        misplaced_share: Share of the targets that seem to belong to other prompts; None if that
            could not be found out: too few samples, or words that do not tell.
        seconds: Wall-clock time of this call.
    """

    path: str
    num_samples: int
    embedded: int
    dim: int
    feature_names: tuple[str, ...]
    num_sources: int
    length_unit: str
    misplaced_share: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """All that turns a block of samples into rows; travels to worker processes."""

    texts: Texts
    writer: EmbeddingWriter
    tfidf: HashedTfidf
    pairing: PairModel
    encoder: Encoder
    reference: ReferenceLoss | None

    def run(self, block: int, advance: Callable[[int], object] | None = None) -> int:
        """Read, encode and write one block; returns its index."""
        layout = self.writer.layout
        start, stop = layout.block(block)
        number = {name: index for index, name in enumerate(layout.source_names)}
        embedding = np.empty((stop - start, layout.dim), dtype=np.float32)
        feature = np.empty((stop - start, len(layout.feature_names)), dtype=np.float32)
        length = np.empty(stop - start, dtype=np.int32)
        source = np.zeros(stop - start, dtype=np.int16)
        samples, at = self.texts.read(start, stop), 0
        while batch := list(islice(samples, _BATCH)):
            end = at + len(batch)
            if end > stop - start:
                break
            pairs = self.tfidf.transform(batch)
            embedding[at:end], extra = self.encoder.encode(batch, pairs)
            told = feature_columns(batch, pairs)
            mismatch = self.pairing.mismatch(batch, pairs, told)
            columns = [told, mismatch[:, None], extra]
            if self.reference is not None:
                columns.append(self.reference.columns(batch))
            feature[at:end] = np.concatenate(columns, axis=1)
            length[at:end] = [sample.length for sample in batch]
            if number:
                source[at:end] = [_source_number(number, s, start + at) for s in batch]
            at = end
            if advance is not None:
                advance(len(batch))
        if at != stop - start:
            raise CorpusError(
                f"samples [{start}, {stop}) must be {stop - start}, got another number from the "
                "corpus; its index.json does not describe its shards."
            )
        rows = Rows(embedding=embedding, length=length, feature=feature, source=source)
        self.writer.write(block, rows)
        return block


def _source_number(number: dict[str, int], sample: TextSample, near: int) -> int:
    if sample.source is None or sample.source not in number:
        raise CorpusError(
            f"source must be one of the corpus's {len(number)}, got {sample.source!r} near sample "
            f"{near}; corpus.json does not describe these shards."
        )
    return number[sample.source]


def embed(
    texts: Texts,
    path: Path,
    encoder: Encoder,
    *,
    num_samples: int,
    index_digest: str,
    source_names: tuple[str, ...] = (),
    reference: ReferenceLoss | None = None,
    num_workers: int | None = None,
    rows_per_shard: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
    command: str = "",
) -> EmbedReport:
    """Embed every sample of a corpus; after a kill, the same call goes on where it stopped.

    Called again on what is finished, with the same settings, it does nothing.

    Args:
        texts: Reads the corpus.
        path: Where the finished store will be.
        encoder: Makes the vectors.
        num_samples: Samples of the corpus.
        index_digest: `file_digest` of its index.json.
        source_names: Names of its sources; empty if it has none.
        reference: Adds the column `reference_loss`.
        num_workers: Processes; None means one per core, fewer for a small corpus, 1 for models,
            which use all cores.
        rows_per_shard: Rows of one file; None means 16,384, a quarter of that for models.
        overwrite: Replace what is there.
        progress: Show a progress bar, if stderr is a terminal.
        command: What is noted as the creation command.

    Raises:
        CorpusError: If the corpus is empty or unreadable, or something else is in the way.
    """
    began = time.perf_counter()
    if num_samples < 1:
        raise CorpusError("the corpus must have at least one sample, got 0; nothing to embed.")
    first = next(iter(texts.read(0, 1)))
    in_workers = encoder.in_workers and reference is None
    if num_workers is None:
        # A process takes seconds to start, in which one that runs embeds tens of thousands.
        useful = max(1, num_samples // SAMPLES_PER_WORKER) if in_workers else 1
        num_workers = min(useful, usable_cores())
    if num_workers > 1 and not in_workers:
        raise CorpusError(
            f"num_workers must be 1 with a model, got {num_workers!r}; the model uses all cores."
        )
    if rows_per_shard is None:
        rows_per_shard = ROWS_PER_SHARD if in_workers else ROWS_PER_SHARD // 4
    described: dict[str, Any] = {
        "name": encoder.name,
        "version": encoder.version,
        "dim": encoder.dim,
    }
    feature_names = (*FEATURE_NAMES, MISMATCH_COLUMN, *encoder.feature_names)
    if reference is not None:
        described["reference_model"] = {"name": reference.name, "version": reference.version}
        feature_names = (*feature_names, *reference.feature_names)
    layout = StoreLayout(
        num_samples=num_samples,
        dim=encoder.dim,
        index_digest=index_digest,
        encoder=described,
        length_unit="characters / 4" if first.input_ids is None else "tokens",
        feature_names=feature_names,
        source_names=source_names,
        command=command,
        rows_per_shard=rows_per_shard,
        rows_per_chunk=min(ROWS_PER_CHUNK, rows_per_shard),
    )
    writer = EmbeddingWriter(path, layout)
    embedded = 0
    if overwrite or not writer.is_finished():
        with writer.open(overwrite=overwrite) as (blocks, journal):
            embedded = sum(stop - start for start, stop in map(layout.block, blocks))
            tfidf = HashedTfidf()
            pairing = PairModel(tfidf)
            if blocks:
                # Also after a kill: the same samples give the same frequencies and odds.
                _fit(texts, num_samples, tfidf, pairing)
                writer.note(misplaced_share=pairing.share)
            job = _Job(
                texts=texts,
                writer=writer,
                tfidf=tfidf,
                pairing=pairing,
                encoder=encoder,
                reference=reference,
            )
            for block in _finished(job, blocks, num_workers, progress=progress):
                journal.append({"block": block})
    return EmbedReport(
        path=str(path),
        num_samples=num_samples,
        embedded=embedded,
        dim=encoder.dim,
        feature_names=feature_names,
        num_sources=len(source_names),
        length_unit=layout.length_unit,
        misplaced_share=EmbeddingStore(path).attributes.get("misplaced_share"),
        seconds=round(time.perf_counter() - began, 3),
    )


def _fit_samples(texts: Texts, num_samples: int) -> Iterator[TextSample]:
    """All samples of a small corpus; of a large one, stretches spread evenly over it."""
    if num_samples <= FIT_SAMPLES:
        yield from texts.read(0, num_samples)
        return
    stretch = FIT_SAMPLES // _FIT_STRETCHES
    for start in np.linspace(0, num_samples - stretch, _FIT_STRETCHES).astype(np.int64):
        yield from texts.read(int(start), int(start) + stretch)


def _fit(texts: Texts, num_samples: int, tfidf: HashedTfidf, pairing: PairModel) -> None:
    """Count the words of the samples that are fitted on, then learn from pairs of them.

    Pairs are learnt from as many of the samples, cut and spread evenly over them, as
    `_PAIR_CHARACTERS` allow: they are in memory all at once.
    """
    sizes: list[int] = []

    def sized() -> Iterator[TextSample]:
        for sample in _fit_samples(texts, num_samples):
            cut = cut_sides(sample)
            sizes.append(len(cut.prompt) + len(cut.target))
            yield sample

    tfidf.fit(sized())
    every = max(1, -(-sum(sizes) // _PAIR_CHARACTERS))
    some = islice(_fit_samples(texts, num_samples), 0, None, every)
    pairing.fit([cut_sides(sample) for sample in some])


def _finished(job: _Job, blocks: list[int], num_workers: int, *, progress: bool) -> Iterator[int]:
    """Blocks as they come to be on disk."""
    from tqdm import tqdm

    layout = job.writer.layout
    todo = sum(stop - start for start, stop in map(layout.block, blocks))
    with tqdm(
        total=layout.num_samples,
        initial=layout.num_samples - todo,
        unit="sample",
        # None: shown if stderr is a terminal, so that logs stay readable.
        disable=None if progress else True,
    ) as bar:
        if num_workers == 1 or len(blocks) < 2:
            for block in blocks:
                yield job.run(block, bar.update)
            return
        # Spawned: a forked copy of a process with running threads may hang.
        context = multiprocessing.get_context("spawn")
        workers = min(num_workers, len(blocks))
        with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
            waiting: set[Future[int]] = set()
            left = iter(blocks)
            while True:
                # A bounded number under way, so that an error stops the rest.
                waiting |= {
                    pool.submit(job.run, block) for block in islice(left, workers - len(waiting))
                }
                if not waiting:
                    return
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ready:
                    block = future.result()
                    start, stop = layout.block(block)
                    bar.update(stop - start)
                    yield block


def _end_with_parent() -> None:
    """End this worker when its parent is killed: nobody would take its blocks any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def source_names(
    texts: CorpusTexts, num_samples: int, described: Mapping[str, Any]
) -> tuple[str, ...]:
    """Names of a corpus's sources, sorted: as `convert` counted them, or found in one pass.

    Args:
        texts: Reads the corpus.
        num_samples: Samples of the corpus.
        described: What `describe_corpus` gave.

    Returns:
        The names; empty if the corpus has no source column.

    Raises:
        CorpusError: If there are more than `MAX_SOURCES`: the column then names samples.
    """
    if texts.source_column is None:
        return ()
    names: set[str] = set()
    if texts.source_column == "source" and isinstance(described.get("counts"), Mapping):
        names.update(described["counts"])
    else:
        for sample in texts.iter_corpus(texts.corpus_dir, 0, num_samples):
            names.add(str(sample[texts.source_column]))
            if len(names) > MAX_SOURCES:
                break
    if len(names) > MAX_SOURCES:
        raise CorpusError(
            f"column {texts.source_column} must name at most {MAX_SOURCES} sources, got more "
            f"({', '.join(sorted(names)[:5])}, ...); pass another column, or no source at all."
        )
    return tuple(sorted(names))
