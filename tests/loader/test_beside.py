"""Embeddings that nobody has named are looked for beside the shards of each stream."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from slap_stream.errors import ConfigError
from slap_stream.loader.checks import _beside


@pytest.mark.parametrize(
    ("remote", "split", "found"),
    [
        ("s3://bucket/corpus", "", "s3://bucket/corpus/embeddings.zarr"),
        ("s3://bucket/corpus/", "train", "s3://bucket/corpus/train/embeddings.zarr"),
        ("/mnt/corpus", "train", Path("/mnt/corpus/train/embeddings.zarr")),
    ],
)
def test_they_are_beside_the_remote_shards_unless_they_are_here(
    remote: str, split: str, found: str | Path, tmp_path: Path
) -> None:
    stream = SimpleNamespace(remote=remote, local=str(tmp_path), split=split)
    assert _beside(stream) == found
    here = tmp_path / split / "embeddings.zarr"
    here.mkdir(parents=True)
    assert _beside(stream) == here


def test_without_a_remote_they_are_beside_the_local_ones(tmp_path: Path) -> None:
    stream = SimpleNamespace(remote=None, local=str(tmp_path), split=None)
    assert _beside(stream) == tmp_path / "embeddings.zarr"


def test_where_only_streaming_can_look_they_must_be_named(tmp_path: Path) -> None:
    stream = SimpleNamespace(remote="oci://bucket/corpus", local=str(tmp_path), split="")
    with pytest.raises(ConfigError, match=r"embeddings must be given for shards in 'oci://bucket"):
        _beside(stream)
