"""SlapSFTTrainer: TRL's own training, on composed batches, resumed exactly."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from streaming import StreamingDataset
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainingArguments

from slap_stream import SlapConfig, convert, per_sample_loss
from slap_stream.errors import ConfigError
from slap_stream.text.chat import DEFAULT_CHAT_TEMPLATE
from slap_stream.text.collate import ChatCollator
from tests.helpers.probe_host import one_thread  # noqa: F401  (a fixture)
from tests.integrations.test_transformers import BATCHES, history, new_model
from tests.laws import config_of
from tests.test_training import BATCH, byte_tokenizer, folder  # noqa: F401  (a fixture)

trl = pytest.importorskip("trl", reason="trl is an extra")

from slap_stream.integrations.trl import SlapSFTTrainer  # noqa: E402

# TRL sets what transformers 5 calls by another name, and will smooth labels no more.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`(gradient_checkpointing|label_smoothing_factor)` is deprecated:FutureWarning"
)

CONFIG = config_of(num_lanes=2, lookahead=4, warmup_losses=48, probe_every=4)
NO_PROBE = config_of(num_lanes=1, lookahead=2, probe_fraction=0.0)
CHAT = [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "Two."}]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reports what it runs, but not from CI."""
    monkeypatch.setenv("CI", "1")
    # Accelerate keeps it in the environment, where it would outlive the test.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


class Recording(SlapSFTTrainer):
    """Writes down what each batch was, and what came of it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.ids: list[list[int]] = []
        self.losses: list[float] = []
        self.samples: list[torch.Tensor] = []
        super().__init__(*args, **options)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.ids.append(inputs["sample_id"].tolist())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(float(loss))
        return loss

    def sample_losses(self, *given: Any) -> Any:
        self.samples.append(super().sample_losses(*given))
        return self.samples[-1]


class Replay(trl.SFTTrainer):
    """The stock SFTTrainer, on samples in a given order."""

    def _get_train_sampler(self, *dataset: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *inputs: Any) -> Any:
        self.losses = [*getattr(self, "losses", []), float(super().training_step(*inputs))]
        return torch.tensor(self.losses[-1])


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with a template that marks what the assistant says."""
    made = byte_tokenizer()
    made.chat_template = DEFAULT_CHAT_TEMPLATE
    return made


def on_a_cpu(**settings: Any) -> dict[str, Any]:
    """Settings of two short epochs."""
    return {
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **settings,
    }


def arguments(out: Path, **settings: Any) -> Any:
    return trl.SFTConfig(str(out), per_device_train_batch_size=BATCH, **on_a_cpu(**settings))


def make(
    folder: Path,  # noqa: F811
    out: Path,
    *,
    config: SlapConfig = CONFIG,
    dropout: float = 0.0,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Recording:
    """A trainer as users make it."""
    return Recording(
        new_model(folder, dropout),
        **{
            "args": arguments(out, **settings),
            "train_dataset": streaming(folder),
            "processing_class": tokenizer(),
            "embeddings": folder / "corpus" / "embeddings.zarr",
            "slap_config": config,
            **(options or {}),
        },
    )


def streaming(folder: Path, kind: type = StreamingDataset) -> Any:  # noqa: F811
    return kind(local=str(folder / "corpus"), batch_size=BATCH)


def tokenised(samples: list[Any]) -> Dataset:
    """Records as TRL would have prepared them to train on the assistant's tokens."""
    rows = []
    for sample in samples:
        batch = ChatCollator(tokenizer())([sample])
        rows.append({name: batch[name][0].tolist() for name in ("input_ids", "labels")})
    return Dataset.from_list(rows)


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"gradient_accumulation_steps": 2}, {}),
        ({"loss_type": "dft", "pad_to_multiple_of": 16}, {}),
        ({"gradient_checkpointing": True}, {"peft_config": lora}),
        ({"bf16": True}, {}),
        ({"label_smoothing_factor": 0.1}, {}),
    ],
    ids=["accumulated", "dft", "lora", "bf16", "smoothed"],
)
def test_on_the_same_batches_the_stock_trainer_trains_alike_bit_for_bit(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
    options: dict[str, Callable[[], Any]],
) -> None:
    steps = {"max_steps": 5, **settings}
    ours = make(folder, tmp_path, options={n: f() for n, f in options.items()}, **steps)
    ours.train()
    stock = Replay(
        new_model(folder),
        arguments(tmp_path, **steps),
        train_dataset=tokenised([ours.train_dataset[i] for batch in ours.ids for i in batch]),
        processing_class=tokenizer(),
        **{n: f() for n, f in options.items()},
    )
    stock.train()
    assert ours.probe is not None
    assert ours.losses == stock.losses
    # To the stock trainer these few batches are a whole epoch.
    assert [step[:3] for step in history(ours)] == [step[:3] for step in history(stock)]
    for mine, theirs in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


