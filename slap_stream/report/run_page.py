"""The page of a run, in the order of what a person wants to know."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slap_stream import __version__
from slap_stream.embeddings.corpus_texts import CorpusTexts
from slap_stream.embeddings.store import open_embeddings
from slap_stream.errors import SlapStreamError
from slap_stream.loader.run_files import read_log
from slap_stream.report.charts import COLOURS, Chart
from slap_stream.report.page import Made, Sample, Section, Table, render
from slap_stream.report.picked import Picker, Shown
from slap_stream.report.run_facts import REASONS, Group, RunFacts
from slap_stream.report.said import duration, number, percent
from slap_stream.report.standing import standing
from slap_stream.report.texts import SampleTexts
from slap_stream.report.verdict import run_verdict
from slap_stream.selection.departures import OUTCOMES, TRAINED, WITHDRAWN

_MOST_ROWS = 40
# Evidence, in [0, 1], is called so from here on.
_FAIR, _STRONG = 0.5, 0.95
_SIGNS = {
    "copy": "a copy",
    "mismatch": "a mismatch",
    "outlier": "noise",
    "unrelated": "another kind than the target set's",
}


class Run:
    """A run as its log and its corpora tell of it.

    Args:
        run_dir: Its directory.
        corpora: Where its shards lie; None: where they lay.
        columns: How their text is found.

    Attributes:
        events: The log.
        facts: What it says.
        outcomes: Names of outcomes by number.
        texts: Texts of the samples.
        sources: (n,) names of the sources of the log's rows; empty ones where nobody knows.
        source_problem: Why that is; empty if they are known.
    """

    def __init__(self, run_dir: Path, corpora: Sequence[Path] | None, columns: CorpusTexts) -> None:
        self.events = read_log(run_dir)
        self.facts = RunFacts(self.events)
        self.outcomes: list[str] = list(self.events.about["outcomes"])
        about = self.facts.about
        places = list(map(Path, about["corpora"])) if corpora is None else list(corpora)
        self.texts = SampleTexts(places, columns)
        wanted = about["run"]["num_samples"]
        if not self.texts.problem and len(self.texts) != wanted:
            self.texts.problem = f"the corpus has {len(self.texts)} samples, not the run's {wanted}"
        self.source_problem = ""
        self.sources = self._sources(about["embeddings"])

    def _sources(self, embeddings: Sequence[str | None]) -> NDArray[Any]:
        rows, facts = self.events.rows, self.facts
        names = np.array(facts.source_names)
        if len(names) == 1:
            return np.full(len(rows), names[0])
        if facts.by_source:
            found: NDArray[Any] = names[rows["stratum"] // facts.num_clusters]
            return found
        # Too many for strata: the embeddings know.
        try:
            store = open_embeddings([path for path in embeddings if path is not None])
            ids, inverse = np.unique(rows["sample_id"], return_inverse=True)
            return names[store.read_ids(ids).source][inverse.reshape(-1)]
        except (SlapStreamError, OSError, TypeError) as error:
            self.source_problem = str(error)
            return np.full(len(rows), "")


def run_page(run: Run) -> Made:
    """The page of a run."""
    facts, events = run.facts, run.events
    warnings = facts.warnings()
    if run.source_problem:
        warnings.append(f"Sources of samples are not known: {run.source_problem}")
    # The same on every page, whatever has happened.
    every = dict.fromkeys((*OUTCOMES, *facts.outcomes))
    colours = dict(zip(every, cycle(COLOURS), strict=False))
    sections = [
        run_verdict(facts),
        _cost(facts),
        _losses(facts),
        _pruned(facts, colours),
        _samples(run),
        _auto(facts),
        Section(id="warnings", title="Warnings"),
    ]
    warnings += run.texts.warnings(" --corpus names where the shards lie now.")
    stands = standing(events)
    at = time.strftime("%Y-%m-%d %H:%M", time.localtime(events.last))
    begun, epochs = len(events.begins), facts.gauges.get("epoch", 0.0)
    html = render(
        title="What slap did in this run",
        subtitle=f"Policy {facts.config['policy']}, keep {facts.config['keep']}, seed "
        f"{facts.config['seed']}; epochs done {epochs:.3g}, as of {at}: {stands.said}"
        + (f"; begun {begun} times" if begun > 1 else ""),
        sections=sections,
        warnings=warnings,
        version=__version__,
    )
    summary = {
        "state": stands.state,
        "candidates": facts.candidates,
        "trained": facts.trained,
        "pruned": {name: facts.counts[name] for name in _reasons(facts)},
        "withdrawn": facts.withdrawn,
        "pruned_share": round(facts.pruned_share, 4),
        "pruned_token_share": round(facts.pruned_token_share, 4),
        "seconds": round(facts.seconds, 1),
        "probe_seconds": round(facts.probe_seconds, 1),
        "compose_seconds": round(facts.compose_seconds, 1),
    }
    return Made(html=html, summary=summary, todo=sections[0].todo, warnings=warnings)


def _reasons(facts: RunFacts) -> list[str]:
    return [name for name in facts.outcomes if name not in (TRAINED, WITHDRAWN)]


def _cost(facts: RunFacts) -> Section:
    unit = facts.about["length_unit"]
    every = max(facts.seconds, 1e-9)
    fewer = "fewer"
    saved = f"about {duration(facts.seconds_saved)} saved, at the pace of what was trained on"
    lines = ["A candidate is a sample that an epoch offers; each epoch offers all of them."]
    if facts.spends:
        fewer, saved = "passed over", "none saved: what was pruned made room for other visits"
        lines[0] += (
            ' With steps="full" it offers them again until it has as many steps as full data; each '
            "offer counts as a candidate."
        )
    tiles = [
        (
            "samples",
            f"{percent(facts.pruned_share)} {fewer}",
            f"{number(facts.trained)} trained on of {number(facts.candidates)} candidates",
        ),
        (
            "tokens",
            f"{percent(facts.pruned_token_share)} {fewer}",
            f"{number(facts.tokens[TRAINED])} of {number(facts.tokens.total())} ({unit})",
        ),
        ("time", duration(facts.seconds), saved),
        (
            "the probe took",
            percent(facts.probe_seconds / every),
            f"{duration(facts.probe_seconds)} for {number(facts.probed)} candidates",
        ),
        (
            "composing took",
            percent(facts.compose_seconds / every),
            f"{duration(facts.compose_seconds)}, beside the training steps",
        ),
    ]
    return Section(id="cost", title="What was saved, and what it cost", lines=lines, tiles=tiles)


def _losses(facts: RunFacts) -> Section:
    points = [point for point in facts.points if not np.isnan(point.loss)]
    loss = [point.loss for point in points]
    charts = []
    if len(points) > 1:
        both = {
            "samples trained on": ([point.trained for point in points], loss),
            "candidates": ([point.candidates for point in points], loss),
        }
        if facts.spends:
            del both["candidates"]
        chart = Chart("loss", "Training loss", x="samples trained on, or candidates", y="loss")
        charts.append(("Training loss against samples and candidates", chart.lines(both).svg()))
    if facts.noted:
        chart = Chart("noted", "Held-out loss", x="samples trained on")
        charts.append(("Held-out loss", chart.lines(dict(facts.noted), dots=True).svg()))
    lines = [
        "The solid line is what this run paid for its loss. The dashed one puts the same losses "
        "where a run on everything would have been with its samples.",
    ]
    if facts.spends:
        lines = ["What this run paid for its loss: as many samples as a run on everything."]
    if not points:
        lines = ["No losses were fed back: loader.observe(batch['sample_id'], losses)."]
    if not facts.noted:
        lines.append(
            "Held-out losses appear here once they are noted: loader.note(held_out_loss=...)."
        )
    return Section(id="loss", title="How the loss went", lines=lines, charts=charts)


def _pruned(facts: RunFacts, colours: dict[str, str]) -> Section:
    reasons = [name for name in facts.outcomes if name != TRAINED]
    left_out = max(1, facts.pruned + facts.withdrawn)
    tables = [
        Table(
            title="Why",
            names=("reason", "candidates", "of those left out"),
            rows=[
                (
                    f"{name}: {REASONS[name]}" if name in REASONS else name,
                    number(facts.counts[name]),
                    percent(facts.counts[name] / left_out),
                )
                for name in reasons
            ],
        )
    ]
    charts = []
    if len(facts.points) > 1:
        totals = [max(1, point.counts.total()) for point in facts.points]
        shares = {
            name: [p.counts[name] / t for p, t in zip(facts.points, totals, strict=True)]
            for name in facts.outcomes
        }
        chart = Chart("time", "What became of the candidates over time", x="candidates")
        seen = [point.candidates for point in facts.points]
        charts.append(
            ("What became of the candidates, over time", chart.shares(seen, shares, colours).svg())
        )
    if facts.sources:
        charts.append(("By source", _bars("sources", facts.sources, facts.outcomes, colours)))
        tables.append(_group_table("By source", "source", facts.sources, reasons))
    tables.append(_group_table("By cluster of the embeddings", "cluster", facts.clusters, reasons))
    return Section(id="pruned", title="What was pruned, and why", charts=charts, tables=tables)


def _bars(
    name: str, groups: Sequence[Group], outcomes: Sequence[str], colours: dict[str, str]
) -> str:
    of = {outcome: [float(g.counts[outcome]) for g in groups] for outcome in outcomes}
    height = 1.2 + 0.22 * min(len(groups), 16)
    chart = Chart(name, "Candidates by source and outcome", x="candidates", height=height)
    return chart.bars([group.name for group in groups], of, colours).svg()


def _group_table(title: str, what: str, groups: Sequence[Group], reasons: Sequence[str]) -> Table:
    rows = [
        (
            group.name,
            number(group.candidates),
            percent(group.pruned_share),
            *(percent(group.counts[name] / max(1, group.candidates)) for name in reasons),
        )
        for group in groups[:_MOST_ROWS]
    ]
    said = f"The {_MOST_ROWS} largest of {len(groups)}." if len(groups) > _MOST_ROWS else ""
    return Table(title=title, names=(what, "candidates", "pruned", *reasons), rows=rows, said=said)


def _samples(run: Run) -> Section:
    facts = run.facts
    events = run.events
    picker = Picker(events.rows, run.outcomes, run.sources, facts.num_clusters, events.errors)
    pruned, originals, trained = picker.pruned(), picker.originals(), picker.trained()
    for shown in originals:
        shown.reason = "copied most"
    for shown in trained:
        shown.reason = "trained most"
    every = [*pruned, *originals, *trained]
    texts = run.texts.of(n for one in every for n in (one.sample_id, one.nearest))
    lines = [
        "Of each reason those that it is surest of, beside the sample that they copy; the samples "
        "that the most others copy, beside one of these; and the samples trained on most often.",
        "Fair and strong say how much evidence of a kind weighed. They are no chances of being "
        "right: of clean data, too, some samples look misplaced or noisy. Read them.",
        "The list of all that was pruned: slap-report RUN_DIR --export pruned.csv (or .parquet).",
    ]
    samples = []
    for one in every:
        text, beside = texts.get(one.sample_id), texts.get(one.nearest)
        is_copied = one.reason == "copied most"
        near = one.nearest if one.reason in ("copy", "copied most") else -1
        samples.append(
            Sample(
                sample_id=one.sample_id,
                source=one.source if len(facts.source_names) > 1 else "",
                reason=one.reason,
                said=_said(one),
                text=text,
                beside=near,
                beside_label="one of its copies, sample" if is_copied else "copies sample",
                beside_text=None if near < 0 or beside is None else replace(beside),
            )
        )
    return Section(id="samples", title="Which samples", lines=lines, samples=samples)


def _said(shown: Shown) -> list[str]:
    said = [shown.error] if shown.error else []
    said.append(f"cluster {shown.cluster}")
    if shown.copies:
        said.append(f"{number(shown.copies)} pruned as copies of it")
    if shown.pruned:
        said.append(f"pruned {shown.pruned} times" if shown.pruned > 1 else "pruned once")
    if shown.trained:
        said.append(f"trained on {shown.trained} times" if shown.trained > 1 else "trained on once")
    for name, value in shown.evidence.items():
        if name == "rank":
            said.append(f"loss above {value:.0%} of its like")
        elif value >= _FAIR:
            said.append(f"{'strong' if value >= _STRONG else 'fair'} evidence of {_SIGNS[name]}")
    return said


def _auto(facts: RunFacts) -> Section:
    keep, gauges = facts.config["keep"], facts.gauges
    lines = []
    if keep == "auto":
        lines.append(
            f"It keeps {percent(gauges.get('keep', 1.0))} of the candidates now, and at least "
            f"{percent(facts.config['keep_min'])} whatever it finds. It follows the share of the "
            "candidates lately against which nothing is held."
        )
    else:
        lines.append(f"keep was fixed at {keep}: nothing was decided. What auto would go by:")
    lines.append(
        f"Held dispensable lately: {percent(gauges.get('dispensable', 0.0))}. Losses are predicted "
        f"with correlation {gauges.get('prediction_correlation', 0.0):.2f}."
    )
    charts = []
    if len(facts.points) > 1:
        x = [point.candidates for point in facts.points]
        of = {
            "kept": (x, [point.gauges.get("keep", 1.0) for point in facts.points]),
            "held dispensable": (x, [p.gauges.get("dispensable", 0.0) for p in facts.points]),
        }
        chart = Chart("auto", "Kept, and held dispensable", x="candidates")
        charts.append(("Kept, and held dispensable", chart.lines(of).svg()))
    return Section(
        id="auto", title="What auto decided, and on what evidence", lines=lines, charts=charts
    )
