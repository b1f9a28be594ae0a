"""A Trainer whose records cannot all be used: as many steps, a run resumed as ever, and a count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from streaming import StreamingDataset

from slap_stream.text.collate import ChatCollator
from tests.integrations.test_transformers import history, make
from tests.laws import config_of
from tests.test_training import byte_tokenizer, folder  # noqa: F401  (a fixture)


class Picky(ChatCollator):
    """Takes two records of three."""

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        for sample in samples:
            if len(sample["messages"][1]["content"]) % 3 == 0:
                raise ValueError("not this one")
        return super().__call__(samples)


@pytest.mark.parametrize("size", [8, 1])
def test_bad_samples_end_no_training(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    size: int,
) -> None:
    config = config_of(
        num_lanes=1, lookahead=4, warmup_losses=16, probe_every=4, max_withdrawn=1.0, keep=0.1
    )
    options: dict[str, Any] = {
        "config": config,
        "options": {"data_collator": Picky(byte_tokenizer(), max_length=96)},
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": 8 // size,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    if size == 1:
        options["options"]["train_dataset"] = StreamingDataset(local=str(folder / "corpus"))
    trainer = make(folder, tmp_path / "whole", **options)
    trainer.train()
    # 206 samples, of which a tenth makes two batches of eight, or twenty of one.
    assert trainer.state.global_step == trainer.state.max_steps == (4 if size == 8 else 6)
    metrics = trainer.loader.metrics()
    assert metrics["samples_withdrawn"] > 0
    left = metrics["trained"] + metrics["pruned"] + metrics["samples_withdrawn"]
    assert metrics["offered"] == left + metrics["pooled"]
    resumed = make(folder, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert history(resumed) == history(trainer)
    assert resumed.loader.metrics()["samples_withdrawn"] == metrics["samples_withdrawn"]
