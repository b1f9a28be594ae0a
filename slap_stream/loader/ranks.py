"""Exchange between ranks: sums over lanes, and what one has learnt from them, at refreshes;
whole lanes at checkpoints; no more.

Over a gloo group of our own, also on GPUs: it has a deadline of its own, cannot get between the
training's collectives, and its numbers never leave the CPU.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from numbers import Integral, Real
from time import monotonic
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from slap_stream.errors import ConfigError, ExchangeError
from slap_stream.selection.shared import sum_in_order
from slap_stream.types import FloatArray, IntArray, Position

TIMEOUT_SECONDS = 600.0
_Found = TypeVar("_Found")
# What is exchanged, by the number that says so in a header.
_JOIN, _STATISTICS, _STATE = 1, 2, 3
_KINDS = {_JOIN: "who they are", _STATISTICS: "lane statistics", _STATE: "lane states"}
_LESSON = "what one has learnt"
_FIELDS = ("kind", "rank", "world_size", "epoch", "step", "size", "least", "digest")
_KIND, _RANK, _WORLD_SIZE, _EPOCH, _STEP, _SIZE, _LEAST, _DIGEST = range(len(_FIELDS))


class Gloo:
    """Connections between some processes, unknown to torch's registry of groups.

    `new_group` numbers the groups that a process has made and takes the number for their name: one
    made by some processes only would make the next one that all make hang.

    Args:
        members: Global ranks of the processes, in the order of their places.
        timeout_seconds: Deadline of every exchange.

    Attributes:
        place: This process's among the members.
    """

    _made: ClassVar[Counter[tuple[int, ...]]] = Counter()

    def __init__(self, members: Sequence[int], timeout_seconds: float) -> None:
        self.members = members = tuple(members)
        self.size, self.place = len(members), members.index(dist.get_rank())
        self.timeout_seconds = timeout_seconds
        # The same on all members, which make their loaders alike.
        name = f"slap_stream/{zlib.crc32(repr(members).encode())}/{Gloo._made[members]}"
        Gloo._made[members] += 1
        # Torch's stubs do not show what its gloo class can do.
        self._group: Any = dist.ProcessGroupGloo(
            PrefixStore(name, _get_default_store()),
            self.place,
            self.size,
            timeout=timedelta(seconds=timeout_seconds),
        )

    def all_gather(self, mine: Tensor) -> Tensor:
        """(size, ...) everybody's tensor, all of one shape."""
        table = mine.new_empty((self.size, *mine.shape))
        self._group.allgather([list(table.unbind(0))], [mine]).wait()
        return table

    def all_to_all(self, parts: Tensor) -> Tensor:
        """(size, ...) what each process has for this one, of (size, ...) parts for each."""
        received = torch.empty_like(parts)
        self._group.alltoall_base(received, parts, [], []).wait()
        return received

    def gather(self, mine: Tensor, root: int) -> Tensor | None:
        """(size, ...) everybody's tensor, all of one shape, at the root's place; None elsewhere."""
        table = mine.new_empty((self.size, *mine.shape)) if self.place == root else None
        self._group.gather([] if table is None else list(table.unbind(0)), mine, root).wait()
        return table

    def broadcast(self, tensor: Tensor, root: int) -> Tensor:
        """The root's tensor, which comes into those of the others, all of one shape."""
        self._group.broadcast(tensor, root).wait()
        return tensor


