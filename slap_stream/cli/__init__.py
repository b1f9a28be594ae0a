"""Command lines: arguments in, one call of `convert` or `embed`, a line of JSON out.

convert.py       slap-convert
embed.py         slap-embed
command_line.py  arguments that are checked, errors of one line
"""

from __future__ import annotations

EXPORTS: dict[str, tuple[str, ...]] = {}
