"""Shards that are damaged, or vanish, while a model trains on them."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import Stream, StreamingDataset

from slap_stream import SlapDataLoader
from slap_stream.errors import DamagedShardError, ShardError
from slap_stream.shards import cache as shard_cache
from tests.loader.conftest import corpus as corpus  # fixtures
from tests.loader.conftest import let_go_soon as let_go_soon
from tests.loader.conftest import unbroken as unbroken
from tests.loader.test_loader import feed, make, run


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "BACKOFF_SECONDS", 0.001)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _flip(path: Path) -> None:
    """No text any more: every sample of it fails to decode, and none in silence."""
    data = path.read_bytes().replace(b"word", b"w\xffrd")
    # In place, under whatever map is open.
    with path.open("r+b") as file:
        file.write(data)


def _lengthen(path: Path) -> None:
    """Every sample's last value ends elsewhere than it says, though its bytes can be decoded."""
    index = json.loads((path.parent / "index.json").read_text())
    info = next(one for one in index["shards"] if one["raw_data"]["basename"] == path.name)
    last = sum(size is None for size in info["column_sizes"]) - 1
    data = np.fromfile(path, np.uint8)
    begins = data[4 : 4 * (info["samples"] + 1)].view(np.uint32)
    data[begins + 4 * last] ^= 1
    with path.open("r+b") as file:
        file.write(data)


def _remote_loader(corpus: Path, local: Path, **options: Any) -> SlapDataLoader:
    stream = Stream(remote=str(corpus), local=str(local), download_retry=1)
    dataset = StreamingDataset(streams=[stream], batch_size=16)
    return make(corpus, dataset=dataset, **options)


def until_it_fails(loader: SlapDataLoader, ids: list[list[int]]) -> None:
    """Train, epoch after epoch; the batches that were delivered are added to `ids`."""
    while True:
        for batch in loader:
            ids.append(feed(loader, batch))


def _shards(path: Path) -> list[Path]:
    return sorted(path.glob("shard.*"))


@pytest.mark.parametrize(
    ("harm", "num_workers"),
    [
        *((_cut, 0), (_empty, 0), (_flip, 0), (_lengthen, 0), (Path.unlink, 0)),
        *((_flip, 2), (Path.unlink, 2)),
    ],
)
def test_harmed_while_training_shards_are_fetched_again(
    corpus: Path,
    unbroken: list[list[int]],
    tmp_path: Path,
    harm: Callable[[Path], None],
    num_workers: int,
) -> None:
    loader = _remote_loader(corpus, tmp_path / "local", num_workers=num_workers)
    ids: list[list[int]] = []
    # Some of the second epoch too.
    while len(ids) < 20:
        for batch in loader:
            ids.append(feed(loader, batch))
            if len(ids) in (3, 18):
                for path in _shards(tmp_path / "local"):
                    harm(path)
    assert ids == unbroken[: len(ids)]
    assert loader.metrics()["samples_withdrawn"] == 0
    loader.close()


def test_a_shard_may_be_a_link_to_another_disk(
    corpus: Path, unbroken: list[list[int]], tmp_path: Path
) -> None:
    local = tmp_path / "corpus"
    shutil.copytree(corpus, local)
    (tmp_path / "other").mkdir()
    for path in _shards(local):
        path.symlink_to(path.rename(tmp_path / "other" / path.name))
    loader = make(local, num_workers=0)
    assert run(loader, 20) == unbroken[:20]
    assert loader.metrics()["samples_withdrawn"] == 0


@pytest.mark.parametrize("harm", [_cut, _flip])
def test_a_shard_that_cannot_be_had_again_is_one_clear_error_and_nothing_is_lost(
    corpus: Path, unbroken: list[list[int]], tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    local = tmp_path / "corpus"
    local.mkdir()
    for path in corpus.iterdir():
        (local / path.name).write_bytes(path.read_bytes())
    loader = make(local)
    ids = run(loader, 3)
    for path in _shards(local):
        harm(path)
    with pytest.raises(DamagedShardError, match=r"must be what its index says.*restore it"):
        until_it_fails(loader, ids)
    for path in _shards(local):
        path.write_bytes((corpus / path.name).read_bytes())
    assert ids + run(loader, 20) == unbroken[: len(ids) + 20]


def test_two_jobs_that_do_not_see_each_other_may_share_a_cache(
    corpus: Path, unbroken: list[list[int]], tmp_path: Path
) -> None:
    # As on two machines with one disk; where streaming sees both it refuses the second.
    jobs = [_remote_loader(corpus, tmp_path / "local") for _ in range(2)]
    found: dict[int, list[list[int]]] = {}

    def train(job: int) -> None:
        found[job] = run(jobs[job], 20)

    threads = [threading.Thread(target=train, args=(job,)) for job in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == found[1] == unbroken[:20]


def test_a_remote_that_goes_away_is_one_clear_error_and_nothing_is_lost(
    corpus: Path, unbroken: list[list[int]], tmp_path: Path
) -> None:
    remote = tmp_path / "remote"
    remote.symlink_to(corpus)
    loader = _remote_loader(remote, tmp_path / "local")
    ids = run(loader, 3)
    remote.unlink()
    for path in _shards(tmp_path / "local"):
        path.unlink()
    with pytest.raises(ShardError, match="check remote, credentials and disk"):
        until_it_fails(loader, ids)
    remote.symlink_to(corpus)
    assert ids + run(loader, 20) == unbroken[: len(ids) + 20]
