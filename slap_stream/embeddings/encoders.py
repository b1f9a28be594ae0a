"""Texts to vectors: hashed n-grams, or any Hugging Face encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from slap_stream.core.checks import require_whole
from slap_stream.core.linear import normalised
from slap_stream.embeddings.features import NUM_BUCKETS, HashedPairs
from slap_stream.embeddings.pretrained import load_pretrained, pad, token_batches
from slap_stream.errors import ConfigError
from slap_stream.text.sample import TextSample
from slap_stream.types import Float32Array

DEFAULT_DIM = 384
# Non-zero entries per bucket of the projection: products of sketches then vary hardly more than
# with a dense one, at a fiftieth of the work.
ENTRIES_PER_BUCKET = 8
MAX_TOKENS = 512
# Padded tokens of a batch on a CPU, where small ones stay in the cache (measured: twice as fast as
# 16,384), and elsewhere.
TOKENS_PER_BATCH = (2_048, 65_536)


class Encoder(Protocol):
    """Turns samples into vectors and, if it can, into further feature columns.

    Attributes:
        name: How the encoder is asked for: `hashing`, `hf:PATH`.
        version: Changes whenever the same text would get another vector.
        dim: Length of a vector.
        feature_names: Names of the further feature columns; may be empty.
        in_workers: Whether several processes may each have one; false for models, which use all
            cores.
    """

    name: str
    version: str
    dim: int
    feature_names: tuple[str, ...]
    in_workers: bool

    def encode(
        self, samples: Sequence[TextSample], pairs: HashedPairs
    ) -> tuple[Float32Array, Float32Array]:
        """Vectors and columns of n samples.

        Args:
            samples: n samples.
            pairs: Their hashed vectors.

        Returns:
            (n, dim) unit rows, or a zero row for a sample without any token, and
            (n, len(feature_names)).
        """
        ...


class HashingEncoder:
    """Sparse random projection of the sum of prompt and target vectors; needs no download.

    Prompt and target weigh the same however long they are: a long document with a short question
    would otherwise be told by the document alone.

    Args:
        dim: Length of a vector; inner products err by about 1 / sqrt(dim).

    Reference: P. Li, T. Hastie, K. Church, "Very Sparse Random Projections", KDD 2006; here with a
    fixed number of entries per bucket, as in Kane and Nelson, "Sparser Johnson-Lindenstrauss
    Transforms", 2014.
    """

    name = "hashing"
    feature_names: tuple[str, ...] = ()
    in_workers = True

    def __init__(self, dim: int = DEFAULT_DIM) -> None:
        self.dim = require_whole("dim", dim, ENTRIES_PER_BUCKET, f"try {DEFAULT_DIM}")
        # Changes with the tokens, the buckets or the projection.
        self.version = f"1-{NUM_BUCKETS}-{ENTRIES_PER_BUCKET}-{self.dim}"
        self._projection = sparse_projection(self.dim)

    def __reduce__(self) -> tuple[type[HashingEncoder], tuple[int]]:
        # The projection is sixteen megabytes, and follows from the dimension.
        return HashingEncoder, (self.dim,)

    def encode(
        self, samples: Sequence[TextSample], pairs: HashedPairs
    ) -> tuple[Float32Array, Float32Array]:
        """Project the hashed vectors; see `Encoder.encode`."""
        vectors = ((pairs.prompt + pairs.target) @ self._projection).toarray()
        return normalised(vectors), np.zeros((len(samples), 0), dtype=np.float32)


def sparse_projection(dim: int, entries: int = ENTRIES_PER_BUCKET) -> Any:
    """(NUM_BUCKETS, dim) CSR with so many entries +-1 per row, the same on every machine."""
    from scipy.sparse import csr_matrix

    # Raw words of the counter-based generator, whose stream NumPy promises never to change.
    raw = np.random.Philox(key=dim).random_raw(NUM_BUCKETS * entries)
    columns = ((raw >> np.uint64(1)) % np.uint64(dim)).astype(np.int32)
    signs = np.where(raw & np.uint64(1), 1.0, -1.0).astype(np.float32)
    starts = np.arange(0, len(raw) + 1, entries, dtype=np.int32)
    return csr_matrix((signs, columns, starts), shape=(NUM_BUCKETS, dim))


class HFEncoder:
    """Mean-pooled last hidden states of any Hugging Face encoder, prompt and target apart.

    Each is encoded by itself, so that a long prompt does not push the target out of the model's
    window, and so that their cosine comes for free; the vector is the sum of the two unit vectors.
    bfloat16 on a GPU, float32 on a CPU.

    Args:
        path: Directory (or hub name) of the model and its tokenizer.
        device: torch device; None means the GPU if there is one.
        max_tokens: Tokens read of each prompt and each target; the model's own limit if smaller.

    Raises:
        ConfigError: If the path holds no model.
    """

    # Cosine of the vectors of prompt and target.
    feature_names: tuple[str, ...] = ("prompt_target_similarity",)
    in_workers = False

    def __init__(
        self, path: str, device: str | None = None, *, max_tokens: int = MAX_TOKENS
    ) -> None:
        from transformers import AutoModel

        loaded = load_pretrained(AutoModel, path, device)
        model = loaded.model
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        self._model, self._tokenizer = model, loaded.tokenizer
        own = getattr(model.config, "max_position_embeddings", None) or max_tokens
        self._max_tokens = min(max_tokens, int(own), int(self._tokenizer.model_max_length))
        self.name, self.dim = f"hf:{path}", int(model.config.hidden_size)
        # Digest of configuration and weights, precision and window.
        self.version = f"{loaded.version}-{self._max_tokens}"

    def encode(
        self, samples: Sequence[TextSample], pairs: HashedPairs
    ) -> tuple[Float32Array, Float32Array]:
        """Encode prompts and targets; see `Encoder.encode`."""
        texts = [sample.prompt for sample in samples] + [sample.target for sample in samples]
        vectors = self._pooled(texts)
        prompt, target = vectors[: len(samples)], vectors[len(samples) :]
        similarity: Float32Array = np.einsum("nd,nd->n", prompt, target)[:, None]
        return normalised(prompt + target), similarity

    def _pooled(self, texts: Sequence[str]) -> Float32Array:
        """(texts, dim) unit rows; zeros for a text without tokens of its own."""
        import torch

        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        filled = [row for row, text in enumerate(texts) if text.strip()]
        if not filled:
            return vectors
        ids = self._tokenizer(
            [texts[row] for row in filled], truncation=True, max_length=self._max_tokens
        )["input_ids"]
        lengths = np.array([len(row) for row in ids])
        device = self._model.device
        for batch in token_batches(lengths, TOKENS_PER_BATCH[device.type != "cpu"]):
            input_ids, mask = (
                each.to(self._model.device) for each in pad([ids[at] for at in batch])
            )
            with torch.inference_mode():
                hidden = self._model(input_ids=input_ids, attention_mask=mask).last_hidden_state
                weight = mask.unsqueeze(-1).float()  # (batch, tokens, 1)
                pooled = (hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1)
            vectors[[filled[at] for at in batch]] = pooled.cpu().numpy()
        return normalised(vectors)


def open_encoder(
    name: str, *, dim: int | None = None, device: str | None = None
) -> HashingEncoder | HFEncoder:
    """An encoder by name: `hashing`, or `hf:PATH`.

    Raises:
        ConfigError: If there is no such encoder, or the dimension of a model is to be changed.
    """
    if name == "hashing":
        return HashingEncoder(DEFAULT_DIM if dim is None else dim)
    if name.startswith("hf:") and name != "hf:":
        if dim is not None:
            raise ConfigError(
                f"dim must be None for {name}, got {dim!r}; a model's dimension is its own."
            )
        return HFEncoder(name.removeprefix("hf:"), device)
    raise ConfigError(f"encoder must be one of hashing, hf:PATH, got {name!r}.")
