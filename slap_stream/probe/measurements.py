"""Numbers that a policy may want of a sample's logits, besides its loss, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slap_stream.errors import ConfigError


def nuclear_norm(logits: Tensor) -> Tensor:
    """() sum of the singular values of (tokens, vocabulary) float32 logits; 0 of no tokens."""
    if not bool(torch.isfinite(logits).all()):
        return logits.new_tensor(torch.nan)
    values: Tensor = torch.linalg.svdvals(logits)
    return values.sum()


# What can be made of one sample's (tokens, vocabulary) logits, by the names that policies ask for.
MEASUREMENTS: dict[str, Callable[[Tensor], Tensor]] = {"nuclear_norm": nuclear_norm}


def functions_of(names: Sequence[str]) -> list[Callable[[Tensor], Tensor]]:
    """The functions of these names.

    Raises:
        ConfigError: If there is none of a name.
    """
    unknown = [name for name in names if name not in MEASUREMENTS]
    if unknown:
        raise ConfigError(
            f"measurements must be of {', '.join(MEASUREMENTS)}, got {', '.join(unknown)}; without "
            "the probe, hand others to SlapSampler.update."
        )
    return [MEASUREMENTS[name] for name in names]
