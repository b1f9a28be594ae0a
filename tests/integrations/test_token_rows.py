"""A Trainer that is given a dataset that was tokenised before trains on its labels."""

from __future__ import annotations

import json
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


def written(path: Path, table: list[dict[str, Any]]) -> str:
    """The rows as lines of a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(path)


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
@pytest.mark.parametrize("form", ["rows", "stream", "file"])
def test_the_callers_collator_makes_of_it_what_it_makes_of_the_rows_themselves(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    name: str,
    form: str,
) -> None:
    collate, made = collators()[name]
    table = rows(**made)
    dataset = Dataset.from_list(table)
    if form == "stream":
        dataset = IterableDataset.from_generator(lambda: iter(table))
    held_out = [{n: v for n, v in row.items() if n != "id"} for row in table[:8]]
    evaluated: Any = Dataset.from_list(held_out)
    if form == "file":
        dataset = written(tmp_path / "rows.jsonl", table)
        evaluated = written(tmp_path / "held_out.jsonl", table[:8])
    trainer = make(folder, tmp_path, dataset, data_collator=collate, eval_dataset=evaluated)
    batch = next(iter(trainer.get_train_dataloader()))
    ids = [int(trainer.train_dataset[i]["id"]) for i in batch.pop("sample_id").tolist()]
    kept = [{n: v for n, v in table[i].items() if n != "id"} for i in ids]
    expected = collate(kept)
    assert batch.keys() == expected.keys() >= {"input_ids", "attention_mask", "labels"}
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    if form == "file":
        assert list(trainer.eval_dataset) == held_out
    if form != "stream":
        trainer.train()
        assert [len(step) for step in trainer.ids] == [BATCH] * 4
        assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("form", ["rows", "file"])
@pytest.mark.parametrize("padded", [False, True])
def test_without_a_collator_the_labels_are_those_of_the_rows(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    padded: bool,
    form: str,
) -> None:
    table = rows(padded=padded, labels=True)
    dataset: Any = Dataset.from_list(table)
    evaluated = dataset.select(range(8))
    if form == "file":
        dataset = written(tmp_path / "rows.jsonl", table)
        evaluated = written(tmp_path / "held_out.jsonl", table[:8])
    trainer = make(folder, tmp_path, dataset, eval_dataset=evaluated)
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


@pytest.mark.parametrize("form", ["rows", "file"])
def test_rows_are_as_long_as_they_are_whatever_the_tokenizer_knows(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    form: str,
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 7
    table = rows(padded=False, labels=True)
    dataset = Dataset.from_list(table)
    if form == "file":
        dataset = written(tmp_path / "rows.jsonl", table)
    options = {"processing_class": tokenizer, "data_collator": DataCollatorForSeq2Seq(tokenizer)}
    trained_on = make(folder, tmp_path, dataset, **options).train_dataset
    longest = max(len(trained_on[i]["input_ids"]) for i in range(len(table)))
    assert longest == max(len(row["input_ids"]) for row in table) > 7


def test_rows_of_an_evaluation_file_of_which_nothing_is_learnt_are_left_out(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = rows(padded=True, labels=True)
    table[3]["labels"] = [-100] * WIDTH
    table[5]["input_ids"] = [10**6] * WIDTH
    table[5]["labels"] = table[5]["input_ids"]
    held_out = written(tmp_path / "held_out.jsonl", table[:8])
    trainer = make(folder, tmp_path, Dataset.from_list(rows(padded=True, labels=True)))
    assert trainer.evaluate(held_out)["eval_loss"] > 0
    assert f"of eval_dataset {held_out} are left out: " in caplog.text
    assert len(trainer._evaluation_sets.read(held_out)) == 6


def test_what_made_the_token_ids_must_be_there(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    dataset = Dataset.from_list(rows(padded=True, labels=True))
    options = {"data_collator": default_data_collator, "processing_class": None}
    with pytest.raises(ConfigError, match="processing_class must be the tokenizer that made the i"):
        make(folder, tmp_path, dataset, **options)
    lines = written(tmp_path / "rows.jsonl", rows(padded=True, labels=True))
    with pytest.raises(ConfigError, match="processing_class must be the tokenizer that made the i"):
        make(folder, tmp_path, lines, **options)
    # A collator that has one will do.
    collate = DataCollatorForSeq2Seq(byte_tokenizer())
    trainer = make(folder, tmp_path, dataset, **{**options, "data_collator": collate})
    assert trainer.train_dataset.num_samples == 40
