"""Datasets as TRL reads them: columns, masks, and evaluation sets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from slap_stream.errors import ConfigError
from slap_stream.integrations.evaluation_set import is_path
from slap_stream.integrations.prepare import is_shards
from slap_stream.text.template import DEFAULT_CHAT_TEMPLATE

logger = logging.getLogger(__name__)

# What TRL reads of a record, and neither slap-convert nor ChatCollator does.
_UNREAD = ("image", "images", "chat_template_kwargs")
# What TRL reads rather than a text, where it is there.
_CHATS = frozenset({"messages", "conversations", "prompt"})
# What else slap-convert makes turns of.
_TURNS = _CHATS | {"instruction", "question", "query"}
# Masks of a dataset that was tokenised before, as TRL names them.
_OF_COMPLETION, _OF_ASSISTANT = "completion_mask", "assistant_masks"


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


def with_masks(dataset: Any, args: Any, columns: Sequence[str]) -> Any:
    """A dataset that was tokenised before, with those of its masks that TRL would make labels of.

    Raises:
        ConfigError: If only the assistant's tokens count, and nothing says which they are.
    """
    if "labels" in columns:
        return dataset
    if getattr(args, "assistant_only_loss", False) and _OF_ASSISTANT not in columns:
        raise ConfigError(
            f"assistant_only_loss must be False with token ids and no {_OF_ASSISTANT!r}, got True; "
            f"nothing says which of them are the assistant's: hand over the messages, or labels."
        )
    # Of files nothing is left out; and a mask that they have says what is learnt.
    if _OF_COMPLETION not in columns or isinstance(dataset, str | Path):
        return dataset
    names = set(_columns(dataset))
    asked = getattr(args, "completion_only_loss", None)
    if {"prompt", "completion"} <= names if asked is None else asked:
        return dataset
    logger.warning(
        "%s is not used, as TRL does without completion_only_loss=True where there are no columns "
        "prompt and completion: all tokens are learnt%s",
        _OF_COMPLETION,
        f" of which {_OF_ASSISTANT} is 1" if _OF_ASSISTANT in columns else "",
    )
    return dataset.remove_columns(_OF_COMPLETION)


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


def has_turns(dataset: Dataset | IterableDataset) -> bool:
    """Whether a dataset's columns make turns of a conversation."""
    return bool(_TURNS & set(_columns(dataset)))


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
    for row in first_rows(dataset):
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


def first_rows(dataset: Any) -> list[Mapping[str, Any]]:
    """The first row of each evaluation set that has one and shows it to TRL, too."""
    return [
        row
        for one in (dataset.values() if isinstance(dataset, Mapping) else [dataset])
        # Rows that are made when they are asked for TRL does not prepare.
        if isinstance(one, IterableDataset)
        or (isinstance(one, Dataset) and one.format["type"] != "custom")
        for row in islice(one, 1)
    ]


def is_whole_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation of which nothing says what is learnt."""
    chats = row.get("messages") or row.get("conversations")
    return chats is not None and "prompt" not in row and "input_ids" not in row
