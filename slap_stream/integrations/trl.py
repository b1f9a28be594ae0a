"""SlapSFTTrainer: TRL's SFTTrainer, on batches that are composed while the model trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoProcessor, TrainingArguments
from trl import SFTConfig, SFTTrainer

from slap_stream.errors import ConfigError
from slap_stream.integrations.mixin import SlapMixin
from slap_stream.integrations.trainer_loader import TrainerLoader
from slap_stream.integrations.training_set import max_length_of_tokens, with_training_set
from slap_stream.integrations.trl_datasets import (
    check_columns,
    check_evaluation,
    check_record,
    check_turns,
    first_rows,
    has_turns,
    is_whole_chat,
    with_masks,
    with_texts,
    with_turns,
)
from slap_stream.probe.head import unwrap
from slap_stream.text.collate import ChatCollator
from slap_stream.types import IGNORED_LABEL

logger = logging.getLogger(__name__)

# Settings that would change what is trained on, what they must be, and why or what to do.
_FIXED: dict[str, tuple[Any, str]] = {
    "packing": (
        False,
        "a row must not hold parts of samples: padding_free=True saves padding, too",
    ),
    "shuffle_dataset": (False, "the sampler composes the batches, and slap-convert shuffles"),
    "truncation_mode": (
        "keep_start",
        "to keep the end of records give ChatCollator(tokenizer, max_length=..., truncate='left')",
    ),
}
# The stage of ZeRO that keeps weights in pieces, too.
_ALL_IN_PIECES = 3


class SlapSFTTrainer(SlapMixin, SFTTrainer):  # type: ignore[misc]  # trl is not typed
    """An `SFTTrainer` that decides which samples are worth a step; the rest is TRL's.

    Takes what `SFTTrainer` takes, and what `SlapTrainer` adds. Losses (`loss_type`), adapters
    (`peft_config`), precision, checkpointing of gradients and evaluation are TRL's: on the same
    batches both train alike, bit for bit. What cannot be honoured is refused by name.

    TRL tokenises its training set before it trains; a streaming set is tokenised when its batches
    are collated. Without a `data_collator` that is a `ChatCollator` with `processing_class`,
    `max_length`, `pad_to_multiple_of` and `padding_free`. The assistant's tokens are trained on,
    whether or not `assistant_only_loss` says so. Records hold `messages`, or `input_ids` and
    `supervised`, as `slap-convert` writes them. `eos_token` and `chat_template_path` work on
    messages. A `data_collator` of another kind makes the labels by itself, of whatever records.

    Evaluation sets are prepared and collated by TRL, and prompt-completion ones evaluated on the
    completion: through the chat template, texts too, as they are trained on. Whole conversations
    are evaluated unless `assistant_only_loss=True`.

    Args:
        model: As for `SFTTrainer`, a model's name or path included.
        args: As for `SFTTrainer`: an `SFTConfig`, `TrainingArguments`, which become one, or None.
        train_dataset: As for `SlapTrainer`: a `datasets.Dataset` or `IterableDataset`, a path, what
            `prepare` returned, or a `StreamingDataset`.
        corpus: As for `SlapTrainer`.
        eval_dataset: As for `SFTTrainer`, or as for `SlapTrainer` a path; no streaming set.
        embeddings: The training set's, as for `SlapDataLoader`.
        slap_config: Settings; default `SlapConfig()`. `probe_fraction=0` switches the probe off.
        head: As for `LearnabilityProbe`.
        loss_fn: As for `LearnabilityProbe`.
        **options: Everything else that `SFTTrainer` takes.

    Raises:
        TypeError: If the training set is of no known kind.
        ConfigError: If settings contradict each other, or one of them cannot be honoured.
    """

    def settings(self, args: Any, model: Any) -> TrainingArguments:
        """An `SFTConfig`, made of other settings as `SFTTrainer` does it, but before the corpus is:
        their `max_length` cuts its records, and what is set for the constructor is set on it."""
        if args is None:
            return SFTConfig(f"{_name_of(model).split('/')[-1]}-SFT")
        if isinstance(args, SFTConfig) or not isinstance(args, TrainingArguments):
            return super().settings(args, model)
        # to_dict hides a token of the hub. The older name of another is one of transformers 4.
        own = {**args.to_dict(), "hub_token": args.hub_token}
        own.pop("push_to_hub_token", None)
        return SFTConfig(**own)

    def with_training_set(
        self, given: dict[str, Any], embeddings: Any, corpus: Any, args: TrainingArguments
    ) -> tuple[dict[str, Any], Any]:
        """As of the mixin; the collator is made here, once TRL has given it its template."""
        check_arguments(args, given.get("data_collator"))
        if given.get("formatting_func") is not None:
            raise ConfigError(
                "formatting_func must be None, got a function; records are read as they are: "
                "format them before slap-convert, or in a data_collator."
            )
        check_evaluation(given.get("eval_dataset"))
        check_columns(given.get("train_dataset"))
        dataset = given.get("train_dataset")
        if self._token_columns:
            dataset = with_masks(dataset, args, self._token_columns)
            if not _skips_preparing(args):
                # What TRL's preparing leaves of it for a collator.
                self._token_columns = ("input_ids", "labels")
        else:
            dataset = with_texts(dataset, args)
            if isinstance(dataset, Dataset | IterableDataset):
                check_turns(args, chats=has_turns(dataset))
        given = {**given, "train_dataset": dataset}
        if given.get("processing_class") is None:
            given = {**given, "processing_class": _processor(given["model"], args)}
        tokenised = bool(self._token_columns)
        return with_training_set(
            given, embeddings, corpus, args, collate=False, tokenised=tokenised
        )

    def evaluated(self, samples: list[Any]) -> Dataset:
        """With labels where there are token ids: the rest is ready for TRL, too."""
        rows = []
        for sample in samples:
            row = dict(sample)
            if {"input_ids", "supervised"} <= row.keys():
                tokens = [int(token) for token in row["input_ids"]]
                learnt = [bool(one) for one in row["supervised"]]
                labels = [
                    token if one else IGNORED_LABEL
                    for token, one in zip(tokens, learnt, strict=True)
                ]
                row |= {"input_ids": tokens, "supervised": learnt, "labels": labels}
            rows.append(row)
        return Dataset.from_list(rows)

    def construct(self, given: dict[str, Any]) -> None:
        """Make the SFTTrainer, which looks at the first sample of its training set and prepares all
        of them: it gets the first one alone, ready."""
        dataset, collate = given.get("train_dataset"), given.get("data_collator")
        args, by_chat = given["args"], collate is None or isinstance(collate, ChatCollator)
        if dataset is not None:
            sample = dataset[0]
            if by_chat:
                check_record(sample, args)
                of_all = not getattr(args, "assistant_only_loss", False)
                if of_all and any(map(is_whole_chat, first_rows(given.get("eval_dataset")))):
                    logger.warning(
                        "eval_loss is of all tokens of a conversation, the training loss of the "
                        "assistant's; assistant_only_loss=True, or an eval_dataset of prompts and "
                        "completions, makes both the assistant's"
                    )
            given = {**given, "train_dataset": first_row(sample if by_chat else None)}
        # What TRL has prepared it collates itself; without padding it knows of no other collator.
        prepared = not _skips_preparing(args)
        self._by_chat_template = by_chat and prepared
        if self._by_chat_template:
            bare = getattr(args, "chat_template_path", None) is None
            sets = with_turns(given.get("eval_dataset"), given["processing_class"], bare=bare)
            given = {**given, "eval_dataset": sets}
        if by_chat and (prepared or getattr(args, "padding_free", False)):
            given = {**given, "data_collator": None}
        super().construct(given)
        if collate is not None and not prepared:
            self.data_collator = collate
        self.train_dataset = dataset
        self._collate = self._chat_collator() if collate is None else collate

    @property
    def training_collator(self) -> Callable[[list[Any]], Any]:
        """Ours, or the caller's; `data_collator` is what evaluation sets are collated by."""
        return self._collate

    def evaluate(self, eval_dataset: Any = None, *rest: Any, **options: Any) -> dict[str, float]:
        """As `SFTTrainer`'s."""
        check_evaluation(eval_dataset)
        if self._by_chat_template:
            eval_dataset = with_turns(eval_dataset, self.processing_class)
        metrics: dict[str, float] = super().evaluate(eval_dataset, *rest, **options)
        return metrics

    def _begin(self, loader: TrainerLoader) -> None:
        if (
            self.is_deepspeed_enabled
            and self.accelerator.state.deepspeed_plugin.zero_stage == _ALL_IN_PIECES
        ):
            keep_head_gathered(self.model)
        super()._begin(loader)

    def _chat_collator(self) -> ChatCollator:
        # TRL has given it the tokens and the template that the settings name.
        processor: Any = self.processing_class
        tokenizer = getattr(processor, "tokenizer", processor)
        if tokenizer.chat_template is None and processor.chat_template is not None:
            raise ConfigError(
                "processing_class must have its chat template on its tokenizer, got it on "
                f"{type(processor).__name__} alone; set processing_class.tokenizer.chat_template."
            )
        max_length = self.args.max_length
        if self._token_columns:
            max_length = max_length_of_tokens(self.args)
        return ChatCollator(
            tokenizer,
            max_length=max_length,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
            packing="padding_free" if self.args.padding_free else None,
        )


