"""With keep="auto" any scheduler is where it was planned to be after as much of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from slap_stream.errors import StateError
from slap_stream.integrations.data_schedule import planned_steps
from tests.integrations.test_transformers import Recording, auto, history
from tests.test_training import folder  # noqa: F401  (a fixture)

SCHEDULES: dict[str, Any] = {
    "linear": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0 - step / 50),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=50),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=9), lr_scheduler.ExponentialLR(o, 0.95)],
        [9],
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.3, total_iters=7), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "once around": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=50),
}


# With four batches a step an epoch's last step is a shorter one, which may move nothing on.
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_with_auto_any_schedule_is_where_it_was_planned_to_be(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    name: str,
    accumulate: int,
) -> None:
    def new() -> Recording:
        trainer = auto(
            folder,
            tmp_path,
            gradient_accumulation_steps=accumulate,
            save_strategy="steps",
            save_steps=3,
        )
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-2)
        trainer.lr_scheduler = SCHEDULES[name](trainer.optimizer)
        return trainer

    trainer = new()
    trainer.train()
    assert trainer.state.global_step < 0.9 * trainer.state.max_steps
    again = new()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert history(again) == history(trainer)
    # The same schedule, taken step by step to where each step of the training was to find it.
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    planned, rates = SCHEDULES[name](optimizer), []
    optimizer.step()
    for _ in range(trainer.state.max_steps + 1):
        rates.append(planned.get_last_lr()[0])
        if len(rates) <= 50:
            planned.step()
    epochs = [0.0] + [entry[3] for entry in history(trainer)]
    places = [planned_steps(epoch / 2, trainer.state.max_steps) for epoch in epochs]
    assert [entry[2] for entry in history(trainer)] == [rates[at] for at in places[:-1]]
    assert trainer.lr_scheduler.get_last_lr()[0] == rates[trainer.state.max_steps]


def test_with_auto_a_schedule_of_evaluations_is_left_alone(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    trainer = auto(folder, tmp_path)
    optimizer = trainer.create_optimizer()
    for mine, follows in (
        (lr_scheduler.ReduceLROnPlateau(optimizer), False),
        (lr_scheduler.ExponentialLR(optimizer, 0.9), True),
    ):
        trainer.lr_scheduler = mine
        trainer.create_scheduler(50, optimizer)
        assert (trainer.lr_scheduler is mine) is not follows
    # A second training wraps what the caller gave, not what the first made of it.
    trainer.create_scheduler(50, optimizer)
    assert trainer.lr_scheduler.scheduler is mine


def test_a_schedule_that_did_not_follow_the_data_is_not_gone_on_with(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    trainer = auto(folder, tmp_path)
    trainer.create_optimizer_and_scheduler(50)
    steps = lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 1.0)
    with pytest.raises(StateError, match=r"scheduler\.pt must be of a run whose schedule followed"):
        trainer.lr_scheduler.load_state_dict(steps.state_dict())


def test_where_all_is_kept_each_step_has_the_rate_that_was_planned_for_it() -> None:
    for epochs in (1, 2, 3, 7):
        for length in range(2, 130):
            done = [(e + k / length) / epochs for e in range(epochs) for k in range(length)]
            planned = [planned_steps(share, epochs * length) for share in done]
            assert planned == list(range(epochs * length))
    # Of four steps that were planned for, two came.
    assert [planned_steps(share, 4) for share in (0.0, 0.4, 1.0)] == [0, 2, 4]
