"""A Hugging Face dataset, or files, to a corpus with embeddings: made once, then found again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slap_stream.core.checks import require_whole
from slap_stream.core.files import file_digest
from slap_stream.corpus.convert import convert
from slap_stream.corpus.field_map import FieldMap
from slap_stream.corpus.inputs import find_inputs
from slap_stream.corpus.loaded import check_loaded, check_tokenizer, loaded_kind, token_columns_of
from slap_stream.corpus.peeking import token_columns_in
from slap_stream.corpus.records import check_map
from slap_stream.corpus.tokenising import (
    find_tokenizer,
    keep_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
)
from slap_stream.embeddings.embed import embed
from slap_stream.embeddings.store import EmbeddingStore
from slap_stream.errors import ConfigError, CorpusError
from slap_stream.shards.index import INDEX_NAME, corpus_columns, corpus_size, unhashed_contents
from slap_stream.shards.opening import open_local
from slap_stream.text.chat import Truncate, check_truncate

logger = logging.getLogger(__name__)

# Part of every name: what another version would make of the same is another corpus.
_VERSION = 1
_HASHING = "hashing"
_SOURCE_FIELD = "source"
_OWN_STORE = "embeddings.zarr"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A corpus with its embeddings, ready to be trained on.

    Attributes:
        corpus: Directory of its shards.
        embeddings: Its `embeddings.zarr`.
        index_digest: SHA-256 of its index.json, which stands for its samples and their order.
        num_samples: In the corpus.
        found: Whether all of it was there already.
    """

    corpus: Path
    embeddings: Path
    index_digest: str
    num_samples: int
    found: bool

    def dataset(self, batch_size: int) -> Any:
        """A `StreamingDataset` over the shards, for `SlapDataLoader`; every rank makes its own."""
        return open_local(self.corpus, require_whole("batch_size", batch_size, 1))


def prepare(
    dataset: Any,
    out: str | Path,
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncate: Truncate = "right",
    encoder: str = _HASHING,
    seed: int = 0,
    source_field: str | None = _SOURCE_FIELD,
    fields: Mapping[str, str] | None = None,
    num_workers: int | None = None,
    progress: bool | None = None,
) -> Prepared:
    """Make a corpus with embeddings of a dataset, or find the one that was made of it.

        prepared = prepare(load_dataset("json", data_files="chats.jsonl", split="train"), "corpus")
        loader = SlapDataLoader(prepared.dataset(32), embeddings=prepared.embeddings, ...)

    What was made is known by the dataset and by all settings that decide what the corpus holds: a
    `Dataset` by its fingerprint; files by their names, sizes and times; an `IterableDataset` by
    its definition and its first rows, which is all that can be known of it without reading it (if
    what it reads has changed further on, name another `out`). Anything else gets a folder of its
    own beside those that are there, which stay.

    It can be interrupted: what was done is not done again, but for the reading of an
    `IterableDataset`. Where torch.distributed is initialised, all ranks call it: the first one
    works and the others wait; then ranks that do not see its folder, because their node has disks
    of its own, make the same there, one process a node. Otherwise, whoever comes first works.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset` with columns of one of
            `records.KNOWN_SHAPES`; a path to JSON lines, Parquet, a dataset saved to disk or a
            directory of such files; or a directory of MDS shards, which are left as they are.
        out: Directory for this and other corpora; made if it is not there.
        tokenizer: A Hugging Face tokenizer, or its path or name. The corpus then holds its tokens,
            with a mask of what is learnt; None keeps messages. Of a dataset that was tokenised
            before, the one that has done it: the texts that are embedded are what it makes of them.
        max_length: Tokens kept of a record; None keeps all, as it must of shards.
        truncate: As for `convert`.
        encoder: As for `embed`.
        seed: Of the shuffle.
        source_field: Field that names a record's source; None: all are one source. Shards have
            theirs already.
        fields: As for `convert`; None for shards, whose columns `slap-embed` is told.
        num_workers: Processes; None means as many as are useful.
        progress: Whether to show bars on stderr; None means if that is a terminal.

    Raises:
        TypeError: If the dataset is none of these.
        ConfigError: If an option is out of range, or the tokenizer cannot be used.
        CorpusError: If the dataset cannot be used.
    """
    # Loads torch, which those who only import this need not wait for.
    from slap_stream.integrations.first_rank import first_rank_first

    def work() -> _Work:
        asked = _Work(
            dataset=dataset,
            out=Path(out),
            tokenizer=tokenizer,
            max_length=max_length,
            truncate=truncate,
            encoder=encoder,
            seed=seed,
            source_field=source_field,
            fields=fields,
            num_workers=num_workers,
            progress=progress,
        )
        return asked.checked()

    # Checked in there: a rank that fails before would keep the others waiting.
    return first_rank_first(lambda: work().begin(), lambda begun: work().follow(begun))[1]


