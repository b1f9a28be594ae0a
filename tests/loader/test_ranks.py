"""Many ranks in real processes: the laws, what it costs, and what is said when something is wrong.

`ranks_run` is started once, with four processes of two simulated nodes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slap_stream import SlapSampler
from slap_stream.errors import ConfigError, ExchangeError
from slap_stream.loader.ranks import Ranks, join_ranks
from slap_stream.types import Position
from tests.laws import config_of
from tests.loader.test_loader import break_shard, make, write_corpus
from tests.selection.test_sampler import embeddings

ROOT = Path(__file__).parents[2]
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each of the four processes has found."""
    folder = tmp_path_factory.mktemp("ranks")
    corpus, broken = write_corpus(folder / "corpus"), write_corpus(folder / "broken")
    break_shard(broken, "shard.00002.mds")
    write_corpus(folder / "corpus-large", count=1600)
    run_module("tests.helpers.ranks_run", corpus, broken, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(4)]


def run_module(module: str, *arguments: str | Path) -> str:
    """What a module prints that starts the processes of a job."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def joined(results: Results, scenario: str, name: str, world_size: int) -> list[list[int]]:
    """The global batches, of the ranks' parts in their order."""
    parts = [result[scenario][name] for result in results[:world_size]]
    assert len({len(part) for part in parts}) == 1, "equal steps"
    return [list(chain.from_iterable(batch)) for batch in zip(*parts, strict=True)]


@pytest.mark.parametrize("feedback", ["table", "probe"])
def test_the_world_size_is_free(results: Results, feedback: str) -> None:
    alone = joined(results, "laws", f"{feedback} 1", 1)
    assert len(alone) == 17 + 5, "an epoch and a part of the next"
    for world_size in (2, 4):
        assert joined(results, "laws", f"{feedback} {world_size}", world_size) == alone


@pytest.mark.parametrize("feedback", ["table", "probe"])
def test_saved_on_four_ranks_a_run_goes_on_on_any_number(results: Results, feedback: str) -> None:
    unbroken = joined(results, "laws", f"{feedback} 4", 4)
    for world_size in (1, 2, 4):
        name = f"{feedback} from 4 on {world_size}"
        assert joined(results, "laws", name, world_size) == unbroken[7:]
    assert all(result["laws"][f"{feedback} lanes"] == [0, 1, 2, 3] for result in results)


def test_bad_samples_leave_the_world_size_free(results: Results) -> None:
    alone = joined(results, "bad_samples", "1", 1)
    assert joined(results, "bad_samples", "4", 4) == alone
    assert len(alone) == 17
    assert all(ids and all(number % 2 for number in ids) for ids in alone)
    withdrawn = [result["bad_samples"]["withdrawn 4"] for result in results]
    assert sum(withdrawn) == results[0]["bad_samples"]["withdrawn 1"]
    assert min(withdrawn) > 0


def test_feedback_counts(results: Results) -> None:
    assert results[0]["laws"]["table 1"] != results[0]["laws"]["probe 1"]


