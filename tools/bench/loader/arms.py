"""The loaders that are compared; each runs in a process of its own and counts what it delivers."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slap_stream.shards.opening import one_at_a_time
from tools.bench.clock import Clock
from tools.bench.loader.corpora import samples

BATCH_SIZE = 256
# Candidates that an arm without shards to permute shuffles among.
SHUFFLE_BUFFER = 10_000
# Of which every arm delivers a batch after the first, which is not counted.
LEAST_SAMPLES = 3 * BATCH_SIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One measurement.

    Attributes:
        arm: Name of the loader, of `ARMS`.
        corpus: Directory of the corpus.
        kind: Kind of corpus, of `corpora.KINDS`.
        remote: Whether the corpus is copied from there into an empty local cache while it is read.
        num_workers: Processes that read.
        seconds: Time after which the measurement ends, if the epoch has not.
        latency_seconds: Time that every download from the remote takes at least.
        step_seconds: Time that every batch is trained on elsewhere, on an accelerator, while this
            process has nothing to do; it is not counted.
        cache: Empty directory, for what is copied from a remote.
    """

    arm: str
    corpus: str
    kind: str
    remote: bool
    num_workers: int
    seconds: float
    latency_seconds: float = 0.0
    step_seconds: float = 0.0
    cache: str = ""


def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """A cheap collate function, the same for every arm: texts as a list, tokens as one tensor."""
    import torch

    if "text" in batch[0]:
        return {"text": [sample["text"] for sample in batch]}
    return {"input_ids": torch.from_numpy(np.stack([sample["input_ids"] for sample in batch]))}


def _dataset(run: Run, **options: Any) -> Any:
    from streaming import Stream, StreamingDataset

    class SlowStream(Stream):  # type: ignore[misc]
        def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
            time.sleep(run.latency_seconds)
            return str(super()._download_file(from_basename, to_basename))

    where: dict[str, Any] = {"local": run.corpus}
    if run.remote:
        where = {"streams": [SlowStream(remote=run.corpus, local=run.cache)]}
    with one_at_a_time():
        return StreamingDataset(**where, batch_size=BATCH_SIZE, **options)


def _stock(run: Run, selecting: Clock) -> Iterator[Any]:
    from streaming import StreamingDataLoader

    yield from StreamingDataLoader(
        _dataset(run, shuffle=True),
        batch_size=BATCH_SIZE,
        num_workers=run.num_workers,
        collate_fn=collate,
    )


def _slap_stream(run: Run, selecting: Clock, *, config: Any) -> Iterator[Any]:
    from slap_stream import SlapDataLoader

    loader = SlapDataLoader(
        _dataset(run),
        BATCH_SIZE,
        embeddings=f"{run.corpus}/embeddings.zarr",
        config=config,
        num_workers=run.num_workers,
        collate_fn=collate,
    )
    sampler = loader.sampler
    # Both are the selection's, and none of the loading's; waiting for shards, while a batch is
    # composed, is not.
    selecting.watch(sampler, "compose", "select")
    selecting.watch(sampler, "observe", "select")
    selecting.watch(loader._fetcher, "require", "wait")
    losses = np.random.default_rng(5).gamma(4.0, 0.5, sampler.table.num_samples)
    with closing(loader):
        for batch in loader:
            yield batch
            loader.observe(batch["sample_id"], losses[batch["sample_id"].numpy()])


def _uniform(run: Run, selecting: Clock) -> Iterator[Any]:
    from slap_stream import SlapConfig

    config = SlapConfig(policy="uniform", keep=1.0)
    return _slap_stream(run, selecting, config=config)


def _slap(run: Run, selecting: Clock) -> Iterator[Any]:
    from slap_stream import SlapConfig

    return _slap_stream(run, selecting, config=SlapConfig(keep=0.7))


def _reading(run: Run, selecting: Clock) -> Iterator[Any]:
    """What slap_stream reads with, on batches that are known in advance."""
    from torch.utils.data import DataLoader

    from slap_stream.selection.order import LaneOrder, ShardTable
    from slap_stream.shards.settings import dataset_shards
    from slap_stream.shards.view import ShardView

    dataset = _dataset(run)
    order = LaneOrder(
        ShardTable.of(dataset_shards(dataset).sizes),
        seed=0,
        epoch=0,
        lane=0,
        num_lanes=1,
        shards_per_block=8,
        min_block=16 * BATCH_SIZE,
    )
    ids = np.concatenate([order.block(index).sample_id for index in range(order.num_blocks)])
    yield from DataLoader(
        ShardView(dataset),  # type: ignore[arg-type]  # map-style by duck typing
        batch_sampler=np.split(ids, range(BATCH_SIZE, len(ids), BATCH_SIZE)),  # type: ignore[arg-type]
        num_workers=run.num_workers,
        collate_fn=collate,
    )


