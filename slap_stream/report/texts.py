"""Texts of a few samples by id, for people to look at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from slap_stream.embeddings.corpus_texts import CorpusTexts
from slap_stream.errors import SlapStreamError
from slap_stream.shards.index import corpus_size

# Characters that a page shows of a prompt, and of a target.
SHOWN = 1200
# Controls, and what changes the direction of the text around it.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A sample as a page shows it: cut, and without characters that cannot be seen.

    Attributes:
        prompt: Beginning of what the model is given.
        target: Beginning of what it is trained to say.
    """

    prompt: str
    target: str


def visible(text: str) -> str:
    """A text without characters that cannot be seen."""
    return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text)


def shown(text: str, most: int = SHOWN) -> str:
    """The beginning of a text, without characters that cannot be seen."""
    seen = visible(text[: most + 1])
    return seen if len(seen) <= most else seen[:most] + " \N{HORIZONTAL ELLIPSIS}"


class SampleTexts:
    """Reads texts of the samples of some corpora, whose ids follow each other.

    Args:
        corpora: Directories with an index.json each.
        columns: How their text is found.

    Attributes:
        problem: Why there are no texts; empty if there are.
        unread: How many of those that were asked for could not be read.
    """

    def __init__(self, corpora: Sequence[Path], columns: CorpusTexts | None = None) -> None:
        self.problem, self.unread = "", 0
        self._parts: list[CorpusTexts] = []
        self._first = np.zeros(1, np.int64)
        base = columns or CorpusTexts(corpus_dir=Path())
        try:
            self._parts = [replace(base, corpus_dir=corpus).found() for corpus in corpora]
            sizes = [corpus_size(corpus) for corpus in corpora]
            self._first = np.concatenate([[0], np.cumsum(sizes)])
        except (SlapStreamError, OSError) as error:
            self.problem = str(error)

    def __len__(self) -> int:
        return int(self._first[-1])

    def _read(self, sample_id: int) -> Iterable[Text]:
        part = int(np.searchsorted(self._first, sample_id, side="right")) - 1
        at = sample_id - int(self._first[part])
        for sample in self._parts[part].read(at, at + 1):
            yield Text(prompt=shown(sample.prompt), target=shown(sample.target))

    def of(self, sample_ids: Iterable[int]) -> dict[int, Text]:
        """Texts by id, in one pass over the shards; none of those that cannot be read, whose shard
        is not here, say."""
        if self.problem:
            return {}
        found: dict[int, Text] = {}
        unread: list[str] = []
        for sample_id in sorted({int(sample_id) for sample_id in sample_ids if sample_id >= 0}):
            try:
                found.update((sample_id, text) for text in self._read(sample_id))
            except (SlapStreamError, OSError) as error:
                unread.append(str(error))
        self.unread = len(unread)
        if unread and not found:
            self.problem = unread[0]
        return found

    def warnings(self, cure: str = "") -> list[str]:
        """What of the texts is missing on a page, once they were asked for, in whole sentences."""
        if self.problem:
            return [f"Texts cannot be shown: {self.problem}{cure}"]
        if self.unread:
            return [f"{self.unread} texts cannot be shown: their shards are not all here.{cure}"]
        return []
