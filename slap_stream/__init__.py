"""slap_stream: decide, while a language model trains, which samples are worth a training step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slap_stream.config import SlapConfig
    from slap_stream.embeddings import EmbeddingStore
    from slap_stream.loader import SlapDataLoader
    from slap_stream.probe import LearnabilityProbe, per_sample_loss
    from slap_stream.sampler import SlapSampler

__version__ = "0.1.0"

__all__ = [
    "EmbeddingStore",
    "LearnabilityProbe",
    "SlapConfig",
    "SlapDataLoader",
    "SlapSampler",
    "per_sample_loss",
]

# Resolved on first use: importing the package must not import torch, streaming, zarr or numba.
_HOME = {
    "EmbeddingStore": "embeddings",
    "LearnabilityProbe": "probe",
    "SlapConfig": "config",
    "SlapDataLoader": "loader",
    "SlapSampler": "sampler",
    "per_sample_loss": "probe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
