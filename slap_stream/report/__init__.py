"""What a run has left and why, or what is in a corpus -> a page for people.

in   the log of a run, or embeddings.zarr; shards, for the texts of a few samples
out  one HTML file that needs nothing else; the list of what was pruned, as CSV or Parquet

report.py        `report`: a directory to a page
run_page.py      the page of a run
verdict.py       what a reader should know first, in words
run_facts.py     what a run's log says
standing.py      whether it still goes on
picked.py        which samples are shown, and the list of all that were pruned
corpus_page.py   the page of a corpus
corpus_facts.py  what is in a corpus: near-copies, clusters, suspects
texts.py         texts of a few samples
charts.py        charts, as SVG
page.py          the page itself, and its template page.html
said.py          numbers as people read them
"""

from __future__ import annotations

# What other folders may import, by module; tests/test_architecture.py holds it.
EXPORTS = {"report": ("report",)}
