"""What is held against each kind of dirt before any training, and against what is clean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slap_stream import EmbeddingStore
from slap_stream.types import MISMATCH_COLUMN
from tools.bench.selection.corpora import COPIES, KINDS, Corpus, Workshop
from tools.bench.selection.subsets import auc
from tools.bench.selection.tasks import Condition

# Kinds whose targets are as good as any.
FINE = ("clean", "first", *COPIES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What a store's column `mismatch` says of the samples of a kind.

    Attributes:
        count: Samples.
        mean: Mean of the column.
        auc: How often one of them is above one whose target is fine, ties half.
    """

    count: int
    mean: float
    auc: float


def evidence_by_kind(store: Any, corpus: Corpus) -> dict[str, Evidence]:
    """Of every kind in the corpus, and by source of what is fine and what is shuffled."""
    if MISMATCH_COLUMN not in store.feature_names:
        return {}
    rows = store.read(0, store.shape[0])
    column = [*store.feature_names].index(MISMATCH_COLUMN)
    suspect = rows.feature[:, column].astype(np.float64)
    fine = corpus.is_of(FINE)
    groups = {kind: (corpus.is_of((kind,)), fine) for kind in KINDS}
    for number, name in enumerate(store.source_names):
        here = rows.source == number
        groups[f"{name}: fine"] = fine & here, fine & here
        groups[f"{name}: shuffled"] = corpus.is_of(("shuffled",)) & here, fine & here
    return {
        name: Evidence(
            count=int(mine.sum()),
            mean=float(suspect[mine].mean()),
            auc=auc(suspect, mine, others),
        )
        for name, (mine, others) in groups.items()
        if mine.any()
    }


def table(workshop: Workshop, conditions: Sequence[str], seeds: Sequence[int]) -> str:
    """Markdown: words alone beside words and the base model as the judge, by condition."""
    parts = []
    for name in conditions:
        condition, found, read, tokens = Condition.of(name), list[Any](), 0, 0
        for seed in seeds:
            corpus = workshop.corpus(condition, seed)
            path, judged = workshop.judged_store(condition, seed)
            stores = EmbeddingStore(corpus.path / "embeddings.zarr"), EmbeddingStore(path)
            found.append([evidence_by_kind(store, corpus) for store in stores])
            rows = stores[0].read(0, stores[0].shape[0])
            read, tokens = read + judged, tokens + int(rows.length.sum())
        parts.append(
            f"### {name}: {len(seeds)} seeds, the judge read {read / tokens:.2f} of the tokens\n\n"
            "| samples | how many | words | with the judge | AUC of words | with the judge |\n"
            "|---|---:|---:|---:|---:|---:|"
        )
        for kind in dict.fromkeys(k for both in found for k in both[0]):
            words, both = ([one[at][kind] for one in found if kind in one[at]] for at in (0, 1))
            cells = [
                kind,
                str(sum(each.count for each in words)),
                *(f"{_mean([e.mean for e in some], words):.3f}" for some in (words, both)),
                *(
                    "" if kind.endswith("fine") else f"{_mean([e.auc for e in some], words):.2f}"
                    for some in (words, both)
                ),
            ]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _mean(values: Sequence[float], counted: Sequence[Evidence]) -> float:
    """Mean over seeds, by how many samples each has."""
    return float(np.average(values, weights=[each.count for each in counted]))
