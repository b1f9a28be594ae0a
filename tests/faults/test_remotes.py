"""A remote that fails in each way that object stores fail, through streaming's own downloader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from streaming import Stream, StreamingDataset

from slap_stream import SlapDataLoader
from slap_stream.shards import cache as shard_cache
from tests.helpers.fault_server import FAULTS, REFUSALS, FaultServer, serving
from tests.loader.conftest import corpus as corpus  # fixtures
from tests.loader.conftest import unbroken as unbroken
from tests.loader.test_loader import BATCH, make, run

pytest.importorskip("boto3")


@pytest.fixture
def server(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setattr(shard_cache, "BACKOFF_SECONDS", 0.001)
    with serving(corpus, silence_seconds=0.4) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def _loader(corpus: Path, local: Path) -> SlapDataLoader:
    stream = Stream(remote="s3://corpus/", local=str(local), download_retry=1, download_timeout=0.3)
    return make(corpus, dataset=StreamingDataset(streams=[stream], batch_size=BATCH))


def test_whatever_goes_wrong_with_a_download_the_batches_are_the_same(
    server: FaultServer, corpus: Path, unbroken: list[list[int]], tmp_path: Path
) -> None:
    server.plan.extend(FAULTS)
    loader = _loader(corpus, tmp_path / "local")
    assert run(loader, 20) == unbroken[:20]
    assert sorted(server.done) == sorted(FAULTS)
    metrics = loader.metrics()
    # Slow bytes arrive in the end, and of a connection that broke S3's own client makes another.
    assert len(REFUSALS) + 1 <= metrics["shard_retries"] < len(FAULTS)
    assert metrics["shards_withdrawn"] == 0
    loader.close()
