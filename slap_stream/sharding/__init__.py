"""Parts of `shards`: what a dataset asks for, and shards fetched, verified and read."""
