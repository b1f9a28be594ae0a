"""Less padding in a Trainer: samples dealt by length over an optimizer step; no padding at all."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainingArguments

from tests.integrations.test_transformers import Recording, history, make
from tests.test_training import folder  # noqa: F401  (a fixture)

STEP = 4
# transformers 5 has a strategy instead of the flag.
NAMES = {field.name for field in fields(TrainingArguments)}
BY_LENGTH: dict[str, Any] = (
    {"group_by_length": True}
    if "group_by_length" in NAMES
    else {"train_sampling_strategy": "group_by_length"}
)


def steps(trainer: Recording) -> list[list[int]]:
    """Sorted ids of each optimizer step; an epoch's last one is shorter (18 batches)."""
    epochs = [trainer.ids[:18], trainer.ids[18:]]
    groups = [epoch[at : at + STEP] for epoch in epochs for at in range(0, len(epoch), STEP)]
    return [sorted(np.concatenate(group).tolist()) for group in groups]


@pytest.fixture(scope="module")
def grouped(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:  # noqa: F811
    """Two epochs of samples dealt by length, with checkpoints."""
    out = tmp_path_factory.mktemp("grouped")
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer = make(folder, out, gradient_accumulation_steps=STEP, **saving, **BY_LENGTH)
    trainer.train()
    return trainer


def test_grouping_by_length_changes_neither_steps_nor_losses(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    grouped: Recording,
) -> None:
    plain = make(folder, tmp_path, gradient_accumulation_steps=STEP)
    plain.train()
    assert grouped.ids != plain.ids
    assert steps(grouped) == steps(plain)
    for ours, theirs in zip(history(grouped), history(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert grouped.loader is not None
    assert plain.loader is not None
    share = grouped.loader.metrics()["padding_share"]
    assert 0 < share < plain.loader.metrics()["padding_share"]
    # What was asked for stays to be seen, and is there for evaluation sets.
    assert all(getattr(grouped.args, name) == value for name, value in BY_LENGTH.items())


def test_a_grouped_run_is_resumed_exactly(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    grouped: Recording,
) -> None:
    again = make(folder, tmp_path, gradient_accumulation_steps=STEP, **BY_LENGTH)
    again.train(f"{grouped.args.output_dir}/checkpoint-3")
    assert again.ids == grouped.ids[-len(again.ids) :]
    assert history(again) == history(grouped)


def test_where_there_is_nothing_to_group_it_is_said(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="slap_stream"):
        make(folder, tmp_path, **BY_LENGTH)
    (said,) = [record.message for record in caplog.records if "group_by_length" in record.message]
    assert "changes nothing with gradient_accumulation_steps=1" in said
