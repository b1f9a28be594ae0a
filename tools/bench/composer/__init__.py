"""Parts of tools/bench/composer."""
