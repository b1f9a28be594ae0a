"""SlapSFTTrainer: TRL's SFTTrainer, on batches that are composed while the model trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoProcessor, TrainingArguments
from trl import SFTConfig, SFTTrainer

from slap_stream.config import SlapConfig
from slap_stream.errors import ConfigError
from slap_stream.integrations.evaluation_set import is_path
from slap_stream.integrations.mixin import SlapMixin
from slap_stream.integrations.prepare import is_shards
from slap_stream.integrations.training_set import with_training_set
from slap_stream.text.collate import ChatCollator
from slap_stream.text.template import DEFAULT_CHAT_TEMPLATE
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
# What TRL reads of a record, and neither slap-convert nor ChatCollator does.
_UNREAD = ("image", "images", "chat_template_kwargs")
# What TRL reads rather than a text, where it is there.
_CHATS = frozenset({"messages", "conversations", "prompt"})
# What else slap-convert makes turns of.
_TURNS = _CHATS | {"instruction", "question", "query"}


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
        given = {**given, "train_dataset": with_texts(given.get("train_dataset"), args)}
        if isinstance(given["train_dataset"], Dataset | IterableDataset):
            check_turns(args, chats=bool(_TURNS & set(_columns(given["train_dataset"]))))
        if given.get("processing_class") is None:
            given = {**given, "processing_class": _processor(given["model"], args)}
        return with_training_set(given, embeddings, corpus, args, collate=False)

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
                if of_all and any(map(_is_whole_chat, _first_rows(given.get("eval_dataset")))):
                    logger.warning(
                        "eval_loss is of all tokens of a conversation, the training loss of the "
                        "assistant's; assistant_only_loss=True, or an eval_dataset of prompts and "
                        "completions, makes both the assistant's"
                    )
            given = {**given, "train_dataset": first_row(sample if by_chat else None)}
        # What TRL has prepared it collates itself; without padding it knows of no other collator.
        prepared = not (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset")
        self._by_chat_template = by_chat and prepared
        if self._by_chat_template:
            bare = getattr(args, "chat_template_path", None) is None
            sets = with_turns(given.get("eval_dataset"), given["processing_class"], bare=bare)
            given = {**given, "eval_dataset": sets}
        if by_chat and (prepared or getattr(args, "padding_free", False)):
            given = {**given, "data_collator": None}
        super().construct(given)
        check_zero(self, self._slap_config)
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

    def _chat_collator(self) -> ChatCollator:
        # TRL has given it the tokens and the template that the settings name.
        processor: Any = self.processing_class
        tokenizer = getattr(processor, "tokenizer", processor)
        if tokenizer.chat_template is None and processor.chat_template is not None:
            raise ConfigError(
                "processing_class must have its chat template on its tokenizer, got it on "
                f"{type(processor).__name__} alone; set processing_class.tokenizer.chat_template."
            )
        return ChatCollator(
            tokenizer,
            max_length=self.args.max_length,
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


def check_zero(trainer: Any, config: SlapConfig) -> None:
    """Refuse weights in pieces that TRL's loss would find empty: tried, its backward then fails."""
    if not trainer.is_deepspeed_enabled or not config.probe_fraction:
        return
    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
    if stage > 2:
        raise ConfigError(
            "deepspeed's zero_optimization.stage must be at most 2 with TRL's trainer and a probe, "
            f"got {stage!r}; TRL's loss reads the head's weight itself, which is not gathered for "
            "it once the probe has called the head: take stage 2, FSDP2, or "
            "SlapConfig(probe_fraction=0)."
        )


def check_columns(dataset: Any) -> None:
    """Refuse a dataset with columns that TRL would read, and that are lost when it is converted."""
    if not isinstance(dataset, Dataset | IterableDataset):
        return
    columns = _columns(dataset)
    for name in _UNREAD:
        if name in columns:
            raise ConfigError(
                f"train_dataset must hold no {name!r}, got the columns {columns!r}; text alone is "
                f"kept of it: leave them out by remove_columns({name!r}), or give shards that hold "
                "them (a StreamingDataset) and a data_collator that reads them."
            )


