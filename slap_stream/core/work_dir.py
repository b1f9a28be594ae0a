"""Folders of work that may be cut off: whose they are, what is asked for, what is done of it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from slap_stream.core.files import read_json, write_json
from slap_stream.core.processes import run_jobs
from slap_stream.errors import CorpusError

LOCK_NAME, PLAN_NAME = "lock", "plan.json"

Manifest = dict[str, Any]


@contextmanager
def claimed(
    work_dir: Path,
    plan: Mapping[str, Any],
    *,
    result: Path,
    name: str,
    overwrite: bool | None,
    derived: Collection[str] = (),
) -> Iterator[None]:
    """Hold a work directory until the block ends, for this process and its workers alone.

    Each job leaves a manifest in it, last of all; what has a manifest is never done again.

    Args:
        work_dir: Made if it is not there.
        plan: All that decides what the work will come to, in kinds that JSON has.
        result: What the work is for, as errors give it.
        name: Name of the argument that says so.
        overwrite: Whether what another plan left is thrown away; None if the caller has no such
            option.
        derived: What in the plan follows from the rest, which errors name instead.

    Raises:
        CorpusError: If another process holds it, or another plan left it and is not to be
            overwritten.
    """
    if not work_dir.is_symlink():
        work_dir.mkdir(parents=True, exist_ok=True)
    # Nothing of ours is a link, and through one we would write elsewhere.
    below = (Path(top, name) for top, *names in os.walk(work_dir) for name in chain(*names))
    links = [work_dir] if work_dir.is_symlink() else [path for path in below if path.is_symlink()]
    if links:
        raise CorpusError(
            f"{name} must be new, empty or left by the same call, got {str(result)!r}, where "
            f"{str(links[0])!r} is a link ({len(links)} in all); delete {str(work_dir)!r}."
        )
    with (work_dir / LOCK_NAME).open("w") as lock:
        try:
            # Let go by the system when this process ends, however it does.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CorpusError(
                f"{name} must not be in use, got {str(result)!r}, which another process is "
                "writing; wait for it, or stop it."
            ) from error
        saved = read_json(work_dir / PLAN_NAME)
        changed = [] if saved is None else [key for key in plan if saved.get(key) != plan[key]]
        if changed and not overwrite:
            cure = "delete it" if overwrite is None else "pass overwrite to begin again"
            told = [key for key in changed if key not in derived] or changed
            raise CorpusError(
                f"{name} must be new, empty or left by the same call, got {str(result)!r}, left "
                f"by one with other {', '.join(told)}; make the same call, or {cure}."
            )
        if changed:
            # The plan goes first: a kill in between leaves nothing that would be gone on with.
            (work_dir / PLAN_NAME).unlink()
        if changed or saved is None:
            _clear(work_dir)
            write_json(work_dir / PLAN_NAME, plan)
        yield


def remove(work_dir: Path) -> None:
    """Remove a work directory that is held: its lock last, so that a kill leaves one of ours."""
    _clear(work_dir)
    shutil.rmtree(work_dir)


def _clear(work_dir: Path) -> None:
    for left in [path for path in work_dir.iterdir() if path.name != LOCK_NAME]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def run_missing(
    work: Callable[[Any, Callable[[int], None]], None],
    jobs: Sequence[Any],
    sizes: Sequence[int],
    manifest_of: Callable[[Any], Manifest | None],
    *,
    num_workers: int,
    bar_options: Mapping[str, Any],
) -> tuple[list[Manifest], int]:
    """Run the jobs that have no manifest yet.

    Args:
        work: Does a job, and leaves its manifest last.
        jobs: (num_jobs,) all of them.
        sizes: (num_jobs,) in the unit of the bar; all 0: not known, the bar counts.
        manifest_of: Finds the manifest of a job, or None.
        num_workers: Processes.
        bar_options: Of the progress bar.

    Returns:
        (num_jobs,) manifests of all jobs, and how many of these an earlier run had left.

    Raises:
        CorpusError: If a manifest is gone when all jobs are done.
    """
    missing = [n for n, job in enumerate(jobs) if manifest_of(job) is None]
    todo = [sizes[n] for n in missing]
    with tqdm(total=sum(sizes) or None, initial=sum(sizes) - sum(todo), **bar_options) as bar:
        run_jobs(work, [jobs[n] for n in missing], todo, num_workers=num_workers, bar=bar)
    found = [manifest for job in jobs if (manifest := manifest_of(job)) is not None]
    if len(found) < len(jobs):
        raise CorpusError(
            f"out must not be changed while it is written, got {len(jobs) - len(found)} manifests "
            "less than jobs done; run the same again."
        )
    return found, len(jobs) - len(missing)
