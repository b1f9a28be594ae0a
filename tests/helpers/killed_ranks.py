"""A job of two ranks that is killed again and again, and the batches it has made in the end.

    python -m tests.helpers.killed_ranks --times 20            # by hand; the suite runs it with 3

Kills in turn a DataLoader worker, a rank and the whole job, at random times. What is left of a job
is ended as torchrun would end it, and the next one goes on from the last checkpoint: in turn on one
node of two processes and on two simulated nodes of one. Prints how often each was killed and
whether the ids are those of the unbroken run, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from streaming import StreamingDataset
from streaming.base.shared import prefix

from slap_stream.core.state_bytes import from_bytes, to_bytes
from tests.helpers.forked import forked
from tests.laws import config_of
from tests.loader.test_loader import BATCH, feed, make, write_corpus

RANKS = 2
SAVE_EVERY = 3
KINDS = ("worker", "rank", "job")


def loader_of(corpus: Path, world_size: int, *, num_workers: int) -> Any:
    dataset = StreamingDataset(local=str(corpus), batch_size=BATCH // world_size)
    return make(
        corpus,
        dataset=dataset,
        config=config_of(num_lanes=2, lookahead=4),
        num_workers=num_workers,
        batch_size=BATCH // world_size,
    )


def run_rank(rank: int, corpus: Path, folder: Path, attempt: int, total: int) -> None:
    """One rank of a job, from the last checkpoint on."""
    each = RANKS // (1 + attempt % 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"LOCAL_RANK": str(rank % each), "LOCAL_WORLD_SIZE": str(each)}
    # A killed job leaves its shared memory behind, and other suites may run on this machine; nodes
    # have none in common.
    first = 1_000 * (os.getppid() % 900) + 10 * attempt + 5 * (rank // each)
    prefix._each_prefix_int = lambda: iter(range(first, first + 5))
    store = f"file://{folder}/store{attempt}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    loader = loader_of(corpus, RANKS, num_workers=1)
    done, checkpoint = 0, folder / "checkpoint"
    if checkpoint.exists():
        saved = from_bytes(checkpoint.read_bytes())
        loader.load_state_dict(saved["loader"])
        done = saved["done"]
    while done < total:
        for batch in loader:
            ids = feed(loader, batch)
            with (folder / f"ids{rank}.jsonl").open("a") as file:
                file.write(json.dumps([done, ids]) + "\n")
            done += 1
            if done % SAVE_EVERY == 0:
                data = to_bytes({"done": done, "loader": loader.state_dict()})
                if rank == 0:
                    checkpoint.with_suffix(".part").write_bytes(data)
                    checkpoint.with_suffix(".part").replace(checkpoint)
            time.sleep(0.02)
            if done == total:
                break


def kill(kind: str, pids: list[int], draws: random.Random) -> bool:
    """Kill one of a kind; whether there was one."""
    if kind == "job":
        for pid in pids:
            os.killpg(pid, signal.SIGKILL)
        return True
    victims = [draws.choice(pids)]
    if kind == "worker":
        # Between two epochs there is none; Python's resource tracker is a child too.
        victims = [
            child.pid
            for child in psutil.Process(victims[0]).children()
            if not {"resource_tracker", psutil.STATUS_ZOMBIE} & {*description_of(child)}
        ]
    if victims:
        os.kill(draws.choice(victims), signal.SIGKILL)
    return bool(victims)


def description_of(child: psutil.Process) -> list[str]:
    """Status of a process, and the words of its command."""
    try:
        return [child.status(), *" ".join(child.cmdline()).replace(".", " ").split()]
    except psutil.NoSuchProcess:
        return [psutil.STATUS_ZOMBIE]


def failed_within(pids: list[int], seconds: float) -> bool:
    """Whether a rank ends in time; it is still to be waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if any(os.waitid(os.P_PID, pid, options) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def wait(pids: list[int], seconds: float) -> list[int]:
    """Exit codes of a job's ranks; when one has failed the others are ended."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids):
        assert time.monotonic() < end, "a rank hangs"
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    for other in set(pids) - set(codes):
                        os.killpg(other, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def main(times: int, seed: int) -> dict[str, Any]:
    draws = random.Random(seed)
    torch.set_num_threads(1)
    # No TemporaryDirectory: the ranks, which are forks, would remove it at their end.
    folder = Path(tempfile.mkdtemp(prefix="killed"))
    try:
        return run_jobs(folder, times, draws)
    finally:
        shutil.rmtree(folder)


def run_jobs(folder: Path, times: int, draws: random.Random) -> dict[str, Any]:
    corpus = write_corpus(folder / "corpus")
    kills: Counter[str] = Counter()
    for attempt in range(times + 1):
        killing = sum(kills.values()) < times
        # The last job ends by itself, a few batches on.
        total = 10**9 if killing else count_lines(folder) + 6
        job = corpus, folder, attempt, total
        pids = [forked(run_rank, rank, *job, own_session=True) for rank in range(RANKS)]
        if killing:
            kind = KINDS[sum(kills.values()) % len(KINDS)]
            lines, began = count_lines(folder), time.monotonic()
            while count_lines(folder) == lines and time.monotonic() < began + 60:
                time.sleep(0.01)
            time.sleep(draws.uniform(0.0, 0.5))
            # A worker that has just read its last batch of an epoch is not missed: another one.
            while not (kill(kind, pids, draws) and failed_within(pids, 8.0)):
                pass
            kills[kind] += 1
        codes = wait(pids, 120.0)
        assert any(codes) == killing, codes
    ids = [merged(folder / f"ids{rank}.jsonl") for rank in range(RANKS)]
    made = [[i for part in ids for i in part[batch]] for batch in range(total)]
    loader, unbroken = loader_of(corpus, 1, num_workers=0), []
    while len(unbroken) < total:
        unbroken += [feed(loader, batch) for batch in loader]
    return {
        "kills": kills,
        "jobs": attempt + 1,
        "batches": total,
        "equal": made == unbroken[:total],
    }


def count_lines(folder: Path) -> int:
    log = folder / "ids0.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def merged(log: Path) -> dict[int, list[int]]:
    """Batches by number; one that was made again after a checkpoint must be the same again."""
    seen: dict[int, list[int]] = {}
    for line in log.read_text().splitlines():
        batch, ids = json.loads(line)
        assert seen.setdefault(batch, ids) == ids, f"batch {batch} differs after a resume"
    return seen


if __name__ == "__main__":
    line = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    line.add_argument("--times", type=int, default=20)
    line.add_argument("--seed", type=int, default=0)
    arguments = line.parse_args()
    print(json.dumps(main(arguments.times, arguments.seed)))
