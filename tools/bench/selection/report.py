"""From result lines to tables and a figure: paired by seed, with intervals and corrected tests."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tools.bench.selection import by_task
from tools.bench.selection.results import Row, key_of
from tools.bench.selection.schedule import AIMS, PRESETS
from tools.bench.selection.schedule import arms as known_arms

# A forward without a backward, in steps on the same tokens (measured: 0.31 and 0.32).
FORWARD_SHARE = 1 / 3
WRITTEN = {"tatoeba": "chrF of tatoeba", "gsm8k": "exact answers of gsm8k, %"}
CONFIDENCE = 0.95
# What others are compared with, task by task.
BASELINES = ("full", "dedupe", "dedupe_equal")
ARMS = known_arms()


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A difference of two arms over paired seeds.

    Attributes:
        mean: Mean of the differences.
        margin: Half of the 95 % interval by Student's t; NaN with one seed.
        upper: One-sided 95 % bound; NaN with one seed.
        p: Two-sided p of a paired t test; NaN with one seed.
        seeds: How many.
    """

    mean: float
    margin: float
    upper: float
    p: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Difference:
        """Of paired differences."""
        array = np.asarray(values, np.float64)
        n, mean = len(array), float(array.mean())
        if n < 2:
            return cls(mean=mean, margin=np.nan, upper=np.nan, p=np.nan, seeds=n)
        error = float(array.std(ddof=1)) / n**0.5
        t = stats.t(n - 1)
        return cls(
            mean=mean,
            margin=float(t.ppf(0.5 + CONFIDENCE / 2)) * error,
            upper=mean + float(t.ppf(CONFIDENCE)) * error,
            p=float(2 * t.sf(abs(mean) / error)) if error > 0 else float(mean == 0),
            seeds=n,
        )

    def text(self, digits: int) -> str:
        """Such as +0.12 ± 0.03."""
        margin = f" ± {self.margin:.{digits}f}" if self.seeds > 1 else ""
        return f"{self.mean:+.{digits}f}{margin}"

    def __str__(self) -> str:
        return self.text(4)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number.

    Reference: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order, result, running = np.argsort(p), [0.0] * len(p), 0.0
    for rank, at in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[at]))
        result[at] = running
    return result


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of rows of the same run the last."""
    return list({json.dumps(key_of(row)): row for row in rows}.values())


def label(row: Row) -> str:
    """Arm, with what was set otherwise than usual."""
    parts = [row["arm"]]
    if row["keep"] not in (0.7, 1.0, "auto"):
        parts.append(f"keep {row['keep']}")
    keep = 1.0 if isinstance(row["keep"], str) else row["keep"]
    if row["learning_rate"] != PRESETS[row["preset"].partition("-")[0]].rate_for(keep):
        parts.append(f"rate {row['learning_rate']}")
    return " ".join([*parts, row["overrides"]]).strip()


def by_condition(rows: Sequence[Row]) -> dict[str, dict[str, dict[int, Row]]]:
    """Rows by condition (with the preset, where that is not the smallest), label and seed."""
    result: dict[str, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        size = "" if row["preset"] == "small" else f", preset {row['preset']}"
        result[row["condition"] + size][label(row)][row["seed"]] = row
    return result


def paired(arm: dict[int, Row], other: dict[int, Row], value: str = "loss") -> Difference | None:
    """Difference of two arms over the seeds that both have."""
    seeds = sorted(set(arm) & set(other))
    if not seeds:
        return None
    return Difference.of([arm[seed][value] - other[seed][value] for seed in seeds])


def compute(row: Row) -> float:
    """Tokens through the model, a forward alone counted as `FORWARD_SHARE` of a step."""
    probed = row["tokens"] * row["probed"] / row["samples"]
    return float(row["tokens"] + FORWARD_SHARE * (probed + row.get("prepared", 0)))


def selecting(row: Row) -> float:
    """Seconds of composing and probing over those of training, in the same run."""
    seconds = row["seconds"]
    return float((seconds["compose"] + seconds["probe"]) / seconds["train"])


def reached_after(row: Row, target: float) -> float:
    """Samples after which a run's loss is at a target for good; infinite if never."""
    samples, losses = np.array(row["curve"], np.float64).T
    above = np.flatnonzero(losses > target)
    if not len(above):
        return 0.0
    last = int(above[-1])
    if last + 1 >= len(losses):
        return float("inf")
    share = (losses[last] - target) / (losses[last] - losses[last + 1])
    return float(samples[last] + share * (samples[last + 1] - samples[last]))


