"""Parts of tools/bench_composer.py."""