def check_source(
    dataset: Any, name: str = "dataset", *, besides: str = "", fields: FieldMap | None = None
) -> None:
    """Refuse what is no source of a corpus, before anything is read.

    Args:
        dataset: What was given.
        name: Of the argument, for the error.
        besides: What else the caller takes, likewise.
        fields: Names in the data for known ones.

    Raises:
        TypeError: If it is neither a dataset nor a path.
        CorpusError: If it is several splits, lies elsewhere, or is not there.
    """
    if loaded_kind(dataset) is not None:
        check_loaded(dataset, fields)
        return
    if not isinstance(dataset, str | Path):
        raise TypeError(
            f"{name} must be a datasets.Dataset, an IterableDataset{besides} or a path, got "
            f"{type(dataset).__name__}; datasets.Dataset.from_list makes one of a list of records."
        )
    if "://" in str(dataset):
        raise CorpusError(
            f"{name} must be a path on this machine, got {str(dataset)!r}; stream other files by "
            "datasets.load_dataset(..., streaming=True), and MDS shards by "
            "StreamingDataset(remote=..., local=...), with embeddings that slap-embed has made."
        )
    if not Path(dataset).exists():
        raise CorpusError(
            f"{name} must exist, got {str(dataset)!r}; check the path, or, for a dataset of the "
            f"hub, hand over datasets.load_dataset({str(dataset)!r}, split='train')."
        )


