"""Any range of a corpus as text samples, whatever columns the corpus has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slap_stream.errors import CorpusError
from slap_stream.text.sample import TextSample, from_messages, from_text, from_tokens

Sample = Mapping[str, Any]
IterCorpus = Callable[[Path, int, int], Iterator[Sample]]


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusTexts:
    """Reads any range of a corpus as text samples; pickles, so that workers can read too.

    Attributes:
        corpus_dir: Directory with the merged index.json.
        iter_corpus: Reads raw samples in sample-id order; injected, because only the module
            that knows shards may read them.
        text_column: Column with plain text, for corpora that `convert` did not make.
        prompt_column: Column with the prompt; goes with `completion_column`.
        completion_column: Column with the target.
        source_column: Column that names a sample's source.
        tokenizer: Directory of the tokenizer that decodes `input_ids`.
    """

    corpus_dir: Path
    iter_corpus: IterCorpus
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    source_column: str | None = "source"
    tokenizer: str | None = None

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

    def read(self, start: int, stop: int) -> Iterator[TextSample]:
        """Samples `start` to `stop` (half-open), in sample-id order.

        Raises:
            CorpusError: If a sample has none of the columns that text can be made of.
        """
        decode = self._decoder()
        for offset, sample in enumerate(self.iter_corpus(self.corpus_dir, start, stop)):
            yield self._text(start + offset, sample, decode)

    def _decoder(self) -> Callable[[Any], str] | None:
        if self.tokenizer is None:
            return None
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)

        def decode(ids: Any) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        return decode

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


def describe_corpus(corpus_dir: Path) -> dict[str, Any]:
    """What `convert` wrote down about a corpus, or an empty dict if it did not make it.

    Raises:
        CorpusError: If corpus.json is there but is not a JSON object.
    """
    path = corpus_dir / "corpus.json"
    if not path.is_file():
        return {}
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorpusError(f"corpus.json must be JSON, got {error}; convert again.") from error
    if not isinstance(described, dict):
        raise CorpusError(
            f"corpus.json must hold a JSON object, got {type(described).__name__}; convert again."
        )
    return described
