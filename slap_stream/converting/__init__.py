"""Parts of `corpus`: records of any known shape, read, shuffled and tokenised."""
