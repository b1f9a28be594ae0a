"""Tools that every stage may use: compiled loops, linear algebra, random draws, files, processes.

kernels.py      loops over rows, compiled; the only importer of numba
linear.py       linear algebra on one thread, so that sums come out alike
sorting.py      candidates in the order of a score
outliers.py     whose value stands out of its group, and how sure that is
rng.py          random draws as a function of counters, never of history
background.py   a thread that does one thing after the other
processes.py    jobs over worker processes that end with their parent
checks.py       checks of arguments that several stages make
work_dir.py     work that may be cut off, and goes on when it is called again
files.py        files that are found whole or not at all, and where they may lie
room.py         room on a disk, before it is used up and after
state_bytes.py  a state as bytes, without pickle
saved.py        a saved state, checked entry by entry
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
        "normalised",
        "power_after",
        "row_chunks",
        "single_threaded",
    ),
    "sorting": ("first_of_each", "place_in_group", "sort_candidates"),
    "outliers": ("Mirror", "Spread"),
    "rng": ("Purpose", "generator", "gumbels", "uniforms"),
    "background": ("Background", "BackgroundThread"),
    "processes": ("run_jobs", "usable_cores"),
    "work_dir": ("LOCK_NAME", "PLAN_NAME", "claimed", "remove", "run_missing"),
    "checks": ("require_whole",),
    "files": (
        "file_digest",
        "file_to_write",
        "leads_inside",
        "local_path",
        "path_inside",
        "path_to_write",
        "read_json",
        "require_inside",
        "sync_new",
        "writable",
        "write_json",
        "write_text",
        "written_whole",
    ),
    "room": ("require_room", "told_when_full"),
    "state_bytes": ("from_bytes", "to_bytes"),
    "saved": ("Saved",),
}
