"""Accelerate's `prepare` leaves a loader's batches as they are, and its loop is the usual one."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState, PartialState
from transformers import BatchEncoding

from tests.helpers.recipes_run import Accelerated
from tests.laws import config_of
from tests.loader.test_loader import feed, make, run
from tests.test_training import folder  # noqa: F401  (a fixture)

# 206 candidates in batches of 8, of which 0.7 are kept: 18 batches, and a group of 2 at the end.
BATCHES, ACCUMULATED = 18, 4
# After the last group of an epoch, and within both of them.
CUTS = (4, 18, 26)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accelerate")


@pytest.fixture(scope="module")
def trained(folder: Path, saved: Path) -> Accelerated:  # noqa: F811
    """Two epochs in one go, with checkpoints."""
    job = Accelerated(folder, accumulation=ACCUMULATED)
    job.train(saves={cut: saved / str(cut) for cut in CUTS})
    return job


def test_a_prepared_loader_yields_the_same_batches(corpus: Path, unbroken: list[list[int]]) -> None:
    loader = make(corpus)
    # Prepared again, as by two functions that do not know of each other.
    for _ in range(2):
        assert Accelerator(cpu=True).prepare(loader) is loader
        assert Accelerator(cpu=True).prepare_data_loader(loader) is loader
    assert run(loader, len(unbroken)) == unbroken


def test_each_epoch_ends_with_a_step_on_the_group_that_is_left(trained: Accelerated) -> None:
    groups = [4, 8, 12, 16, 18]
    assert trained.steps == groups + [BATCHES + batch for batch in groups]
    assert trained.scheduler.get_last_lr() == [0.0]
    for epoch in (trained.ids[:BATCHES], trained.ids[BATCHES:]):
        assert len(set(chain.from_iterable(epoch))) == len(epoch) * 8 == BATCHES * 8
    metrics = trained.loader.metrics()
    assert metrics["probe_steps"] == len(trained.steps)
    assert metrics["probe_moment_from_optimizer"] == 1


@pytest.mark.parametrize(("cut", "num_workers"), [*((cut, 0) for cut in CUTS), (CUTS[-1], 1)])
def test_load_state_goes_on_exactly(
    folder: Path,  # noqa: F811
    saved: Path,
    trained: Accelerated,
    cut: int,
    num_workers: int,
) -> None:
    again = Accelerated(folder, accumulation=ACCUMULATED, num_workers=num_workers)
    again.accelerator.load_state(str(saved / str(cut)))
    again.train()
    assert again.ids == trained.ids[cut:]
    assert again.losses == trained.losses[cut:]
    assert [cut + batch for batch in again.steps] == [s for s in trained.steps if s > cut]


def test_batches_come_on_the_accelerators_device(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(corpus)
    assert next(iter(loader))["number"].device.type == "cpu"
    accelerator = Accelerator(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))
    accelerator.prepare(loader)
    batch = next(iter(loader))
    assert batch["number"].device.type == "meta"
    assert batch["text"][0].startswith("word")
    # They are what comes back, and stay where they are read.
    assert batch["sample_id"].device.type == "cpu"


@pytest.mark.parametrize("by_argument", [False, True])
def test_batches_stay_where_they_are_if_accelerate_is_to_place_nothing(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, by_argument: bool
) -> None:
    loader = make(corpus)
    accelerator, other = Accelerator(cpu=True, device_placement=by_argument), Accelerator(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))
    accelerator.prepare(loader, **({"device_placement": [False]} if by_argument else {}))
    batch = next(iter(loader))
    assert batch["number"].device.type == "cpu"
    assert not GradientState().end_of_dataloader
    # The last one that has prepared it says where.
    other.prepare(loader)
    assert next(iter(loader))["number"].device.type == "meta"


def test_ids_stay_also_in_a_batch_that_moves_itself(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collate(samples: list[Any]) -> BatchEncoding:
        return BatchEncoding({"number": torch.tensor([sample["number"] for sample in samples])})

    loader = make(corpus)
    loader.collate_fn = collate
    accelerator = Accelerator(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))
    batch = next(iter(accelerator.prepare(loader)))
    assert batch["number"].device.type == "meta"
    assert batch["sample_id"].device.type == "cpu"


@pytest.mark.parametrize("lookahead", [0, 4])
def test_accelerate_is_told_of_the_last_batch_and_of_nothing_after_it(
    corpus: Path, lookahead: int
) -> None:
    loader = make(corpus, config=config_of(num_lanes=2, lookahead=lookahead))
    Accelerator(cpu=True).prepare(loader)
    gradients, told = GradientState(), []
    # Accelerate 1.1 still holds what another test has broken off.
    before = gradients.active_dataloader
    for _ in range(3):
        # Broken off and gone on with.
        batch = next(iter(loader))
        told.append(gradients.end_of_dataloader)
        feed(loader, batch)
        for batch in loader:
            told.append(gradients.end_of_dataloader)
            feed(loader, batch)
        assert gradients.active_dataloader is before
    assert told == 3 * [*[False] * (len(loader) - 1), True]
