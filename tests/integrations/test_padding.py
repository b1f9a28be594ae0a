"""Less padding in a Trainer: samples dealt by length over an optimizer step; no padding at all."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaForCausalLM, TrainingArguments

from slap_stream.errors import HeadError
from slap_stream.text.collate import ChatCollator
from tests.integrations.test_transformers import Recording, history, make
from tests.laws import config_of
from tests.test_training import byte_tokenizer, folder  # noqa: F401  (a fixture)

STEP = 4
PACKED = {
    "data_collator": ChatCollator(byte_tokenizer(), max_length=96, packing="padding_free"),
}
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


@pytest.fixture(scope="module")
def padding_free(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:  # noqa: F811
    """Two epochs without padding, with checkpoints."""
    out = tmp_path_factory.mktemp("packed")
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer = make(folder, out, gradient_accumulation_steps=STEP, options=PACKED, **saving)
    trainer.train()
    return trainer


def test_a_run_without_padding_is_the_padded_run(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    padding_free: Recording,
) -> None:
    padded = make(folder, tmp_path, gradient_accumulation_steps=STEP)
    padded.train()
    assert padding_free.ids == padded.ids
    np.testing.assert_allclose(padding_free.losses, padded.losses, rtol=1e-3)
    for ours, theirs in zip(padding_free.samples, padded.samples, strict=True):
        assert len(ours) == len(theirs) == 8
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-4)
    for ours, theirs in zip(history(padding_free), history(padded), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    assert padding_free.loader is not None
    assert padded.loader is not None
    assert padding_free.loader.metrics()["padding_share"] == 0
    assert padded.loader.metrics()["padding_share"] > 0


def test_a_run_without_padding_is_resumed_exactly(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    padding_free: Recording,
) -> None:
    workers = {"dataloader_num_workers": 1}
    again = make(folder, tmp_path, gradient_accumulation_steps=STEP, options=PACKED, **workers)
    again.train(f"{padding_free.args.output_dir}/checkpoint-3")
    assert again.ids == padding_free.ids[-len(again.ids) :]
    assert history(again) == history(padding_free)


def test_evaluation_without_padding_gives_the_padded_loss(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    losses = []
    for options in ({}, PACKED):
        trainer = make(folder, tmp_path, options=options)
        records = [trainer.train_dataset[number] for number in range(8)]
        losses.append(trainer.evaluate(records)["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class Leaking(LlamaForCausalLM):
    """A model that counts positions and lets every token see all that come before."""

    def forward(
        self, input_ids: Any, labels: Any = None, position_ids: Any = None, **named: Any
    ) -> Any:
        return super().forward(input_ids, labels=labels, **named)


@pytest.mark.parametrize("probe_fraction", [0.0, 0.1])
def test_a_model_whose_samples_would_see_each_other_is_refused_before_the_first_step(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    probe_fraction: float,
) -> None:
    config = config_of(num_lanes=1, lookahead=2, probe_fraction=probe_fraction)
    trainer = make(folder, tmp_path, config=config, options=PACKED)
    trainer.model.__class__ = Leaking
    with pytest.raises(HeadError, match=r"must not see each other"):
        trainer.train()
    assert trainer.state.global_step == 0