def rate_of(row: Row, kind: str) -> float:
    """Visits to samples of a kind, over those that full data makes; NaN if there are none."""
    offered = row["offered"][kind]
    return row["trained"][kind] / offered if offered else float("nan")


def tables(rows: Sequence[Row]) -> str:
    """A Markdown table for each condition, and slap against every other arm."""
    parts = []
    for condition, arms in by_condition(rows).items():
        full, uniform = arms.get("full", {}), arms.get("uniform", {})
        tasks = [task for task in WRITTEN if any(_scores(seeds, task) for seeds in arms.values())]
        columns = [
            *("arm", "trained on", "held-out loss", "- full", "- uniform", "worst source"),
            *(WRITTEN[task] for task in tasks),
            *("shuffled", "copies", "compute", "selecting", "samples to full's loss", "seeds"),
        ]
        parts.append(f"### {condition}\n\n| {' | '.join(columns)} |")
        parts.append("|---" + "|---:" * (len(columns) - 1) + "|")
        for name, seeds in sorted(arms.items(), key=lambda item: _mean(item[1], "loss")):
            parts.append(_line(name, seeds, full, uniform, tasks))
        parts.append("\n" + _against(arms))
        parts.append(by_task.table(arms, BASELINES))
        parts += _aimed(arms)
    return "\n".join(parts)


def _aimed(arms: dict[str, dict[int, Row]]) -> list[str]:
    """For each task that arms are aimed at: its held-out loss, and the mean over the others."""
    uniform = next((s for s in arms.values() if _first(s)["arm"] == "uniform"), {})
    parts = []
    for task in AIMS:
        mine = {
            name: {
                seed: {
                    "aimed": row["heldout"][task],
                    "others": float(np.mean([v for t, v in row["heldout"].items() if t != task])),
                    "share": row["samples"] / row["candidates"],
                }
                for seed, row in seeds.items()
            }
            for name, seeds in arms.items()
            if seeds is uniform or ARMS[_first(seeds)["arm"]].aim == task
        }
        plain = next((mine[name] for name, seeds in arms.items() if seeds is uniform), {})
        if len(mine) - bool(plain) < 1:
            continue
        parts.append(
            f"Aimed at {task}:\n\n| arm | trained on | {task} | - uniform | others | seeds |"
        )
        parts.append("|---|---:|---:|---:|---:|---:|")
        for name, seeds in sorted(mine.items(), key=lambda item: _mean(item[1], "aimed")):
            difference = paired(seeds, plain, "aimed") if seeds is not plain else None
            parts.append(
                f"| {name} | {_mean(seeds, 'share'):.2f} | {_mean(seeds, 'aimed'):.4f} | "
                f"{difference or ''} | {_mean(seeds, 'others'):.4f} | {len(seeds)} |"
            )
        parts.append("")
    return parts


def _first(seeds: dict[int, Row]) -> Row:
    return next(iter(seeds.values()))


def _scores(seeds: dict[int, Row], task: str) -> dict[int, Row]:
    """Generation scores of a task, by seed, where they were taken."""
    # Rows of before there were such scores have none.
    return {
        seed: {"score": row["written"][task]}
        for seed, row in seeds.items()
        if task in row.get("written", {})
    }


def _line(
    name: str,
    seeds: dict[int, Row],
    full: dict[int, Row],
    uniform: dict[int, Row],
    tasks: Sequence[str],
) -> str:
    rows = list(seeds.values())
    share = np.mean([row["samples"] / row["candidates"] for row in rows])
    worst = np.mean([max(row["heldout"].values()) for row in rows])
    both = sorted(set(seeds) & set(full))
    cost = np.mean([compute(seeds[s]) / compute(full[s]) for s in both]) if both else np.nan
    reached = [reached_after(seeds[s], full[s]["loss"]) / full[s]["samples"] for s in both]
    cells = [
        name,
        f"{share:.2f}",
        f"{_mean(seeds, 'loss'):.4f}",
        *("" if seeds is other else str(paired(seeds, other) or "") for other in (full, uniform)),
        f"{worst:.3f}",
        *(_score(_scores(seeds, task), _scores(full, task)) for task in tasks),
        *(
            _number(float(np.mean([rate_of(row, kind) for row in rows])))
            for kind in ("shuffled", "copy")
        ),
        _number(float(cost)),
        f"{np.median([selecting(row) for row in rows]):.0%}",
        _number(float(np.median(reached))) if reached else "",
        str(len(rows)),
    ]
    return f"| {' | '.join(cells)} |"


