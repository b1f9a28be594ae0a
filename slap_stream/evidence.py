"""What shows that a candidate can be spared, as probabilities.

Everything else is kept and drawn uniformly: where nothing is shown, nothing is pruned for it.
"""

from __future__ import annotations

import numpy as np

from slap_stream.types import FloatArray

# Feature column with the probability that the target belongs to another prompt.
MISMATCH_COLUMN = "mismatch"
# Feature column with the losses of a model that was trained on clean data.
REFERENCE_COLUMN = "reference_loss"
# A candidate whose embedding is this close to something trained on lately is a copy; from the
# second figure on it is none. In distances to the nearest neighbour of what has no copy: of copies
# with a word or two changed 89 to 94 % lie below 0.5, of other dialogues, translations and
# questions 0 to 1 %, of a set that repeats its examples under several templates about 10 %
# (hashing encoder). With 0.6 these would be 16 %, and hardly more copies.
SURE_COPY, NO_COPY = 0.3, 0.5


def copy_likelihood(distance: FloatArray) -> FloatArray:
    """(n,) how likely a candidate is a near-copy of what was trained on lately.

    Args:
        distance: (n,) distance of the unit embedding to the nearest one trained on lately, over
            that of what has no copy to its nearest neighbour.
    """
    likelihood: FloatArray = np.clip((NO_COPY - distance) / (NO_COPY - SURE_COPY), 0.0, 1.0)
    return likelihood


def worth(copy: FloatArray, mismatch: FloatArray) -> FloatArray:
    """(n,) probability that a candidate is neither a copy nor has another prompt's target."""
    return (1.0 - copy) * (1.0 - mismatch)
