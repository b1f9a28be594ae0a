"""The errors that slap_stream raises by name; each is also the builtin a caller would expect."""

from __future__ import annotations


class SlapStreamError(Exception):
    """Base of every error that slap_stream defines."""


class ConfigError(SlapStreamError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class CorpusError(SlapStreamError, ValueError):
    """A corpus, or a file it is made from, cannot be used."""


class AlignmentError(SlapStreamError, ValueError):
    """Embeddings and dataset do not describe the same samples."""


class FeedbackError(SlapStreamError, ValueError):
    """Losses or sketches were handed over for samples that did not ask for them."""


class StateError(SlapStreamError, ValueError):
    """A saved state does not belong to this run, or was written by another version."""


class ShardError(SlapStreamError, RuntimeError):
    """A shard could not be fetched or read, which says nothing about what is in it."""


class DamagedShardError(ShardError):
    """A shard is not what its index promised: its size, its hash, its header or its packing."""


class SampleError(SlapStreamError, RuntimeError):
    """More samples than may be withdrawn cannot be read or collated."""


class HeadError(SlapStreamError, TypeError):
    """The probe cannot read this model without being told more about it."""


class ProbeMemoryError(SlapStreamError, MemoryError):
    """Memory is too short for a probe's forward, however small."""


class ExchangeError(SlapStreamError, RuntimeError):
    """Ranks could not exchange what they know, or are not at the same place of the same run."""


class WorkerError(SlapStreamError, RuntimeError):
    """A process that reads and collates batches has died."""


class RunLogError(SlapStreamError, ValueError):
    """A run's log cannot be read, or there is none."""


class RemoteError(SlapStreamError, RuntimeError):
    """A file in an object store or on the web cannot be had, which says nothing about what is in
    it.

    Attributes:
        missing: Whether the store says that it is not there.
    """

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
