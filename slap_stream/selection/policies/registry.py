"""Policies by name: our own, registered ones, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from typing import Any

from slap_stream.config import SlapConfig
from slap_stream.errors import ConfigError
from slap_stream.selection.policies.base import NEEDS, Policy
from slap_stream.types import REFERENCE_COLUMN

PolicyFactory = Callable[[SlapConfig, Sequence[str]], Policy]

# Where installed packages name their policies.
ENTRY_POINTS = "slap_stream.policies"
# Most of the candidates that are read where a policy is not meant to see all: more costs more than
# selection saves.
MOST_PROBED = 0.15

_HERE = "slap_stream.selection.policies"
OURS = {
    "slap": f"{_HERE}.slap:Slap",
    "slap_paper": f"{_HERE}.peers.slap_paper:SlapPaper",
    "uniform": f"{_HERE}.uniform:Uniform",
    "subset": f"{_HERE}.peers.subset:Subset",
    "rs2": f"{_HERE}.peers.rs2:RS2",
    "max_loss": f"{_HERE}.peers.max_loss:MaxLoss",
    "infobatch": f"{_HERE}.peers.infobatch:InfoBatch",
    "k_centre": f"{_HERE}.peers.k_centre:KCentre",
    "rho_loss": f"{_HERE}.peers.rho_loss:RhoLoss",
    "greats": f"{_HERE}.peers.greats:Greats",
    "divbs": f"{_HERE}.peers.divbs:DivBS",
    "uds": f"{_HERE}.peers.uds:Uds",
}
_registered: dict[str, PolicyFactory] = {}


def register_policy(name: str, factory: PolicyFactory) -> None:
    """Make a policy of yours known by a name, for `SlapConfig(policy=...)`.

    Packages name theirs in the entry points `slap_stream.policies` instead, and need no call.

    Args:
        name: The name; a name of yours may be given another factory.
        factory: (config, names of the feature columns, none while they are not known) -> policy;
            as a rule a subclass of `Policy`.

    Raises:
        ConfigError: If the name is one of slap_stream's own.
        TypeError: If the factory cannot be called.
    """
    if not isinstance(name, str) or not name or name in OURS:
        raise ConfigError(
            f"name must be a policy's own, got {name!r}; take one that slap_stream has not."
        )
    if not callable(factory):
        raise TypeError(
            f"factory must be a subclass of Policy, or a function of config and columns, got "
            f"{factory!r}."
        )
    _registered[name] = factory


def make_policy(config: SlapConfig, columns: Sequence[str] | None = None) -> Policy:
    """Make the policy that a config names, if the other settings are such that it can work.

    Args:
        config: Settings.
        columns: Names of the feature columns that the embeddings have; None: not known yet.

    Raises:
        ConfigError: If there is no such policy, or a setting or a column is not as it needs.
        TypeError: If what was registered makes no `Policy`.
    """
    name = config.policy
    policy: Any = _factory(name)(config, () if columns is None else columns)
    if not isinstance(policy, Policy):
        raise TypeError(f"policy {name!r} must be a slap_stream.Policy, got {policy!r}; derive it.")
    needs: Any = policy.needs
    unknown = {needs} if isinstance(needs, str) else set(needs) - NEEDS.keys()
    if unknown:
        raise ConfigError(
            f"needs of policy {name!r} must be of {', '.join(NEEDS)}, got "
            f"{', '.join(sorted(unknown))}; numbers to be measured are named in measurements."
        )
    if config.keep == "auto" and "evidence" not in policy.needs:
        raise ConfigError(
            f'keep must be a number with policy {name!r}, got "auto"; only policies that need '
            "evidence, such as slap, find out what is dispensable."
        )
    if config.probe_fraction > MOST_PROBED and not policy.measures_all:
        raise ConfigError(
            f"probe_fraction must be in [0, {MOST_PROBED}], got {config.probe_fraction!r}; probing "
            f"more costs more than selection saves (policy {name!r} is not meant to measure every "
            "candidate)."
        )
    if "reference_loss" in policy.needs and columns is not None and REFERENCE_COLUMN not in columns:
        raise ConfigError(
            f"policy={name!r} needs the feature column {REFERENCE_COLUMN}, got "
            f"{', '.join(columns) or 'no columns'}; embed with --reference-model."
        )
    return policy


def _factory(name: str) -> PolicyFactory:
    if name in _registered:
        return _registered[name]
    factory: PolicyFactory
    if name in OURS:
        factory = resolve_name(OURS[name])
        return factory
    installed = _installed()
    if name not in installed:
        raise ConfigError(
            f"policy must be one of {', '.join([*OURS, *_registered, *installed])}, got {name!r}; "
            "one of your own is made known with register_policy."
        )
    factory = installed[name].load()
    return factory


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