def is_shards(dataset: Any) -> bool:
    """Whether a dataset is a path to MDS shards."""
    return isinstance(dataset, str | Path) and (Path(dataset) / INDEX_NAME).is_file()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What is asked for, by the names of `prepare`'s arguments."""

    dataset: Any
    out: Path
    tokenizer: Any
    max_length: int | None
    truncate: Truncate
    encoder: str
    seed: int
    source_field: str | None
    fields: Mapping[str, str] | None
    num_workers: int | None
    progress: bool | None

    def checked(self) -> _Work:
        """The same with its tokenizer loaded; wrong arguments are refused before all else."""
        check_source(self.dataset, fields=check_map(self.fields))
        if self.out.exists() and not self.out.is_dir():
            raise CorpusError(f"out must be a directory, got the file {str(self.out)!r}.")
        tokenizer, max_length = self.tokenizer, self.max_length
        if is_shards(self.dataset):
            for name, value, default in (
                ("max_length", max_length, None),
                ("source_field", self.source_field, _SOURCE_FIELD),
                ("fields", self.fields or None, None),
            ):
                if value != default:
                    raise ConfigError(
                        f"{name} must be {default!r} for MDS shards, got {value!r}; they are left "
                        "as they are: give it to slap-convert, which makes them."
                    )
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(find_tokenizer(tokenizer))
        if max_length is not None:
            if tokenizer is None:
                raise ConfigError(
                    f"max_length must be None without a tokenizer, got {max_length!r}; it counts "
                    "tokens."
                )
            max_length = require_whole("max_length", max_length, 2)
        check_tokenizer(self.dataset, tokenizer, check_map(self.fields))
        check_truncate(self.truncate, max_length)
        seed = require_whole("seed", self.seed, 0)
        return replace(self, tokenizer=tokenizer, max_length=max_length, seed=seed)

    def begin(self) -> tuple[str, Prepared]:
        """On the first rank: the name of the corpus, and the corpus."""
        name = self._name()
        return name, self._make(name)

    def follow(self, begun: tuple[str, Prepared]) -> tuple[str, Prepared]:
        """On another rank: the same, as it is found or made there.

        The name is that of the first rank: what `datasets` cannot name by its content has another
        fingerprint in every process.
        """
        name, first = begun
        mine = self._make(name)
        if mine.index_digest != first.index_digest:
            raise CorpusError(
                f"dataset must be the same on all ranks, got another corpus in {str(mine.corpus)!r}"
                f" than the first rank has in {str(first.corpus)!r}; use a folder that all ranks "
                "see, or the same files on every node."
            )
        return name, mine

    def _name(self) -> str:
        if is_shards(self.dataset):
            name = f"embeddings-{file_digest(Path(self.dataset) / INDEX_NAME)[:16]}"
            # An index without hashes is the same for other samples of as many bytes. Where the
            # shards have embeddings of their own the loader sees whether these are theirs.
            own = (Path(self.dataset) / _OWN_STORE).exists()
            contents = () if own else unhashed_contents(self.dataset)
            if contents:
                name = f"{name}-{_digest(contents)[:8]}"
            if self.tokenizer is None or "input_ids" not in corpus_columns(Path(self.dataset)):
                return name
            # The texts that are embedded are what this one makes of the tokens.
            return f"{name}-{tokenizer_fingerprint(self.tokenizer)[:8]}"
        mapped, tokenised = check_map(self.fields), self.tokenizer is not None
        found = find_inputs([self.dataset], mapped, tokenised=tokenised)
        told = {
            "version": _VERSION,
            "dataset": [entry.fingerprint() for entry in found],
            "tokenizer": None if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer),
            "max_length": self.max_length,
            "seed": self.seed,
            "source_field": self.source_field,
        }
        columns_of = token_columns_in if loaded_kind(self.dataset) is None else token_columns_of
        if mapped is None and tokenised and columns_of(self.dataset):
            # Texts beside them were what counted once.
            told["tokens"] = True
        # Left out where they say nothing, so that corpora of before are found again.
        if self.truncate != "right":
            told["truncate"] = self.truncate
        if mapped is not None:
            told["fields"] = mapped.to_dict()
        return f"corpus-{_digest(told)}"

    def _make(self, name: str) -> Prepared:
        shards = is_shards(self.dataset)
        corpus = Path(self.dataset) if shards else self.out / name
        store = self._store(corpus, name)
        found = (corpus / INDEX_NAME).is_file() and store.exists()
        if not found:
            self.out.mkdir(parents=True, exist_ok=True)
            with _turn(self.out / f"{name}.lock", corpus):
                if not (corpus / INDEX_NAME).is_file():
                    self._convert(corpus)
                if not store.exists():
                    self._embed(corpus, store)
        digest, num_samples = file_digest(corpus / INDEX_NAME), corpus_size(corpus)
        EmbeddingStore(store).verify(digest, num_samples)
        logger.info("%s %s: %d samples", "found" if found else "made", corpus, num_samples)
        return Prepared(
            corpus=corpus,
            embeddings=store,
            index_digest=digest,
            num_samples=num_samples,
            found=found,
        )

    def _store(self, corpus: Path, name: str) -> Path:
        ending = "" if self.encoder == _HASHING else f"-{_digest(self.encoder)[:8]}"
        if not is_shards(self.dataset):
            return corpus / f"embeddings{ending}.zarr"
        # Nothing is written into a folder that is not ours.
        own = corpus / _OWN_STORE
        return own if own.exists() else self.out / f"{name}{ending}.zarr"

    def _convert(self, corpus: Path) -> None:
        if not corpus.exists() and any(self.out.glob("corpus-*/")):
            _warn_of_others(self.out.resolve())
        logger.info("making %s; later runs find it there", corpus)
        report = convert(
            self.dataset,
            corpus,
            tokenizer=self._kept_tokenizer(),
            max_length=self.max_length,
            truncate=self.truncate,
            seed=self.seed,
            num_workers=self.num_workers,
            source_field=self.source_field,
            fields=self.fields,
            progress=self.progress,
            command="slap_stream.prepare",
        )
        for reason, count in report.dropped.items():
            logger.warning(
                "%d of the records are left out: %s, as in %s",
                count,
                reason,
                ", ".join(report.examples[reason]),
            )
        if report.truncated:
            logger.warning(
                "%d of %d samples are cut to max_length=%d tokens",
                report.truncated,
                report.num_samples,
                self.max_length,
            )
        if report.unused:
            fields = sorted(report.unused.items(), key=lambda item: (-item[1], item[0]))
            logger.warning(
                "fields that are not used, with the number of records that have them: %s",
                ", ".join(f"{name} ({count})" for name, count in fields),
            )
        if report.shared:
            logger.warning(
                "%d answers share their first token with the header before them, which the model "
                "never says alone; they are learnt",
                report.shared,
            )

    def _embed(self, corpus: Path, store: Path) -> None:
        columns = corpus_columns(corpus)
        if not {"messages", "input_ids"} & columns.keys():
            raise CorpusError(
                f"the shards must have a column messages or input_ids, got {sorted(columns)!r} in "
                f"{str(corpus)!r}; run slap-embed on them with --text-column, or with "
                "--prompt-column and --completion-column: its embeddings.zarr is then found."
            )
        embed(
            corpus,
            out=store,
            encoder=self.encoder,
            tokenizer=self._kept_tokenizer() if "input_ids" in columns else None,
            num_workers=self.num_workers,
            progress=self.progress,
            command="slap_stream.prepare",
        )

    def _kept_tokenizer(self) -> str | None:
        """A copy of the tokenizer that worker processes, and later runs, can load."""
        if self.tokenizer is None:
            return None
        from transformers import __version__ as version

        # Versions before 5 cannot load what later ones have saved.
        major = version.partition(".")[0]
        name = f"tokenizer-{tokenizer_fingerprint(self.tokenizer)[:16]}-v{major}"
        return keep_tokenizer(self.tokenizer, self.out / name)


@cache
def _warn_of_others(out: Path) -> None:
    """Say that a folder fills, once in this process."""
    logger.warning(
        "%s holds %d corpora of other data or settings, and gets one more; delete what you need no "
        "more",
        out,
        len(list(out.glob("corpus-*/"))),
    )


@contextmanager
def _turn(lock_file: Path, corpus: Path) -> Iterator[None]:
    """Wait while another process makes the same corpus."""
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process makes %s; waiting for it", corpus)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
