"""Rules that pick a batch from the pool: slap, its reconstruction from the paper, and baselines."""

from __future__ import annotations

from slap_stream.config import SlapConfig
from slap_stream.policies.base import Policy, PoolView
from slap_stream.policies.max_loss import MaxLoss
from slap_stream.policies.slap import Slap
from slap_stream.policies.slap_paper import SlapPaper
from slap_stream.policies.uniform import Uniform

__all__ = ["MaxLoss", "Policy", "PoolView", "Slap", "SlapPaper", "Uniform", "make_policy"]


def make_policy(config: SlapConfig) -> Policy:
    """The policy that a config names."""
    policies: dict[str, Policy] = {
        "slap": Slap(config),
        "slap_paper": SlapPaper(),
        "uniform": Uniform(),
        "max_loss": MaxLoss(),
    }
    return policies[config.policy]