MASKS = {"completion_mask": [0, 0, 0, 1, 1, 1], "assistant_masks": [0, 0, 1, 1, 0, 1]}


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        (["completion_mask", "assistant_masks"], {"completion_only_loss": True}),
        (["completion_mask"], {"max_length": 5}),
        (["labels"], {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": 5}),
    ],
    ids=["both masks", "a mask that TRL passes over, cut", "labels as they are"],
)
def test_a_dataset_that_was_tokenised_trains_as_with_trl_bit_for_bit(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    columns: list[str],
    settings: dict[str, Any],
) -> None:
    rows = []
    for n in range(40):
        ids = [40 + n + step for step in range(6)]
        labels = [-100, -100, *ids[2:]]
        rows.append({"id": str(n), "input_ids": ids, **MASKS, "labels": labels})
    kept = ["id", "input_ids", *columns]
    dataset = Dataset.from_list(rows).select_columns(kept)
    options = {"train_dataset": dataset, "embeddings": None}
    ours = make(folder, tmp_path, options=options, max_steps=3, **settings)
    ours.train()
    order = [int(ours.train_dataset[i]["id"]) for batch in ours.ids for i in batch]
    stock = Replay(
        new_model(folder),
        arguments(tmp_path / "stock", max_steps=3, **settings),
        train_dataset=dataset.select(order).remove_columns("id"),
        processing_class=tokenizer(),
    )
    stock.train()
    assert ours.losses == stock.losses
    for mine, theirs in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    passed_over = "completion_mask is not used, as TRL does without" in caplog.text
    assert passed_over == (columns == ["completion_mask"])


@pytest.mark.parametrize("form", ["rows", "file"])
def test_token_ids_that_do_not_say_what_the_assistants_are_are_refused(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    form: str,
) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"input_ids": [5, 6, 7]}\n')
    dataset = Dataset.from_list([{"input_ids": [5, 6, 7]}]) if form == "rows" else lines
    options = {"train_dataset": dataset, "embeddings": None}
    with pytest.raises(ConfigError, match="must be False with token ids and no 'assistant_masks'"):
        make(folder, tmp_path, options=options, assistant_only_loss=True)


