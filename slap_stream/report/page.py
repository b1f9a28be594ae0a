"""A page: what is said of a run or a corpus, as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from slap_stream.report.texts import Text, visible

# Runs in the page; nothing else does, whatever a text holds: the page's policy names its hash.
SCRIPT = """
for (const bar of document.querySelectorAll(".filters")) {
  const [words, source, reason] = bar.querySelectorAll("input, select");
  const found = bar.querySelector("span");
  const samples = [...bar.parentElement.querySelectorAll(".sample")];
  const filter = () => {
    const wanted = words.value.toLowerCase();
    let shown = 0;
    for (const sample of samples) {
      const fits = (!source.value || sample.dataset.source === source.value)
        && (!reason.value || sample.dataset.reason === reason.value)
        && (!wanted || sample.textContent.toLowerCase().includes(wanted));
      sample.hidden = !fits;
      shown += fits;
    }
    found.textContent = `${shown} of ${samples.length} samples`;
  };
  for (const control of [words, source, reason]) control.addEventListener("input", filter);
  filter();
}
"""


@dataclass(kw_only=True, slots=True)
class Table:
    """A table.

    Attributes:
        title: Above it.
        names: Of the columns.
        rows: Cells, as they are shown.
        said: About it.
    """

    title: str
    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    said: str = ""


@dataclass(kw_only=True, slots=True)
class Sample:
    """A sample with its text, and another beside it.

    Attributes:
        sample_id: Which.
        source: Name of its source; empty where there is only one.
        reason: Why it is shown.
        said: What else is said of it.
        text: Its text; None if it cannot be read.
        beside: The other sample, -1 if there is none.
        beside_label: What the other one is.
        beside_text: Its text.
    """

    sample_id: int
    source: str
    reason: str
    said: list[str] = field(default_factory=list)
    text: Text | None = None
    beside: int = -1
    beside_label: str = ""
    beside_text: Text | None = None


@dataclass(kw_only=True, slots=True)
class Section:
    """A part of a page.

    Attributes:
        id: Its anchor; the one of `warnings` shows them.
        title: Above it.
        lines: Sentences.
        todo: What the reader should do, sentence by sentence.
        tiles: Numbers that stand out: name, value, what is said of it.
        charts: Captions and SVG.
        tables: Tables.
        samples: Samples, to be searched and filtered.
    """

    id: str
    title: str
    lines: Sequence[str] = ()
    todo: Sequence[str] = ()
    tiles: Sequence[tuple[str, str, str]] = ()
    charts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()

    @property
    def sources(self) -> list[str]:
        """Sources of the samples."""
        return sorted({sample.source for sample in self.samples} - {""})

    @property
    def reasons(self) -> list[str]:
        """Reasons of the samples, in order of first appearance."""
        return list(dict.fromkeys(sample.reason for sample in self.samples))


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A page, and what of it is told where there is no page.

    Attributes:
        html: The page.
        summary: The numbers on top of it, by name.
        todo: What the reader should do.
        warnings: What somebody should look into.
    """

    html: str
    summary: dict[str, Any]
    todo: Sequence[str]
    warnings: list[str]


def render(
    *,
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    warnings: Sequence[str],
    version: str,
) -> str:
    """The page as HTML; whatever comes from data is escaped by Jinja, everywhere.

    Args:
        title: Of the page.
        subtitle: Below it.
        sections: In their order.
        warnings: Whole sentences; the first are shown below the first section, too.
        version: Of slap_stream.
    """
    # Not on top: whoever only exports has no use for it.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string(files(__package__).joinpath("page.html").read_text("utf-8"))
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    told: dict[str, Any] = {"title": title, "subtitle": subtitle, "version": version}
    return template.render(
        sections=sections,
        warnings=warnings,
        script=SCRIPT,
        script_hash=f"sha256-{digest}",
        **told,
    )
