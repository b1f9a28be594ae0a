"""Losses of a model that only reads: the part of a loss that no training takes away."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slap_stream.embeddings.pretrained import load_pretrained, pad, token_batches
from slap_stream.errors import ConfigError
from slap_stream.text.chat import encode
from slap_stream.text.sample import TextSample
from slap_stream.types import REFERENCE_COLUMN, Float32Array

# Token ids of a sample, and which of them are supervised.
Marked = tuple[list[int], list[bool]]
# Logits held at once, whatever the vocabulary: 64 MiB in float32 on a CPU, where larger ones cost
# more in fresh memory than they save, and half a gigabyte in bfloat16 elsewhere.
LOGITS_PER_BATCH = (2**24, 2**28)
# Of these, as many are widened to float32 at once.
_LOSS_ROWS = 1_024


class ReferenceLoss:
    """Mean loss over a sample's supervised tokens under a Hugging Face causal model.

    Args:
        path: Directory (or hub name) of the model and its tokenizer.
        device: torch device; None means the GPU if there is one.
        max_tokens: Tokens read of each sample.
        tokenizer: Directory of the tokenizer that made the corpus's `input_ids`, if it is
            tokenised; its vocabulary must be the model's.

    Attributes:
        name: Path of the model.
        version: Digest of configuration and weights, precision and window.
        feature_names: `reference_loss`.

    Raises:
        ConfigError: If the path holds no model, or its vocabulary is not the corpus's.
    """

    feature_names: tuple[str, ...] = (REFERENCE_COLUMN,)
    # What it is called in messages.
    role = "reference model"

    def __init__(
        self,
        path: str,
        device: str | None = None,
        *,
        max_tokens: int = 1_024,
        tokenizer: str | Path | None = None,
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        loaded = load_pretrained(AutoModelForCausalLM, path, device)
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        own = getattr(self._model.config, "max_position_embeddings", None) or max_tokens
        self._max_tokens = min(max_tokens, int(own))
        self.name, self.version = path, f"{loaded.version}-{self._max_tokens}"
        if tokenizer is not None:
            theirs = AutoTokenizer.from_pretrained(tokenizer).get_vocab()
            if theirs != self._tokenizer.get_vocab():
                raise ConfigError(
                    f"{self.role} must share the corpus's vocabulary, got {path!r} with "
                    f"{len(self._tokenizer)} tokens against {len(theirs)}; convert without "
                    "tokenizer, or take a model of the same family."
                )

    def columns(self, samples: Sequence[TextSample]) -> Float32Array:
        """Losses of n samples.

        Returns:
            (n, 1) nats per supervised token; 0 for a sample that has none within the window, for
            which a training loss is 0 too.
        """
        return self.losses_of([self._encoded(sample) for sample in samples])[:, None]

    def losses_of(self, encoded: Sequence[Marked]) -> Float32Array:
        """(n,) mean losses over the marked tokens of n token sequences; 0 where none is marked."""
        losses = np.zeros(len(encoded), dtype=np.float32)
        lengths = np.array([len(ids) for ids, _ in encoded])
        logits = LOGITS_PER_BATCH[self._model.device.type != "cpu"]
        budget = max(1, logits // int(self._model.config.vocab_size))
        for batch in token_batches(lengths, budget):
            losses[batch] = self._losses([encoded[at] for at in batch])
        return losses

    def _encoded(self, sample: TextSample) -> Marked:
        if sample.input_ids is not None and sample.supervised is not None:
            ids, marks = sample.input_ids.tolist(), sample.supervised.tolist()
        elif sample.messages is not None:
            tokens = encode(self._tokenizer, sample.messages)
            ids, marks = tokens.input_ids, tokens.supervised
        else:
            raise ConfigError(
                "sample must have messages or input_ids, got neither; read it with CorpusTexts."
            )
        return self._cut(ids, marks)

    def _cut(self, ids: list[int], marks: list[bool]) -> Marked:
        """What is read of a sample."""
        return ids[: self._max_tokens], marks[: self._max_tokens]

    def _losses(self, batch: Sequence[Marked]) -> Float32Array:
        """(batch,) mean losses."""
        import torch
        from torch.nn.functional import cross_entropy

        input_ids, mask = pad([ids for ids, _ in batch])
        marked, _ = pad([marks for _, marks in batch])
        # A token is predicted at the position before it.
        wanted = marked[:, 1:].bool()
        device = self._model.device
        with torch.inference_mode():
            logits = self._model(
                input_ids=input_ids.to(device), attention_mask=mask.to(device)
            ).logits[:, :-1]
            at = wanted.nonzero()  # (supervised, 2)
            labels = input_ids[:, 1:][wanted].to(device)
            each = torch.zeros(len(at))
            for start in range(0, len(at), _LOSS_ROWS):
                rows = at[start : start + _LOSS_ROWS].to(device)
                picked = logits[rows[:, 0], rows[:, 1]].float()
                each[start : start + len(rows)] = cross_entropy(
                    picked, labels[start : start + len(rows)], reduction="none"
                ).cpu()
        total = torch.zeros(len(batch)).index_add_(0, at[:, 0], each)
        mean: Float32Array = (total / wanted.sum(1).clamp(min=1)).numpy()
        return mean