class Ranks:
    """The processes that host a run's lanes.

    A process is one of the group; its rank says which lanes it hosts. Processes of equal rank
    (tensor parallel ones, say) host the same lanes, feed back the same losses and are given the
    same batches; each lane counts once.

    Every exchange begins with a header of a few numbers, by which ranks that are not at the same
    place find out, before anything else is sent.

    Args:
        rank: Which lanes this process hosts.
        world_size: Ranks.
        group: Connects the processes; None if there is only this one.

    Attributes:
        rank: As given.
        world_size: As given.

    Raises:
        ConfigError: If the processes do not agree on `world_size`, or a rank is missing.
        ExchangeError: If a process does not answer in time.
    """

    def __init__(self, rank: int, world_size: int, group: Gloo | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self._group = group
        # Where an exchange was ended half way: the others may wait in it for ever.
        self._broken: Position | None = None
        self._closed = False
        self._exchanges = self._bytes = 0
        self._seconds = 0.0
        # Process of the group that speaks for each rank: the first that has it.
        self._speakers: IntArray = np.arange(world_size)
        self._rank_of_process = {0: rank}
        if group is not None:
            found = self._headers(group, _JOIN, Position(epoch=0, step=0, digest=0))
            complete = np.array_equal(np.unique(found[:, _RANK]), np.arange(world_size))
            if not complete or np.any(found[:, _WORLD_SIZE] != world_size):
                raise ConfigError(
                    f"rank and world_size must be given so that {group.size} processes have ranks "
                    f"0 to world_size - 1, got ranks {_some(found[:, _RANK])} of "
                    f"{_some(np.unique(found[:, _WORLD_SIZE]))}; process_group names the processes "
                    "that host lanes."
                )
            self._speakers = np.array(
                [np.flatnonzero(found[:, _RANK] == other)[0] for other in range(world_size)]
            )
            self._rank_of_process = dict(zip(group.members, found[:, _RANK].tolist(), strict=True))

    def on_node(self, processes_per_node: int) -> int:
        """Ranks that are hosted on this process's node, each once.

        Args:
            processes_per_node: Processes of the job on each node; their numbers follow each other.
        """
        node = 0 if self._group is None else dist.get_rank() // processes_per_node
        return len(
            {
                rank
                for process, rank in self._rank_of_process.items()
                if process // processes_per_node == node
            }
        )

    @property
    def speaks(self) -> bool:
        """Whether this process is the one of its rank that speaks for it."""
        return self._group is None or self._group.place == self._speakers[self.rank]

    @property
    def learns(self) -> bool:
        """Whether this process is given the sums over lanes, and tells the others about them."""
        return self._group is None or self._group.place == self._speakers[0]

    def sum_lanes(
        self, rows: FloatArray, least: int, position: Position
    ) -> tuple[FloatArray | None, int]:
        """Add over all lanes, in lane order; every process calls it at the same step.

        Each process adds up one slice of the numbers over all lanes, and sends the sums to the one
        that learns. So what a process sends and receives does not grow with their number, and no
        sum depends on it.

        Args:
            rows: (local lanes, size) numbers of this process's lanes.
            least: A whole number, of which the smallest is wanted.
            position: Where this process is.

        Returns:
            (size,) sums where this `learns`, None elsewhere; and the smallest number.

        Raises:
            ExchangeError: If a process does not answer in time, is elsewhere in the run, or has
                other batches than one of the same rank.
        """
        group = self._open_group()
        if group is None:
            return sum_in_order(rows), least
        lanes, size = rows.shape
        found = self._headers(group, _STATISTICS, position, size=size, least=least)
        part = -(-size // group.size)
        padded = np.zeros((lanes, part * group.size))
        padded[:, :size] = rows
        # (processes, local lanes, part): what each process is to add up.
        parts = np.ascontiguousarray(padded.reshape(lanes, group.size, part).transpose(1, 0, 2))

        def exchange() -> Tensor | None:
            received = group.all_to_all(torch.from_numpy(parts)).numpy()
            by_lane = received[self._speakers].reshape(-1, part)
            return group.gather(torch.from_numpy(sum_in_order(by_lane)), int(self._speakers[0]))

        slices = self._timed(group, _KINDS[_STATISTICS], position, exchange)
        self._bytes += parts.nbytes + part * parts.itemsize
        total = None if slices is None else slices.numpy().ravel()[:size]
        return total, int(found[:, _LEAST].min())

    def tell(self, data: bytes | None, position: Position) -> bytes:
        """What the process that `learns` has for all; every process calls it after another exchange
        at the same step, which has shown that all are there.

        Args:
            data: There, what it has; None elsewhere.
            position: Where this process is.

        Raises:
            ExchangeError: If a process does not answer in time.
        """
        group = self._open_group()
        if group is None:
            assert data is not None, "the only process is the one that learns"
            return data
        root = int(self._speakers[0])

        def exchange() -> Tensor:
            size = group.broadcast(torch.tensor([len(data or b"")]), root)
            theirs = torch.empty(int(size), dtype=torch.uint8)
            if data is not None:
                theirs = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return group.broadcast(theirs, root)

        found = self._timed(group, _LESSON, position, exchange)
        self._bytes += len(data or b"")
        return data or found.numpy().tobytes()

    def gather(self, data: bytes, position: Position) -> list[bytes]:
        """Everybody's bytes, by rank; every process calls it at the same step.

        Args:
            data: This process's.
            position: Where it is.

        Raises:
            ExchangeError: If a process does not answer in time or is elsewhere in the run.
        """
        group = self._open_group()
        if group is None:
            return [data]
        sizes = self._headers(group, _STATE, position, size=len(data))[:, _SIZE]
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        everyones = self._timed(group, _KINDS[_STATE], position, lambda: group.all_gather(padded))
        table = everyones.numpy()
        self._bytes += len(padded)
        return [table[place, : sizes[place]].tobytes() for place in self._speakers]

    def metrics(self) -> dict[str, float]:
        """Exchanges so far, bytes that this process had for others, and seconds with waiting."""
        return {
            "exchanges": float(self._exchanges),
            "exchange_bytes": float(self._bytes),
            "exchange_seconds": self._seconds,
        }

    def close(self) -> None:
        """Let go of the group; nothing can be exchanged any more."""
        if self._group is not None:
            self._group, self._closed = None, True

    def _open_group(self) -> Gloo | None:
        if self._closed:
            raise ExchangeError(
                f"rank {self.rank} of {self.world_size} must be open to exchange anything, got a "
                "loader that was closed; close it after the last batch and the last state_dict."
            )
        return self._group

    def _headers(
        self, group: Gloo, kind: int, position: Position, *, size: int = 0, least: int = 0
    ) -> NDArray[np.int64]:
        """(processes, fields) where everybody is, once it is certain that it is the same place."""
        header = torch.tensor(
            [
                *(kind, self.rank, self.world_size, position.epoch, position.step),
                *(size, least, position.digest),
            ]
        )
        table = self._timed(group, _KINDS[kind], position, lambda: group.all_gather(header))
        self._exchanges += 1
        found: NDArray[np.int64] = table.numpy()
        same = [_KIND, _EPOCH, _STEP] + ([_SIZE] if kind == _STATISTICS else [])
        if np.any(found[:, same] != found[0, same]):
            raise ExchangeError(
                "ranks must exchange the same things at the same step, got "
                + "; ".join(
                    f"{_KINDS.get(kind, '?')} ({size} numbers) at epoch {epoch}, step {step}, by "
                    f"ranks {_some(ranks)}"
                    for (kind, epoch, step, size), ranks in _groups(found)
                )
                + ": call the loader, probe.step and state_dict on every rank alike."
            )
        for other in np.unique(found[:, _RANK]):
            digests = found[found[:, _RANK] == other, _DIGEST]
            if kind == _STATISTICS and np.any(digests != digests[0]):
                raise ExchangeError(
                    f"processes of one rank must have the same batches, got others on "
                    f"{len(np.unique(digests))} of {len(digests)} processes of rank {other} at "
                    f"epoch {position.epoch}, step {position.step}; feed back the same losses on "
                    "all of them."
                )
        return found

    def _timed(
        self, group: Gloo, what: str, position: Position, exchange: Callable[[], _Found]
    ) -> _Found:
        if self._broken is not None:
            raise ExchangeError(
                f"rank {self.rank} of {self.world_size} must not exchange anything any more, got "
                f"{what} after an exchange that was ended half way, at epoch "
                f"{self._broken.epoch}, step {self._broken.step}; start all ranks again from the "
                "last checkpoint."
            )
        began = monotonic()
        try:
            self._broken = position
            found = exchange()
            self._broken = None
            return found
        except RuntimeError as error:  # what gloo raises for a deadline and for a lost peer alike
            raise ExchangeError(
                f"rank {self.rank} of {self.world_size} must reach all others, got none of the "
                f"answers due after {monotonic() - began:.0f} s (deadline "
                f"{group.timeout_seconds:.0f} s) at epoch {position.epoch}, step "
                f"{position.step}, while exchanging {what}; "
                "look for the first error of another rank (a process that died, ran out of memory "
                "or data, or does not call the loader, probe.step or state_dict as often), or "
                f"raise exchange_timeout. gloo says: {error}"
            ) from error
        finally:
            self._seconds += monotonic() - began


def join_ranks(
    *,
    rank: int | None = None,
    world_size: int | None = None,
    process_group: Any = None,
    replication: int | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    expected: int = 1,
) -> Ranks:
    """Find out which rank this process is; every process of the group calls it at the same time.

    Args:
        rank: Which lanes this process hosts; default: its rank in the group, or that divided by
            `replication`.
        world_size: Ranks; default likewise.
        process_group: Processes that host lanes; default: all of torch.distributed's.
        replication: Consecutive processes that are given the same batches.
        timeout_seconds: Deadline of every exchange.
        expected: Processes that the launcher has started, to notice that they were not connected.

    Raises:
        ConfigError: If the arguments contradict each other or the processes.
        ExchangeError: If a process does not answer in time.
    """
    if (rank is None) != (world_size is None):
        raise ConfigError(
            f"rank and world_size must be given together, got {rank!r} and {world_size!r}."
        )
    for name, number in (("rank", rank), ("world_size", world_size)):
        if not _is_a(number, Integral, type(None)):
            raise ConfigError(f"{name} must be a whole number, got {number!r}.")
    if not (_is_a(timeout_seconds, Real) and 0 < timeout_seconds < math.inf):
        raise ConfigError(
            f"exchange_timeout must be a positive number of seconds, got {timeout_seconds!r}."
        )
    if not (dist.is_available() and dist.is_initialized()):
        if max(expected, world_size or 1) > 1 or process_group is not None:
            raise ConfigError(
                "torch.distributed must be initialised before a loader of several ranks is made, "
                f"got a world of {max(expected, world_size or 1)} without; call "
                "torch.distributed.init_process_group."
            )
        return Ranks(0, 1)
    processes = dist.get_world_size(process_group)
    place = dist.get_rank(process_group)
    if place < 0:
        raise ConfigError("process_group must hold this process, got one that does not.")
    copies = replication or 1
    if rank is None or world_size is None:
        if processes % copies:
            raise ConfigError(
                f"replication must divide the {processes} processes, got {copies}; consecutive "
                "processes share their batches."
            )
        rank, world_size = place // copies, processes // copies
    if not (1 <= world_size <= processes and 0 <= rank < world_size):
        raise ConfigError(
            f"rank must be in [0, world_size) and world_size at most the {processes} processes, "
            f"got {rank!r} and {world_size!r}."
        )
    if processes == 1:
        return Ranks(0, 1)
    members: Sequence[int] = range(processes)
    if process_group is not None:
        members = dist.get_process_group_ranks(process_group)
    try:
        group = Gloo(members, timeout_seconds)
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {rank} of {world_size} must connect with {processes} processes within "
            f"{timeout_seconds:.0f} s to make a loader; make one on all of them at the same time, "
            f"name those that do in process_group, or set GLOO_SOCKET_IFNAME. gloo says: {error}"
        ) from error
    return Ranks(rank, world_size, group)


def _is_a(value: Any, *kinds: type) -> bool:
    # Of what a caller gave, whatever its annotation says.
    return isinstance(value, kinds)


def _groups(found: NDArray[np.int64]) -> list[tuple[tuple[int, ...], IntArray]]:
    places = found[:, [_KIND, _EPOCH, _STEP, _SIZE]]
    different, which = np.unique(places, axis=0, return_inverse=True)
    return [
        (tuple(place.tolist()), found[which.ravel() == index, _RANK])
        for index, place in enumerate(different[:5])
    ]


def _some(values: Sequence[int] | NDArray[np.int64]) -> str:
    shown = ", ".join(str(int(value)) for value in values[:5])
    return shown if len(values) <= 5 else f"{shown}, ... ({len(values)} in all)"
