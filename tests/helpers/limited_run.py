"""Converts, embeds and trains, each in a process that may hold only so much more than its imports.

python tests/helpers/limited_run.py FOLDER LIMIT_BYTES
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import scipy.linalg
import sklearn.cluster
import sklearn.ensemble  # noqa: F401  (loaded when pairs are learnt from: an import like the others)
import torch
from streaming import StreamingDataset
from torch import nn

from slap_stream import Advanced, LearnabilityProbe, SlapConfig, SlapDataLoader, per_sample_loss
from slap_stream.cli import convert, embed

LENGTH, BATCH = 24, 64


def limit_memory(more_bytes: int) -> None:
    """Let this process hold so much more data than it now does; the kernel enforces it."""
    # The kernel counts a thread's whole stack, 8 MiB by default, though little of it is used.
    threading.stack_size(1 << 20)
    status = Path("/proc/self/status").read_text()
    held = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + more_bytes, held + more_bytes))


def collate(samples: list[dict]) -> dict[str, torch.Tensor]:
    """The first bytes of each target."""
    rows = [s["messages"][-1]["content"].encode()[:LENGTH].ljust(LENGTH) for s in samples]
    ids = torch.tensor(np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), LENGTH).copy())
    return {"input_ids": ids.long()}


def losses_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(batch,) losses of a next-byte model."""
    return per_sample_loss(model(batch["input_ids"]), batch["input_ids"])


def train(folder: Path) -> dict[str, float]:
    """One epoch with observation and probe."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    head = nn.Linear(16, 256)
    model = nn.Sequential(nn.Embedding(256, 16), head)
    loader = SlapDataLoader(
        StreamingDataset(local=str(folder / "corpus"), batch_size=BATCH),
        BATCH,
        embeddings=folder / "corpus" / "embeddings.zarr",
        config=SlapConfig(advanced=Advanced(shards_per_block=1, sketch_dim=64, num_clusters=4)),
        collate_fn=collate,
    )
    probe = LearnabilityProbe(model, loader, head=head, loss_fn=losses_of)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    first = last = 0.0
    for batch in loader:
        losses = losses_of(model, batch)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        loader.observe(batch["sample_id"], losses)
        probe.step()
        first, last = first or losses.mean().item(), losses.mean().item()
    return loader.metrics() | {"first_loss": first, "last_loss": last}


def limited(stage: Callable[[], int | None], limit: int) -> None:
    """Run a stage in a copy of this process, in which nothing but the imports has been done."""
    child = os.fork()
    if not child:
        limit_memory(limit)
        sys.exit(stage())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"{stage.__name__} ended with {status}")


def main(folder: Path, limit: int) -> None:
    """All stages, one after the other."""
    one = ["--num-workers", "1", "--quiet"]

    def converting() -> int:
        shards = ["--shard-bytes", str(1 << 20)]
        return convert.main([str(folder / "corpus.jsonl"), str(folder / "corpus"), *one, *shards])

    def embedding() -> int:
        return embed.main([str(folder / "corpus"), "--dim", "32", *one])

    def training() -> None:
        print(json.dumps(train(folder)))

    # OpenBLAS takes its buffer when it is first called, and tries for ever where it gets none.
    square = np.eye(300) + 1.0
    scipy.linalg.solve(square, square @ square)
    for stage in (converting, embedding, training):
        limited(stage, limit)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
