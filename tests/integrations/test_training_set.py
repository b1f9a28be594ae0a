"""A Trainer that is given a dataset, or files, prepares them by itself."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from streaming import StreamingDataset
from transformers import Trainer

from slap_stream import ChatCollator, SlapConfig, prepare
from slap_stream.errors import AlignmentError, ConfigError, CorpusError
from slap_stream.integrations import prepare as module
from slap_stream.integrations import training_set
from slap_stream.integrations.training_set import CORPUS_FOLDER, RecordCollator
from slap_stream.integrations.transformers import SlapTrainer
from tests.integrations.test_transformers import Recording, arguments, new_model
from tests.laws import config_of
from tests.test_training import BATCH, byte_tokenizer, folder, record  # noqa: F401  (a fixture)

RECORDS = [record(number) for number in range(64)]
PAIRS = [
    {"prompt": r["messages"][0]["content"], "completion": r["messages"][1]["content"]}
    for r in RECORDS
]


def make(folder: Path, out: Path, dataset: Any, **options: Any) -> Recording:  # noqa: F811
    """A trainer as users make it: nothing said but model, settings, dataset and tokenizer."""
    settings = options.pop("settings", {})
    return Recording(
        **{
            "model": new_model(folder),
            "args": arguments(out, **{"max_steps": 4, **settings}),
            "train_dataset": dataset,
            "processing_class": byte_tokenizer(),
            "slap_config": config_of(num_lanes=1, lookahead=2, probe_every=2),
            **options,
        }
    )


def sources(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return {
        "chats": Dataset.from_list(RECORDS),
        "pairs": Dataset.from_list(PAIRS),
        "texts": Dataset.from_list([{"text": pair["completion"]} for pair in PAIRS]),
        "stream": IterableDataset.from_generator(lambda: iter(RECORDS)),
        "path": str(tmp_path / "lines.jsonl"),
    }


@pytest.mark.parametrize("form", ["chats", "pairs", "texts", "stream", "path"])
def test_model_settings_dataset_and_tokenizer_say_it_all(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    form: str,
) -> None:
    dataset = sources(tmp_path)[form]
    rows = list(dataset)[:10] if isinstance(dataset, Dataset) else RECORDS[:10]
    trainer = make(folder, tmp_path / "out", dataset, eval_dataset=rows)
    trainer.train()
    assert [len(batch) for batch in trainer.ids] == [BATCH] * 4
    assert trainer.loader is not None
    metrics = trainer.loader.metrics()
    assert metrics["offered"] > 0
    assert metrics["probe_samples"] > 0
    # The evaluation set is the user's own, in the shape that it has.
    assert 0 < trainer.evaluate()["eval_loss"] < 10
    (corpus,) = (tmp_path / "out" / CORPUS_FOLDER).glob("corpus-*/")
    assert Path(trainer.train_dataset.streams[0].local) == corpus


def test_what_is_learnt_is_what_a_chat_collator_marks(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    trainer = make(folder, tmp_path, Dataset.from_list(RECORDS))
    batch = next(iter(trainer.get_train_dataloader()))
    collate = ChatCollator(byte_tokenizer())

    def unpadded(labels: torch.Tensor) -> list[int]:
        return labels[: int(labels.ne(-100).nonzero().max()) + 1].tolist()

    known = [unpadded(collate([chat])["labels"][0]) for chat in RECORDS]
    assert len(batch["labels"]) == BATCH
    assert all(unpadded(labels) in known for labels in batch["labels"])


def test_a_resumed_run_finds_the_corpus_and_equals_the_unbroken_one(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = make(folder, tmp_path, Dataset.from_list(RECORDS), settings=settings)
    whole.train()
    monkeypatch.delattr(module, "convert")
    monkeypatch.delattr(module, "embed")
    rest = make(folder, tmp_path, Dataset.from_list(RECORDS), settings=settings)
    rest.train(str(tmp_path / "checkpoint-2"))
    assert rest.ids == whole.ids[2:]
    assert rest.losses == whole.losses[2:]


def test_shards_and_what_prepare_returned_are_taken_too(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    corpus = folder / "corpus"
    prepared, store = prepare(corpus, tmp_path / "elsewhere"), corpus / "embeddings.zarr"
    assert prepared.found
    for dataset, options in (
        (corpus, {}),
        (str(corpus), {"embeddings": corpus / "embeddings.zarr"}),
        (prepared, {}),
        (StreamingDataset(local=str(corpus), batch_size=BATCH), {"embeddings": store}),
    ):
        trainer = make(folder, tmp_path / "out", dataset, **options)
        assert trainer.train_dataset.streams[0].local == str(corpus)
        assert trainer.train_dataset.batch_size == BATCH
        assert isinstance(trainer.data_collator, RecordCollator)
        assert not trainer.args.remove_unused_columns
    assert not (tmp_path / "out" / CORPUS_FOLDER).exists()


def test_the_callers_collator_is_kept_and_its_tokenizer_used(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    collate = ChatCollator(byte_tokenizer(), max_length=50)
    dataset = Dataset.from_list(RECORDS)
    trainer = make(
        folder, tmp_path, dataset, data_collator=collate, processing_class=None, corpus=tmp_path
    )
    assert trainer.data_collator is collate
    sample = trainer.train_dataset[0]
    assert len(sample["input_ids"]) == 50
    assert trainer.train_dataset.streams[0].local.startswith(str(tmp_path / "corpus-"))

    left = ChatCollator(byte_tokenizer(), max_length=50, truncate="left")
    trainer = make(
        folder, tmp_path, dataset, data_collator=left, processing_class=None, corpus=tmp_path
    )
    ended = trainer.train_dataset[0]
    assert len(ended["input_ids"]) == 50
    said = [byte_tokenizer().decode(one["input_ids"]).rstrip() for one in (sample, ended)]
    assert [text.endswith("<|end|>") for text in said] == [False, True]

    def own(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {"labels": torch.zeros(len(samples))}

    raw = make(folder, tmp_path, dataset, data_collator=own, processing_class=None)
    assert raw.data_collator is own
    assert set(raw.train_dataset[0]) == {"id", "source", "messages"}


def test_samples_are_cut_to_what_the_settings_or_the_tokenizer_say(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 50
    trainer = make(folder, tmp_path, Dataset.from_list(RECORDS), processing_class=tokenizer)
    assert max(len(trainer.train_dataset[n]["input_ids"]) for n in range(64)) == 50
    assert trainer.data_collator.max_length == 50
    assert "cut to max_length=50 tokens" in caplog.text
    # As TRL's settings have it.
    args = arguments(tmp_path)
    args.max_length, args.pad_to_multiple_of = None, 32
    options = {"processing_class": tokenizer, "args": args}
    whole = make(folder, tmp_path, Dataset.from_list(RECORDS), **options)
    assert whole.data_collator.max_length is None
    assert whole.data_collator.pad_to_multiple_of == 32
    assert max(len(whole.train_dataset[n]["input_ids"]) for n in range(64)) > 50


def test_shards_are_cut_by_the_collator(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 50
    trainer = make(folder, tmp_path, folder / "corpus", processing_class=tokenizer)
    assert trainer.data_collator.max_length == 50


def test_what_a_trainer_will_make_of_its_tokenizer_is_waited_for(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    # A setting of TRL's, which is honoured in its constructor.
    args = arguments(tmp_path)
    args.chat_template_path = "somewhere"
    trainer = make(folder, tmp_path, Dataset.from_list(RECORDS), args=args)
    assert set(trainer.train_dataset[0]) == {"id", "source", "messages"}
    assert not isinstance(trainer.data_collator, ChatCollator)


def test_a_dataset_that_makes_its_own_samples_keeps_the_trainers_collator(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    class Tokenising(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return {"input_ids": [1, 2, 3], **super().__getitem__(at)}

    corpus = folder / "corpus"
    dataset = Tokenising(local=str(corpus), batch_size=BATCH)
    trainer = make(folder, tmp_path, dataset, embeddings=corpus / "embeddings.zarr")
    assert not isinstance(trainer.data_collator, ChatCollator)


def test_an_evaluation_set_of_other_records_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"got the fields \['body'\], left out for: unknown sh"):
        RecordCollator(byte_tokenizer())([{"body": "a"}])


Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("row", "same"),
    [
        (
            {"messages": [Q, A], "system": "s", "tools": [{"name": "f"}], "id": 1.5, "source": {}},
            [{"role": "system", "content": "s", "tools": [{"name": "f"}]}, Q, A],
        ),
        ({"messages": None, "text": "a b"}, [{"role": "text", "content": "a b"}]),
        (
            {"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "r"}]},
            [Q, A],
        ),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "r"]}}, [Q, A]),
        # Known to the collator alone.
        ({"messages": [Q, CALL, {"role": "tool", "content": "t"}, A]}, None),
    ],
    ids=["beside", "no messages", "other roles", "struct of lists", "tool call"],
)
def test_an_evaluation_record_is_read_as_one_to_train_on(
    row: dict[str, Any], same: list[dict[str, Any]] | None
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.name }}{% endfor %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    expected = ChatCollator(tokenizer)([row if same is None else {"messages": same}])
    batch = RecordCollator(tokenizer)([row])
    assert {name: value.tolist() for name, value in batch.items()} == {
        name: value.tolist() for name, value in expected.items()
    }


def test_what_stands_beside_tool_calls_is_not_lost_in_silence() -> None:
    row = {"messages": [Q, CALL, {"role": "tool", "content": "t"}, A], "tools": [{"name": "f"}]}
    with pytest.raises(CorpusError, match="left out for: tool call of the assistant; leave such"):
        RecordCollator(byte_tokenizer())([row])


CHATS = Dataset.from_list(RECORDS)


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (
            RECORDS,
            {},
            TypeError,
            "train_dataset must be a datasets.Dataset, an IterableDataset, a streaming.Streaming"
            "Dataset or a path, got list; datasets.Dataset.from_list makes one",
        ),
        ("hub/name", {}, CorpusError, "train_dataset must exist, got 'hub/name'; check the path"),
        (CHATS, {"embeddings": "e.zarr"}, ConfigError, "embeddings must be None with a Dataset as"),
        (CHATS, {"slap_config": SlapConfig(policy="infobatch")}, ConfigError, "policy must not be"),
        (
            CHATS,
            {"settings": {"auto_find_batch_size": True}},
            ConfigError,
            "auto_find_batch_size must be off",
        ),
        (
            CHATS,
            {"slap_config": SlapConfig(num_lanes=3)},
            ConfigError,
            r"the global batch must be divisible by num_lanes, got 8 \* 1 samples and 3 lanes",
        ),
        (
            CHATS,
            {"settings": {"dataloader_num_workers": 3, "dataloader_prefetch_factor": 2}},
            ConfigError,
            r"prefetch_factor \* num_workers must be at most lookahead = 2, got 2 \* 3",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_made(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    dataset: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        make(folder, tmp_path / "out", dataset, **options)
    assert not (tmp_path / "out" / CORPUS_FOLDER).exists()


def test_a_folder_for_a_corpus_that_is_there_is_refused(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    corpus = folder / "corpus"
    for kind, dataset, embeddings in (
        ("a StreamingDataset", StreamingDataset(local=str(corpus), batch_size=BATCH), "e.zarr"),
        ("a Prepared", prepare(corpus, tmp_path), None),
        ("MDS shards and their embeddings", corpus, corpus / "embeddings.zarr"),
    ):
        with pytest.raises(ConfigError, match=f"corpus must be None with {kind} as train_dataset"):
            make(folder, tmp_path, dataset, embeddings=embeddings, corpus="here")


def test_a_trainer_that_pushes_its_folder_leaves_the_corpus_out() -> None:
    """Training data must not be published along with a model."""
    assert training_set.CORPUS_FOLDER.startswith("_")
    for push in (Trainer.push_to_hub, Trainer._push_from_checkpoint):
        assert 'ignore_patterns=["_*"' in inspect.getsource(push)


def test_without_a_training_set_nothing_is_prepared(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    SlapTrainer(new_model(folder), arguments(tmp_path / "out"), corpus=tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_without_a_tokenizer_nothing_is_made(tmp_path: Path) -> None:
    chats = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    for chosen in (None, "gpt2"):
        with pytest.raises(
            ConfigError, match=r"processing_class must be a tokenizer .* got (None|s)"
        ):
            training_set.with_training_set(
                {"train_dataset": chats, "processing_class": chosen},
                None,
                None,
                arguments(tmp_path),
            )
    assert not (tmp_path / "_slap_corpus").exists()


def test_embeddings_and_settings_that_do_not_fit_a_dataset_are_refused_when_the_trainer_is_made(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    corpus = folder / "corpus"
    store = corpus / "embeddings.zarr"
    for embeddings, settings, error, message in (
        (np.ones((7, 4), np.float32), {}, AlignmentError, "one row per sample, got 7 rows for"),
        (store, {"keep": 0.001}, ConfigError, r"keep \* candidates must fill a global batch of 8"),
        (store, {"policy": "rho_loss"}, ConfigError, "needs the feature column reference_loss"),
    ):
        dataset = StreamingDataset(local=str(corpus), batch_size=BATCH)
        config = config_of(num_lanes=1, lookahead=2, **settings)
        with pytest.raises(error, match=message):
            make(folder, tmp_path, dataset, embeddings=embeddings, slap_config=config)


@pytest.mark.parametrize("form", ["lines", "shards", "prepared", "by name"])
def test_an_evaluation_set_may_be_a_path_and_is_what_its_records_are(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    form: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [{"messages": None}, *RECORDS[:8]])
    )
    dataset: Any = str(tmp_path / "lines.jsonl")
    if form in ("shards", "prepared"):
        prepared = prepare(dataset, tmp_path / "eval")
        dataset = prepared if form == "prepared" else prepared.corpus
    elif form == "by name":
        dataset = {"some": dataset}
    trainer = make(folder, tmp_path / "out", folder / "corpus", eval_dataset=dataset)
    rows = make(folder, tmp_path / "out", folder / "corpus", eval_dataset=RECORDS[:8])
    expected = rows.evaluate()["eval_loss"]
    name = "eval_some_loss" if form == "by name" else "eval_loss"
    assert trainer.evaluate()[name] == pytest.approx(expected, rel=1e-5)
    assert rows.evaluate(dataset)[name] == pytest.approx(expected, rel=1e-5)
    if form == "lines":
        assert "left out: 1 for field without a value: messages" in caplog.text


def test_an_evaluation_set_by_path_is_cut_as_the_training_set_is(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    row = {"messages": [{"role": "user", "content": "x" * 60}, RECORDS[0]["messages"][1]]}
    (tmp_path / "lines.jsonl").write_text(json.dumps(row) + "\n")
    left = ChatCollator(byte_tokenizer(), max_length=24, truncate="left")
    trainer = make(
        folder,
        tmp_path / "out",
        folder / "corpus",
        eval_dataset=tmp_path / "lines.jsonl",
        data_collator=left,
    )
    (sample,) = trainer.eval_dataset
    assert sample["input_ids"].tolist() == left([row])["input_ids"][0].tolist()


def test_a_path_to_no_evaluation_set_is_refused_before_anything_is_made(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    for path, message in (
        ("hub/name", "eval_dataset must exist, got 'hub/name'; check the path"),
        (tmp_path / "empty.jsonl", "eval_dataset must hold at least one .* 1 for empty turn: text"),
    ):
        with pytest.raises(CorpusError, match=message):
            make(folder, tmp_path / "out", CHATS, eval_dataset={"some": path})
        assert not (tmp_path / "out").exists()
