"""Sample ids -> samples, out of MDS shards that may lie far away.

in   a `StreamingDataset`, or a directory with an index.json; sample ids
out  samples; shards fetched and verified before anybody asks for their samples

view.py      `ShardView`: a dataset as samples by id, for torch's DataLoader
read.py      samples by id, a shard at a time, through memory maps that stay open
decode.py    samples from their bytes
encodings.py values from their bytes and back, without loading streaming
settings.py  what a dataset's settings ask for, or a refusal by name
fetch.py     `ShardFetcher`: shards ahead of the sampler, in threads; withdraws damaged ones
cache.py     one shard on local disk: fetched, verified, thrown away
index.py     index.json: read, written, merged
writer.py    samples to shards
reader.py    raw samples of a local corpus, in order
opening.py   datasets opened; those of several jobs on one machine, one after the other
library.py   all that we use of mosaicml-streaming, its private names included; its only importer
"""

from __future__ import annotations

# What other folders may import, by module; tests/test_architecture.py holds it.
EXPORTS = {
    "view": ("ShardView",),
    "fetch": ("ShardFetcher",),
    "settings": (
        "DatasetShards",
        "dataset_shards",
        "index_digests",
        "launched_rank",
        "launched_ranks",
        "min_cache_bytes",
        "processes_per_node",
    ),
    "index": (
        "INDEX_NAME",
        "SHARD_BYTES",
        "content_hash",
        "corpus_columns",
        "corpus_size",
        "merge_indexes",
        "unhashed_contents",
    ),
    "reader": ("iter_corpus",),
    "writer": ("open_writer",),
    "opening": ("is_stock", "one_at_a_time", "open_local"),
}
