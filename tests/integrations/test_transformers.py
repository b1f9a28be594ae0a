"""SlapTrainer: the Trainer's own training, on composed batches, resumed exactly."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import StreamingDataset
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from slap_stream import EmbeddingStore, SlapConfig, per_sample_loss
from slap_stream.embeddings.rows import ArrayStore
from slap_stream.errors import ConfigError, StateError
from slap_stream.integrations.data_schedule import DataSchedule
from slap_stream.integrations.mixin import STATE_FILE
from slap_stream.integrations.transformers import SlapTrainer
from slap_stream.loader.run_files import read_log
from slap_stream.text.collate import ChatCollator
from tests.laws import FIRM, config_of
from tests.test_training import BATCH, byte_tokenizer, folder  # noqa: F401  (a fixture)

COLLATE = ChatCollator(byte_tokenizer(), max_length=96)
# 206 candidates in batches of 8, of which 0.7 are kept: 18 batches.
BATCHES = 18


class Recording(SlapTrainer):
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

    def sample_losses(self, outputs: Any, labels: Any, *position_ids: Any) -> Any:
        losses = super().sample_losses(outputs, labels, *position_ids)
        self.samples.append(losses)
        return losses


class Told(TrainerCallback):
    """Writes down what callbacks are told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        self.logs.append(dict(logs))


def arguments(out: Path, **settings: Any) -> TrainingArguments:
    """Settings of two short epochs on a CPU."""
    return TrainingArguments(
        **{
            "output_dir": str(out),
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            **settings,
        }
    )


def new_model(folder: Path, dropout: float = 0.0) -> LlamaForCausalLM:  # noqa: F811
    # What makes attention fast on large inputs takes most of the time on tiny ones.
    options = {"attention_dropout": dropout, "attn_implementation": "eager"}
    return LlamaForCausalLM.from_pretrained(folder / "model", **options)


