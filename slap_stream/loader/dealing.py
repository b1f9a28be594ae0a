"""The batches of one optimizer step, dealt anew so that samples of like length share a batch.

Only the order changes: an optimizer step trains on what was composed for it. Each lane's samples
are dealt by themselves, and stay in the lane's part of the batch. So the batches do not depend on
how lanes are divided among ranks, and losses go back to the lane that has asked for them. Nothing
is moved between ranks: that would save padding and no time, since ranks wait for the slowest.
"""

from __future__ import annotations

import numpy as np

from slap_stream.types import FloatArray, IntArray


def deal_by_length(ids: IntArray, lengths: FloatArray, num_lanes: int) -> IntArray:
    """Deal each lane's samples over the batches by length, the longest first.

    The longest first, so that memory that does not suffice is found out at the first batch.

    Args:
        ids: (batches, batch) sample ids of one optimizer step, lane by lane in each batch.
        lengths: (batches, batch) length of each, in any unit that keeps their order.
        num_lanes: Lanes that share a batch, equally.

    Returns:
        (batches, batch) the same ids, every lane's in its part of the batches.
    """
    batches, size = ids.shape
    # (lanes, batches * a lane's part of the batch)
    by_lane = ids.reshape(batches, num_lanes, -1).swapaxes(0, 1).reshape(num_lanes, -1)
    keys = lengths.reshape(batches, num_lanes, -1).swapaxes(0, 1).reshape(num_lanes, -1)
    # Stable: samples of one length stay in the order in which they were composed.
    order = np.argsort(-keys, axis=1, kind="stable")
    dealt = np.take_along_axis(by_lane, order, axis=1)
    return dealt.reshape(num_lanes, batches, -1).swapaxes(0, 1).reshape(batches, size)
