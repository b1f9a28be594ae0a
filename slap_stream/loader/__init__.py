"""Batches of sample ids -> collated batches, on every rank; feedback on its way back.

in   a `StreamingDataset`, `embeddings.zarr`, a collate function; losses
out  batches for the training step; checkpoints; metrics

loader.py       `SlapDataLoader`: torch's DataLoader over a sampler
pending.py      batches that are composed and not delivered yet
dealing.py      batches of one optimizer step, dealt by length
bad_samples.py  samples that cannot be read or collated
delivery.py     one iteration: pending batches to the training loop
tally.py        what is counted of delivered batches, and shown while a run goes on
  padding.py       how much of the batches was padding
  status_line.py   a line of log, now and then
  progress_bar.py  a bar
accelerated.py  a loader that Accelerate has prepared
probe_link.py   what a probe asks of a loader and tells it
ranks.py        what ranks tell each other
state.py        a checkpoint of all ranks
checks.py       settings and data that do not fit together
workers.py      what is said when a worker process dies, and when it must
run_log.py      what left the pools and why, losses and cost: the run's log, as it is written
leaving.py      a loader that nobody closes
run_files.py    the log's files, and how they are read while they grow
"""

from __future__ import annotations

# What other folders may import, by module; tests/test_architecture.py holds it.
EXPORTS = {
    "checks": ("check_batches", "check_run"),
    "run_files": ("Place", "RunEvents", "delivered_of", "find_log", "read_log"),
    "delivery": ("SAMPLE_ID",),
    "loader": ("SlapDataLoader",),
}
