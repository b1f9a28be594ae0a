"""Which of the candidates that left are shown with texts, and the list of all that were pruned."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.core.files import file_to_write, writable, written_whole
from slap_stream.errors import ConfigError
from slap_stream.report.texts import Text
from slap_stream.selection.departures import DRAWN_OUT, LEARNT, WITHDRAWN

# Samples shown of each reason; of what was drawn by chance there is little to see.
SHOWN_OF_REASON, SHOWN_BY_CHANCE = 30, 8
SHOWN_ORIGINALS = SHOWN_TRAINED = 16
_STEPS = 255
_NOT_EVIDENCE = (DRAWN_OUT, LEARNT, WITHDRAWN)

Rows = NDArray[Any]
Errors = Mapping[tuple[int, int, int], str]


@dataclass(kw_only=True, slots=True)
class Shown:
    """A sample that is shown.

    Attributes:
        sample_id: Which.
        source: Name of its source.
        cluster: Of its embedding.
        reason: Why it was pruned, or `withdrawn`; `trained` if it was neither.
        evidence: By name, in [0, 1].
        pruned: How often it was pruned.
        trained: How often it was trained on.
        copies: How many samples were pruned as copies of it.
        nearest: The sample that it copies, -1 if none.
        text: Its text.
        nearest_text: That of `nearest`.
        error: What was raised, of one that was withdrawn.
    """

    sample_id: int
    source: str
    cluster: int
    reason: str
    evidence: dict[str, float] = field(default_factory=dict)
    pruned: int = 0
    trained: int = 0
    copies: int = 0
    nearest: int = -1
    text: Text | None = None
    nearest_text: Text | None = None
    error: str = ""


class Picker:
    """Picks among what has left.

    Args:
        rows: (n,) rows of the log.
        outcomes: Names of outcomes by number.
        sources: (n,) names of the rows' sources.
        num_clusters: Clusters of the embeddings.
        errors: What was raised, by epoch, step and sample id of what was withdrawn.
    """

    def __init__(
        self,
        rows: Rows,
        outcomes: Sequence[str],
        sources: NDArray[Any],
        num_clusters: int,
        errors: Errors,
    ) -> None:
        self._rows, self._outcomes, self._sources = rows, list(outcomes), sources
        self._num_clusters, self._errors = num_clusters, errors
        self._evidence = [name for name in rows.dtype.names or () if name in self._outcomes]
        self._ids, inverse = np.unique(rows["sample_id"], return_inverse=True)
        was_trained = rows["outcome"] == 0
        was_pruned = ~was_trained & (rows["outcome"] != self._outcomes.index(WITHDRAWN))
        self._inverse = inverse.reshape(-1)
        size = len(self._ids)
        self._times_trained = np.bincount(self._inverse[was_trained], minlength=size)
        self._times_pruned = np.bincount(self._inverse[was_pruned], minlength=size)

    def pruned(self) -> list[Shown]:
        """The samples most surely pruned or withdrawn, reason by reason, each once."""
        result: list[Shown] = []
        taken: set[int] = set()
        numbers = range(1, len(self._outcomes))
        # Evidence before chance: a sample that has both is shown with what tells more.
        for number in sorted(numbers, key=lambda n: self._outcomes[n] in _NOT_EVIDENCE):
            name = self._outcomes[number]
            at = np.flatnonzero(self._rows["outcome"] == number)
            # Of what has nothing to show, those whose loss ranks lowest.
            sign, column = (1, name) if name in self._evidence else (-1, "rank")
            strength = sign * self._rows[column][at].astype(int)
            times = self._times_pruned[self._inverse[at]]
            most = SHOWN_BY_CHANCE if name == DRAWN_OUT else SHOWN_OF_REASON
            mixed = self._rows["sample_id"][at].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            for place in at[np.lexsort((mixed, -times, -strength))]:
                sample_id = int(self._rows["sample_id"][place])
                if sample_id not in taken:
                    taken.add(sample_id)
                    result.append(self._shown(place))
                    most -= 1
                if not most:
                    break
        return result

    def originals(self) -> list[Shown]:
        """The samples that the most others were pruned as copies of, those with the most first."""
        copy = self._outcomes.index("copy") if "copy" in self._outcomes else -1
        copies = self._rows[self._rows["outcome"] == copy]
        copies = copies[copies["nearest"] >= 0]
        pairs = np.unique(np.stack([copies["nearest"], copies["sample_id"]], axis=1), axis=0)
        originals, counts = np.unique(pairs[:, 0], return_counts=True)
        order = np.lexsort((originals, -counts))[:SHOWN_ORIGINALS]
        result = []
        for place in order[counts[order] > 1]:
            found = self._last_row(int(originals[place]))
            if found is not None:
                shown = self._shown(found)
                first = pairs[pairs[:, 0] == originals[place], 1][0]
                shown.copies, shown.nearest = int(counts[place]), int(first)
                result.append(shown)
        return result

    def trained(self) -> list[Shown]:
        """The samples trained on most often, of these the ones whose loss ranked highest."""
        at = np.flatnonzero(self._rows["outcome"] == 0)
        times = self._times_trained[self._inverse[at]]
        result: dict[int, Shown] = {}
        for place in at[np.lexsort((at, -self._rows["rank"][at].astype(int), -times))]:
            result.setdefault(int(self._rows["sample_id"][place]), self._shown(place))
            if len(result) == SHOWN_TRAINED:
                break
        return list(result.values())

    def _last_row(self, sample_id: int) -> int | None:
        place = int(np.searchsorted(self._ids, sample_id))
        if place == len(self._ids) or self._ids[place] != sample_id:
            return None
        return int(np.flatnonzero(self._inverse == place)[-1])

    def _shown(self, place: int) -> Shown:
        row = self._rows[place]
        at = self._inverse[place]
        evidence = {name: float(row[name]) / _STEPS for name in (*self._evidence, "rank")}
        return Shown(
            sample_id=int(row["sample_id"]),
            source=str(self._sources[place]),
            cluster=int(row["stratum"]) % self._num_clusters,
            reason=self._outcomes[int(row["outcome"])],
            evidence=evidence,
            pruned=int(self._times_pruned[at]),
            trained=int(self._times_trained[at]),
            nearest=int(row["nearest"]),
            error=self._errors.get(_key(row), ""),
        )


def _key(row: Any) -> tuple[int, int, int]:
    return int(row["epoch"]), int(row["step"]), int(row["sample_id"])


def export(
    path: Path, rows: Rows, outcomes: Sequence[str], sources: NDArray[Any], errors: Errors
) -> int:
    """Write the list of what was pruned or withdrawn, with reasons, as CSV or Parquet.

    Args:
        path: Ends in .csv or .parquet.
        rows: (n,) rows of the log.
        outcomes: Names of outcomes by number.
        sources: (n,) names of the rows' sources.
        errors: What was raised, by epoch, step and sample id of what was withdrawn.

    Returns:
        Lines written.

    Raises:
        ConfigError: If the path ends in something else, or cannot be written to.
    """
    check_export(path)
    pruned = np.flatnonzero(rows["outcome"] != 0)
    names = np.array(outcomes)
    evidence = [name for name in (*outcomes, "rank") if name in (rows.dtype.names or ())]
    table: dict[str, Any] = {
        "sample_id": rows["sample_id"][pruned],
        "reason": names[rows["outcome"][pruned]],
        "source": sources[pruned],
        "nearest": rows["nearest"][pruned],
        "epoch": rows["epoch"][pruned],
        "step": rows["step"][pruned],
        **{name: np.round(rows[name][pruned] / _STEPS, 3) for name in evidence},
        "error": np.array([writable(errors.get(_key(row), "")) for row in rows[pruned]], object),
    }
    with written_whole(path) as unfinished:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            columns = {name: pyarrow.array(column) for name, column in table.items()}
            pyarrow.parquet.write_table(pyarrow.table(columns), unfinished)
        else:
            with unfinished.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(table)
                writer.writerows(zip(*(column.tolist() for column in table.values()), strict=True))
    return len(pruned)


def check_export(path: str | Path) -> Path:
    """Refuse a path of which it is not known what to write there, or where nothing can be.

    Raises:
        ConfigError: If it ends in neither .csv nor .parquet, or cannot be written to.
    """
    local = file_to_write("export", path)
    if local.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"export must end in .csv or .parquet, got {str(path)!r}.")
    return local
