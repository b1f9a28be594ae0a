"""Settings of the whole suite: no network, one thread, deterministic Hypothesis."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import HealthCheck, settings

# Models here are tiny, and threads that wait for each other cost more than they bring.
torch.set_num_threads(1)

settings.register_profile(
    "slap",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("slap")