def _litdata(run: Run, selecting: Clock) -> Iterator[Any]:
    import litdata

    yield from litdata.StreamingDataLoader(
        litdata.StreamingDataset(f"{run.corpus}/litdata", shuffle=True, drop_last=False),
        batch_size=BATCH_SIZE,
        num_workers=run.num_workers,
        collate_fn=collate,
    )


def _datasets(run: Run, selecting: Clock) -> Iterator[Any]:
    import datasets
    from torch.utils.data import DataLoader

    files = sorted(str(path) for path in Path(run.corpus, "parquet").iterdir())
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    if run.kind == "tokens":
        stream = stream.with_format("numpy")
    yield from DataLoader(
        stream.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER),
        batch_size=BATCH_SIZE,
        num_workers=run.num_workers,
        collate_fn=collate,
    )


ARMS: dict[str, Callable[[Run, Clock], Iterator[Any]]] = {
    "stock": _stock,
    "uniform": _uniform,
    "slap": _slap,
    "reading": _reading,
    "litdata": _litdata,
    "datasets": _datasets,
}
# Modules of the arms that are extras; they read formats of their own, from local disk only.
EXTRAS = {"litdata": "litdata", "datasets": "datasets"}


def prepare_extra(arm: str, corpus: Path, kind: str, count: int) -> None:
    """Write the same records in an extra's own format, unless they are there already."""
    out = corpus / {"litdata": "litdata", "datasets": "parquet"}[arm]
    if out.exists():
        return
    with tempfile.TemporaryDirectory(dir=corpus) as partial:
        if arm == "litdata":
            _write_litdata(Path(partial, "out"), kind, count)
        else:
            _write_parquet(Path(partial, "out"), kind, count)
        Path(partial, "out").rename(out)


def _write_parquet(out: Path, kind: str, count: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.mkdir()
    rows: list[dict[str, Any]] = []
    for number, sample in enumerate(samples(kind, count), 1):
        rows.append(sample)
        if len(rows) * 100 >= count or number == count:
            pq.write_table(pa.Table.from_pylist(rows), out / f"{number:010}.parquet")
            rows = []


def _write_litdata(out: Path, kind: str, count: int) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(out), chunk_bytes=64 << 20)
    for number, sample in enumerate(samples(kind, count)):
        cache[number] = sample
    cache.done()
    cache.merge()


def measure(run: Run) -> dict[str, float]:
    """Read one epoch, or as much of it as the time allows.

    Returns:
        samples_per_second: Delivered, from the first batch (not counted) on.
        milliseconds_per_batch: That a batch was waited for and its losses were taken in.
        first_batch_seconds: From making the dataset, imports done, to the first batch.
        select_seconds_per_sample: Of composing batches and taking in losses, in the main process.
        wait_seconds_per_sample: Of waiting for shards of the next block, in the main process.
        main_cpu_seconds_per_sample: CPU time of the main process and its threads.
        peak_bytes: Most memory of the main process.
    """
    import streaming  # noqa: F401
    import torch  # noqa: F401

    import slap_stream.loader  # noqa: F401

    selecting = Clock(time.perf_counter)
    count = steps = 0
    trained = 0.0
    made = time.perf_counter()
    batches = ARMS[run.arm](run, selecting)
    next(batches)
    started, cpu = time.perf_counter(), time.process_time()
    selecting.seconds.clear()
    for batch in batches:
        count += len(next(iter(batch.values())))
        steps += 1
        if time.perf_counter() - started > run.seconds:
            break
        slept = time.perf_counter()
        time.sleep(run.step_seconds)
        trained += time.perf_counter() - slept
    seconds, cpu = time.perf_counter() - started - trained, time.process_time() - cpu
    batches.close()  # type: ignore[attr-defined]
    return {
        "samples": count,
        "samples_per_second": count / seconds,
        "milliseconds_per_batch": 1e3 * seconds / steps,
        "first_batch_seconds": started - made,
        "select_seconds_per_sample": selecting.seconds["select"] / count,
        "wait_seconds_per_sample": selecting.seconds["wait"] / count,
        "main_cpu_seconds_per_sample": cpu / count,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main(text: str) -> None:
    """Measure what a JSON text describes; the last line printed is JSON."""
    print(json.dumps(measure(Run(**json.loads(text)))))
