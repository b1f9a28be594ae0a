"""What each task has of an arm: no task may pay for the others.

The mean over tasks hides that one lost what another gained, and the mean over records of which the
target is a word hides that one of them is far out. So differences are taken record by record.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tools.bench.selection.results import Row

CONFIDENCE = 0.95


def paired_losses(
    arm: dict[int, Row], other: dict[int, Row], task: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Losses of a task's held-out records, as means over the seeds that both arms have.

    Returns:
        (records,) of each arm; none where no seed has both.
    """
    both = [
        seed for seed in sorted(set(arm) & set(other))
        if task in arm[seed].get("losses", {}) and task in other[seed].get("losses", {})
    ]  # fmt: skip
    if not both:
        return np.zeros(0), np.zeros(0)
    mine, theirs = (np.mean([of[s]["losses"][task] for s in both], axis=0) for of in (arm, other))
    return mine, theirs


def difference(arm: dict[int, Row], other: dict[int, Row], task: str) -> str:
    """Mean difference over the held-out records with its interval, and the median's; "" without.

    The interval is over records, which are the same for all seeds: it says how far a difference
    would be the same on other records, not after other trainings.
    """
    mine, theirs = paired_losses(arm, other, task)
    if len(mine) < 2:
        return ""
    by_record = mine - theirs
    error = by_record.std(ddof=1) / len(by_record) ** 0.5
    margin = stats.t(len(by_record) - 1).ppf(0.5 + CONFIDENCE / 2) * error
    medians = np.median(mine) - np.median(theirs)
    return f"{by_record.mean():+.3f} ± {margin:.3f} ({medians:+.3f})"


def table(arms: dict[str, dict[int, Row]], against: Sequence[str]) -> str:
    """Markdown: each arm against some others, task by task; "" where no row has losses by record.

    Args:
        arms: Rows by label and seed, of one condition.
        against: Labels.
    """
    tasks = sorted(
        {t for seeds in arms.values() for r in seeds.values() for t in r.get("losses", {})}
    )
    lines = []
    for base in against:
        for name, seeds in arms.items():
            cells = [difference(seeds, arms.get(base, {}), task) for task in tasks]
            if name != base and any(cells):
                shared = len(set(seeds) & set(arms[base]))
                lines.append(f"| {name} - {base} | {' | '.join(cells)} | {shared} |")
    if not lines:
        return ""
    head = f"| mean ± 95 % over records (median) | {' | '.join(tasks)} | seeds |"
    return "\n".join([head, "|---" + "|---:" * (len(tasks) + 1) + "|", *lines, ""])
