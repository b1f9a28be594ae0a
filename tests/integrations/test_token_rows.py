"""A Trainer that is given a dataset that was tokenised before trains on its labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    default_data_collator,
)

from slap_stream.errors import ConfigError
from tests.integrations.test_training_set import make
from tests.test_training import BATCH, byte_tokenizer, folder  # noqa: F401  (a fixture)

WIDTH = 12


def rows(*, padded: bool, labels: bool) -> list[dict[str, Any]]:
    """Token ids of a few samples, of which the first three tokens are not learnt."""
    made = []
    for n in range(40):
        ids = [40 + (n * step) % 80 for step in range(1, 6 + n % 5)]
        shown = [1] * len(ids)
        known = [-100] * 3 + ids[3:]
        if padded:
            rest = WIDTH - len(ids)
            ids, shown, known = ids + [0] * rest, shown + [0] * rest, known + [-100] * rest
        row = {"id": str(n), "input_ids": ids, "attention_mask": shown}
        made.append({**row, "labels": known} if labels else row)
    return made


def collators() -> dict[str, tuple[Any, dict[str, bool]]]:
    tokenizer = byte_tokenizer()
    return {
        "of padded rows": (default_data_collator, {"padded": True, "labels": True}),
        "makes the labels": (
            DataCollatorForLanguageModeling(tokenizer, mlm=False),
            {"padded": False, "labels": False},
        ),
        "pads the labels": (DataCollatorForSeq2Seq(tokenizer), {"padded": False, "labels": True}),
    }


@pytest.mark.parametrize("name", sorted(collators()))
@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
def test_the_callers_collator_makes_of_it_what_it_makes_of_the_rows_themselves(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    name: str,
    stream: bool,
) -> None:
    collate, form = collators()[name]
    table = rows(**form)
    dataset = Dataset.from_list(table)
    if stream:
        dataset = IterableDataset.from_generator(lambda: iter(table))
    held_out = [{n: v for n, v in row.items() if n != "id"} for row in table[:8]]
    trainer = make(
        folder, tmp_path, dataset, data_collator=collate, eval_dataset=Dataset.from_list(held_out)
    )
    batch = next(iter(trainer.get_train_dataloader()))
    ids = [int(trainer.train_dataset[i]["id"]) for i in batch.pop("sample_id").tolist()]
    kept = [{n: v for n, v in table[i].items() if n != "id"} for i in ids]
    expected = collate(kept)
    assert batch.keys() == expected.keys() >= {"input_ids", "attention_mask", "labels"}
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    if not stream:
        trainer.train()
        assert [len(step) for step in trainer.ids] == [BATCH] * 4
        assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("padded", [False, True])
def test_without_a_collator_the_labels_are_those_of_the_rows(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    padded: bool,
) -> None:
    table = rows(padded=padded, labels=True)
    dataset = Dataset.from_list(table)
    trainer = make(folder, tmp_path, dataset, eval_dataset=dataset.select(range(8)))
    batch = next(iter(trainer.get_train_dataloader()))
    plain = {row["id"]: row for row in rows(padded=False, labels=True)}
    for at, number in enumerate(batch["sample_id"].tolist()):
        row = plain[trainer.train_dataset[number]["id"]]
        shown = batch["attention_mask"][at].bool()
        assert batch["input_ids"][at][shown].tolist() == row["input_ids"]
        assert batch["labels"][at][shown].tolist() == row["labels"]
        assert batch["labels"][at][~shown].eq(-100).all()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_a_dataset_with_a_format_is_trained_and_evaluated_on(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    form: str,
) -> None:
    plain = Dataset.from_list(rows(padded=True, labels=True))
    dataset = plain.with_format(form)
    trainer = make(folder, tmp_path, dataset, eval_dataset=dataset)
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    assert found == trainer.evaluate(plain)["eval_loss"] > 0


def test_what_made_the_token_ids_must_be_there(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    dataset = Dataset.from_list(rows(padded=True, labels=True))
    options = {"data_collator": default_data_collator, "processing_class": None}
    with pytest.raises(ConfigError, match="processing_class must be the tokenizer that made the i"):
        make(folder, tmp_path, dataset, **options)
    # A collator that has one will do.
    collate = DataCollatorForSeq2Seq(byte_tokenizer())
    trainer = make(folder, tmp_path, dataset, **{**options, "data_collator": collate})
    assert trainer.train_dataset.num_samples == 40
