"""slap_stream: decide, while a language model trains, which samples are worth a training step.

One folder a stage, in the order in which data flows:

    text -> corpus -> embeddings -> shards -> selection -> loader -> your training step
                                                  ^                        |
                                                  +------- probe <---------+

`core` holds what all of them use, `integrations` other libraries' training loops, `report` pages
for people, `cli` the command lines. Each folder's `__init__` says what comes in, what goes out, and
which file to open for what.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slap_stream.config import Advanced, SlapConfig
    from slap_stream.corpus.convert import convert
    from slap_stream.embeddings.embed import embed
    from slap_stream.embeddings.store import EmbeddingStore
    from slap_stream.integrations.prepare import prepare
    from slap_stream.loader.loader import SlapDataLoader
    from slap_stream.probe.probe import LearnabilityProbe
    from slap_stream.probe.readout import per_sample_loss
    from slap_stream.selection.policies.base import Policy
    from slap_stream.selection.policies.registry import register_policy
    from slap_stream.selection.sampler import SlapSampler
    from slap_stream.shards.opening import one_at_a_time
    from slap_stream.text.collate import ChatCollator

__version__ = "0.2.0"

__all__ = [
    "Advanced",
    "ChatCollator",
    "EmbeddingStore",
    "LearnabilityProbe",
    "Policy",
    "SlapConfig",
    "SlapDataLoader",
    "SlapSampler",
    "convert",
    "embed",
    "one_at_a_time",
    "per_sample_loss",
    "prepare",
    "register_policy",
]

# Resolved on first use: importing the package must not import torch, streaming, zarr or numba.
_HOME = {
    "Advanced": "config",
    "ChatCollator": "text.collate",
    "EmbeddingStore": "embeddings.store",
    "LearnabilityProbe": "probe.probe",
    "Policy": "selection.policies.base",
    "SlapConfig": "config",
    "SlapDataLoader": "loader.loader",
    "SlapSampler": "selection.sampler",
    "convert": "corpus.convert",
    "embed": "embeddings.embed",
    "one_at_a_time": "shards.opening",
    "per_sample_loss": "probe.readout",
    "prepare": "integrations.prepare",
    "register_policy": "selection.policies.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
