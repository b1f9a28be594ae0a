"""Records to tokens, with a tokenizer that worker processes can load by its name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from slap_stream.corpus.messages import DropReason, Message, RecordDropped
from slap_stream.corpus.token_rows import Tokens
from slap_stream.errors import ConfigError
from slap_stream.text.chat import ATTENTION, Encoded, Truncate, cut, encode, without_padding
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


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """What changes when a tokenizer encodes otherwise: not its place, nor how it pads or truncates.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by the last call of it.
        parts.update(truncation=None, padding=None)
    else:
        parts = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.get_added_vocab()]
    told = [parts, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def keep_tokenizer(tokenizer: Any, folder: Path) -> str:
    """Save a tokenizer, unless it is there, so that it can be loaded by its path.

    Args:
        tokenizer: A Hugging Face tokenizer.
        folder: Of this tokenizer, named by its fingerprint.

    Returns:
        The whole path.

    Raises:
        ConfigError: If what is loaded from there does not encode as the tokenizer itself.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        # Found whole or not at all, and never by two processes half each.
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
        tokenizer.save_pretrained(unfinished)
        if _telling(load_tokenizer(str(unfinished))) != _telling(tokenizer):
            shutil.rmtree(unfinished)
            raise ConfigError(
                f"tokenizer must be the same after save_pretrained and from_pretrained, got a "
                f"{type(tokenizer).__name__} that is not; use one that AutoTokenizer loads as you "
                "want it."
            )
        try:
            unfinished.replace(folder)
        except OSError:
            shutil.rmtree(unfinished)
            # Two corpora with one tokenizer, made at once: whoever comes second has the same.
            if not folder.is_dir():
                raise
    return str(folder)


def _telling(tokenizer: Any) -> list[Any]:
    """What a tokenizer does to a text with something of everything."""
    text = f"Grüße,  世界! 12345\n\n\tdef f(x): return 'x'  # 🙂 {tokenizer.eos_token or ''} end"
    both = [
        list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        for special in (True, False)
    ]
    return [*both, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.is_fast]


def tokenise(
    name: str, messages: list[Message], max_length: int | None, truncate: Truncate = "right"
) -> tuple[dict[str, Any], Encoded]:
    """`token_columns` by the tokenizer of that path or name."""
    return token_columns(load_tokenizer(name), messages, max_length, truncate)


def token_columns(
    tokenizer: Any,
    messages: list[Message],
    max_length: int | None,
    truncate: Truncate = "right",
) -> tuple[dict[str, Any], Encoded]:
    """Token columns of a sample, and what is to be told of them.

    Raises:
        RecordDropped: If the messages do not fit the tokenizer's chat template, or nothing is left
            to learn from.
    """
    try:
        whole = encode(tokenizer, messages)
    except TurnsError as error:
        raise RecordDropped(DropReason.TEMPLATE, error.short) from error
    return _fitting(tokenizer, whole, max_length, truncate)


def take_tokens(
    name: str, tokens: Tokens, max_length: int | None, truncate: Truncate, *, masked: bool
) -> tuple[dict[str, Any], Encoded]:
    """`row_columns` by the tokenizer of that path or name."""
    return row_columns(load_tokenizer(name), tokens, max_length, truncate, masked=masked)


def row_columns(
    tokenizer: Any, tokens: Tokens, max_length: int | None, truncate: Truncate, *, masked: bool
) -> tuple[dict[str, Any], Encoded]:
    """As `token_columns`, of a row that was tokenised before.

    Args:
        tokenizer: The one that made the token ids.
        tokens: As `read_tokens` gives them.
        max_length: Tokens kept, of those that are no padding; None keeps all.
        truncate: What is done with a longer row.
        masked: Whether padding may stay, with a mask; a row that is cut has none.

    Raises:
        RecordDropped: If the tokenizer has no such tokens, or nothing is left to learn from.
    """
    input_ids, supervised = without_padding(tokens)
    unknown = [token for token in input_ids if not 0 <= token < len(tokenizer)]
    if unknown:
        raise RecordDropped(DropReason.BAD_TOKENS, f"the tokenizer has no {unknown[0]}")
    whole = Encoded(input_ids=input_ids, supervised=supervised, truncated=False)
    columns, encoded = _fitting(tokenizer, whole, max_length, truncate)
    if masked and max_length is None and ATTENTION in tokens:
        kept = tokens["input_ids"], tokens["supervised"], tokens[ATTENTION]
        columns = _arrays(*kept[:2]) | {ATTENTION: np.array(kept[2], dtype=np.uint8)}
    return columns, encoded


def _fitting(
    tokenizer: Any, whole: Encoded, max_length: int | None, truncate: Truncate
) -> tuple[dict[str, Any], Encoded]:
    encoded = cut(whole, tokenizer, max_length, truncate)
    if encoded is None:
        raise RecordDropped(DropReason.TOO_LONG)
    # The first token is never predicted.
    if not any(encoded.supervised[1:]):
        raise RecordDropped(DropReason.NOTHING_SUPERVISED)
    return _arrays(encoded.input_ids, encoded.supervised), encoded


def _arrays(input_ids: Sequence[int], supervised: Sequence[int]) -> dict[str, Any]:
    return {
        "input_ids": np.array(input_ids, dtype=np.int32),
        "supervised": np.array(supervised, dtype=np.uint8),
    }