@pytest.mark.parametrize("feedback", ["table", "probe"])
def test_nothing_is_sent_but_at_refreshes(results: Results, feedback: str) -> None:
    exchange = {
        "gloo.all_gather": 1,
        "gloo.all_to_all": 1,
        "gloo.gather": 1,
        "gloo.broadcast": 2,
    }
    for rank, result in enumerate(results):
        calls = result["cost"][feedback]
        assert [bool(call) for call in calls].count(True) == 4
        assert all(call in ({}, exchange) for call in calls)
        metrics = result["cost"][f"{feedback} metrics"]
        # Two more, when the loader is made: who the ranks are, and that they mean the same run.
        assert metrics["exchanges"] == 6
        if feedback == "table":
            # 294 numbers in four slices: all of them to be added up, one slice that was.
            rest = metrics["exchange_bytes"] - 4 * 8 * (4 + 1) * -(-294 // 4)
            # Besides, a description of the run, and what the first has to tell the others.
            assert 0 < rest < (4096 if rank else 4096 + 4 * 4096)


def test_what_is_sent_does_not_grow_with_the_data() -> None:
    sizes = []
    for shards in (4, 400):
        sampler = SlapSampler(
            [50] * shards, embeddings(50 * shards), batch_size=8, config=config_of(num_lanes=2)
        )
        next(iter(sampler))
        sizes.append(
            [sampler._refreshes._layout.pack(state).nbytes for state in sampler.statistics()]
        )
    assert sizes[0] == sizes[1]


def test_an_epoch_cut_short_ends_at_the_same_step_everywhere(results: Results) -> None:
    alone = joined(results, "cut_short", "1", 1)
    assert 0 < len(alone) < 25
    assert joined(results, "cut_short", "4", 4) == alone
    assert joined(results, "cut_short", "next 4", 4) == joined(results, "cut_short", "next 1", 1)
    withdrawn = [result["cut_short"]["metrics 4"]["withdrawn"] for result in results]
    assert sorted(map(bool, withdrawn)) == [False, False, False, True], "one rank knew of it"
    assert all(result["cut_short"]["metrics 4"]["epochs_cut_short"] == 1 for result in results)


@pytest.mark.parametrize("how", ["replication", "mesh", "numbers"])
def test_processes_of_one_rank_get_the_same_batches(results: Results, how: str) -> None:
    parts = [result["replicas"][how] for result in results]
    assert parts[0] == parts[1]
    assert parts[2] == parts[3]
    pairs = [left + right for left, right in zip(parts[0], parts[2], strict=True)]
    assert pairs == joined(results, "laws", "table 1", 1)[: len(pairs)]
    assert results[0]["replicas"][f"{how} lanes"] == 4, "each lane once"


def test_ranks_of_a_node_share_its_cache_limit(results: Results) -> None:
    for result in results:
        limited = result["limited"]
        downloads = limited["downloads"]
        assert "each rank, of which this node has 2, work on" in limited["error"]
        # As on one rank: two lanes of the node may have a shard in common.
        assert len(downloads) <= len(set(downloads)) + 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mismatch", "lane statistics (294 numbers) at epoch 0, step 6, by ranks 0, 2, 3; lane st"),
        ("elsewhere", "at epoch 0, step 7, by ranks 2: call the loader, probe.step and state_dict"),
        ("seeds", "settings and data, got seed: 0 on rank 0, 1 on rank 1; a seed must not depend"),
        ("join", "so that 4 processes have ranks 0 to world_size - 1, got ranks 0, 0, 0, 0 of 4"),
        ("global batch", "global_batch: 16 -> 64. On 4 ranks give each a batch_size of the saved"),
    ],
)
def test_ranks_that_do_not_fit_together_say_so(results: Results, name: str, message: str) -> None:
    for result in results:
        assert message in result["errors"][name]


def test_a_log_that_one_rank_cannot_write_ends_no_run_that_did_not_ask_for_it(
    results: Results,
) -> None:
    for result in results[:2]:
        found = result["unwritable"]
        assert "run_dir must be a directory, new or old, that may be written" in found["asked for"]
        assert "log of 1" in found["asked for"]
        assert "on rank 1 (1 of 2 ranks); name another, or None for no" in found["asked for"]
        assert found["failed"] == 1
        assert found["written"] == []
    whole = joined(results, "laws", "table 2", 2)
    assert joined(results, "unwritable", "batches", 2) == whole[:3]


def test_twins_that_have_parted_say_so(results: Results) -> None:
    for result in results:
        assert "got others on 2 of 2 processes of rank 1" in result["replicas"]["parted"]


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(results: Results) -> None:
    for rank, result in enumerate(results[:3]):
        assert result["errors"]["waited"] < 10
        message = result["errors"]["late"]
        assert f"rank {rank} of 4 must reach all others" in message
        assert "at epoch 0, step 6, while exchanging lane statistics" in message


