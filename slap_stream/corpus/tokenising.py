"""Records to tokens, with a tokenizer that worker processes can load by its name."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from slap_stream.corpus.messages import DropReason, Message, RecordDropped
from slap_stream.errors import ConfigError
from slap_stream.text.chat import Encoded, encode
from slap_stream.text.template import TurnsError


def find_tokenizer(tokenizer: str | Path) -> str:
    """Path or name of a tokenizer that was loaded once.

    Args:
        tokenizer: Directory that `save_pretrained` made, or a name on the hub.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    if not isinstance(tokenizer, str | Path):
        raise ConfigError(
            f"tokenizer must be a path or a name, got a {type(tokenizer).__name__}; call its "
            "save_pretrained() and name that directory."
        )
    path = Path(tokenizer)
    if isinstance(tokenizer, Path) and not path.exists():
        raise ConfigError(f"tokenizer must exist, got {str(tokenizer)!r}; check the path.")
    # Whole, because it is written into the corpus and read again from elsewhere.
    name = str(path.resolve()) if path.exists() else str(tokenizer)
    try:
        load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tokenizer must be one that transformers can load, got {str(tokenizer)!r}; it says: "
            f"{error}"
        ) from error
    return name


@lru_cache(maxsize=1)
def load_tokenizer(name: str) -> Any:
    """The tokenizer of this path or name, loaded once per process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def tokenizer_digest(name: str) -> str | None:
    """Of the files of a local tokenizer; None for one of the hub."""
    path = Path(name)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    # A model beside it does not change what a tokenizer does.
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model"):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def tokenise(
    name: str, messages: list[Message], max_length: int | None
) -> tuple[dict[str, Any], Encoded]:
    """Token columns of a sample, and what is to be told of them.

    Raises:
        RecordDropped: If the messages do not fit the tokenizer's chat template, or nothing is left
            to learn from.
    """
    try:
        encoded = encode(load_tokenizer(name), messages, max_length=max_length)
    except TurnsError as error:
        raise RecordDropped(DropReason.TEMPLATE, error.short) from error
    # The first token is never predicted.
    if not any(encoded.supervised[1:]):
        raise RecordDropped(DropReason.NOTHING_SUPERVISED)
    columns = {
        "input_ids": np.array(encoded.input_ids, dtype=np.int32),
        "supervised": np.array(encoded.supervised, dtype=np.uint8),
    }
    return columns, encoded