def make(
    folder: Path,  # noqa: F811
    out: Path,
    *,
    config: SlapConfig | None = None,
    corpus: Path | None = None,
    dropout: float = 0.0,
    model: Any = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Recording:
    """A trainer as users make it."""
    corpus = corpus or folder / "corpus"
    return Recording(
        new_model(folder, dropout) if model is None else model,
        arguments(out, **settings),
        **{
            "data_collator": COLLATE,
            "train_dataset": StreamingDataset(local=str(corpus), batch_size=BATCH),
            "embeddings": corpus / "embeddings.zarr",
            "slap_config": config
            or config_of(num_lanes=2, lookahead=4, warmup_losses=48, probe_every=4),
            **(options or {}),
        },
    )


def history(trainer: Trainer) -> list[tuple[float, ...]]:
    """Loss, gradient norm, learning rate and epoch of every step."""
    names = ("loss", "grad_norm", "learning_rate", "epoch")
    return [tuple(log[n] for n in names) for log in trainer.state.log_history if "loss" in log]


# With dropout a run depends on every draw of the random generators. Four batches a step leave a
# shorter step at the end of an epoch. The second checkpoint of `single` is at the end of an epoch,
# all others are in mid-epoch.
@pytest.fixture(scope="module", params=[(1, 9), (4, 3)], ids=["single", "accumulated"])
def unbroken(
    request: pytest.FixtureRequest,
    folder: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Recording:
    """Two epochs, with a checkpoint every few steps."""
    accumulation, save_steps = request.param
    trainer = make(
        folder,
        tmp_path_factory.mktemp("unbroken"),
        dropout=0.2,
        gradient_accumulation_steps=accumulation,
        save_strategy="steps",
        save_steps=save_steps,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(("checkpoint", "num_workers"), [(1, 0), (1, 1), (2, 0), (3, 0)])
def test_a_resumed_run_equals_the_unbroken_one(
    folder: Path,  # noqa: F811
    unbroken: Recording,
    tmp_path: Path,
    checkpoint: int,
    num_workers: int,
) -> None:
    args = unbroken.args
    again = make(
        folder,
        tmp_path,
        dropout=0.2,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_num_workers=num_workers,
    )
    again.train(f"{args.output_dir}/checkpoint-{checkpoint * args.save_steps}")
    assert 0 < len(again.ids) < len(unbroken.ids)
    assert again.ids == unbroken.ids[-len(again.ids) :]
    assert again.losses == unbroken.losses[-len(again.losses) :]
    assert history(again) == history(unbroken)


def test_a_policy_that_weighs_losses_is_refused() -> None:
    with pytest.raises(ConfigError, match="policy must not be 'infobatch' with a Trainer"):
        SlapTrainer(slap_config=SlapConfig(policy="infobatch"))
    with pytest.raises(TypeError, match="slap_config must be a SlapConfig, got dict"):
        SlapTrainer(slap_config={"keep": 0.7})


def auto(folder: Path, out: Path, steps: str = "fewer", **settings: Any) -> Recording:  # noqa: F811
    """A trainer that finds about two in five of the samples dispensable."""
    store = EmbeddingStore(folder / "corpus" / "embeddings.zarr")
    rows = store.read(0, store.shape[0])
    wrong = np.random.default_rng(0).random((len(rows), 1)) < 0.4
    known = ArrayStore(
        rows.embedding, features=wrong.astype(np.float16), feature_names=["mismatch"]
    )
    config = config_of(keep="auto", steps=steps, lookahead=4, probe_every=4, **FIRM)
    return make(folder, out, config=config, options={"embeddings": known}, **settings)


def test_with_auto_the_schedule_follows_the_data(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    trainer = auto(folder, tmp_path)
    trainer.train()
    # About 40 % less than was planned for, and fully decayed all the same.
    assert trainer.state.global_step < 0.85 * trainer.state.max_steps
    assert len(trainer.ids) == trainer.state.global_step
    rates = np.array([entry[2] for entry in history(trainer)])
    assert np.all(np.diff(rates) < 0)
    assert rates[-1] < 0.05 * rates[0]
    assert trainer.state.epoch == 2.0


def test_where_auto_spends_what_it_frees_the_schedule_counts_steps(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    trainer = auto(folder, tmp_path, "full", num_train_epochs=1.5)
    trainer.train()
    assert not isinstance(trainer.lr_scheduler, DataSchedule)
    assert len(trainer.ids) == trainer.state.global_step == trainer.state.max_steps
    assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]
    assert trainer.loader is not None
    visits = Counter(i for batch in trainer.ids[: trainer.loader.steps] for i in batch)
    assert max(visits.values()) == 2


def test_epochs_steps_and_the_learning_rate_are_those_of_the_batches_kept(
    unbroken: Recording,
) -> None:
    steps = 2 * -(-BATCHES // unbroken.args.gradient_accumulation_steps)
    assert unbroken.state.global_step == unbroken.state.max_steps == steps
    assert unbroken.state.epoch == 2.0
    assert unbroken.lr_scheduler.get_last_lr() == [0.0, 0.0]
    for epoch in (unbroken.ids[:BATCHES], unbroken.ids[BATCHES:]):
        ids = [i for batch in epoch for i in batch]
        assert len(set(ids)) == len(ids) == BATCHES * BATCH
    assert unbroken.loader is not None
    metrics = unbroken.loader.metrics()
    assert metrics["probe_steps"] == steps
    assert metrics["probe_moment_from_optimizer"] == 1
    assert 0 < metrics["probe_samples"] <= 0.1 * 2 * metrics["offered"]
    assert metrics["observed"] == 2 * BATCHES * BATCH + metrics["probe_samples"]
    assert history(unbroken)[-1][0] < history(unbroken)[0][0] - 1.0


def test_max_steps_end_in_mid_epoch(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    trainer = make(folder, tmp_path, max_steps=30)
    trainer.train()
    assert len(trainer.ids) == trainer.state.global_step == 30
    assert trainer.state.epoch == pytest.approx(30 / BATCHES)
    assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]


# What transformers 5 calls by another name, which version 4 does not know.
RENAMED = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


class Replay(Trainer):
    """The stock Trainer, on samples in a given order."""

    def _get_train_sampler(self, *dataset: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *inputs: Any) -> Any:
        self.losses = [*getattr(self, "losses", []), float(super().training_step(*inputs))]
        return torch.tensor(self.losses[-1])


def squared_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A loss of the user's own."""
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    losses = nn.functional.cross_entropy(outputs.logits.flatten(0, 1), shifted, reduction="none")
    return losses.square().sum() / num_items_in_batch


def with_lora(folder: Path) -> Any:  # noqa: F811
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(new_model(folder), config)
    # What checkpointing by transformers 4 takes, whichever Trainer.
    model.enable_input_require_grads()
    return model


def stock_of(
    ours: Recording,
    model: Any,
    out: Path,
    *,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Replay:
    """The stock Trainer on the batches of one of ours."""
    return Replay(
        model,
        arguments(out, remove_unused_columns=False, **settings),
        COLLATE,
        [ours.train_dataset[i] for batch in ours.ids for i in batch],
        **(options or {}),
    )


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"max_steps": 8}, {}),
        ({"max_steps": 3, "gradient_accumulation_steps": 4}, {}),
        ({"max_steps": 8, "label_smoothing_factor": 0.1}, {}),
        ({"max_steps": 8}, {"compute_loss_func": squared_loss}),
        ({"max_steps": 4, "bf16": True}, {}),
        ({"max_steps": 4, "gradient_checkpointing": True}, {"model": with_lora}),
    ],
    ids=["plain", "accumulated", "smoothed", "own loss", "bf16", "lora, checkpointed"],
)
@RENAMED
def test_on_the_same_batches_the_stock_trainer_makes_the_same_losses(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> None:
    new, options = options.get("model", new_model), {**options}
    options.pop("model", None)
    ours = make(folder, tmp_path / "ours", model=new(folder), options=options, **settings)
    ours.train()
    stock = stock_of(ours, new(folder), tmp_path / "stock", **settings, options=options)
    stock.train()
    np.testing.assert_allclose(ours.losses, stock.losses, rtol=1e-5)
    for mine, theirs in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    # To the Trainer these few batches are a whole epoch.
    for ours_step, stock_step in zip(history(ours), history(stock), strict=True):
        assert ours_step[:3] == pytest.approx(stock_step[:3], rel=1e-4)


def test_the_best_model_and_what_it_predicts_are_the_stock_trainers(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        # So that it is not the last one.
        "greater_is_better": True,
    }
    held_out = [StreamingDataset(local=str(folder / "corpus"))[i] for i in range(12)]
    ours = make(folder, tmp_path / "ours", options={"eval_dataset": held_out}, **settings)
    ours.train()
    stock = stock_of(
        ours,
        new_model(folder),
        tmp_path / "stock",
        options={"eval_dataset": held_out},
        **settings,
    )
    stock.train()
    evaluated = [
        [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        for trainer in (ours, stock)
    ]
    assert len(evaluated[0]) == 3
    np.testing.assert_allclose(*evaluated, rtol=1e-4)
    best = [Path(str(one.state.best_model_checkpoint)).name for one in (ours, stock)]
    assert best[0] == best[1] == "checkpoint-2"
    for mine, theirs in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    predicted = [one.predict(held_out) for one in (ours, stock)]
    assert predicted[0].metrics["test_loss"] == pytest.approx(evaluated[0][0], rel=1e-4)
    np.testing.assert_allclose(*(one.predictions for one in predicted), rtol=1e-3, atol=1e-3)
    assert np.array_equal(predicted[0].label_ids, predicted[1].label_ids)


def test_a_probe_that_decides_nothing_leaves_no_trace(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    made = []
    for fraction in (0.0, 0.1):
        config = config_of(
            policy="uniform", num_lanes=1, lookahead=2, probe_every=2, probe_fraction=fraction
        )
        out = tmp_path / str(fraction)
        trainer = make(folder, out, config=config, dropout=0.3, max_steps=6, weight_decay=0.1)
        trainer.train()
        made.append(trainer)
    without, probed = made
    assert probed.loader is not None
    assert probed.loader.metrics()["probe_samples"] > 0
    assert (probed.ids, probed.losses) == (without.ids, without.losses)
    assert history(probed) == history(without)
    assert all(map(torch.equal, probed.model.parameters(), without.model.parameters()))


def test_the_losses_fed_back_are_those_of_the_step(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    trainer = make(folder, tmp_path, max_steps=1)
    inputs: list[set[str]] = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, named: inputs.append(set(named)), with_kwargs=True
    )
    trainer.train()
    assert inputs
    assert not [names for names in inputs if "sample_id" in names]
    assert trainer.loader is not None
    batch = trainer.loader.probe_host().read_batch(trainer.ids[0])
    model = new_model(folder).eval()
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(
        trainer.samples[0], per_sample_loss(logits, batch["labels"]), rtol=1e-4, atol=1e-3
    )
    tokens = (batch["labels"][:, 1:] != -100).sum(1)
    mean = float((trainer.samples[0] * tokens).sum() / tokens.sum())
    assert trainer.losses[0] == pytest.approx(mean, rel=1e-5)


def test_metrics_go_to_the_reporters_and_spoil_neither_console_nor_history(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    early, late = Told(), Told()
    trainer = make(folder, tmp_path, options={"callbacks": [early]}, max_steps=2)
    trainer.add_callback(late)
    trainer.train()
    for told in (early, late):
        # The last one is the summary of the training.
        assert [log.get("slap/trained") for log in told.logs] == [BATCH, 2 * BATCH, None]
    assert "'loss'" in (printed := capsys.readouterr().out)
    assert "slap/" not in printed
    assert not [name for log in trainer.state.log_history for name in log if "slap/" in name]


def test_evaluation_is_the_stock_trainers_and_changes_nothing(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    alone = make(folder, tmp_path, max_steps=12)
    alone.train()
    held_out = [alone.train_dataset[i] for i in range(20)]
    trainer = make(
        folder,
        tmp_path,
        options={"eval_dataset": held_out},
        max_steps=12,
        eval_strategy="steps",
        eval_steps=6,
    )
    trainer.train()
    assert trainer.ids == alone.ids
    assert trainer.losses == alone.losses
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    # The run's log lies in output_dir, and has them.
    events = read_log(tmp_path)
    noted = [event["value"] for event in events.values if event["name"] == "eval_loss"]
    assert noted == losses
    assert sum(span["losses"][1] for span in events.spans) == 12 * BATCH


def test_a_log_that_cannot_be_kept_ends_no_training(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    alone = make(folder, tmp_path / "alone", max_steps=3)
    alone.train()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "_slap_log").write_text("a file")
    trainer = make(folder, tmp_path / "full", max_steps=3)
    trainer.train()
    assert (trainer.ids, trainer.losses) == (alone.ids, alone.losses)
    assert trainer.loader is not None
    assert trainer.loader.metrics()["run_log_failed"] == 1
    said = "this run keeps no log for slap-report, which cannot be in"
    [warning] = [text for text in caplog.messages if said in text]
    assert repr(str(tmp_path / "full")) in warning


def test_probe_fraction_zero_switches_the_probe_off(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    config = config_of(num_lanes=1, lookahead=2, probe_fraction=0.0)
    trainer = make(folder, tmp_path, config=config, max_steps=5)
    trainer.train()
    assert trainer.probe is None
    assert trainer.loader is not None
    assert trainer.loader.metrics()["observed"] == 5 * BATCH
    assert "probe_steps" not in trainer.loader.metrics()


def test_head_and_loss_fn_reach_the_probe(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    def loss_fn(model: Any, batch: Any) -> Any:
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        return 2.0 * per_sample_loss(logits, batch["labels"])

    config = config_of(num_lanes=1, lookahead=2, probe_every=2)
    trainer = make(folder, tmp_path, config=config, options={"loss_fn": loss_fn}, max_steps=2)
    trainer.train()
    assert trainer.probe is not None
    doubled = trainer.probe.metrics()["probe_loss"]
    assert doubled == pytest.approx(2.0 * float(torch.cat(trainer.samples).mean()), rel=0.1)


def test_mixed_precision_is_the_probes_too(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Accelerate keeps it in the environment, where it would outlive the test.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    config = config_of(num_lanes=1, lookahead=2, probe_every=2)
    trainer = make(folder, tmp_path, config=config, max_steps=2, bf16=True)
    trainer.train()
    assert trainer.probe is not None
    assert trainer.probe.metrics()["probe_samples"] > 0


def test_an_epoch_that_ends_early_ends_and_the_next_one_begins(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(folder / "corpus", corpus)
    with sorted(corpus.rglob("shard.*"))[1].open("r+b") as file:
        file.truncate(100)
    config = config_of(num_lanes=2, lookahead=4, keep=1.0, on_bad_shard="skip", max_withdrawn=1.0)
    settings: dict[str, Any] = {
        "config": config,
        "corpus": corpus,
        "gradient_accumulation_steps": 4,
        "save_strategy": "epoch",
    }
    trainer = make(folder, tmp_path / "out", **settings)
    trainer.train()
    assert trainer.loader is not None
    assert trainer.loader.metrics()["epochs_cut_short"] == 2
    # Whole groups only: no gradient is left over for the next epoch's first step.
    assert len(trainer.ids) == 4 * trainer.state.global_step
    assert trainer.state.global_step < trainer.state.max_steps
    saved = (tmp_path / "out").glob("checkpoint-*")
    half = min(int(path.name.split("-")[1]) for path in saved)
    assert half < trainer.state.global_step
    again = make(folder, tmp_path / "again", **settings)
    again.train(str(tmp_path / "out" / f"checkpoint-{half}"))
    assert trainer.ids[-len(again.ids) :] == again.ids
    assert again.state.global_step == trainer.state.global_step


def test_columns_are_removed_as_the_stock_trainer_does_but_for_a_chat_collator(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    seen: list[set[str]] = []

    class Tokenising(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return {"input_ids": [1, 2, 3], **super().__getitem__(at)}

    def collate(samples: list[dict[str, Any]]) -> Any:
        seen.append(set(samples[0]))
        return {"labels": torch.ones((len(samples), 3), dtype=torch.int64)}

    corpus = str(folder / "corpus")
    for dataset, remove in ((Tokenising, True), (Tokenising, False), (StreamingDataset, False)):
        options = {"data_collator": collate, "train_dataset": dataset(local=corpus)}
        trainer = make(folder, tmp_path, options=options, remove_unused_columns=remove)
        next(iter(trainer.get_train_dataloader()))
    whole = {"id", "messages", "source"}
    assert seen == [{"input_ids"}, {"input_ids", *whole}, whole]
    raw = make(folder, tmp_path, options={"data_collator": collate})
    with pytest.raises(ConfigError, match=r"must be False where .* 'messages', 'source'\]"):
        next(iter(raw.get_train_dataloader()))
    batch = next(iter(make(folder, tmp_path).get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "sample_id"}


def test_the_callers_arguments_stay_as_they_are(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    args = arguments(tmp_path)
    before = args.to_dict()
    SlapTrainer(new_model(folder), args, COLLATE)
    assert args.to_dict() == before


def known(settings: dict[str, Any]) -> bool:
    """Whether the installed transformers has these settings at all."""
    return settings.keys() <= {field.name for field in fields(TrainingArguments)}


OF_SOME_VERSIONS = [
    ({"include_tokens_per_second": True}, "use include_num_input_tokens_seen"),
    (
        {"train_sampling_strategy": "sequential"},
        "must be 'random' or 'group_by_length', got 'sequential'; the sampler composes",
    ),
    ({"dataloader_in_order": False}, "dataloader_in_order must be True, got False; a state says"),
]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(case for case in OF_SOME_VERSIONS if known(case[0])),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be off"),
        (
            {"config": SlapConfig(length_grouping=3), "gradient_accumulation_steps": 4},
            "length_grouping must be gradient_accumulation_steps, 4, got 3; leave it out and",
        ),
        (
            {"per_device_train_batch_size": 4},
            "per_device_train_batch_size must be the dataset's batch_size, 8, got 4",
        ),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    settings: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(folder, tmp_path, **settings)


def test_a_streaming_dataset_must_be_given_with_embeddings(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"embeddings must be given .* slap-embed makes them"):
        make(folder, tmp_path, options={"embeddings": None})
    with pytest.raises(ValueError, match="train_dataset must be given to train, got None"):
        make(folder, tmp_path, options={"train_dataset": None}).train()


def test_more_than_one_device_is_refused(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    args = arguments(tmp_path)
    assert args.n_gpu <= 1
    args._n_gpu = 2
    with pytest.raises(ConfigError, match="must have one device in each process, got 2; start one"):
        SlapTrainer(new_model(folder), args, COLLATE)


def test_a_checkpoint_without_the_loaders_state_is_refused(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    make(folder, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-1" / STATE_FILE).unlink()
    with pytest.raises(StateError, match=rf"which has no {STATE_FILE}; .* start anew"):
        make(folder, tmp_path, max_steps=2).train(resume_from_checkpoint=True)
