"""Evaluation sets that are named by their path, as samples of the kind that is trained on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from slap_stream.corpus.messages import RecordDropped
from slap_stream.corpus.peeking import read_records, token_columns_in
from slap_stream.corpus.tokenising import row_columns, token_columns
from slap_stream.errors import CorpusError
from slap_stream.integrations.first_rank import first_rank_first
from slap_stream.integrations.prepare import Prepared, check_source, is_shards
from slap_stream.integrations.training_set import AsTokenised
from slap_stream.shards.reader import iter_corpus
from slap_stream.text.chat import Truncate

logger = logging.getLogger(__name__)


class EvaluationSets:
    """Reads sets that are given as paths, whole and in their order; others are left as they are.

    Args:
        tokenizer: Makes token ids of chats and texts; None leaves messages.
        max_length: Tokens kept of a record.
        truncate: What is done with a longer one.
        made: What the Trainer is to be given of the samples of a set.
        as_given: Whether rows that were tokenised before stay as they are, for a collator that
            knows of no `supervised`.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int | None,
        truncate: Truncate,
        made: Callable[[list[Any]], Any],
        *,
        as_given: bool,
    ) -> None:
        self._tokenizer, self._made, self._as_given = tokenizer, made, as_given
        self._max_length, self._truncate = max_length, truncate

    def read(self, sets: Any) -> Any:
        """A set, or several by name, of which none is a path any more.

        Raises:
            CorpusError: If a path leads to nothing that can be read.
        """
        if isinstance(sets, Mapping):
            return {name: self.read(one) for name, one in sets.items()}
        if not is_path(sets):
            return sets
        path = Path(sets.corpus if isinstance(sets, Prepared) else sets)
        samples: list[dict[str, Any]] = []
        dropped: Counter[str] = Counter()
        shards = is_shards(path)
        columns = token_columns_in(path) if self._as_given and not shards else ()
        for row in iter_corpus(path) if shards else read_records(path, tokenised=True):
            try:
                if isinstance(row, RecordDropped):
                    raise row
                samples.append(self._sample(row, rows=not shards))
            except RecordDropped as unfit:
                dropped[str(unfit)] += 1
        if not samples:
            raise _nothing_in(path, dropped)
        if dropped:
            logger.warning("of eval_dataset %s are left out: %s", path, _counted(dropped))
        if columns:
            row_of = AsTokenised(list, columns).row
            samples = [row_of(one) if "supervised" in one else one for one in samples]
        return self._made(samples)

    def _sample(self, sample: dict[str, Any], *, rows: bool) -> dict[str, Any]:
        cut_to = self._max_length, self._truncate
        if self._tokenizer is None:
            return sample
        if "messages" in sample:
            return token_columns(self._tokenizer, sample["messages"], *cut_to)[0]
        if rows and not self._as_given:
            return row_columns(self._tokenizer, sample, *cut_to, masked=False)[0]
        return sample


def is_path(dataset: Any) -> bool:
    """Whether an evaluation set is named and not given."""
    return isinstance(dataset, str | Path | Prepared)


def check_paths(sets: Any) -> None:
    """Refuse paths to nothing that can be used, on all ranks; before anything long is begun."""
    for one in sets.values() if isinstance(sets, Mapping) else [sets]:
        if is_path(one) and not isinstance(one, Prepared):
            check: Any = partial(_check, one)
            first_rank_first(check, lambda _, check=check: check())  # type: ignore[misc]


def _check(path: str | Path) -> None:
    check_source(path, "eval_dataset")
    if is_shards(path):
        return
    dropped: Counter[str] = Counter()
    for row in read_records(path, tokenised=True):
        if not isinstance(row, RecordDropped):
            return
        dropped[str(row)] += 1
    raise _nothing_in(path, dropped)


def _nothing_in(path: str | Path, dropped: Counter[str]) -> CorpusError:
    return CorpusError(
        f"eval_dataset must hold at least one record that can be used, got none in {str(path)!r}; "
        f"left out: {_counted(dropped) or 'no records at all'}."
    )


def _counted(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} for {reason}" for reason, count in dropped.items())