def test_the_probe_reads_a_wrapped_model_as_it_is(results: Results) -> None:
    plain = joined(results, "training", "plain", 4)
    assert joined(results, "training", "ddp", 4) == plain
    assert joined(results, "training", "fsdp", 4) == plain
    for result in results:
        training = result["training"]
        assert 0 < training["sharded"] < 61, "sharded again after the probe"
        for wrapped in ("ddp", "fsdp"):
            assert training[f"{wrapped} probe"]["probe_moment_from_optimizer"] == 1
        np.testing.assert_allclose(training["ddp moment"], training["fsdp moment"], rtol=1e-4)


def test_the_trainer_runs_on_many_ranks_and_goes_on(results: Results) -> None:
    whole = joined(results, "trainer", "whole", 4)
    assert len(whole) == 17
    assert len({i for batch in whole for i in batch}) == 17 * 16
    assert joined(results, "trainer", "rest", 4) == whole[13:]
    for result in results:
        training = result["trainer"]
        assert training["whole steps"] == training["rest steps"] == 17
        assert training["whole wrapped"] == "DistributedDataParallel"
        assert training["whole metrics"]["probe_samples"] > 0


def test_torchs_distributed_checkpoints_hold_the_loader(results: Results) -> None:
    for result in results:
        assert result["training"]["again"] == result["training"]["fsdp"][9:13]


def test_killed_again_and_again_a_job_makes_the_same_batches() -> None:
    result = json.loads(run_module("tests.helpers.killed_ranks", "--times", "3").splitlines()[-1])
    assert result["kills"] == {"worker": 1, "rank": 1, "job": 1}
    assert result["equal"]


def test_a_world_that_was_not_connected_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(write_corpus(tmp_path / "corpus"))
    dataset = loader.dataset._dataset
    monkeypatch.setattr(dataset._unique_rank_world, "num_ranks", 2)
    with pytest.raises(ConfigError, match=r"got a world of 2 without; call torch.distributed.init"):
        make(tmp_path, dataset=dataset)
    with monkeypatch.context() as patch:
        # As in the second process of Lightning's own launcher.
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda: 1)
        with pytest.raises(ConfigError, match=r"RANK must be .* 1, .* made, got 0 of 2; start the"):
            make(tmp_path, dataset=dataset)
    with pytest.raises(ConfigError, match="rank and world_size must be given together, got 1 and"):
        join_ranks(rank=1)
    with pytest.raises(ConfigError, match="rank must be a whole number, got '0'"):
        join_ranks(rank="0", world_size=2)  # type: ignore[arg-type]
    for timeout in (0.0, "60"):
        with pytest.raises(ConfigError, match="exchange_timeout must be a positive number"):
            join_ranks(timeout_seconds=timeout)  # type: ignore[arg-type]


class Alone:
    """Connections to another process that does as this one does, until it is interrupted."""

    size, place, members, timeout_seconds = 2, 0, (0, 1), 1.0

    def all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        both = torch.stack([mine, mine])
        both[1, 1] = 1  # the other's rank, in a header
        return both

    def all_to_all(self, parts: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt


def test_after_an_exchange_that_was_ended_half_way_there_is_no_other() -> None:
    ranks = Ranks(0, 2, Alone())  # type: ignore[arg-type]
    position = Position(epoch=1, step=16, digest=0)
    with pytest.raises(KeyboardInterrupt):
        ranks.sum_lanes(np.ones((1, 4)), 3, position)
    for exchange in (
        lambda: ranks.gather(b"", position),
        lambda: ranks.sum_lanes(np.ones((1, 4)), 3, position),
    ):
        with pytest.raises(ExchangeError, match="ended half way, at epoch 1, step 16; start all"):
            exchange()
    ranks.close()
    with pytest.raises(ExchangeError, match="got a loader that was closed"):
        ranks.gather(b"", position)


class Told:
    """What the first of two ranks has for the other, who hears it in the same process."""

    def __init__(self, rank: int, told: list[bytes]) -> None:
        self._rank, self._told = rank, told

    def sum_lanes(self, rows: Any, least: int, position: Position) -> Any:
        # The other rank's lane counts for nothing.
        return (None if self._rank else rows[0]), least

    def tell(self, data: bytes | None, position: Position) -> bytes:
        if data is not None:
            self._told.append(data)
        return self._told[-1]


def test_what_one_rank_could_not_learn_all_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bytes] = []
    samplers = [
        SlapSampler(
            [40] * 4,
            embeddings(160),
            batch_size=4,
            config=config_of(num_lanes=2),
            rank=rank,
            world_size=2,
            exchange=Told(rank, told),
        )
        for rank in range(2)
    ]
    for sampler in samplers:
        batch = sampler.compose()
        assert batch is not None
        sampler.observe(batch, np.ones(4))
        sampler.refresh()
    assert samplers[1].state_dict()["shared"]["model"]["moments"] is None, "the first has the sums"

    def fail(sums: Any) -> None:
        raise np.linalg.LinAlgError("singular")

    monkeypatch.setattr(samplers[0]._shared, "learn", fail)
    for sampler in samplers:
        sampler.compose()
        with pytest.raises(ExchangeError, match=r"rank 0 .* step 2, got LinAlgError: singular; st"):
            sampler.refresh()


