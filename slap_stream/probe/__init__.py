"""Losses and gradient sketches of a few candidates, read at the output head of the model.

in   a model, collated batches of candidates
out  losses, gradient sketches and the head's second moment

probe.py          `LearnabilityProbe`: when, how many, and where the answers go
head.py           where the output head is, and how a model is called quietly
readout.py        losses and gradients of a batch, from one forward
memory.py         smaller batches where memory is too short for a forward
sink.py           token gradients to sketches, block by block
fused.py          losses of a training forward whose output has no logits
packing.py        batches without padding: whose tokens are whose, and are samples kept apart
measurements.py   other numbers of a sample's logits, for policies that ask for them
sketch.py         TensorSketch of a sample's gradient
second_moment.py  our approximation of the Hessian: Adam's second moment, factored
"""

from __future__ import annotations

# What other folders may import, by module; tests/test_architecture.py holds it.
EXPORTS = {
    "fused": ("FusedLosses", "body_outputs"),
    "head": ("check_causal", "entry", "find_head", "hidden_of", "unwrap"),
    "packing": (
        "check_apart",
        "mean_by_sample",
        "packed_positions",
        "sample_bounds",
        "supervised_targets",
    ),
    "probe": ("LearnabilityProbe", "check_probe_state"),
    "readout": ("per_sample_loss",),
}
