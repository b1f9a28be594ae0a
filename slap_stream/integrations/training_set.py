"""What a Trainer is given to train on, as a `StreamingDataset` with embeddings and a collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from slap_stream.corpus.loaded import token_columns_of
from slap_stream.corpus.messages import DropReason, RecordDropped, is_given
from slap_stream.corpus.peeking import token_columns_in
from slap_stream.corpus.records import normalise
from slap_stream.corpus.token_rows import holds_tokens, read_tokens
from slap_stream.errors import ConfigError, CorpusError
from slap_stream.integrations.first_rank import first_rank_first
from slap_stream.integrations.prepare import Prepared, check_source, is_shards, prepare
from slap_stream.shards.index import corpus_columns
from slap_stream.shards.opening import is_stock, open_local
from slap_stream.text.chat import ATTENTION, Truncate
from slap_stream.text.collate import ChatCollator
from slap_stream.types import IGNORED_LABEL

# A Trainer that pushes its output_dir to the hub leaves out what begins with an underscore.
CORPUS_FOLDER = "_slap_corpus"
# Where a tokenizer knows of no limit it names a number beyond all of them.
_NO_LIMIT = 1 << 24
# Fields beside `messages` that belong to a conversation.
_BESIDE = ("system", "system_prompt", "history", "tools")


class RecordCollator(ChatCollator):
    """A `ChatCollator` that takes records of all known shapes, for an evaluation set as it is."""

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate samples of a corpus, or records."""
        return super().__call__([_as_sample(sample) for sample in samples])


