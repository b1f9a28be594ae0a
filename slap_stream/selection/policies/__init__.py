"""Rules that pick a batch from the pool: slap, its reconstruction from the paper, and its peers."""

from __future__ import annotations

from collections.abc import Callable

from slap_stream.config import SlapConfig
from slap_stream.selection.policies.base import Policy, PoolView
from slap_stream.selection.policies.peers.divbs import DivBS
from slap_stream.selection.policies.peers.greats import Greats
from slap_stream.selection.policies.peers.infobatch import InfoBatch
from slap_stream.selection.policies.peers.k_centre import KCentre
from slap_stream.selection.policies.peers.max_loss import MaxLoss
from slap_stream.selection.policies.peers.rho_loss import RhoLoss
from slap_stream.selection.policies.peers.rs2 import RS2
from slap_stream.selection.policies.peers.slap_paper import SlapPaper
from slap_stream.selection.policies.peers.subset import Subset
from slap_stream.selection.policies.peers.uds import Uds
from slap_stream.selection.policies.slap import Slap
from slap_stream.selection.policies.uniform import Uniform

__all__ = [
    "RS2",
    "DivBS",
    "Greats",
    "InfoBatch",
    "KCentre",
    "MaxLoss",
    "Policy",
    "PoolView",
    "RhoLoss",
    "Slap",
    "SlapPaper",
    "Subset",
    "Uds",
    "Uniform",
    "make_policy",
]


def make_policy(config: SlapConfig, *, has_reference: bool = False) -> Policy:
    """The policy that a config names.

    Args:
        config: Settings.
        has_reference: Whether the embeddings have the losses of a reference model.
    """
    policies: dict[str, Callable[[SlapConfig], Policy]] = {
        "slap": lambda c: Slap(c, c.rank_weight_for(has_reference=has_reference)),
        "slap_paper": lambda _: SlapPaper(),
        "uniform": lambda _: Uniform(),
        "subset": Subset,
        "rs2": RS2,
        "max_loss": MaxLoss,
        "infobatch": InfoBatch,
        "k_centre": lambda _: KCentre(),
        "rho_loss": RhoLoss,
        "greats": lambda _: Greats(),
        "divbs": lambda _: DivBS(),
        "uds": lambda _: Uds(),
    }
    return policies[config.policy](config)