def with_texts(dataset: Any, args: Any) -> Any:
    """A dataset whose texts, if it is they that count, have the column that slap-convert reads.

    Raises:
        ConfigError: If `dataset_text_field` names no column of it, or no column can be renamed.
    """
    field = getattr(args, "dataset_text_field", "text")
    if field == "text":
        return dataset
    if isinstance(dataset, str | Path) and not is_shards(dataset):
        raise ConfigError(
            f"dataset_text_field must be 'text' with files, got {field!r}; hand over what "
            "datasets.load_dataset() makes of them, or leave it out if they hold chats."
        )
    if not isinstance(dataset, Dataset | IterableDataset):
        return dataset
    columns = _columns(dataset)
    if _CHATS & set(columns):
        return dataset
    if field not in columns:
        raise ConfigError(
            f"dataset_text_field must be a column of train_dataset, got {field!r}; it has "
            f"{columns!r}."
        )
    # The others might make a record of another shape, or hold another text.
    kept = [name for name in ("id", "source") if name in columns and name != field]
    return dataset.select_columns([field, *kept]).rename_column(field, "text")


def _columns(dataset: Dataset | IterableDataset) -> list[str]:
    # A stream may not know them before its first row.
    return list(dataset.column_names or next(iter(dataset), {}))


def check_record(sample: Mapping[str, Any], args: Any) -> None:
    """Refuse records that ChatCollator does not read, or not as TRL does."""
    columns = sorted(sample)
    if "messages" not in sample and not {"input_ids", "supervised"} <= sample.keys():
        raise ConfigError(
            "train_dataset must hold 'messages', or 'input_ids' and 'supervised', got the columns "
            f"{columns!r}; slap-convert makes them of texts, prompts and completions, or give a "
            "data_collator that reads yours."
        )
    # Tools are read where slap-convert puts them, and not in a column of their own.
    for name in (*_UNREAD, "tools"):
        if sample.get(name) is not None:
            also = ", and tools on the first of the messages" if name == "tools" else ""
            raise ConfigError(
                f"train_dataset must hold no {name!r}, got the columns {columns!r}; ChatCollator "
                f"reads text alone{also}: give a data_collator that reads it."
            )
    roles = {message["role"] for message in sample.get("messages", ())}
    check_turns(args, chats=roles != {"text"})


def check_turns(args: Any, *, chats: bool) -> None:
    """Refuse to train on the assistant's turns of what has none."""
    if getattr(args, "assistant_only_loss", False) and not chats:
        raise ConfigError(
            "assistant_only_loss must be False with plain documents, got True; they have no turns, "
            "and all their tokens are trained on."
        )


def check_evaluation(dataset: Any) -> None:
    """Refuse evaluation sets that TRL does not read."""
    for one in dataset.values() if isinstance(dataset, Mapping) else [dataset]:
        if not (one is None or is_path(one) or isinstance(one, Dataset | IterableDataset)):
            raise ConfigError(
                "eval_dataset must be a datasets.Dataset, a path or a dict of them, got "
                f"{type(one).__name__}; TRL reads no other: of a streaming set make one with "
                "datasets.Dataset.from_list([dataset[i] for i in range(dataset.num_samples)])."
            )


def with_turns(dataset: Any, processor: Any, *, bare: bool = True) -> Any:
    """Evaluation sets whose prompts and completions are turns, where they are texts.

    TRL would put texts together as they are. As a training set they go through the chat template.

    Args:
        dataset: As `check_evaluation` lets it pass.
        processor: Whose template is used; without one ChatCollator's own is, as in training.
        bare: Whether a processor without template stays so.
    """
    if isinstance(dataset, Mapping):
        return {name: with_turns(one, processor, bare=bare) for name, one in dataset.items()}
    for row in _first_rows(dataset):
        pair = all(isinstance(row.get(name), str) for name in ("prompt", "completion"))
        if not pair or "input_ids" in row:
            continue
        lacking = bare and getattr(processor, "chat_template", None) is None
        return dataset.map(
            _as_turns, fn_kwargs={"template": DEFAULT_CHAT_TEMPLATE if lacking else None}
        )
    return dataset


def _as_turns(row: dict[str, Any], template: str | None) -> dict[str, Any]:
    turns: dict[str, Any] = {
        name: [{"role": role, "content": row[name]}]
        for name, role in (("prompt", "user"), ("completion", "assistant"))
    }
    if template is not None:
        turns["chat_template_kwargs"] = {"chat_template": template}
    return turns


def _first_rows(dataset: Any) -> list[Mapping[str, Any]]:
    """The first row of each evaluation set that has one and shows it to TRL, too."""
    return [
        row
        for one in (dataset.values() if isinstance(dataset, Mapping) else [dataset])
        # Rows that are made when they are asked for TRL does not prepare.
        if isinstance(one, IterableDataset)
        or (isinstance(one, Dataset) and one.format["type"] != "custom")
        for row in islice(one, 1)
    ]


def _is_whole_chat(row: Mapping[str, Any]) -> bool:
    chats = row.get("messages") or row.get("conversations")
    return chats is not None and "prompt" not in row and "input_ids" not in row