class AsTokenised:
    """Hands a collator the rows of a dataset that was tokenised before, as it was handed over.

    Its labels, mask and padding are those of the dataset, so that the collator makes the same of
    them; of several masks each is what all of them say.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], columns: Sequence[str]) -> None:
        """
        Args:
            collate: The caller's.
            columns: Of the dataset, as `token_columns` gives them.
        """
        self._collate, self._columns = collate, columns

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        return self._collate([self.row(sample) for sample in samples])

    def row(self, sample: Mapping[str, Any]) -> dict[str, list[int]]:
        """A sample as its row was."""
        ids, learnt = (np.asarray(sample[name]).tolist() for name in ("input_ids", "supervised"))
        row = dict.fromkeys(self._columns, learnt) | {"input_ids": ids}
        if ATTENTION in row:
            shown = sample.get(ATTENTION)
            row[ATTENTION] = [1] * len(ids) if shown is None else np.asarray(shown).tolist()
        if "labels" in row:
            pairs = zip(ids, learnt, strict=True)
            row["labels"] = [token if mark else IGNORED_LABEL for token, mark in pairs]
        return row


def with_training_set(
    given: Mapping[str, Any],
    embeddings: Any,
    corpus: str | Path | None,
    args: TrainingArguments,
    *,
    collate: bool = True,
    tokenised: bool = False,
) -> tuple[dict[str, Any], Any]:
    """A Trainer's arguments with a training set that can be streamed, and its embeddings.

    A `datasets.Dataset` or `IterableDataset`, a path or what `prepare` returned takes the place of
    a `StreamingDataset`: it is prepared here, in `corpus`. Its samples are tokenised if there is a
    tokenizer, the Trainer's or the `ChatCollator`'s; what was tokenised before stays as it is.
    Where no collator is given, chats and tokens get a `ChatCollator`.

    Args:
        given: The Trainer's arguments by name.
        embeddings: The training set's, if the caller has made them.
        corpus: Where corpora are made; None means `_slap_corpus` in the Trainer's output_dir.
        args: The Trainer's settings.
        collate: Whether a collator is made where none is given.
        tokenised: Whether its rows were tokenised before, as `token_columns` finds out.

    Raises:
        TypeError: If the training set is of no known kind.
        ConfigError: If arguments contradict each other.
        CorpusError: If the dataset cannot be used.
    """
    given = dict(given)
    dataset = given.get("train_dataset")
    if dataset is not None and corpus is not None:
        _check_corpus(dataset, embeddings, corpus)
    tokenizer, max_length = tokenizer_and_length(given, args)
    if dataset is not None and not _streams(dataset):
        chosen = given.get("processing_class", given.get("tokenizer"))
        known = isinstance(chosen, PreTrainedTokenizerBase)
        if collate and not known and given.get("data_collator") is None:
            raise ConfigError(
                "processing_class must be a tokenizer where a training set is prepared and no "
                f"data_collator is given, got {type(chosen).__name__}; load one with "
                "AutoTokenizer.from_pretrained(...)."
            )
        cut_to, decoder = max_length, tokenizer
        if tokenised:
            cut_to, decoder = max_length_of_tokens(args), _decoder(given)
        # A collator that cuts otherwise finds nothing left to cut in what is prepared.
        dataset, embeddings = _open(
            dataset, embeddings, corpus, args, decoder, cut_to, truncation(given)
        )
        given["train_dataset"] = dataset
    if collate and given.get("data_collator") is None and tokenizer and _holds_chats(dataset):
        given["data_collator"] = RecordCollator(
            tokenizer,
            max_length=max_length,
            pad_to_multiple_of=getattr(args, "pad_to_multiple_of", None),
        )
    return given, embeddings


def token_columns(dataset: Any) -> tuple[str, ...]:
    """Token fields of a training set that was tokenised before, as far as they are read; else none.
    Of files those that their first records have, which the first rank looks at.

    Raises:
        CorpusError: If a file cannot be read.
    """
    if not isinstance(dataset, str | Path):
        return token_columns_of(dataset)

    def look() -> tuple[str, ...]:
        _check(dataset)
        return () if is_shards(dataset) else token_columns_in(dataset)

    return first_rank_first(look, lambda found: found)


def tokenizer_and_length(
    given: Mapping[str, Any], args: TrainingArguments
) -> tuple[Any, int | None]:
    """What makes token ids of the samples, and of how many at most; no tokenizer: nothing does."""
    tokenizer = _tokenizer(given, args)
    return tokenizer, None if tokenizer is None else _max_length(given, args, tokenizer)


def max_length_of_tokens(args: TrainingArguments) -> int | None:
    """Tokens of a sample that was tokenised before, at most: what TRL's settings say, where TRL
    would prepare it. The stock Trainer takes rows as long as they are; its collator may cut."""
    if (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
        return None
    length: int | None = getattr(args, "max_length", None)
    return length


def _decoder(given: Mapping[str, Any]) -> Any:
    """The tokenizer that made the token ids of a dataset: what is embedded are its texts."""
    chosen = given.get("processing_class", given.get("tokenizer"))
    for owner in (chosen, given.get("data_collator")):
        found = getattr(owner, "tokenizer", owner)
        if isinstance(found, PreTrainedTokenizerBase):
            return found
    raise ConfigError(
        "processing_class must be the tokenizer that made the input_ids of train_dataset, got "
        f"{type(chosen).__name__}; the texts that are embedded are what it makes of them."
    )


def truncation(given: Mapping[str, Any]) -> Truncate:
    """What is done with longer samples: what the collator does."""
    collator = given.get("data_collator")
    return collator.truncate if isinstance(collator, ChatCollator) else "right"


def _open(
    dataset: Any,
    embeddings: Any,
    corpus: str | Path | None,
    args: TrainingArguments,
    tokenizer: Any,
    max_length: int | None,
    truncate: Truncate,
) -> tuple[Any, Any]:
    if not isinstance(dataset, Prepared):
        # On all ranks: one that has not what the others have would keep them waiting.
        first_rank_first(partial(_check, dataset), lambda _: _check(dataset))
        if is_shards(dataset) and embeddings is not None:
            return open_local(Path(dataset), args.per_device_train_batch_size), embeddings
    if embeddings is not None:
        raise ConfigError(
            f"embeddings must be None with a {type(dataset).__name__} as train_dataset, got "
            f"{embeddings!r}; its samples are shuffled when they are prepared, and the embeddings "
            "are made with them: bring your own with a StreamingDataset."
        )
    if not isinstance(dataset, Prepared):
        # No seed of the training: another one must not make another corpus.
        dataset = prepare(
            dataset,
            Path(args.output_dir) / CORPUS_FOLDER if corpus is None else corpus,
            tokenizer=tokenizer,
            # Shards are as long as they are; the collator cuts what it is given.
            max_length=None if is_shards(dataset) else max_length,
            truncate="right" if is_shards(dataset) or max_length is None else truncate,
            # As the Trainer's own bars are.
            progress=not args.disable_tqdm,
        )
    return dataset.dataset(args.per_device_train_batch_size), dataset.embeddings


def _check_corpus(dataset: Any, embeddings: Any, corpus: str | Path) -> None:
    """Refuse a folder for corpora beside a training set of which nothing is made."""
    kind = None
    if _streams(dataset) or isinstance(dataset, Prepared):
        kind = f"a {type(dataset).__name__}"
    elif is_shards(dataset) and embeddings is not None:
        kind = "MDS shards and their embeddings"
    if kind is not None:
        raise ConfigError(
            f"corpus must be None with {kind} as train_dataset, got {str(corpus)!r}; it is where "
            "a dataset of another kind is converted to."
        )


def _check(dataset: Any) -> None:
    check_source(dataset, "train_dataset", besides=", a streaming.StreamingDataset")


def _streams(dataset: Any) -> bool:
    return hasattr(dataset, "streams")


def _holds_chats(dataset: Any) -> bool:
    """Whether samples are what a `ChatCollator` reads; a subclass may make others of them."""
    if not is_stock(dataset):
        return False
    return all(
        "messages" in columns or {"input_ids", "supervised"} <= columns
        for stream in dataset.streams
        for columns in [corpus_columns(Path(stream.local, stream.split)).keys()]
    )


def _tokenizer(given: Mapping[str, Any], args: TrainingArguments) -> Any:
    # Settings of TRL, by which the Trainer's constructor will change the tokenizer.
    if any(getattr(args, name, None) for name in ("chat_template_path", "eos_token")):
        return None
    # Transformers 4 still takes it by its older name.
    chosen = given.get("processing_class", given.get("tokenizer"))
    if isinstance(chosen, PreTrainedTokenizerBase):
        return chosen
    collator = given.get("data_collator")
    return collator.tokenizer if isinstance(collator, ChatCollator) else None


def _max_length(given: Mapping[str, Any], args: TrainingArguments, tokenizer: Any) -> int | None:
    """Tokens of a sample, at most: the collator's, the settings' (TRL has one), the tokenizer's."""
    collator = given.get("data_collator")
    if isinstance(collator, ChatCollator):
        return collator.max_length
    if hasattr(args, "max_length"):
        length: int | None = args.max_length
        return length
    known = tokenizer.model_max_length
    return int(known) if known is not None and known < _NO_LIMIT else None


def _as_sample(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    if {"input_ids", "supervised"} <= sample.keys():
        return sample
    if holds_tokens(sample):
        try:
            return read_tokens(sample)
        except RecordDropped as dropped:
            raise CorpusError(f"samples must be records that can be used: {dropped}.") from dropped
    # An id only names the record in the collator's errors: it may be whatever it is.
    fields = {name: value for name, value in sample.items() if name != "id"}
    named = {name: sample[name] for name in sample.keys() - fields.keys()}
    try:
        return {**named, "messages": normalise(fields, source_field=None).messages}
    except RecordDropped as dropped:
        # No corpus holds calls of tools, but the collator learns them where the template does.
        # What stands beside them would be lost.
        beside = [name for name in _BESIDE if is_given(sample.get(name))]
        if dropped.reason is DropReason.TOOL_CALL and "messages" in sample and not beside:
            return sample
        raise CorpusError(
            f"samples must be records that can be used, got the fields {sorted(sample)!r}, left "
            f"out for: {dropped.reason}; leave such records out of the evaluation set."
        ) from dropped
