"""Samples of a corpus, chats or tokens, to batches, with padding or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from slap_stream.errors import ConfigError, CorpusError
from slap_stream.text.chat import Encoded, Truncate, check_truncate, cut, encode, without_padding
from slap_stream.types import IGNORED_LABEL

if TYPE_CHECKING:
    import torch


class ChatCollator:
    """Make batches of records, raw (`messages`) or tokenised (`input_ids`, `supervised`).

    Padded, with a row for each record; or with `packing="padding_free"` one after the other in one
    row, where the model must divide attention by `position_ids`.

    Holds no state between batches, and pickles as far as its tokenizer does.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        truncate: Truncate = "right",
        padding_side: Literal["right", "left"] = "right",
        pad_to_multiple_of: int | None = None,
        packing: Literal["padding_free"] | None = None,
    ) -> None:
        """
        Args:
            tokenizer: A Hugging Face tokenizer, as for `encode`.
            max_length: Tokens kept of a record; None keeps all.
            truncate: What is done with a longer record. "right" keeps its start, "left" its end
                (the target of a long prompt), with the token of the beginning before it; "drop"
                keeps none: it is an error, by which a loader withdraws the sample.
            padding_side: Side of the padding.
            pad_to_multiple_of: Batches are padded to a multiple of this many tokens; None pads to
                the longest record.
            packing: None pads; "padding_free" makes one row of a batch.

        Raises:
            ConfigError: If an argument is out of range, or says how to pad what is not padded.
        """
        if not hasattr(tokenizer, "pad_token_id"):
            raise ConfigError(
                f"tokenizer must be a Hugging Face tokenizer, got {tokenizer!r}; load it by "
                "AutoTokenizer.from_pretrained."
            )
        if max_length is not None and max_length < 2:
            raise ConfigError(
                f"max_length must be at least 2 tokens or None, got {max_length!r}; "
                "the first token of a record is never predicted."
            )
        check_truncate(truncate, max_length)
        if padding_side not in ("right", "left"):
            raise ConfigError(f"padding_side must be one of right, left, got {padding_side!r}.")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ConfigError(
                f"pad_to_multiple_of must be a positive number of tokens or None, "
                f"got {pad_to_multiple_of!r}."
            )
        if packing not in (None, "padding_free"):
            raise ConfigError(f"packing must be one of None, 'padding_free', got {packing!r}.")
        if packing and (padding_side != "right" or pad_to_multiple_of is not None):
            raise ConfigError(
                "padding_side and pad_to_multiple_of must be left out with packing, got "
                f"{padding_side!r} and {pad_to_multiple_of!r}; there is no padding."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate: Truncate = truncate
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of
        self.packing = packing

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate records.

        Args:
            samples: (batch,) records with `messages`, or with `input_ids` and `supervised`;
                tokens that an `attention_mask` hides are padding, and left out.

        Returns:
            `input_ids`, `attention_mask`, `labels`, each (batch, tokens) int64; labels are -100
            where nothing is to be predicted. Labels are not shifted: models do that.

            With "padding_free" `input_ids`, `position_ids`, `labels`, each (1, tokens) int64, and
            `use_cache`, False. Positions are counted from 0 in each record; the label of a record's
            first token is -100, so that none is predicted from another record. Hand all of it to
            the model: with a cache, transformers divides attention by nothing.

        Raises:
            CorpusError: If a record has neither form, or nothing supervised is left of it.
        """
        import torch

        if not samples:
            raise CorpusError("samples must hold at least one record, got []; a batch needs one.")
        encoded = [self._encode(sample) for sample in samples]
        if self.packing is not None:
            return _in_one_row(encoded)
        step = self.pad_to_multiple_of or 1
        width = -(-max(len(record.input_ids) for record in encoded) // step) * step
        shape = (len(encoded), width)
        # Padding is masked out of attention and loss, so that any valid id serves where a
        # tokenizer has no padding token.
        pad_id = self.tokenizer.pad_token_id
        input_ids = torch.full(shape, 0 if pad_id is None else pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
        for row, record in enumerate(encoded):
            start = width - len(record.input_ids) if self.padding_side == "left" else 0
            where = slice(start, start + len(record.input_ids))
            ids = torch.tensor(record.input_ids, dtype=torch.int64)
            input_ids[row, where] = ids
            attention_mask[row, where] = 1
            labels[row, where] = _labels(record, ids)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _encode(self, sample: Mapping[str, Any]) -> Encoded:
        name = f"record {sample['id']!r}" if "id" in sample else "a record"
        if "input_ids" in sample and "supervised" in sample:
            lengths = [len(sample[column]) for column in ("input_ids", "supervised")]
            if lengths[0] != lengths[1]:
                raise CorpusError(
                    f"supervised must be as long as input_ids ({lengths[0]}), got {lengths[1]} in "
                    f"{name}."
                )
            input_ids, supervised = without_padding(sample)
            whole = Encoded(input_ids=input_ids, supervised=supervised, truncated=False)
        elif "messages" in sample:
            try:
                whole = encode(self.tokenizer, sample["messages"])
            except CorpusError as error:
                raise CorpusError(f"{name}: {error}") from error
        else:
            raise CorpusError(
                f"samples must hold 'messages', or 'input_ids' and 'supervised', got the columns "
                f"{sorted(sample)!r} in {name}; use a collate_fn of your own for other columns."
            )
        record = cut(whole, self.tokenizer, self.max_length, self.truncate)
        if record is None:
            raise CorpusError(
                f"a record must be at most max_length = {self.max_length} tokens with "
                f"truncate='drop', got {len(whole.input_ids)} in {name}; raise max_length, or "
                "leave such records out with slap-convert --tokenizer ... --truncate drop"
            )
        # Models shift labels by one, so that the first token is never predicted.
        if not any(record.supervised[1:]):
            raise CorpusError(
                f"supervised must mark at least one token after the first, got none in {name} "
                f"(max_length {self.max_length}); raise max_length, keep the end with "
                "truncate='left', or leave such records out with slap-convert --tokenizer ... "
                "--max-length ..."
            )
        return record


def _labels(record: Encoded, ids: torch.Tensor) -> torch.Tensor:
    """(tokens,) ids where they are learnt, -100 elsewhere."""
    import torch

    supervised = torch.tensor(record.supervised, dtype=torch.bool)
    return ids.masked_fill(~supervised, IGNORED_LABEL)


def _in_one_row(encoded: Sequence[Encoded]) -> dict[str, Any]:
    """Records one after the other, without padding."""
    import torch

    ids, positions, labels = [], [], []
    for record in encoded:
        ids.append(torch.tensor(record.input_ids, dtype=torch.int64))
        positions.append(torch.arange(len(record.input_ids)))
        labels.append(_labels(record, ids[-1]))
        labels[-1][0] = IGNORED_LABEL
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat(positions)[None],
        "labels": torch.cat(labels)[None],
        "use_cache": False,
    }
