"""Checks of arguments that several stages make."""

from __future__ import annotations

import operator
from typing import Any

from slap_stream.errors import ConfigError


def require_whole(name: str, value: Any, least: int, cure: str = "") -> int:
    """The argument as an int.

    Args:
        name: Of the argument.
        value: What was given; NumPy's whole numbers are such, True and 2.0 are none.
        least: The smallest that is allowed.
        cure: What to do instead, for the error.

    Raises:
        ConfigError: If it is no whole number, or too small.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ConfigError(
            f"{name} must be a whole number >= {least}, got {value!r}{cure and '; '}{cure}."
        )
    return number
