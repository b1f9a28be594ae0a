"""What the quickstart's two runs left behind, counted, compared and printed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from quickstart_data import Record, answer_of
from quickstart_figure import MIN_CANDIDATES, Group


@dataclass(kw_only=True)
class Run:
    """What one training run left behind.

    Attributes:
        samples: Samples trained on at each evaluation.
        losses: (evaluations,) mean held-out loss at each of them.
        final: (heldout,) loss of each held-out record at the end.
        seconds: Wall-clock time of training, selection included, evaluation left out.
        tokens: Supervised tokens trained on.
        kept: Sample ids trained on, in order.
        strata: (2, num_strata) candidates offered, and trained on, over all epochs.
        metrics: The loader's and the probe's, at the end.
    """

    samples: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    final: np.ndarray = field(default_factory=lambda: np.zeros(0))
    seconds: float = 0.0
    tokens: int = 0
    kept: list[int] = field(default_factory=list)
    strata: np.ndarray = field(default_factory=lambda: np.zeros(0))
    metrics: dict[str, float] = field(default_factory=dict)


def report(runs: Mapping[str, Run], offered: int) -> dict[str, Any]:
    """Print what came out, as it is, and return it."""
    uniform, slap = runs["uniform"], runs["slap"]
    difference = slap.final - uniform.final
    mean = float(difference.mean())
    margin = 1.96 * float(difference.std(ddof=1)) / math.sqrt(len(difference))
    rows = [
        ("held-out loss", *(f"{run.losses[-1]:.3f}" for run in runs.values())),
        ("samples trained on", *(f"{run.samples[-1]:,}" for run in runs.values())),
        ("candidates offered", *(f"{offered:,}" for _ in runs)),
        ("answer tokens trained on", *(f"{run.tokens:,}" for run in runs.values())),
        (
            "candidates probed",
            *(f"{run.metrics.get('probe_samples', 0):,.0f}" for run in runs.values()),
        ),
        ("training time, s", *(f"{run.seconds:.1f}" for run in runs.values())),
    ]
    print(f"\n{'':26}" + "".join(f"{policy:>12}" for policy in runs))
    for name, *values in rows:
        print(f"{name:26}" + "".join(f"{value:>12}" for value in values))
    if abs(mean) <= margin:
        verdict = "No clear difference"
    else:
        verdict = "slap ends lower" if mean < 0 else "Uniform batches end lower"
    verdict += (
        f": held-out loss {slap.losses[-1]:.3f} with slap, {uniform.losses[-1]:.3f} with uniform "
        f"batches, difference {mean:+.3f} ± {margin:.3f}"
    )
    if not slap.metrics["probe_samples"]:
        verdict = f"Too small to say, the probe never ran. {verdict}"
    print(f"\n{verdict}.")
    print(
        f"(95 % interval over {len(difference)} held-out records, paired; what another seed "
        "would change is not in it.)"
    )
    return {
        "verdict": verdict,
        "difference": mean,
        "margin": margin,
        **{
            policy: {
                "samples": run.samples,
                "losses": run.losses,
                "seconds": run.seconds,
                "tokens": run.tokens,
                "metrics": run.metrics,
            }
            for policy, run in runs.items()
        },
    }


def strata_of(run: Run, sources: Sequence[str]) -> list[list[Group]]:
    """The run's strata, one list for each source where strata keep the sources apart."""
    names = sources if run.metrics["strata_by_source"] else ("all sources",)
    blocks = np.split(run.strata, len(names), axis=1)
    return [
        [
            Group(name=name, offered=int(offered), kept={"slap": int(kept)})
            for offered, kept in block.T
            if offered
        ]
        for name, block in zip(names, blocks, strict=True)
        if block[0].any()
    ]


def kinds_of(records: Sequence[Record], runs: Mapping[str, Run], epochs: int) -> list[list[Group]]:
    """Group samples by how often their answer occurs in the corpus, and by its length."""
    answers = [answer_of(record) for record in records]
    times = Counter(answers)
    copies = np.array([(times[answer] > 1) + (times[answer] > 3) for answer in answers])
    rank = np.argsort(np.argsort([len(answer) for answer in answers], kind="stable"))
    return [
        _groups(copies, ["answer occurs once", "2 or 3 times", "4 times or more"], runs, epochs),
        _groups(
            4 * rank // len(rank),
            ["shortest quarter", "second quarter", "third quarter", "longest quarter"],
            runs,
            epochs,
        ),
    ]


def _groups(
    kind: np.ndarray, names: Sequence[str], runs: Mapping[str, Run], epochs: int
) -> list[Group]:
    """Count candidates, and what each run kept of them, by kind.

    Args:
        kind: (samples,) index into `names`.
        names: Label of each kind; kinds with too few candidates to tell are left out.
        runs: The runs by their policy.
        epochs: Epochs of each run.
    """
    offered = epochs * np.bincount(kind, minlength=len(names))
    kept = {
        policy: np.bincount(kind[run.kept], minlength=len(names)) for policy, run in runs.items()
    }
    return [
        Group(
            name=name,
            offered=int(offered[index]),
            kept={policy: int(count[index]) for policy, count in kept.items()},
        )
        for index, name in enumerate(names)
        if offered[index] >= MIN_CANDIDATES
    ]