def test_files_of_token_ids_train_and_are_evaluated_on_their_labels(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    lines = tmp_path / "rows.jsonl"
    rows = [
        {"id": str(n), "input_ids": [40 + n, *range(50, 55)], "labels": [-100] * 3 + [52, 53, 54]}
        for n in range(20)
    ]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"train_dataset": lines, "embeddings": None, "eval_dataset": str(lines)}
    trainer = make(folder, tmp_path, options=options, max_length=5, max_steps=2)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].tolist() == [[-100, -100, -100, 52, 53]] * BATCH
    assert [row["labels"] for row in trainer.eval_dataset] == [[-100, -100, -100, 52, 53]] * 20
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:  # noqa: F811
    """Two epochs, with a checkpoint every few steps: in mid-epoch, but for the second."""
    trainer = make(
        folder,
        tmp_path_factory.mktemp("unbroken"),
        dropout=0.2,
        gradient_accumulation_steps=4,
        save_strategy="steps",
        save_steps=3,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("checkpoint", [3, 6, 9])
def test_a_resumed_run_equals_the_unbroken_one(
    folder: Path,  # noqa: F811
    unbroken: Recording,
    tmp_path: Path,
    checkpoint: int,
) -> None:
    again = make(folder, tmp_path, dropout=0.2, gradient_accumulation_steps=4)
    again.train(f"{unbroken.args.output_dir}/checkpoint-{checkpoint}")
    assert 0 < len(again.ids) < len(unbroken.ids) == 2 * BATCHES
    assert again.ids == unbroken.ids[-len(again.ids) :]
    assert again.losses == unbroken.losses[-len(again.losses) :]
    assert history(again) == history(unbroken)
    for one, other in zip(again.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [{}, {"loss_type": "dft"}], ids=["nll", "dft"])
def test_a_batch_costs_one_forward_whose_losses_are_fed_back(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    trainer = make(folder, tmp_path, config=NO_PROBE, max_steps=3, **settings)
    forwards = []
    trainer.model.register_forward_hook(lambda *call: forwards.append(call[2]))
    trainer.train()
    assert len(forwards) == len(trainer.ids) == 3
    batch = trainer.training_collator([trainer.train_dataset[i] for i in trainer.ids[0]])
    with torch.no_grad():
        logits = new_model(folder)(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(trainer.samples[0], per_sample_loss(logits, batch["labels"]))
    assert trainer.loader is not None
    assert trainer.loader.metrics()["observed"] == 3 * BATCH


def test_evaluation_is_trls_and_changes_nothing(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    held_out = [streaming(folder)[i] for i in range(20)]
    alone = make(folder, tmp_path, max_steps=4)
    alone.train()
    trainer = make(
        folder,
        tmp_path,
        options={"eval_dataset": Dataset.from_list(held_out)},
        max_steps=4,
        assistant_only_loss=True,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.train()
    assert trainer.ids == alone.ids
    assert trainer.losses == alone.losses
    first, last = (log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert last < first
    # Of the assistant's tokens, as training is; so is a set of prompts and completions.
    batch = ChatCollator(tokenizer())(held_out)
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], batch["attention_mask"]).logits
    tokens = (batch["labels"][:, 1:] != -100).sum(1)
    mean = float((per_sample_loss(logits, batch["labels"]) * tokens).sum() / tokens.sum())
    pairs = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in held_out]
    for dataset in (Dataset.from_list(held_out), Dataset.from_list(pairs)):
        trainer.args.per_device_eval_batch_size = len(held_out)
        assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(mean, rel=1e-4)
    with pytest.raises(ConfigError, match=r"must be a datasets.Dataset, .* got StreamingDataset"):
        trainer.evaluate(streaming(folder))


@pytest.mark.parametrize("own", [False, True], ids=["from settings", "the caller's"])
def test_chats_are_collated_for_the_assistants_tokens(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    own: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    theirs = ChatCollator(tokenizer(), max_length=50, pad_to_multiple_of=7)
    settings = {} if own else {"max_length": 50, "pad_to_multiple_of": 7}
    trainer = make(
        folder,
        tmp_path,
        options={
            "data_collator": theirs if own else None,
            "eval_dataset": Dataset.from_list([streaming(folder)[0]]),
        },
        **settings,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    samples = [trainer.train_dataset[i] for i in batch.pop("sample_id").tolist()]
    expected = theirs(samples)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    # TRL's evaluation is of whole conversations, which it says.
    assert "eval_loss is of all tokens of a conversation" in caplog.text
    assert trainer.evaluate()["eval_loss"] > 0


class Ids(StreamingDataset):
    """Samples that were tokenised beforehand."""

    def __getitem__(self, at: Any) -> Any:
        return {"input_ids": [5, 6, 7, at % 250], "supervised": [False, False, True, True]}


class Texts(StreamingDataset):
    """Samples of another kind."""

    def __getitem__(self, at: Any) -> Any:
        return {"text": f"text {at}"}


class Documents(StreamingDataset):
    """Samples without turns."""

    def __getitem__(self, at: Any) -> Any:
        return {"messages": [{"role": "text", "content": f"text {at}"}], "tools": None}


class WithTools(StreamingDataset):
    """Samples that hold more than messages."""

    def __getitem__(self, at: Any) -> Any:
        return {**super().__getitem__(at), "tools": "[]"}


def test_a_tokenised_corpus_needs_no_template(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    plain = byte_tokenizer()
    options = {"train_dataset": streaming(folder, Ids), "processing_class": plain}
    trainer = make(folder, tmp_path, config=NO_PROBE, options=options, max_steps=1)
    trainer.train()
    assert len(trainer.ids[0]) == BATCH


def test_a_name_of_a_model_and_no_arguments_are_enough(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    # By default TRL trains in bf16, and refuses a machine without an accelerator.
    on_cpu = partial(trl.SFTConfig, bf16=False, use_cpu=True)
    with monkeypatch.context() as patched:
        patched.setattr("slap_stream.integrations.trl.SFTConfig", on_cpu)
        trainer = SlapSFTTrainer(
            str(folder / "model"),
            train_dataset=streaming(folder),
            embeddings=folder / "corpus" / "embeddings.zarr",
        )
    assert isinstance(trainer.args, trl.SFTConfig)
    assert trainer.args.output_dir == "model-SFT"
    assert trainer.training_collator.max_length == 1024


@pytest.mark.filterwarnings("ignore:group_by_length:FutureWarning")
def test_plain_arguments_become_trls_before_the_corpus_is_cut(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:
        grouped = {"group_by_length": True}
    plain = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=BATCH,
        hub_token="secret",
        **on_a_cpu(max_steps=1),
        **grouped,
    )
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "y" * 1500}]] * 20
    # A prompt that fills 1024 tokens would be refused by the collator, in mid-training.
    turns += [[{"role": "user", "content": "x" * 1500}, {"role": "assistant", "content": "y"}]] * 20
    trainer = make(
        folder,
        tmp_path,
        config=NO_PROBE,
        options={
            "args": plain,
            "train_dataset": Dataset.from_dict({"messages": turns}),
            "embeddings": None,
        },
    )
    assert isinstance(trainer.args, trl.SFTConfig)
    assert trainer.args.hub_token == "secret"
    assert len(trainer.train_dataset) == 20
    assert len(trainer.train_dataset[0]["input_ids"]) == trainer.args.max_length == 1024
    # Off for the constructor, and on again for evaluation sets: in the settings that TRL keeps.
    assert all(getattr(trainer.args, name) == value for name, value in grouped.items())
    assert all(getattr(plain, name) == value for name, value in grouped.items())


def test_the_page_runs_as_it_stands(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
    section = page.partition("## TRL's SFTTrainer")[2].partition("\n## ")[0]
    [block] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("trl.SFTConfig", partial(trl.SFTConfig, **on_a_cpu(max_steps=1)))
    scope: dict[str, Any] = {}
    exec(compile(block, "docs/trainers.md", "exec"), scope)
    assert scope["trainer"].state.global_step == 1


def test_without_padding_the_same_is_learnt(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    uniform = config_of(num_lanes=1, policy="uniform")
    padded, free = (
        make(
            folder,
            tmp_path / str(without),
            config=uniform,
            padding_free=without,
            max_length=None,
        )
        for without in (False, True)
    )
    for trainer in (padded, free):
        trainer.train()
    assert free.ids == padded.ids
    assert free.losses == pytest.approx(padded.losses, rel=1e-3)
    for mine, theirs in zip(free.samples, padded.samples, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    batch = next(iter(free.get_train_dataloader()))
    assert len(batch["input_ids"]) == 1
    assert "attention_mask" not in batch


def test_a_collator_without_padding_may_collate_evaluation_sets_too(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    theirs = ChatCollator(tokenizer(), packing="padding_free")
    options = {
        "data_collator": theirs,
        "eval_dataset": Dataset.from_list([{"messages": CHAT}] * 4),
    }
    trainer = make(
        folder,
        tmp_path,
        config=NO_PROBE,
        options=options,
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_steps=1,
    )
    assert trainer.training_collator is trainer.data_collator is theirs
    trainer.train()
    assert len(trainer.samples) == 1
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
    """A collator of somebody else's."""
    ids = torch.arange(6 * len(samples)).view(len(samples), 6)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_a_collator_of_another_kind_makes_labels_of_any_records(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    options = {"train_dataset": streaming(folder, Texts), "data_collator": collate}
    trainer = make(
        folder, tmp_path, config=NO_PROBE, options=options, max_steps=1, remove_unused_columns=False
    )
    trainer.train()
    assert trainer.training_collator is trainer.data_collator is collate
    assert len(trainer.samples) == 1


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (
            {"padding_free": True, "max_length": None},
            {"data_collator": ChatCollator(tokenizer())},
            "padding_free must be False with a data_collator that pads, got True; write",
        ),
        ({"packing": True}, {}, "packing must be False, got True; a row must not hold parts of"),
        ({"shuffle_dataset": True}, {}, "shuffle_dataset must be False, .* the sampler composes"),
        ({"truncation_mode": "keep_end"}, {}, "truncation_mode must be 'keep_start', got 'keep_e"),
        ({"completion_only_loss": False}, {}, "completion_only_loss must be True or None, got F"),
        ({}, {"formatting_func": str}, "formatting_func must be None, got a function; records"),
        ({}, {"train_dataset": Texts}, r"must hold 'messages', .* columns \['text'\]; slap-conv"),
        ({}, {"train_dataset": WithTools}, "no 'tools', .* tools on the first of the messages: g"),
        (
            {"assistant_only_loss": True},
            {"train_dataset": Documents},
            "assistant_only_loss must be False with plain documents, got True",
        ),
        (
            {"max_length": 64},
            {"data_collator": ChatCollator(tokenizer(), max_length=96)},
            "max_length must be left out with a data_collator of your own, .* got 64; give it to",
        ),
        (
            {"assistant_only_loss": True},
            {"data_collator": collate},
            "assistant_only_loss must be left out with a data_collator of your own",
        ),
        (
            {},
            {"eval_dataset": {"a": [{}]}},
            "eval_dataset must be a datasets.Dataset, a path or .* got list",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_what_cannot_be_honoured_is_refused_by_name(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    given = {
        name: streaming(folder, value) if name == "train_dataset" else value
        for name, value in options.items()
    }
    with pytest.raises(ConfigError, match=message):
        make(folder, tmp_path, options=given, **settings)


def test_a_training_set_is_asked_for(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        make(folder, tmp_path, options={"train_dataset": None})
    with pytest.raises(TypeError, match=r"a streaming.StreamingDataset or a path, got list"):
        make(folder, tmp_path, options={"train_dataset": [{"input_ids": [1]}]})


def test_a_dataset_is_trained_on_as_it_is(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    turns = [
        {
            "prompt": [{"role": "user", "content": f"What is {n} and {n}?"}],
            "completion": [{"role": "assistant", "content": f"It is {2 * n}."}],
        }
        for n in range(80)
    ]
    new_model(folder, 0.0).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    # The tokenizer is loaded by the model's name, before the corpus is made.
    trainer = Recording(
        str(tmp_path / "model"),
        args=arguments(tmp_path / "run", num_train_epochs=1),
        train_dataset=Dataset.from_list(turns),
        eval_dataset=Dataset.from_list(turns[:4]),
        slap_config=NO_PROBE,
    )
    assert "input_ids" in trainer.train_dataset[0]
    trainer.train()
    assert len(trainer.losses) == int(NO_PROBE.keep * 80 / BATCH)
    (batch, *_) = trainer.get_train_dataloader()
    said = tokenizer().decode(batch["labels"][0][batch["labels"][0] >= 0])
    assert said.startswith("It is ")
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def on_rows(rows: Any, folder: Path, out: Path, *, options: Any = None, **settings: Any) -> Any:  # noqa: F811
    """A trainer on records that are prepared."""
    given = {"train_dataset": rows, "embeddings": None, **(options or {})}
    return make(folder, out, config=NO_PROBE, options=given, **settings)


@pytest.mark.parametrize("name", ["image", "images", "chat_template_kwargs"])
@pytest.mark.parametrize("streamed", [False, True])
def test_columns_that_conversion_would_lose_are_refused(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    name: str,
    streamed: bool,
) -> None:
    rows = [{"messages": CHAT, name: {"a": "b"}} for _ in range(BATCH)]
    whole = Dataset.from_list(rows)
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if streamed else whole
    message = rf"must hold no '{name}', got the columns \['messages', .* remove_columns\('{name}'\)"
    with pytest.raises(ConfigError, match=message):
        on_rows(dataset, folder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tools_of_a_dataset_are_trained_with(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    knowing = tokenizer()
    knowing.chat_template = "{% if tools %}{{ tools[0].name }}{% endif %}" + DEFAULT_CHAT_TEMPLATE
    rows = Dataset.from_list([{"messages": CHAT, "tools": [{"name": "weigh"}]}] * 20)
    trainer = on_rows(rows, folder, tmp_path, options={"processing_class": knowing})
    assert knowing.decode(trainer.train_dataset[0]["input_ids"]).startswith("weigh")


@pytest.mark.parametrize("streamed", [False, True])
def test_texts_are_of_the_column_that_is_named(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    streamed: bool,
) -> None:
    rows = [{"text": "wrong", "output": "wrong", "body": "right", "source": "s"} for _ in range(20)]
    rows = [{**row, "instruction": f"wrong {n}"} for n, row in enumerate(rows)]
    whole = Dataset.from_list(rows)
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if streamed else whole
    trainer = on_rows(dataset, folder, tmp_path, dataset_text_field="body")
    sample = trainer.train_dataset[0]
    assert tokenizer().decode(sample["input_ids"]).startswith("right")
    assert sample["source"] == "s"


def test_a_column_of_texts_must_be_there_unless_there_are_chats(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    texts = Dataset.from_list([{"text": "a"}] * 20)
    with pytest.raises(ConfigError, match=r"must be a column of train_dataset, got 'body'; it has"):
        on_rows(texts, folder, tmp_path, dataset_text_field="body")
    with pytest.raises(ConfigError, match="must be 'text' with files, got 'body'; hand over what"):
        on_rows(str(folder / "data.jsonl"), folder, tmp_path, dataset_text_field="body")
    # As in TRL, the field is of no account then.
    chats = Dataset.from_list([{"messages": CHAT, "body": "wrong"}] * 20)
    trainer = on_rows(chats, folder, tmp_path, dataset_text_field="body")
    assert "How much?" in tokenizer().decode(trainer.train_dataset[0]["input_ids"])


@pytest.mark.parametrize("template", [DEFAULT_CHAT_TEMPLATE, None], ids=["own", "none"])
@pytest.mark.parametrize("streamed", [False, True])
def test_pairs_of_texts_are_evaluated_as_they_are_trained_on(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    template: str | None,
    streamed: bool,
) -> None:
    speaking = byte_tokenizer()
    speaking.chat_template = template
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(20)]
    pairs = Dataset.from_list(rows)
    held_out = IterableDataset.from_generator(lambda: iter(rows)) if streamed else pairs
    options = {"eval_dataset": {"all": held_out}, "processing_class": speaking}
    trainer = on_rows(pairs, folder, tmp_path, options=options)
    trained = {tuple(sample["input_ids"]) for sample in trainer.train_dataset}
    prepared = list(trainer.eval_dataset["all"])
    assert {tuple(row["input_ids"]) for row in prepared} == trained
    labels = next(iter(trainer.get_eval_dataloader("all")))["labels"][0]
    # TRL takes the line break that follows for a part of the completion.
    assert speaking.decode(labels[labels >= 0]).rstrip("\n") == "answer 0<|end|>"
    assert speaking.chat_template == template
    assert "eval_loss is of all tokens" not in caplog.text
    assert trainer.evaluate(pairs)["eval_loss"] == pytest.approx(
        trainer.evaluate()["eval_all_loss"]
    )


@pytest.mark.parametrize("form", ["lines", "shards"])
def test_an_evaluation_set_may_be_a_path_and_is_evaluated_as_it_would_be_trained_on(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    form: str,
) -> None:
    (tmp_path / "lines.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    path = tmp_path / "lines.jsonl"
    if form == "shards":
        convert(path, tmp_path / "corpus")
        path = tmp_path / "corpus"
    trainer = make(folder, tmp_path, options={"eval_dataset": {"some": path}})
    (row,) = trainer.eval_dataset["some"]
    expected = ChatCollator(tokenizer())([{"messages": CHAT}])
    assert row["input_ids"] == expected["input_ids"][0].tolist()
    assert row["labels"] == expected["labels"][0].tolist()
    rows = tokenised([{"messages": CHAT}])
    loss = trainer.evaluate(rows)["eval_loss"]
    assert trainer.evaluate()["eval_some_loss"] == pytest.approx(loss)
    assert trainer.evaluate(str(path))["eval_loss"] == pytest.approx(loss)


def test_texts_have_no_assistant(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    texts = Dataset.from_dict({"text": ["One.", "Two."]})
    options = {"train_dataset": texts, "embeddings": None}
    with pytest.raises(ConfigError, match="assistant_only_loss must be False with plain documen"):
        make(folder, tmp_path, options=options, assistant_only_loss=True)
    assert not (tmp_path / "_slap_corpus").exists()
