"""The page of a corpus, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slap_stream import __version__
from slap_stream.core.files import file_digest
from slap_stream.embeddings.corpus_texts import CorpusTexts
from slap_stream.embeddings.store import EmbeddingStore
from slap_stream.report.charts import COLOURS, Chart
from slap_stream.report.corpus_facts import CorpusFacts, Part
from slap_stream.report.page import Made, Sample, Section, Table, render
from slap_stream.report.said import number, percent
from slap_stream.report.texts import SampleTexts
from slap_stream.report.verdict import LOOKS_RIGHT, corpus_verdict
from slap_stream.shards.index import INDEX_NAME, corpus_size

STORE_NAME = "embeddings.zarr"
_MOST_ROWS = 40


def corpus_page(corpus: Path, embeddings: str | Path | None, columns: CorpusTexts) -> Made:
    """The page of a corpus.

    Raises:
        AlignmentError: If there are no embeddings, or they are of another corpus.
    """
    store = EmbeddingStore(corpus / STORE_NAME if embeddings is None else embeddings)
    store.verify(file_digest(corpus / INDEX_NAME), corpus_size(corpus))
    facts, texts = CorpusFacts(store), SampleTexts([corpus], columns)
    warnings = facts.warnings()
    sections = [
        corpus_verdict(facts),
        _overview(facts),
        _parts(facts),
        _samples(facts, texts),
        Section(id="warnings", title="Warnings"),
    ]
    warnings += texts.warnings()
    html = render(
        title=f"What is in {corpus.name}",
        subtitle=f"{number(facts.num_samples)} samples, from shards and embeddings alone "
        f"(encoder {store.encoder['name']}).",
        sections=sections,
        warnings=warnings,
        version=__version__,
    )
    summary = {
        "samples": facts.num_samples,
        "length": int(facts.lengths.sum()),
        "length_unit": facts.length_unit,
        "sources": {part.name: part.count for part in facts.sources},
        "copy_rate": round(facts.copy_rate, 4),
        "copy_rate_error": round(facts.copy_error, 4),
        "misplaced_share": facts.misplaced_share,
    }
    return Made(html=html, summary=summary, todo=sections[0].todo, warnings=warnings)


def _overview(facts: CorpusFacts) -> Section:
    total, unit = int(facts.lengths.sum()), facts.length_unit
    exact = len(facts.asked) == facts.num_samples
    tiles = [
        (
            "samples",
            number(facts.num_samples),
            f"in {len(facts.sources)} source{'s' * (len(facts.sources) > 1)}",
        ),
        ("length", number(total), f"{unit}; {number(total / facts.num_samples)} on average"),
        (
            "near-copies",
            percent(facts.copy_rate),
            "repeat an earlier sample; all were compared with all"
            if exact
            else f"± {facts.copy_error:.1%}; {number(len(facts.asked))} were compared with all",
        ),
        _misplaced(facts),
    ]
    edges, counts = facts.length_histogram()
    lengths = Chart("lengths", "Lengths", x=unit, y="samples")
    charts = [("Lengths", lengths.histogram(edges, counts, log=True).svg())]
    edges, counts = facts.distance_histogram()
    distances = Chart(
        "copies", "Distance to the nearest earlier sample", x="distance", y="samples asked about"
    )
    # Where it is as likely a copy as none, midway between a sure one and none.
    charts.append(
        (
            "Distance to the nearest earlier sample; left of the line are copies",
            distances.histogram(edges, counts, mark=0.4).svg(),
        )
    )
    return Section(id="overview", title="Overview", tiles=tiles, charts=charts)


def _misplaced(facts: CorpusFacts) -> tuple[str, str, str]:
    name, share = "targets of other prompts", facts.misplaced_share
    if share is None:
        return name, "\N{EN DASH}", "could not be found out"
    marked = f"{percent(facts.marked_share)} are marked"
    if share <= LOOKS_RIGHT:
        return name, "no sign", f"{marked}, as where nothing is wrong"
    return name, f"up to {percent(share)}", f"{marked}, some of which are right"


def _parts(facts: CorpusFacts) -> Section:
    tables = [
        _table("By source", "source", facts.sources),
        _table("By cluster of the embeddings", "cluster", facts.clusters),
    ]
    charts = []
    if len(facts.sources) > 1:
        height = 1.2 + 0.22 * min(len(facts.sources), 16)
        bars = Chart("sources", "Samples by source", x="samples", height=height)
        names = [part.name for part in facts.sources]
        of = {"samples": [float(part.count) for part in facts.sources]}
        charts.append(("By source", bars.bars(names, of, {"samples": COLOURS[0]}).svg()))
    return Section(id="parts", title="Sources and clusters", charts=charts, tables=tables)


def _table(title: str, what: str, parts: Sequence[Part]) -> Table:
    return Table(
        title=title,
        names=(what, "samples", "median length", "near-copies", "marked as misplaced"),
        rows=[
            (
                part.name,
                number(part.count),
                number(part.median_length),
                percent(part.copies),
                "no sign" if part.mismatched <= LOOKS_RIGHT else percent(part.mismatched),
            )
            for part in parts[:_MOST_ROWS]
        ],
        said=f"The {_MOST_ROWS} largest of {len(parts)}." if len(parts) > _MOST_ROWS else "",
    )


def _samples(facts: CorpusFacts, texts: SampleTexts) -> Section:
    samples = [
        Sample(
            sample_id=pair.sample_id,
            source="",
            reason="near-copy",
            said=[f"distance {pair.distance:.3f}"],
            beside=pair.earlier,
            beside_label="copies sample",
        )
        for pair in facts.pairs
    ]
    clean = (facts.misplaced_share or 0.0) <= LOOKS_RIGHT
    suspect = "fits its prompt least" if clean else "may be misplaced"
    samples += [Sample(sample_id=n, source="", reason=suspect) for n in facts.suspects]
    samples += [
        Sample(sample_id=n, source="", reason=reason)
        for reason, ids in facts.odd.items()
        for n in ids
    ]
    samples += [
        Sample(sample_id=n, source="", reason=f"middle of cluster {part.name}")
        for part in facts.clusters
        for n in part.examples
    ]
    found = texts.of(n for one in samples for n in (one.sample_id, one.beside))
    names = facts.source_of([one.sample_id for one in samples])
    for one, name in zip(samples, names, strict=True):
        one.text, one.beside_text = found.get(one.sample_id), found.get(one.beside)
        one.source = name if len(facts.sources) > 1 else ""
    lines = ["Near-copies beside what they copy, and examples of each cluster."]
    if facts.suspects:
        lines.append(
            f"'{suspect.capitalize()}': by its words the target would go with another prompt as "
            "well as with its own. "
            + (
                "No more are than where nothing is wrong, so all may be right."
                if clean
                else "Some are right: short answers, say, that go with many prompts."
            )
        )
    return Section(id="samples", title="Which samples", lines=lines, samples=samples)
