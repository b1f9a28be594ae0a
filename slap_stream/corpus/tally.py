"""Counts of a conversion: records kept per source, dropped per reason, truncated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from slap_stream.corpus.messages import DropReason
from slap_stream.errors import CorpusError
from slap_stream.types import MAX_SOURCES

_MAX_EXAMPLES = 5
# Of a reason; a corpus may hold any number of unknown roles.
_MAX_DETAILS, _MAX_DETAIL_LETTERS = 20, 80
_MAX_UNUSED = 200
OTHERS = "others"


@dataclass(kw_only=True, slots=True)
class Tally:
    """What became of records.

    Attributes:
        rows: Rows seen, blank lines included.
        counts: Records kept, per source.
        dropped: Records left out, per reason.
        examples: A few places per reason, as [number of the piece, row in the piece].
        truncated: Records cut to max_length.
        shared: Answers whose first token also holds the end of the header before them.
        unused: Records with a field that was not used, per field.
    """

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[list[int]]] = field(default_factory=dict)
    truncated: int = 0
    shared: int = 0
    unused: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: DropReason, piece: int, row: int, detail: str = "") -> None:
        """Count a record that is left out; `detail` names the value that is to blame."""
        name = reason.value
        if detail:
            name = self._bounded(name, _shown(detail))
        self.dropped[name] += 1
        places = self.examples.setdefault(name, [])
        if len(places) < _MAX_EXAMPLES:
            places.append([piece, row])

    def _bounded(self, reason: str, detail: str) -> str:
        name = f"{reason}: {detail}"
        if name in self.dropped:
            return name
        known = sum(other.startswith(f"{reason}: ") for other in self.dropped)
        return name if known < _MAX_DETAILS else f"{reason}: {OTHERS}"

    def pass_over(self, fields: Iterable[str], records: int = 1) -> None:
        """Count fields of so many records that are not used."""
        for name in map(_shown, fields):
            known = name in self.unused or len(self.unused) < _MAX_UNUSED
            self.unused[name if known else OTHERS] += records

    def keep(self, source: str) -> None:
        """Count a record that is kept.

        Raises:
            CorpusError: If there are more sources than a corpus can tell apart.
        """
        if source not in self.counts:
            self.counts[source] = 0
            self._check_sources()
        self.counts[source] += 1

    def _check_sources(self) -> None:
        if len(self.counts) > MAX_SOURCES:
            raise CorpusError(
                f"source must name at most {MAX_SOURCES} groups of records, got "
                f"{list(self.counts)[-3:]!r} and more than that; let the inputs be the sources "
                "(source_field=None, --source-field '')."
            )

    def add_dropped(self, other: Tally) -> None:
        """Take over the records that another tally left out."""
        for name, count in other.dropped.items():
            reason, _, detail = name.partition(": ")
            mine = self._bounded(reason, detail) if detail else name
            self.dropped[mine] += count
            places = self.examples.setdefault(mine, [])
            places += other.examples[name][: _MAX_EXAMPLES - len(places)]

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
            total.shared += other.shared
            for name, records in other.unused.items():
                total.pass_over([name], records)
            total.add_dropped(other)
        total._check_sources()
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Tally:
        """The tally that `to_dict` was called on."""
        counters = {name: Counter(saved[name]) for name in ("counts", "dropped", "unused")}
        return cls(**{**saved, **counters})

    @classmethod
    def is_one(cls, saved: Any) -> bool:
        """Whether something that was saved has the form of what `to_dict` gives."""
        kinds = {f.name: int if f.type == "int" else dict for f in fields(cls)}
        if not isinstance(saved, dict) or not all(
            isinstance(saved.get(name), kind) for name, kind in kinds.items()
        ):
            return False
        counters = (saved["counts"], saved["dropped"], saved["unused"])
        counts = [count for counter in counters for count in counter.values()]
        lists = list(saved["examples"].values())
        places = [place for places in lists if isinstance(places, list) for place in places]
        counts += [n for place in places if isinstance(place, list) for n in place]
        return (
            all(isinstance(places, list) for places in lists)
            and all(isinstance(place, list) and len(place) == 2 for place in places)
            and all(isinstance(count, int) for count in counts)
            and saved["dropped"].keys() <= saved["examples"].keys()
        )

    def name_places(self, name: Callable[[int, int], str]) -> dict[str, list[str]]:
        """The examples, with places put into words by `name(piece, row)`."""
        return {
            reason: [name(piece, row) for piece, row in places]
            for reason, places in sorted(self.examples.items())
        }


def _shown(text: str) -> str:
    """A name out of a record in a line: it may be of any length, and hold anything."""
    letters = " ".join(text.split())[:_MAX_DETAIL_LETTERS]
    return letters if letters.isprintable() else "".join(map(_printable, letters))


def _printable(letter: str) -> str:
    return letter if letter.isprintable() else "?"
