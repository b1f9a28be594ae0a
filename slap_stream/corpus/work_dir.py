"""Folder of an unfinished conversion: whose it is, what is done, and what is left to do."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from slap_stream.core.files import write_json
from slap_stream.core.processes import run_jobs
from slap_stream.errors import CorpusError

WORK_NAME = ".convert"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifests:
    """What jobs left behind.

    Attributes:
        manifests: (num_jobs,) of all jobs.
        resumed: How many of them an earlier run had done.
    """

    manifests: list[dict[str, Any]]
    resumed: int


@contextmanager
def claimed(out: Path, plan: Mapping[str, Any]) -> Iterator[Path]:
    """The work directory of a plan in `out`, for this process alone until the block ends.

    Args:
        out: Directory of the corpus; made if it is not there.
        plan: All that decides what the corpus will be.

    Raises:
        CorpusError: If `out` holds something else, or another process has claimed it.
    """
    work_dir = out / WORK_NAME
    if out.exists() and not out.is_dir():
        raise CorpusError(f"out must be a directory, got the file {str(out)!r}.")
    held = sorted(file.name for file in out.iterdir()) if out.is_dir() else []
    if held and WORK_NAME not in held:
        raise CorpusError(
            f"out must be new, empty or left by the same call, got {str(out)!r} with {held[:5]!r} "
            f"({len(held)} in all); choose another directory."
        )
    work_dir.mkdir(parents=True, exist_ok=True)
    with (work_dir / "lock").open("w") as lock:
        try:
            # Let go by the system when this process ends, however it does.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CorpusError(
                f"out must not be in use, got {str(out)!r}, into which another process converts."
            ) from error
        saved_plan = work_dir / "plan.json"
        if saved_plan.is_file():
            saved = json.loads(saved_plan.read_text("utf-8"))
            changed = [name for name in plan if saved.get(name) != plan[name]]
            if changed:
                raise CorpusError(
                    f"out must be new, empty or left by the same call, got {str(out)!r}, left by "
                    f"one with other {', '.join(changed)}; make the same call, or delete it."
                )
        else:
            write_json(saved_plan, plan)
        # Of processes that were killed.
        for unfinished in work_dir.glob("part-*.*"):
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
        yield work_dir


def run_missing(
    work: Callable[[Any, Callable[[int], None]], None],
    jobs: Sequence[Any],
    sizes: Sequence[int],
    manifest_of: Callable[[Any], dict[str, Any] | None],
    *,
    num_workers: int,
    bar_options: Mapping[str, Any],
) -> Manifests:
    """Run the jobs that have no manifest yet.

    Args:
        work: Does a job, and leaves its manifest last.
        jobs: (num_jobs,) all of them.
        sizes: (num_jobs,) in the unit of the bar.
        manifest_of: Finds the manifest of a job, or None.
        num_workers: Processes.
        bar_options: Of the progress bar.

    Raises:
        CorpusError: If a manifest is gone when all jobs are done.
    """
    missing = [n for n, job in enumerate(jobs) if manifest_of(job) is None]
    todo = [sizes[n] for n in missing]
    with tqdm(total=sum(sizes), initial=sum(sizes) - sum(todo), **bar_options) as bar:
        run_jobs(work, [jobs[n] for n in missing], todo, num_workers=num_workers, bar=bar)
    manifests = [manifest_of(job) for job in jobs]
    found = [manifest for manifest in manifests if manifest is not None]
    if len(found) < len(jobs):
        raise CorpusError(
            f"out must not be changed while it is written, got {len(jobs) - len(found)} manifests "
            "less than jobs done; run the same again."
        )
    return Manifests(manifests=found, resumed=len(jobs) - len(missing))
