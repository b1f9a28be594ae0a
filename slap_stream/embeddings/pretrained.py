"""Hugging Face models that only read: loading, and batches of like length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slap_stream.errors import ConfigError
from slap_stream.types import IntArray

if TYPE_CHECKING:
    import torch

_PEEK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """A model in evaluation mode, its tokenizer, and a digest of both and of the precision."""

    model: Any
    tokenizer: Any
    version: str


def torch_device(name: str | None) -> torch.device:
    """The device of this name; the GPU, or else the CPU, for None.

    Raises:
        ConfigError: If torch knows no such device, or this machine has it not.
    """
    import torch

    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device must be one of torch's, got {name!r}; try cpu.") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device must be here, got {name!r} on a machine with {torch.cuda.device_count()} GPUs "
            "that torch can use; leave it out, or say cpu."
        )
    return found


def load_pretrained(auto: Any, path: str, device: str | None) -> Pretrained:
    """Load a model to read with: bfloat16 on a GPU, float32 on a CPU, no gradients.

    Args:
        auto: `AutoModel`, `AutoModelForCausalLM` or the like.
        path: Directory or hub name.
        device: torch device; None means the GPU if there is one.

    Raises:
        ConfigError: If there is no model, no tokenizer or no such device.
    """
    import torch
    import transformers

    where = torch_device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    major, minor = map(int, transformers.__version__.split(".")[:2])
    # Renamed in 4.56; the old name prints a notice in the new versions.
    keyword = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = auto.from_pretrained(path, **{keyword: dtype}).to(where).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model path must hold a Hugging Face model and its tokenizer, got {path!r} ({error}); "
            "pass a directory that save_pretrained made."
        ) from error
    model.requires_grad_(False)
    dtype_name = str(dtype).removeprefix("torch.")
    return Pretrained(
        model=model, tokenizer=tokenizer, version=f"{_digest(model, path)}-{dtype_name}"
    )


def _digest(model: Any, path: str) -> str:
    """Of the configuration and of both ends of every weight file (whole files take minutes)."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    if not Path(path).is_dir():
        digest.update(str(getattr(model.config, "_commit_hash", None)).encode())
        return digest.hexdigest()[:12]
    for file in sorted(Path(path).iterdir()):
        if file.suffix in {".safetensors", ".bin"}:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as weights:
                digest.update(weights.read(_PEEK_BYTES))
                weights.seek(max(0, size - _PEEK_BYTES))
                digest.update(weights.read())
    return digest.hexdigest()[:12]


def token_batches(lengths: NDArray[Any], tokens_per_batch: int) -> Iterator[IntArray]:
    """Positions in batches of like length, longest first, padded size bounded.

    Args:
        lengths: (n,) tokens.
        tokens_per_batch: Padded tokens of one batch; a longer sample is a batch of its own.

    Yields:
        (batch,) positions; every position once.
    """
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < len(order):
        longest = max(1, int(lengths[order[at]]))
        count = max(1, tokens_per_batch // longest)
        yield order[at : at + count]
        at += count


def pad(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids side by side, padded on the right with zeros that the mask hides.

    A tokenizer's own padding needs a padding token, which many causal models lack.

    Args:
        rows: Token ids of each sample.

    Returns:
        (batch, tokens) int64 ids and mask.
    """
    import torch

    width = max(1, *(len(row) for row in rows))
    input_ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for at, row in enumerate(rows):
        input_ids[at, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[at, : len(row)] = 1
    return input_ids, mask