def _score(seeds: dict[int, Row], full: dict[int, Row]) -> str:
    """Mean score, and what it is above full data's, paired."""
    if not seeds:
        return ""
    mean = f"{_mean(seeds, 'score'):.1f}"
    above = None if seeds == full else paired(seeds, full, "score")
    return mean if above is None else f"{mean} ({above.text(1)})"


def _number(value: float) -> str:
    if np.isnan(value):
        return ""
    return f"{value:.2f}" if np.isfinite(value) else "never"


def _mean(seeds: dict[int, Row], value: str) -> float:
    return float(np.mean([row[value] for row in seeds.values()]))


def _against(arms: dict[str, dict[int, Row]]) -> str:
    """slap against full (not worse by more than 0.5 %) and against every other arm (Holm), and what
    settings change."""
    lines = []
    for name in ("slap", "slap_auto"):
        if name not in arms:
            continue
        others = {
            other: difference
            for other in arms
            if other not in ("full", "oracle") and (other == "slap_paper" or "slap" not in other)
            if (difference := paired(arms[name], arms[other])) and difference.seeds > 1
        }
        corrected = holm([difference.p for difference in others.values()])
        for (other, difference), p in zip(others.items(), corrected, strict=True):
            lines.append(f"- {name} - {other}: {difference}, p = {p:.2g} (Holm).")
        to_full = paired(arms[name], arms.get("full", {}))
        if to_full is not None and to_full.seeds > 1:
            bound = 100 * to_full.upper / _mean(arms["full"], "loss")
            lines.append(f"- {name} - full: {to_full}, at most {bound:+.2f} % (one-sided 95 %).")
    return "\n".join(lines + _sensitivity(arms)) + "\n"


def _sensitivity(arms: dict[str, dict[int, Row]]) -> list[str]:
    """Each arm with settings of the command line against the same arm without."""
    lines = []
    for name, seeds in arms.items():
        plain, _, settings = name.partition(" ")
        if "=" in settings and (difference := paired(seeds, arms.get(plain, {}))):
            lines.append(f"- {plain} with {settings} - {plain}: {difference} ({difference.seeds}).")
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Each arm's difference to full data, with its interval from three seeds on, by condition."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    conditions = by_condition(rows)
    height = 1.2 + 0.3 * max(len(arms) for arms in conditions.values())
    figure, panels = pyplot.subplots(
        1, len(conditions), figsize=(1 + 4.2 * len(conditions), height), squeeze=False
    )
    for panel, (condition, arms) in zip(panels[0], conditions.items(), strict=True):
        full = arms.get("full", {})
        found = {name: paired(seeds, full) for name, seeds in arms.items()}
        shown = sorted(
            ((name, d) for name, d in found.items() if d is not None),
            key=lambda item: -item[1].mean,
        )
        for place, (name, difference) in enumerate(shown):
            colour = "#c0392b" if name.startswith("slap") and "paper" not in name else "#4d5a66"
            # With one degree of freedom an interval says nothing but that.
            margin = difference.margin if difference.seeds > 2 else 0.0
            panel.errorbar(difference.mean, place, xerr=margin, fmt="o", color=colour, capsize=3)
        panel.axvline(0.0, color="#999999", linewidth=1)
        panel.set_yticks(range(len(shown)), [name for name, _ in shown])
        panel.set_title(condition, fontsize=10)
        panel.set_xlabel("held-out loss - full data's (nats)")
        panel.grid(axis="x", alpha=0.3)
    figure.suptitle("Left of the line: better than training on everything", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def summary(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean loss and difference to full of each arm, by condition, for JSON."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for condition, arms in by_condition(rows).items():
        result[condition] = {}
        for name, seeds in arms.items():
            difference = paired(seeds, arms.get("full", {}))
            known: NDArray[np.float64] = np.array([row["loss"] for row in seeds.values()])
            result[condition][name] = {"loss": round(float(known.mean()), 4), "seeds": len(seeds)}
            if difference is not None:
                result[condition][name]["minus_full"] = round(difference.mean, 4)
    return result
