"""The quickstart's figure: loss curves, and what was kept and pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

INK, MUTED, FAINT, PAPER = "#22262b", "#747d88", "#e4e7ea", "#ffffff"
COLOURS = {"uniform": "#8a94a0", "slap": "#d1495b"}
PRUNED = "#f3d3d8"
# Fewer candidates than this say nothing about a share.
MIN_CANDIDATES = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Held-out loss of one run: `losses` after each of `samples` trained."""

    name: str
    samples: Sequence[int]
    losses: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Candidates of one kind, and how many of them a run trained on.

    Attributes:
        name: Label.
        offered: Candidates, all epochs together.
        kept: How many of them each run trained on, by its name.
    """

    name: str
    offered: int
    kept: dict[str, int]


def draw(
    path: Path,
    *,
    title: str,
    verdict: str,
    keep: float,
    curves: Sequence[Curve],
    strata: Sequence[Sequence[Group]],
    kinds: Sequence[Sequence[Group]],
) -> None:
    """Write the PNG.

    Args:
        path: Where to.
        title: First line: what was trained on.
        verdict: Second line: what came out.
        keep: Fraction of candidates trained on.
        curves: Loss curves, the uniform one first.
        strata: Kept and pruned by stratum in the slap run; one block of bars for each source.
        kinds: Groupings of the candidates, each drawn as a block of dots.
    """
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(13.0, 5.4), dpi=150)
        grid = figure.add_gridspec(
            1, 3, width_ratios=(1.25, 1.0, 0.8), left=0.055, right=0.975, top=0.76, bottom=0.13,
            wspace=0.42,
        )  # fmt: skip
        figure.text(0.055, 0.945, title, fontsize=15, fontweight="bold", va="center")
        figure.text(0.055, 0.885, verdict, fontsize=10.5, color=MUTED, va="center")
        _draw_curves(figure.add_subplot(grid[0]), curves)
        _draw_strata(figure.add_subplot(grid[1]), strata, keep)
        _draw_kinds(figure.add_subplot(grid[2]), kinds, keep)
        figure.savefig(path)
        plt.close(figure)


_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 22,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}


def _draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    axes.set_title("Held-out loss while training")
    _caption(axes, "nats per answer token, mean over held-out records")
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    for curve in curves:
        # The untrained model's loss, first in the list, would flatten everything after it.
        samples, losses = curve.samples[1:], curve.losses[1:]
        colour = COLOURS[curve.name]
        # The first line is the wider one, so that it shows where the other lies on it.
        width = 4.5 if curve is curves[0] else 2.0
        axes.plot(samples, losses, color=colour, linewidth=width, marker="o", markersize=3.5)
    first, last = curves[0].samples[1], curves[0].samples[-1]
    axes.set_xlim(first - 0.04 * last, last * 1.34)
    ends = np.array([curve.losses[-1] for curve in curves])
    low, high = axes.get_ylim()
    # Labels beside the ends of the lines, moved apart where the ends meet.
    least = 0.055 * (high - low)
    order = np.argsort(ends)
    places = ends[order].astype(float)
    gap = least - (places[1] - places[0])
    if gap > 0:
        places += np.array([-gap / 2, gap / 2])
    for place, index in zip(places, order, strict=True):
        curve = curves[index]
        axes.text(
            last * 1.025, place, f"{curve.name} {curve.losses[-1]:.3f}",
            color=COLOURS[curve.name], fontweight="bold", va="center",
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    axes.set_ylim(min(low, places[0] - least), high)
    axes.set_xlabel("samples trained on")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.locator_params(axis="x", nbins=6)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])


def _caption(axes: Axes, text: str) -> None:
    axes.text(0.0, 1.03, text, transform=axes.transAxes, fontsize=8, color=MUTED)


def _draw_strata(axes: Axes, strata: Sequence[Sequence[Group]], keep: float) -> None:
    axes.set_title("Kept and pruned by stratum")
    _caption(axes, "a bar is a cluster; dark: kept by slap, light: pruned")
    longest = max(group.offered for block in strata for group in block)
    row, rows, names = 0.0, [], []
    for block in strata:
        start = row
        for group in sorted(block, key=lambda group: -group.offered):
            kept = group.kept["slap"]
            axes.barh(row, kept, color=COLOURS["slap"], height=0.74)
            axes.barh(row, group.offered - kept, left=kept, color=PRUNED, height=0.74)
            if group.offered >= MIN_CANDIDATES:
                axes.text(
                    group.offered + 0.015 * longest, row, f"{kept / group.offered:.0%}",
                    va="center", fontsize=6.5, color=MUTED,
                )  # fmt: skip
            row -= 1.0
        rows.append((start + row + 1.0) / 2)
        names.append(block[0].name)
        row -= 0.9
    axes.set_yticks(rows, names)
    axes.set_xlim(0, longest * 1.1)
    axes.set_ylim(row + 1.2, 0.8)
    axes.set_xlabel(f"candidates, all epochs (kept overall: {keep:.0%})")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.locator_params(axis="x", nbins=5)


def _draw_kinds(axes: Axes, kinds: Sequence[Sequence[Group]], keep: float) -> None:
    axes.set_title("Share kept by kind")
    axes.axvline(keep, color=FAINT, linewidth=1.2)
    row, rows, names = 0.0, [], []
    lowest, highest = keep, keep
    for block in kinds:
        for group in block:
            for place, (name, kept) in enumerate(group.kept.items()):
                share = kept / group.offered
                # Twice the standard error of a share of so many candidates.
                error = 2 * np.sqrt(keep * (1 - keep) / group.offered)
                axes.errorbar(
                    share, row - 0.26 * (place - 0.5), xerr=error, fmt="o",
                    color=COLOURS[name], markersize=6, elinewidth=1, zorder=2,
                )  # fmt: skip
                lowest, highest = min(lowest, share - error), max(highest, share + error)
            rows.append(row)
            names.append(f"{group.name}\n{group.offered:,} candidates")
            row -= 1.0
        row -= 0.6
    axes.set_yticks(rows, names, fontsize=8)
    axes.set_ylim(row + 1.0, 0.6)
    pad = 0.06 * (highest - lowest)
    axes.set_xlim(max(0.0, lowest - pad), min(1.0, highest + pad))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.locator_params(axis="x", nbins=5)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("of the candidates, two standard errors")
    for place, name in enumerate(COLOURS):
        axes.text(
            place * 0.34, 1.03, f"● {name}", color=COLOURS[name], transform=axes.transAxes,
            fontsize=8, fontweight="bold",
        )  # fmt: skip