def _name_of(model: Any) -> str:
    name: str = model if isinstance(model, str) else model.config.name_or_path
    return name


def _processor(model: Any, args: TrainingArguments) -> Any:
    """What SFTTrainer itself would load, but before its corpus is made: that holds token ids."""
    options = getattr(args, "model_init_kwargs", None) or {}
    return AutoProcessor.from_pretrained(
        _name_of(model),
        revision=options.get("revision", "main") if isinstance(model, str) else "main",
        trust_remote_code=getattr(args, "trust_remote_code", False),
    )


class FirstRow(Dataset):  # type: ignore[misc]  # datasets is not typed
    """One row to look at: preparing it leaves it as it is, and shows no progress over one row."""

    def map(self, *args: Any, **options: Any) -> FirstRow:
        """Itself."""
        return self

    filter = shuffle = map


def first_row(chat: Mapping[str, Any] | None) -> FirstRow:
    """A training set for TRL to look at: are records chats, and are completions all that counts?

    Token ids and labels say that there is nothing left to prepare.
    """
    row: dict[str, Any] = {"input_ids": [0, 0], "labels": [0, 0]}
    if chat is not None:
        turns = chat.get("messages") or [{"role": "assistant", "content": ""}]
        turn = {"role": turns[0]["role"], "content": str(turns[0]["content"])}
        # With prompt and completion, None means for evaluation sets, too, what it means for ours.
        row |= {name: [turn] for name in ("messages", "prompt", "completion")}
    made: FirstRow = FirstRow.from_list([row])
    return made


