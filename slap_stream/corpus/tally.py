"""Counts of a conversion: records kept per source, dropped per reason, truncated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from slap_stream.corpus.records import DropReason
from slap_stream.errors import CorpusError
from slap_stream.types import MAX_SOURCES

_MAX_EXAMPLES = 5


@dataclass(kw_only=True, slots=True)
class Tally:
    """What became of records.

    Attributes:
        rows: Rows seen, blank lines included.
        counts: Records kept, per source.
        dropped: Records left out, per reason.
        examples: A few places per reason, as [number of the piece, row in the piece].
        truncated: Records cut to max_length.
    """

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[list[int]]] = field(default_factory=dict)
    truncated: int = 0

    def drop(self, reason: DropReason, piece: int, row: int) -> None:
        """Count a record that is left out."""
        self.dropped[reason.value] += 1
        places = self.examples.setdefault(reason.value, [])
        if len(places) < _MAX_EXAMPLES:
            places.append([piece, row])

    def keep(self, source: str) -> None:
        """Count a record that is kept.

        Raises:
            CorpusError: If there are more sources than a corpus can tell apart.
        """
        self.counts[source] += 1
        self._check_sources()

    def _check_sources(self) -> None:
        if len(self.counts) > MAX_SOURCES:
            raise CorpusError(
                f"source must name at most {MAX_SOURCES} groups of records, got "
                f"{list(self.counts)[-3:]!r} and more than that; let the inputs be the sources "
                "(source_field=None, --source-field '')."
            )

    def add_dropped(self, other: Tally) -> None:
        """Take over the records that another tally left out."""
        self.dropped.update(other.dropped)
        for reason, places in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine += places[: _MAX_EXAMPLES - len(mine)]

    @classmethod
    def total(cls, manifests: Iterable[Mapping[str, Any]]) -> Tally:
        """The sum of the tallies that these manifests hold.

        Raises:
            CorpusError: If there are more sources than a corpus can tell apart.
        """
        total = cls()
        for manifest in manifests:
            other = cls.from_dict(manifest["tally"])
            total.rows += other.rows
            total.counts.update(other.counts)
            total.truncated += other.truncated
            total.add_dropped(other)
        total._check_sources()
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Tally:
        """The tally that `to_dict` was called on."""
        counters = {name: Counter(saved[name]) for name in ("counts", "dropped")}
        return cls(**{**saved, **counters})

    def name_places(self, name: Callable[[int, int], str]) -> dict[str, list[str]]:
        """The examples, with places put into words by `name(piece, row)`."""
        return {
            reason: [name(piece, row) for piece, row in places]
            for reason, places in sorted(self.examples.items())
        }
