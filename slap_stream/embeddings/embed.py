"""From a corpus to its `embeddings.zarr`: fit, encode block by block, go on after a kill."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from slap_stream.core.checks import require_whole
from slap_stream.core.files import file_digest, local_path, path_to_write
from slap_stream.core.processes import run_jobs, usable_cores
from slap_stream.embeddings.corpus_texts import CORPUS_NAME, CorpusTexts, source_names
from slap_stream.embeddings.encoders import Encoder, open_encoder
from slap_stream.embeddings.features import FEATURE_NAMES, FIT_SAMPLES, HashedTfidf, feature_columns
from slap_stream.embeddings.judge import FIT_SAMPLES as SOME_SAMPLES
from slap_stream.embeddings.judge import Judge
from slap_stream.embeddings.layout import (
    METADATA_NAME,
    ROWS_PER_CHUNK,
    STORE_NAME,
    StoreLayout,
    attributes_in,
    require_embeddings,
)
from slap_stream.embeddings.pairing import PairModel, cut_sides
from slap_stream.embeddings.reference import ReferenceLoss
from slap_stream.embeddings.store import EmbeddingStore, EmbeddingWriter
from slap_stream.embeddings.target_set import COLUMNS, Relevance, read_examples
from slap_stream.errors import ConfigError, CorpusError
from slap_stream.remote.bucket import download
from slap_stream.remote.cache import FileCache, scratch
from slap_stream.remote.output import Output, output_to
from slap_stream.remote.urls import is_remote, parse_url
from slap_stream.shards.index import INDEX_NAME, corpus_size, unhashed_contents
from slap_stream.text.sample import TextSample
from slap_stream.types import MISMATCH_COLUMN, RELEVANCE_COLUMN, Float32Array, Rows

# Samples held as text at once, per process.
_BATCH = 512
SAMPLES_PER_WORKER = 65_536
# Stretches of the corpus that document frequencies are counted on.
_FIT_STRETCHES = 20
# Columns that a target set is told by.
_TELLING = [FEATURE_NAMES.index(name) for name in COLUMNS]
# Characters of the samples that pairs are learnt from; all of them are in memory at once.
_PAIR_CHARACTERS = 3_000_000


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
        judge_tokens: Tokens that the judge model has read in this call.
        relevant_share: Share of the corpus that is of the target set's kind; None without one.
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
    judge_tokens: int
    relevant_share: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, for JSON."""
        return asdict(self)


