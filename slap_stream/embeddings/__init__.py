"""Texts -> embeddings.zarr, and any range of its rows.

in   a corpus of MDS shards, an encoder
out  embeddings.zarr: row i holds embedding, length, features and source of sample i

embed.py         `embed`: block by block, over processes; goes on where it was cut off
corpus_texts.py  any range of a corpus as text samples
encoders.py      texts to vectors: hashed n-grams, or a Hugging Face model (pretrained.py)
features.py      cheap columns that say much about a sample
pairing.py       the column `mismatch`: does a target belong to another prompt?
reference.py     the column `reference_loss`: what another model loses on a sample
judge.py         the column `judge_loss`: what stands out to a model that reads it once
target_set.py    the column `relevance`: is a sample of a target set's kind?
layout.py        shape, columns and origin of a store
store.py         `EmbeddingStore`: the store itself; the only importer of zarr
remote_store.py  the files of a store that lies elsewhere, as their rows are asked for
plain_rows.py    rows of an array without Zarr, for speed
rows.py          arrays in memory and several stores as one row store
"""

from __future__ import annotations

# What other folders may import, by module; tests/test_architecture.py holds it.
EXPORTS = {
    "corpus_texts": ("CorpusTexts",),
    "store": ("EmbeddingStore", "open_embeddings", "store_metrics"),
    "layout": ("STORE_NAME",),
    "rows": ("StackedStore", "as_row_store", "take"),
    "embed": ("EmbedReport", "embed"),
    "pretrained": ("torch_device",),
}
