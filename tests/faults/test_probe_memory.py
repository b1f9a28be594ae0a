"""A probe that is short of memory reads smaller batches, says so, and at last gives up clearly."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slap_stream.errors import ProbeMemoryError
from slap_stream.probe import memory, readout
from slap_stream.probe.probe import LearnabilityProbe
from slap_stream.probe.sink import GradientSink
from tests.helpers.probe_host import Host, make
from tests.helpers.probe_host import one_thread as one_thread  # a fixture of every test here


def _cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def _cpu() -> None:
    torch.empty(1 << 50)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, Callable[[], None]], None]:
    """Memory for batches of so many samples; a larger one fails when it is half done."""
    original = GradientSink.add
    # Several blocks of tokens to a batch.
    monkeypatch.setattr(readout, "_BLOCK_ELEMENTS_CPU", 1 << 9)

    def set_limit(most: float, fail: Callable[[], None]) -> None:
        blocks: list[object] = []

        def add(self: Any, left: Any, right: Any, weights: Any, curvature: Any = None) -> None:
            original(self, left, right, weights, curvature)
            blocks.append(None)
            if len(weights) > most and len(blocks) % 3 == 2:
                fail()

        monkeypatch.setattr(GradientSink, "add", add)

    return set_limit


def _probed(batch_size: int) -> tuple[LearnabilityProbe, Host]:
    host = Host(n=16)
    probe = LearnabilityProbe(make("llama"), host, batch_size=batch_size)
    assert probe.step()
    return probe, host


@pytest.mark.parametrize("fail", [_cuda, _cpu])
def test_short_of_memory_it_sees_what_smaller_batches_show(
    limit: Any, fail: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected, calm = _probed(2)
    assert expected.metrics()["probe_out_of_memory"] == 0
    limit(2, fail)
    with caplog.at_level(logging.WARNING, logger="slap_stream"):
        probe, host = _probed(8)
        assert probe.step()
    assert expected.step()
    for ours, theirs in zip(host.updates, calm.updates, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine, other)
    np.testing.assert_equal(probe.state_dict(), expected.state_dict())
    metrics = probe.metrics()
    assert (metrics["probe_batch_size"], metrics["probe_out_of_memory"]) == (2, 2)
    assert caplog.text.count("memory is too short for a probe's batch of 8 samples") == 1


def test_without_a_smaller_batch_it_says_so_and_nothing_has_changed(limit: Any) -> None:
    probe, host = _probed(8)
    before, updates = probe.state_dict(), len(host.updates)
    limit(0, _cuda)
    with pytest.raises(
        ProbeMemoryError, match=r"a batch of 1 samples, got CUDA out of memory.*no smaller batch"
    ):
        probe.step()
    assert len(host.updates) == updates
    limit(1, _cuda)
    assert probe.step()
    assert probe.state_dict()["samples"] == before["samples"] + 16


@pytest.mark.parametrize(
    ("ranks", "cure"),
    [(1, "Nothing is lost: go on from here"), (2, "start all ranks from the last state")],
)
def test_only_without_other_ranks_can_it_go_on_from_there(
    limit: Any, monkeypatch: pytest.MonkeyPatch, ranks: int, cure: str
) -> None:
    probe, host = _probed(8)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
    limit(0, _cuda)
    refreshes = host.refreshes
    with pytest.raises(ProbeMemoryError, match="no smaller batch") as raised:
        probe.step()
    assert cure in str(raised.value)
    assert ("Nothing is lost" in str(raised.value)) == (ranks == 1)
    assert host.refreshes == refreshes


def test_one_rank_of_a_sharded_model_does_not_try_again_alone(
    limit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, _ = _probed(8)
    limit(2, _cuda)
    # As DeepSpeed marks weights in pieces.
    next(probe._model.parameters()).ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(
        ProbeMemoryError, match=r"in pieces on several ranks.* a smaller batch_size"
    ):
        probe.step()
    assert probe.metrics()["probe_out_of_memory"] == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    reads: list[int] = []

    def fail(chunk: Any) -> None:
        reads.append(len(chunk))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    batches = memory.FittingBatches(8)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        list(batches.each(np.arange(16), fail, model=nn.Linear(1, 1)))
    assert (reads, batches.failed) == ([8], 0)
