"""Shards without hashes: that they were written anew shows in what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter, Stream, StreamingDataset

from slap_stream import EmbeddingStore, SlapDataLoader, embed
from slap_stream.errors import AlignmentError, CorpusError
from slap_stream.loader.checks import embedded_hashes
from slap_stream.shards.index import INDEX_NAME
from tests.laws import config_of

TEXTS = [f"{number:03d} is a number" for number in range(120)]


def write(path: Path, texts: list[str], **options: Any) -> bytes:
    """Shards of one size by streaming's own writer, which wants a new directory; their index."""
    new = path.with_name(f"{path.name}-new")
    columns = {"text": "str"}
    with MDSWriter(columns=columns, out=str(new), size_limit=1500, **options) as writer:
        for text in texts:
            writer.write({"text": text})
    path.mkdir(exist_ok=True)
    for file in new.iterdir():
        file.replace(path / file.name)
    new.rmdir()
    return (path / INDEX_NAME).read_bytes()


def loader_of(*corpora: Path) -> SlapDataLoader:
    dataset = StreamingDataset(streams=[Stream(local=str(path)) for path in corpora], batch_size=8)
    return SlapDataLoader(
        dataset,
        embeddings=[path / "embeddings.zarr" for path in corpora],
        config=config_of(num_lanes=1),
    )


def test_stale_embeddings_of_shards_without_hashes_are_refused(tmp_path: Path) -> None:
    corpus, hashed = tmp_path / "corpus", tmp_path / "hashed"
    before = write(corpus, TEXTS)
    embed(corpus, text_column="text", num_workers=1)
    write(hashed, TEXTS, hashes=["xxh64"])
    embed(hashed, text_column="text", num_workers=1)
    assert EmbeddingStore(hashed / "embeddings.zarr").shard_hashes == ()
    store = EmbeddingStore(corpus / "embeddings.zarr")
    assert len(set(store.shard_hashes)) == before.count(b'"raw_data"') > 2
    # As it was, and beside a stream whose index has hashes.
    both = loader_of(hashed, corpus)
    assert len(list(both)) == len(both)
    both.close()

    assert write(corpus, TEXTS[::-1]) == before, "an index says nothing of the order"
    stale = loader_of(hashed, corpus)
    with pytest.raises(
        AlignmentError,
        match=r"shard\.\d+\.mds with other content \(\w+\) than was embedded \(\w+\), though its "
        "index is the same; run slap-embed on this dataset again, with --overwrite",
    ):
        list(stale)
    stale.close()
    with pytest.raises(CorpusError):
        embed(corpus, text_column="text", num_workers=1)
    embed(corpus, text_column="text", num_workers=1, overwrite=True)
    fresh = loader_of(corpus)
    assert len(list(fresh)) == len(fresh)
    fresh.close()
    # What earlier versions made says nothing of it, and nor do arrays.
    store.shard_hashes = ()
    assert embedded_hashes(store, fresh.sampler.table.sizes * 0) == {}