def embed(
    corpus: str | Path,
    *,
    out: str | Path | None = None,
    encoder: str = "hashing",
    dim: int | None = None,
    reference_model: str | Path | None = None,
    judge_model: str | Path | None = None,
    target: str | Path | None = None,
    device: str | None = None,
    tokenizer: str | Path | None = None,
    text_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    source_column: str | None = "source",
    num_workers: int | None = None,
    rows_per_chunk: int | None = None,
    overwrite: bool = False,
    scratch_dir: str | Path | None = None,
    progress: bool | None = None,
    command: str | None = None,
) -> EmbedReport:
    """Embed every sample of a corpus of MDS shards.

    A call that was cut off, by whatever, goes on when it is made again; called again on what is
    finished, with the same settings, it does nothing. Memory does not grow with the corpus.

    Args:
        corpus: Directory with an index.json and all shards, or its URL; `convert` need not have
            made it.
        out: Where the finished store will be, a directory or a URL; None means `embeddings.zarr` in
            the corpus.
        encoder: `hashing`, which needs no download, or `hf:PATH` of a Hugging Face encoder.
        dim: Length of a hashing vector; None means 384.
        reference_model: Path or name of a causal language model, which adds the column
            `reference_loss`, in nats per token.
        judge_model: Path or name of a causal language model, as a rule the one that is to be
            trained. It reads the beginning of every sample once, which adds the column
            `judge_loss`, in nats per token, and raises `mismatch` where that loss stands out.
        target: Examples of what the model is to become good at, some 50 or more: a file that
            `convert` takes, or a directory of MDS shards. Adds the column `relevance`, by which
            what is not of their kind is pruned first.
        device: torch device of the models; None means the GPU if there is one.
        tokenizer: Path or name of the tokenizer that decodes `input_ids`; None means the one that
            corpus.json names.
        text_column: Column with plain text, of a corpus that has neither `messages` nor
            `input_ids`.
        prompt_column: Column with the prompt, likewise; goes with `completion_column`.
        completion_column: Column with the target.
        source_column: Column that names a sample's source; `source` need not be there. None: the
            sources are not told apart.
        num_workers: Processes; None means one per core, fewer for a small corpus, and 1 for
            models, which use all cores.
        rows_per_chunk: Rows of one file; None means 16,384, a quarter of that for models.
        overwrite: Replace the embeddings that are there.
        scratch_dir: Where to work for a URL, on a local disk with room for the embeddings; None: a
            folder of this user's in the one for temporary files.
        progress: Whether to show a bar on stderr; None means if that is a terminal.
        command: What to write into the store as the command that made it.

    Raises:
        ConfigError: If an option is out of range, or a model or tokenizer cannot be loaded.
        CorpusError: If the corpus cannot be read as text, or something else is in the way.
        RemoteError: If a file of an object store cannot be had or written.
    """
    began = time.perf_counter()
    place, shards = _places(corpus, out, scratch_dir)
    corpus = local_path("corpus", corpus) if shards is None else shards.directory
    num_samples = corpus_size(corpus)
    if num_samples < 1:
        raise CorpusError("the corpus must have at least one sample, got 0; nothing to embed.")
    texts = CorpusTexts(
        corpus_dir=corpus,
        tokenizer=tokenizer,
        text_column=text_column,
        prompt_column=prompt_column,
        completion_column=completion_column,
        source_column=source_column,
        remote=shards,
    ).found()
    examples = None if target is None else read_examples(target, texts)
    names = source_names(texts, num_samples)
    first = next(iter(texts.read(0, 1)))
    opened = open_encoder(encoder, dim=dim, device=device)
    reference = None
    if reference_model is not None:
        reference = ReferenceLoss(str(reference_model), device, tokenizer=texts.tokenizer)
    judge = None
    if judge_model is not None:
        judge = Judge(str(judge_model), device, tokenizer=texts.tokenizer, source_names=names)
    in_workers = opened.in_workers and reference is None and judge is None
    if num_workers is None:
        # A process takes seconds to start, in which one that runs embeds tens of thousands.
        useful = max(1, num_samples // SAMPLES_PER_WORKER) if in_workers else 1
        num_workers = min(useful, usable_cores())
    if require_whole("num_workers", num_workers, 0) > 1 and not in_workers:
        raise ConfigError(
            f"num_workers must be 1 with a model, got {num_workers!r}; the model uses all cores."
        )
    if rows_per_chunk is None:
        rows_per_chunk = ROWS_PER_CHUNK if in_workers else ROWS_PER_CHUNK // 4
    rows_per_chunk = require_whole("rows_per_chunk", rows_per_chunk, 1)
    described: dict[str, Any] = {"name": opened.name, "version": opened.version, "dim": opened.dim}
    feature_names = (*FEATURE_NAMES, MISMATCH_COLUMN, *opened.feature_names)
    if reference is not None:
        described["reference_model"] = {"name": reference.name, "version": reference.version}
        feature_names = (*feature_names, *reference.feature_names)
    if judge is not None:
        described["judge_model"] = {"name": judge.name, "version": judge.version}
        feature_names = (*feature_names, *judge.feature_names)
    if examples is not None:
        described["target"] = {"digest": examples.digest, "records": len(examples.samples)}
        feature_names = (*feature_names, RELEVANCE_COLUMN)
    layout = StoreLayout(
        num_samples=num_samples,
        dim=opened.dim,
        index_digest=file_digest(corpus / INDEX_NAME),
        encoder=described,
        length_unit="characters / 4" if first.input_ids is None else "tokens",
        feature_names=feature_names,
        source_names=names,
        command=command or "",
        shard_hashes=unhashed_contents(corpus, shards),
        rows_per_chunk=rows_per_chunk,
    )
    writer = EmbeddingWriter(place.local, layout)
    found = _whole(place, layout, overwrite)
    embedded = 0
    # Of work for a URL nothing is left but that of the same call.
    anew = overwrite and place.url is None
    if found is None and (anew or not writer.is_finished()):
        with writer.open(overwrite=anew) as blocks:
            sizes = [stop - start for start, stop in map(layout.block, blocks)]
            embedded = sum(sizes)
            tfidf = HashedTfidf()
            pairing = PairModel(tfidf)
            relevance = None if examples is None else Relevance(examples)
            if blocks:
                # Also after a kill: the same samples give the same frequencies and odds.
                _fit(texts, num_samples, tfidf, pairing)
                if judge is not None:
                    judge.fit(_spread_samples(texts, num_samples))
                writer.note(misplaced_share=pairing.assumed)
                if relevance is not None:
                    relevance.fit(
                        _spread_samples(texts, num_samples),
                        lambda samples: _described(samples, tfidf, opened),
                    )
                    writer.note(relevant_share=relevance.share)
            maker = _RowMaker(
                texts=texts,
                writer=writer,
                tfidf=tfidf,
                pairing=pairing,
                encoder=opened,
                reference=reference,
                judge=judge,
                relevance=relevance,
            )
            jobs = [(maker, block) for block in blocks]
            with tqdm(
                total=num_samples,
                initial=num_samples - embedded,
                unit="sample",
                disable=None if progress is None else not progress,
            ) as bar:
                run_jobs(_write_block, jobs, sizes, num_workers=num_workers, bar=bar)
    if found is None:
        found = EmbeddingStore(place.local).attributes
        place.publish(progress=progress)
    else:
        place.close()
    if shards is not None:
        shards.remove()
    return EmbedReport(
        path=str(place),
        num_samples=num_samples,
        embedded=embedded,
        dim=layout.dim,
        feature_names=feature_names,
        num_sources=len(names),
        length_unit=layout.length_unit,
        misplaced_share=found.get("misplaced_share"),
        judge_tokens=0 if judge is None else judge.tokens,
        relevant_share=found.get("relevant_share"),
        seconds=round(time.perf_counter() - began, 3),
    )


def _places(
    corpus: str | Path, out: str | Path | None, scratch_dir: str | Path | None
) -> tuple[Output, FileCache | None]:
    """Where the store goes; and, of a corpus elsewhere, what fetches its shards."""
    if not is_remote(corpus):
        local = local_path("corpus", corpus)
        if out is None:
            # Whether that is a directory is asked when it is read.
            return Output(local / STORE_NAME, None, METADATA_NAME), None
        return output_to("out", out, scratch_dir, last=METADATA_NAME), None
    url = parse_url("corpus", corpus)
    out = str(url.below(STORE_NAME)) if out is None else out
    place = output_to("out", out, scratch_dir if is_remote(out) else None, last=METADATA_NAME)
    root = None if scratch_dir is None else path_to_write("scratch_dir", scratch_dir)
    index = download(url.below(INDEX_NAME))
    if index is None:
        raise CorpusError(
            f"corpus must be a folder with an {INDEX_NAME}, got {str(url)!r}, which has none; "
            "check the address, or wait until all is uploaded."
        )
    # A corpus that is written anew is another one; and what ends first removes its own shards.
    told = f"{url} {hashlib.sha256(index).hexdigest()} {place.local.absolute()}"
    known = scratch("corpus", told, root)
    shards = FileCache(str(url), known)
    shards.note(INDEX_NAME)
    shards.note(CORPUS_NAME)
    return place, shards


def _whole(place: Output, layout: StoreLayout, overwrite: bool) -> dict[str, Any] | None:
    """What the same store says of itself that is whole elsewhere; None if there is work to do."""
    told = place.described(METADATA_NAME)
    if told is None:
        place.claim(layout.plan(), overwrite=overwrite)
        return None
    attributes = attributes_in(told.get(METADATA_NAME, b""))
    if overwrite:
        require_embeddings(attributes, str(place))
        place.claim(layout.plan(), overwrite=True)
        return None
    layout.require_same(attributes, str(place))
    return attributes


@dataclass(frozen=True, kw_only=True, slots=True)
class _RowMaker:
    """All that turns samples into rows; travels to worker processes."""

    texts: CorpusTexts
    writer: EmbeddingWriter
    tfidf: HashedTfidf
    pairing: PairModel
    encoder: Encoder
    reference: ReferenceLoss | None
    judge: Judge | None
    relevance: Relevance | None

    def rows(self, start: int, stop: int, advance: Callable[[int], None]) -> Rows:
        """Rows of samples `start` to `stop`, which are read as few at a time as is fast."""
        layout = self.writer.layout
        number = {name: index for index, name in enumerate(layout.source_names)}
        embedding = np.empty((stop - start, layout.dim), dtype=np.float32)
        feature = np.empty((stop - start, len(layout.feature_names)), dtype=np.float32)
        length = np.empty(stop - start, dtype=np.int32)
        source = np.zeros(stop - start, dtype=np.int16)
        samples = self.texts.read(start, stop)
        for at in range(0, stop - start, _BATCH):
            batch = list(islice(samples, _BATCH))
            assert len(batch) == min(_BATCH, stop - start - at)
            here = slice(at, at + len(batch))
            pairs = self.tfidf.transform(batch)
            embedding[here], extra = self.encoder.encode(batch, pairs)
            told = feature_columns(batch, pairs)
            mismatch = self.pairing.mismatch(batch, pairs, told)
            columns = [told, mismatch[:, None], extra]
            if self.reference is not None:
                columns.append(self.reference.columns(batch))
            if self.judge is not None:
                losses, unlikely = self.judge.judge(batch)
                columns.append(losses[:, None])
                # Words and model see different things; either is enough.
                mismatch[:] = 1.0 - (1.0 - mismatch) * (1.0 - unlikely)
            if self.relevance is not None:
                telling = told[:, _TELLING]
                columns.append(self.relevance.relevance(batch, embedding[here], telling)[:, None])
            feature[here] = np.concatenate(columns, axis=1)
            length[here] = [sample.length for sample in batch]
            if number:
                source[here] = [_source_number(number, s, start + at) for s in batch]
            advance(at + len(batch))
        return Rows(embedding=embedding, length=length, feature=feature, source=source)


def _write_block(job: tuple[_RowMaker, int], advance: Callable[[int], None]) -> None:
    maker, block = job
    maker.writer.write(block, maker.rows(*maker.writer.layout.block(block), advance))


def _source_number(number: dict[str, int], sample: TextSample, near: int) -> int:
    if sample.source is None or sample.source not in number:
        raise CorpusError(
            f"source must be one of the corpus's {len(number)}, got {sample.source!r} near sample "
            f"{near}; corpus.json does not describe these shards."
        )
    return number[sample.source]


def _fit_samples(texts: CorpusTexts, num_samples: int) -> Iterator[TextSample]:
    """All samples of a small corpus; of a large one, stretches spread evenly over it."""
    if num_samples <= FIT_SAMPLES:
        yield from texts.read(0, num_samples)
        return
    stretch = FIT_SAMPLES // _FIT_STRETCHES
    for start in np.linspace(0, num_samples - stretch, _FIT_STRETCHES).astype(np.int64):
        yield from texts.read(int(start), int(start) + stretch)


def _described(
    samples: Sequence[TextSample], tfidf: HashedTfidf, encoder: Encoder
) -> tuple[Float32Array, Float32Array]:
    """(n, dim) embeddings and (n, columns) columns of n samples, by which a target set is told."""
    embeddings, columns = [], []
    for start in range(0, len(samples), _BATCH):
        batch = samples[start : start + _BATCH]
        pairs = tfidf.transform(batch)
        embeddings.append(encoder.encode(batch, pairs)[0])
        columns.append(feature_columns(batch, pairs)[:, _TELLING])
    return np.concatenate(embeddings), np.concatenate(columns)


def _spread_samples(texts: CorpusTexts, num_samples: int) -> list[TextSample]:
    """Some of the samples that are fitted on, spread evenly over them."""
    every = -(-min(num_samples, FIT_SAMPLES) // SOME_SAMPLES)
    return [*islice(_fit_samples(texts, num_samples), 0, None, every)]


def _fit(texts: CorpusTexts, num_samples: int, tfidf: HashedTfidf, pairing: PairModel) -> None:
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