def check_arguments(args: Any, collate: Any) -> None:
    """Refuse settings of `SFTConfig` that training on a streaming set cannot honour, by name."""
    for name, (wanted, cure) in _FIXED.items():
        if (value := getattr(args, name, wanted)) != wanted:
            raise ConfigError(f"{name} must be {wanted!r}, got {value!r}; {cure}.")
    if getattr(args, "completion_only_loss", None) is False and (
        collate is None or isinstance(collate, ChatCollator)
    ):
        raise ConfigError(
            "completion_only_loss must be True or None, got False; ChatCollator's labels are the "
            "assistant's tokens: leave it out, or give a data_collator that labels the prompt, too."
        )
    if collate is None:
        return
    if getattr(args, "padding_free", False) and getattr(collate, "packing", None) is None:
        raise ConfigError(
            "padding_free must be False with a data_collator that pads, got True; write "
            "ChatCollator(tokenizer, packing='padding_free'), or leave the collator out."
        )
    usual = SFTConfig.__dataclass_fields__
    own = {name: getattr(args, name, None) for name in ("max_length", "pad_to_multiple_of")}
    if not isinstance(collate, ChatCollator):
        own |= {
            name: getattr(args, name, usual[name].default)
            for name in ("assistant_only_loss", "completion_only_loss")
        }
    for name, value in own.items():
        # TRL's default is what nobody asked for.
        if value not in (None, usual[name].default, getattr(collate, name, None)):
            raise ConfigError(
                f"{name} must be left out with a data_collator of your own, which decides it, got "
                f"{value!r}; give it to the collator, or leave the collator out."
            )


def _skips_preparing(args: Any) -> bool:
    return bool((getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"))


def keep_head_gathered(model: Any) -> None:
    """Under ZeRO 3: let the weights of the head be gathered for the whole model's forward and
    backward, where TRL's loss reads them itself.

    DeepSpeed finds out by itself that they are read outside of the head's own forward, but only
    where they are not there already. Once a probe has called the head they are: DeepSpeed expects
    the same call again and fetches ahead. The gradient then meets a weight that was given back.

    Args:
        model: The Trainer's, in DeepSpeed's hands.
    """
    # Not before it is needed: the import alone takes seconds.
    import deepspeed

    root: Any = unwrap(model)
    root = root.get_base_model() if hasattr(root, "get_base_model") else root
    for weight in root.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(root, weight)
