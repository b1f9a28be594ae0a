"""Tools that every stage may use: compiled loops, linear algebra, random draws, files, processes.

kernels.py      loops over rows, compiled; the only importer of numba
linear.py       linear algebra on one thread, so that sums come out alike
sorting.py      candidates in the order of a score
rng.py          random draws as a function of counters, never of history
background.py   a thread that does one thing after the other
processes.py    jobs over worker processes that end with their parent
files.py        files that are found whole or not at all
state_bytes.py  a state as bytes, without pickle
"""

from __future__ import annotations

# What other folders may import, by module; tests/test_architecture.py holds it.
EXPORTS = {
    "kernels": (
        "Heads",
        "heads_of",
        "nearest_of_group",
        "njit",
        "project",
        "sum_by_group",
        "unit_rows",
        "weigh",
        "widen_halves",
    ),
    "linear": (
        "inverse_of_triangle",
        "leading_directions",
        "power_after",
        "row_chunks",
        "single_threaded",
    ),
    "sorting": ("first_of_each", "place_in_group", "sort_candidates"),
    "rng": ("Purpose", "generator", "gumbels", "uniforms"),
    "background": ("Background", "BackgroundThread"),
    "processes": ("run_jobs", "usable_cores"),
    "files": ("file_digest", "read_json", "write_json"),
    "state_bytes": ("from_bytes", "to_bytes"),
}
