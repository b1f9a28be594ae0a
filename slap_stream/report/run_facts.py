"""What the log of a run says: totals, series over time, reasons by source and cluster, warnings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slap_stream.loader.run_files import Place, RunEvents, delivered_of
from slap_stream.report.texts import shown
from slap_stream.selection.departures import OUTCOMES, TRAINED, WITHDRAWN

# Points of a series.
_POINTS = 80
# Below this correlation with the losses that came, predictions say nothing.
_PREDICTS_NOTHING = 0.1
_ENOUGH_LOSSES = 1000
_ENOUGH_CANDIDATES = 50
# Characters of an error in a warning.
_ERROR_SHOWN = 160
# What is said of each reason, for people.
REASONS = {
    "drawn out": "nothing speaks against it; by chance, so that the rest fits",
    "learnt": "its loss ranks low among its like: there is little left to learn",
    "copy": "nearly the same as a sample that was trained on lately",
    "mismatch": "its target seems to belong to another prompt",
    "outlier": "its loss stands out among its like, as only noise does",
    "unrelated": "it is not of the kind that the target set shows",
    WITHDRAWN: "it could not be read or collated, or its loss was not finite; this was no choice",
}


@dataclass(kw_only=True, slots=True)
class Group:
    """Candidates of a source, or of a cluster, that have left the pools.

    Attributes:
        name: Of the source, or number of the cluster.
        counts: Candidates by outcome.
    """

    name: str
    counts: Counter[str]

    @property
    def candidates(self) -> int:
        """All of them."""
        return self.counts.total()

    @property
    def pruned_share(self) -> float:
        """Part that was pruned."""
        return _pruned(self.counts) / max(1, self.candidates)


@dataclass(kw_only=True, slots=True)
class Point:
    """Some spans in a row.

    Attributes:
        trained: Samples delivered up to its end.
        candidates: Candidates that have left with them.
        counts: Candidates of these spans by outcome.
        loss: Mean training loss; NaN if none was fed back.
        gauges: Metrics at its end.
    """

    trained: int
    candidates: int
    counts: Counter[str]
    loss: float
    gauges: Mapping[str, float]


class RunFacts:
    """What a page says of a run.

    Args:
        events: The run's log.

    Attributes:
        counts: Candidates by outcome.
        tokens: Their lengths by outcome.
        sources: By source, those with the most candidates first; empty if the strata do not tell
            them apart.
        clusters: By cluster of the embeddings, likewise.
        points: The series.
        noted: By name, ((n,) samples trained on before, (n,) values) that were noted.
        seconds: That batches and training steps have taken, of the rank that took longest.
        gauges: Metrics as of the end.
    """

    def __init__(self, events: RunEvents) -> None:
        self._events = events
        self.about: dict[str, Any] = events.about["about"]
        self.config: dict[str, Any] = self.about["config"]
        self.source_names: list[str] = list(self.about["run"]["source_names"])
        self.num_clusters = int(self.about["num_clusters"])
        self.by_source = bool(self.about["by_source"])
        self.counts: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        sources: dict[str, Counter[str]] = defaultdict(Counter)
        clusters: dict[str, Counter[str]] = defaultdict(Counter)
        sums: dict[str, Counter[int]] = defaultdict(Counter)
        for span in events.spans:
            for outcome, by_stratum in span["counts"].items():
                for stratum, count in by_stratum.items():
                    source, cluster = divmod(int(stratum), self.num_clusters)
                    self.counts[outcome] += count
                    clusters[str(cluster)][outcome] += count
                    if self.by_source:
                        sources[self.source_names[source]][outcome] += count
            for outcome, by_stratum in span["tokens"].items():
                self.tokens[outcome] += sum(by_stratum.values())
            for name in ("seconds", "compose_seconds", "probe_seconds", "probed"):
                sums[name][span["rank"]] += span[name]
        self.seconds, self.compose_seconds, self.probe_seconds = (
            float(max(sums[name].values(), default=0.0))
            for name in ("seconds", "compose_seconds", "probe_seconds")
        )
        self.probed = int(sums["probed"].total())
        self.sources, self.clusters = _groups(sources), _groups(clusters)
        rows = events.rows
        self._place = rows["epoch"].astype(np.int64) << 32 | rows["step"]
        self._trained = np.concatenate([[0], np.cumsum(rows["outcome"] == 0)])
        self.points = list(self._points())
        self.noted = self._noted()
        self.gauges: Mapping[str, float] = self.points[-1].gauges if self.points else {}

    @property
    def outcomes(self) -> list[str]:
        """Outcomes that there are, `trained` first."""
        known = [name for name in OUTCOMES if self.counts[name]]
        return known + [name for name in self.counts if name not in OUTCOMES]

    @property
    def trained(self) -> int:
        """Samples trained on."""
        return self.counts[TRAINED]

    @property
    def candidates(self) -> int:
        """Candidates trained on or pruned."""
        return self.counts.total()

    @property
    def pruned(self) -> int:
        """Candidates pruned."""
        return _pruned(self.counts)

    @property
    def withdrawn(self) -> int:
        """Candidates that could not be read or collated, or whose loss was not finite."""
        return self.counts[WITHDRAWN]

    @property
    def pruned_share(self) -> float:
        """Part of the candidates that was pruned."""
        return self.pruned / max(1, self.candidates)

    @property
    def pruned_token_share(self) -> float:
        """Part of the candidates' tokens that was pruned."""
        return _pruned(self.tokens) / max(1, self.tokens.total())

    @property
    def spends(self) -> bool:
        """Whether an epoch had as many steps as full data."""
        return self.config.get("steps") == "full"

    @property
    def seconds_saved(self) -> float:
        """What the pruned would have taken at the pace of the others, by their tokens."""
        return self.seconds * _pruned(self.tokens) / max(1, self.tokens[TRAINED])

    def before(self, place: Place) -> tuple[int, int]:
        """Samples trained on, and candidates that have left with them, up to a place in the run."""
        epoch, step = place
        at = int(np.searchsorted(self._place, (epoch << 32) + step))
        scale: int = 2**self._events.level
        return (
            min(self.trained, scale * int(self._trained[at])),
            min(self.candidates, scale * at),
        )

    def _points(self) -> Iterator[Point]:
        total = max(1, self.candidates)
        part: Counter[str] = Counter()
        losses, count, end = 0.0, 0, (0, 0)
        gauges: Mapping[str, float] = {}
        for place, span in enumerate(self._events.spans):
            for outcome, by_stratum in span["counts"].items():
                part[outcome] += sum(by_stratum.values())
            losses, count = losses + span["losses"][0], count + span["losses"][1]
            gauges = span["gauges"] if span["rank"] == 0 or not gauges else gauges
            last = place == len(self._events.spans) - 1
            # Losses are of what was delivered; ranks tell of it one after the other.
            end = max(end, delivered_of(span))
            if part.total() < total / _POINTS and not last:
                continue
            trained, candidates = self.before(end)
            yield Point(
                trained=trained,
                candidates=candidates,
                counts=part,
                loss=losses / count if count else float("nan"),
                gauges=gauges,
            )
            part, losses, count = Counter(), 0.0, 0

    def _noted(self) -> dict[str, tuple[list[int], list[float]]]:
        noted: dict[str, tuple[list[int], list[float]]] = {}
        for event in self._events.values:
            x, y = noted.setdefault(str(event["name"]), ([], []))
            x.append(self.before(delivered_of(event))[0])
            y.append(float(event["value"]))
        return noted

    def warnings(self) -> list[str]:
        """What somebody should look into, in whole sentences."""
        found, gauges = [], self.gauges
        for group in self.sources:
            # What is not of a target set's kind was to go.
            lost = _pruned(group.counts) - group.counts["unrelated"]
            if group.candidates >= _ENOUGH_CANDIDATES and 2 * lost > group.candidates:
                found.append(
                    f"The source {group.name!r} lost {lost / group.candidates:.0%} of its "
                    f"{group.candidates:,} candidates. Look at its samples below before you "
                    "trust it."
                )
        enough = gauges.get("observed", 0) >= _ENOUGH_LOSSES
        correlation = gauges.get("prediction_correlation", 1.0)
        if gauges.get("fitted") and enough and correlation < _PREDICTS_NOTHING:
            found.append(
                f"Predicted losses say little about the real ones (correlation {correlation:.2f}). "
                "Ranks of losses are then noise; copies and mismatches still tell."
            )
        if "mismatch" not in self.about["run"]["feature_names"]:
            found.append(
                "The embeddings have no column mismatch, so targets of other prompts are not "
                "found. slap-embed makes it."
            )
        if self.withdrawn:
            first = next(iter(self._events.errors.values()), "")
            found.append(
                f"{self.withdrawn:,} samples could not be read or collated, or had a loss that was "
                f"not finite, and were withdrawn; --export lists them. The first: "
                f"{shown(first, _ERROR_SHOWN)}"
            )
        for name, said in _TROUBLES.items():
            if gauges.get(name):
                found.append(said.format(gauges[name]))
        events = self._events
        if events.level:
            found.append(
                f"The run is so long that the list of what left holds 1 in {2**events.level} "
                "sample ids. Counts and series hold all."
            )
        if events.unreadable or events.straddling:
            found.append(
                f"The log is not whole: {events.unreadable} lines could not be read, and "
                f"{events.straddling} spans were left out because the run went on from an old "
                "checkpoint in the middle of them."
            )
        return found


_TROUBLES = {
    "shards_withdrawn": "{:.0f} damaged shards were withdrawn, with all of their candidates.",
    "nonfinite_rows": "{:.0f} rows of the embeddings hold numbers that are not finite.",
    "nonfinite": "{:.0f} losses were not finite.",
    "epochs_cut_short": "{:.0f} epochs ended early, because candidates were withdrawn.",
    "batches_repeated": "{:.0f} batches were the one before once more: a lane had run empty.",
    "probe_nonfinite": "{:.0f} probed losses or sketches were not finite.",
    "probe_moment_fallback": "The probe could not read the optimizer's second moment of the head, "
    "and used an estimate of its own.",
}


def _pruned(counts: Counter[str]) -> int:
    return counts.total() - counts[TRAINED] - counts[WITHDRAWN]


def _groups(found: Mapping[str, Counter[str]]) -> list[Group]:
    groups = [Group(name=name, counts=counts) for name, counts in found.items()]
    return sorted(groups, key=lambda group: -group.candidates)
