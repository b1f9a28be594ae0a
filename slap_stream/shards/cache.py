"""Shards on local disk: fetched, verified, thrown away, under streaming's own cross-process state.

Streaming's own `prepare_shard` leaves a shard in state "preparing" for ever when a download fails,
and everybody else then waits for ever; here every way out of a download puts the state right, and
who waits for a process that was killed does it in its place: the system has freed that one's lock.

A shard is damaged if it fails its verification, and only then: who withdraws damaged shards must
not lose one to an expired credential, a full disk or a bug. So what is damaged is said where the
bytes are compared (`DamagedShardError`), never inferred from what a download raised.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import monotonic, time_ns
from typing import Any

import numpy as np
import xxhash
from filelock import Timeout

from slap_stream.errors import AlignmentError, DamagedShardError, ShardError
from slap_stream.shards.decode import sample_bounds
from slap_stream.shards.index import content_hash, is_hash
from slap_stream.shards.library import (
    LOCAL,
    PREPARING,
    REMOTE,
    UNPACK_ERRORS,
    MDSReader,
    access_times,
    cache_lock,
    decompress,
    evict_coldest,
    fetch_lock,
    own_stream,
    shard_states,
)

# Time of access of a shard that is to stay: later than any, and not streaming's "never", which it
# writes when it evicts a shard.
PINNED = (1 << 64) - 2

DEADLINE_SECONDS = 600.0
# With the backoff, which doubles, a quarter of a minute; streaming tries each download twice, too.
ATTEMPTS = 6
BACKOFF_SECONDS = 0.5
# A rotten copy, then the remote's twice: a download may be cut short, too.
DAMAGED_ATTEMPTS = 3
POLL_SECONDS = 0.01

# Trying again does not mend a program. (Downloaders raise whatever their clients raise, which no
# list of what may be tried again would cover.)
BUGS = (
    TypeError,
    AttributeError,
    NameError,
    LookupError,
    AssertionError,
    ArithmeticError,
    NotImplementedError,
    ImportError,
    MemoryError,
)


class ShardCache:
    """Puts shards of a `StreamingDataset` on local disk and checks them.

    Holds no state of its own beyond copies of the streams, one set per thread, and a count.

    Args:
        dataset: The dataset; only its streams, shards and shared state are used.
        deadline_seconds: Time after which nothing new is tried to fetch a shard.
        embedded: Hashes of what was embedded, by shards of which the index has none.

    Attributes:
        retries: How often fetching or verifying a shard was tried again.
    """

    def __init__(
        self,
        dataset: Any,
        deadline_seconds: float = DEADLINE_SECONDS,
        embedded: Mapping[int, str] | None = None,
    ) -> None:
        self._dataset = dataset
        self._embedded = dict(embedded or {})
        self._deadline_seconds = deadline_seconds
        self._per_thread = threading.local()
        self._counting = threading.Lock()
        self._stopped = threading.Event()
        self.retries = 0

    def stop(self) -> None:
        """Have whoever waits to try again give up: nobody needs the shards any more."""
        self._stopped.set()

    def directory(self, shard_id: int) -> Path:
        """Local directory that a shard's file names are relative to."""
        stream = self._stock_stream(shard_id)
        return Path(stream.local, stream.split)

    def present(self, shard_id: int) -> bool:
        """Whether the shard is there to be read; says nothing about what is in it."""
        arrived = shard_states(self._dataset)[shard_id] == LOCAL
        return bool(arrived) and all(path.is_file() for path, _ in self._raw_files(shard_id))

    def touch(self, shard_id: int) -> None:
        """Mark the shard as used now: `cache_limit` evicts what was used longest ago."""
        times = access_times(self._dataset)
        if times[shard_id] != PINNED:
            times[shard_id] = time_ns()

    def pin(self, shard_ids: list[int], released: list[int]) -> None:
        """Have these shards evicted last, in all processes of the node, and others as usual."""
        times = access_times(self._dataset)
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

    def ensure(self, shard_id: int) -> int:
        """Bring a shard to local disk and verify it, in this thread.

        A damaged shard is thrown away and fetched again, if there is somewhere to fetch it from;
        files of a stream without a separate remote are never deleted, except raw files whose
        compressed form is there to be unpacked again. Anything else that fails is tried again for a
        while. A bug, ours or streaming's, is raised as it is.

        Args:
            shard_id: Which shard.

        Returns:
            Bytes that were added to the local disk.

        Raises:
            DamagedShardError: If it is not what its index says, also after it was fetched again.
            ShardError: If it cannot be fetched or read.
            AlignmentError: If it is not what was embedded.
        """
        deadline = monotonic() + self._deadline_seconds
        added = failures = damages = 0
        while True:
            try:
                added += self._prepare(shard_id, deadline)
                self._verify(shard_id)
                return added
            except DamagedShardError as error:
                damages += 1
                if not self._discard(shard_id) or damages == DAMAGED_ATTEMPTS:
                    raise DamagedShardError(
                        f"shard {shard_id} must be what its index says, got "
                        f"{self._name(shard_id)!r}, of which attempt {damages} said: {error}; "
                        "restore it, or withdraw what is damaged with on_bad_shard='skip'."
                    ) from error
            except (ShardError, AlignmentError, *BUGS):
                raise
            except Exception as error:
                failures += 1
                if failures == ATTEMPTS or monotonic() >= deadline:
                    raise ShardError(
                        f"shard {shard_id} must be readable, got {self._name(shard_id)!r}, of "
                        f"which attempt {failures} said: {type(error).__name__}: {error}; check "
                        "remote, credentials and disk, and go on from the last state."
                    ) from error
                pause = BACKOFF_SECONDS * 2 ** (failures - 1)
                self._pause(min(pause, deadline - monotonic()))
            with self._counting:
                self.retries += 1

    def _pause(self, seconds: float) -> None:
        """Wait before something is tried again, unless it is not needed any more."""
        if self._stopped.wait(max(0.0, seconds)):
            raise ShardError("fetcher must be open, got one that was closed while it fetched.")

    def _prepare(self, shard_id: int, deadline: float) -> int:
        """Download and unpack, or wait for whoever is doing so; the bytes this added."""
        dataset, states = self._dataset, shard_states(self._dataset)
        shard, held = dataset.shards[shard_id], fetch_lock(dataset, shard_id)
        while True:
            with cache_lock(dataset):
                before = int(states[shard_id])
                if before == PREPARING and self._abandoned(shard_id):
                    before = int(states[shard_id])
                if before != PREPARING:
                    if self.present(shard_id):
                        self.touch(shard_id)
                        return 0
                    if not self._refetchable(shard_id) and not self._zipped(shard_id):
                        # Stock code would try to download it, several times, from nowhere.
                        raise ShardError(
                            f"shard {shard_id} must be on local disk, got no "
                            f"{self._name(shard_id)!r}; its stream has no remote to fetch it from: "
                            "restore it."
                        )
                    if self._make_room(shard_id):
                        try:
                            held.acquire()
                        except OSError:
                            dataset.cache_usage -= self._reservation(shard_id)
                            raise
                        states[shard_id] = PREPARING
                        break
            if monotonic() >= deadline:
                raise ShardError(
                    f"shard {shard_id} must arrive within {self._deadline_seconds:g} seconds, got "
                    "another process that is still fetching it, or was killed while it did; end "
                    "all processes of the node and start them again."
                )
            self._pause(POLL_SECONDS)
        usage = self._bytes_present(shard_id)
        arrived = False
        try:
            self._stream(shard_id).prepare_shard(shard)
            arrived = True
        finally:
            with cache_lock(dataset):
                if not arrived and self._refetchable(shard_id):
                    # Some downloaders write to a file's final name.
                    shard.evict()
                    before = REMOTE
                added = self._bytes_present(shard_id) - usage
                dataset.cache_usage += added - self._reservation(shard_id)
                self.touch(shard_id)
                states[shard_id] = LOCAL if arrived else before
                held.release()
                Path(held.lock_file).unlink(missing_ok=True)
        return added

    def _abandoned(self, shard_id: int) -> bool:
        """Whether a process of ours was killed while it fetched a shard, which is then put back as
        it was before; needs the lock.

        Stock code leaves no trace of who fetches: its shards are waited for.
        """
        lock = fetch_lock(self._dataset, shard_id)
        if not Path(lock.lock_file).exists():
            return False
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
        if self._refetchable(shard_id):
            self._dataset.shards[shard_id].evict()
        self._dataset.cache_usage -= self._reservation(shard_id)
        shard_states(self._dataset)[shard_id] = REMOTE
        return True

    def _make_room(self, shard_id: int) -> bool:
        """Evict the coldest shards until this one fits under `cache_limit`; needs the lock.

        The stock code counts a shard when it has arrived, so that several at once exceed the limit;
        here its room is taken before.

        Returns:
            Whether the room was taken; if not, it is worth waiting for shards on their way.
        """
        dataset = self._dataset
        needed = self._reservation(shard_id)
        states = shard_states(dataset)
        while needed and dataset.cache_limit < dataset.cache_usage + needed:
            if not np.any(states == LOCAL) and np.any(states == PREPARING):
                return False
            evict_coldest(dataset)
        dataset.cache_usage += needed
        return True

    def _reservation(self, shard_id: int) -> int:
        """Bytes that a shard may take while it is unpacked; nothing without a `cache_limit`."""
        return self.max_bytes(shard_id) if self._dataset.cache_limit else 0

    def _zipped(self, shard_id: int) -> bool:
        """Whether the compressed form of all the shard's files is on disk."""
        directory, pairs = self.directory(shard_id), self._dataset.shards[shard_id].file_pairs
        return all(zipped and (directory / zipped.basename).is_file() for _, zipped in pairs)

    def _discard(self, shard_id: int) -> bool:
        """Delete what can be had again; whether there is anything to try again with."""
        shard, states = self._dataset.shards[shard_id], shard_states(self._dataset)
        with cache_lock(self._dataset):
            if states[shard_id] == PREPARING:
                return True
            usage = self._bytes_present(shard_id)
            if self._refetchable(shard_id):
                shard.evict()
                states[shard_id] = REMOTE
            elif self._zipped(shard_id):
                for path, _ in self._raw_files(shard_id):
                    path.unlink(missing_ok=True)
            else:
                return False
            self._dataset.cache_usage += self._bytes_present(shard_id) - usage
            return True

    def _verify(self, shard_id: int) -> None:
        """Compare a shard's files with what the index promises.

        Raises:
            DamagedShardError: If a file has another size or hash, or does not hold the samples it
                should.
            AlignmentError: If it is not what was embedded.
        """
        shard = self._dataset.shards[shard_id]
        validate_hash = self._stock_stream(shard_id).validate_hash
        for path, raw in self._raw_files(shard_id):
            check_size(path, raw.bytes)
            if isinstance(shard, MDSReader):
                # No more than there is: the index may say anything.
                header = np.fromfile(path, np.uint32, min(shard.samples + 2, raw.bytes // 4))
                sample_bounds(header, shard.samples, raw.bytes, path.name)
            algorithm = validate_hash or _cheapest(raw.hashes)
            if algorithm is not None:
                check_hash(path, algorithm, raw.hashes)
            elif embedded := self._embedded.get(shard_id):
                check_embedded(path, embedded)

    def _refetchable(self, shard_id: int) -> bool:
        stream = self._stock_stream(shard_id)
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

    def _stock_stream(self, shard_id: int) -> Any:
        return self._dataset.streams[int(self._dataset.stream_per_shard[shard_id])]

    def _stream(self, shard_id: int) -> Any:
        """This thread's copy of the shard's stream."""
        streams = self._per_thread.__dict__.setdefault("streams", {})
        stream_id = int(self._dataset.stream_per_shard[shard_id])
        if stream_id not in streams:
            stream = self._dataset.streams[stream_id]
            streams[stream_id] = own_stream(stream, partial(unpack, stream))
        return streams[stream_id]

    def _raw_files(self, shard_id: int) -> list[tuple[Path, Any]]:
        """Path and index entry of each file of the shard as it is read: one, for MDS."""
        directory = self.directory(shard_id)
        pairs = self._dataset.shards[shard_id].file_pairs
        return [(directory / raw.basename, raw) for raw, _ in pairs]

    def _name(self, shard_id: int) -> str:
        return str(self._raw_files(shard_id)[-1][0])


def unpack(stream: Any, zipped: Any, zip_path: str, raw_path: str, compression: str) -> None:
    """Stands in for streaming's own, which raises alike for a damaged file and a full disk."""
    check_size(Path(zip_path), zipped.bytes)
    if stream.validate_hash:
        check_hash(Path(zip_path), stream.validate_hash, zipped.hashes)
    data = Path(zip_path).read_bytes()
    try:
        data = decompress(compression, data)
    except UNPACK_ERRORS as error:
        raise DamagedShardError(f"{zipped.basename} cannot be unpacked: {error}") from error
    Path(f"{raw_path}.tmp").write_bytes(data)
    os.replace(f"{raw_path}.tmp", raw_path)
    if not stream.safe_keep_zip:
        os.remove(zip_path)


def check_size(path: Path, size: int) -> None:
    """Raise `DamagedShardError` unless a file has the size that its index says."""
    found = path.stat().st_size
    if found != size:
        raise DamagedShardError(f"{path.name} has {found} bytes, its index says {size}")


def check_embedded(path: Path, embedded: str) -> None:
    """Refuse embeddings of a shard that has been written anew since.

    Raises:
        AlignmentError: If what is in it has another hash.
    """
    found = content_hash(path)
    if found != embedded:
        raise AlignmentError(
            f"embeddings must be made of the shards as they are, got {path.name} with other content"
            f" ({found}) than was embedded ({embedded}), though its index is the same; run "
            "slap-embed on this dataset again, with --overwrite."
        )


def check_hash(path: Path, algorithm: str, hashes: dict[str, str]) -> None:
    """Raise `DamagedShardError` unless a file has the hash that its index says."""
    found = hash_of(path, algorithm)
    if found != hashes[algorithm]:
        raise DamagedShardError(
            f"{path.name} has {algorithm} {found}, its index says {hashes[algorithm]}"
        )


def hash_of(path: Path, algorithm: str) -> str:
    """Hash of a file, in hex, by any algorithm that streaming's writers offer."""
    make = getattr(hashlib, algorithm, None) or getattr(xxhash, algorithm)
    with path.open("rb") as file:
        return hashlib.file_digest(file, make).hexdigest()


def _cheapest(hashes: dict[str, str]) -> str | None:
    """Of those known here; None if there is none."""
    known = filter(is_hash, hashes)
    return min(
        known, key=lambda name: (not name.startswith("xxh"), name != "sha1", name), default=None
    )
