"""Ratios to the stock loader of the same round, and their spread."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

Result = dict[str, Any]
# What is compared: everything of a result but its arm and its round.
CASE = ("kind", "remote", "num_workers")
BASE = "stock"


def ratios(results: Sequence[Result], base: Sequence[Result]) -> list[float]:
    """Ratios of samples per second, of the rounds that both have."""
    stock = {result["round"]: result["samples_per_second"] for result in base}
    return [
        result["samples_per_second"] / stock[result["round"]]
        for result in results
        if result["round"] in stock
    ]


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row per case and arm, in the order in which they first ran."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result[name] for name in (*CASE, "arm")), []).append(result)
    table = []
    for (*case, arm), mine in groups.items():
        found = ratios(mine, groups.get((*case, BASE), []))
        table.append(
            {
                **dict(zip(CASE, case, strict=True)),
                "arm": arm,
                "samples_per_second": _median(mine, "samples_per_second"),
                "milliseconds_per_batch": _median(mine, "milliseconds_per_batch"),
                "ratio": median(found) if found else None,
                "ratio_low": min(found, default=None),
                "ratio_high": max(found, default=None),
                "rounds": len(mine),
                "selecting_share": _share(mine, "select_seconds_per_sample"),
                "waiting_share": _share(mine, "wait_seconds_per_sample"),
                "main_cpu_us_per_sample": _median(mine, "main_cpu_seconds_per_sample") * 1e6,
                "first_batch_seconds": _median(mine, "first_batch_seconds"),
                "peak_mb": _median(mine, "peak_bytes") / 1e6,
            }
        )
    return table


def text(table: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| corpus | workers | arm | samples/s | ms a batch | times stock [range] | selecting "
        "| first batch, s |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        where = f"{row['kind']}, remote" if row["remote"] else row["kind"]
        times = ""
        if row["ratio"] is not None and row["arm"] != BASE:
            times = f"{row['ratio']:.1f} [{row['ratio_low']:.1f}, {row['ratio_high']:.1f}]"
        share = f"{row['selecting_share']:.0%}" if row["selecting_share"] else ""
        lines.append(
            f"| {where} | {row['num_workers']} | {row['arm']} | {row['samples_per_second']:,.0f} "
            f"| {row['milliseconds_per_batch']:.1f} | {times} | {share} "
            f"| {row['first_batch_seconds']:.2f} |"
        )
    return "\n".join(lines)


def _median(results: Sequence[Result], name: str) -> float:
    return float(median(result[name] for result in results))


def _share(results: Sequence[Result], name: str) -> float:
    """Of the time, where it is given per sample."""
    return float(median(result[name] * result["samples_per_second"] for result in results))
