"""Parts of `embeddings` and `encoders`: texts, feature columns, the layout of the store."""
