"""An epoch over a remote corpus under `cache_limit`: every shard is fetched about once."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import Stream, StreamingDataset

from slap_stream import SlapDataLoader
from slap_stream.errors import ConfigError
from tests.helpers.shard_corpora import shard_files, write_corpus
from tests.laws import config_of

BATCH, NUM_SHARDS, PER_SHARD = 16, 120, 24
NUM_SAMPLES = NUM_SHARDS * PER_SHARD


class Counting(Stream):
    """Notes every shard that is downloaded, also by workers."""

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        if from_basename != "index.json":
            # One write of a few bytes: lines of several processes do not mix.
            log = os.open(f"{self.local}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(log, f"{from_basename}\n".encode())
            os.close(log)
        return super()._download_file(from_basename, to_basename)


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpora") / "remote", [PER_SHARD] * NUM_SHARDS)


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": [sample["id"] for sample in samples]}


def _loader(
    remote: Path, local: Path, limit: int, num_workers: int = 0, **settings: Any
) -> SlapDataLoader:
    dataset = StreamingDataset(
        streams=[Counting(remote=str(remote), local=str(local))],
        batch_size=BATCH,
        cache_limit=limit,
    )
    vectors = np.random.default_rng(0).normal(size=(NUM_SAMPLES, 8)).astype(np.float16)
    return SlapDataLoader(
        dataset,
        BATCH,
        embeddings=vectors,
        config=config_of(**{"pool_batches": 2} | settings),
        collate_fn=_collate,
        num_workers=num_workers,
    )


def _downloads(loader: SlapDataLoader, local: Path) -> list[str]:
    """Shards fetched in one epoch."""
    for batch in loader:
        assert batch["id"] == [f"r-{i}" for i in batch["sample_id"].tolist()]
    loader.close()
    downloads = Path(f"{local}.log").read_text().splitlines()
    assert len(set(downloads)) == NUM_SHARDS
    return downloads


@pytest.mark.parametrize(
    ("num_lanes", "shards_per_block", "keep", "num_workers"),
    [(1, 3, 0.7, 0), (1, 3, 0.7, 2), (1, 3, 1.0, 0), (2, 1, 0.7, 0), (2, 1, 0.7, 2)],
)
def test_a_tenth_of_the_corpus_is_room_enough(
    remote: Path,
    tmp_path: Path,
    num_lanes: int,
    shards_per_block: int,
    keep: float,
    num_workers: int,
) -> None:
    index_bytes = (remote / "index.json").stat().st_size
    limit = index_bytes + sum(path.stat().st_size for path in shard_files(remote)) // 10
    settings = {"num_lanes": num_lanes, "shards_per_block": shards_per_block, "keep": keep}
    loader = _loader(remote, tmp_path / "local", limit, num_workers, lookahead=2, **settings)
    downloads = _downloads(loader, tmp_path / "local")
    assert len(downloads) <= NUM_SHARDS + num_lanes - 1


@pytest.mark.parametrize("lookahead", [0, 8])
def test_the_least_limit_is_named_and_is_enough(
    remote: Path, tmp_path: Path, lookahead: int
) -> None:
    settings = {"num_lanes": 2, "shards_per_block": 3, "pool_batches": 4, "lookahead": lookahead}
    # Enough for streaming itself.
    little = (remote / "index.json").stat().st_size + 4 * (
        remote / "shard.00119.mds"
    ).stat().st_size
    with pytest.raises(ConfigError, match=r"must be at least \d+ bytes, got \d+") as error:
        _loader(remote, tmp_path / "refused", little, **settings)
    least = int(re.findall(r"\d+", str(error.value))[0])
    loader = _loader(remote, tmp_path / "local", least, **settings)
    assert len(_downloads(loader, tmp_path / "local")) <= NUM_SHARDS + 1
