"""Small made-up samples for the tests of embedding."""

from __future__ import annotations

import numpy as np

from slap_stream.text.sample import TextSample, from_messages

LINES = (
    "river stone lantern copper window garden thunder velvet basket whistle marble harbour",
    "pepper needle feather candle bridge meadow anchor saddle ribbon kettle tunnel orchard",
)
WORDS = [word for line in LINES for word in line.split()]


def pair(prompt: str, target: str) -> TextSample:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}]
    return from_messages(turns, None)


def question(number: int, length: int = 12) -> TextSample:
    """A prompt over a few words of its own, and a target that comes back to them."""
    rng = np.random.default_rng(number)
    own = rng.choice(WORDS, size=5, replace=False)
    prompt = " ".join(rng.choice(own, size=length))
    target = " ".join([*rng.choice(own, size=3), *rng.choice(WORDS, size=length - 3)])
    return pair(f"tell me about {prompt}", f"well , {target} {number}")
