"""Parts of `bench_loader`: corpora, arms, and what is made of their numbers."""
