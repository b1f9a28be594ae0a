"""Any range of a corpus as text samples, whatever columns the corpus has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slap_stream.corpus.tokenising import find_tokenizer, load_tokenizer
from slap_stream.errors import CorpusError
from slap_stream.remote.cache import FileCache
from slap_stream.shards.index import corpus_columns
from slap_stream.shards.reader import iter_corpus
from slap_stream.text.sample import TextSample, from_messages, from_text, from_tokens
from slap_stream.types import MAX_SOURCES

CORPUS_NAME = "corpus.json"

Sample = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusTexts:
    """Reads any range of a corpus as text samples; pickles, so that workers can read too.

    Attributes:
        corpus_dir: Directory with the merged index.json.
        text_column: Column with plain text, for corpora that `convert` did not make.
        prompt_column: Column with the prompt; goes with `completion_column`.
        completion_column: Column with the target.
        source_column: Column that names a sample's source, which must be there unless it is
            `source`; None: the sources are not told apart.
        tokenizer: Directory or name of the tokenizer that decodes `input_ids`; None until `found`
            means the one that corpus.json names.
        remote: Fetches the shards of a corpus that lies elsewhere.
    """

    corpus_dir: Path
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    source_column: str | None = "source"
    tokenizer: str | Path | None = None
    remote: FileCache | None = None

    def __post_init__(self) -> None:
        if (self.prompt_column is None) != (self.completion_column is None):
            raise CorpusError(
                "prompt_column and completion_column must be given together, got "
                f"{self.prompt_column!r} and {self.completion_column!r}; name both or neither."
            )
        if self.text_column is not None and self.prompt_column is not None:
            raise CorpusError(
                f"text_column must be None beside prompt_column, got {self.text_column!r}; a "
                "sample is either plain text or prompt and completion."
            )

    def found(self) -> CorpusTexts:
        """What is asked for, as far as the corpus has it.

        Raises:
            ConfigError: If the tokenizer cannot be loaded.
            CorpusError: If the corpus has no usable index, or not what is asked for.
        """
        columns, tokenizer = corpus_columns(self.corpus_dir), self.tokenizer
        tokenised = (
            "input_ids" in columns and self.text_column is None and self.prompt_column is None
        )
        if tokenizer is not None and not tokenised:
            raise CorpusError(
                f"tokenizer must be None for a corpus of text, got {str(tokenizer)!r}; it decodes "
                "the column input_ids."
            )
        source = self.source_column
        if source not in (None, "source", *columns):
            raise CorpusError(
                f"source_column must be one of {', '.join(columns)}, got {source!r}; None tells no "
                "sources apart."
            )
        if tokenised:
            tokenizer = tokenizer or describe_corpus(self.corpus_dir).get("tokenizer")
        return replace(
            self,
            source_column=source if source in columns else None,
            tokenizer=None if tokenizer is None else find_tokenizer(tokenizer),
        )

    def read(self, start: int, stop: int) -> Iterator[TextSample]:
        """Samples `start` to `stop` (half-open), in sample-id order.

        Raises:
            CorpusError: If a sample has none of the columns that text can be made of.
        """
        decode = self._decoder()
        samples = iter_corpus(self.corpus_dir, start, stop, remote=self.remote)
        for offset, sample in enumerate(samples):
            yield self._text(start + offset, sample, decode)

    def _decoder(self) -> Callable[[Any], str] | None:
        if self.tokenizer is None:
            return None
        tokenizer = load_tokenizer(str(self.tokenizer))
        return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))

    def _text(
        self, sample_id: int, sample: Sample, decode: Callable[[Any], str] | None
    ) -> TextSample:
        source = None
        if self.source_column is not None and self.source_column in sample:
            source = str(sample[self.source_column])
        if self.text_column is not None:
            return from_text(self._column(sample_id, sample, self.text_column), source)
        if self.prompt_column is not None and self.completion_column is not None:
            prompt = self._column(sample_id, sample, self.prompt_column)
            target = self._column(sample_id, sample, self.completion_column)
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]
            return from_messages(turns, source)
        if "messages" in sample:
            return from_messages(sample["messages"], source)
        if "input_ids" in sample:
            if decode is None:
                raise CorpusError(
                    "tokenizer must be given for a tokenised corpus, got None; pass the directory "
                    "of the tokenizer that made its input_ids."
                )
            return from_tokens(sample, source, decode)
        raise CorpusError(
            "the corpus must have a column messages or input_ids, got columns "
            f"{sorted(sample)} in sample {sample_id}; name its text with text_column, or with "
            "prompt_column and completion_column."
        )

    @staticmethod
    def _column(sample_id: int, sample: Sample, name: str) -> str:
        value = sample.get(name)
        if not isinstance(value, str):
            raise CorpusError(
                f"column {name} must hold text, got {type(value).__name__} in sample {sample_id} "
                f"with columns {sorted(sample)}; name a column of encoding str."
            )
        return value


def source_names(texts: CorpusTexts, num_samples: int) -> tuple[str, ...]:
    """Names of a corpus's sources, sorted: as `convert` counted them, or found in one pass.

    Args:
        texts: Reads the corpus.
        num_samples: Samples of the corpus.

    Returns:
        The names; empty if the corpus has no source column.

    Raises:
        CorpusError: If there are more than `MAX_SOURCES`: the column then names samples.
    """
    if texts.source_column is None:
        return ()
    counts = describe_corpus(texts.corpus_dir).get("counts")
    names: set[str] = set()
    if texts.source_column == "source" and isinstance(counts, Mapping):
        names.update(counts)
    else:
        for sample in iter_corpus(texts.corpus_dir, 0, num_samples, remote=texts.remote):
            names.add(str(sample[texts.source_column]))
            if len(names) > MAX_SOURCES:
                break
    if len(names) > MAX_SOURCES:
        raise CorpusError(
            f"column {texts.source_column} must name at most {MAX_SOURCES} sources, got more "
            f"({', '.join(sorted(names)[:5])}, ...); pass another column, or no source at all."
        )
    return tuple(sorted(names))


def describe_corpus(corpus_dir: Path) -> dict[str, Any]:
    """What `convert` wrote down about a corpus, or an empty dict if it did not make it.

    Raises:
        CorpusError: If corpus.json is there but is not a JSON object.
    """
    path = corpus_dir / CORPUS_NAME
    if not path.is_file():
        return {}
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"corpus.json must be JSON, got {error}; convert again.") from error
    if not isinstance(described, dict):
        raise CorpusError(
            f"corpus.json must hold a JSON object, got {type(described).__name__}; convert again."
        )
    return described
