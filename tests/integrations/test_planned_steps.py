"""What a Trainer plans by the length of an epoch, before it is told where it resumes from.

It counts steps. The data may end earlier than the steps that were planned, or later, and a
checkpoint may be of a training that counted otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_utils import IntervalStrategy

from slap_stream.errors import ConfigError
from tests.integrations.test_transformers import BATCHES, Recording, auto, make
from tests.test_training import BATCH, folder  # noqa: F401  (a fixture)


def checkpoints(out: Path) -> list[int]:
    """The steps that were saved."""
    return sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def early(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:  # noqa: F811
    """An epoch that ends before the steps that were planned; saved and evaluated now and then."""
    held_out = make(folder, tmp_path_factory.mktemp("data"), max_steps=1).train_dataset
    trainer = auto(
        folder,
        tmp_path_factory.mktemp("early"),
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=12,
    )
    trainer.eval_dataset = [held_out[i] for i in range(8)]
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 100
    trainer.train()
    return trainer


def test_the_last_step_is_saved_and_evaluated_though_the_data_ended_early(
    early: Recording,
) -> None:
    steps = early.state.global_step
    assert steps < early.state.max_steps
    assert steps % 12
    assert checkpoints(Path(early.args.output_dir))[-1] == steps
    evaluated = [log["step"] for log in early.state.log_history if "eval_loss" in log]
    assert evaluated == [steps]


def test_after_the_end_of_the_data_there_is_nothing_to_go_on_with(
    folder: Path,  # noqa: F811
    early: Recording,
    tmp_path: Path,
) -> None:
    again = auto(folder, tmp_path, num_train_epochs=1)
    again.train(f"{early.args.output_dir}/checkpoint-{early.state.global_step}")
    assert again.ids == []
    assert again.state.global_step == early.state.global_step
    assert again.state.epoch == 1.0


def test_a_part_of_an_epoch_is_a_part_of_the_data(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    trainer = auto(folder, tmp_path, num_train_epochs=1.5)
    trainer.train()
    assert 1.5 <= trainer.state.epoch < 1.7
    assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]


def test_max_steps_take_as_many_epochs_as_they_need(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    most = 206 // BATCH
    trainer = auto(folder, tmp_path, max_steps=most)
    trainer.train()
    assert len(trainer.ids) == trainer.state.global_step == most
    assert trainer.state.epoch > 1.0
    assert trainer.state.num_train_epochs == 1, "as it was planned"


def test_after_max_steps_there_is_no_other(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    settings: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    make(folder, tmp_path, **settings).train()
    again = make(folder, tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert (again.ids, again.state.global_step) == ([], 3)


def test_a_second_training_starts_anew(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    trainer = make(folder, tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.train(str(tmp_path / "checkpoint-2"))
    assert trainer.ids[3:] == trainer.ids[2:3]
    trainer.train()
    assert trainer.ids[4:6] == trainer.ids[:2], "and not where the one before had resumed"


def test_batches_are_of_the_size_that_is_asked_for_not_of_the_checkpoints(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(folder, tmp_path, **settings)
    whole.train()
    # As it is written with half as many devices and as large a global batch.
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"train_batch_size": 2 * BATCH}))
    again = make(folder, tmp_path, **settings)
    again.train(str(tmp_path / "checkpoint-2"))
    assert again.ids == whole.ids[2:]
    assert again.losses == whole.losses[2:]


def test_steps_of_another_size_are_refused_unless_they_are_counted(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    make(folder, tmp_path, max_steps=4, save_strategy="steps", save_steps=4).train()
    saved = str(tmp_path / "checkpoint-4")
    again = make(folder, tmp_path, gradient_accumulation_steps=2)
    # The 4 steps and 7 + 9 more, of which the Trainer would have planned 18.
    message = f"must be what .* got 2; it is of step 4, after 4 of {BATCHES} batches of epoch 0"
    with pytest.raises(ConfigError, match=message):
        again.train(saved)
    assert again.ids == []
    counted = make(folder, tmp_path, gradient_accumulation_steps=2, max_steps=5)
    counted.train(saved)
    assert len(counted.ids) == 2


def test_with_auto_a_training_that_would_end_before_its_data_is_refused(
    folder: Path,  # noqa: F811
    early: Recording,
    tmp_path: Path,
) -> None:
    again = auto(folder, tmp_path, num_train_epochs=1, gradient_accumulation_steps=4)
    with pytest.raises(
        ConfigError, match=r"gradient_accumulation_steps must be what .* of step 12"
    ):
        again.train(f"{early.args.output_dir}/checkpoint-12")
    assert again.ids == []
