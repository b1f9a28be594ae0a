"""What makes a Trainer choose its batches while the model trains."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper, DummyScheduler
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Trainer, TrainingArguments

from slap_stream.config import SlapConfig
from slap_stream.core.state_bytes import from_bytes, to_bytes
from slap_stream.errors import ConfigError, StateError
from slap_stream.integrations.data_schedule import DataSchedule, planned_steps
from slap_stream.integrations.evaluation_set import EvaluationSets, check_paths
from slap_stream.integrations.trainer_callbacks import (
    METRICS_PREFIX,
    Companion,
    HideMetrics,
    ShowMetrics,
    held_out_losses,
)
from slap_stream.integrations.trainer_checks import (
    check_arguments,
    check_config,
    check_dataset,
    check_resumed,
    check_sharding,
    check_steps,
    grouped_by_length,
    ungrouped,
)
from slap_stream.integrations.trainer_forward import TrainingForward
from slap_stream.integrations.trainer_loader import ModelColumns, TrainerLoader
from slap_stream.integrations.training_set import (
    AsTokenised,
    token_columns,
    tokenizer_and_length,
    truncation,
    with_training_set,
)
from slap_stream.integrations.zero_state import ZeroOptimizer
from slap_stream.loader.delivery import SAMPLE_ID
from slap_stream.loader.loader import SlapDataLoader
from slap_stream.probe.head import find_head, unwrap
from slap_stream.probe.packing import check_apart, packed_positions
from slap_stream.probe.probe import LearnabilityProbe
from slap_stream.text.collate import ChatCollator

STATE_FILE = "slap_stream.state"


class SlapMixin(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Makes any `transformers.Trainer` choose its batches: name it before the Trainer's class.

        class SlapMyTrainer(SlapMixin, MyTrainer): ...

    The Trainer's arguments stay as they are. `embeddings`, `corpus`, `slap_config`, `head` and
    `loss_fn` are added. `SlapTrainer` is the mixin with the stock Trainer, and says what to expect.
    A Trainer whose loss is not the cross-entropy of the next token overrides `sample_losses`, too.
    """

    def __init__(
        self,
        *arguments: Any,
        embeddings: Any = None,
        corpus: str | Path | None = None,
        slap_config: SlapConfig | None = None,
        head: nn.Module | None = None,
        loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            *arguments: As for the Trainer that is mixed with.
            embeddings: As for `SlapDataLoader`; of a training set that is prepared here, None.
            corpus: Where a training set is prepared that is no `StreamingDataset`, as by
                `slap_stream.prepare`; default `_slap_corpus` in `args.output_dir`.
            slap_config: Settings; default `SlapConfig()`. `probe_fraction=0`: no probe.
            head: As for `LearnabilityProbe`.
            loss_fn: As for `LearnabilityProbe`.
            **options: Everything else that the Trainer takes; it differs by version.

        Raises:
            TypeError: If the training set is of no kind that can be prepared.
            ConfigError: If settings contradict each other, or one of them cannot be honoured.
            CorpusError: If the training set cannot be prepared.
        """
        given = _by_name(type(self), arguments, options)
        args = self.settings(given.get("args"), given.get("model"))
        check_arguments(args)
        self._slap_config = grouped_by_length(check_config(slap_config), args)
        if given.get("train_dataset") is not None:
            check_steps(args, self._slap_config)
        check_paths(given.get("eval_dataset"))
        # Of a dataset that was tokenised before; none: samples are collated as they are read.
        self._token_columns: Sequence[str] = token_columns(given.get("train_dataset"))
        given, embeddings = self.with_training_set(given, embeddings, corpus, args)
        if given.get("train_dataset") is not None:
            check_dataset(given["train_dataset"], embeddings, args, self._slap_config)
        tokenizer, max_length = tokenizer_and_length(given, args)
        collator = given.get("data_collator")
        self._evaluation_sets = EvaluationSets(
            tokenizer,
            max_length,
            truncation(given),
            self.evaluated,
            as_given=collator is not None and not isinstance(collator, ChatCollator),
        )
        if "eval_dataset" in given:
            given["eval_dataset"] = self._evaluation_sets.read(given["eval_dataset"])
        # The loader itself knows where to go on; batches skipped by the Trainer would be lost.
        args.ignore_data_skip = True
        if isinstance(given.get("data_collator"), ChatCollator):
            args.remove_unused_columns = False
        self._embeddings = embeddings
        self._head, self._loss_fn = head, loss_fn
        self._forward = TrainingForward(head)
        self._resume_from: str | None = None
        # Whether a model was seen to keep the samples of a batch without padding apart.
        self._samples_apart = False
        self.loader: TrainerLoader | None = None
        """The loader of the training that runs, or that ran last."""
        self.probe: LearnabilityProbe | None = None
        # Before the caller's own, which then see what ours have set.
        companion = Companion(self._begin, self._step_probe)
        callbacks = [companion, *(given.get("callbacks") or [])]
        with ungrouped(args):
            self.construct({**given, "args": args, "callbacks": callbacks})
        check_sharding(self, self._slap_config)
        # Around the last one, which prints; callbacks that are added later are told again.
        quiet = HideMetrics()
        self.callback_handler.callbacks.insert(-1, quiet)
        self.callback_handler.callbacks.append(ShowMetrics(quiet))

    def settings(self, args: Any, model: Any) -> TrainingArguments:
        """The settings that the Trainer will train by, before anything is made of them.

        Override it for a Trainer that makes others of those it is given, or of none. A copy,
        because some are changed, and the caller may use theirs again.
        """
        return TrainingArguments("tmp_trainer") if args is None else copy.copy(args)

    def with_training_set(
        self, given: dict[str, Any], embeddings: Any, corpus: Any, args: TrainingArguments
    ) -> tuple[dict[str, Any], Any]:
        """The arguments with a training set that can be streamed, and its embeddings."""
        tokenised = bool(self._token_columns)
        return with_training_set(given, embeddings, corpus, args, tokenised=tokenised)

    def evaluated(self, samples: list[Any]) -> Any:
        """An evaluation set of samples that were read from a path.

        Override it for a Trainer that wants it in another form.
        """
        return samples

    def construct(self, given: dict[str, Any]) -> None:
        """Make the Trainer that is mixed with, of what it is given by name; called once.

        Override it for one that looks into its training set or changes it.
        """
        super().__init__(**given)

    @property
    def training_collator(self) -> Callable[[list[Any]], Any]:
        """What collates training batches; evaluation has `data_collator`."""
        collate: Callable[[list[Any]], Any] = self.data_collator
        return collate

    def sample_losses(
        self, outputs: Any, labels: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What each sample of a training batch costs, from the forward of the training step.

        Override it for a model whose loss is not the cross-entropy of the next token, together
        with `head=` and `loss_fn=`.

        Args:
            outputs: What the model returned; a list where `compute_loss` called it more than once
                with gradients.
            labels: (batch, tokens) int64; of a batch without padding (1, tokens).
            position_ids: Only given for a batch without padding: (1, tokens), as for
                `per_sample_loss`.

        Returns:
            (batch,) losses that tell samples apart; no gradient is needed.

        Raises:
            ConfigError: If the model was not called once, if its output holds nothing to make
                losses of, or if they do not make up its own loss.
        """
        # A fused loss is read by calling the head, in the precision of the training step.
        with self.accelerator.autocast():
            return self._forward.losses(outputs, labels, position_ids)

    def evaluate(self, eval_dataset: Any = None, *rest: Any, **options: Any) -> dict[str, float]:
        """As the Trainer's, which takes the name of one of its sets; and of a path."""
        named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if not (isinstance(eval_dataset, str) and eval_dataset in named):
            check_paths(eval_dataset)
            eval_dataset = self._evaluation_sets.read(eval_dataset)
        metrics: dict[str, float] = super().evaluate(eval_dataset, *rest, **options)
        return metrics

    def get_train_dataloader(self) -> SlapDataLoader:
        """A new loader over the training set, at the start of its first epoch."""
        if self.train_dataset is None:
            raise ValueError("train_dataset must be given to train, got None.")
        args, collate = self.args, self.training_collator
        # What an earlier training has left: where it resumed from and, in transformers 4, how many
        # samples its checkpoint's devices took each.
        self._resume_from, self._train_batch_size = None, args.train_batch_size
        if args.remove_unused_columns and not isinstance(collate, ChatCollator):
            self._set_signature_columns_if_needed()
            collate = ModelColumns(collate, self._signature_columns)
        if self._token_columns and not isinstance(collate, ChatCollator):
            collate = AsTokenised(collate, self._token_columns)
        # Not prepared by Accelerate, which would divide and reorder the batches; the Trainer moves
        # them to the device.
        return TrainerLoader(
            self.train_dataset,
            self._train_batch_size,
            embeddings=self._embeddings,
            config=self._slap_config,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            run_dir=args.output_dir,
            # transformers has it since version 5.
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The stock Trainer's scheduler, or the caller's; with keep="auto" it follows the data,
        unless the number of steps is known."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        by_data = not self._slap_config.steps_are_known and self.args.max_steps <= 0
        # One that is stepped at evaluations counts no steps of the training. DeepSpeed's stands for
        # one that is made later, by a copy of this Trainer.
        others = (ReduceLROnPlateau, DummyScheduler, DeepSpeedSchedulerWrapper)
        if by_data and not isinstance(scheduler, others):
            if isinstance(scheduler, DataSchedule):
                scheduler = scheduler.scheduler  # the caller's, in a second training

            def planned() -> int:
                # What a copy of the Trainer has in common with it.
                loader = self.callback_handler.train_dataloader
                done = loader.epochs_done / self.args.num_train_epochs
                return planned_steps(done, num_training_steps)

            self.lr_scheduler = DataSchedule(scheduler, planned)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The stock Trainer's loss; in training, each sample's own goes back to the loader."""
        ids = inputs.pop(SAMPLE_ID, None) if model.training else None
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if ids is None or self.loader is None:
            return super().compute_loss(model, inputs, **options)
        # The stock Trainer takes them out of the inputs for some losses.
        labels, packed = inputs.get("labels"), packed_positions(inputs)
        if labels is None:
            raise ConfigError(
                f"data_collator must make labels, got the columns {sorted(inputs)!r}; use "
                "ChatCollator(tokenizer), or one that makes them."
            )
        if packed is not None and not self._samples_apart:
            root = unwrap(self.model)
            check_apart(root, find_head(root, self._head), inputs)
            self._samples_apart = True
        with self._forward.watched(model, num_items_in_batch):
            made = super().compute_loss(model, inputs, **options)
            with torch.no_grad():
                also = () if packed is None else (packed,)
                losses = self.sample_losses(self._forward.outputs, labels, *also)
                self.loader.observe(ids, losses)
        return made

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, *device: Any
    ) -> tuple[list[Any], Any]:
        """The batches of one optimizer step; none after the last one."""
        if self._has_ended():
            # A checkpoint of the end, or of an end that came early: no step is to come.
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, *device)
        if len(batches) < num_batches:
            # An epoch that ends early, because shards were withdrawn, may leave a few batches that
            # no optimizer step would follow.
            return [], None
        return batches, num_items

    def set_initial_training_values(self, args: Any, dataloader: Any, *counts: Any) -> Any:
        """Epochs, steps and samples that are planned for; an epoch may turn out to be shorter."""
        epochs, *rest = super().set_initial_training_values(args, dataloader, *counts)
        self._planned_epochs = epochs
        # With max_steps as many epochs as it takes: each has a step at least.
        return (max(epochs, args.max_steps), *rest)

    def _has_ended(self) -> bool:
        if self.state.global_step >= self.state.max_steps:
            return True
        if self.args.max_steps > 0 or self.loader is None:
            return False
        return self.loader.has_done(self.args.num_train_epochs)

    def _run_epoch(
        self,
        *,
        train_dataloader: Any,
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        **rest: Any,
    ) -> None:
        """Transformers 5.3 and later: an epoch, whose length the Trainer has asked for before a
        resume. In mid-epoch it would miss the epoch's last, shorter group of batches."""
        left = len(train_dataloader)
        super()._run_epoch(
            train_dataloader=train_dataloader,
            steps_in_epoch=left,
            num_update_steps_per_epoch=-(-left // self.args.gradient_accumulation_steps),
            **rest,
        )

    def num_examples(self, dataloader: Any) -> int:
        """Samples of an epoch: those that are trained on, not those that are offered."""
        if isinstance(dataloader, TrainerLoader):
            return dataloader.steps * int(self._train_batch_size) * int(self.args.world_size)
        return int(super().num_examples(dataloader))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the loader's metrics beside the training loss; held-out ones are noted."""
        if self.loader is not None:
            held_out = held_out_losses(logs)
            if held_out:
                self.loader.note(**held_out)
        if self.loader is None or "loss" not in logs:
            super().log(logs, start_time)
            return
        metrics = self.loader.metrics(prefix=METRICS_PREFIX)
        super().log({**logs, **metrics}, start_time)
        # The history is written into every checkpoint.
        entry = self.state.log_history[-1]
        self.state.log_history[-1] = {name: entry[name] for name in entry if name not in metrics}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.loader is not None:
            # Every rank takes part, one of them writes.
            state = self.loader.state_dict()
            if self.args.should_save:
                (Path(output_dir) / STATE_FILE).write_bytes(to_bytes(state))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # The Trainer tells nobody else where it resumes from, and the loader is not loaded here:
        # its length has still to be that of a whole epoch.
        self._resume_from = checkpoint

    def _begin(self, loader: TrainerLoader) -> None:
        """Take up a training whose model and optimizer are as they are to start."""
        self.loader, self.probe = loader, None
        self.state.num_train_epochs = self._planned_epochs
        if self._resume_from is not None:
            loader.load_state_dict(_read_state(Path(self._resume_from)))
            check_resumed(self.args, self.state, loader)
        if loader.config.probe_fraction > 0:
            by_engine = self.is_deepspeed_enabled
            optimizer = ZeroOptimizer(self.model_wrapped) if by_engine else self.optimizer
            # Accelerate casts inside the model's forward only; the probe calls the head by itself.
            with self.accelerator.autocast():
                self.probe = LearnabilityProbe(
                    self.model,
                    loader,
                    head=self._head,
                    loss_fn=self._loss_fn,
                    optimizer=optimizer,
                    batch_size=self._train_batch_size,
                )

    def _step_probe(self) -> None:
        if self.probe is not None:
            with self.accelerator.autocast():
                self.probe.step()


def _by_name(mixed: type, arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The Trainer's arguments by name, those without included.

    A Trainer that only hands on `*args` is looked through.
    """
    order = mixed.__mro__
    for parent in order[order.index(SlapMixin) + 1 :]:
        signature = inspect.signature(parent.__init__)  # type: ignore[misc]  # a class, no object
        names = signature.parameters.values()
        if not any(name.kind is inspect.Parameter.VAR_POSITIONAL for name in names):
            break
    named = [name for name in signature.parameters if name != "self"]
    if len(arguments) > len(named):
        raise TypeError(
            f"{mixed.__name__} must be given at most {len(named)} arguments without a name, got "
            f"{len(arguments)}; name them."
        )
    given = dict(zip(named, arguments, strict=False))
    twice = sorted(given.keys() & options)
    if twice:
        raise TypeError(f"{twice[0]} must be given once, got it by position and by name.")
    return {**given, **options}


def _read_state(checkpoint: Path) -> Any:
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise StateError(
            f"resume_from_checkpoint must be a checkpoint of a SlapTrainer, got {checkpoint}, "
            f"which has no {STATE_FILE}; it was written by another Trainer or with "
            "save_only_model: load its weights instead, and start anew."
        )
    return from_bytes(path.read_bytes())
