"""Shards on local disk: fetched, verified, thrown away, under streaming's own cross-process state.

Streaming keeps one state per shard in shared memory, guarded by a file lock, so that ranks and
workers of a node share downloads. Its own `prepare_shard` leaves a shard in state "preparing" for
ever when a download fails, and everybody else then waits for ever; here every way out of a
download puts the state right.
"""

from __future__ import annotations

import copy
import hashlib
import struct
import threading
from pathlib import Path
from time import monotonic, sleep, time_ns
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock

from slap_stream.errors import ShardError

# Values of streaming's shard states; a test compares them with the installed version.
REMOTE, PREPARING, LOCAL = 1, 2, 3
# Time of access of a shard that is to stay: later than any, and not streaming's "never", which it
# writes when it evicts a shard.
PINNED = (1 << 64) - 2

ATTEMPTS = 3
BACKOFF_SECONDS = 0.1
POLL_SECONDS = 0.01


class ShardCache:
    """Puts shards of a `StreamingDataset` on local disk and checks them.

    Holds no state of its own beyond copies of the streams, one set per thread: download clients
    are not made for several threads, and a failing one throws away its connection.

    Args:
        dataset: The dataset; only its streams, shards and shared state are used.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._per_thread = threading.local()

    def directory(self, shard_id: int) -> Path:
        """Local directory that a shard's file names are relative to."""
        stream = self._dataset.streams[int(self._dataset.stream_per_shard[shard_id])]
        return Path(stream.local, stream.split)

    def present(self, shard_id: int) -> bool:
        """Whether the shard is there to be read; says nothing about what is in it."""
        if self._dataset._shard_states[shard_id] != LOCAL:
            return False
        directory = self.directory(shard_id)
        pairs = self._dataset.shards[shard_id].file_pairs
        return all((directory / raw.basename).is_file() for raw, _ in pairs)

    def touch(self, shard_id: int) -> None:
        """Mark the shard as used now: `cache_limit` evicts what was used longest ago."""
        times = self._dataset._shard_access_times
        if times[shard_id] != PINNED:
            times[shard_id] = time_ns()

    def pin(self, shard_ids: list[int], released: list[int]) -> None:
        """Have these shards evicted last, in all processes of the node, and others as usual."""
        times = self._dataset._shard_access_times.numpy()
        times[released] = time_ns()
        times[shard_ids] = PINNED

    def room_bytes(self, ranks_on_node: int) -> int | None:
        """Bytes of shards that `cache_limit` has room for; None without a limit.

        The limit is a node's. So many ranks share it equally, unless there is room for everything:
        else what all have pinned would not fit, and they would throw away each other's shards.
        """
        if not self._dataset.cache_limit:
            return None
        indexes = sum(stream.get_index_size() for stream in self._dataset.streams)
        room = int(self._dataset.cache_limit - indexes)
        everything = sum(map(self.max_bytes, range(len(self._dataset.shards))))
        return room if room >= everything else room // ranks_on_node

    def max_bytes(self, shard_id: int) -> int:
        """Bytes that a shard may take while it is unpacked."""
        return int(self._dataset.shards[shard_id].get_max_size())

    def ensure(self, shard_id: int, deadline: float) -> int:
        """Bring a shard to local disk and verify it, in this thread.

        A bad shard is thrown away and fetched again, if there is somewhere to fetch it from;
        files of a stream without a separate remote are never deleted, except raw files whose
        compressed form is there to be unpacked again.

        Args:
            shard_id: Which shard.
            deadline: `time.monotonic()` after which nothing new is tried.

        Returns:
            Bytes that were added to the local disk.

        Raises:
            ShardError: If it cannot be fetched, or stays bad.
        """
        added = 0
        for attempt in range(1, ATTEMPTS + 1):
            try:
                added += self._prepare(shard_id, deadline)
                self._verify(shard_id)
                return added
            except Exception as error:  # downloaders raise whatever their client raises
                last = attempt == ATTEMPTS or monotonic() >= deadline
                if not self._discard(shard_id) or last:
                    raise ShardError(
                        f"shard {shard_id} must be readable, got {self._name(shard_id)!r}, of "
                        f"which attempt {attempt} said: {error}; {self._cure(shard_id)}"
                    ) from error
                sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _prepare(self, shard_id: int, deadline: float) -> int:
        """Download and unpack, or wait for whoever is doing so; the bytes this added."""
        dataset, states = self._dataset, self._dataset._shard_states
        shard = dataset.shards[shard_id]
        while True:
            with self._lock():
                before = int(states[shard_id])
                if before != PREPARING:
                    if self.present(shard_id):
                        self.touch(shard_id)
                        return 0
                    if not self._refetchable(shard_id) and not self._zipped(shard_id):
                        # Stock code would try to download it, several times, from nowhere.
                        raise FileNotFoundError("its file is missing")
                    if self._make_room(shard_id):
                        states[shard_id] = PREPARING
                        break
            if monotonic() >= deadline:
                raise TimeoutError(
                    "another process has been fetching it past the deadline, or was killed while "
                    "it did"
                )
            sleep(POLL_SECONDS)
        usage = self._bytes_present(shard_id)
        arrived = False
        try:
            self._stream(shard_id).prepare_shard(shard)
            arrived = True
        finally:
            with self._lock():
                if not arrived and self._refetchable(shard_id):
                    # Stock downloads validate a raw file after it has its final name.
                    shard.evict()
                    before = REMOTE
                added = self._bytes_present(shard_id) - usage
                dataset.cache_usage += added - self._reservation(shard_id)
                self.touch(shard_id)
                states[shard_id] = LOCAL if arrived else before
        return added

    def _make_room(self, shard_id: int) -> bool:
        """Evict the coldest shards until this one fits under `cache_limit`; needs the lock.

        The stock code counts a shard when it has arrived, so that several at once exceed the limit;
        here its room is taken before.

        Returns:
            Whether the room was taken; if not, it is worth waiting for shards on their way.
        """
        dataset = self._dataset
        needed = self._reservation(shard_id)
        states = dataset._shard_states.numpy()
        while needed and dataset.cache_limit < dataset.cache_usage + needed:
            if not np.any(states == LOCAL) and np.any(states == PREPARING):
                return False
            dataset._evict_coldest_shard()
        dataset.cache_usage += needed
        return True

    def _reservation(self, shard_id: int) -> int:
        """Bytes that a shard may take while it is unpacked; nothing without a `cache_limit`."""
        return self._dataset.shards[shard_id].get_max_size() if self._dataset.cache_limit else 0

    def _zipped(self, shard_id: int) -> bool:
        """Whether the compressed form of all the shard's files is on disk."""
        directory = self.directory(shard_id)
        pairs = self._dataset.shards[shard_id].file_pairs
        return all(zipped and (directory / zipped.basename).is_file() for _, zipped in pairs)

    def _discard(self, shard_id: int) -> bool:
        """Delete what can be had again; whether there is anything to try again with."""
        shard = self._dataset.shards[shard_id]
        with self._lock():
            if self._dataset._shard_states[shard_id] == PREPARING:
                return True
            usage = self._bytes_present(shard_id)
            if self._refetchable(shard_id):
                shard.evict()
                self._dataset._shard_states[shard_id] = REMOTE
            elif self._zipped(shard_id):
                for raw, _ in shard.file_pairs:
                    (self.directory(shard_id) / raw.basename).unlink(missing_ok=True)
            else:
                return False
            self._dataset.cache_usage += self._bytes_present(shard_id) - usage
            return True

    def _verify(self, shard_id: int) -> None:
        """Compare a shard's files with what the index promises.

        Raises:
            ValueError: If a file is missing, has another size or hash, or does not hold the
                samples it should.
        """
        shard = self._dataset.shards[shard_id]
        directory = self.directory(shard_id)
        validate_hash = self._stream(shard_id).validate_hash
        for raw, _ in shard.file_pairs:
            path = directory / raw.basename
            if not path.is_file():
                raise ValueError(f"{raw.basename} is missing")
            size = path.stat().st_size
            if size != raw.bytes:
                raise ValueError(f"{raw.basename} has {size} bytes, its index says {raw.bytes}")
            if is_mds(shard):
                check_header(path, shard.samples, size)
            if raw.hashes:
                algorithm = validate_hash or _cheapest(raw.hashes)
                if algorithm not in raw.hashes:
                    raise ValueError(f"its index has no {algorithm}, only {sorted(raw.hashes)}")
                found = hash_of(path, algorithm)
                if found != raw.hashes[algorithm]:
                    raise ValueError(
                        f"{raw.basename} has {algorithm} {found}, its index says "
                        f"{raw.hashes[algorithm]}"
                    )

    def _refetchable(self, shard_id: int) -> bool:
        stream = self._dataset.streams[int(self._dataset.stream_per_shard[shard_id])]
        return stream.remote not in (None, stream.local)

    def _bytes_present(self, shard_id: int) -> int:
        """What the shard adds to the cache usage: sizes by the index, as streaming counts."""
        directory = self.directory(shard_id)
        return sum(
            int(file.bytes)
            for pair in self._dataset.shards[shard_id].file_pairs
            for file in pair
            if file is not None and (directory / file.basename).is_file()
        )

    def _stream(self, shard_id: int) -> Any:
        """This thread's copy of the shard's stream."""
        streams = self._per_thread.__dict__.setdefault("streams", {})
        stream_id = int(self._dataset.stream_per_shard[shard_id])
        if stream_id not in streams:
            stream = copy.copy(self._dataset.streams[stream_id])
            stream._downloader = copy.copy(stream._downloader)
            streams[stream_id] = stream
        return streams[stream_id]

    def _lock(self) -> FileLock:
        # A lock object per use: they are not shared between threads, and cannot be pickled.
        return FileLock(self._dataset._cache_filelock_path)

    def _name(self, shard_id: int) -> str:
        raw = self._dataset.shards[shard_id].file_pairs[-1][0]
        return str(self.directory(shard_id) / raw.basename)

    def _cure(self, shard_id: int) -> str:
        if self._refetchable(shard_id):
            return "check the remote."
        return "its stream has no remote to fetch it from: restore it."


def is_mds(shard: Any) -> bool:
    """Whether a streaming reader reads MDS, the format with one file and a header per shard."""
    return hasattr(shard, "column_encodings")


def check_header(path: Path, samples: int, size: int) -> None:
    """Check that an MDS file says it has as many samples as it should, and ends where they do.

    Raises:
        ValueError: If not.
    """
    with path.open("rb") as file:
        (count,) = struct.unpack("<I", file.read(4))
        if count != samples:
            raise ValueError(f"{path.name} holds {count} samples, its index says {samples}")
        file.seek(4 + 4 * samples)
        (end,) = struct.unpack("<I", file.read(4))
    if end != size:
        raise ValueError(f"{path.name} should end after {end} bytes, but has {size}")


def hash_of(path: Path, algorithm: str) -> str:
    """Hash of a file, in hex, by any algorithm that streaming's writers offer."""
    make = getattr(hashlib, algorithm, None) or getattr(xxhash, algorithm)
    with path.open("rb") as file:
        return hashlib.file_digest(file, make).hexdigest()


def _cheapest(hashes: dict[str, str]) -> str:
    return min(hashes, key=lambda name: (not name.startswith("xxh"), name != "sha1", name))
