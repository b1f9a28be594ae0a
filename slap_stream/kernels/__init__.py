"""Compiled inner loops; nothing else imports numba.

Kernels fill arrays that their wrappers allocate, draw no random numbers and see no Python objects.
Each has an obvious twin in `tests/reference.py`. A row's result does not depend on which rows it is
computed with, which is what makes a resumed run equal to an unbroken one bit by bit: sums are added
up in the order that is written, but for `_dot` and `_power`, whose order is the compiler's and
always the same.
"""

from __future__ import annotations

from slap_stream.kernels.choosing import (
    compose_greedily,
    farthest_points,
    fill_largest,
    mid_ranks,
    shared_and_nearest,
)
from slap_stream.kernels.rows import (
    Heads,
    heads_of,
    nearest_of_group,
    project,
    sum_units_by_group,
    unit_rows,
    weigh,
    widen_halves,
)

__all__ = [
    "Heads",
    "compose_greedily",
    "farthest_points",
    "fill_largest",
    "heads_of",
    "mid_ranks",
    "nearest_of_group",
    "project",
    "shared_and_nearest",
    "sum_units_by_group",
    "unit_rows",
    "weigh",
    "widen_halves",
]
