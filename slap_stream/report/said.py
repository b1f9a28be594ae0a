"""Numbers as people read them."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """A count, with thousands apart."""
    return f"{value:,.0f}"


def tokens(count: float, unit: str) -> str:
    """A length, in a store's unit."""
    if unit == "tokens":
        return f"{number(count)} tokens"
    return f"about {number(count)} tokens ({unit})"


def percent(value: float) -> str:
    """A share; a dash where it is not known."""
    if math.isnan(value):
        return "\N{EN DASH}"
    return f"{value:.2%}" if 0 < value < 0.01 else f"{value:.1%}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whatever is short."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
