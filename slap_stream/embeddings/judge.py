"""What a language model holds against a sample: a loss far above that of others of its kind.

The model, as a rule the one that is to be trained, reads each sample once, a part of it. Targets of
other prompts, cut off, garbled and in a language that nobody expects have losses that stand out
among samples of the same source and length of target; how sure that is, `core.outliers` says. What
every model finds likely, such as a phrase over and over, does not stand out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slap_stream.core.outliers import Mirror, Spread
from slap_stream.embeddings.pairing import text_digests
from slap_stream.embeddings.reference import Marked, ReferenceLoss
from slap_stream.text.sample import TextSample
from slap_stream.types import JUDGE_COLUMN, Float32Array, FloatArray, IntArray

# Tokens that are read: so many of the target's first, and before them so many of the prompt's last.
TARGET_TOKENS, PROMPT_TOKENS = 64, 192
# Samples that losses are compared with; more change little.
FIT_SAMPLES = 4_096
# Groups of targets by the tokens that were read of them: 1, 2 to 3, ... 64.
_LENGTHS = 7


class Judge(ReferenceLoss):
    """Losses of the beginnings of targets, and how surely one is no answer to its prompt.

    State: centre and scale of the losses of each source and length, and how much heavier the upper
    tail is than the lower one; losses of the samples that they are from.

    Args:
        path: Directory (or hub name) of the model and its tokenizer.
        device: torch device; None means the GPU if there is one.
        tokenizer: Directory of the tokenizer that made the corpus's `input_ids`, if it is
            tokenised; its vocabulary must be the model's.
        source_names: Names of the corpus's sources.

    Attributes:
        feature_names: `judge_loss`.
        tokens: Tokens read so far.

    Raises:
        ConfigError: If the path holds no model, or its vocabulary is not the corpus's.
    """

    feature_names = (JUDGE_COLUMN,)
    role = "judge model"

    def __init__(
        self,
        path: str,
        device: str | None = None,
        *,
        tokenizer: str | Path | None = None,
        source_names: Sequence[str] = (),
    ) -> None:
        super().__init__(path, device, tokenizer=tokenizer)
        self._row = {name: number for number, name in enumerate(source_names)}
        self._known: dict[int, float] = {}
        self.tokens = 0
        none = np.zeros(0)
        self._spread = Spread.of(none, none.astype(int), none.astype(int), shape=self._shape)
        self._mirror = Mirror.of(none)

    @property
    def _shape(self) -> tuple[int, int]:
        return max(1, len(self._row)), _LENGTHS

    def fit(self, samples: Sequence[TextSample]) -> None:
        """Learn what losses are usual; the samples' own are kept and not computed again."""
        losses, length = self._read(samples)
        self._known = dict(zip(text_digests(samples).tolist(), losses.tolist(), strict=True))
        judged = length >= 0
        row = self._rows(samples)[judged]
        losses, length = losses[judged], length[judged]
        self._spread = Spread.of(losses, row, length, shape=self._shape)
        self._mirror = Mirror.of(self._spread.standardised(losses, row, length))

    def judge(self, samples: Sequence[TextSample]) -> tuple[Float32Array, Float32Array]:
        """(n,) losses in nats per token, and (n,) probabilities of being no answer to the prompt.

        Both are 0 for a sample without target within the window.
        """
        losses, length = self._read(samples)
        height = self._spread.standardised(losses, self._rows(samples), np.maximum(length, 0))
        probability = np.where(length >= 0, self._mirror.probability(height), 0.0)
        return losses.astype(np.float32), probability.astype(np.float32)

    def _read(self, samples: Sequence[TextSample]) -> tuple[FloatArray, IntArray]:
        """(n,) losses and (n,) groups of target lengths, -1 where there is no target."""
        encoded = [self._encoded(sample) for sample in samples]
        counts = np.array([sum(marks[1:]) for _, marks in encoded])
        digests = text_digests(samples).tolist()
        new = [at for at, digest in enumerate(digests) if digest not in self._known]
        losses = np.array([self._known.get(digest, 0.0) for digest in digests])
        if new:
            losses[new] = self.losses_of([encoded[at] for at in new])
            self.tokens += sum(len(encoded[at][0]) for at in new)
        length = np.where(counts > 0, np.log2(np.maximum(counts, 1)), -1).astype(np.int64)
        return losses, np.minimum(length, _LENGTHS - 1)

    def _cut(self, ids: list[int], marks: list[bool]) -> Marked:
        """The target's first tokens with the last ones before it, as far as the window goes."""
        places = [at for at, marked in enumerate(marks) if marked]
        if not places:
            return ids[:1], marks[:1]
        # Of a small window half is for the target.
        before = min(PROMPT_TOKENS, self._max_tokens - min(TARGET_TOKENS, self._max_tokens // 2))
        start = max(0, places[0] - before)
        stop = places[min(len(places), TARGET_TOKENS) - 1] + 1
        # Of several answers the first ones, if there is much between them.
        stop = min(stop, start + self._max_tokens)
        return ids[start:stop], marks[start:stop]

    def _rows(self, samples: Sequence[TextSample]) -> IntArray:
        return np.array([self._row.get(sample.source or "", 0) for sample in samples], np.int64)
