"""Rows that were tokenised before: their token ids, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slap_stream.corpus.messages import DropReason, RecordDropped, is_given
from slap_stream.text.chat import ATTENTION
from slap_stream.types import IGNORED_LABEL

_IDS, _LABELS = "input_ids", "labels"
# As TRL's tokenising leaves them; a token is learnt where all of them are 1.
_MASKS = ("completion_mask", "assistant_masks")
_PACKED = ("position_ids", "seq_lengths")
TOKEN_FIELDS = (_IDS, _LABELS, ATTENTION, *_MASKS, *_PACKED)
"""Fields that are looked at in such a row."""

Tokens = dict[str, list[int]]
"""`input_ids`, `supervised` (0 or 1) and, where the row has one, `attention_mask`."""


def holds_tokens(fields: Any) -> bool:
    """Whether a row holds token ids."""
    return isinstance(fields, Mapping) and is_given(_plain(fields.get(_IDS)))


def packed_fields(names: Any) -> list[str]:
    """Those of the fields that several samples in one row have."""
    return [name for name in _PACKED if name in names]


def read_tokens(fields: Mapping[str, Any]) -> Tokens:
    """The token ids of a row, and what is learnt of them.

    That is what its labels say; without labels, what all of its masks do; without masks,
    everything. Padding stays where it is.

    Raises:
        RecordDropped: If the row holds several samples, or its fields do not go together.
    """
    fields = {name: _plain(fields[name]) for name in TOKEN_FIELDS if name in fields}
    for name in packed_fields(fields):
        if is_given(fields[name]):
            raise RecordDropped(DropReason.PACKED, name)
    ids = _numbers(fields, _IDS)
    found = {name: _numbers(fields, name) for name in TOKEN_FIELDS if is_given(fields.get(name))}
    for name, values in found.items():
        if len(values) != len(ids):
            raise RecordDropped(DropReason.BAD_TOKENS, f"{len(ids)} ids, {len(values)} of {name}")
    if _LABELS in found:
        pairs = zip(ids, found[_LABELS], strict=True)
        if any(label not in (token, IGNORED_LABEL) for token, label in pairs):
            raise RecordDropped(DropReason.OTHER_LABELS)
        supervised = [int(label != IGNORED_LABEL) for label in found[_LABELS]]
    else:
        masks = [found[name] for name in _MASKS if name in found]
        supervised = [int(all(bits)) for bits in zip(*masks, strict=True)] or [1] * len(ids)
    padding = {ATTENTION: found[ATTENTION]} if ATTENTION in found else {}
    return {_IDS: ids, "supervised": supervised, **padding}


def _plain(value: Any) -> Any:
    """A field as Python's own lists, of a dataset with a format (`with_format`), too."""
    return value.tolist() if hasattr(value, "tolist") else value


def _numbers(fields: Mapping[str, Any], name: str) -> list[int]:
    values = fields[name]
    whole = isinstance(values, list) and all(isinstance(value, int) for value in values)
    if not whole:
        raise RecordDropped(DropReason.BAD_TOKENS, f"{name} that is no list of whole numbers")
    return [int(value) for value in values]
