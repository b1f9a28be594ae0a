"""Candidates -> batches of sample ids; losses and gradient sketches come back.

in   how many samples each shard has; rows of embeddings; losses and sketches
out  lists of sample ids, one a batch; candidates whose loss would tell most

sampler.py        `SlapSampler`: this rank's lanes, and all that a loader may ask of them
run.py            the lanes of a rank and what they share, in one piece
lane.py           one lane: candidates in, batches out, step by step
  order.py        which candidates come when, block by block
  intake.py       the rows of a block, read once
  strata.py       source x embedding cluster
  pool.py         candidates that wait, and what was trained on lately
  scoring.py      what each pooled candidate is worth
  schedule.py     how long an epoch is, and when the pool fills and drains
  quota.py        how much is kept, and how many slots each stratum has
  composer.py     which candidates make the next batch, which leave, which are probed
  batch_kernels.py  its compiled inner loops
  repeats.py      samples that an epoch offers more than once
  policies/       the rules themselves, and registry.py: which there are, by name
awaiting.py       losses that were asked for, over the lanes of a rank
  feedback.py     what has come back to a lane
  outliers.py     losses that stand out, remembered by sample
shared.py         what all lanes share: strata, loss model, keep
  loss_model.py   losses and gradients as the embeddings predict them
  moments.py      the sums that it is solved from
refresh.py        sums over lanes and ranks, every few steps
departures.py     what has left the pools, and why
state.py          does a saved state fit this run
withdrawal.py     candidates that turn out to be of no use: out of batches and pools
metrics.py        counts over lanes
"""

from __future__ import annotations

# What other folders may import, by module; tests/test_architecture.py holds it.
EXPORTS = {
    "policies.registry": ("make_policy",),
    "departures": ("DRAWN_OUT", "LEARNT", "OUTCOMES", "ROW", "TRAINED", "WITHDRAWN"),
    "scoring": ("copy_likelihood", "neighbour_distance"),
    "sampler": ("SlapSampler",),
    "schedule": ("check_lanes", "check_plan"),
    "state": ("check_ranks_agree",),
    "shared": ("sum_in_order",),
    "withdrawal": (
        "composed_around",
        "lane_probing",
        "unusable_samples",
        "withdraw_composed",
        "withdraw_pooled",
    ),
}