def test_an_interrupt_does_not_end_an_exchange_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(write_corpus(tmp_path / "corpus"))
    next(iter(loader))
    loader.metrics()  # after what is composed in the background
    ranks, done = loader._ranks, list[str]()
    original = ranks.sum_lanes

    def sum_lanes(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        done.append("sum")
        return original(*arguments)

    monkeypatch.setattr(ranks, "sum_lanes", sum_lanes)
    host = loader.probe_host()
    with pytest.raises(KeyboardInterrupt):
        host.refresh(np.ones((2, 3)), lambda total: done.append(str(total.tolist())))
    step = loader.sampler.step
    assert done == ["sum", "[2.0, 2.0, 2.0]"], "the probe has been told, too"
    assert loader.state_dict()["sampler"]["refreshes"]["refreshed_before"] == step


def test_one_rank_prepares_a_dataset_and_the_others_find_it(results: Results) -> None:
    found = [result["preparing"] for result in results]
    for stage in ("shared", "own"):
        digests = {tuple(rank[stage][1:]) for rank in found}
        assert len(digests) == 1
        # The name is the first rank's.
        assert len({Path(rank[stage][0]).name for rank in found}) == 1
    assert [rank["shared calls"] for rank in found] == [1, 0, 0, 0]
    assert len({rank["shared"][0] for rank in found}) == 1
    # Of a node whose disk does not show it, one process makes it once more.
    calls = [rank["own calls"] for rank in found]
    assert calls[:2] == [1, 0]
    assert sum(calls[2:]) == 1


def test_what_fails_on_one_rank_while_preparing_is_told_to_all(results: Results) -> None:
    found = [result["preparing"] for result in results]
    assert "got none; left out were empty turn: text: 3" in found[0]["first fails"]
    for rank in found[1:]:
        assert rank["first fails"].startswith(
            "all ranks must have the corpus, got an error on rank 0 (1 in all): CorpusError: inputs"
        )
    for rank in found[:2]:
        assert "got an error on rank 2 (2 in all): CorpusError: dataset" in rank["others differ"]
    for rank in found[2:]:
        assert "dataset must be the same on all ranks, got another" in rank["others differ"]
    # What is looked at before anything is made counts, too.
    for call, name in (("not there", "dataset"), ("trainer", "train_dataset")):
        assert found[0][call] == found[1][call]
        assert f"got an error on rank 2 (2 in all): CorpusError: {name} must" in found[0][call]
        for rank in found[2:]:
            assert rank[call].startswith(f"{name} must exist, got ")


def test_a_rank_that_never_comes_is_not_waited_for_with_patience(results: Results) -> None:
    found = [result["preparing"] for result in results]
    for rank in found[1:]:
        assert rank["not come"].startswith("all ranks must come to prepare their dataset and stay")
        assert rank["not come seconds"] < 60
